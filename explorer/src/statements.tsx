/** Published statements about the residual stream, and which of them hold on this model. */

import type { MapDocument, Statements } from "./data";
import { Maths } from "./maths";
import { useDocument } from "./page";

/** A verdict with its sign: it may name its condition. */
function verdict(text: string): string {
  if (text.startsWith("holds under")) return "◐ holds under a condition";
  return `${text.startsWith("holds") ? "✓" : text.startsWith("fails") ? "✕" : "?"} ${text}`;
}

export function StatementsPage({ map }: { map: MapDocument }) {
  const statements = useDocument<Statements>(map.stored.statements);
  if (!map.stored.statements) {
    return (
      <main>
        <h1>Statements about the stream</h1>
        <p class="note">
          Not stored: <code>vweights map {map.model} -o ATLAS</code>
        </p>
      </main>
    );
  }
  const plain = (value: unknown): string =>
    typeof value === "number" ? String(+value.toPrecision(4)) : typeof value === "object" ? JSON.stringify(value) : String(value);
  return (
    <main class="statements">
      <h1>{statements?.rows.length ?? 25} published statements about the stream, tested</h1>
      <p class="lead">Each verdict is computed from this model’s own numbers, the reason beside it. Open one for the claim, what is true, and the evidence.</p>
      {statements?.rows.map((row) => (
        <details key={row.id}>
          <summary>
            <b>{row.id}</b> <span class="title">{row.title}</span>
            <span class="why">
              <Maths text={row.why ?? ""} />
            </span>
            <span class={`verdict ${String(row.verdict).startsWith("holds") ? "" : "strong"}`}>{verdict(String(row.verdict))}</span>
          </summary>
          <dl>
            {(["seed", "corrected", "condition", "why", "witnesses"] as const).map((name) =>
              row[name] && !(name === "corrected" && row.corrected === row.seed) ? (
                <div key={name}>
                  <dt>{{ seed: "claim", corrected: "what is true", condition: "condition", why: "here", witnesses: "witnesses" }[name]}</dt>
                  <dd>
                    <Maths text={String(row[name])} />
                  </dd>
                </div>
              ) : null,
            )}
            {row.evidence && typeof row.evidence === "object" && (
              <div>
                <dt>evidence</dt>
                <dd>
                  <table>
                    <tbody>
                      {Object.entries(row.evidence).map(([name, value]) => (
                        <tr key={name}>
                          <th>{name.replaceAll("_", " ")}</th>
                          <td>{plain(value)}</td>
                        </tr>
                      ))}
                    </tbody>
                  </table>
                </dd>
              </div>
            )}
          </dl>
        </details>
      ))}
    </main>
  );
}
