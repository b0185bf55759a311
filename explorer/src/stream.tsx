/** The stream from embedding to unembedding: heads hang below it, and an arc lands on its head. */

import { useMemo } from "preact/hooks";
import type { MapDocument } from "./data";
import { type Edge, nameOf } from "./edges";
import { Glyph, portClass } from "./marks";

interface Props {
  map: MapDocument;
  /** The foremost edges of the brush. */
  edges: Edge[];
  chance: number;
  pin: string;
  behaviour: (head: string) => string | null;
  onPin: (edge: Edge) => void;
  onHead: (head: string) => void;
  width: number;
  /** Layers only, with one shape for each behaviour that a layer has. */
  merged: boolean;
}

const TOP = 92;

export function StreamMap({ map, edges, chance, pin, behaviour, onPin, onHead, width, merged }: Props) {
  const heads = useMemo(() => standing(map, merged, behaviour), [map, merged]);
  const mlps = map.parts.filter((part) => part.kind === "mlp");
  const rows = Math.max(1, ...heads.map((part) => part.row + 1));
  const row = Math.min(10.3, 150 / rows);
  const left = 34;
  const step = (width - left - 24) / map.layers;
  const slant = Math.max(0, step * 0.72);
  const xOf = (layer: number, head: number) => left + step * layer + 6 + (slant * head) / Math.max(1, rows - 1);
  const yOf = (head: number) => TOP + 22 + row * head;
  const height = TOP + 22 + row * rows + 30;
  const place = useMemo(
    () =>
      new Map(
        heads.flatMap((part) => part.labels.map((label) => [label, [xOf(part.layer, part.row), yOf(part.row)]] as const)),
      ),
    [heads, width],
  );
  const sorted = [...edges].sort((a, b) => a.score - b.score);
  const named = new Set(sorted.slice(-6).flatMap((edge) => [edge.writer, edge.reader]));
  // what no filter changes is drawn once
  const ground = useMemo(
    () => (
      <>
      {Array.from({ length: map.layers }, (_, layer) => (
        <g key={layer}>
          {layer % 2 === 0 && (
            <rect class="band" x={left + step * layer} y={TOP + 12} width={step} height={row * rows + 8} />
          )}
          {(step > 18 || layer % 5 === 0) && (
            <text class="axis" x={left + step * (layer + 0.5)} y={height - 4} text-anchor="middle">
              {layer}
            </text>
          )}
        </g>
      ))}
      <text class="axis" x={0} y={height - 4}>
        layer
      </text>
      {(merged ? [] : [0, Math.floor((rows - 1) / 2), rows - 1]).map((head) => (
        <text key={head} class="axis" x={0} y={yOf(head) + 4}>
          H{head}
        </text>
      ))}
      <text class="axis" x={left - 34} y={TOP - 14}>
        embed
      </text>
      <text class="axis" x={width} y={TOP - 14} text-anchor="end">
        unembed
      </text>
      </>
    ),
    [heads, width],
  );
  const front = useMemo(
    () => (
      <>
      <path class="spine" d={`M${left - 20},${TOP}H${width - 6}`} />
      <circle class="end" cx={left - 20} cy={TOP} r={4} />
      <circle class="end" cx={width - 6} cy={TOP} r={4} />
      {mlps.map((part) => (
        <rect key={part.label} class="mlp" x={left + step * ((part.layer ?? 0) + 1) - 5} y={TOP + 4} width={4} height={9}>
          <title>{part.label}</title>
        </rect>
      ))}
      {heads.map(({ labels, layer, row }) => {
        const [px, py] = [xOf(layer, row), yOf(row)];
        return (
          <g key={labels[0]} class="head" onClick={() => onHead(labels[0]!)}>
            <title>{labels.join(", ")}</title>
            <rect x={px - 5} y={py - 5} width={10} height={10} class="target" />
            <Glyph behaviour={behaviour(labels[0]!)} x={px} y={py} />
          </g>
        );
      })}
      </>
    ),
    [heads, width],
  );
  return (
    <svg class="stream" width={width} height={height} role="img" aria-label={`${edges.length} edges on the stream`}>
      {ground}
      {sorted.map((edge) => {
        const [a, b] = [place.get(edge.writer), place.get(edge.reader)];
        if (!a || !b) return null;
        const wide = Math.max(0.6, (merged ? 26 : 44) * (edge.score - chance));
        const rise = Math.min(TOP - 12, 22 + (b[0]! - a[0]!) * 0.34);
        const chosen = nameOf(edge) === pin;
        return (
          <g
            key={nameOf(edge)}
            class={`arc ${portClass(edge.port)} ${chosen ? "chosen" : ""}`}
            onClick={() => onPin(edge)}
          >
            <path
              style={{ strokeWidth: wide }}
              d={`M${a[0]},${TOP}C${a[0]},${TOP - rise * 1.3} ${b[0]},${TOP - rise * 1.3} ${b[0]},${TOP}`}
            />
            <path class="stem" d={`M${a[0]},${a[1]}V${TOP}M${b[0]},${TOP}V${b[1]}`} />
          </g>
        );
      })}
      {front}
      {(merged ? [] : [...named]).map((label) => {
        const at = place.get(label);
        return at ? (
          <text key={label} class="part" x={at[0]! + 8} y={at[1]! + 4}>
            {label}
          </text>
        ) : null;
      })}
    </svg>
  );
}

interface Standing {
  labels: string[];
  layer: number;
  row: number;
}

/** Heads where they stand: each for itself, or those of a layer that do the same together, unlabelled ones last. */
function standing(map: MapDocument, merged: boolean, behaviour: (head: string) => string | null): Standing[] {
  const heads = map.parts.filter((part) => part.kind === "head");
  if (!merged) return heads.map(({ label, layer, head }) => ({ labels: [label], layer: layer ?? 0, row: head ?? 0 }));
  const layers = new Map<number, Map<string, string[]>>();
  for (const { label, layer } of heads) {
    const of = layers.get(layer ?? 0) ?? new Map<string, string[]>();
    layers.set(layer ?? 0, of);
    const name = behaviour(label) ?? "";
    of.set(name, [...(of.get(name) ?? []), label]);
  }
  return [...layers].flatMap(([layer, of]) =>
    [...of]
      .sort(([a], [b]) => Number(a === "") - Number(b === "") || Number(a === "first_token") - Number(b === "first_token"))
      .map(([, labels], row) => ({ labels, layer, row })),
  );
}
