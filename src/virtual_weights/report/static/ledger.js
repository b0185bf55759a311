// The ledger over depth, and spectra of single channels: small multiples that share one reading.
const PANELS = [
  { title: "Oversubscription", unit: "sum of ranks / d", rule: 1, series: [["oversubscription", "written", "written so far"], ["read_oversubscription", "read", "still to be read"]] },
  { title: "Neurons on either side", unit: "neurons / d", series: [["neurons_before_per_d", "written", "have written"], ["neurons_after_per_d", "read", "still to read"]] },
  { title: "Dimensions spanned", unit: "dimensions", full: true, dashed: true, series: [["written_dim", "written", "written"], ["read_dim", "read", "read later"], ["live_dim", "live", "both"]] },
  { title: "Dimensions in effect", unit: "entropy rank, dimensions", full: true, series: [["written_entropy_rank", "written", "written"], ["read_entropy_rank", "read", "read later"], ["live_entropy_rank", "live", "both"]] },
  { title: "Dimensions left over", unit: "dimensions", full: true, dashed: true, series: [["unwritten_dim", "written", "nothing has written"], ["unread_dim", "read", "nothing will read"]] },
  { title: "Saved by the bottleneck", unit: "parameters, ratio", series: [["saving", "live", "dense map / map through d"]] },
];

function ledger(table) {
  const states = table.labels.length, after = column(table, "after") ?? table.labels, d = table.stamp.d_model;
  const every = Math.max(1, Math.ceil((Math.max(...after.map(layerOf)) + 1) / 7)), seen = new Set();
  const xTicks = after.map((name, i) => [i, layerOf(name)]).filter(([, l]) => l >= 0 && l % every === 0 && !seen.has(l) && seen.add(l)).map(([i, l]) => [i, String(l)]);
  const where = make("output"), moves = [];
  const slider = make("input", { type: "range", min: 0, max: states - 1, value: Math.floor(states / 2), "aria-label": "state of the stream", oninput: () => move(Number(slider.value)) });
  function move(state) {
    slider.value = state;
    where.textContent = `state ${table.labels[state]}, after ${after[state]}`;
    for (const each of moves) each(state);
  }
  function panel({ title, unit, series, full, dashed, rule: at }) {
    const lines = series.map(([name, colour, text]) => ({ values: column(table, name), colour, text })).filter((s) => s.values);
    const numbers = lines.flatMap((s) => s.values).filter(isNumber);
    if (!numbers.length) return null;
    const quarters = full && d ? [0, 0.25, 0.5, 0.75, 1].map((q) => [q * d, number(q * d, 4)]) : undefined;
    const chart = plot({ yTicks: quarters, x: [0, Math.max(states - 1, 1)], y: [0, full && d ? d : Math.max(...numbers, at ?? 0, 1e-9) * 1.04], xTicks, xTitle: "layer that wrote last", yTitle: unit, label: `${title} over depth, ${unit}` });
    if (at !== undefined) chart.svg.append(rule(chart, [0, at], [states - 1, at]));
    const cross = make("line", { class: "cross", y1: chart.py(0), y2: 26 });
    chart.svg.append(...lines.map((s, i) => curve(chart, s.values.map((v, k) => [k, v]), { class: s.colour, "stroke-dasharray": dashed && i ? ["", "7 6", "2 6"][i] : null })), cross);
    const format = aligned(numbers), outputs = lines.map(() => make("b"));
    const dots = lines.map((s) => make("circle", { class: `dot ${s.colour}`, r: 3.4 }));
    chart.svg.append(...dots);
    moves.push((state) => {
      cross.setAttribute("x1", chart.px(state)); cross.setAttribute("x2", chart.px(state));
      lines.forEach((s, i) => {
        outputs[i].textContent = format(s.values[state]);
        dots[i].setAttribute("visibility", isNumber(s.values[state]) ? "visible" : "hidden");
        if (isNumber(s.values[state])) { dots[i].setAttribute("cx", chart.px(state)); dots[i].setAttribute("cy", chart.py(s.values[state])); }
      });
    });
    for (const name of ["pointermove", "pointerdown"]) chart.svg.addEventListener(name, (event) => move(Math.max(0, Math.min(states - 1, Math.round(chart.at(event)[0])))));
    return make("figure", {}, make("figcaption", {}, title), make("div", { class: "keys" }, ...lines.map((s, i) => key(s.colour, `${s.text} `, outputs[i]))), chart.svg);
  }
  const panels = PANELS.map(panel);
  move(Math.floor(states / 2));
  return section("bandwidth", "The ledger over depth",
    make("p", {}, `At every state of the stream: what components before it have written and what components after it will read, compared with its ${d ?? "d"} dimensions. Where oversubscription is above 1 (the dashed line), writers or readers must share directions. Point at a chart, or move the slider, to read all charts at one state.`),
    make("div", { class: "bar" }, make("label", {}, "state", slider), where),
    make("div", { class: "panels" }, ...panels),
    make("p", { class: "note" }, "A dimension is spanned if any map uses it at all, and live if it is written and read later; the entropy rank counts dimensions by how evenly they are used, with equal weight for every map. Saved: the parameters of a dense map from the neurons before to the neurons after, divided by those of a map through d dimensions."));
}

function spectra(tables) {
  const panel = (table) => {
    const gains = column(table, "gain"), { null_edge: edge, z, shape } = table.stamp, { writer, reader } = table.parameters;
    const chart = plot({ x: [1, Math.max(gains.length, 2)], y: [0, Math.max(...gains, edge ?? 0) * 1.05 || 1], xTitle: "direction, strongest first", yTitle: "gain (units of the weights)", label: `Gains of the channel from ${writer} to ${reader}` });
    const above = isNumber(edge) ? gains.filter((g) => g > edge).length : null;
    if (isNumber(edge)) chart.svg.append(rule(chart, [1, edge], [Math.max(gains.length, 2), edge]), make("text", { class: "unit", x: chart.px(Math.max(gains.length, 2)), y: chart.py(edge) - 6, "text-anchor": "end" }, `edge of the null ${number(edge)}`));
    chart.svg.append(curve(chart, gains.map((g, i) => [i + 1, g]), { class: "read" }));
    const dot = make("circle", { class: "dot read", r: 3.4, visibility: "hidden" }), energy = column(table, "energy");
    chart.svg.append(dot);
    chart.svg.addEventListener("pointermove", (event) => {
      const i = Math.max(0, Math.min(gains.length - 1, Math.round(chart.at(event)[0]) - 1));
      dot.setAttribute("cx", chart.px(i + 1)); dot.setAttribute("cy", chart.py(gains[i])); dot.setAttribute("visibility", "visible");
      showTip(event, [`direction ${i + 1}`, `gain ${number(gains[i])}`, ...(energy ? [`${number(100 * energy[i])} % of the energy`] : [])]);
    });
    chart.svg.addEventListener("pointerleave", () => { dot.setAttribute("visibility", "hidden"); hideTip(); });
    return make("figure", {}, make("figcaption", {}, named(writer), " → ", named(reader)),
      make("div", { class: "keys" }, make("span", {}, make("b", {}, number(above)), ` of ${gains.length} gains above the edge`), make("span", {}, "z ", make("b", {}, number(z))), shape ? make("span", {}, shape.join(" × ")) : null), chart.svg);
  };
  return section("channel", "Spectra of single channels",
    make("p", {}, "The singular values of a virtual weight: how strongly each of its independent directions passes through. The dashed line is what the largest of them would rarely exceed if the reader were turned at random against the writer; directions above it are better aligned than by chance."),
    make("div", { class: "panels" }, ...tables.map(panel)));
}
