// Memory: neurons by what they do to what they read, heads that copy or erase, and pairs of a writer and an eraser.
const CLASSES = { weakening: "weakening", between: "between", strengthening: "strengthening" };

function neurons(found) {
  const [columns, rows] = found.bins, bytes = Uint8Array.from(atob(found.counts), (c) => c.charCodeAt(0)), counts = new Uint32Array(bytes.buffer);
  const largest = counts.reduce((a, b) => Math.max(a, b), 1), LEVELS = 10, edges = (range, n, i) => range[0] + ((range[1] - range[0]) * i) / n;
  const total = counts.reduce((a, b) => a + b, 0), t = found.threshold, [low, high] = found.log_gain;
  const yTicks = []; for (let p = Math.ceil(low); p <= high; p++) yTicks.push([p, p < -2 || p > 3 ? `10${raised(p)}` : String(Number((10 ** p).toPrecision(1)))]);
  const chart = plot({ width: 560, height: 400, x: found.cosine, y: found.log_gain, yTicks, xTitle: "cosine of what it reads with what it writes", yTitle: "|gain| at norm scalar 1 and slope 1 (logarithmic)", grid: false, label: "Neurons by cosine and gain" });
  const paths = Array.from({ length: LEVELS }, () => []);
  for (let c = 0; c < columns; c++) for (let r = 0; r < rows; r++) {
    const count = counts[c * rows + r];
    if (!count) continue;
    const x0 = chart.px(edges(found.cosine, columns, c)), x1 = chart.px(edges(found.cosine, columns, c + 1)), y0 = chart.py(edges(found.log_gain, rows, r)), y1 = chart.py(edges(found.log_gain, rows, r + 1));
    paths[Math.min(LEVELS - 1, Math.floor((LEVELS * Math.log(count)) / Math.log(largest + 1)))].push(`M${x0.toFixed(1)},${y1.toFixed(1)}H${x1.toFixed(1)}V${y0.toFixed(1)}H${x0.toFixed(1)}Z`);
  }
  paths.forEach((d, i) => chart.svg.append(make("path", { class: "density", d: d.join(""), "fill-opacity": (0.14 + (0.86 * i) / (LEVELS - 1)).toFixed(2) })));
  for (const at of [-t, t]) chart.svg.append(rule(chart, [at, low], [at, high]));
  if (low < 0 && high > 0) chart.svg.append(rule(chart, [found.cosine[0], 0], [found.cosine[1], 0]));
  const within = (range, n, v) => Math.floor(((v - range[0]) / (range[1] - range[0])) * n);
  chart.svg.addEventListener("pointermove", (event) => {
    const [x, y] = chart.at(event), c = within(found.cosine, columns, x), r = within(found.log_gain, rows, y);
    if (c < 0 || r < 0 || c >= columns || r >= rows) return hideTip();
    showTip(event, [`${number(counts[c * rows + r])} neurons`, `cosine ${number(edges(found.cosine, columns, c), 2)} to ${number(edges(found.cosine, columns, c + 1), 2)}`, `|gain| ${number(10 ** edges(found.log_gain, rows, r), 2)} to ${number(10 ** edges(found.log_gain, rows, r + 1), 2)}`]);
  });
  chart.svg.addEventListener("pointerleave", hideTip);
  const sums = Object.fromEntries(Object.keys(CLASSES).map((c) => [c, found.classes[c].reduce((a, b) => a + b, 0)]));
  const share = (n) => `${((100 * n) / (total || 1)).toFixed(1)} %`, { tail, shuffled } = found.null;
  return section("neurons", "Neurons: what they do to what they read",
    make("p", {}, `Each of ${number(total)} neurons reads a direction (${found.classes_by === "up" ? "its up row" : "its input row"}) and writes one. A neuron that writes against what it reads weakens it; one that writes along it strengthens it. Dashed lines are the thresholds, cosines of ±${number(t)}, and gain 1, at which a neuron clears what it reads (left) or doubles it (right).`),
    make("div", { class: "pair" },
      make("figure", {}, make("figcaption", {}, "Direction and size"), make("div", { class: "keys" }, make("span", {}, `${number(largest)} neurons in the fullest cell`)), chart.svg),
      make("figure", {}, make("figcaption", {}, "Classes by layer"), make("div", { class: "keys" }, ...Object.keys(CLASSES).map((c) => key(c, `${c} `, make("b", {}, share(sums[c]))))), classBars(found))),
    make("p", { class: "note" }, [
      isNumber(tail) ? `Independent random directions would put a share of ${number(tail)} beyond each threshold` : "", shuffled ? `, and this model's own directions, paired at random within their layer, ${number(shuffled.weakening_share)} below and ${number(shuffled.strengthening_share)} above` : "", isNumber(tail) ? ". " : "",
      found.below ? `The lowest row also holds ${number(found.below)} neurons with smaller gains.  ` : "", found.absent ? `${number(found.absent)} neurons read or write nothing and are left out.` : ""].join("")));
}

