/** Where to look: all edges of a port, those in the brush as a list, and where they run. */

import { useMemo } from "preact/hooks";
import { numberOf } from "./address";
import type { MapDocument } from "./data";
import { type Edge, type Edges, edgeAt, edgesOf, nameOf, placeOfName, ranked } from "./edges";
import { BEHAVIOURS, Sign, figure, percent, portClass, signed } from "./marks";
import { type PageProps, usePort } from "./page";
import { Scatter } from "./scatter";
import { StreamMap } from "./stream";
import { Behind, EdgeRow } from "./table";

const MEASURES: Record<string, { of: (edges: Edges) => Float32Array; least: number; step: number }> = {
  lift: { of: (edges) => edges.lift, least: 2.5, step: 0.1 },
  score: { of: (edges) => edges.score, least: 0.12, step: 0.005 },
  share: { of: (edges) => edges.share, least: 0.05, step: 0.01 },
};
const ARCS = 300;

export function MapPage(props: PageProps) {
  const { map, address, go, width } = props;
  const { ports, port, pairs } = usePort(props);
  const edges = useMemo(() => (pairs ? edgesOf(map, pairs) : null), [pairs]);
  const measure = MEASURES[address.state.measure ?? ""] ? address.state.measure! : "lift";
  const { of, least: usual, step } = MEASURES[measure]!;
  const least = numberOf(address.state.least, usual);
  const [writer, reader] = [address.state.writer ?? "", address.state.reader ?? ""];
  const to = numberOf(address.state.to, map.layers - 1);
  const pin = address.state.pin ?? "";
  const behaviour = (head: string) => map.behaviours[head]?.label ?? null;
  const order = useMemo(() => {
    if (!edges || !pairs) return null;
    const wanted = (names: string[], label: string) => names.map((name) => !label || behaviour(name) === label);
    const [writers, readers] = [wanted(pairs.writers, writer), wanted(pairs.readers, reader)];
    const fits = Uint8Array.from(
      { length: edges.count },
      (_, i) => Number(writers[edges.writer[i]!] && readers[edges.reader[i]!] && edges.apart[i]! <= to),
    );
    return ranked(of(edges), fits);
  }, [edges, measure, writer, reader, to]);
  const inside = order?.countFrom(least) ?? 0;
  const foremost = useMemo(
    () => (edges && order ? [...order.foremost(least).subarray(0, ARCS)].map((at) => edgeAt(edges, at)) : []),
    [order, least],
  );
  const set = (key: string, value: string, replace = false) =>
    go({ state: { ...address.state, [key]: value } }, replace);
  const reset = () => go({ state: port === ports[0] ? {} : { port } });
  const open = (edge: Edge) =>
    go({ page: "pair", name: `${edge.writer}/${edge.reader}.${edge.port}`, state: {} });
  const pinAt = (at: number) => set("pin", at < 0 || !edges ? "" : nameOf(edgeAt(edges, at)));
  const chance = 1 / Math.sqrt(map.width);
  const narrow = width < 900;
  const merged = width < 640 || map.layers > 64; // a layer is one place, as its heads would not stand apart
  const columns = width >= 1240;
  const scatterWidth = columns ? Math.round(width * 0.645) : width;
  const listed = foremost.slice(0, columns ? 9 : 12);
  const largest = order?.largest ?? NaN;
  const at = edges ? placeOfName(edges, pin) : -1;
  const pinned = edges && at >= 0 ? edgeAt(edges, at) : null;
  const rows = () => {
    if (!edges || !order) return [];
    const places = Int32Array.from({ length: edges.count }, (_, i) => i).filter((i) => order.fits[i] && order.values[i]! >= least);
    return [...places.sort((a, b) => order.values[b]! - order.values[a]!)].map((i) => {
      const e = edgeAt(edges, i);
      return {
        writer: e.writer,
        reader: `${e.reader}.${e.port}`,
        shared_with: e.others.join(" "),
        score: e.score,
        expected: e.expected,
        lift: e.lift,
        share: e.share,
        first_order_nats: e.attribution,
        removed_nats: e.effect?.effect ?? null,
      };
    });
  };
  return (
    <main class="map">
      <div class={columns ? "two" : "one"}>
        <section style={{ width: scatterWidth }}>
          <h1>Which connections stand out, and which of them matter?</h1>
          <p class="lead">
            Every {port} edge between two heads of {map.model}: how strongly it composes, against what its two ends alone
            would give.
          </p>
          {edges && order ? (
            <Scatter
              edges={edges}
              ranked={order}
              measure={measure}
              least={least}
              chance={chance}
              pin={at}
              behaviour={behaviour}
              onPin={pinAt}
              onOpen={(place) => open(edgeAt(edges, place))}
              onBrush={(value) => set("least", String(value), true)}
              width={scatterWidth}
              height={narrow ? 300 : columns ? Math.min(560, Math.round(scatterWidth * 0.418)) : 400}
            />
          ) : (
            <p class="note">Reading the {port} edges …</p>
          )}
          <p class="legend">
            <i class="key disc" /> removed in a run <i class="key ring" /> first order, beyond ±.1 nats{" "}
            <i class="key dot" /> from the weights alone
            <span class="ramp" aria-hidden="true" /> loss without the edge, −3 to +3 nats
          </p>
        </section>
        <section class="list">
          <h2>
            In the brush{" "}
            <small>
              {measure} ≥ {figure(least, 2)}: {inside.toLocaleString("en")} of {(edges?.count ?? 0).toLocaleString("en")}{" "}
              edges
            </small>
            <Behind name={`edges-${port}`} rows={rows} />
          </h2>
          {inside === 0 && edges ? (
            <p class="note">
              No edge.
              {Number.isFinite(largest) && (
                <>
                  {" "}
                  The largest {measure} here is{" "}
                  <button onClick={() => set("least", String(Math.floor(largest * 20) / 20))}>{figure(largest, 2)}</button>.
                </>
              )}
            </p>
          ) : (
            <table class="edges">
              <thead>
                <tr>
                  <th>writer → reader.{port}</th>
                  <th>score</th>
                  <th>lift</th>
                  <th>share of the input</th>
                  <th>loss without it, nats</th>
                </tr>
              </thead>
              <tbody>
                {listed.map((edge) => (
                  <EdgeRow key={nameOf(edge)} pinned={nameOf(edge) === pin} onPin={() => set("pin", nameOf(edge))} onOpen={() => open(edge)}>
                    <td>
                      <Sign behaviour={behaviour(edge.writer)} /> <b>{edge.writer}</b> →{" "}
                      <Sign behaviour={behaviour(edge.reader)} /> <b>{edge.reader}</b>{" "}
                      <small>{edge.others.map((other) => other.replace(/^L\d+/, "")).join(" ")}</small>
                    </td>
                    <td>{figure(edge.score)}</td>
                    <td>{signed(edge.lift)}</td>
                    <td>{percent(edge.share)}</td>
                    <td>
                      {edge.effect ? (
                        <b>{signed(edge.effect.effect)}</b>
                      ) : Number.isNaN(edge.attribution) ? (
                        "not run"
                      ) : (
                        <span class="muted">{signed(edge.attribution)} est.</span>
                      )}
                    </td>
                  </EdgeRow>
                ))}
              </tbody>
            </table>
          )}
          {inside > listed.length && <p class="note">{(inside - listed.length).toLocaleString("en")} more in the table.</p>}
          {pinned && <Pin edge={pinned} chance={chance} behaviour={behaviour} onOpen={() => open(pinned)} map={map} />}
        </section>
      </div>
      <div class="filters" role="group" aria-label="filters">
        <span class="label">Port</span>
        {ports.map((name) => (
          <button
            key={name}
            class={`port ${portClass(name)}`}
            aria-pressed={name === port}
            onClick={() => go({ state: { ...address.state, port: name, pin: "" } })}
          >
            <i /> {name}
          </button>
        ))}
        {(["writer", "reader"] as const).map((side) => (
          <label key={side}>
            {side}{" "}
            <select value={address.state[side] ?? ""} onChange={(e) => set(side, e.currentTarget.value)}>
              <option value="">any label</option>
              {Object.entries(BEHAVIOURS).map(([key, name]) => (
                <option key={key} value={key}>
                  {name}
                </option>
              ))}
            </select>
          </label>
        ))}
        <label>
          layers apart ≤{" "}
          <input
            type="range"
            min={1}
            max={map.layers - 1}
            value={to}
            onInput={(e) => set("to", e.currentTarget.value, true)}
          />{" "}
          <output>{to}</output>
        </label>
        <label>
          measure{" "}
          <select
            value={measure}
            onChange={(e) => go({ state: { ...address.state, measure: e.currentTarget.value, least: "" } })}
          >
            {Object.keys(MEASURES)
              .filter((name) => name !== "share" || pairs?.column("share"))
              .map((name) => (
                <option key={name}>{name}</option>
              ))}
          </select>
        </label>
        <label>
          ≥{" "}
          <input
            aria-label={`least ${measure}`}
            type="range"
            min={0}
            max={Number.isFinite(largest) ? Math.ceil(largest / step) * step : 1}
            step={step}
            value={least}
            onInput={(e) => set("least", e.currentTarget.value, true)}
          />{" "}
          <output>{figure(least, 2)}</output>
        </label>
        <span class="count">
          <b>{inside.toLocaleString("en")}</b> edges · <button onClick={reset}>Reset</button>
        </span>
      </div>
      <section>
        <h2>Where they run</h2>
        <p class="lead">
          What the brush holds, on the stream
          {inside > ARCS ? `: the ${ARCS} foremost of ${inside.toLocaleString("en")}` : ""}. {merged ? "Heads of a layer hang together below it, one shape for what they do." : "Heads hang below it, one row each; an arc lands on its head."} Arc width is score above chance, under every filter.
        </p>
        <div>
          <StreamMap
            map={map}
            edges={foremost}
            chance={chance}
            pin={pin}
            behaviour={behaviour}
            onPin={(edge) => set("pin", nameOf(edge))}
            onHead={(head) => go({ page: "head", name: head })}
            width={width}
            merged={merged}
          />
        </div>
        <p class="legend">
          {Object.entries(BEHAVIOURS).map(([key, name]) => (
            <span key={key}>
              <Sign behaviour={key} /> {name}
            </span>
          ))}
          <span>
            <Sign behaviour={null} /> no label
          </span>
          {Object.keys(map.behaviours).length === 0 && (
            <span>
              Behaviour is not stored: <code>vweights map {map.model} -o ATLAS --repeated</code>
            </span>
          )}
        </p>
      </section>
    </main>
  );
}

