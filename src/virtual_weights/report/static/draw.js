"use strict";
// What every section draws with: elements, numbers, the tip, tables and plots.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "text", "g", "title"]);

function make(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const section = (id, title, ...children) => make("section", { id }, make("h2", {}, title), ...children);

const NONE = "–", MINUS = "−";
const isNumber = (value) => typeof value === "number";
const raised = (exponent) => [...String(exponent)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("");
function power(size, digits) {
  const [front, exponent] = size.toExponential(digits - 1).split("e");
  return `${Number(front)} × 10${raised(Number(exponent))}`;
}
function number(value, digits = 3) {
  if (!isNumber(value)) return value === null || value === undefined ? NONE : String(value);
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(size).toLocaleString("en-US") : size > 0 && size < 1e-4 ? power(size, digits) : String(Number(size.toPrecision(digits)));
  return (value < 0 ? MINUS : "") + text;
}
// One count of decimals for a whole column, so that its points stand below each other.
function aligned(values) {
  const found = values.filter(isNumber);
  if (!found.length || found.every(Number.isInteger)) return (v) => number(v, 12);
  const largest = Math.max(...found.map(Math.abs));
  if (largest < 0.1) return (v) => number(v);
  const decimals = Math.min(3, Math.max(0, 3 - Math.floor(Math.log10(largest))));
  return (v) => (isNumber(v) ? v.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }).replace("-", MINUS) : number(v));
}

const layerOf = (label) => Number(/^L(\d+)/.exec(label)?.[1] ?? -1);
const headOf = (label) => Number(/H(\d+)/.exec(label)?.[1] ?? -1);
const isHead = (label) => /^L\d+H\d+$/.test(label);
const byName = (a, b) => String(a ?? "").localeCompare(String(b ?? ""), undefined, { numeric: true });

const tip = make("div", { id: "tip", role: "status" });
function showTip(event, lines) {
  tip.replaceChildren(...lines.flatMap((line, i) => (i ? [make("br"), line] : [make("b", {}, line)])));
  tip.classList.add("on");
  const { clientX: x, clientY: y } = event.clientX === undefined ? event.target.getBoundingClientRect() : event;
  tip.style.left = `${Math.max(8, Math.min((x ?? 0) + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(8, (y ?? 0) - tip.offsetHeight - 12)}px`;
}
const hideTip = () => tip.classList.remove("on");
function tipped(node, lines) {
  for (const name of ["mousemove", "focus"]) node.addEventListener(name, (event) => showTip(event, lines));
  for (const name of ["mouseleave", "blur"]) node.addEventListener(name, hideTip);
  return node;
}

// Columns are {key, title, text, hint, cell}; rows are objects. Text stands left, numbers right and aligned. A column may
// belong to a group with a heading, hold an element below its title, stand left though numeric, or begin upwards.
function sortable(columns, rows, { sort = null, down = true, most = 25 } = {}) {
  const state = { sort, down, most, rows };
  const body = make("tbody"), more = make("button", { type: "button", onclick: () => { state.most += 100; draw(); } }, "Show more");
  const first = (c, i) => c.group && columns[i - 1]?.group !== c.group && "first";
  const style = (c, i, ...more) => [c.text && "text", first(c, i), ...more].filter(Boolean).join(" ") || null;
  const heads = columns.map((c, i) => make("th", { scope: "col", class: style(c, i), title: c.hint || null }, make("button", { type: "button", onclick: () => {
    state.down = state.sort === c.key ? !state.down : !(c.up || (c.text && !c.numeric));
    state.sort = c.key; draw();
  } }, c.title), c.below));
  const groups = columns.map((c, i) => [c.group ?? "", columns.filter((o) => o.group === c.group).length, first(c, i)]).filter(([name], i, all) => name !== all[i - 1]?.[0])
    .map(([name, span, edge]) => make("th", { scope: name ? "colgroup" : null, colspan: span, class: `group ${edge || ""}`.trim() }, name));
  function draw() {
    const { key, ...by } = columns.find((c) => c.key === state.sort) ?? {}, text = by.text && !by.numeric;
    let shown = [...state.rows];
    if (key !== undefined) shown.sort((a, b) => {
      if (text || !isNumber(a[key]) || !isNumber(b[key])) return text ? byName(a[key], b[key]) * (state.down ? -1 : 1) : isNumber(b[key]) - isNumber(a[key]);
      return (a[key] - b[key]) * (state.down ? -1 : 1);
    });
    columns.forEach((c, i) => (c.key === state.sort ? heads[i].setAttribute("aria-sort", state.down ? "descending" : "ascending") : heads[i].removeAttribute("aria-sort")));
    const formats = columns.map((c) => (c.text ? (v) => number(v) : aligned(state.rows.map((r) => r[c.key]))));
    body.replaceChildren(...shown.slice(0, state.most).map((row) => make("tr", {}, ...columns.map((c, i) => make("td", { class: style(c, i, c.text && c.style) }, c.cell ? c.cell(row, formats[i](row[c.key])) : formats[i](row[c.key]))))));
    if (!shown.length) body.replaceChildren(make("tr", {}, make("td", { class: "text", colspan: columns.length }, "Nothing fits this filter.")));
    more.hidden = shown.length <= state.most;
  }
  draw();
  return {
    element: make("div", {}, make("div", { class: "scroll" }, make("table", {}, make("thead", {}, groups.length > 1 ? make("tr", {}, ...groups) : null, make("tr", {}, ...heads)), body)), make("div", { class: "bar" }, more)),
    show(rows, by) { state.rows = rows; if (by) { state.sort = by; state.down = true; } draw(); },
  };
}

