/** What every page is given, and the pairs of the port that its address names. */

import { useEffect, useState } from "preact/hooks";
import type { Address } from "./address";
import { type MapDocument, type Pairs, loadPairs } from "./data";

export interface PageProps {
  map: MapDocument;
  address: Address;
  go: (change: Partial<Address>, replace?: boolean) => void;
  width: number;
  theme: string;
}

/** The ports of heads in this atlas, the one that the address names or the first, and its pairs, null until they are read. */
export function usePort({ map, address }: PageProps): { ports: string[]; port: string; pairs: Pairs | null } {
  const ports = ["K", "Q", "V"].filter((port) => map.ports.includes(port));
  const port = ports.includes(address.state.port ?? "") ? address.state.port! : ports[0]!;
  const [pairs, setPairs] = useState<Pairs | null>(null);
  useEffect(() => {
    let current = true;
    setPairs(null);
    void loadPairs(port).then((stored) => current && setPairs(stored));
    return () => {
      current = false;
    };
  }, [port]);
  return { ports, port, pairs };
}
