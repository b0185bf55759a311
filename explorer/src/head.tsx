/** Who feeds a head, and whom it feeds: all writers on the left, its card in the middle, all readers on the right. */

import { useEffect, useMemo, useState } from "preact/hooks";
import { type MapDocument, type Pairs, type Part, loadPairs } from "./data";
import { BEHAVIOURS, Sign, figure, overChance, percent, portClass, ramp, signed } from "./marks";
import type { PageProps } from "./page";
import { Behind } from "./table";

interface Cell {
  label: string;
  value: number;
  share: number;
  attribution: number;
}

const SAYS: Record<string, string> = {
  Q: "what it looks for",
  K: "what it is found by",
  V: "what it moves",
};
const LATER: Record<string, string> = { Q: "later queries", K: "later keys", V: "later values" };

export function HeadPage({ map, address, go, width, theme }: PageProps) {
  const part = map.parts.find((one) => one.label === address.name);
  const ports = ["Q", "K", "V"].filter((port) => map.ports.includes(port));
  const [all, setAll] = useState<Record<string, Pairs>>({});
  useEffect(() => {
    void Promise.all(map.ports.map(loadPairs)).then((ports) =>
      setAll(Object.fromEntries(ports.map((pairs) => [pairs.port, pairs]))),
    );
  }, []);
  const heads = map.parts.filter((one) => one.kind === "head");
  if (!part || part.kind !== "head") {
    return (
      <main>
        <h1>No head {address.name}</h1>
        <p class="note">
          This model has heads from {heads[0]?.label} to {heads.at(-1)?.label}.
        </p>
      </main>
    );
  }
  const move = (by: number) => {
    const at = heads.indexOf(part);
    const next = heads[at + by];
    if (next) go({ page: "head", name: next.label, state: {} });
  };
  const behaviours = map.behaviours[part.label];
  const effects = map.effects.filter(
    (one) => one.kind === "asked" && (one.writer === part.label || [one.reader, ...one.shared].includes(part.label)),
  );
  const open = (label: string) => label.includes("H") && go({ page: "head", name: label.split(".")[0]!, state: {} });
  return (
    <main class="component">
      <section class="side">
        <h2>All that writes into it</h2>
        <p class="lead">Every earlier part by layer and head; colour: score over chance, log₂.</p>
        {ports.map((port) => (
          <Strip key={port} map={map} pairs={all[port]} port={port} part={part} into theme={theme} onOpen={open} />
        ))}
      </section>
      <section class="card">
        <h1>
          {part.label} <Sign behaviour={behaviours?.label} /> <small>{BEHAVIOURS[behaviours?.label ?? ""] ?? "no label"}</small>
          <span class="step">
            <button onClick={() => move(-1)} aria-label="the head before">
              ←
            </button>{" "}
            <button onClick={() => move(1)} aria-label="the next head">
              →
            </button>
          </span>
        </h1>
        {part.group && (
          <p>
            Keys and values shared with{" "}
            {heads
              .filter((one) => one.group === part.group && one !== part)
              .map((one) => one.label)
              .join(", ") || "none"}
            .
          </p>
        )}
        <h3>
          Where it attends <small>mean over repeated random tokens</small>
        </h3>
        {behaviours ? (
          <table class="bars">
            <tbody>
              {Object.entries(behaviours.scores)
                .sort((a, b) => b[1] - a[1])
                .map(([name, value]) => (
                  <tr key={name}>
                    <th>{BEHAVIOURS[name] ?? name}</th>
                    <td>
                      <i style={{ width: `${100 * value}%` }} />
                    </td>
                    <td>{figure(value, 2)}</td>
                  </tr>
                ))}
            </tbody>
          </table>
        ) : (
          <p class="note">
            Not stored: <code>vweights map {map.model} -o ATLAS --repeated</code>
          </p>
        )}
        <h3>
          When its edges were removed <small>nats</small>
        </h3>
        {effects.length ? (
          <table class="edges">
            <tbody>
              {effects.map((one) => (
                <tr key={`${one.writer}${one.reader}${one.port}`}>
                  <td>{one.writer === part.label ? "out" : "in"}</td>
                  <td>
                    {one.writer} → {one.reader}.<span class={portClass(one.port)}>{one.port}</span>
                  </td>
                  <td>
                    <b>{signed(one.effect)}</b>
                  </td>
                  <td class="muted">
                    {figure(one.low, 2)} to {figure(one.high, 2)}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        ) : (
          <p class="note">
            None was: <code>vweights ablate {map.model} WRITER {part.label}.K</code>
          </p>
        )}
        <hr />
        <p class="note">
          What reaches it on a text of yours: <code>vweights trace {map.model} --prompt "…" --reader {part.label}.K</code>
        </p>
      </section>
      <section class="side">
        <h2>All that it feeds</h2>
        <p class="lead">Every later reader; same colour, same scale.</p>
        {ports.map((port) => (
          <Strip key={port} map={map} pairs={all[port]} port={port} part={part} theme={theme} onOpen={open} />
        ))}
        <Others map={map} all={all} part={part} theme={theme} width={width} />
      </section>
    </main>
  );
}

/** Pairs of one head through one port: all writers into it, or all readers of it. */
export function cellsOf(pairs: Pairs, label: string, into: boolean): Cell[] {
  const { readers, writers } = pairs;
  const fixed = (into ? readers : writers).indexOf(label);
  if (fixed < 0) return [];
  const [score, share, attribution] = ["score", "share", "attribution"].map((name) => pairs.column(name));
  const cells: Cell[] = [];
  (into ? writers : readers).forEach((other, i) => {
    const at = into ? fixed * writers.length + i : i * writers.length + fixed;
    const value = score?.[at] ?? NaN;
    if (!Number.isNaN(value)) {
      cells.push({ label: other, value, share: share?.[at] ?? NaN, attribution: attribution?.[at] ?? NaN });
    }
  });
  return cells;
}

interface StripProps {
  map: MapDocument;
  pairs: Pairs | undefined;
  port: string;
  part: Part;
  into?: boolean;
  theme: string;
  onOpen: (label: string) => void;
}

function Strip({ map, pairs, port, part, into = false, theme, onOpen }: StripProps) {
  const [tip, setTip] = useState<{ cell: Cell; x: number; y: number } | null>(null);
  const cells = useMemo(() => (pairs ? cellsOf(pairs, part.label, into) : []), [pairs, part.label, into]);
  const colour = useMemo(ramp, [theme]);
  const chance = 1 / Math.sqrt(map.width);
  const byLabel = new Map(map.parts.map((one) => [one.label, one]));
  const heads = cells.filter((cell) => /H\d+$/.test(cell.label));
  const others = cells.filter((cell) => !/H\d+$/.test(cell.label));
  const layers = heads.map((cell) => byLabel.get(cell.label)?.layer ?? 0);
  const first = into ? 0 : Math.min(...layers, map.layers);
  const last = into ? (part.layer ?? 0) : map.layers - 1;
  const rows = Math.max(1, ...map.parts.map((one) => (one.head ?? 0) + 1));
  const wide = Math.min(20, 350 / Math.max(1, last - first + 1 + (into ? 1 : 0)));
  const tall = Math.min(13.6, 122 / rows);
  const left = 24 + (into ? wide : 0);
  const measure = (cell: Cell) => (Number.isNaN(cell.share) ? cell.value : cell.share);
  const groupOf = (cell: Cell) => (into || !pairs ? "" : pairs.groups[pairs.readers.indexOf(cell.label)]) || cell.label;
  const foremost: { cell: Cell; shared: string[] }[] = [];
  for (const cell of [...cells].sort((a, b) => measure(b) - measure(a))) {
    const same = foremost.find((one) => groupOf(one.cell) === groupOf(cell));
    if (same) same.shared.push(cell.label);
    else if (foremost.length < 5) foremost.push({ cell, shared: [] });
  }
  const outlined = new Set(foremost.flatMap(({ cell, shared }) => [cell.label, ...shared]));
  const place = (cell: Cell): [number, number] | null => {
    const one = byLabel.get(cell.label);
    if (!one) return null;
    if (one.kind === "head") return [left + wide * ((one.layer ?? 0) - first), tall * (one.head ?? 0)];
    const y = tall * rows + 3;
    if (one.kind === "mlp") return [left + wide * ((one.layer ?? 0) - first), y];
    return one.kind === "embed" || one.kind === "pos" ? [24, y] : null;
  };
  const rowsOf = () =>
    [...cells]
      .sort((a, b) => measure(b) - measure(a))
      .map((cell) => ({
        [into ? "writer" : "reader"]: cell.label,
        score: cell.value,
        over_chance: cell.value / chance,
        share: cell.share,
        first_order_nats: cell.attribution,
      }));
  const height = tall * rows + (into && others.length ? tall + 20 : 18);
  return (
    <div class="strip">
      <h3>
        <span class={portClass(port)}>{port}</span> {into ? SAYS[port] : LATER[port]}
      </h3>
      {!pairs ? (
        <p class="note">Reading …</p>
      ) : cells.length === 0 ? (
        <p class="note">{into ? "Nothing writes before it." : "Nothing reads after it."}</p>
      ) : (
        <div class="row">
          <svg
            width={left + wide * (last - first + 1) + 34}
            height={height}
            role="img"
            aria-label={`${cells.length} ${into ? "writers" : "readers"}, port ${port}`}
            onPointerLeave={() => setTip(null)}
          >
            {into && others.some((cell) => cell.label === "embed") && (
              <text class="axis" x={0} y={height - 2}>
                embed
              </text>
            )}
            <text class="axis" x={0} y={tall - 2}>
              H0
            </text>
            <text class="axis" x={0} y={tall * rows - 2}>
              H{rows - 1}
            </text>
            {cells.map((cell) => {
              const at = place(cell);
              return at ? (
                <rect
                  key={cell.label}
                  x={at[0] + 0.5}
                  y={at[1] + 0.5}
                  width={Math.max(1, wide - 1)}
                  height={Math.max(1, tall - 1)}
                  fill={colour(overChance(cell.value / chance))}
                  class={outlined.has(cell.label) ? "outlined" : ""}
                  onPointerEnter={() => setTip({ cell, x: at[0], y: at[1] })}
                  onClick={() => onOpen(cell.label)}
                />
              ) : null;
            })}
            {into && others.length > 0 && (
              <text class="axis" x={left + wide * (last - first + 1) + 3} y={tall * rows + tall}>
                MLP
              </text>
            )}
            {[first, ...[5, 10, 15, 20, 25, 30, 40, 50, 60].filter((l) => l > first + 2 && l < last - 1), last].map((l) => (
              <text key={l} class="axis" x={left + wide * (l - first + 0.5)} y={height - 2} text-anchor="middle">
                {l}
              </text>
            ))}
          </svg>
          {tip && (
            <div class="tip" style={{ left: Math.min(210, tip.x + 10), top: tip.y - 58 }}>
              <b>{into ? `${tip.cell.label} → ${part.label}.${port}` : `${part.label} → ${tip.cell.label}.${port}`}</b>
              <br />
              score {figure(tip.cell.value)}, {figure(tip.cell.value / chance, 1)} × chance
              {!Number.isNaN(tip.cell.share) && (
                <>
                  <br />
                  share {percent(tip.cell.share)}
                </>
              )}
            </div>
          )}
          <ol>
            {foremost.map(({ cell, shared }) => (
              <li key={cell.label}>
                <button onClick={() => onOpen(cell.label)} disabled={!/H\d+$/.test(cell.label)}>
                  {cell.label}
                  <small> {shared.map((other) => other.replace(/^L\d+/, "")).join(" ")}</small>
                </button>
                <span>{Number.isNaN(cell.share) ? figure(cell.value) : percent(cell.share)}</span>
              </li>
            ))}
            <li>
              <span class="muted">+ {cells.length - foremost.reduce((n, one) => n + 1 + one.shared.length, 0)} more</span>{" "}
              <Behind name={`${part.label}-${port}-${into ? "writers" : "readers"}`} rows={rowsOf} />
            </li>
          </ol>
        </div>
      )}
    </div>
  );
}

function Others({ map, all, part, theme }: { map: MapDocument; all: Record<string, Pairs>; part: Part; theme: string; width: number }) {
  const colour = useMemo(ramp, [theme]);
  const chance = 1 / Math.sqrt(map.width);
  const ports = map.ports.filter((port) => !["Q", "K", "V"].includes(port) && all[port]);
  if (!ports.length) return null;
  return (
    <div class="strip">
      <h3>
        <span class="port-MLP">MLP</span> {ports.join(", ")}
      </h3>
      {ports.map((port) => {
        const cells = cellsOf(all[port]!, part.label, false);
        const wide = Math.min(20, 340 / Math.max(1, cells.length));
        return (
          <div key={port} class="row">
            <svg width={Math.max(20, wide * cells.length)} height={18} role="img" aria-label={`${cells.length} readers, port ${port}`}>
              {cells.map((cell, i) => (
                <rect key={cell.label} x={wide * i + 0.5} y={2} width={wide - 1} height={12} fill={colour(overChance(cell.value / chance))}>
                  <title>
                    {cell.label}: {figure(cell.value / chance, 1)} × chance
                  </title>
                </rect>
              ))}
            </svg>
            <span class="note">{port}</span>
          </div>
        );
      })}
    </div>
  );
}
