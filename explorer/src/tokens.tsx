/** Directions in tokens: what is written, the gain, what is read; tokens below chance in grey, or a sentence in their place. */

import { useState } from "preact/hooks";
import { type Table, column, numbers } from "./data";
import { figure } from "./marks";

export interface Token {
  text: string;
  cosine: number;
  random: number;
  side: string;
}

export interface Row {
  directions: string;
  gain: number;
  energy: number;
  /** The cosine between what is written and what is read. */
  between: number;
  ends: Record<string, Token[]>;
}

const SHOWN = 4;
const GAIN = 120; // pixels of the largest
const printable = (text: string) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
export const named = (text: unknown, id: unknown) =>
  typeof text === "string" ? (text.startsWith(" ") || !/^\p{L}/u.test(text) ? printable(text.trim() || text) : `…${printable(text)}`) : `#${String(id)}`;
const above = (token: Token) => Math.abs(token.cosine) > token.random;

/** The rows of a table of tokens, those of some entries only; every token once an end, where it lies nearest. */
export function rowsOf(table: Table | undefined, wanted?: boolean[]): Row[] {
  const rows = new Map<string, Row>();
  const texts = ["directions", "end", "text", "token", "side"].map((name) => column(table, name));
  const figures = ["gain", "energy", "cosine", "random", "written_read"].map((name) => numbers(table, name));
  const [directions, ends, names, ids, sides] = texts as [string[], string[], unknown[], unknown[], string[]];
  const [gains, energies, cosines, randoms, between] = figures as [number[], number[], number[], number[], number[]];
  for (let i = 0; i < directions.length; i++) {
    if (wanted && !wanted[i]) continue;
    const key = directions[i]!;
    let row = rows.get(key);
    if (!row) rows.set(key, (row = { directions: key, gain: gains[i]!, energy: energies[i]!, between: between[i] ?? NaN, ends: {} }));
    const end = (row.ends[ends[i]!] ??= []);
    const token = { text: named(names[i], ids[i]), cosine: cosines[i]!, random: randoms[i]!, side: sides[i]! };
    const same = end.findIndex((one) => one.text === token.text);
    if (same < 0) end.push(token);
    else if (Math.abs(end[same]!.cosine) < Math.abs(token.cosine)) end[same] = token;
  }
  for (const row of rows.values())
    for (const end of Object.values(row.ends)) end.sort((a, b) => Math.abs(b.cosine) - Math.abs(a.cosine));
  return [...rows.values()];
}

interface Props {
  rows: Row[];
  /** The two ends that stand left and right of the gain. */
  ends: [string, string];
  /** Whether gains have bars, over the edge of the null where there is one. */
  chart: boolean;
  edge?: number;
  chosen?: string;
  onChoose?: (directions: string) => void;
}

export function Tokens({ rows, ends, chart, edge = 0, chosen, onChoose }: Props) {
  const [all, setAll] = useState(false);
  const any = rows.some((row) => ends.some((end) => row.ends[end]?.some(above)));
  const chance = rows[0] ? Math.max(...Object.values(rows[0].ends).flatMap((end) => end.map((one) => one.random))) : NaN;
  const most = Math.max(edge, ...rows.map((row) => row.gain)) || 1;
  const shown = any || all;
  const cell = (row: Row, end: string) => {
    const other = row.ends[ends[end === ends[0] ? 1 : 0]] ?? [];
    const tokens = (row.ends[end] ?? []).slice(0, SHOWN);
    if (!tokens.length) return <span class="muted">–</span>;
    return tokens.map((one, i) => (
      <span key={i} class={`token${above(one) ? " above" : ""}${other.some((two) => two.text === one.text) ? " both" : ""}`} title={`cosine ${figure(one.cosine, 2)}, ${one.side}`}>
        {one.cosine < 0 ? "−" : ""}
        {one.text}
      </span>
    ));
  };
  if (!rows.length) return <p class="note">No direction: this map is zero.</p>;
  return (
    <>
      {!any && (
        <p class="note">
          No token stands nearer than chance ({figure(chance, 2)}) to any of these directions.{" "}
          <button aria-expanded={all} onClick={() => setAll(!all)}>
            {all ? "Hide the nearest" : "Show the nearest anyway"}
          </button>
        </p>
      )}
      {shown && (
        <table class={chart ? "tokens" : "tokens small"}>
          <thead>
            <tr>
              {chart && <th>{/* directions */}</th>}
              <th>{ends[0] === "written" ? "tokens near what is written" : "near what is read"}</th>
              <th>gain</th>
              {chart && <th>cosine</th>}
              <th>{ends[1] === "read" ? "tokens near what is read" : "near what is written"}</th>
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => (
              <tr
                key={row.directions}
                class={chosen === row.directions ? "selected" : ""}
                onClick={() => onChoose?.(row.directions)}
              >
                {chart && <td>{row.directions.replace("-", "–")}</td>}
                <td>{cell(row, ends[0])}</td>
                <td>
                  {chart ? (
                    <svg width={GAIN} height={16} role="img" aria-label={`gain ${row.gain.toPrecision(3)}`}>
                      <rect class={row.gain > edge ? "gain above" : "gain"} y={2} height={12} width={(GAIN * row.gain) / most} />
                      {edge > 0 && <path class="least" d={`M${(GAIN * edge) / most},0V16`} />}
                      <text class="on" x={Math.max(24, (GAIN * row.gain) / most - 4)} y={12} text-anchor="end">
                        {row.gain.toPrecision(2)}
                      </text>
                    </svg>
                  ) : (
                    row.gain.toPrecision(2)
                  )}
                </td>
                {chart && <td>{figure(row.between, 2)}</td>}
                <td>{cell(row, ends[1])}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </>
  );
}
