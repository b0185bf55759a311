/** The explorer of an atlas: pages under one bar, each with an address that restores it. */

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { format, unknown, useAddress } from "./address";
import { ComparePage } from "./compare";
import { type MapDocument, loadMap } from "./data";
import { EffectsPage } from "./effects";
import { HeadPage } from "./head";
import { LayersPage } from "./layers";
import { BEHAVIOURS, Command } from "./marks";
import { MapPage } from "./map";
import { type PageProps, portsOfHeads } from "./page";
import { PairPage } from "./pair";
import { StatementsPage } from "./statements";
import { StructurePage } from "./structure";
import { VectorPage } from "./vector";

const KEYS = [
  ["/", "search a part, an edge or a behaviour"],
  ["Tab", "the next control; a chart is one stop"],
  ["arrows", "the next point, cell or token of a chart"],
  ["Enter", "open what is pinned or chosen"],
  ["p", "pin the edge of this page on the map"],
  ["[ ]", "another text"],
  ["t", "the first table of the page"],
  ["Esc", "back: table, search, pin, page"],
  ["?", "these keys"],
];

function App() {
  const [map, setMap] = useState<MapDocument | null>(null);
  const [failure, setFailure] = useState("");
  const [address, go] = useAddress();
  const [width, setWidth] = useState(innerWidth);
  const [theme, setTheme] = useState(() => read("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  const search = useRef<HTMLInputElement>(null);
  useEffect(() => {
    loadMap().then(setMap, (error: unknown) => setFailure(String(error)));
    const rejected = (event: PromiseRejectionEvent) => {
      setFailure(String(event.reason)); // what a page waits for did not come
      event.preventDefault();
    };
    addEventListener("unhandledrejection", rejected);
    const sized = () => setWidth(innerWidth);
    addEventListener("resize", sized);
    return () => {
      removeEventListener("resize", sized);
      removeEventListener("unhandledrejection", rejected);
    };
  }, []);
  useEffect(() => void (map && setFailure("")), [address.page, address.name]);
  document.documentElement.dataset.theme = theme;
  const [keys, setKeys] = useState(false);
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
      if (event.key === "Escape") {
        const sheet = document.querySelector<HTMLElement>(".sheet button");
        if (keys) setKeys(false);
        else if (sheet) sheet.click();
        else if (typing) (event.target as HTMLElement).blur();
        else if (address.state.pin) go({ state: { ...address.state, pin: "" } });
        else if (address.page !== "map") history.back();
      } else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
      else if (event.key === "/") {
        search.current?.focus();
        event.preventDefault();
      } else if (event.key === "?") setKeys(!keys);
      else if (event.key === "t") document.querySelector<HTMLElement>("main .behind button")?.click();
      else if (event.key === "p" && address.page === "pair") {
        const [writer, target] = address.name.split("/");
        go({ page: "map", name: "", state: { port: target?.split(".")[1] ?? "", pin: `${writer}>${target}` } });
      }
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  });
  if (!map && failure) return <p class="failure">The atlas cannot be read. {failure}</p>;
  if (!map) return <p class="waiting">Reading the atlas …</p>;
  const props: PageProps = { map, address, go, width: Math.max(280, Math.min(2200, width) - (width < 700 ? 32 : 48)), theme };
  const find = (text: string): boolean => {
    const behaviour = Object.entries(BEHAVIOURS).find(([key, name]) => [key, name].includes(text.trim().toLowerCase()));
    if (behaviour) {
      go({ page: "map", name: "", state: { reader: behaviour[0], least: "0" } });
      return true;
    }
    const [writer = "", reader] = text.trim().split(/\s*(?:>|→|->)\s*/);
    const partOf = (name: string) => map.parts.find((part) => part.label.toLowerCase() === name.toLowerCase());
    const [, name = "", port = "K"] = /^(.*?)(?:\.([QKV]))?$/i.exec(reader ?? writer) ?? [];
    const [from, part] = [partOf(writer), partOf(name)];
    if (reader && from && part?.kind === "head") go({ page: "pair", name: `${from.label}/${part.label}.${port.toUpperCase()}`, state: {} });
    else if (part) go({ page: "head", name: part.label, state: {} });
    else return false;
    return true;
  };
  return (
    <>
      <a class="skip" href="#content">
        To the content
      </a>
      <header>
        <a class="name" href="#/map">
          <b>{map.model}</b> virtual weights
        </a>
        <nav aria-label="pages">
          {["map", "layers", "effects", "structure", "statements", ...(map.against ? ["compare"] : [])].map((page) => (
            <a
              key={page}
              href={`#/${page}`}
              aria-current={address.page === page || (page === "map" && ["head", "pair"].includes(address.page)) || (page === "structure" && address.page === "vector") ? "page" : undefined}
            >
              {page[0]!.toUpperCase() + page.slice(1)}
            </a>
          ))}
        </nav>
        <form
          role="search"
          onSubmit={(event) => {
            event.preventDefault();
            const input = search.current!;
            input.setCustomValidity(find(input.value) ? "" : "no such part or label in this model");
            input.reportValidity();
          }}
        >
          <input
            ref={search}
            list="heads"
            placeholder="Head, edge or behaviour"
            aria-label="search a part, an edge or a behaviour, such as L18H6, L16H0 > L18H6.K or induction"
            onInput={(event) => event.currentTarget.setCustomValidity("")}
          />
          <datalist id="heads">
            {Object.values(BEHAVIOURS).map((name) => (
              <option key={name} value={name} />
            ))}
            {map.parts
              .filter((part) => part.kind === "head")
              .map((part) => (
                <option key={part.label} value={part.label}>
                  {map.behaviours[part.label]?.label ?? ""}
                </option>
              ))}
          </datalist>
          <kbd>/</kbd>
        </form>
        <button
          class="theme"
          onClick={() => {
            const next = theme === "dark" ? "light" : "dark";
            write("theme", next);
            setTheme(next);
          }}
        >
          {theme === "dark" ? "Light" : "Dark"}
        </button>
      </header>
      {failure && (
        <p class="failure" role="alert">
          Part of this page cannot be read. {failure}
        </p>
      )}
      <div id="content" key={theme}>
        {address.page === "head" ? (
          <HeadPage {...props} />
        ) : ["map", "layers"].includes(address.page) && !portsOfHeads(map).length ? (
          <NoEdges map={map} />
        ) : address.page === "map" ? (
          <MapPage {...props} />
        ) : address.page === "layers" ? (
          <LayersPage {...props} />
        ) : address.page === "effects" ? (
          <EffectsPage {...props} />
        ) : address.page === "pair" ? (
          <PairPage {...props} />
        ) : address.page === "structure" ? (
          <StructurePage {...props} />
        ) : address.page === "vector" ? (
          <VectorPage {...props} />
        ) : address.page === "compare" ? (
          <ComparePage {...props} />
        ) : address.page === "statements" ? (
          <StatementsPage map={map} />
        ) : (
          <main>
            <h1>No page “{address.page}”</h1>
            <p>
              <a href="#/map">To the map</a>
            </p>
          </main>
        )}
      </div>
      {keys && (
        <div class="keys" role="dialog" aria-label="keys">
          <h2>Keys</h2>
          <table>
            <tbody>
              {KEYS.map(([key, does]) => (
                <tr key={key}>
                  <td>
                    <kbd>{key}</kbd>
                  </td>
                  <td>{does}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      <footer>
        {unknown(address).length > 0 && <p>This page has no {unknown(address).join(", ")}; that part of the address is ignored.</p>}
        <p class="print-only">{format(address)}</p>
        {map.norm}. {map.run ? `Run on ${map.run.text}, ${map.run.tokens.toLocaleString("en")} tokens.` : "From the weights alone; no run is stored."}{" "}
        virtual-weights {map.version}
      </footer>
    </>
  );
}

/** In place of pages of edges between heads, where the atlas has none. */
function NoEdges({ map }: { map: MapDocument }) {
  return (
    <main>
      <h1>No edges between heads</h1>
      <p class="note">
        {map.parts.some((part) => part.kind === "head") ? (
          <>
            They are not stored: <Command text={`vweights map ${map.model} -o ATLAS`} />
          </>
        ) : (
          `${map.model} has no attention heads.`
        )}
      </p>
    </main>
  );
}

function read(name: string): string | null {
  try {
    return localStorage.getItem(`virtual-weights-${name}`);
  } catch {
    return null;
  }
}

function write(name: string, value: string) {
  try {
    localStorage.setItem(`virtual-weights-${name}`, value);
  } catch {
    // a page of a file may have no storage
  }
}

render(<App />, document.getElementById("page")!);
