/** What every page is given, and the pairs of the port that its address names. */

import { useEffect, useState } from "preact/hooks";
import type { Address } from "./address";
import { type MapDocument, type Pairs, load, loadPairs } from "./data";

export interface PageProps {
  map: MapDocument;
  address: Address;
  go: (change: Partial<Address>, replace?: boolean) => void;
  width: number;
  theme: string;
}

export const portsOfHeads = (map: MapDocument) => ["K", "Q", "V"].filter((port) => map.ports.includes(port));

/** What is read under a key, null until it is there and where there is no key; what comes late for another key is let go. */
function useRead<T>(key: string | undefined, read: () => Promise<T>): T | null {
  const [stored, setStored] = useState<{ key: string; content: T } | null>(null);
  useEffect(() => {
    let current = true;
    if (key !== undefined) void read().then((content) => current && setStored({ key, content }));
    return () => {
      current = false;
    };
  }, [key]);
  return stored && stored.key === key ? stored.content : null;
}

export const useDocument = <T>(name: string | undefined) => useRead(name, () => load<T>(name!));

/** All pairs of a port with some columns, of this atlas or of the one that it is compared with. */
export const usePairs = (port: string | undefined, ...how: [names?: string[], of?: "pairs" | "against"]): Pairs | null =>
  useRead(port, () => loadPairs(port!, ...how));

/** The ports of heads in this atlas, of which it must have one, the one that the address names or the first, and its pairs, null until they are read. */
export function usePort({ map, address }: PageProps): { ports: string[]; port: string; pairs: Pairs | null } {
  const ports = portsOfHeads(map);
  const port = ports.includes(address.state.port ?? "") ? address.state.port! : ports[0]!;
  return { ports, port, pairs: usePairs(port) };
}
