/** The document of the page Structure: how crowded the stream is, what is kept and erased in it, and its basis. */

export type Numbers = (number | null)[];

export interface Crowd {
  coherence?: {
    directions: number;
    dimension: number;
    welch: number;
    largest: number;
    largest_pair: string[];
    mean_square: number;
    random_largest: number;
    random_mean_square: number;
    count: number[];
    random: number[];
  };
  interference?: {
    n: number[];
    total: Numbers;
    error: Numbers;
    random_total: Numbers;
    random_error: Numbers;
    exponents: Record<string, { exponent: number; low: number; high: number; random: number } | null>;
  };
  recovery?: { n: number[]; directions: number; methods: { name: string; meaning: string; fidelity: Numbers }[] };
}

export interface Neurons {
  counts: string;
  bins: [number, number];
  cosine: [number, number];
  log_gain: [number, number];
  below: number;
  layers: number[];
  classes: Record<"weakening" | "between" | "strengthening", number[]>;
  threshold: number;
  absent: number;
  classes_by: string | null;
  null: { tail?: number; shuffled?: { weakening_share: number; strengthening_share: number } };
}

export interface Heads {
  labels: string[];
  of: number;
  columns: Record<string, Numbers>;
  null: Record<string, { mean: number; std: number } | number | undefined>;
}

export interface ErasingPair {
  writer: string;
  eraser: string;
  alignment: number;
  z: number | null;
  erasure: number | null;
  baseline: number | null;
}

export interface Erasure {
  pairs: ErasingPair[];
  of: number;
  erasing: number[];
  writing: number[];
  largest: number[];
  eraser: string[];
  writer: string[];
  norm_scalar: number;
}

export interface Basis {
  columns: Record<"write_energy" | "write_kurtosis" | "read_energy" | "read_kurtosis", Numbers>;
  means: Record<"write" | "read", { trained: number | null; turned: number | null; quantiles: Numbers }>;
  gaussian: number;
  threshold: number;
  massive: number[];
  of_massive: number;
}

export interface Structure {
  crowds?: Record<string, Crowd>;
  neurons?: Neurons;
  heads?: Heads;
  erasure?: Erasure;
  basis?: Basis;
}
