/** Edges between heads of one port, one for each map that heads share, in columns: there may be half a million. */

import type { Effect, MapDocument, Pairs } from "./data";

export interface Edges {
  port: string;
  pairs: Pairs;
  count: number;
  /** Of each edge its reader, the one of highest score among those that share a map, and its writer, as places in `pairs`. */
  reader: Int32Array;
  writer: Int32Array;
  score: Float32Array;
  lift: Float32Array;
  /** The score that both ends alone would give. */
  expected: Float32Array;
  share: Float32Array;
  attribution: Float32Array;
  /** Layers between writer and reader. */
  apart: Int16Array;
  /** Removed edges by their place. */
  effects: Map<number, Effect>;
}

/** One edge with its names. */
export interface Edge {
  at: number;
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
  effect: Effect | null;
}

export const isHead = (label: string) => /^L\d+H\d+$/.test(label);
export const nameOf = (edge: Pick<Edge, "writer" | "reader" | "port">) => `${edge.writer}>${edge.reader}.${edge.port}`;
const layerOf = (label: string) => Number(/^L(\d+)/.exec(label)?.[1] ?? NaN);
const known = new WeakMap<Pairs, Edges>();

export function edgesOf(map: MapDocument, pairs: Pairs): Edges {
  let edges = known.get(pairs);
  if (!edges) known.set(pairs, (edges = columnsOf(map, pairs)));
  return edges;
}

function columnsOf(map: MapDocument, pairs: Pairs): Edges {
  const { readers, writers, groups, port } = pairs;
  const [score, lift, share, attribution] = ["score", "lift", "share", "attribution"].map((name) => pairs.column(name));
  const heads = writers.flatMap((name, i) => (isHead(name) ? [i] : []));
  const shared = new Map<string, number[]>();
  readers.forEach((name, i) => {
    if (!isHead(name)) return;
    const key = groups[i] || name;
    const members = shared.get(key);
    if (members) members.push(i);
    else shared.set(key, [i]);
  });
  const most = heads.length * shared.size;
  const reader = new Int32Array(most);
  const writer = new Int32Array(most);
  let count = 0;
  if (score && lift) {
    for (const members of shared.values()) {
      for (const w of heads) {
        let [best, largest] = [-1, 0];
        for (const r of members) {
          const value = score[r * writers.length + w]!;
          if (value > largest && value < Infinity) [best, largest] = [r, value];
        }
        if (best < 0) continue;
        reader[count] = best;
        writer[count++] = w;
      }
    }
  }
  const pick = (column: Float32Array | null | undefined) => {
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++) values[i] = column ? column[reader[i]! * writers.length + writer[i]!]! : NaN;
    return values;
  };
  const edges: Edges = {
    port,
    pairs,
    count,
    reader: reader.subarray(0, count),
    writer: writer.subarray(0, count),
    score: pick(score),
    lift: pick(lift),
    expected: new Float32Array(count),
    share: pick(share),
    attribution: pick(attribution),
    apart: new Int16Array(count),
    effects: new Map(),
  };
  const [late, early] = [readers.map(layerOf), writers.map(layerOf)];
  for (let i = 0; i < count; i++) {
    edges.expected[i] = edges.score[i]! * 2 ** (-edges.lift[i]! / 2);
    edges.apart[i] = late[reader[i]!]! - early[writer[i]!]!;
  }
  for (const effect of map.effects) {
    if (effect.port !== port) continue;
    for (const name of [effect.reader, ...effect.shared]) {
      const at = placeOf(edges, effect.writer, name);
      if (at >= 0) edges.effects.set(at, effect);
    }
  }
  return edges;
}

export function edgeAt(edges: Edges, at: number): Edge {
  const { readers, writers, groups } = edges.pairs;
  const r = edges.reader[at]!;
  const group = groups[r];
  return {
    at,
    writer: writers[edges.writer[at]!]!,
    reader: readers[r]!,
    port: edges.port,
    others: group ? readers.filter((_, i) => i !== r && groups[i] === group) : [],
    score: edges.score[at]!,
    expected: edges.expected[at]!,
    lift: edges.lift[at]!,
    share: edges.share[at]!,
    attribution: edges.attribution[at]!,
    effect: edges.effects.get(at) ?? null,
  };
}

/** Where an edge is, by any name of its reader; -1 where there is none. */
export function placeOf(edges: Edges, writer: string, reader: string): number {
  const { readers, writers, groups } = edges.pairs;
  const [w, r] = [writers.indexOf(writer), readers.indexOf(reader)];
  if (w < 0 || r < 0) return -1;
  const group = groups[r];
  for (let i = 0; i < edges.count; i++) {
    if (edges.writer[i] !== w) continue;
    const other = edges.reader[i]!;
    if (other === r || (group && groups[other] === group)) return i;
  }
  return -1;
}

export const placeOfName = (edges: Edges, name: string) => {
  const [writer = "", reader = ""] = name.split(">");
  return reader.endsWith(`.${edges.port}`) ? placeOf(edges, writer, reader.slice(0, -edges.port.length - 1)) : -1;
};

/** Those edges that fit, by one measure: how many are at least so much, and the foremost of them. */
export interface Ranked {
  values: Float32Array;
  fits: Uint8Array;
  largest: number;
  total: number;
  countFrom(least: number): number;
  /** Places of the foremost, at most `LISTED`. */
  foremost(least: number): Int32Array;
}

export const LISTED = 2000;

export function ranked(values: Float32Array, fits: Uint8Array): Ranked {
  const sorted = values.filter((value, i) => fits[i] && !Number.isNaN(value)).sort();
  const bound = sorted[Math.max(0, sorted.length - LISTED)] ?? Infinity;
  const listed: number[] = [];
  for (let i = 0; i < values.length; i++) if (fits[i] && values[i]! >= bound) listed.push(i);
  const order = Int32Array.from(listed.sort((a, b) => values[b]! - values[a]!).slice(0, LISTED));
  const largest = sorted.at(-1) ?? NaN;
  return {
    values,
    fits,
    largest,
    total: sorted.length,
    countFrom(least) {
      let [low, high] = [0, sorted.length];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (sorted[middle]! >= least) high = middle;
        else low = middle + 1;
      }
      return sorted.length - low;
    },
    foremost(least) {
      let end = order.length;
      while (end > 0 && values[order[end - 1]!]! < least) end--;
      return order.subarray(0, end);
    },
  };
}
