/** Edges between heads of one port, one for each map that heads share, with what is known of each. */

import type { Effect, MapDocument, Pairs } from "./data";

export interface Edge {
  writer: string;
  reader: string;
  port: string;
  /** Further heads that read through the same map. */
  others: string[];
  score: number;
  expected: number;
  lift: number;
  share: number;
  attribution: number;
  layers: number;
  effect: Effect | null;
}

export const nameOf = (edge: Edge) => `${edge.writer}>${edge.reader}.${edge.port}`;
const layerOf = (label: string) => Number(/^L(\d+)/.exec(label)?.[1] ?? NaN);

export function edgesOf(map: MapDocument, pairs: Pairs): Edge[] {
  const { readers, writers, groups, port } = pairs;
  const score = pairs.column("score");
  const lift = pairs.column("lift");
  const share = pairs.column("share");
  const attribution = pairs.column("attribution");
  if (!score || !lift) return [];
  const effects = new Map<string, Effect>();
  for (const effect of map.effects) {
    if (effect.port !== port) continue;
    for (const reader of [effect.reader, ...effect.shared]) effects.set(`${effect.writer}>${reader}`, effect);
  }
  const heads = writers.map((name) => /^L\d+H\d+$/.test(name));
  const edges: Edge[] = [];
  for (let w = 0; w < writers.length; w++) {
    if (!heads[w]) continue;
    const best = new Map<string, Edge>();
    for (let r = 0; r < readers.length; r++) {
      const i = r * writers.length + w;
      const value = score[i]!;
      const reader = readers[r]!;
      if (!(value > 0) || !/^L\d+H\d+$/.test(reader)) continue;
      const key = groups[r] || reader;
      const same = best.get(key);
      if (same && same.score >= value) {
        same.others.push(reader);
        continue;
      }
      const edge: Edge = {
        writer: writers[w]!,
        reader,
        port,
        others: same ? [same.reader, ...same.others] : [],
        score: value,
        lift: lift[i]!,
        expected: value * 2 ** (-lift[i]! / 2),
        share: share ? share[i]! : NaN,
        attribution: attribution ? attribution[i]! : NaN,
        layers: layerOf(reader) - layerOf(writers[w]!),
        effect: effects.get(`${writers[w]}>${reader}`) ?? null,
      };
      best.set(key, edge);
    }
    edges.push(...best.values());
  }
  return edges;
}
