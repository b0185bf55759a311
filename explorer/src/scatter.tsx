/** Every edge, observed score against what its two ends alone would give, both on log scales. */

import { scaleLog } from "d3-scale";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Edge, type Edges, type Ranked, edgeAt, nameOf } from "./edges";
import { Glyph, css, figure, ofLoss, ramp, signed } from "./marks";

const MARGIN = { left: 44, right: 12, top: 8, bottom: 40 };
const TICKS = [0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3, 0.5, 1];
const tick = (t: number) => figure(t, 3).replace(/0+$/, "").replace(/\.$/, "");
const ESTIMATED = 0.1; // nats to first order from which an edge that was not removed has a ring

interface Props {
  edges: Edges;
  ranked: Ranked;
  /** What the brush goes by, and how much of it an edge inside has at least. */
  measure: string;
  least: number;
  chance: number;
  pin: number;
  behaviour: (head: string) => string | null;
  onPin: (at: number) => void;
  onOpen: (at: number) => void;
  /** The brush's edge was dragged to here. */
  onBrush: (least: number) => void;
  width: number;
  height: number;
}

export function Scatter({ edges, ranked, measure, least, chance, pin, behaviour, onPin, onOpen, onBrush, width, height }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [hover, setHover] = useState(-1);
  const drag = useRef<{ x: number; y: number; moved: boolean } | null>(null);
  const plot = useMemo(() => placed(edges, width, height), [edges, width, height]);
  const { x, y, px, py } = plot;
  const place = (at: number): [number, number] => [px[at]!, py[at]!];
  const named = useMemo(() => {
    const rings: number[] = [];
    for (let i = 0; i < edges.count; i++) if (Math.abs(edges.attribution[i]!) > ESTIMATED && !edges.effects.has(i)) rings.push(i);
    return { rings, discs: [...edges.effects.keys()] };
  }, [edges]);
  const labels = useMemo(
    () =>
      spread(
        [...edges.effects]
          .filter(([, effect]) => effect.kind === "asked" && Math.abs(effect.effect) > 0.3)
          .sort(([, a], [, b]) => Math.abs(b.effect) - Math.abs(a.effect))
          .slice(0, width < 620 ? 1 : 12)
          .map(([at]) => ({ edge: edgeAt(edges, at), at: place(at) })),
        width,
      ),
    [plot],
  );

  // read once, as the page is made anew where the theme changes: to read a style in a frame costs its layout
  const tones = useMemo(() => ({ colour: ramp(), point: css("point"), paper: css("paper") }), []);
  const faint = useRef<{ plot: Plot; width: number; cells: Uint32Array } | null>(null);
  useEffect(() => {
    const node = canvas.current;
    const pen = node?.getContext("2d");
    if (!node || !pen) return;
    const density = devicePixelRatio || 1;
    if (node.width !== Math.round(width * density)) node.width = Math.round(width * density);
    if (node.height !== Math.round(height * density)) node.height = Math.round(height * density);
    if (faint.current?.plot !== plot || faint.current.width !== node.width)
      faint.current = { plot, width: node.width, cells: faintPoints(node, plot, edges.count, tones.point, density) };
    const image = pen.createImageData(node.width, node.height);
    const cells = new Uint32Array(image.data.buffer);
    cells.set(faint.current.cells);
    heldPoints(cells, node, plot, ranked, least, tones.point, density);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.putImageData(image, 0, 0);
    pen.setTransform(density, 0, 0, density, 0, 0);
    const { colour, paper } = tones;
    for (const at of named.rings) {
      const change = edges.attribution[at]!;
      pen.beginPath();
      pen.arc(px[at]!, py[at]!, 3.2, 0, 7);
      pen.fillStyle = paper;
      pen.fill();
      pen.strokeStyle = colour(Math.sign(change) * Math.max(0.45, Math.abs(ofLoss(change))));
      pen.lineWidth = 1.4;
      pen.stroke();
    }
    for (const at of named.discs) {
      pen.beginPath();
      pen.arc(px[at]!, py[at]!, 5.5, 0, 7);
      pen.fillStyle = colour(ofLoss(edges.effects.get(at)!.effect));
      pen.fill();
      pen.strokeStyle = paper;
      pen.lineWidth = 1;
      pen.stroke();
    }
  }, [plot, ranked, least]);

  const within = (event: PointerEvent): [number, number] => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const nearest = ([mx, my]: [number, number]): number => {
    let best = -1;
    let distance = 14 ** 2;
    for (let i = 0; i < edges.count; i++) {
      const d = (px[i]! - mx) ** 2 + (py[i]! - my) ** 2;
      if (d < distance) [best, distance] = [i, d];
    }
    for (const at of named.discs) {
      const d = (px[at]! - mx) ** 2 + (py[at]! - my) ** 2 - 40;
      if (d < distance) [best, distance] = [at, d];
    }
    return best;
  };
  const brushed = measure === "lift" || measure === "score";
  const dragged = ([mx, my]: [number, number]) => {
    const value = measure === "lift" ? 2 * Math.log2(y.invert(my) / x.invert(mx)) : y.invert(my);
    onBrush(measure === "lift" ? Math.round(value * 20) / 20 : Math.round(value * 1000) / 1000);
  };
  const order = useMemo(() => [...ranked.foremost(-Infinity)], [ranked]);
  const keyed = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      const at = pin >= 0 ? order.indexOf(pin) : step > 0 ? -1 : order.length;
      onPin(order[Math.max(0, Math.min(order.length - 1, at + step))] ?? -1);
      event.preventDefault();
    } else if (event.key === "Enter" && pin >= 0) onOpen(pin);
  };
  const [x0, x1] = x.domain() as [number, number];
  const along = (lift: number) => `M${x(x0)},${y(x0 * 2 ** (lift / 2))}L${x(x1)},${y(x1 * 2 ** (lift / 2))}`;
  const frame = `M${MARGIN.left},${MARGIN.top}H${width - MARGIN.right}V${height - MARGIN.bottom}H${MARGIN.left}Z`;
  const region =
    measure === "lift"
      ? `${along(least)}L${x(x1)},${MARGIN.top - 400}L${x(x0)},${MARGIN.top - 400}Z`
      : measure === "score" && least > 0
        ? `M${MARGIN.left},${y(least)}H${width}V${MARGIN.top}H${MARGIN.left}Z`
        : "";
  const tip = hover >= 0 ? edgeAt(edges, hover) : null;
  return (
    <div class="scatter" style={{ width, height }}>
      <svg width={width} height={height} class="under" aria-hidden="true">
        <clipPath id="plot">
          <path d={frame} />
        </clipPath>
        <g clip-path="url(#plot)">
          <path class="brush" d={region} />
          {[-3, -2, -1, 0, 1, 2, 3].map((lift) => (
            <path key={lift} class={lift === 0 ? "as-expected" : "lift-line"} d={along(lift)} />
          ))}
        </g>
        {TICKS.filter((t) => t > y.domain()[0]! && t < y.domain()[1]!).map((t) => (
          <g key={t} class="tick">
            <path d={`M${MARGIN.left},${y(t)}H${width - MARGIN.right}`} />
            <text x={MARGIN.left - 8} y={y(t) + 4} text-anchor="end">
              {tick(t)}
            </text>
          </g>
        ))}
        {TICKS.filter((t) => t > x0 && t < x1 && Math.abs(x(t) - x(chance)) > 14).map((t) => (
          <text key={t} class="axis" x={x(t)} y={height - MARGIN.bottom + 16} text-anchor="middle">
            {tick(t)}
          </text>
        ))}
        {chance > x0 && chance < x1 && (
          <g class="chance">
            <path d={`M${x(chance)},${MARGIN.top}V${height - MARGIN.bottom}`} />
            <text x={x(chance) + 4} y={height - MARGIN.bottom - 6}>
              chance {figure(chance)}
            </text>
          </g>
        )}
        {[-2, -1, 0, 1, 2].map((lift) => {
          const at = y(x0 * 1.08 * 2 ** (lift / 2)) - 5;
          return at > MARGIN.top + 24 && at < height - MARGIN.bottom - 4 ? (
            <text key={lift} class="line-label" x={MARGIN.left + 6} y={at}>
              {lift === 0 ? "as expected" : `lift ${signed(lift, 0)}`}
            </text>
          ) : null;
        })}
        <text class="axis" x={MARGIN.left + 6} y={MARGIN.top + 12}>
          ↑ observed score (log)
        </text>
        <text class="axis" x={width - MARGIN.right} y={height - 6} text-anchor="end">
          {width < 620 ? "expected score (log) →" : "expected score, from how widely the writer is heard and the reader listens (log) →"}
        </text>
      </svg>
      <canvas ref={canvas} style={{ width, height }} aria-hidden="true" />
      <svg
        width={width}
        height={height}
        class="over"
        tabindex={0}
        role="application"
        aria-label={`${edges.count} edges; arrows go through the foremost, Enter opens`}
        onPointerDown={(event) => {
          const [mx, my] = within(event as unknown as PointerEvent);
          drag.current = { x: mx, y: my, moved: false };
        }}
        onPointerMove={(event) => {
          const at = within(event as unknown as PointerEvent);
          const from = drag.current;
          if (from && event.buttons) {
            if (!from.moved && brushed && Math.hypot(at[0] - from.x, at[1] - from.y) > 6) {
              from.moved = true;
              event.currentTarget.setPointerCapture(event.pointerId);
              setHover(-1);
            }
            if (from.moved) dragged(at);
          } else setHover(nearest(at));
        }}
        onPointerLeave={() => setHover(-1)}
        onClick={(event) => {
          if (!drag.current?.moved) onPin(nearest(within(event as unknown as PointerEvent)));
          drag.current = null;
        }}
        onDblClick={(event) => {
          const at = nearest(within(event as unknown as PointerEvent));
          if (at >= 0) onOpen(at);
        }}
        onKeyDown={keyed}
      >
        {labels.map(({ edge, at, text }) => (
          <g
            key={nameOf(edge)}
            class="named"
            onClick={(event) => {
              event.stopPropagation();
              onPin(edge.at);
            }}
          >
            <path d={`M${at[0]},${at[1]}L${text[0]},${text[1] - 4}`} />
            <text x={text[0]} y={text[1]} text-anchor={text[2] ? "end" : "start"}>
              {edge.writer} → {edge.reader} <tspan class="effect">{signed(edge.effect!.effect)}</tspan>
            </text>
          </g>
        ))}
        {pin >= 0 && <circle class="pin" cx={px[pin]} cy={py[pin]} r={8.5} />}
        {hover >= 0 && <circle class="hover" cx={px[hover]} cy={py[hover]} r={7} />}
      </svg>
      {tip && (
        <div class="tip" style={{ left: Math.min(width - 260, px[hover]! + 14), top: Math.max(0, py[hover]! - 70) }}>
          <b>
            <svg class="sign" width="12" height="12" viewBox="-6 -6 12 12">
              <Glyph behaviour={behaviour(tip.writer)} />
            </svg>{" "}
            {tip.writer} → {tip.reader}.{tip.port}
          </b>
          <br />
          score {figure(tip.score)}, {figure(tip.score / chance, 1)} × chance, lift {signed(tip.lift)}
          <br />
          {tip.effect
            ? `removed: ${signed(tip.effect.effect)} nats`
            : Number.isNaN(tip.attribution)
              ? "not run"
              : `first order: ${signed(tip.attribution)} nats`}
        </div>
      )}
      {plot.clipped > 0 && (
        <p class="note clip">
          {plot.clipped.toLocaleString("en")} {plot.clipped === 1 ? "pair stands" : "pairs stand"} on the axes, which end before them.
        </p>
      )}
    </div>
  );
}

