// Potential, actual, causal: what the weights could carry, what flowed on text, and what removing it does.
function evidence() {
  const found = data.evidence;
  if (!found) return null;
  const { rows, ports, units, stamps } = found, scale = effects(rows);
  const UNDONE = { contribution: "nothing was observed", attribution: "no gradient was taken", ablation: "no edge was removed" };
  const HEADS = { Q: 1, K: 1, V: 1 };
  const missing = (question) => (e) => (!ports[question].length ? `not run on text: ${UNDONE[question]}` : question === "ablation" ? "this edge was not removed" : !ports[question].includes(e.port) ? "not computed for this port" : "not computed for this pair");
  const known = (key, why, form) => ({ key, cell: (e, text) => (isNumber(e[key]) ? (form ? form(e[key]) : text) : dash(why(e))) });
  const weights = (e) => (ports.composition.includes(e.port) ? "not computed for this pair" : "the atlas has no composition through this port");
  const share = (e) => (e.port in HEADS ? missing("contribution")(e) : "given for queries, keys and values only");
  const ends = [{ key: "writer", title: "writer", text: true, cell: (e) => named(e.writer) },
    { key: "reader", title: "reader", text: true, cell: readersCell }];
  const columns = [...ends,
    { ...known("score", weights), group: "potential", title: "score", hint: "composition of the weights, between 0 and 1" },
    { ...known("z", weights), group: "potential", title: "z", hint: "standard deviations of the squared strength above random orientation" },
    { key: "contribution", group: "actual", title: "contribution", hint: "energy that the writer puts on the port, mean over the text: squared logits for Q and K, squared norm for V", cell: (e) => (isNumber(e.contribution) ? make("span", { title: units[e.port] }, number(e.contribution)) : dash(missing("contribution")(e))) },
    { ...known("share", share, (v) => number(v, 2)), group: "actual", title: "share", hint: "of the energy of everything that the port receives; contributions can cancel, so shares need not sum to 1" },
    { key: "rank", group: "actual", title: "rank", hint: "by contribution, among all writers that reach this reader", up: true, cell: (e) => (isNumber(e.rank) ? `${e.rank} / ${e.of}` : dash(missing("contribution")(e))) },
    { ...known("attribution", missing("attribution"), brief), group: "causal", title: "first order", hint: "attribution: first-order change of the loss without the edge, in nats" },
    { ...known("effect", missing("ablation"), brief), group: "causal", title: "effect", hint: "loss without the edge minus loss with it, in nats" },
    { key: "low", group: "causal", title: "95% interval, nats", text: true, numeric: true, hint: "of the effect, a t-interval over sequences corrected for skewness; sorted by its lower bound", below: scale?.axis, cell: (e) => (isNumber(e.effect) ? scale.bar(e) : dash(missing("ablation")(e))) },
    { key: "verdict", group: "causal", title: "verdict", text: true, hint: stamps.ablation[0]?.rule, cell: (e) => (e.verdict ? chip({ style: e.verdict === "causal" ? "good" : "none", sign: { causal: "✓", negligible: "≈" }[e.verdict] ?? "?", word: e.verdict }) : dash(missing("ablation")(e))) },
    { ...known("changed", missing("ablation"), (v) => number(v, 2)), group: "causal", title: "changed", hint: "share of the counted tokens whose loss changes by more than 0.1 nats" }];
  const sort = ports.ablation.length ? "effect" : ports.contribution.length ? "share" : "score";
  const list = sortable(columns, rows, { sort });
  const shown = [...new Set(rows.map((e) => e.port))], state = { port: null };
  const buttons = shown.map((port) => make("button", { type: "button", class: port, "aria-pressed": "false", onclick: () => {
    state.port = state.port === port ? null : port;
    shown.forEach((each, i) => buttons[i].setAttribute("aria-pressed", String(each === state.port)));
    list.show(state.port ? rows.filter((e) => e.port === state.port) : rows);
  } }, `${port} · ${EXPLAIN[port]}`));
  return section("evidence", "Potential, actual, causal",
    make("p", {}, "The strongest edges between heads, and all edges that were removed. Potential: what the weights could carry. Actual: what the writer put on the reader, averaged over a text. Causal: how the loss changes when this one edge is removed while the model runs, estimated to first order and then measured."),
    make("div", { class: "bar" }, ...buttons), list.element,
    make("p", { class: "note" }, ...measuredOn(stamps), rows.some((e) => e.group) ? "Heads that share a key or value head form one group: score, contribution and rank are those of the head named first; removal takes the edge from all of them." : "",
      scale ? " On the scale of effects, the grey band is the range of random edges of the same port and the line at 0 is no effect; the scale is linear up to the largest random effect and logarithmic beyond." : ""));
}

