// The statements: what is claimed, what is true, and what this model shows.
const VERDICTS = [["holds", "good", "✓", "holds"], ["holds under", "condition", "◐", "holds under a condition"], ["fails", "bad", "✕", "fails"], ["cannot tell", "none", "?", "cannot tell"]];
function verdictOf(row) {
  const text = String(row.verdict ?? "").trim();
  const [start, style, sign, word] = VERDICTS.findLast(([start]) => text.toLowerCase().startsWith(start)) ?? ["", "none", "?", text || "no verdict"];
  return { style, sign, word, condition: row.condition || (style === "condition" ? text.slice(start.length).trim() : "") };
}
const chip = ({ style, sign, word }) => make("span", { class: `chip ${style}` }, make("span", { "aria-hidden": "true" }, sign), ` ${word}`);

function evidenceOf(evidence) {
  if (evidence === null || evidence === undefined || evidence === "" || (typeof evidence === "object" && !Object.keys(evidence).length)) return null;
  if (typeof evidence !== "object") return make("p", {}, String(evidence));
  const text = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : number(value, 4));
  return make("table", { class: "evidence" }, make("tbody", {}, ...Object.entries(evidence).map(([name, value]) => make("tr", {}, make("th", { scope: "row", class: "text" }, name.replaceAll("_", " ")), make("td", { class: isNumber(value) ? null : "text" }, text(value))))));
}

function statement(row) {
  const verdict = verdictOf(row), struck = row.corrected && row.corrected !== row.seed && ["bad", "condition"].includes(verdict.style);
  const evidence = evidenceOf(row.evidence), line = (name, ...what) => make("div", { class: "line" }, make("span", { class: "role" }, name), make("div", {}, ...what));
  return make("article", { class: "statement", "data-verdict": verdict.style },
    make("div", { class: "verdict" }, make("b", { class: "id" }, row.id), chip(verdict)),
    make("div", {}, row.title ? make("h3", {}, row.title) : null,
      row.seed ? line("claim", make(struck ? "del" : "span", {}, row.seed)) : null,
      row.corrected && row.corrected !== row.seed ? line(struck ? "instead" : "exactly", row.corrected) : null,
      verdict.condition ? line("condition", verdict.condition) : null,
      row.why ? line("here", row.why) : null,
      row.witnesses ? line("witnesses", row.witnesses) : null,
      evidence ? make("details", {}, make("summary", {}, "evidence"), make("div", { class: "scroll" }, evidence)) : null));
}

function statements({ rows, run }) {
  const cards = rows.map(statement), counts = VERDICTS.map(([, style, sign, word]) => ({ style, sign, word, n: cards.filter((c) => c.dataset.verdict === style).length })).filter((v) => v.n);
  let only = null;
  const buttons = counts.map((v) => make("button", { type: "button", class: "filter", "aria-pressed": "false", onclick: () => {
    only = only === v.style ? null : v.style;
    counts.forEach((each, i) => buttons[i].setAttribute("aria-pressed", String(each.style === only)));
    for (const card of cards) card.hidden = only !== null && card.dataset.verdict !== only;
  } }, make("b", {}, String(v.n)), chip(v)));
  return section("statements", `${rows.length} statements about the stream, tested`,
    make("p", {}, "Each card gives a claim as it was published, what is true, and a verdict computed from this model's own numbers. A claim that is struck out does not hold as published.", run ? ` The verdicts are based on ${run === "weights alone" ? "the weights alone" : run}.` : ""),
    make("div", { class: "bar" }, ...buttons), ...cards);
}