function ticks([low, high], most = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) ?? 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}
// Axes, grid and scales of a plot; sections add their own marks to its svg.
function plot({ width = 350, height = 210, left = 44, x, y, xTitle, yTitle, xTicks, yTicks, label, grid = true }) {
  const room = Math.max(300, innerWidth - 58); // a phone gets a smaller plot rather than smaller letters
  if (width > room) [width, height] = [room, Math.round(height * Math.max(0.75, room / width))];
  const right = 14, top = 26, bottom = 42;
  const px = (v) => left + ((v - x[0]) / (x[1] - x[0])) * (width - left - right);
  const py = (v) => height - bottom - ((v - y[0]) / (y[1] - y[0])) * (height - top - bottom);
  const svg = make("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const [v, text] of yTicks ?? ticks(y).map((v) => [v, number(v)])) {
    if (grid) svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: py(v), y2: py(v) }));
    svg.append(make("text", { x: left - 7, y: py(v) + 3.8, "text-anchor": "end" }, text));
  }
  for (const [v, text] of xTicks ?? ticks(x).map((v) => [v, number(v)])) svg.append(
    make("line", { class: "tick", x1: px(v), x2: px(v), y1: height - bottom, y2: height - bottom + 4 }),
    make("text", { x: px(v), y: height - bottom + 17, "text-anchor": "middle" }, text));
  svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    make("text", { class: "unit", x: 2, y: 13 }, yTitle), make("text", { class: "unit", x: width - right, y: height - 7, "text-anchor": "end" }, xTitle));
  const at = (event) => {
    const box = svg.getBoundingClientRect(), zoom = width / box.width;
    return [x[0] + (((event.clientX - box.left) * zoom - left) / (width - left - right)) * (x[1] - x[0]),
      y[0] + ((height - bottom - (event.clientY - box.top) * zoom) / (height - top - bottom)) * (y[1] - y[0])];
  };
  return { svg, px, py, at };
}
function curve(chart, points, attributes) {
  let pen = false;
  const d = points.map(([x, y]) => {
    if (!isNumber(y)) { pen = false; return ""; }
    const step = `${pen ? "L" : "M"}${chart.px(x).toFixed(1)},${chart.py(y).toFixed(1)}`;
    pen = true;
    return step;
  }).join("");
  return make("path", { ...attributes, class: `curve ${attributes.class ?? ""}`, d });
}
const rule = (chart, from, to, name = "rule") => make("line", { class: name, x1: chart.px(from[0]), y1: chart.py(from[1]), x2: chart.px(to[0]), y2: chart.py(to[1]) });
const key = (colour, ...text) => make("span", { class: `key ${colour}` }, ...text);
const column = (table, name) => table.columns.find((c) => c.name === name)?.values;
