/** What the explorer shows of a direction that somebody attached. */

export interface VectorSide {
  state: number;
  norm: number;
  of: Record<string, number>;
  labels: string[];
  kinds: string[];
  columns: Record<string, (number | null)[]>;
}

export interface VectorDocument {
  name: string;
  identity: string;
  writers?: VectorSide;
  readers?: VectorSide;
}
