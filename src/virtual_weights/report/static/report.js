"use strict";
// The page is a function of the data: every section takes it and gives an element.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const EXPLAIN = { Q: "queries", K: "keys", V: "values" };

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "circle", "text", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const number = (value, digits = 3) => (value === null ? "" : Math.abs(value) >= 1000 ? value.toFixed(0) : Number(value.toPrecision(digits)).toString());
const layerOf = (label) => Number(/^L(\d+)/.exec(label)?.[1] ?? -1);
const headOf = (label) => Number(/H(\d+)/.exec(label)?.[1] ?? 0);

const tip = make("div", { id: "tip", role: "status" });
function showTip(event, lines) {
  tip.replaceChildren(...lines.flatMap((line, i) => (i ? [make("br"), line] : [make("b", {}, line)])));
  tip.classList.add("on");
  const { clientX: x, clientY: y } = event.clientX === undefined ? event.target.getBoundingClientRect() : event;
  tip.style.left = `${Math.min((x ?? 0) + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(8, (y ?? 0) - tip.offsetHeight - 12)}px`;
}
const hideTip = () => tip.classList.remove("on");

// Edges into heads that share keys or values are one channel: keep the strongest and name all readers.
function distinct(edges) {
  const groups = new Map();
  for (const edge of edges) {
    const key = `${edge.port} ${edge.writer} ${edge.channel ?? edge.reader}`;
    const group = groups.get(key);
    if (group) group.readers.push(edge.reader);
    else groups.set(key, { ...edge, readers: [edge.reader] });
  }
  return [...groups.values()];
}
const readersOf = (edge) => (edge.readers ?? [edge.reader]).join(", ");
const facts = (edge) => [
  `${edge.writer} → ${readersOf(edge)} (${EXPLAIN[edge.port]})`,
  `score ${number(edge.score)}, ${number(edge.null_ratio)} times chance`,
  `strength ${number(edge.strength)}, z ${number(edge.z)}`,
  edge.channel ? `${edge.channel} is shared by ${edge.shared.join(", ")}` : "",
].filter(Boolean);

function header() {
  const { model, family, sizes, norm } = data.model;
  const theme = make("button", { type: "button", onclick: () => {
    const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    document.dispatchEvent(new Event("theme"));
  } }, "Light / dark");
  const fact = (name, value) => (value === null || value === undefined ? null : make("li", {}, make("b", {}, String(value)), ` ${name}`));
  return make("div", {},
    make("header", {}, make("h1", {}, `Virtual weights of ${model}`), theme),
    make("p", { class: "lede" }, "Which heads can talk to which over the residual stream, read from the weights alone. Nothing was run."),
    make("ul", { class: "facts" }, fact("family", family), fact("layers", sizes.n_layers), fact("heads a layer", sizes.n_heads),
      fact("key/value heads", sizes.n_kv_heads), fact("d_model", sizes.d_model), fact("d_head", sizes.d_head), make("li", {}, "norm: ", make("b", {}, norm))));
}

