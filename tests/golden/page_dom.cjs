// As much of a document as the report's script needs: runs it and tells what the page then holds.
const html = require("fs").readFileSync(process.argv[2], "utf8");
const between = (start, end) => html.slice(html.indexOf(start) + start.length, html.indexOf(end, html.indexOf(start)));
const nothing = () => new Proxy(() => "", { get: (_, name) => (name === Symbol.toPrimitive ? () => "" : nothing()), set: () => true });
class Node {
  constructor(tag) { Object.assign(this, { tag, children: [], attributes: {}, dataset: {}, style: {}, listeners: {}, hidden: false }); this.classList = { add() {}, remove() {} }; }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
    if (name === "id") this.id = value;
    if (name.startsWith("data-")) this.dataset[name.slice(5)] = String(value);
  }
  removeAttribute(name) { delete this.attributes[name]; }
  addEventListener(name, act) { this.listeners[name] = act; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  getContext() { return nothing(); }
  set textContent(text) { this.children = [text]; }
  get textContent() { return this.children.map((c) => (c instanceof Node ? c.textContent : String(c))).join(" "); }
  all(test) { return this.children.filter((c) => c instanceof Node).flatMap((c) => [...(test(c) ? [c] : []), ...c.all(test)]); }
}
const page = new Node("main"), data = new Node("script");
data.textContent = between('<script id="data" type="application/json">', "</script>");
const document = { getElementById: (id) => (id === "data" ? data : page), createElement: (tag) => new Node(tag), createElementNS: (_, tag) => new Node(tag), addEventListener() {}, dispatchEvent() {}, documentElement: new Node("html"), body: new Node("body") };
const script = between("<script>", "</script>");
new Function("document", "matchMedia", "getComputedStyle", "innerWidth", script)(document, () => ({ addEventListener() {} }), () => nothing(), 1280);
const sections = page.all((n) => n.tag === "section");
const found = {
  sections: sections.map((s) => s.id),
  contents: page.all((n) => n.tag === "a").map((a) => a.attributes.href),
  text: Object.fromEntries(sections.map((s) => [s.id, s.textContent])),
  arcs: page.all((n) => /^arc /.test(n.attributes.class ?? "")).map((n) => n.attributes.d),
  tags: Object.fromEntries(sections.map((s) => [s.id, s.all((n) => /^tag /.test(n.attributes.class ?? "")).map((n) => n.textContent)])),
  said: page.all((n) => n.tag === "title" || /^arc /.test(n.attributes.class ?? "")).map((n) => n.attributes["aria-label"] ?? n.textContent),
  absent: page.all((n) => n.attributes.class === "absent").map((n) => [n.textContent, n.attributes.title]),
  effects: page.all((n) => /^effects/.test(n.attributes.class ?? "")).map((n) => ({ told: n.attributes["aria-label"], marks: Object.fromEntries(n.children.map((c) => [c.attributes.class ?? c.tag, c.attributes])) })),
  struck: page.all((n) => n.tag === "del").map((n) => n.textContent),
  bad: page.all((n) => /NaN|undefined|Infinity/.test(Object.values(n.attributes).join(" "))).map((n) => [n.tag, ...Object.values(n.attributes)].join(" ")),
};
for (const each of page.all((n) => n.listeners.click)) each.listeners.click({ currentTarget: each });  // every button works
console.log(JSON.stringify(found));
