/** The address of a page holds its whole state: `#/map?port=K&lift=2.5&pin=L16H0>L18H6.K`. */

import { useEffect, useState } from "preact/hooks";

export interface Address {
  page: string;
  name: string;
  state: Record<string, string>;
}

const ORDER = ["port", "measure", "least", "from", "to", "writer", "reader", "sel", "pin", "lens"];

export function parse(hash: string): Address {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(decodeURIComponent);
  const state: Record<string, string> = {};
  for (const part of query.split("&")) {
    const at = part.indexOf("=");
    if (at > 0) state[decodeURIComponent(part.slice(0, at))] = decodeURIComponent(part.slice(at + 1));
  }
  return { page: page || "map", name: rest.join("/"), state };
}

/** Readable: only what would break an address is escaped. */
const escaped = (text: string) => text.replace(/[%&=#?\s]/g, encodeURIComponent);

export function format({ page, name, state }: Address): string {
  const keys = Object.keys(state)
    .filter((key) => state[key] !== "" && state[key] !== undefined)
    .sort((a, b) => (ORDER.indexOf(a) + 99) % 99 - ((ORDER.indexOf(b) + 99) % 99) || a.localeCompare(b));
  const query = keys.map((key) => `${key}=${escaped(state[key]!)}`).join("&");
  return `#/${page}${name ? `/${name.split("/").map(escaped).join("/")}` : ""}${query ? `?${query}` : ""}`;
}

/** The address, and how to change it: pages and pins make history, sliding replaces it. */
export function useAddress(): [Address, (change: Partial<Address>, replace?: boolean) => void] {
  const [address, setAddress] = useState(() => parse(location.hash));
  useEffect(() => {
    const changed = () => setAddress(parse(location.hash));
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  const go = (change: Partial<Address>, replace = false) => {
    const current = parse(location.hash);
    const next = { ...current, ...change, state: change.state ?? (change.page ? {} : current.state) };
    const hash = format(next);
    if (replace) history.replaceState(null, "", hash);
    else if (hash !== location.hash) history.pushState(null, "", hash);
    setAddress(next);
  };
  return [address, go];
}