function spine() {
  const heads = data.model.components.filter((c) => c.kind === "head");
  const layers = data.model.sizes.n_layers, perLayer = data.model.sizes.n_heads;
  const W = Math.max(760, Math.min(1128, layers * 40)), side = 46, step = (W - 2 * side) / Math.max(layers, 1);
  const H = 420, base = 330;
  const x = (label) => side + layerOf(label) * step + step * (0.08 + (0.62 * (headOf(label) + 0.5)) / perLayer);
  const state = { ports: new Set(["Q", "K", "V"]), count: 24, focus: null };
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Residual stream with the strongest virtual connections" });
  const count = make("output", {}, String(state.count));

  function shown() {
    const wanted = data.edges.filter((e) => state.ports.has(e.port) && (!state.focus || e.writer === state.focus || e.reader === state.focus));
    return distinct(wanted.sort((a, b) => b.score - a.score)).slice(0, state.count);
  }
  const end = (edge) => edge.readers.reduce((sum, r) => sum + x(r), 0) / edge.readers.length;
  function arc(edge, widest, longest) {
    const a = x(edge.writer), b = end(edge);
    const lift = 34 + (base - 100) * ((b - a) / longest) ** 0.75;
    const path = make("path", {
      class: `arc ${edge.port}`, tabindex: 0, "stroke-width": (1.2 + 5.2 * (edge.score / widest) ** 2).toFixed(2),
      d: `M${a.toFixed(1)},${base - 9} C${a.toFixed(1)},${(base - 9 - lift * 1.25).toFixed(1)} ${b.toFixed(1)},${(base - 9 - lift * 1.25).toFixed(1)} ${b.toFixed(1)},${base - 9}`,
      "aria-label": facts(edge).join("; "),
    });
    const on = (event) => { svg.classList.add("dim"); path.classList.add("lit"); showTip(event, facts(edge)); };
    const off = () => { svg.classList.remove("dim"); path.classList.remove("lit"); hideTip(); };
    for (const name of ["mousemove", "focus"]) path.addEventListener(name, on);
    for (const name of ["mouseleave", "blur"]) path.addEventListener(name, off);
    return path;
  }
  function labels(edges) {
    const taken = [], nodes = [];
    for (const edge of edges.slice(0, 14)) for (const label of [edge.writer, edge.readers[0]]) {
      const at = x(label), y = base + 36;
      if (taken.some((t) => Math.abs(t.at - at) < 15 || t.label === label)) continue;
      taken.push({ at, label });
      nodes.push(make("text", { class: "name", x: at, y, transform: `rotate(52 ${at} ${y})` }, label));
    }
    return nodes;
  }
  function draw() {
    const edges = shown(), widest = Math.max(...edges.map((e) => e.score), 1e-9), longest = Math.max(...edges.map((e) => end(e) - x(e.writer)), 1e-9);
    const active = new Set(edges.flatMap((e) => [e.writer, ...e.readers]));
    const nodes = [make("line", { class: "spine", x1: 16, x2: W - 16, y1: base, y2: base })];
    for (const [name, at] of [["embed", 16], ["unembed", W - 16]]) nodes.push(make("circle", { class: "end", cx: at, cy: base, r: 6 }, make("title", {}, name)));
    nodes.push(make("text", { x: 8, y: base - 14 }, "embed"), make("text", { x: W - 8, y: base - 14, "text-anchor": "end" }, "unembed"));
    for (const part of data.model.components) {
      if (part.kind !== "mlp") continue;
      nodes.push(make("rect", { class: "mlp", x: side + part.layer * step + step * 0.78, y: base - 5, width: Math.max(4, step * 0.17), height: 10, rx: 2.5 }, make("title", {}, part.label)));
    }
    for (const head of heads) {
      const dot = make("rect", { class: active.has(head.label) ? "head on" : "head", x: x(head.label) - 1.1, y: base + 6, width: 2.2, height: active.has(head.label) ? 13 : 8, rx: 1 }, make("title", {}, head.label));
      nodes.push(dot);
    }
    const every = Math.max(1, Math.ceil(layers / 32));
    for (let l = 0; l < layers; l += every) nodes.push(make("text", { x: side + l * step + step * 0.4, y: H - 8, "text-anchor": "middle" }, String(l)));
    nodes.push(make("text", { x: 8, y: H - 8 }, "layer"));
    nodes.push(...labels(edges), ...edges.slice().reverse().map((edge) => arc(edge, widest, longest)));
    svg.replaceChildren(...nodes);
    count.textContent = String(edges.length);
  }
  const ports = ["Q", "K", "V"].map((port) => make("button", { class: port, type: "button", "aria-pressed": "true", onclick: (event) => {
    if (state.ports.has(port)) state.ports.delete(port); else state.ports.add(port);
    event.currentTarget.setAttribute("aria-pressed", String(state.ports.has(port)));
    draw();
  } }, `${port} · ${EXPLAIN[port]}`));
  const names = heads.map((h) => h.label);
  const focus = make("select", { "aria-label": "only edges of one head", onchange: (event) => { state.focus = event.target.value || null; draw(); } },
    make("option", { value: "" }, "all heads"), ...names.map((name) => make("option", { value: name }, name)));
  const slider = make("input", { type: "range", min: 4, max: 80, value: state.count, "aria-label": "how many channels", oninput: (event) => { state.count = Number(event.target.value); draw(); } });
  draw();
  return make("section", {}, make("h2", {}, "The stream and its strongest channels"),
    make("p", {}, "The line is the residual stream, from the embedding to the unembedding. Ticks below it are attention heads, boxes on it are MLPs. An arc is a virtual weight: what a head writes, read directly by a later head through its queries, keys or values. Wider means a higher composition score; heads that share one key or value head are one arc."),
    make("div", { class: "bar" }, ...ports, make("label", {}, "strongest", slider, count), make("label", {}, "of", focus)),
    make("div", { class: "scroll" }, svg));
}

