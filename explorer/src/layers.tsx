/** Which depths talk to which: every pair of heads, rows read and columns write, a lens over some, the stream's width beside. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Table } from "./data";
import { Demand, Depth } from "./depth";
import { Command, css, figure, overChance, portClass, ramp } from "./marks";
import { type PageProps, useDocument, usePort } from "./page";
import { Behind } from "./table";

interface Head {
  index: number;
  layer: number;
  head: number;
  label: string;
}

/** Layers of a lens: first and last writing, first and last reading. */
type Lens = [number, number, number, number];

const MOST = 640; // pixels of height
const AXIS = 34;

const headsOf = (labels: string[]): Head[] =>
  labels.flatMap((label, index) => {
    const match = /^L(\d+)H(\d+)$/.exec(label);
    return match ? [{ index, label, layer: Number(match[1]), head: Number(match[2]) }] : [];
  });

const lensOf = (text: string | undefined): Lens | null => {
  const match = /^L(\d+)-(\d+):L(\d+)-(\d+)$/.exec(text ?? "");
  return match ? (match.slice(1).map(Number) as Lens) : null;
};

export function LayersPage(props: PageProps) {
  const { map, address, go, width, theme } = props;
  const { ports, port, pairs } = usePort(props);
  const bandwidth = useDocument<Table>(map.stored.bandwidth);
  const [at, setAt] = useState<{ reader: Head; writer: Head; value: number; x: number; y: number } | null>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const readers = useMemo(() => (pairs ? headsOf(pairs.readers) : []), [pairs]);
  const writers = useMemo(() => (pairs ? headsOf(pairs.writers) : []), [pairs]);
  const score = pairs?.column("score") ?? null;
  const valueOf = (reader: Head, writer: Head) => score?.[reader.index * (pairs?.writers.length ?? 0) + writer.index] ?? NaN;
  const chance = 1 / Math.sqrt(map.width);
  const wide = width >= 1100;
  const side = Math.round(wide ? width * 0.5 : Math.min(width, 820));
  const cell = (side - AXIS) / Math.max(1, writers.length);
  const height = Math.round(Math.min(cell, MOST / Math.max(1, readers.length)) * readers.length);
  const tall = height / Math.max(1, readers.length);
  const figures = useMemo(() => {
    let [beyond, largest, count] = [0, 0, 0];
    let best: [Head, Head] | null = null;
    for (const r of readers)
      for (const w of writers) {
        const ratio = valueOf(r, w) / chance;
        if (!(ratio < Infinity)) continue;
        count++;
        if (ratio > largest) [largest, best] = [ratio, [r, w]];
        if (ratio > 4 || ratio < 0.25) beyond++;
      }
    return { beyond, largest, count, best };
  }, [score]);
  const rows = Math.max(...map.parts.map((part) => part.head ?? 0)) + 1;
  const reach = rows > 16 ? 0 : 1; // layers on either side of what the lens is over, as many as stay legible
  const around = (writing: number, reading: number): Lens => {
    const clip = (value: number) => Math.max(0, Math.min(map.layers - 1, value));
    return [clip(writing - reach), clip(writing + reach), clip(reading - reach), clip(reading + reach)];
  };
  const lens = lensOf(address.state.lens) ?? (figures.best ? around(figures.best[1].layer, figures.best[0].layer) : null);
  const setLens = (next: Lens) =>
    go({ state: { ...address.state, lens: `L${next[0]}-${next[1]}:L${next[2]}-${next[3]}` } }, true);
  const open = (reader: Head, writer: Head) => go({ page: "pair", name: `${writer.label}/${reader.label}.${port}`, state: {} });

  useEffect(() => {
    const node = canvas.current;
    const pen = node?.getContext("2d");
    if (!node || !pen || !score || !readers.length || !writers.length) return;
    const density = devicePixelRatio || 1;
    node.width = Math.round(side * density);
    node.height = Math.round(height * density);
    const image = pen.createImageData(node.width, node.height);
    matrix(image, readers, writers, valueOf, { chance, left: AXIS * density, wide: cell * density, tall: tall * density });
    pen.putImageData(image, 0, 0);
    if (cell * density < 2) return; // no room for lines between layers
    pen.setTransform(density, 0, 0, density, 0, 0);
    pen.fillStyle = css("paper");
    readers.forEach((r, row) => row && r.layer !== readers[row - 1]!.layer && pen.fillRect(AXIS, tall * row - 0.4, side, 0.8));
    writers.forEach((w, i) => i && w.layer !== writers[i - 1]!.layer && pen.fillRect(AXIS + cell * i - 0.4, 0, 0.8, height));
  }, [score, side, height, theme]);

  const pointed = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const writer = writers[Math.floor((x - AXIS) / cell)];
    const reader = readers[Math.floor(y / tall)];
    const value = writer && reader ? valueOf(reader, writer) : NaN;
    return writer && reader && !Number.isNaN(value) ? { writer, reader, value, x, y } : null;
  };
  const keyed = (event: KeyboardEvent) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!lens) return;
    if (step) {
      setLens(around((lens[0] + lens[1]) / 2 + step[0]!, (lens[2] + lens[3]) / 2 + step[1]!).map(Math.round) as Lens);
      event.preventDefault();
    } else if (event.key === "Enter") {
      const inside = within(lens, readers, writers).sort((a, b) => (valueOf(...b) || 0) - (valueOf(...a) || 0))[0];
      if (inside) open(...inside);
    }
  };
  const ticks = (heads: Head[]) =>
    heads.flatMap((one, i) => (one.head === 0 && (one.layer % 5 === 0 || map.layers < 12) ? [{ layer: one.layer, i }] : []));
  const edge = (heads: Head[], first: number, last: number) => {
    const inside = heads.flatMap((one, i) => (one.layer >= first && one.layer <= last ? [i] : []));
    return inside.length ? [inside[0]!, inside.at(-1)! + 1] : null;
  };
  const enlarged = useMemo(
    () =>
      lens && pairs ? (
        <LensView
          {...{ lens, readers, writers, valueOf, chance, theme }}
          size={Math.min(270, side * 0.4, height * 0.46)}
          onOpen={open}
        />
      ) : null,
    [lens?.join(), pairs, theme, side, height],
  );
  const [across, down] = lens ? [edge(writers, lens[0], lens[1]), edge(readers, lens[2], lens[3])] : [null, null];
  return (
    <main class="layers">
      <h1>Which depths talk to which{bandwidth ? ", and how wide the stream is there" : ""}</h1>
      <p class="lead">
        All {figures.count.toLocaleString("en")} pairs of heads through {port}. Rows read, columns write, both by depth
        {wide && bandwidth ? "; the panels beside share the depth axis" : ""}.{" "}
        {figures.beyond > 0
          ? `${figures.beyond} cells lie beyond a quarter or four times chance and are drawn at the end; the largest is ${figure(figures.largest, 2)} times chance.`
          : ""}
      </p>
      <div class="row-of-ports" role="group" aria-label="port">
        {ports.map((name) => (
          <button
            key={name}
            class={`port ${portClass(name)}`}
            aria-pressed={name === port}
            onClick={() => go({ state: { ...address.state, port: name, lens: "" } })}
          >
            <i /> {name}
          </button>
        ))}
        <Behind name={`layers-${port}`} rows={() => (pairs ? byLayers(readers, writers, valueOf, port) : [])} />
      </div>
      <div class="two depth-row">
        <div class="matrix" style={{ width: side }}>
          {!pairs && <p class="note">Reading …</p>}
          <canvas ref={canvas} style={{ width: side, height }} aria-hidden="true" />
          <svg
            class="over"
            width={side}
            height={height}
            tabindex={0}
            role="application"
            aria-label={`score over chance of ${readers.length} by ${writers.length} heads; arrows move the lens by a layer, Enter opens its largest pair`}
            onPointerMove={(event) => setAt(pointed(event as unknown as PointerEvent))}
            onPointerLeave={() => setAt(null)}
            onClick={(event) => {
              const cell = pointed(event as unknown as PointerEvent);
              if (cell) setLens(around(cell.writer.layer, cell.reader.layer));
            }}
            onDblClick={() => at && open(at.reader, at.writer)}
            onKeyDown={keyed}
          >
            {across && down && (
              <rect
                class="lens"
                x={AXIS + cell * across[0]!}
                width={cell * (across[1]! - across[0]!)}
                y={tall * down[0]!}
                height={tall * (down[1]! - down[0]!)}
              />
            )}
            {at && <path class="crosshair" d={`M${at.x},0V${height}M${AXIS},${at.y}H${side}`} />}
          </svg>
          <svg width={side} height={20} aria-hidden="true">
            {ticks(writers).map(({ layer, i }) => (
              <text key={layer} x={AXIS + cell * i} y={12}>
                {layer}
              </text>
            ))}
            <text x={side} y={12} text-anchor="end">
              writing layer →
            </text>
          </svg>
          <svg class="rows" width={AXIS} height={height} aria-hidden="true">
            {ticks(readers).map(({ layer, i }) => (
              <text key={layer} x={AXIS - 6} y={tall * i + 10} text-anchor="end">
                {layer}
              </text>
            ))}
          </svg>
          <p class="legend scale">
            ¼ <span class="ramp" /> 4 × chance
          </p>
          {enlarged}
          {at && (
            <div class="tip" style={{ left: Math.min(side - 200, at.x + 14), top: Math.max(0, at.y - 50) }}>
              <b>
                {at.writer.label} → {at.reader.label}.{port}
              </b>
              <br />
              {at.value < Infinity
                ? `score ${figure(at.value)}, ${figure(at.value / chance, 2)} × chance`
                : "one of its ends writes or reads nothing"}
            </div>
          )}
        </div>
        {bandwidth ? (
          <>
            <Depth
              bandwidth={bandwidth}
              layers={map.layers}
              width={wide ? Math.round((width - side) * 0.58) : Math.min(width, 700)}
              height={Math.max(240, height)}
              depth={wide && at ? at.y / height : null}
            />
            {wide && (
              <Demand
                bandwidth={bandwidth}
                layers={map.layers}
                width={Math.round((width - side) * 0.42) - 80}
                height={Math.max(240, height)}
                depth={at ? at.y / height : null}
              />
            )}
          </>
        ) : (
          !map.stored.bandwidth && (
            <p class="note">
              The width of the stream is not stored: <Command text={`vweights map ${map.model} -o ATLAS`} />
            </p>
          )
        )}
      </div>
    </main>
  );
}

