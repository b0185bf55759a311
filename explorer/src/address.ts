/** The address of a page holds its whole state: `#/map?port=K&least=2.5&pin=L16H0>L18H6.K`. */

import { useEffect, useState } from "preact/hooks";

export interface Address {
  page: string;
  name: string;
  state: Record<string, string>;
}

const ORDER = ["port", "measure", "least", "to", "writer", "reader", "sel", "text", "token", "pin", "lens"];
/** The keys that each page knows; others are ignored, and named. */
const KNOWN: Record<string, string[]> = {
  map: ["port", "measure", "least", "to", "writer", "reader", "pin"],
  pair: ["row"],
  layers: ["port", "lens"],
  effects: ["sel", "text", "token"],
  structure: ["kind", "space"],
  compare: ["port", "measure", "least", "pin"],
};

export const unknown = ({ page, state }: Address) => Object.keys(state).filter((key) => !KNOWN[page]?.includes(key));

/** A number of an address, or the usual one where it says none. */
export const numberOf = (text: string | undefined, usual: number) =>
  text !== undefined && text !== "" && Number.isFinite(Number(text)) ? Number(text) : usual;

const SETTLED = 200; // milliseconds after which a slider's place is written into the address

/** What was escaped, or the same where the escape is none. */
function unescaped(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export function parse(hash: string): Address {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(unescaped);
  const state: Record<string, string> = {};
  for (const part of query.split("&")) {
    const at = part.indexOf("=");
    if (at > 0) state[unescaped(part.slice(0, at))] = unescaped(part.slice(at + 1));
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

let current = parse(location.hash);
let waiting = 0;

/** The address, and how to change it: pages and pins make history; sliding replaces it, once it has come to rest. */
export function useAddress(): [Address, (change: Partial<Address>, replace?: boolean) => void] {
  const [address, setAddress] = useState(current);
  useEffect(() => {
    const changed = () => {
      clearTimeout(waiting); // what a slider would still write belongs to the page that was left
      setAddress((current = parse(location.hash)));
    };
    addEventListener("hashchange", changed);
    addEventListener("popstate", changed);
    return () => {
      removeEventListener("hashchange", changed);
      removeEventListener("popstate", changed);
    };
  }, []);
  const go = (change: Partial<Address>, replace = false) => {
    const next = { ...current, ...change, state: change.state ?? (change.page ? {} : current.state) };
    clearTimeout(waiting);
    if (replace) waiting = setTimeout(() => history.replaceState(null, "", format(next)), SETTLED);
    else {
      history.replaceState(null, "", format(current));
      if (format(next) !== location.hash) history.pushState(null, "", format(next));
      if (next.page !== current.page || next.name !== current.name) scrollTo(0, 0);
    }
    setAddress((current = next));
  };
  return [address, go];
}