// Anchors of a perceptually even ramp from near-black blue to pale yellow (reversed on light paper).
const RAMP = [[13, 16, 45], [49, 35, 98], [98, 44, 118], [150, 55, 112], [201, 76, 89], [238, 118, 68], [250, 174, 84], [247, 236, 176]];
function colour(t) {
  const at = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), f = at - i;
  return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * f));
}
function decode(map) {
  const bytes = Uint8Array.from(atob(map.steps), (c) => c.charCodeAt(0));
  const steps = new Uint16Array(bytes.buffer), values = new Float32Array(steps.length);
  for (let i = 0; i < steps.length; i++) values[i] = steps[i] === 0 ? NaN : ((steps[i] - 1) / 65534) * map.largest;
  return values;
}

function heatmaps() {
  if (!data.maps.length) return null;
  const TITLE = { composition: "composition score", overlap: "subspace overlap" };
  const UNIT = { composition: "1 / √d is chance", overlap: "mean cos² of principal angles" };
  let current = data.maps.find((m) => m.port === "K") ?? data.maps[0], values, top;
  const canvas = make("canvas", { tabindex: 0, role: "img" });
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  const scale = make("div", { class: "scale" }), ramp = make("div", { class: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${RAMP.map((c) => `rgb(${c})`).join(",")})`;
  const LEFT = 44, BOTTOM = 40;

  function draw() {
    values = decode(current);
    const sorted = Array.from(values).filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
    top = sorted[Math.floor(sorted.length * 0.999)] || current.largest || 1;
    const rows = current.readers.length, columns = current.writers.length;
    const cell = Math.max(1, Math.round(720 / Math.max(rows, columns))), w = columns * cell, h = rows * cell;
    canvas.width = w + LEFT; canvas.height = h + BOTTOM;
    const paint = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const hole = style.getPropertyValue("--hole").trim(), soft = style.getPropertyValue("--soft").trim();
    paint.clearRect(0, 0, canvas.width, canvas.height);
    paint.fillStyle = hole; paint.fillRect(LEFT, 0, w, h);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const value = values[r * columns + c];
      if (Number.isNaN(value)) continue;
      paint.fillStyle = `rgb(${colour(value / top)})`;
      paint.fillRect(LEFT + c * cell, (rows - 1 - r) * cell, cell, cell);
    }
    paint.fillStyle = soft; paint.font = `${Math.max(12, canvas.width / 62)}px system-ui, sans-serif`;
    axis(current.readers, (i) => [LEFT - 8, (rows - 0.5 - i) * cell, "right", "middle"]);
    axis(current.writers, (i) => [LEFT + (i + 0.5) * cell, h + 8, "center", "top"]);
    function axis(names, place) {
      const layers = layerOf(names[names.length - 1]) + 1, every = Math.max(1, Math.ceil(layers / 10)) || 1;
      let last = -1;
      names.forEach((name, i) => {
        const layer = layerOf(name);
        if (layer === last || layer % every) return;
        last = layer;
        const [x, y, align, baseline] = place(i);
        paint.textAlign = align; paint.textBaseline = baseline; paint.fillText(String(layer), x, y);
      });
    }
    canvas.setAttribute("aria-label", `${TITLE[current.question]} through ${EXPLAIN[current.port]}, readers upwards, writers to the right, by layer`);
    scale.replaceChildren(make("span", {}, "0"), make("span", {}, UNIT[current.question]), make("span", {}, number(top)));
    readout.replaceChildren("Point at the map: readers run upwards, writers to the right, numbers are layers. Empty cells cannot reach.");
  }
  function read(event) {
    const box = canvas.getBoundingClientRect(), rows = current.readers.length, columns = current.writers.length;
    const cell = Math.max(1, Math.round(720 / Math.max(rows, columns))), zoom = canvas.width / box.width;
    const c = Math.floor(((event.clientX - box.left) * zoom - LEFT) / cell), r = rows - 1 - Math.floor(((event.clientY - box.top) * zoom) / cell);
    if (r < 0 || c < 0 || r >= rows || c >= columns) return;
    const value = values[r * columns + c], reader = current.readers[r], writer = current.writers[c];
    const channel = current.channels[r];
    const where = current.by_layer ? `strongest pair of ${writer} → ${reader}` : `${writer} → ${reader}`;
    readout.replaceChildren(make("b", {}, where), make("br"),
      Number.isNaN(value) ? "cannot reach: the writer comes too late" : `${TITLE[current.question]} ${number(value)}`,
      ...(Number.isNaN(value) || current.question !== "composition" ? [] : [make("br"), `${number(value * Math.sqrt(data.model.sizes.d_model))} times chance`]),
      ...(channel ? [make("br"), `${channel}, shared by its query heads`] : []));
  }
  canvas.addEventListener("mousemove", read);
  document.addEventListener("theme", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const buttons = data.maps.map((map) => make("button", { type: "button", class: map.port, "aria-pressed": String(map === current), onclick: (event) => {
    current = map;
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === event.currentTarget));
    draw();
  } }, `${map.port} ${map.question === "overlap" ? "overlap" : "composition"}`));
  draw();
  const aggregated = data.maps.some((m) => m.by_layer) ? " This model has too many heads for a cell each: a cell is the strongest pair of two layers." : "";
  return make("section", {}, make("h2", {}, "Every pair"),
    make("p", {}, `Every head that writes against every later head that reads, one map for each port.${aggregated}`),
    make("div", { class: "bar" }, ...buttons),
    make("div", { class: "maps" }, canvas, make("div", {}, ramp, scale, readout)));
}

function table() {
  const COLUMNS = [["port", "port"], ["writer", "writer"], ["reader", "reader"], ["shared", "shared channel"], ["score", "score"], ["null_ratio", "× chance"], ["z", "z"], ["strength", "strength"]];
  const state = { sort: "score", down: true, text: "", merged: true, most: 25 };
  const body = make("tbody"), more = make("button", { type: "button", onclick: () => { state.most += 100; draw(); } }, "Show more");
  function draw() {
    const wanted = state.text.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let rows = [...data.edges].sort((a, b) => b.score - a.score);
    rows = state.merged ? distinct(rows) : rows.map((e) => ({ ...e, readers: [e.reader] }));
    rows = rows.filter((e) => wanted.every((w) => [e.port, e.writer, ...e.readers, e.channel ?? ""].some((name) => name.toLowerCase() === w || name.toLowerCase().startsWith(w + "h") || name.toLowerCase() === w.replace(".", "h"))));
    const key = (e) => (state.sort === "shared" ? e.channel ?? "" : e[state.sort]);
    rows.sort((a, b) => (typeof key(a) === "number" ? key(a) - key(b) : String(key(a)).localeCompare(String(key(b)), undefined, { numeric: true })) * (state.down ? -1 : 1));
    body.replaceChildren(...rows.slice(0, state.most).map((e) => make("tr", {},
      make("td", {}, make("span", { class: `port ${e.port}` }, e.port)), make("td", {}, e.writer), make("td", {}, readersOf(e)),
      make("td", { class: "shared" }, e.channel ? `${e.channel} (${e.shared.join(" ")})` : ""),
      ...["score", "null_ratio", "z", "strength"].map((name) => make("td", {}, number(e[name]))))));
    if (!rows.length) body.replaceChildren(make("tr", {}, make("td", { colspan: 8 }, "No edge among the strongest of each port fits this filter.")));
    more.hidden = rows.length <= state.most;
  }
  const head = make("tr", {}, ...COLUMNS.map(([name, title]) => make("th", { scope: "col" }, make("button", { type: "button", onclick: () => {
    state.down = state.sort === name ? !state.down : true;
    state.sort = name; draw();
  } }, title))));
  const search = make("input", { type: "search", placeholder: "filter: K L16H0, or L18", "aria-label": "filter edges", oninput: (event) => { state.text = event.target.value; draw(); } });
  const merge = make("input", { type: "checkbox", checked: true, onchange: (event) => { state.merged = event.target.checked; draw(); } });
  draw();
  const per = data.edges.length ? Math.max(...["Q", "K", "V"].map((p) => data.edges.filter((e) => e.port === p).length)) : 0;
  return make("section", {}, make("h2", {}, "The strongest edges"),
    make("p", {}, `The ${per} highest scores of each port; the atlas beside this file holds all of them. Heads that share a key or value head are one channel under several names.`),
    make("div", { class: "bar" }, search, make("label", {}, merge, "one row per channel")),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), body)), make("div", { class: "bar" }, more));
}

function guide() {
  const item = (name, ...text) => [make("dt", {}, name), make("dd", {}, ...text)];
  const code = (text) => make("code", {}, text);
  const d = data.model.sizes.d_model;
  return make("section", {}, make("h2", {}, "How to read the numbers"), make("dl", {},
    ...item("score", "Composition of writer a into reader b: ", code("‖QK OV‖ / (‖QK‖ ‖OV‖)"), " for keys, with QKᵀ for queries and the reader's OV for values. Between 0 and 1; free of the heads' inner bases."),
    ...item("× chance", `The score over ${code("1/√d").textContent} = ${number(1 / Math.sqrt(d))}, its root mean square when the two maps have random relative orientation.`),
    ...item("z", "How many standard deviations the squared strength lies above that chance, from closed-form moments. Trained weights are not random, so large values are common; compare edges, do not read it as a probability."),
    ...item("strength", "The numerator alone, in units of the weights: how much could arrive. A high score can be weak and a low score strong."),
    ...item("subspace overlap", "Mean squared cosine of the principal angles between what a head can write and what a port can read, whatever the gains."),
    ...item("what this cannot say", "Weights say what could be communicated directly. Whether it is depends on attention and on the text, and paths through other components are not counted.")));
}

function footer() {
  const { reference, fingerprint, version } = data.model;
  const k = data.stamps.K ?? Object.values(data.stamps)[0] ?? {};
  return make("footer", {}, `${reference} · fingerprint ${fingerprint} · virtual-weights ${version} · rotary offset ${k.rotary_offset ?? ""} · computed in ${k.compute_dtype ?? ""}. `,
    "Composition scores after Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.");
}

const page = document.getElementById("page");
page.replaceChildren(...[header(), spine(), heatmaps(), table(), guide(), footer()].filter(Boolean));
document.body.append(tip);
