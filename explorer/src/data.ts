/** Documents of an atlas: embedded in a report, or asked of the server. */

export interface Part {
  label: string;
  kind: string;
  layer: number | null;
  head: number | null;
  reads: number | null;
  writes: number | null;
  group: string | null;
}

export interface Effect {
  port: string;
  writer: string;
  reader: string;
  shared: string[];
  kind: "asked" | "random";
  effect: number;
  low: number | null;
  high: number | null;
  verdict: string;
  changed: number | null;
}

export interface MapDocument {
  model: string;
  width: number;
  layers: number;
  norm: string;
  version: string;
  parts: Part[];
  ports: string[];
  behaviours: Record<string, { label: string | null; scores: Record<string, number> }>;
  threshold: number | null;
  effects: Effect[];
  /** Names of documents; of what a pair carries by writer/reader.port. */
  stored: Record<string, string>;
  /** Documents of attached directions by their names. */
  vectors?: Record<string, string>;
  /** What another atlas is, with which this one is compared. */
  against?: {
    model: string;
    norm: string;
    ports: string[];
    only_here: { names: string[]; of: number };
    only_there: { names: string[]; of: number };
    conventions: Record<string, [unknown, unknown]>;
  } | null;
  ablation: { least: number | null; sequences: number | null; text: string | null; clean_loss: number | null } | null;
  run: { text: string; tokens: number; sequences: number | null } | null;
}

export type Value = number | string | null;

export interface Table {
  labels: string[];
  columns: { name: string; unit: string; meaning: string; values: Value[] }[];
  parameters: Record<string, unknown>;
  stamp: Record<string, unknown>;
}

/** A column of a table, empty where it has no such column. */
export const column = (table: Table | undefined, name: string): Value[] =>
  table?.columns.find((one) => one.name === name)?.values ?? [];
export const numbers = (table: Table | undefined, name: string) =>
  column(table, name).map((value) => (typeof value === "number" ? value : NaN));

/** What a pair carries, and what its edge does token by token, on one text or several. */
export interface Carried {
  channel?: Table;
  channel_tokens?: Directions[];
  offset_profile?: Table;
  pair_angles?: Table;
  edge_tokens?: Table[];
}

/** Neighbouring singular directions of nearly equal gain, and the tokens nearest to each of their ends. */
export interface Directions {
  directions: string;
  gain: number;
  /** The cosine between what is written and what is read. */
  written_read?: number | null;
  /** What the best of as many random tokens reaches. */
  random: number;
  ends: Record<string, [text: string | null, id: number, cosine: number][]>;
}

/** Details of all heads: gains of their circuits, what OV does, and the tokens of its first directions. */
export interface Heads {
  circuits?: { labels: string[]; ov: (number | null)[][]; qk: (number | null)[][] };
  erasers?: { labels: string[]; copying: (number | null)[]; negative_share: (number | null)[] };
  tokens?: Record<string, Directions[]>;
}

export interface Statements {
  rows: {
    id: string;
    title?: string;
    seed?: string;
    corrected?: string;
    verdict?: string;
    condition?: string | null;
    why?: string;
    witnesses?: string;
    evidence?: unknown;
  }[];
}

/** Names of all pairs of one port, and where their numbers are. */
interface StoredPairs {
  port: string;
  readers: string[];
  writers: string[];
  /** The key/value group of each reader; empty where none shares a map. */
  groups: string[];
  /** Log2 of how widely each writer is heard, and of how widely each reader listens. */
  writer_effect: (number | null)[];
  reader_effect: (number | null)[];
  /** The first reader of each window, and where the last ends. */
  windows: number[];
  columns: Record<string, string[]>;
  stamp: Record<string, unknown>;
}

/** Pairs of one port with the columns that were asked for, readers by writers. */
export interface Pairs extends Omit<StoredPairs, "columns" | "windows"> {
  /** NaN where a writer cannot reach or nothing is known; a score is infinite where an end of the pair is zero. */
  column(name: string): Float32Array | null;
}

const embedded: Record<string, unknown> | null = (() => {
  const element = document.getElementById("documents");
  return element ? (JSON.parse(element.textContent ?? "{}") as Record<string, unknown>) : null;
})();

const known = new Map<string, Promise<unknown>>();

/** A document by its name, read once. */
export function load<T>(name: string): Promise<T> {
  let promise = known.get(name);
  if (!promise) {
    promise = embedded
      ? Promise.resolve(embedded[name])
      : fetch(`/api/documents/${name}`).then(async (answer) => {
          if (!answer.ok) throw new Error(await answer.text());
          return answer.json() as Promise<unknown>;
        });
    known.set(name, promise);
    promise.catch(() => known.delete(name)); // to be asked for again
  }
  return promise as Promise<T>;
}

let halves: Float32Array | null = null;

/** Numbers of half precision, as a table of all there are. */
function table(): Float32Array {
  if (halves) return halves;
  halves = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    halves[bits] =
      exponent === 0
        ? sign * fraction * 2 ** -24
        : exponent === 31
          ? fraction
            ? NaN
            : sign * Infinity
          : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return halves;
}

/** Numbers of half precision in base64, put into an array from a place on. */
function decode(text: string, into: Float32Array, start = 0): Float32Array {
  const binary = atob(text);
  const all = table();
  for (let i = 0; 2 * i < binary.length; i++) {
    into[start + i] = all[binary.charCodeAt(2 * i) | (binary.charCodeAt(2 * i + 1) << 8)]!;
  }
  return into;
}

export const loadMap = () => load<MapDocument>("map");

const columns = new Map<string, Promise<Float32Array>>();

function loadColumn(stored: StoredPairs, name: string): Promise<Float32Array> {
  const key = stored.columns[name]![0]!;
  let promise = columns.get(key);
  if (!promise) {
    const { windows, writers, readers } = stored;
    promise = Promise.all(stored.columns[name]!.map((window) => load<{ values: string }>(window))).then((parts) => {
      const values = new Float32Array(readers.length * writers.length);
      parts.forEach((part, i) => decode(part.values, values, windows[i]! * writers.length));
      return values;
    });
    columns.set(key, promise);
    promise.catch(() => columns.delete(key));
  }
  return promise;
}

const ALL = ["score", "lift", "share", "attribution"];

/** Pairs of a port with those of the columns that this atlas has, or of the other one in this one's order. */
export async function loadPairs(port: string, names: string[] = ALL, of: "pairs" | "against" = "pairs"): Promise<Pairs> {
  const stored = await load<StoredPairs>(`${of}-${port}`);
  const there = names.filter((name) => stored.columns[name]);
  const values = await Promise.all(there.map((name) => loadColumn(stored, name)));
  return { ...stored, column: (name) => values[there.indexOf(name)] ?? null };
}
