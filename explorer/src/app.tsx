/** The explorer of an atlas: pages under one bar, each with an address that restores it. */

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { useAddress } from "./address";
import { type MapDocument, loadMap } from "./data";
import { EffectsPage } from "./effects";
import { HeadPage } from "./head";
import { LayersPage } from "./layers";
import { MapPage } from "./map";
import type { PageProps } from "./page";
import { PairPage } from "./pair";
import { StatementsPage } from "./statements";

function App() {
  const [map, setMap] = useState<MapDocument | null>(null);
  const [failure, setFailure] = useState("");
  const [address, go] = useAddress();
  const [width, setWidth] = useState(innerWidth);
  const [theme, setTheme] = useState(() => read("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  const search = useRef<HTMLInputElement>(null);
  useEffect(() => {
    loadMap().then(setMap, (error: unknown) => setFailure(String(error)));
    const sized = () => setWidth(innerWidth);
    addEventListener("resize", sized);
    return () => removeEventListener("resize", sized);
  }, []);
  document.documentElement.dataset.theme = theme;
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
      if (event.key === "/" && !typing) {
        search.current?.focus();
        event.preventDefault();
      } else if (event.key === "Escape") {
        if (typing) (event.target as HTMLElement).blur();
        else if (address.state.pin) go({ state: { ...address.state, pin: "" } });
        else if (address.page !== "map") history.back();
      }
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  });
  if (failure) return <p class="failure">The atlas cannot be read: {failure}</p>;
  if (!map) return <p class="failure">Reading the atlas …</p>;
  const props: PageProps = { map, address, go, width: Math.min(2200, width) - (width < 700 ? 32 : 48), theme };
  const find = (text: string) => {
    const [writer, reader] = text.toUpperCase().split(/\s*(?:>|→|->)\s*/);
    const head = map.parts.find((part) => part.kind === "head" && part.label === (reader ?? writer)!.split(".")[0]);
    if (head && reader) go({ page: "pair", name: `${writer}/${head.label}.${reader.split(".")[1] ?? "K"}`, state: {} });
    else if (head) go({ page: "head", name: head.label, state: {} });
    return !!head;
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
          {(["map", "layers", "effects", "statements"] as const).map((page) => (
            <a
              key={page}
              href={`#/${page}`}
              aria-current={address.page === page || (page === "map" && ["head", "pair"].includes(address.page)) ? "page" : undefined}
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
            input.setCustomValidity(find(input.value) ? "" : "no such head in this model");
            input.reportValidity();
          }}
        >
          <input
            ref={search}
            list="heads"
            placeholder="Head or edge, L16H0 > L18H6.K"
            aria-label="search a head or an edge"
            onInput={(event) => event.currentTarget.setCustomValidity("")}
          />
          <datalist id="heads">
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
      <div id="content" key={theme}>
        {address.page === "head" ? (
          <HeadPage {...props} />
        ) : address.page === "map" ? (
          <MapPage {...props} />
        ) : address.page === "layers" ? (
          <LayersPage {...props} />
        ) : address.page === "effects" ? (
          <EffectsPage {...props} />
        ) : address.page === "pair" ? (
          <PairPage {...props} />
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
      <footer>
        {map.norm}. {map.run ? `Run on ${map.run.text}, ${map.run.tokens.toLocaleString("en")} tokens.` : "From the weights alone; no run is stored."}{" "}
        virtual-weights {map.version}
      </footer>
    </>
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