interface Cells {
  chance: number;
  left: number;
  wide: number;
  tall: number;
}

/** The matrix in pixels; where one covers several cells, it shows the largest of them. */
function matrix(image: ImageData, readers: Head[], writers: Head[], valueOf: (reader: Head, writer: Head) => number, cells: Cells) {
  const { width, height } = image;
  const { chance, left, wide, tall } = cells;
  const largest = new Float32Array(width * height);
  readers.forEach((reader, row) => {
    const [top, bottom] = [Math.floor(tall * row), Math.min(height, Math.max(Math.floor(tall * row) + 1, Math.round(tall * (row + 1))))];
    writers.forEach((writer, column) => {
      const value = valueOf(reader, writer);
      if (Number.isNaN(value)) return;
      const first = Math.floor(left + wide * column);
      const last = Math.min(width, Math.max(first + 1, Math.round(left + wide * (column + 1))));
      for (let y = top; y < bottom; y++)
        for (let x = first; x < last; x++) if (value > largest[y * width + x]!) largest[y * width + x] = value;
    });
  });
  const pixels = new Uint32Array(image.data.buffer);
  const colour = ramp();
  const pack = (text: string) => {
    const [r, g, b] = text.startsWith("#") ? [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16)) : text.match(/\d+/g)!.map(Number);
    return ((255 << 24) | (b! << 16) | (g! << 8) | r!) >>> 0; // little-endian
  };
  const tones = Uint32Array.from({ length: 129 }, (_, i) => pack(colour(i / 64 - 1)));
  const dead = pack(css("faint"));
  for (let i = 0; i < largest.length; i++) {
    const value = largest[i]!;
    if (value > 0) pixels[i] = value < Infinity ? tones[64 + Math.round(64 * Math.max(-1, Math.min(1, overChance(value / chance))))]! : dead;
  }
}

