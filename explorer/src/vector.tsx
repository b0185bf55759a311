/** A direction that somebody attached: who writes along it before its state, and who reads it from there on. */

import { useMemo } from "preact/hooks";
import { format } from "./address";
import type { MapDocument } from "./data";
import { Sign, figure, portClass, signed } from "./marks";
import { type PageProps, useDocument } from "./page";
import { columns } from "./structure";
import { Tip, significant, useSteps } from "./structure-axes";
import { Behind } from "./table";
import type { VectorDocument, VectorSide } from "./vector-document";

interface Bar {
  label: string;
  /** The component alone, without port. */
  part: string;
  port: string;
  kind: string;
  layer: number;
  index: number;
  score: number;
  /** Along the direction or against it; 0 of circuits, which have no sign. */
  sign: number;
  z: number;
}

export function VectorPage(props: PageProps) {
  const { map, address } = props;
  const names = Object.keys(map.vectors ?? {});
  const document = map.vectors?.[address.name];
  if (!address.name || !document) return <List map={map} names={names} asked={address.name} />;
  return <Shown key={document} {...props} document={document} />;
}

function List({ map, names, asked }: { map: MapDocument; names: string[]; asked: string }) {
  return (
    <main class="vector">
      <h1>{asked ? `No direction “${asked}”` : "Attached directions"}</h1>
      <p class="lead">A probe, a steering vector, a row of a dictionary: who writes along it, and who reads it.</p>
      {names.length > 0 && (
        <ul class="plain">
          {names.map((name) => (
            <li key={name}>
              <a href={format({ page: "vector", name, state: {} })}>{name}</a>
            </li>
          ))}
        </ul>
      )}
      <p class="note">
        {names.length ? "Another one" : "None is stored. A file of one"}:{" "}
        <code>vweights vector {map.model} FILE --at STATE --atlas ATLAS</code>
      </p>
    </main>
  );
}

const cosine = (bar: Bar, digits = 3) => signed(bar.sign * bar.score, digits).replace("0.", ".");

function barsOf(side: VectorSide | undefined): Bar[] {
  if (!side) return [];
  return side.labels.flatMap((label, i): Bar[] => {
    const match = /^L(\d+)([HN])(\d+)(?:\.(\w+))?$/.exec(label) ?? /^(.+):(F)(\d+)(?:@\d+)?(?:\.(\w+))?$/.exec(label);
    const kind = side.kinds[i]!;
    if (kind !== "token" && !match) return [];
    return [
      {
        label,
        kind,
        part: match ? label.replace(/\.\w+$/, "") : label,
        port: match?.[4] ?? "",
        layer: match && match[2] !== "F" ? Number(match[1]) : NaN,
        index: match ? Number(match[3]) : 0,
        score: side.columns.score?.[i] ?? NaN,
        sign: side.columns.sign?.[i] ?? 0,
        z: side.columns.z?.[i] ?? NaN,
      },
    ];
  });
}

const rowsOf = (side: VectorSide | undefined) =>
  (side?.labels ?? []).map((label, i) => ({
    label,
    kind: side!.kinds[i]!,
    ...Object.fromEntries(Object.entries(side!.columns).map(([name, values]) => [name, values[i] ?? null])),
  }));