const brief = (v) => number(v, Math.abs(v) < 1e-4 ? 1 : 2);
const dash = (why) => make("span", { class: "absent", title: why }, NONE);
// The strongest reader, and below it those that share its key or value head, together where they do the same.
function readersCell(e) {
  const others = e.shared.filter((name) => name !== e.reader);
  const alike = [...new Set(others.map(labelOf))].map((label) => others.filter((name) => labelOf(name) === label));
  const groups = alike.map((names) => make("span", { title: names.map((name) => [told(name), attention(name)].filter(Boolean).join(": ")).join("\n") }, names.map((name) => `H${headOf(name)}`).join(", "), tag(names[0])));
  const port = e.port === e.reader ? null : make("span", { class: `port ${e.port}`, title: EXPLAIN[e.port] }, `.${e.port}`);
  return make("div", { class: "named" }, e.reader, port, tag(e.reader), groups.length ? make("div", { class: "shared", title: `${e.group} is shared by ${e.shared.join(", ")}` }, "+ ", ...groups.flatMap((g, i) => (i ? [", ", g] : [g])), ` · ${e.group.replace(/^L\d+\./, "")}`) : null);
}
function measuredOn({ contribution, attribution, ablation }) {
  const on = (stamp) => (stamp.text ? ` on ${stamp.text}` : "");
  return [contribution ? `Contribution: ${number(contribution.tokens, 12)} tokens${on(contribution)}. ` : "",
    attribution ? make("span", {}, `First order: ${attribution.sequences} sequences${on(attribution)}, metric `, make("code", {}, attribution.metric), ". ") : "",
    ...ablation.map((stamp) => `Removal: ${stamp.sequences} sequences${on(stamp)}, ${number(stamp.clean_loss)} nats with every edge. `)];
}

// The common scale of all effects: even up to the largest random effect, logarithmic beyond, 0 always on it.
function effects(rows) {
  const there = rows.filter((e) => isNumber(e.effect));
  if (!there.length) return null;
  const random = there.flatMap((e) => (e.random ? [e.random.low, e.random.high] : [])), ends = there.flatMap((e) => [e.effect, e.low, e.high]).filter(isNumber);
  const largest = Math.max(...[...random, ...ends].map(Math.abs)) || 1, even = Math.max(...random.map(Math.abs), largest * 1e-4);
  const bent = (v) => Math.asinh(v / even), low = bent(Math.min(0, ...random, ...ends)), high = bent(Math.max(0, ...random, ...ends));
  const WIDTH = 158, HEIGHT = 20, EDGE = 9, x = (v) => EDGE + ((bent(v) - low) / (high - low || 1)) * (WIDTH - 2 * EDGE);
  const marks = [0], decades = Array.from({ length: 9 }, (_, i) => 10 ** (2 - i)).flatMap((v) => [v, -v]);
  for (const v of decades) if (bent(v) >= low && bent(v) <= high && marks.every((m) => Math.abs(x(m) - x(v)) > 30)) marks.push(v);
  const drawing = (name, height, ...children) => make("svg", { class: name, width: WIDTH, height, viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": "" }, ...children);
  const line = (name, a, b, y0, y1) => make("line", { class: name, x1: a.toFixed(1), x2: b.toFixed(1), y1: y0, y2: y1 });
  const axis = drawing("effects", 15, ...marks.flatMap((v) => [make("text", { x: x(v).toFixed(1), y: 11, "text-anchor": "middle" }, number(v))]));
  function bar(e) {
    const told = [`${number(e.effect)} nats`, isNumber(e.low) ? `95% interval ${number(e.low)} to ${number(e.high)}` : "no interval: one sequence", e.random ? `${e.random.count} random edges: ${number(e.random.low, 2)} to ${number(e.random.high, 2)}` : "no random edges"];
    const svg = drawing(`effects ${e.verdict === "causal" ? "causal" : ""}`, HEIGHT,
      e.random ? make("rect", { class: "band", x: x(e.random.low).toFixed(1), width: Math.max(1, x(e.random.high) - x(e.random.low)).toFixed(1), y: 1, height: HEIGHT - 2, rx: 2 }) : null,
      ...marks.map((v) => line(v ? "grid" : "zero", x(v), x(v), 0, HEIGHT)),
      isNumber(e.low) ? line("interval", x(e.low), x(e.high), HEIGHT / 2, HEIGHT / 2) : null,
      make("circle", { cx: x(e.effect).toFixed(1), cy: HEIGHT / 2, r: 3.4 }));
    svg.setAttribute("aria-label", told.join("; "));
    return tipped(svg, told);
  }
  return { axis, bar };
}
