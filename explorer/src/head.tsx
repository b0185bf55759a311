/** Who feeds a head, and whom it feeds: all writers on the left, its card in the middle, all readers on the right. */

import { useEffect, useMemo, useState } from "preact/hooks";
import { Card } from "./card";
import { type MapDocument, type Pairs, type Part, loadPairs } from "./data";
import { isHead } from "./edges";
import { figure, overChance, percent, portClass, ramp, signed } from "./marks";
import type { PageProps } from "./page";
import { Behind } from "./table";

const COLUMNS = ["score", "share", "attribution"];

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
const PORTS = ["Q", "K", "V"];

export function HeadPage({ map, address, go, width, theme }: PageProps) {
  const part = map.parts.find((one) => one.label === address.name);
  const [all, setAll] = useState<Record<string, Pairs>>({});
  useEffect(() => {
    void Promise.all(map.ports.map((port) => loadPairs(port, COLUMNS))).then((ports) =>
      setAll(Object.fromEntries(ports.map((pairs) => [pairs.port, pairs]))),
    );
  }, []);
  if (!part) {
    const heads = map.parts.filter((one) => one.kind === "head");
    return (
      <main>
        <h1>No part {address.name}</h1>
        <p class="note">
          This model has heads from {heads[0]?.label} to {heads.at(-1)?.label}, and parts such as{" "}
          {map.parts.find((one) => one.kind === "mlp")?.label ?? "embed"}.
        </p>
      </main>
    );
  }
  const alike = map.parts.filter((one) => one.kind === part.kind);
  const move = (by: number) => {
    const next = alike[alike.indexOf(part) + by];
    if (next) go({ page: "head", name: next.label, state: {} });
  };
  const open = (label: string) => go({ page: "head", name: label, state: {} });
  const pair = (name: string) => go({ page: "pair", name, state: {} });
  const reads = part.kind === "head" ? PORTS : Object.keys(all).filter((port) => all[port]!.readers.includes(part.label));
  // the columns of the page are 504, 352 and 472 wide where there are three, see explorer.css
  const room = width < 1052 ? width : width - 64;
  const sides = width < 1052 ? [room - 172, room - 218] : [(room * 504) / 1328 - 172, (room * 472) / 1328 - 218];
  const strip = { map, part, theme, onOpen: open, onPair: pair };
  return (
    <main class="component">
      <section class="side">
        <h2>All that writes into it</h2>
        <p class="lead">Every earlier part by layer and head; colour: score over chance, log₂.</p>
        {reads
          .filter((port) => map.ports.includes(port))
          .map((port) => (
            <Strip key={port} {...strip} pairs={all[port]} port={port} room={sides[0]!} into />
          ))}
        {part.reads === null && <p class="note">It reads nothing of the stream.</p>}
        <p class="legend">
          ¼ chance <span class="ramp" /> 4 × chance
          <span>
            <i class="key box" /> listed: the five foremost
          </span>
          <span>
            <i class="key dead" /> writes or reads nothing
          </span>
        </p>
      </section>
      <Card map={map} part={part} onMove={move} onPair={pair} />
      <section class="side">
        <h2>All that it feeds</h2>
        <p class="lead">Every later reader; same colour, same scale.</p>
        {PORTS.filter((port) => map.ports.includes(port)).map((port) => (
          <Strip key={port} {...strip} pairs={all[port]} port={port} room={sides[1]!} />
        ))}
        <Others map={map} all={all} part={part} theme={theme} />
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
      cells.push({ label: other, value: value < Infinity ? value : NaN, share: share?.[at] ?? NaN, attribution: attribution?.[at] ?? NaN });
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
  /** Pixels for the cells. */
  room: number;
  theme: string;
  onOpen: (label: string) => void;
  onPair: (name: string) => void;
}

function Strip({ map, pairs, port, part, into = false, room, theme, onOpen, onPair }: StripProps) {
  const [tip, setTip] = useState<{ cell: Cell; x: number; y: number } | null>(null);
  const cells = useMemo(() => (pairs ? cellsOf(pairs, part.label, into) : []), [pairs, part.label, into]);
  const colour = useMemo(ramp, [theme]);
  const chance = 1 / Math.sqrt(map.width);
  const byLabel = new Map(map.parts.map((one) => [one.label, one]));
  const heads = cells.filter((cell) => isHead(cell.label));
  const others = cells.filter((cell) => !isHead(cell.label));
  const layers = heads.map((cell) => byLabel.get(cell.label)?.layer ?? 0);
  const first = into ? 0 : Math.min(...layers, map.layers);
  const last = into ? (part.layer ?? map.layers - 1) : map.layers - 1;
  const rows = Math.max(1, ...map.parts.map((one) => (one.head ?? 0) + 1));
  const wide = Math.max(3, Math.min(20, (room - 58) / Math.max(1, last - first + 1 + (into ? 1 : 0))));
  const tall = Math.min(13.6, 122 / rows);
  const left = 24 + (into ? wide : 0);
  const ran = cells.some((cell) => !Number.isNaN(cell.share));
  const estimated = !into && cells.some((cell) => !Number.isNaN(cell.attribution));
  const measure = (cell: Cell) => (estimated ? Math.abs(cell.attribution) : ran ? cell.share : cell.value) || 0;
  const removed = (cell: Cell) =>
    map.effects.find(
      (one) => !into && one.port === port && one.writer === part.label && [one.reader, ...one.shared].includes(cell.label),
    );
  const pairOf = (label: string) => (into ? `${label}/${part.label}.${port}` : `${part.label}/${label}.${port}`);
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
        removed_nats: removed(cell)?.effect ?? null,
      }));
  const height = tall * rows + (into && others.length ? tall + 20 : 18);
  return (
    <div class="strip">
      <h3>
        <span class={portClass(port)}>{port}</span> {into ? (SAYS[port] ?? "what it reads") : LATER[port]}
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
            role="application"
            aria-label={`${cells.length} ${into ? "writers" : "readers"}, port ${port}`}
            tabindex={0}
            onPointerLeave={() => setTip(null)}
            onBlur={() => setTip(null)}
            onKeyDown={(event) => {
              const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
              if (step) {
                const from = tip ? byLabel.get(tip.cell.label) : null;
                const next = from
                  ? heads.find((cell) => {
                      const one = byLabel.get(cell.label);
                      return one?.layer === (from.layer ?? 0) + step[0]! && one.head === (from.head ?? 0) + step[1]!;
                    })
                  : foremost.find(({ cell }) => isHead(cell.label))?.cell ?? heads[0];
                const at = next && place(next);
                if (next && at) setTip({ cell: next, x: at[0], y: at[1] });
                event.preventDefault();
              } else if (event.key === "Enter" && tip) {
                if (isHead(part.label) && isHead(tip.cell.label)) onPair(pairOf(tip.cell.label));
                else onOpen(tip.cell.label);
              }
            }}
          >
            {tip && (
              <rect class="cursor" x={tip.x - 0.5} y={tip.y - 0.5} width={wide + 1} height={tall + 1} />
            )}
            <pattern id="dead" width="4" height="4" patternUnits="userSpaceOnUse">
              <path class="hatch" d="M0,4L4,0" />
            </pattern>
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
                  fill={Number.isNaN(cell.value) ? "url(#dead)" : colour(overChance(cell.value / chance))}
                  class={outlined.has(cell.label) ? "outlined" : ""}
                  onPointerEnter={() => setTip({ cell, x: at[0], y: at[1] })}
                  onClick={() => (isHead(cell.label) && isHead(part.label) ? onPair(pairOf(cell.label)) : onOpen(cell.label))}
                />
              ) : null;
            })}
            {into && others.length > 0 && (
              <text class="axis" x={left + wide * (last - first + 1) + 3} y={tall * rows + tall}>
                MLP
              </text>
            )}
            {[first, ...[5, 10, 15, 20, 25, 30, 40, 50, 60].filter((l) => l > first + 2 && l < last - 1), last]
              .filter((l) => !into || left + wide * (l - first + 0.5) > 46) // beside "embed"
              .map((l) => (
              <text key={l} class="axis" x={left + wide * (l - first + 0.5)} y={height - 2} text-anchor="middle">
                {l}
              </text>
            ))}
          </svg>
          {tip && (
            <div class="tip" role="status" style={{ left: Math.min(210, tip.x + 10), top: tip.y - 58 }}>
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
          <ol class={estimated ? "three-columns" : ""}>
            <li class="muted">
              <span />
              <span>{ran ? "share" : "score"}</span>
              {estimated && <span>loss, nats</span>}
            </li>
            {foremost.map(({ cell, shared }) => {
              const effect = removed(cell);
              return (
                <li key={cell.label}>
                  <button onClick={() => onOpen(cell.label)}>
                    {together([cell.label, ...shared])}
                  </button>
                  <span>{ran ? percent(cell.share) : figure(cell.value)}</span>
                  {estimated &&
                    (effect ? <b>{signed(effect.effect)}</b> : <span class="muted">{signed(cell.attribution)} est.</span>)}
                </li>
              );
            })}
            <li class="more">
              <span class="muted">+ {cells.length - foremost.reduce((n, one) => n + 1 + one.shared.length, 0)} more</span>{" "}
              <Behind name={`${part.label}-${port}-${into ? "writers" : "readers"}`} rows={rowsOf} />
            </li>
          </ol>
        </div>
      )}
    </div>
  );
}

/** Heads that share a map under one name, L19H6–8. */
function together(labels: string[]): string {
  const heads = labels.map((label) => Number(/H(\d+)$/.exec(label)?.[1] ?? NaN)).sort((a, b) => a - b);
  if (labels.length === 1 || heads.some(Number.isNaN)) return labels.join(", ");
  const stem = labels[0]!.replace(/\d+$/, "");
  const run = heads.every((head, i) => i === 0 || head === heads[i - 1]! + 1);
  return run ? `${stem}${heads[0]}–${heads.at(-1)}` : `${stem}${heads.join(", ")}`;
}

function Others({ map, all, part, theme }: { map: MapDocument; all: Record<string, Pairs>; part: Part; theme: string }) {
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
        if (!cells.length) return null;
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
