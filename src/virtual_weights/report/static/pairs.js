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
  let current = data.maps.find((m) => m.port === "K") ?? data.maps[0], values, top, undefinedAt;
  const canvas = make("canvas", { tabindex: 0, role: "img" });
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  const scale = make("div", { class: "scale" }), ramp = make("div", { class: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${RAMP.map((c) => `rgb(${c})`).join(",")})`;
  const BOTTOM = 80, mixed = data.maps.some((m) => m.from === "others"), kind = (map) => (map.question === "overlap" ? "overlap of subspaces" : map.from === "others" ? "from all other writers" : mixed ? "composition from heads" : "composition");
  function size(map) { // twice what is shown, so that letters stay sharp
    const rows = map.readers.length, columns = map.writers.length, wide = Math.max(1, Math.round(1440 / Math.max(rows, columns)));
    const square = map.port in { Q: 1, K: 1, V: 1 } && map.from !== "others";
    const [w, h] = square ? [wide, wide] : [Math.max(1, Math.round(1440 / columns)), Math.max(1, Math.min(48, Math.round(1440 / rows)))];
    return { rows, columns, w, h, left: layerOf(map.readers[0]) < 0 ? 24 : 88 };
  }

  function draw() {
    values = decode(current); undefinedAt = new Set(current.undefined);
    press();
    const sorted = Array.from(values).filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
    top = sorted[Math.floor(sorted.length * 0.999)] || current.largest || 1;
    const { rows, columns, w: wide, h: high, left } = size(current), w = columns * wide, h = rows * high;
    canvas.width = w + left; canvas.height = h + BOTTOM;
    const paint = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const hole = style.getPropertyValue("--hole").trim(), soft = style.getPropertyValue("--soft").trim();
    paint.clearRect(0, 0, canvas.width, canvas.height);
    paint.fillStyle = hole; paint.fillRect(left, 0, w, h);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const value = values[r * columns + c];
      if (Number.isNaN(value) && !undefinedAt.has(r * columns + c)) continue;
      paint.fillStyle = Number.isNaN(value) ? soft : `rgb(${colour(value / top)})`;
      paint.fillRect(left + c * wide, (rows - 1 - r) * high, wide, high);
    }
    paint.fillStyle = soft; paint.font = `${(12 * canvas.width) / Math.min(720, innerWidth - 58)}px system-ui, sans-serif`;
    axis(current.readers, (i) => [left - 16, (rows - 0.5 - i) * high, "right", "middle"]);
    axis(current.writers, (i) => [left + (i + 0.5) * wide, h + 16, "center", "top"]);
    function axis(names, place) {
      const layers = Math.max(...names.map(layerOf)) + 1, every = Math.max(1, Math.ceil(layers / 10));
      let last = -1;
      names.forEach((name, i) => {
        const layer = layerOf(name);
        if (layer < 0 || layer === last || layer % every) return;
        last = layer;
        const [x, y, align, baseline] = place(i);
        paint.textAlign = align; paint.textBaseline = baseline; paint.fillText(String(layer), x, y);
      });
    }
    canvas.setAttribute("aria-label", `${TITLE[current.question]} through ${EXPLAIN[current.port]}, readers upwards, writers to the right, by layer`);
    scale.replaceChildren(make("span", {}, "0"), make("span", {}, UNIT[current.question]), make("span", {}, number(top)));
    readout.replaceChildren("Point at the map. Readers run upwards and writers to the right; the numbers are layers. In empty cells the writer cannot reach the reader; in grey ones the writer writes nothing or the reader reads nothing.");
  }
  function read(event) {
    const box = canvas.getBoundingClientRect(), { rows, columns, w, h, left } = size(current), zoom = canvas.width / box.width;
    const c = Math.floor(((event.clientX - box.left) * zoom - left) / w), r = rows - 1 - Math.floor(((event.clientY - box.top) * zoom) / h);
    if (r < 0 || c < 0 || r >= rows || c >= columns) return;
    const value = values[r * columns + c], reader = current.readers[r], writer = current.writers[c];
    const group = current.groups[r];
    const where = current.by_layer ? `strongest pair of ${writer} → ${reader}` : `${told(writer)} → ${told(reader)}`;
    readout.replaceChildren(make("b", {}, where), make("br"),
      undefinedAt.has(r * columns + c) ? `${TITLE[current.question]} undefined, strength 0: one of the two is zero` : Number.isNaN(value) ? "cannot reach: the writer comes too late" : `${TITLE[current.question]} ${number(value)}`,
      ...(Number.isNaN(value) || current.question !== "composition" ? [] : [make("br"), `${number(value * Math.sqrt(data.model.sizes.d_model))} times chance`]),
      ...(group ? [make("br"), `${group}, shared by its query heads`] : []));
  }
  for (const name of ["pointermove", "pointerdown"]) canvas.addEventListener(name, read);
  document.addEventListener("theme", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Two choices, port and kind; a port that lacks the kind shows what it has.
  const kinds = [...new Set(data.maps.map(kind))], bars = [PORTS, kinds].map((names, i) => names.map((name) => make("button", { type: "button", class: i ? null : name, onclick: () => {
    const fits = data.maps.filter((m) => (i ? kind(m) === name : m.port === name)), wanted = i ? (m) => m.port === current.port : (m) => kind(m) === kind(current);
    current = fits.find(wanted) ?? fits[0];
    draw();
  } }, i ? name : `${name} · ${EXPLAIN[name]}`)));
  function press() {
    bars[0].forEach((button, i) => button.setAttribute("aria-pressed", String(PORTS[i] === current.port)));
    bars[1].forEach((button, i) => button.setAttribute("aria-pressed", String(kinds[i] === kind(current))));
  }
  draw();
  const aggregated = data.maps.some((m) => m.by_layer) ? " This model has too many heads to give each pair a cell; a cell is the strongest pair of two layers." : "";
  return section("pairs", "Every pair",
    make("p", {}, `Every writer against every later reader, one map for each port.${aggregated}`),
    make("div", { class: "bar" }, ...bars[0]), kinds.length > 1 ? make("div", { class: "bar" }, ...bars[1]) : null,
    make("div", { class: "maps" }, canvas, make("div", {}, ramp, scale, readout)));
}

function edges() {
  if (!data.edges.length) return null;
  const state = { text: "", merged: true };
  const columns = [{ key: "port", title: "port", text: true, cell: (e) => make("span", { class: `port ${e.port}` }, e.port) }, { key: "writer", title: "writer", text: true, cell: (e) => named(e.writer) }, { key: "reader", title: "reader", text: true, cell: (e) => namedAll(e.readers ?? [e.reader]) },
    { key: "group", title: "group", hint: "the key or value head through which several heads read", text: true, style: "shared", cell: (e) => (e.group ? make("span", { title: `shared by ${e.shared.join(", ")}` }, e.group) : "") },
    ...[["score", "score"], ["null_ratio", "× chance"], ["z", "z"], ["strength", "strength"], ["lift", "lift", "log2: how far this pair exceeds what its two ends do elsewhere"]].map(([key, title, hint]) => ({ key, title, hint }))].filter((c) => !["group", "lift"].includes(c.key) || data.edges.some((e) => e[c.key] !== undefined));
  const behaviours = (e) => [e.writer, ...(e.readers ?? [e.reader])].flatMap((name) => (labelOf(name) ?? "").split(" "));
  function fitting() {
    const wanted = state.text.trim().toLowerCase().split(/\s+/).filter(Boolean), sorted = [...data.edges].sort((a, b) => b.score - a.score);
    const fits = (name, w) => name === w || name.startsWith(`${w}h`) || name.startsWith(`${w}.`) || name === w.replace(".", "h");
    return (state.merged ? distinct(sorted) : sorted).filter((e) => wanted.every((w) => [e.port, e.writer, ...(e.readers ?? [e.reader]), e.group ?? "", ...behaviours(e)].some((name) => fits(name.toLowerCase(), w))));
  }
  const list = sortable(columns, fitting(), { sort: "score" }), show = () => list.show(fitting());
  const search = make("input", { type: "search", placeholder: `filter: K L16H0, or L18${data.labels.length ? ", or induction" : ""}`, "aria-label": "filter edges", oninput: (event) => { state.text = event.target.value; show(); } });
  const merge = make("input", { type: "checkbox", checked: true, onchange: (event) => { state.merged = event.target.checked; show(); } });
  const per = Math.max(...COMPOSED.flatMap((p) => [true, false].map((head) => data.edges.filter((e) => e.port === p && isHead(e.writer) === head).length)));
  const apart = data.edges.some((e) => !isHead(e.writer)) ? ", for heads and for all other writers separately" : "";
  return section("edges", "The strongest edges",
    make("p", {}, `The highest scores of each port${apart}, and what is foremost by strength and lift, up to ${per} edges; the atlas in this folder holds all. Ranked by the marked column; choose another by its title. Within one reader rank by score; lift compares across readers. Heads that share a key or value head form one group with several names.`),
    make("div", { class: "bar" }, search, data.edges.some((e) => e.group) ? make("label", {}, merge, "one row per group") : null), list.element);
}