/** Colours of scores over chance, each step of the ramp made once. */
function shades(): (ratio: number) => string {
  const colour = ramp();
  const known = new Map<number, string>();
  return (ratio) => {
    const step = Math.round(64 * overChance(ratio));
    let tone = known.get(step);
    if (!tone) known.set(step, (tone = colour(step / 64)));
    return tone;
  };
}

const within = (lens: Lens, readers: Head[], writers: Head[]): [Head, Head][] =>
  readers
    .filter((one) => one.layer >= lens[2] && one.layer <= lens[3])
    .flatMap((reader) =>
      writers.filter((one) => one.layer >= lens[0] && one.layer <= lens[1]).map((writer): [Head, Head] => [reader, writer]),
    );

interface LensProps {
  lens: Lens;
  readers: Head[];
  writers: Head[];
  valueOf: (reader: Head, writer: Head) => number;
  chance: number;
  theme: string;
  size: number;
  onOpen: (reader: Head, writer: Head) => void;
}

/** The pairs of a few layers, large, in the triangle where nothing can reach. */
function LensView({ lens, readers, writers, valueOf, chance, theme, size, onOpen }: LensProps) {
  const shade = useMemo(shades, [theme]);
  const rows = readers.filter((one) => one.layer >= lens[2] && one.layer <= lens[3]);
  const columns = writers.filter((one) => one.layer >= lens[0] && one.layer <= lens[1]);
  const step = size / Math.max(rows.length, columns.length, 1);
  const cells = within(lens, readers, writers).filter((pair) => !Number.isNaN(valueOf(...pair)));
  const foremost: [Head, Head][] = []; // one for each map that heads share, and none beside another's name
  for (const pair of [...cells].filter((pair) => valueOf(...pair) < Infinity).sort((a, b) => valueOf(...b) - valueOf(...a))) {
    const near = foremost.some(([reader]) => Math.abs(rows.indexOf(reader) - rows.indexOf(pair[0])) * step < 14);
    if (!near && foremost.push(pair) === 3) break;
  }
  const [width, height] = [step * columns.length, step * rows.length];
  const x = (writer: Head) => step * columns.indexOf(writer);
  const y = (reader: Head) => step * rows.indexOf(reader);
  return (
    <svg class="lens-view" width={width + 34} height={height + 18} role="img" aria-label={`layers ${lens[0]} to ${lens[1]} into ${lens[2]} to ${lens[3]}; foremost ${foremost.map(([r, w]) => `${w.label} to ${r.label}`).join(", ")}`}>
      {columns.map((one, i) => one.head === 0 && (
        <text key={one.label} x={34 + step * i} y={12}>
          L{one.layer}
        </text>
      ))}
      {rows.map((one, i) => one.head === 0 && (
        <text key={one.label} x={28} y={28 + step * i} text-anchor="end">
          L{one.layer}
        </text>
      ))}
      <g transform="translate(34,18)">
        <rect class="lens-ground" width={width} height={height} />
        {cells.map(([reader, writer]) => (
          <rect
            key={`${reader.label}${writer.label}`}
            x={x(writer) + 0.4}
            y={y(reader) + 0.4}
            width={Math.max(0.5, step - 0.8)}
            height={Math.max(0.5, step - 0.8)}
            style={{ fill: valueOf(reader, writer) < Infinity ? shade(valueOf(reader, writer) / chance) : "var(--faint)" }}
            onClick={() => onOpen(reader, writer)}
          >
            <title>
              {writer.label} → {reader.label}: {figure(valueOf(reader, writer) / chance, 2)} × chance
            </title>
          </rect>
        ))}
        {foremost.map(([reader, writer]) => (
          <g key={`${reader.label}${writer.label}`} class="lens-name">
            <rect x={x(writer)} y={y(reader)} width={step} height={step} />
            <text
              x={x(writer) + (x(writer) > width / 2 ? -4 : step + 4)}
              y={y(reader) + step}
              text-anchor={x(writer) > width / 2 ? "end" : "start"}
            >
              {writer.label} → {reader.label}
            </text>
          </g>
        ))}
        <rect class="lens" width={width} height={height} />
      </g>
    </svg>
  );
}

function byLayers(readers: Head[], writers: Head[], valueOf: (reader: Head, writer: Head) => number, port: string) {
  const rows = new Map<string, { reading_layer: number; writing_layer: number; largest: number; pair: string; mean: number; n: number }>();
  for (const r of readers)
    for (const w of writers) {
      const value = valueOf(r, w);
      if (!(value < Infinity)) continue;
      const key = `${r.layer} ${w.layer}`;
      const row = rows.get(key) ?? { reading_layer: r.layer, writing_layer: w.layer, largest: 0, pair: "", mean: 0, n: 0 };
      if (value > row.largest) [row.largest, row.pair] = [value, `${w.label} > ${r.label}.${port}`];
      row.mean += value;
      row.n++;
      rows.set(key, row);
    }
  return [...rows.values()].map((row) => ({ ...row, mean: row.mean / row.n }));
}

