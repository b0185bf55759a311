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
  ablation: { least: number | null; sequences: number | null; text: string | null; clean_loss: number | null } | null;
  run: { text: string; tokens: number; sequences: number | null } | null;
}

export interface Table {
  labels: string[];
  columns: { name: string; unit: string; meaning: string; values: (number | string | null)[] }[];
  stamp: Record<string, unknown>;
}

export interface Bandwidth extends Table {
  columns: { name: string; unit: string; meaning: string; values: (number | null)[] }[];
}

/** What a pair carries. */
export interface Carried {
  channel?: Table;
  channel_tokens?: Table;
  offset_profile?: Table;
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

interface StoredPairs {
  port: string;
  readers: string[];
  writers: string[];
  groups: string[];
  columns: Record<string, string>;
  stamp: Record<string, unknown>;
}

/** All pairs of one port; values are NaN where a writer cannot reach. */
export interface Pairs {
  port: string;
  readers: string[];
  writers: string[];
  groups: string[];
  stamp: Record<string, unknown>;
  column(name: string): Float32Array | null;
}

const embedded: Record<string, unknown> | null = (() => {
  const element = document.getElementById("documents");
  return element ? (JSON.parse(element.textContent ?? "{}") as Record<string, unknown>) : null;
})();

const known = new Map<string, Promise<unknown>>();

function load(name: string): Promise<unknown> {
  let promise = known.get(name);
  if (!promise) {
    promise = embedded
      ? Promise.resolve(embedded[name])
      : fetch(`/api/documents/${name}`).then((answer) => {
          if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
          return answer.json() as Promise<unknown>;
        });
    known.set(name, promise);
  }
  return promise;
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

function decoded(text: string): Float32Array {
  const binary = atob(text);
  const values = new Float32Array(binary.length / 2);
  const all = table();
  for (let i = 0; i < values.length; i++) {
    values[i] = all[binary.charCodeAt(2 * i) | (binary.charCodeAt(2 * i + 1) << 8)]!;
  }
  return values;
}

export const loadMap = () => load("map") as Promise<MapDocument>;

const pairs = new Map<string, Promise<Pairs>>();

export function loadPairs(port: string): Promise<Pairs> {
  let promise = pairs.get(port);
  if (!promise) {
    promise = load(`pairs-${port}`).then((stored) => {
      const { columns, ...rest } = stored as StoredPairs;
      const values = new Map<string, Float32Array>();
      return {
        ...rest,
        column(name) {
          const text = columns[name];
          if (text === undefined) return null;
          let array = values.get(name);
          if (!array) values.set(name, (array = decoded(text)));
          return array;
        },
      };
    });
    pairs.set(port, promise);
  }
  return promise;
}

export const loadBandwidth = () => load("bandwidth") as Promise<Bandwidth>;
export const loadStatements = () => load("statements") as Promise<Statements>;
export const loadCarried = (name: string) => load(name) as Promise<Carried>;