function classBars(found) {
  const layers = found.layers, n = layers.length, every = Math.max(1, Math.ceil(n / 10));
  const chart = plot({ width: 560, height: 400, x: [0, n], y: [0, 100], xTicks: layers.map((l, i) => [i + 0.5, String(l), l]).filter(([, , l]) => l % every === 0), xTitle: "layer", yTitle: "% of the layer's neurons", label: "Classes of neurons by layer, in percent" });
  layers.forEach((layer, i) => {
    const counts = Object.keys(CLASSES).map((c) => [c, found.classes[c][i]]), all = counts.reduce((a, [, k]) => a + k, 0) || 1;
    let from = 0;
    const bars = counts.map(([name, count]) => {
      const to = from + (100 * count) / all;
      const bar = make("rect", { class: `bar-${name}`, x: chart.px(i + 0.1), width: chart.px(i + 0.9) - chart.px(i + 0.1), y: chart.py(to), height: chart.py(from) - chart.py(to) });
      from = to;
      return bar;
    });
    chart.svg.append(tipped(make("g", {}, ...bars), [`layer ${layer}`, ...counts.map(([name, count]) => `${number(count)} ${name}, ${((100 * count) / all).toFixed(1)} %`)]));
  });
  return chart.svg;
}

function headPlane(table) {
  const last = Math.max(...table.labels.map(layerOf), 1);
  const panel = (title, x, y) => {
    const copying = column(table, x), negative = column(table, y);
    if (!copying || !negative) return null;
    const chart = plot({ width: 560, height: 400, x: [-1.04, 1.04], y: [-0.03, 1.03], xTicks: [-1, -0.5, 0, 0.5, 1].map((v) => [v, number(v)]), yTicks: [0, 0.25, 0.5, 0.75, 1].map((v) => [v, number(v)]), xTitle: "copying: −1 erases, 1 copies", yTitle: "negative share of the eigenvalues", label: `${title}: copying against negative share` });
    const nulls = [table.stamp.null?.[x], table.stamp.null?.[y]];
    if (nulls.every((each) => each && isNumber(each.std))) {
      const [[x0, x1], [y0, y1]] = nulls.map(({ mean, std }) => [mean - 2 * std, mean + 2 * std]);
      chart.svg.append(make("rect", { class: "null", x: chart.px(Math.max(x0, -1.04)), width: chart.px(Math.min(x1, 1.04)) - chart.px(Math.max(x0, -1.04)), y: chart.py(Math.min(y1, 1.03)), height: chart.py(Math.max(y0, -0.03)) - chart.py(Math.min(y1, 1.03)), rx: 3 }));
    }
    chart.svg.append(rule(chart, [-1, 1], [1, 0]));
    const there = table.labels.map((name, i) => ({ name, x: copying[i], y: negative[i] })).filter((p) => isNumber(p.x) && isNumber(p.y)).sort((a, b) => a.x - b.x);
    for (const p of there) chart.svg.append(tipped(make("circle", { class: "mark", cx: chart.px(p.x).toFixed(1), cy: chart.py(p.y).toFixed(1), r: 3.6, "fill-opacity": (0.22 + (0.68 * layerOf(p.name)) / last).toFixed(2) }), [told(p.name), `copying ${number(p.x)}`, `negative share ${number(p.y)}`]));
    return make("figure", {}, make("figcaption", {}, title), make("div", { class: "keys" }, ...["erase most: ", "copy most: "].map((word, i) => make("span", {}, word, make("b", {}, namedAll((i ? there.slice(-5).reverse() : there.slice(0, 5)).map((p) => p.name)))))), chart.svg);
  };
  return section("heads", "Heads that copy and heads that erase",
    make("p", {}, "A head adds a transformed copy of what it attends to. Where the eigenvalues of that transformation are positive it copies, where they are negative it erases, and where they are complex it rotates. Each dot is a head, more opaque in later layers. The box spans two standard deviations around random heads. Heads on the dashed line have real eigenvalues only."),
    make("div", { class: "pair" }, panel("In the stream", "copying", "negative_share"), panel("From token to token", "token_copying", "token_negative_share")));
}

function erasure(found) {
  const columns = [{ key: "reader", title: "eraser", text: true, cell: (e) => named(e.reader) }, { key: "writer", title: "what it erases", text: true, cell: (e) => named(e.writer) },
    ...found.columns.map((c) => ({ key: c.name, title: c.name, hint: `${c.meaning} (${c.unit})` }))];
  const list = sortable(columns, found.rows, { sort: "alignment" });
  const by = ["alignment", "z", "erasure"].map((name) => make("button", { type: "button", "aria-pressed": String(name === "alignment"), onclick: (event) => {
    for (const other of by) other.setAttribute("aria-pressed", String(other === event.currentTarget));
    list.show(found.rows, name);
  } }, `by ${name}`));
  return section("erasure", "Which components could erase what others wrote",
    make("p", {}, `Pairs of a writer and a later component that subtracts what was written, if it attends to it fully: the ${found.most} strongest by each measure. Alignment compares directions only, from −1 (adds to it) to 1 (removes it); erasure is the share of the written energy that is removed at norm scalar ${number(found.stamp.norm_scalar)} (more than 1 overshoots); baseline is what random orientation would remove; z is the distance of erasure from the baseline in standard deviations.`),
    make("div", { class: "bar" }, ...by), list.element);
}
