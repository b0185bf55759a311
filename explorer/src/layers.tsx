/** Which depths talk to which: every pair of heads, rows read and columns write, with the width of the stream beside. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Table, loadBandwidth, numbers } from "./data";
import { css, figure, overChance, portClass, ramp } from "./marks";
import { type PageProps, usePort } from "./page";
import { Behind } from "./table";

interface Head {
  index: number;
  layer: number;
  head: number;
  label: string;
}

export function LayersPage(props: PageProps) {
  const { map, address, go, width, theme } = props;
  const { ports, port, pairs } = usePort(props);
  const [bandwidth, setBandwidth] = useState<Table | null>(null);
  const [at, setAt] = useState<{ reader: Head; writer: Head; value: number; x: number; y: number } | null>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => void (map.stored.bandwidth && loadBandwidth().then(setBandwidth)), []);
  const heads = (labels: string[]): Head[] =>
    labels.flatMap((label, index) => {
      const match = /^L(\d+)H(\d+)$/.exec(label);
      return match ? [{ index, label, layer: Number(match[1]), head: Number(match[2]) }] : [];
    });
  const readers = useMemo(() => (pairs ? heads(pairs.readers) : []), [pairs]);
  const writers = useMemo(() => (pairs ? heads(pairs.writers) : []), [pairs]);
  const score = pairs?.column("score") ?? null;
  const chance = 1 / Math.sqrt(map.width);
  const beside = bandwidth && width >= 1100;
  const side = Math.round(beside ? width * 0.5 : Math.min(width, 820));
  const [left, top] = [34, 8];
  const cell = (side - left) / Math.max(1, writers.length);
  const tall = Math.min(cell, 640 / Math.max(1, readers.length));
  const height = Math.round(tall * readers.length);
  const beyond = useMemo(() => {
    if (!score || !pairs) return { count: 0, largest: 0 };
    let [count, largest] = [0, 0];
    for (const r of readers)
      for (const w of writers) {
        const ratio = score[r.index * pairs.writers.length + w.index]! / chance;
        if (ratio > largest) largest = ratio;
        if (ratio > 4 || ratio < 0.25) count++;
      }
    return { count, largest };
  }, [score]);
  useEffect(() => {
    const node = canvas.current;
    const pen = node?.getContext("2d");
    if (!node || !pen || !score || !pairs) return;
    const density = devicePixelRatio || 1;
    node.width = side * density;
    node.height = height * density;
    pen.setTransform(density, 0, 0, density, 0, 0);
    pen.clearRect(0, 0, side, height);
    const shade = ramp();
    const known = new Map<number, string>();
    readers.forEach((r, row) => {
      writers.forEach((w, column) => {
        const value = score[r.index * pairs.writers.length + w.index]!;
        if (!(value < Infinity)) return;
        const step = Math.round(64 * overChance(value / chance));
        let tone = known.get(step);
        if (!tone) known.set(step, (tone = shade(step / 64)));
        pen.fillStyle = tone;
        pen.fillRect(left + cell * column, tall * row, cell + 0.3, tall + 0.3);
      });
    });
    pen.fillStyle = css("paper");
    readers.forEach((r, row) => row && r.layer !== readers[row - 1]!.layer && pen.fillRect(left, tall * row - 0.4, side, 0.8));
    writers.forEach(
      (w, column) => column && w.layer !== writers[column - 1]!.layer && pen.fillRect(left + cell * column - 0.4, 0, 0.8, height),
    );
  }, [score, side, theme]);
  const pointed = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const writer = writers[Math.floor((event.clientX - box.left - left) / cell)];
    const reader = readers[Math.floor((event.clientY - box.top) / tall)];
    const value = writer && reader && score && pairs ? score[reader.index * pairs.writers.length + writer.index]! : NaN;
    setAt(
      writer && reader && !Number.isNaN(value)
        ? { writer, reader, value, x: event.clientX - box.left, y: event.clientY - box.top }
        : null,
    );
  };
  const marks = (side_: Head[]) =>
    side_.flatMap((one, i) => (one.head === 0 && (one.layer % 5 === 0 || map.layers < 12) ? [{ layer: one.layer, i }] : []));
  const rowsOf = () => {
    if (!pairs || !score) return [];
    const best = new Map<string, { reading_layer: number; writing_layer: number; largest: number; pair: string; mean: number; n: number }>();
    for (const r of readers)
      for (const w of writers) {
        const value = score[r.index * pairs.writers.length + w.index]!;
        if (Number.isNaN(value)) continue;
        const key = `${r.layer} ${w.layer}`;
        const row = best.get(key) ?? { reading_layer: r.layer, writing_layer: w.layer, largest: 0, pair: "", mean: 0, n: 0 };
        if (value > row.largest) [row.largest, row.pair] = [value, `${w.label} > ${r.label}.${port}`];
        row.mean += value;
        row.n++;
        best.set(key, row);
      }
    return [...best.values()].map((row) => ({ ...row, mean: row.mean / row.n }));
  };
  return (
    <main class="layers">
      <h1>Which depths talk to which{bandwidth ? ", and how wide the stream is there" : ""}</h1>
      <p class="lead">
        All pairs of heads through {port}. Rows read, columns write, both by depth.{" "}
        {beyond.count > 0
          ? `${beyond.count} cells lie beyond a quarter or four times chance and are drawn at the end; the largest is ${figure(beyond.largest, 2)} times chance.`
          : ""}
      </p>
      <p>
        {ports.map((name) => (
          <button
            key={name}
            class={`port ${portClass(name)}`}
            aria-pressed={name === port}
            onClick={() => go({ state: { ...address.state, port: name } })}
          >
            <i /> {name}
          </button>
        ))}
        <Behind name={`layers-${port}`} rows={rowsOf} />
      </p>
      <div class="two">
        <div class="matrix" style={{ width: side }}>
          {!pairs && <p class="note">Reading …</p>}
          <canvas
            ref={canvas}
            style={{ width: side, height }}
            role="img"
            aria-label={`score over chance of ${readers.length} by ${writers.length} heads`}
            onPointerMove={(event) => pointed(event as unknown as PointerEvent)}
            onPointerLeave={() => setAt(null)}
            onClick={() => at && go({ page: "pair", name: `${at.writer.label}/${at.reader.label}.${port}`, state: {} })}
          />
          <svg width={side} height={20} aria-hidden="true">
            {marks(writers).map(({ layer, i }) => (
              <text key={layer} x={left + cell * i} y={12}>
                {layer}
              </text>
            ))}
            <text x={side} y={12} text-anchor="end">
              writing layer →
            </text>
          </svg>
          <svg class="rows" width={left} height={height} aria-hidden="true">
            {marks(readers).map(({ layer, i }) => (
              <text key={layer} x={left - 6} y={tall * i + 10} text-anchor="end">
                {layer}
              </text>
            ))}
          </svg>
          <p class="legend scale">
            ¼ <span class="ramp" /> 4 × chance
          </p>
          {at && (
            <div class="tip" style={{ left: Math.min(side - 200, at.x + 14), top: at.y - 50 }}>
              <b>
                {at.writer.label} → {at.reader.label}.{port}
              </b>
              <br />
              score {figure(at.value)}, {figure(at.value / chance, 2)} × chance
            </div>
          )}
        </div>
        {bandwidth ? (
          <Depth bandwidth={bandwidth} width={beside ? width - side - 60 : Math.min(width, 700)} height={Math.max(240, height)} top={top} />
        ) : (
          <p class="note">
            The width of the stream is not stored: <code>vweights map {map.model} -o ATLAS</code>
          </p>
        )}
      </div>
    </main>
  );
}

/** Directions in use at each depth, entropy ranks, depth downwards. */
function Depth({ bandwidth, width, height, top }: { bandwidth: Table; width: number; height: number; top: number }) {
  const d = Number(bandwidth.stamp.d_model);
  const states = bandwidth.labels.length;
  const x = (value: number) => 8 + ((width - 90) * value) / d;
  const y = (state: number) => top + ((height - 40) * state) / Math.max(1, states - 1);
  const path = (values: number[]) =>
    values.map((value, i) => (Number.isNaN(value) ? "" : `${i ? "L" : "M"}${x(value)},${y(i)}`)).join("");
  const [written, read, live] = ["written_entropy_rank", "read_entropy_rank_blocks", "live_entropy_rank"].map((name) =>
    numbers(bandwidth, name),
  );
  const name = (values: number[], at: number): [number, number] => [x(values[at] || 0) + 6, y(at)];
  const late = Math.floor(states * 0.72);
  const rowsOf = () =>
    bandwidth.labels.map((state, i) => ({
      state,
      written: written![i] ?? null,
      read_later: read![i] ?? null,
      live: live![i] ?? null,
    }));
  return (
    <section>
      <h2>
        Directions in use at each depth <Behind name="bandwidth" rows={rowsOf} />
      </h2>
      <svg width={width} height={height + 16} role="img" aria-label="entropy ranks of what is written, read later, and live">
        <path class="area" d={`${path(live!)}L8,${y(states - 1)}L8,${y(0)}Z`} />
        {[0, 1 / 3, 2 / 3, 1].map((share) => (
          <g key={share} class="tick">
            <path d={`M${x(d * share)},${top}V${y(states - 1)}`} />
            <text x={x(d * share)} y={height - 18} text-anchor="middle">
              {Math.round(d * share)}
            </text>
          </g>
        ))}
        <path class="curve thin" d={path(live!)} />
        <path class="curve" d={path(written!)} />
        <path class="curve dashed" d={path(read!)} />
        {(
          [
            ["written", written!],
            ["read later", read!],
            ["live", live!],
          ] as const
        ).map(([label, values], i) => {
          const [px, py] = name(values, [late, Math.floor(states * 0.12), Math.floor(states * 0.5)][i]!);
          return (
            <text key={label} class="part" x={px} y={py}>
              {label}
            </text>
          );
        })}
        <text x={8} y={height}>
          entropy rank; all {d}
        </text>
      </svg>
    </section>
  );
}
