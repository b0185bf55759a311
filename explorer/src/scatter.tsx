/** Every edge, observed score against what its two ends alone would give, both on log scales. */

import { scaleLog } from "d3-scale";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Edge, nameOf } from "./edges";
import { Glyph, css, figure, ofLoss, ramp, signed } from "./marks";

const MARGIN = { left: 44, right: 12, top: 8, bottom: 40 };
const TICKS = [0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3, 0.5, 1];
const tick = (t: number) => figure(t, 3).replace(/0+$/, "").replace(/\.$/, "");

interface Props {
  edges: Edge[];
  held: (edge: Edge) => boolean;
  least: number;
  chance: number;
  pin: string;
  behaviour: (head: string) => string | null;
  onPin: (edge: Edge | null) => void;
  onOpen: (edge: Edge) => void;
  width: number;
  height: number;
}

export function Scatter({ edges, held, least, chance, pin, behaviour, onPin, onOpen, width, height }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [hover, setHover] = useState<Edge | null>(null);
  const scales = useMemo(() => {
    const finite = edges.filter((edge) => edge.expected > 0 && edge.score > 0);
    const low = quantile(finite.map((edge) => edge.expected), 0.0005);
    const x = scaleLog([low, Math.max(...finite.map((e) => e.expected)) * 1.06], [MARGIN.left, width - MARGIN.right]);
    const y = scaleLog(
      [quantile(finite.map((e) => e.score), 0.0005), Math.max(...finite.map((e) => e.score)) * 1.12],
      [height - MARGIN.bottom, MARGIN.top],
    );
    return { x, y, below: finite.filter((e) => e.expected < x.domain()[0]! || e.score < y.domain()[0]!).length };
  }, [edges, width, height]);
  const { x, y } = scales;
  const place = (edge: Edge): [number, number] => [
    Math.max(MARGIN.left, x(edge.expected)),
    Math.min(height - MARGIN.bottom, y(edge.score)),
  ];
  const foremost = useMemo(
    () =>
      edges
        .filter((edge) => edge.effect || Math.abs(edge.attribution) > 0.1)
        .sort((a, b) => Number(!!a.effect) - Number(!!b.effect)),
    [edges],
  );

  useEffect(() => {
    const node = canvas.current;
    const pen = node?.getContext("2d");
    if (!node || !pen) return;
    const density = devicePixelRatio || 1;
    node.width = width * density;
    node.height = height * density;
    pen.setTransform(density, 0, 0, density, 0, 0);
    pen.clearRect(0, 0, width, height);
    const ink = css("point");
    pen.fillStyle = ink;
    for (const edge of edges) {
      const inside = held(edge);
      pen.globalAlpha = inside ? 0.85 : 0.26;
      const [px, py] = place(edge);
      const size = inside ? 2.6 : 1.8;
      pen.fillRect(px - size / 2, py - size / 2, size, size);
    }
    pen.globalAlpha = 1;
    const colour = ramp();
    for (const edge of foremost) {
      const [px, py] = place(edge);
      const change = edge.effect?.effect ?? edge.attribution;
      pen.beginPath();
      pen.arc(px, py, edge.effect ? 5.5 : 3.2, 0, 7);
      if (edge.effect) {
        pen.fillStyle = colour(ofLoss(change));
        pen.fill();
        pen.strokeStyle = css("paper");
        pen.lineWidth = 1;
      } else {
        pen.fillStyle = css("paper");
        pen.fill();
        pen.strokeStyle = colour(Math.sign(change) * Math.max(0.45, Math.abs(ofLoss(change))));
        pen.lineWidth = 1.4;
      }
      pen.stroke();
    }
  });

  const nearest = (event: PointerEvent): Edge | null => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    let best: Edge | null = null;
    let distance = 14 ** 2;
    for (const edge of edges) {
      const [px, py] = place(edge);
      const d = (px - mx) ** 2 + (py - my) ** 2 - (edge.effect ? 40 : 0);
      if (d < distance) [best, distance] = [edge, d];
    }
    return best;
  };
  const pinned = edges.find((edge) => nameOf(edge) === pin) ?? null;
  const order = useMemo(() => [...edges].sort((a, b) => b.lift - a.lift), [edges]);
  const keyed = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      const at = pinned ? order.indexOf(pinned) : step > 0 ? -1 : order.length;
      onPin(order[Math.max(0, Math.min(order.length - 1, at + step))] ?? null);
      event.preventDefault();
    } else if (event.key === "Enter" && pinned) onOpen(pinned);
  };
  const lines = [-3, -2, -1, 0, 1, 2, 3];
  const [x0, x1] = x.domain() as [number, number];
  const clipped = `M${MARGIN.left},${MARGIN.top}H${width - MARGIN.right}V${height - MARGIN.bottom}H${MARGIN.left}Z`;
  const along = (lift: number) =>
    `M${x(x0)},${y(x0 * 2 ** (lift / 2))}L${x(x1)},${y(x1 * 2 ** (lift / 2))}`;
  const named = foremost.filter((edge) => edge.effect?.kind === "asked" && Math.abs(edge.effect.effect) > 0.3);
  const labels = spread(named.map((edge) => ({ edge, at: place(edge) })), width);
  return (
    <div class="scatter" style={{ width, height }}>
      <svg width={width} height={height} class="under" aria-hidden="true">
        <clipPath id="plot">
          <path d={clipped} />
        </clipPath>
        <g clip-path="url(#plot)">
          <path
            class="brush"
            d={`${along(least)}L${x(x1)},${MARGIN.top - 400}L${x(x0)},${MARGIN.top - 400}Z`}
          />
          {lines.map((lift) => (
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
        tabIndex={0}
        role="application"
        aria-label={`${edges.length} edges; arrows go through them by lift, Enter opens`}
        onPointerMove={(event) => setHover(nearest(event as unknown as PointerEvent))}
        onPointerLeave={() => setHover(null)}
        onClick={(event) => onPin(nearest(event as unknown as PointerEvent))}
        onDblClick={(event) => {
          const edge = nearest(event as unknown as PointerEvent);
          if (edge) onOpen(edge);
        }}
        onKeyDown={keyed}
      >
        {labels.map(({ edge, at, text }) => (
          <g key={nameOf(edge)} class="named">
            <path d={`M${at[0]},${at[1]}L${text[0]},${text[1] - 4}`} />
            <text x={text[0]} y={text[1]} text-anchor={text[2] ? "end" : "start"}>
              {edge.writer} → {edge.reader} <tspan class="effect">{signed(edge.effect!.effect)}</tspan>
            </text>
          </g>
        ))}
        {pinned && (
          <circle class="pin" cx={place(pinned)[0]} cy={place(pinned)[1]} r={8.5} />
        )}
        {hover && <circle class="hover" cx={place(hover)[0]} cy={place(hover)[1]} r={7} />}
      </svg>
      {hover && (
        <div
          class="tip"
          style={{
            left: Math.min(width - 260, place(hover)[0] + 14),
            top: Math.max(0, place(hover)[1] - 70),
          }}
        >
          <b>
            <svg class="sign" width="12" height="12" viewBox="-6 -6 12 12">
              <Glyph behaviour={behaviour(hover.writer)} />
            </svg>{" "}
            {hover.writer} → {hover.reader}.{hover.port}
          </b>
          <br />
          score {figure(hover.score)}, {figure(hover.score / chance, 1)} × chance, lift {signed(hover.lift)}
          <br />
          {hover.effect
            ? `removed: ${signed(hover.effect.effect)} nats`
            : Number.isNaN(hover.attribution)
              ? "not run"
              : `first order: ${signed(hover.attribution)} nats`}
        </div>
      )}
      {scales.below > 0 && <p class="note clip">{scales.below} pairs stand on the axes, which end before them.</p>}
    </div>
  );
}

function quantile(values: number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(q * (sorted.length - 1))] ?? 0.01;
}

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
