/** Directions in tokens: what is written, the gain, what is read; tokens below chance in grey, or a sentence in their place. */

import { useState } from "preact/hooks";
import type { Directions } from "./data";
import { figure } from "./marks";

const SHOWN = 4;
const GAIN = 120; // pixels of the largest
const short = (value: number) => String(Number(value.toPrecision(value < 1 ? 2 : 3)));
const printable = (text: string) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

/** A token as it is shown: without the space before a word, an ellipsis before the inside of one. */
const shownToken = (text: string | null, id: number) =>
  text === null ? `#${id}` : text.startsWith(" ") || !/^\p{L}/u.test(text) ? printable(text.trim() || text) : `…${printable(text)}`;

/** Every token of every direction, for the table behind. */
export const tokenRows = (rows: Directions[]) =>
  rows.flatMap((row) =>
    Object.entries(row.ends).flatMap(([end, tokens]) =>
      tokens.map(([text, id, cosine]) => ({
        directions: row.directions,
        gain: row.gain,
        cosine_written_read: row.written_read ?? null,
        end,
        token: text ?? `#${id}`,
        id,
        cosine,
        chance: row.random,
      })),
    ),
  );

interface Props {
  rows: Directions[];
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
  const above = (row: Directions, cosine: number) => Math.abs(cosine) > row.random;
  const any = rows.some((row) => ends.some((end) => row.ends[end]?.some(([, , cosine]) => above(row, cosine))));
  const chance = rows[0]?.random;
  const most = Math.max(edge, ...rows.map((row) => row.gain)) || 1;
  const shown = any || all;
  const cell = (row: Directions, end: string) => {
    const other = new Set(row.ends[ends[end === ends[0] ? 1 : 0]]?.map(([, id]) => id));
    const tokens = (row.ends[end] ?? []).slice(0, chart ? SHOWN : SHOWN - 1);
    if (!tokens.length) return <span class="muted">–</span>;
    return tokens.map(([text, id, cosine]) => (
      <span
        key={id}
        class={`token${above(row, cosine) ? " above" : ""}${other.has(id) ? " both" : ""}`}
        title={`cosine ${figure(cosine, 2)}`}
      >
        {cosine < 0 ? "−" : ""}
        {shownToken(text, id)}
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
                    <svg width={GAIN} height={16} role="img" aria-label={`gain ${short(row.gain)}`}>
                      <rect class={row.gain > edge ? "gain above" : "gain"} y={2} height={12} width={(GAIN * row.gain) / most} />
                      {edge > 0 && <path class="least" d={`M${(GAIN * edge) / most},0V16`} />}
                      <text class="on" x={Math.max(24, (GAIN * row.gain) / most - 4)} y={12} text-anchor="end">
                        {short(row.gain)}
                      </text>
                    </svg>
                  ) : (
                    short(row.gain)
                  )}
                </td>
                {chart && <td>{figure(row.written_read, 2)}</td>}
                <td>{cell(row, ends[1])}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </>
  );
}
