// The stream itself: where every component is on it, and the strongest connections as arcs.
const EXPLAIN = { Q: "queries", K: "keys", V: "values", gate: "MLP gates", up: "MLP up rows", in: "MLP inputs", unembed: "unembedding" };
const PORTS = Object.keys(EXPLAIN).filter((port) => data.maps.some((m) => m.port === port) || data.edges.some((e) => e.port === port));
const COMPOSED = PORTS.filter((port) => data.edges.some((e) => e.port === port));

// Edges into heads that share keys or values are one group: keep the strongest and name all readers.
function distinct(edges) {
  const groups = new Map();
  for (const edge of edges) {
    const key = `${edge.port} ${edge.writer} ${edge.group ?? edge.reader}`;
    const group = groups.get(key);
    if (group) group.readers.push(edge.reader);
    else groups.set(key, { ...edge, readers: [edge.reader] });
  }
  return [...groups.values()];
}
const readersOf = (edge) => (edge.readers ?? [edge.reader]).join(", ");
const toldReaders = (edge) => (edge.readers ?? [edge.reader]).map(told).join(", ");
const facts = (edge) => [
  `${told(edge.writer)} → ${toldReaders(edge)}, ${EXPLAIN[edge.port]}`,
  `score ${number(edge.score)}, ${number(edge.null_ratio)} times chance`,
  `strength ${number(edge.strength)}, z ${number(edge.z)}${isNumber(edge.lift) ? `, lift ${number(edge.lift)}` : ""}`,
  edge.group ? `${edge.group} is shared by ${edge.shared.join(", ")}` : "",
].filter(Boolean);

