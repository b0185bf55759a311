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

export const portsOfHeads = (map: MapDocument) => ["K", "Q", "V"].filter((port) => map.ports.includes(port));

/** The ports of heads in this atlas, of which it must have one, the one that the address names or the first, and its pairs, null until they are read. */
export function usePort({ map, address }: PageProps): { ports: string[]; port: string; pairs: Pairs | null } {
  const ports = portsOfHeads(map);
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