function Pin({
  edge,
  chance,
  behaviour,
  onOpen,
  map,
}: {
  edge: Edge;
  chance: number;
  behaviour: (head: string) => string | null;
  onOpen: () => void;
  map: MapDocument;
}) {
  return (
    <div class="pinned" role="status">
      <p>
        <Sign behaviour={behaviour(edge.writer)} /> <b>{edge.writer}</b> → <Sign behaviour={behaviour(edge.reader)} />{" "}
        <b>
          {edge.reader}.<span class={portClass(edge.port)}>{edge.port}</span>
        </b>{" "}
        pinned
        <button class="open" onClick={onOpen}>
          Open the pair
        </button>
      </p>
      <dl>
        <div>
          <dt>potential</dt>
          <dd>
            <b>{figure(edge.score / chance, 1)} ×</b> chance
          </dd>
        </div>
        <div>
          <dt>actual</dt>
          <dd>{Number.isNaN(edge.share) ? "not run" : <><b>{percent(edge.share)}</b> of its {edge.port} input</>}</dd>
        </div>
        <div>
          <dt>causal</dt>
          <dd>
            {edge.effect ? (
              <>
                <b>{signed(edge.effect.effect)}</b> nats, {figure(edge.effect.low, 2)} to {figure(edge.effect.high, 2)}
              </>
            ) : (
              <code>
                vweights ablate {map.model} {edge.writer} {edge.reader}.{edge.port}
              </code>
            )}
          </dd>
        </div>
      </dl>
    </div>
  );
}