function spine() {
  if (!data.edges.length) return null;
  const heads = data.model.components.filter((c) => c.kind === "head");
  const layers = data.model.sizes.n_layers, perLayer = Math.max(1, ...heads.map((c) => headOf(c.label) + 1));
  const W = Math.max(760, Math.min(1128, layers * 40)), side = 46, step = (W - 2 * side) / Math.max(layers, 1);
  const H = 420, base = 330;
  // Within a layer: heads first, then what attention always adds, the MLP, and what it always adds.
  const PLACES = [[/^(embed|pos)$/, () => 16], [/^unembed$/, () => W - 16], [/attn\.bias$/, (l) => inLayer(l, 0.73)], [/mlp\.bias$/, (l) => inLayer(l, 0.97)], [/\.mlp/, (l) => inLayer(l, 0.85)]];
  const inLayer = (label, share) => side + (layerOf(label) + share) * step;
  const x = (label) => (PLACES.find(([pattern]) => pattern.test(label))?.[1] ?? ((l) => inLayer(l, 0.08 + (0.62 * (headOf(l) + 0.5)) / perLayer)))(label);
  const state = { ports: new Set(COMPOSED.length > 1 ? COMPOSED.filter((port) => port !== "unembed") : COMPOSED), writers: "all", count: 24, focus: null, by: "score" };
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Residual stream with the strongest virtual connections" });
  const count = make("output", {}, String(state.count));

  function shown() {
    const wanted = data.edges.filter((e) => state.ports.has(e.port) && (state.writers === "all" || isHead(e.writer) === (state.writers === "heads")) && (!state.focus || e.writer === state.focus || e.reader === state.focus));
    return distinct(wanted.filter((e) => isNumber(e[state.by])).sort((a, b) => b[state.by] - a[state.by])).slice(0, state.count);
  }
  const end = (edge) => edge.readers.reduce((sum, r) => sum + x(r), 0) / edge.readers.length;
  function arc(edge, widest, longest) {
    const a = x(edge.writer), b = end(edge);
    const lift = 34 + (base - 100) * (Math.max(b - a, 0) / longest) ** 0.75;
    const path = make("path", {
      class: `arc ${edge.port}`, tabindex: 0, "stroke-width": (1.2 + 5.2 * Math.max(edge[state.by] / widest, 0) ** 2).toFixed(2),
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
      if (layerOf(label) < 0) continue;
      if (taken.some((t) => Math.abs(t.at - at) < 15 || t.label === label)) continue;
      taken.push({ at, label });
      nodes.push(make("text", { class: "name", x: at, y, transform: `rotate(52 ${at} ${y})` }, label));
    }
    return nodes;
  }
  function draw() {
    const edges = shown(), widest = Math.max(...edges.map((e) => e[state.by]), 1e-9), longest = Math.max(...edges.map((e) => end(e) - x(e.writer)), 1e-9);
    const active = new Set(edges.flatMap((e) => [e.writer, ...e.readers]));
    const nodes = [make("line", { class: "spine", x1: 16, x2: W - 16, y1: base, y2: base })];
    for (const [name, at] of [["embed", 16], ["unembed", W - 16]]) nodes.push(make("circle", { class: "end", cx: at, cy: base, r: 6 }, make("title", {}, name)));
    nodes.push(make("text", { x: 8, y: base - 14 }, "embed"), make("text", { x: W - 8, y: base - 14, "text-anchor": "end" }, "unembed"));
    for (const part of data.model.components) {
      if (part.kind !== "mlp") continue;
      nodes.push(make("rect", { class: active.has(part.label) ? "mlp on" : "mlp", x: side + part.layer * step + step * 0.78, y: base - 5, width: Math.max(4, step * 0.17), height: 10, rx: 2.5 }, make("title", {}, part.label)));
    }
    for (const head of heads) {
      const dot = make("rect", { class: active.has(head.label) ? "head on" : "head", x: x(head.label) - 1.1, y: base + 6, width: 2.2, height: active.has(head.label) ? 13 : 8, rx: 1 }, make("title", {}, [told(head.label), attention(head.label)].filter(Boolean).join("\n")));
      nodes.push(dot);
    }
    const every = Math.max(1, Math.ceil(layers / 32));
    for (let l = 0; l < layers; l += every) nodes.push(make("text", { x: side + l * step + step * 0.4, y: H - 8, "text-anchor": "middle" }, String(l)));
    nodes.push(make("text", { x: 8, y: H - 8 }, "layer"));
    nodes.push(...labels(edges), ...edges.slice().reverse().map((edge) => arc(edge, widest, longest)));
    svg.replaceChildren(...nodes);
    count.textContent = String(edges.length);
  }
  const ports = COMPOSED.map((port) => make("button", { class: port, type: "button", "aria-pressed": String(state.ports.has(port)), onclick: (event) => {
    if (state.ports.has(port)) state.ports.delete(port); else state.ports.add(port);
    event.currentTarget.setAttribute("aria-pressed", String(state.ports.has(port)));
    draw();
  } }, `${port} · ${EXPLAIN[port]}`));
  const ends = new Set(data.edges.flatMap((e) => [e.writer, e.reader]));
  const names = data.model.components.map((c) => c.label).filter((label) => isHead(label) || ends.has(label));
  const focus = make("select", { "aria-label": "only edges of one component", onchange: (event) => { state.focus = event.target.value || null; draw(); } },
    make("option", { value: "" }, "all components"), ...names.map((name) => make("option", { value: name }, name)));
  const slider = make("input", { type: "range", min: 4, max: 80, value: state.count, "aria-label": "how many connections", oninput: (event) => { state.count = Number(event.target.value); draw(); } });
  const mixed = data.edges.some((e) => !isHead(e.writer)) && data.edges.some((e) => isHead(e.writer));
  const writers = make("select", { "aria-label": "which writers", onchange: (event) => { state.writers = event.target.value; draw(); } },
    ...[["all", "all writers"], ["heads", "heads"], ["others", "MLPs, embeddings, biases"]].map(([value, text]) => make("option", { value }, text)));
  const RANKED = ["score", "strength", "lift"].filter((by) => data.edges.some((e) => isNumber(e[by])));
  const by = make("select", { "aria-label": "what ranks connections", onchange: (event) => { state.by = event.target.value; draw(); } }, ...RANKED.map((name) => make("option", { value: name }, name)));
  draw();
  return section("stream", "The stream and its strongest connections",
    make("p", {}, "The line is the residual stream, from the embedding to the unembedding. Ticks below it are attention heads, boxes on it are MLPs. An arc is a virtual weight: what one component writes, read directly by a later one through the port that its colour names. A wider arc ranks higher, by score, strength or lift; heads that share a key or value head share an arc."),
    make("div", { class: "bar" }, ...ports, make("label", {}, "strongest", slider, count), make("label", {}, "by", by), make("label", {}, "of", focus), mixed ? make("label", {}, "from", writers) : null),
    make("div", { class: "scroll" }, svg));
}

