// What heads do by where they attend: a tag beside every name of a head, where the records say so.
const BEHAVIOURS = (data.labels.at(-1)?.columns ?? []).filter((c) => c.name !== "label");
const BEHAVIOUR = new Map();
for (const table of data.labels.slice(-1)) table.labels.forEach((name, i) => BEHAVIOUR.set(name, { label: column(table, "label")?.[i] ?? null, scores: BEHAVIOURS.map((c) => [c.name.replaceAll("_", " "), c.values[i]]) }));
const behaviourOf = (name) => BEHAVIOUR.get(/^L\d+H\d+/.exec(name ?? "")?.[0]);
const labelOf = (name) => behaviourOf(name)?.label?.replaceAll("_", " ") ?? null;
const told = (name) => (labelOf(name) ? `${name} (${labelOf(name)})` : name);
const attention = (name) => (behaviourOf(name)?.scores ?? []).filter(([, score]) => isNumber(score)).sort((a, b) => b[1] - a[1]).map(([what, score]) => `${what} ${number(score, 2)}`).join(", ");
const tag = (name) => (labelOf(name) ? make("span", { class: `tag ${behaviourOf(name).label}`, title: `${name} attends to: ${attention(name)}` }, labelOf(name)) : null);
const named = (name) => make("span", { class: "named" }, name, tag(name));
const namedAll = (names) => make("span", {}, ...names.flatMap((name, i) => (i ? [", ", named(name)] : [named(name)])));