function Shown(props: PageProps & { document: string }) {
  const { map, width, go, document } = props;
  const vector = useDocument<VectorDocument>(document);
  const writers = useMemo(() => barsOf(vector?.writers), [vector]);
  const readers = useMemo(() => barsOf(vector?.readers), [vector]);
  const either = vector?.readers ?? vector?.writers;
  const { across, each } = columns(width, 3);
  if (!vector || !either) return <p class="note">Reading …</p>;
  const chance = 1 / Math.sqrt(map.width);
  const lists: [string, Bar[], number | undefined][] = (
    [
      ["Heads that write along it", writers, "head", vector.writers],
      ["Neurons that write along it", writers, "neuron", vector.writers],
      ["Token embeddings along it", writers, "token", vector.writers],
      ["Features that write along it", writers, "feature", vector.writers],
      ["Heads that read it", readers, "head", vector.readers],
      ["Neurons that read it", readers, "neuron", vector.readers],
      ["Token logits that it moves", readers, "token", vector.readers],
      ["Features that read it", readers, "feature", vector.readers],
    ] as const
  ).map(([title, bars, kind, side]) => [title, bars.filter((bar) => bar.kind === kind), side?.of[kind]]);
  const open = (bar: Bar) => bar.kind === "head" && go({ page: "head", name: bar.part, state: {} });
  return (
    <main class="vector">
      <h1>{vector.name}</h1>
      <p class="lead">
        A direction of norm {significant(either.norm)} at state {either.state} of {map.parts.reduce((most, part) => Math.max(most, part.reads ?? 0), 0)}
        . Cosine with what each part writes or reads; of a head, the share of its circuit along it.{" "}
        <a href="#/vector">All attached directions</a>
      </p>
      <Depths {...props} writers={writers} readers={readers} vector={vector} open={open} />
      <div class="charts">
        {lists
          .filter(([, bars]) => bars.length)
          .map(([title, bars, of]) => (
            <Foremost key={title} title={title} bars={bars} of={of ?? bars.length} chance={chance} map={map} width={across === 1 ? width : each} open={open} />
          ))}
      </div>
    </main>
  );
}

interface Row {
  title: string;
  port: string;
  bars: Bar[];
  into: boolean;
}

