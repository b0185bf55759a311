// The page is a function of the data: every section takes its part and gives an element.
function header() {
  const { model, family, sizes, norm } = data.model;
  const theme = make("button", { type: "button", onclick: () => {
    const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    document.dispatchEvent(new Event("theme"));
  } }, "Light / dark");
  const fact = (name, value) => (value === null || value === undefined ? null : make("li", {}, make("b", {}, String(value)), ` ${name}`));
  const all = (name) => [...new Set((sizes.groups ?? []).map((group) => group[name]).filter(isNumber))].join(" or ") || null;
  return make("div", {},
    make("header", {}, make("h1", {}, `Virtual weights of ${model}`), theme),
    make("p", { class: "lede" }, "Which components can communicate over the residual stream, computed from the weights", data.evidence || data.labels.length ? ", and which of them do on text." : data.statements.some((s) => s.run && s.run !== "weights alone") ? "." : " alone. The model was not run."),
    make("ul", { class: "facts" }, fact("family", family), fact("layers", sizes.n_layers), fact("heads a layer", all("heads")),
      fact("key/value heads", all("kv_heads")), fact("d_model", sizes.d_model), fact("d_head", all("d_head")), make("li", {}, "norm: ", make("b", {}, norm))));
}

// Records that the page has no picture for: as they are, so that nothing computed is lost.
function others() {
  const listed = [...data.labels, ...data.others];
  if (!listed.length && !data.too_large.length) return null;
  const told = (parameters) => Object.entries(parameters).filter(([, v]) => v !== null && typeof v !== "object").map(([k, v]) => `${k} ${number(v)}`).join(", ");
  const tables = listed.map((table) => {
    const columns = [{ key: " label", title: table.axis, text: true }, ...table.columns.map((c) => ({ key: c.name, title: c.name.replaceAll("_", " "), hint: [c.meaning, c.unit && `(${c.unit})`].filter(Boolean).join(" "), text: !c.values.some(isNumber) }))];
    const rows = table.labels.map((label, i) => ({ " label": label, ...Object.fromEntries(table.columns.map((c) => [c.name, c.values[i]])) }));
    return make("details", {}, make("summary", {}, make("b", {}, table.question), ` ${[told(table.parameters), `${rows.length} rows`].filter(Boolean).join(" · ")}`), sortable(columns, rows, { most: 200 }).element);
  });
  const large = data.too_large.map((r) => `${r.question} (${Object.entries(r.axes).map(([name, n]) => `${number(n)} ${name}s`).join(" × ")})`);
  return section("others", "Further records", make("p", {}, "Complete tables, and results that this page has no picture for."), ...tables,
    large.length ? make("p", { class: "note" }, `Too large to be shown here: ${large.join(", ")}.`) : null);
}

const SHORT = { stream: "Stream", evidence: "Potential, actual, causal", statements: "Statements", pairs: "Every pair", edges: "Strongest edges", bandwidth: "Ledger", channel: "Spectra", neurons: "Neurons", heads: "Heads", erasure: "Erasers", others: "Further records", guide: "Reading guide" };
function contents(sections) {
  const seen = {}, names = sections.map((each) => SHORT[each.id]);
  for (const each of sections) { // two records of one question are two sections
    const count = (seen[each.id] = (seen[each.id] ?? 0) + 1);
    if (count > 1) each.id += `-${count}`;
  }
  return make("nav", { "aria-label": "contents" }, make("ol", {}, ...sections.map((each, i) => make("li", {}, make("a", { href: `#${each.id}` }, names[i])))));
}

function guide() {
  const item = (name, ...text) => [make("dt", {}, name), make("dd", {}, ...text)];
  const code = (text) => make("code", {}, text);
  const d = data.model.sizes.d_model;
  return section("guide", "How to read the numbers", make("dl", {},
    ...item("score", "Composition of writer a into reader b: ", code("‖QK OV‖ / (‖QK‖ ‖OV‖)"), " for keys, with QKᵀ for queries and the reader's OV for values; MLPs, embeddings and biases enter by their own maps. Between 0 and 1; free of the heads' inner bases."),
    ...item("× chance", `The score over ${code("1/√d").textContent} = ${number(1 / Math.sqrt(d))}, its root mean square when the two maps have random relative orientation.`),
    ...item("z", "How many standard deviations the squared strength lies above its mean under random orientation, from closed-form moments. Trained weights are not random, so large values are common; compare edges with each other, and do not read z as a probability."),
    ...item("strength", "The numerator of the score, in units of the weights: how much could arrive. An edge with a high score can be weak, and one with a low score strong."),
    ...item("subspace overlap", "Mean squared cosine of the principal angles between what a head can write and what a port can read, regardless of gains."),
    ...(data.evidence ? [item("contribution", "Energy that a writer puts on a port, averaged over a text: what it wrote, divided by the reader's norm scalar, through the reader's map, weighted by the keys, queries or output map that it meets. ", make("b", {}, "Share"), " is its share of the energy of everything that the port receives."),
      item("effect", "Loss without the edge minus loss with it. Only this reader's port receives ", data.evidence.stamps.ablation.some((each) => each.replacement === "resample") ? "what the writer writes in another sequence" : "the writer's mean over the text", " instead; all other readers still receive what it writes. ", make("b", {}, "First order"), " is the derivative along that removal, and can be far off where attention saturates."),
      item("verdict", "By the interval and the least effect that matters: causal where the interval lies wholly beyond it, negligible where it lies wholly within, inconclusive otherwise. Random edges of the same port are shown for comparison and do not enter.")].flat() : []),
    ...(data.labels.length ? item("tags", "Where a head attends on repeated random tokens: the kind of position with its largest score above ", code(String(data.labels.at(-1).parameters.threshold ?? "the threshold")), ". The first token, to which many heads attend by default, counts only if no other kind is above it.") : []),
    ...item("what this cannot say", "Weights show what could be communicated directly. Whether it is depends on attention and on the text. Paths through other components are not counted.")));
}

function footer() {
  const { reference, fingerprint, version } = data.model;
  const k = data.stamps.K ?? Object.values(data.stamps)[0] ?? {};
  return make("footer", {}, `${reference} · fingerprint ${fingerprint} · virtual-weights ${version} · rotary offset ${k.rotary_offset ?? ""} · computed in ${k.compute_dtype ?? ""}. `,
    "Composition scores after Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.");
}

const page = document.getElementById("page");
const sections = [spine(), evidence(), ...data.statements.map(statements), heatmaps(), edges(), ...data.bandwidth.map(ledger), data.channel.length ? spectra(data.channel) : null,
  ...data.neurons.map(neurons), ...data.head_erasers.map(headPlane), ...data.erasure.map(erasure), others(), guide()].filter(Boolean);
page.replaceChildren(header(), contents(sections), ...sections, footer());
document.body.append(tip);
