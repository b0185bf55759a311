/** Two atlases: every edge between heads that both have, its score in one against its score in the other. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { numberOf } from "./address";
import type { MapDocument, Pairs } from "./data";
import { isHead } from "./edges";
import { Sign, css, emptied, figure, portClass, ramp, signed } from "./marks";
import { type PageProps, usePairs, usePort } from "./page";
import { Axes, Tip, decades, framed, significant } from "./structure-axes";
import { Behind, EdgeRow } from "./table";

interface Common {
  writer: string;
  reader: string;
  here: number;
  there: number;
  /** log2 of the ratio of scores, or the difference of lifts: there less here. */
  change: number;
}

const nameOf = (edge: Common) => `${edge.writer}>${edge.reader}`;

/** Edges between heads that both atlases have, one for each map that heads share, by the size of the difference. */
function commonOf(pairs: Pairs, against: Pairs, measure: "score" | "lift", least: number): Common[] {
  const { readers, writers, groups } = pairs;
  const score = [pairs.column("score"), against.column("score")];
  const value = [pairs.column(measure), against.column(measure)];
  if (!score[0] || !score[1] || !value[0] || !value[1]) return [];
  const edges: Common[] = [];
  const heads = readers.map(isHead);
  for (let w = 0; w < writers.length; w++) {
    if (!isHead(writers[w]!)) continue;
    const best = new Map<string, Common>();
    for (let r = 0; r < readers.length; r++) {
      const i = r * writers.length + w;
      const [here, there] = [value[0][i]!, value[1][i]!];
      if (!heads[r] || !(Math.max(score[0][i]!, score[1][i]!) >= least) || !Number.isFinite(here) || !Number.isFinite(there)) continue;
      if (measure === "score" && !(here > 0 && there > 0)) continue;
      const change = measure === "score" ? Math.log2(there / here) : there - here;
      const key = groups[r] || readers[r]!;
      const same = best.get(key);
      if (!same || Math.abs(same.change) < Math.abs(change)) best.set(key, { writer: writers[w]!, reader: readers[r]!, here, there, change });
    }
    edges.push(...best.values());
  }
  return edges.sort((a, b) => Math.abs(b.change) - Math.abs(a.change));
}