/** One row for each port over one axis of depth; neurons stand up along the direction and hang down against it. */
function Depths({
  map,
  vector,
  writers,
  readers,
  open,
  width,
}: PageProps & { vector: VectorDocument; writers: Bar[]; readers: Bar[]; open: (bar: Bar) => void }) {
  const deep = (bars: Bar[]) => bars.filter((bar) => !Number.isNaN(bar.layer));
  const ports = [...new Set(deep(readers).map((bar) => bar.port))];
  const rows: Row[] = [
    { title: "heads write", port: "O", into: false, bars: deep(writers).filter((bar) => bar.kind === "head") },
    { title: "neurons write", port: "MLP", into: false, bars: deep(writers).filter((bar) => bar.kind === "neuron") },
    ...ports.map((port) => ({
      title: { Q: "queries read", K: "keys read", V: "values read", gate: "gates read", up: "up rows read", in: "neurons read" }[port] ?? port,
      port,
      into: true,
      bars: deep(readers).filter((bar) => bar.port === port),
    })),
  ].filter((row) => row.bars.length);
  const items = rows.flatMap((row) => [...row.bars].sort((a, b) => b.score - a.score).slice(0, 20));
  const say = (bar: Bar) => `${bar.label}, ${bar.sign ? cosine(bar) : figure(bar.score)}`;
  const { current, set, stop, said } = useSteps(items, say, open);
  const [left, top, gap] = [width < 700 ? 0 : 112, 8, width < 700 ? 22 : 14];
  const step = (width - left - 8) / map.layers;
  const most = Math.max(...rows.flatMap((row) => row.bars.map((bar) => bar.score)), 0.05);
  /** Height of a score: square root, so that chance is seen beside the largest. */
  const tall = (score: number) => 62 * Math.sqrt(score / most);
  const heads = Math.max(1, ...map.parts.map((part) => (part.head ?? -1) + 1));
  const neurons = Math.max(1, ...rows.flatMap((row) => row.bars.filter((bar) => bar.kind === "neuron").map((bar) => bar.index + 1)));
  const x = (bar: Bar) => left + step * (bar.layer + 0.08 + (0.84 * (bar.index + 0.5)) / (bar.kind === "head" ? heads : neurons));
  const end = (bar: Bar) => (bar.sign < 0 ? -1 : 1) * tall(bar.score);
  let y = top;
  const placed = rows.map((row) => {
    const up = tall(Math.max(...row.bars.map((bar) => (bar.sign < 0 ? 0 : bar.score)), 0));
    const down = tall(Math.max(...row.bars.map((bar) => (bar.sign < 0 ? bar.score : 0)), 0));
    const zero = y + gap + Math.max(18, up);
    y = zero + down + 4;
    return { ...row, zero, from: zero - Math.max(18, up), to: zero + down };
  });
  const height = y + 26;
  const stateAt = (state: number) => {
    const reads = map.parts.filter((part) => part.reads !== null && part.reads >= state && part.layer !== null);
    const first = reads.reduce<(typeof reads)[number] | null>((best, part) => (!best || part.reads! < best.reads! ? part : best), null);
    return left + step * (first ? first.layer! + (first.kind === "mlp" ? 0.5 : 0) : map.layers);
  };
  const state = stateAt((vector.readers ?? vector.writers)!.state);
  const chance = 1 / Math.sqrt(map.width);
  const at = current ? placed.find((row) => row.bars.includes(current)) : undefined;
  const nearest = (event: { clientX: number; clientY: number; currentTarget: Element }) => {
    const box = event.currentTarget.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const row = placed.find((one) => py >= one.from - gap && py <= one.to + 4);
    let [best, distance]: [Bar | null, number] = [null, 12];
    for (const bar of row?.bars ?? []) {
      const d = Math.abs(x(bar) - px) - Math.min(3, bar.score * 10);
      if (d < distance) [best, distance] = [bar, d];
    }
    set(best);
  };
  const every = Math.ceil(map.layers / (width / 34));
  return (
    <section>
      <h2>
        Along the depth{" "}
        <small>
          state {(vector.readers ?? vector.writers)!.state} marked; square-root scale, dotted: chance, {figure(chance)}; neurons up along it, down against it
        </small>{" "}
        <Behind name="direction" rows={() => [...rowsOf(vector.writers).map((row) => ({ side: "writes", ...row })), ...rowsOf(vector.readers).map((row) => ({ side: "reads", ...row }))]} />
      </h2>
      <div class="plot" style={{ width, height }}>
        <svg
          width={width}
          height={height}
          role="img"
          aria-label={`who writes along ${vector.name} and who reads it, by layer`}
          {...stop}
          onPointerMove={(event) => nearest(event)}
          onPointerLeave={() => set(null)}
          onClick={() => current && open(current)}
        >
          {Array.from({ length: map.layers }, (_, layer) => (
            <g key={layer}>
              {layer % 2 === 0 && <rect class="band" x={left + step * layer} width={step} y={top} height={height - 26 - top} />}
              {layer % every === 0 && (
                <text class="axis" x={left + step * (layer + 0.5)} y={height - 8} text-anchor="middle">
                  {layer}
                </text>
              )}
            </g>
          ))}
          <path class="spine state" d={`M${state},${top}V${height - 26}`} />
          {placed.map((row) => {
            const foremost = [...row.bars].sort((a, b) => b.score - a.score).slice(0, 2);
            return (
              <g key={row.title} class={`direction-row ${row.port === "O" ? "" : portClass(row.port)}`}>
                <text class="line-label" x={0} y={left ? row.zero - 2 : row.from - 6}>
                  {row.title}
                </text>
                {row.bars.map((bar) => (
                  <path
                    key={bar.label}
                    class="bar"
                    style={{ strokeWidth: bar.kind === "head" ? Math.max(1, Math.min(5, (step * 0.7) / heads)) : 1.4 }}
                    d={`M${x(bar)},${row.zero}V${row.zero - end(bar)}`}
                  />
                ))}
                <path class="axis-line" d={`M${left},${row.zero}H${width - 8}`} />
                <path class="least" d={`M${left},${row.zero - tall(chance)}H${width - 8}`} />
                {row.to > row.zero + 4 && <path class="least" d={`M${left},${row.zero + tall(chance)}H${width - 8}`} />}
                {foremost
                  .filter((bar, i) => bar.score > 2 * chance && (i === 0 || Math.abs(x(bar) - x(foremost[0]!)) > 90 || bar.sign * foremost[0]!.sign < 0))
                  .map((bar) => {
                    const late = x(bar) > width - 90;
                    return (
                      <text
                        key={bar.label}
                        class="part"
                        x={x(bar) + (late ? -5 : 5)}
                        y={row.zero - end(bar) + (bar.sign < 0 ? 0 : 9)}
                        text-anchor={late ? "end" : "start"}
                      >
                        {bar.part} {bar.sign ? cosine(bar, 2) : figure(bar.score, 2)}
                      </text>
                    );
                  })}
                {current && at?.title === row.title && (
                  <circle class="pin" cx={x(current)} cy={row.zero - end(current)} r={5} />
                )}
              </g>
            );
          })}
          {left > 0 && (
            <text class="axis" x={0} y={height - 8}>
              layer
            </text>
          )}
        </svg>
        {current && at && (
          <Tip x={x(current)} y={at.zero} width={width}>
            <b>{current.label}</b>
            <br />
            {current.sign ? cosine(current) : figure(current.score)}, {significant(current.score / chance, 2)} × chance
          </Tip>
        )}
        {said}
      </div>
      <p class="note">
        {[vector.writers, vector.readers].some((side) => (side?.of.neuron ?? 0) > (side?.kinds.filter((kind) => kind === "neuron").length ?? 0)) &&
          "Of the neurons those of largest cosine, and the foremost of every layer on either side."}
      </p>
    </section>
  );
}