interface Plot {
  x: (value: number) => number;
  y: (value: number) => number;
  px: Float32Array;
  py: Float32Array;
  clipped: number;
}

/** Scales, which leave out the lowest twentieth of a per cent, and where each edge stands. */
function placed(edges: Edges, width: number, height: number) {
  const [left, right] = [MARGIN.left, width - MARGIN.right];
  const [bottom, top] = [height - MARGIN.bottom, MARGIN.top];
  const range = (values: Float32Array, room: number): [number, number] => {
    const sorted = values.filter((value) => value > 0).sort();
    return [sorted[Math.floor(0.0005 * (sorted.length - 1))] ?? 0.01, (sorted.at(-1) ?? 1) * room];
  };
  const x = scaleLog(range(edges.expected, 1.06), [left, right]);
  const y = scaleLog(range(edges.score, 1.12), [bottom, top]);
  const [ax, bx] = line(x.domain() as [number, number], left, right);
  const [ay, by] = line(y.domain() as [number, number], bottom, top);
  const px = new Float32Array(edges.count);
  const py = new Float32Array(edges.count);
  let clipped = 0;
  for (let i = 0; i < edges.count; i++) {
    const [u, v] = [ax + bx * Math.log(edges.expected[i]!), ay + by * Math.log(edges.score[i]!)];
    if (u < left || v > bottom) clipped++;
    px[i] = Math.max(left, u);
    py[i] = Math.min(bottom, v);
  }
  return { x, y, px, py, clipped };
}