/** Pearson's correlation; NaN of fewer than three. */
function correlation(x: number[], y: number[]): number {
  const mean = (values: number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  const [mx, my] = [mean(x), mean(y)];
  let [xx, yy, xy] = [0, 0, 0];
  x.forEach((value, i) => {
    xx += (value - mx) ** 2;
    yy += (y[i]! - my) ** 2;
    xy += (value - mx) * (y[i]! - my);
  });
  return x.length < 3 ? NaN : xy / Math.sqrt(xx * yy);
}

export function ComparePage(props: PageProps) {
  const { map, address, go, width, theme } = props;
  if (!map.against) {
    return (
      <main class="compare">
        <h1>Two atlases, edge by edge</h1>
        <p class="note">
          No other atlas is compared: <code>vweights report ATLAS --against OTHER</code>
        </p>
      </main>
    );
  }
  const model = map.against.model === map.model ? `the other atlas of ${map.model}` : map.against.model;
  return <Compared key={theme} {...{ map, address, go, width, theme }} other={{ ...map.against, model }} />;
}

function Compared(props: PageProps & { other: NonNullable<MapDocument["against"]> }) {
  const { map, address, go, width, other } = props;
  const { port, pairs } = usePort(props);
  const ports = ["K", "Q", "V"].filter((name) => other.ports.includes(name));
  const against = usePairs(other.ports.includes(port) ? port : undefined, ["score", "lift"], "against");
  const measure = address.state.measure === "lift" ? "lift" : "score";
  const chance = 1 / Math.sqrt(map.width);
  const least = numberOf(address.state.least, 1);
  const edges = useMemo(
    () => (pairs && against ? commonOf(pairs, against, measure, least * chance) : []),
    [pairs, against, measure, least],
  );
  const scale = measure === "score" ? Math.log2 : (value: number) => value;
  const alike = useMemo(() => correlation(edges.map((e) => scale(e.here)), edges.map((e) => scale(e.there))), [edges]);
  const pin = address.state.pin ?? "";
  const pinned = edges.find((edge) => nameOf(edge) === pin) ?? null;
  const set = (key: string, value: string, replace = false) => go({ state: { ...address.state, [key]: value } }, replace);
  const open = (edge: Common) => go({ page: "pair", name: `${edge.writer}/${edge.reader}.${port}`, state: {} });
  const wide = width >= 1160;
  const plot = wide ? Math.min(Math.round(width * 0.55), 900) : width;
  const behaviour = (head: string) => map.behaviours[head]?.label ?? null;
  const rows = () =>
    edges.map((edge) => ({
      writer: edge.writer,
      reader: `${edge.reader}.${port}`,
      [`${measure}_here`]: edge.here,
      [`${measure}_there`]: edge.there,
      [measure === "score" ? "log2_ratio" : "difference"]: edge.change,
    }));
  const median = edges.length ? Math.abs(edges[edges.length >> 1]!.change) : NaN;
  return (
    <main class="compare">
      <h1>
        What differs from {other.model}?
      </h1>
      <p class="lead">
        Every {port} edge between two heads that both have, of heads that share a map the one that differs most: its {measure} in {map.model} across, in {other.model} up.
      </p>
      {Object.entries(other.conventions).map(([name, [here, there]]) => (
        <p key={name} class="warn">
          The two were computed under different conventions: {name.replaceAll("_", " ")} “{String(here ?? "none")}” here, “
          {String(there ?? "none")}” there.
        </p>
      ))}
      <div class="filters" role="group" aria-label="filters">
        <span class="label">Port</span>
        {ports.map((name) => (
          <button key={name} class={`port ${portClass(name)}`} aria-pressed={name === port} onClick={() => go({ state: { ...address.state, port: name, pin: "" } })}>
            <i /> {name}
          </button>
        ))}
        <label>
          measure{" "}
          <select value={measure} onChange={(event) => go({ state: { ...address.state, measure: event.currentTarget.value === "score" ? "" : "lift", pin: "" } })}>
            <option>score</option>
            <option>lift</option>
          </select>
        </label>
        <label>
          score in either at least{" "}
          <input type="range" min={0} max={4} step={0.1} value={least} onInput={(event) => set("least", event.currentTarget.value === "1" ? "" : event.currentTarget.value, true)} />{" "}
          <output>{figure(least, 1)} × chance</output>
        </label>
        <span class="count">
          <b>{edges.length.toLocaleString("en")}</b> edges
        </span>
      </div>
      <div class={wide ? "two" : "one"}>
        <section style={{ width: plot }}>
          {!pairs || !against ? (
            <p class="note">{other.ports.includes(port) ? "Reading …" : `${other.model} has no ${port} edges stored.`}</p>
          ) : edges.length ? (
            <Plot {...props} other={other.model} edges={edges} pinned={pinned} port={port} measure={measure} chance={chance} width={plot} onPin={(edge) => set("pin", edge ? nameOf(edge) : "")} onOpen={open} />
          ) : (
            <p class="note">No edge that both have reaches that score.</p>
          )}
          <p class="legend">
            solid: the same in both; dotted: {measure === "score" ? "half and twice the score" : "one more and one less"}
            <span class="ramp" aria-hidden="true" /> {measure === "score" ? "half to twice" : "−2 to +2"}
          </p>
        </section>
        <section class="list">
          <h2>
            The largest differences{" "}
            <small>
              {measure === "score" ? "log₂ of the ratio" : "difference of lift"}; median size {figure(median, 2)}, correlation {figure(alike)}
            </small>{" "}
            <Behind name={`against-${port}`} rows={rows} />
          </h2>
          <table class="edges">
            <thead>
              <tr>
                <th>writer → reader.{port}</th>
                <th>here</th>
                <th>there</th>
                <th>change</th>
              </tr>
            </thead>
            <tbody>
              {edges.slice(0, 12).map((edge) => (
                <EdgeRow key={nameOf(edge)} pinned={nameOf(edge) === pin} onPin={() => set("pin", nameOf(edge))} onOpen={() => open(edge)}>
                  <td>
                    <Sign behaviour={behaviour(edge.writer)} /> <b>{edge.writer}</b> → <Sign behaviour={behaviour(edge.reader)} /> <b>{edge.reader}</b>
                  </td>
                  <td>{measure === "score" ? figure(edge.here) : signed(edge.here)}</td>
                  <td>{measure === "score" ? figure(edge.there) : signed(edge.there)}</td>
                  <td>
                    <b>{signed(edge.change)}</b>
                  </td>
                </EdgeRow>
              ))}
            </tbody>
          </table>
          {edges.length > 12 && <p class="note">{(edges.length - 12).toLocaleString("en")} more in the table.</p>}
          {pinned && (
            <div class="pinned" role="status">
              <p>
                <button class="open" onClick={() => open(pinned)}>
                  Open the pair
                </button>
                <b>
                  {pinned.writer} → {pinned.reader}.<span class={portClass(port)}>{port}</span>
                </b>{" "}
                {measure} {measure === "score" ? figure(pinned.here) : signed(pinned.here)} in {map.model},{" "}
                {measure === "score" ? figure(pinned.there) : signed(pinned.there)} in {other.model}
              </p>
            </div>
          )}
          <Ends edges={edges} map={map} go={go} />
          <Only title={`Only in ${map.model}`} only={other.only_here} />
          <Only title={`Only in ${other.model}`} only={other.only_there} />
        </section>
      </div>
    </main>
  );
}

/** Heads whose edges changed most on average, as writers and as readers. */
function Ends({ edges, map, go }: { edges: Common[]; map: MapDocument; go: PageProps["go"] }) {
  const sums = (side: "writer" | "reader") => {
    const heads = new Map<string, { sum: number; n: number }>();
    for (const edge of edges) {
      const one = heads.get(edge[side]) ?? { sum: 0, n: 0 };
      one.sum += edge.change;
      one.n++;
      heads.set(edge[side], one);
    }
    return [...heads]
      .filter(([, one]) => one.n > 2)
      .map(([head, one]) => ({ head, mean: one.sum / one.n, n: one.n }))
      .sort((a, b) => Math.abs(b.mean) - Math.abs(a.mean));
  };
  if (!edges.length) return null;
  return (
    <>
      <h3>
        Heads whose edges changed most <small>mean change over their edges here</small>{" "}
        <Behind
          name="against-heads"
          rows={() => (["writer", "reader"] as const).flatMap((side) => sums(side).map((one) => ({ side, head: one.head, mean_change: one.mean, edges: one.n })))}
        />
      </h3>
      {(["writer", "reader"] as const).map((side) => (
        <p key={side} class="ends">
          <span class="muted">as {side}s</span>{" "}
          {sums(side)
            .slice(0, 5)
            .map((one) => (
              <button key={one.head} onClick={() => go({ page: "head", name: one.head, state: {} })}>
                <Sign behaviour={map.behaviours[one.head]?.label} /> {one.head} {signed(one.mean)}
              </button>
            ))}
        </p>
      ))}
    </>
  );
}

function Only({ title, only }: { title: string; only: { names: string[]; of: number } }) {
  if (!only.of) return null;
  return (
    <details class="only">
      <summary>
        {title}: {only.of.toLocaleString("en")} {only.of === 1 ? "part" : "parts"}
      </summary>
      <p class="note">
        {only.names.join(" ")}
        {only.of > only.names.length ? ` and ${(only.of - only.names.length).toLocaleString("en")} more` : ""}
      </p>
    </details>
  );
}

interface PlotProps extends PageProps {
  other: string;
  edges: Common[];
  pinned: Common | null;
  port: string;
  measure: "score" | "lift";
  chance: number;
  onPin: (edge: Common | null) => void;
  onOpen: (edge: Common) => void;
}

function Plot({ map, other, edges, pinned, port, measure, chance, width, onPin, onOpen, theme }: PlotProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [hover, setHover] = useState<Common | null>(null);
  const frame = framed(width, Math.max(340, Math.min(620, Math.round(width * 0.72))), 48, 26);
  const scales = useMemo(() => {
    let [low, high] = [Infinity, -Infinity];
    for (const { here, there } of edges) {
      low = Math.min(low, here, there);
      high = Math.max(high, here, there);
    }
    const by = measure === "score" ? Math.log : (value: number) => value;
    const [from, to] = measure === "score" ? [by(low / 1.06), by(high * 1.08)] : [low - 0.2, high + 0.2];
    const share = (value: number) => (by(value) - from) / (to - from);
    const ticks = measure === "score" ? decades(low / 1.06, high * 1.08) : [-4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6].filter((t) => t >= from && t <= to);
    return { share, ticks, low: measure === "score" ? low / 1.06 : from, high: measure === "score" ? high * 1.08 : to };
  }, [edges, measure]);
  const x = (value: number) => frame.left + (frame.right - frame.left) * scales.share(value);
  const y = (value: number) => frame.bottom - (frame.bottom - frame.top) * scales.share(value);
  const end = measure === "score" ? 1 : 2;
  useEffect(() => {
    const pen = emptied(canvas.current, width, frame.height);
    if (!pen) return;
    const shade = ramp();
    const ink = css("point");
    for (let i = edges.length - 1; i >= 0; i--) {
      const edge = edges[i]!;
      const far = Math.abs(edge.change) > end / 2;
      pen.globalAlpha = far ? 0.9 : 0.3;
      pen.fillStyle = far ? shade(edge.change / end) : ink;
      const size = far ? 3 : 2;
      pen.fillRect(x(edge.here) - size / 2, y(edge.there) - size / 2, size, size);
    }
  }, [edges, width, theme]);
  const nearest = (event: { clientX: number; clientY: number; currentTarget: Element }): Common | null => {
    const box = event.currentTarget.getBoundingClientRect();
    let [best, distance]: [Common | null, number] = [null, 200];
    for (const edge of edges) {
      const d = (x(edge.here) - event.clientX + box.left) ** 2 + (y(edge.there) - event.clientY + box.top) ** 2;
      if (d < distance) [best, distance] = [edge, d];
    }
    return best;
  };
  const keyed = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      const at = pinned ? edges.indexOf(pinned) : step > 0 ? -1 : edges.length;
      onPin(edges[Math.max(0, Math.min(edges.length - 1, at + step))] ?? null);
      event.preventDefault();
    } else if (event.key === "Enter" && pinned) onOpen(pinned);
  };
  const { low, high } = scales;
  const shifted = (by: number): string => {
    const moved = (value: number) => (measure === "score" ? value * 2 ** by : value + by);
    return `M${x(low)},${y(moved(low))}L${x(high)},${y(moved(high))}`;
  };
  const named: Common[] = [];
  for (const edge of edges.slice(0, 40)) {
    if (named.length < (width < 600 ? 2 : 6) && named.every((one) => Math.abs(x(one.here) - x(edge.here)) > 110 || Math.abs(y(one.there) - y(edge.there)) > 14)) named.push(edge);
  }
  const say = (edge: Common) => `${edge.writer} → ${edge.reader}.${port}`;
  const value = (one: number) => (measure === "score" ? figure(one) : signed(one));
  const text = (one: number) => (measure === "score" ? significant(one) : one === 0 ? "0" : signed(one, 0));
  return (
    <div class="plot" style={{ width, height: frame.height }}>
      <svg width={width} height={frame.height} aria-hidden="true">
        <clipPath id="compared">
          <rect x={frame.left} y={frame.top} width={frame.right - frame.left} height={frame.bottom - frame.top} />
        </clipPath>
        <Axes
          frame={frame}
          x={x}
          y={y}
          xTicks={scales.ticks.map((t) => [t, text(t)])}
          yTicks={scales.ticks.map((t) => [t, text(t)])}
          xTitle={`${measure} in ${map.model}${measure === "score" ? " (log)" : ""}`}
          yTitle={`${measure} in ${other}${measure === "score" ? " (log)" : ""}`}
          upright
        />
        <g clip-path="url(#compared)">
          <path class="as-expected" d={shifted(0)} />
          {[-1, 1].map((by) => (
            <path key={by} class="lift-line" d={shifted(by)} />
          ))}
        </g>
        {measure === "score" && width > 600 && chance > low && chance < high && (
          <text class="line-label" x={x(chance) + 4} y={frame.bottom - 6}>
            chance {figure(chance)}
          </text>
        )}
      </svg>
      <canvas
        ref={canvas}
        style={{ width, height: frame.height }}
        tabIndex={0}
        role="img"
        aria-label={`${edges.length} ${port} edges, ${measure} in ${map.model} against ${other}. Arrows go through them by difference, Enter opens.`}
        onPointerMove={(event) => setHover(nearest(event))}
        onPointerLeave={() => setHover(null)}
        onClick={(event) => onPin(nearest(event))}
        onDblClick={(event) => {
          const edge = nearest(event);
          if (edge) onOpen(edge);
        }}
        onKeyDown={keyed}
      />
      <svg class="over" width={width} height={frame.height} aria-hidden="true">
        {named.map((edge) => {
          const late = x(edge.here) > frame.right - 120;
          return (
            <text key={nameOf(edge)} class="part" x={x(edge.here) + (late ? -7 : 7)} y={y(edge.there) + 4} text-anchor={late ? "end" : "start"}>
              {say(edge)} {signed(edge.change)}
            </text>
          );
        })}
        {pinned && <circle class="pin" cx={x(pinned.here)} cy={y(pinned.there)} r={8} />}
        {hover && <circle class="hover" cx={x(hover.here)} cy={y(hover.there)} r={7} />}
      </svg>
      {hover && (
        <Tip x={x(hover.here)} y={y(hover.there)} width={width}>
          <b>{say(hover)}</b>
          <br />
          {value(hover.here)} here, {value(hover.there)} there: {signed(hover.change)}
        </Tip>
      )}
    </div>
  );
}