/** The ten foremost of a kind. */
function Foremost({
  title,
  bars,
  of,
  chance,
  map,
  width,
  open,
}: {
  title: string;
  bars: Bar[];
  of: number;
  chance: number;
  map: MapDocument;
  width: number;
  open: (bar: Bar) => void;
}) {
  const sorted = [...bars].sort((a, b) => b.score - a.score);
  const rows = () => sorted.map((bar) => ({ name: bar.label, score: bar.score, sign: bar.sign || null, z: bar.z, over_chance: bar.score / chance }));
  const shown = sorted.slice(0, 10);
  return (
    <div class="chart" style={{ width }}>
      <h3>
        {title}{" "}
        <small>
          {shown.length} of {of.toLocaleString("en")}
        </small>{" "}
        <Behind name={title.toLowerCase().replaceAll(" ", "-")} rows={rows} />
      </h3>
      <table class="edges">
        <thead>
          <tr>
            <th>name</th>
            <th>{shown.some((bar) => bar.sign) ? "cosine" : "score"}</th>
            <th>× chance</th>
            <th>from chance, s.d.</th>
          </tr>
        </thead>
        <tbody>
          {shown.map((bar) => (
            <tr
              key={bar.label}
              class={bar.kind === "head" ? "" : "still"}
              tabIndex={bar.kind === "head" ? 0 : undefined}
              onClick={() => open(bar)}
              onKeyDown={(event) => event.key === "Enter" && open(bar)}
            >
              <td>
                {bar.kind === "head" && <Sign behaviour={map.behaviours[bar.part]?.label} />}{" "}
                {bar.kind === "token" ? (
                  <Token label={bar.label} />
                ) : (
                  <b>
                    {bar.part}
                    {bar.port && (
                      <>
                        .<span class={portClass(bar.port)}>{bar.port}</span>
                      </>
                    )}
                  </b>
                )}
              </td>
              <td>{bar.sign ? cosine(bar) : figure(bar.score)}</td>
              <td>{significant(bar.score / chance, 2)}</td>
              <td>{Number.isNaN(bar.z) ? "–" : signed(bar.z, Math.abs(bar.z) < 10 ? 1 : 0)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** `unembed[7042] ' Paris'` as its text with the id small. */
function Token({ label }: { label: string }) {
  const match = /^\w+\[(\d+)\](?: (.*))?$/s.exec(label);
  return match?.[2] ? (
    <>
      <b class="token above">{match[2].slice(1, -1)}</b> <small>{match[1]}</small>
    </>
  ) : (
    <b>{label}</b>
  );
}