/** The line from log values to pixels: offset and slope. */
function line([low, high]: [number, number], from: number, to: number): [number, number] {
  const slope = (to - from) / (Math.log(high) - Math.log(low));
  return [from - slope * Math.log(low), slope];
}

/** A square around a point, given to `paint` cell by cell; none where it would leave the canvas. */
function square(canvas: HTMLCanvasElement, x: number, y: number, size: number, paint: (cell: number) => void) {
  const { width, height } = canvas;
  const [u, v] = [Math.round(x - size / 2), Math.round(y - size / 2)];
  if (u < 0 || v < 0 || u + size > width || v + size > height) return;
  for (let row = v * width; row < (v + size) * width; row += width)
    for (let cell = row + u; cell < row + u + size; cell++) paint(cell);
}

/** All edges as faint squares, which darken where they lie together, pixel by pixel. */
function faintPoints(canvas: HTMLCanvasElement, plot: Plot, count: number, colour: string, density: number): Uint32Array {
  const cells = new Uint32Array(canvas.width * canvas.height);
  const tone = toneOf(colour);
  const shades = new Uint32Array(256); // what a pixel becomes that one more square covers
  for (let a = 0; a < 256; a++) shades[a] = ((a + (255 - a) * 0.26) << 24) | tone;
  const darken = (cell: number) => (cells[cell] = shades[cells[cell]! >>> 24]!);
  const size = Math.max(1, Math.round(1.8 * density));
  for (let i = 0; i < count; i++) square(canvas, plot.px[i]! * density, plot.py[i]! * density, size, darken);
  return cells;
}

/** Those in the brush over them, darker and larger. */
function heldPoints(
  cells: Uint32Array,
  canvas: HTMLCanvasElement,
  plot: Plot,
  { values, fits }: Ranked,
  least: number,
  colour: string,
  density: number,
) {
  const dark = ((0.85 * 255) << 24) | toneOf(colour);
  const paint = (cell: number) => (cells[cell] = dark);
  const size = Math.max(2, Math.round(2.6 * density));
  for (let i = 0; i < values.length; i++)
    if (fits[i] && values[i]! >= least) square(canvas, plot.px[i]! * density, plot.py[i]! * density, size, paint);
}

/** The colour of a pixel without its alpha; little-endian. */
function toneOf(hex: string): number {
  const [red, green, blue] = channels(hex);
  return (blue << 16) | (green << 8) | red;
}

const channels = (hex: string) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)) as [number, number, number];

interface Labelled {
  edge: Edge;
  at: [number, number];
  text: [number, number, boolean];
}

/** Names beside their points, moved apart where they would overlap. */
function spread(points: { edge: Edge; at: [number, number] }[], width: number): Labelled[] {
  const sorted = [...points].sort((a, b) => a.at[1] - b.at[1]);
  const ends = { left: -Infinity, right: -Infinity };
  return sorted.map(({ edge, at }, i) => {
    const left = at[0] > width - 190 || (at[0] > 190 && i % 2 === 1);
    const side = left ? "left" : "right";
    const y = Math.max(at[1] + 4, ends[side] + 16);
    ends[side] = y;
    return { edge, at, text: [left ? at[0] - 12 : at[0] + 12, y, left] as [number, number, boolean] };
  });
}
