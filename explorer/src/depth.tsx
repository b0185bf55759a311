/** The width of the stream by depth, which runs downwards: directions in use, and what all maps together would need. */

import { type Table, column, numbers } from "./data";
import { Behind } from "./table";

interface Props {
  bandwidth: Table;
  layers: number;
  width: number;
  height: number;
  /** Where the crosshair is, as a share of the depth; null without one. */
  depth: number | null;
}

const BOTTOM = 34;

/** Directions in use at each depth, as entropy ranks. */
export function Depth({ bandwidth, layers, width, height, depth }: Props) {
  const d = Number(bandwidth.stamp.d_model);
  const [written, read, live] = ["written_entropy_rank", "read_entropy_rank_blocks", "live_entropy_rank"].map((name) =>
    numbers(bandwidth, name),
  ) as [number[], number[], number[]];
  const x = (value: number) => 8 + ((width - 24) * value) / d;
  const { y, path, states } = axes(bandwidth, height, x);
  const late = Math.floor(states * 0.72);
  const at = depth === null ? null : Math.max(0, Math.min(states - 1, Math.round(depth * (states - 1))));
  const rows = () =>
    bandwidth.labels.map((state, i) => ({
      state,
      after: String(column(bandwidth, "after")[i] ?? ""),
      written: written[i]!,
      read_later: read[i]!,
      live: live[i]!,
    }));
  return (
    <section>
      <h2>
        Directions in use at each depth <Behind name="bandwidth" rows={rows} />
      </h2>
      <div class="matrix">
        <svg width={width} height={height + BOTTOM} role="img" aria-label="entropy ranks of what is written, read later, and live, by depth">
          <path class="area" d={`${path(live)}L8,${y(states - 1)}L8,${y(0)}Z`} />
          {[0, 1 / 3, 2 / 3, 1].map((share) => (
            <g key={share} class="tick">
              <path d={`M${x(d * share)},0V${y(states - 1)}`} />
              <text x={x(d * share)} y={height + 14} text-anchor="middle">
                {Math.round(d * share)}
              </text>
            </g>
          ))}
          <path class="curve thin" d={path(live)} />
          <path class="curve" d={path(written)} />
          <path class="curve dashed" d={path(read)} />
          {(
            [
              ["written", written, late, 6],
              ["read later", read, Math.floor(states * 0.12), -6],
              ["live", live, Math.floor(states * 0.5), -6],
            ] as const
          ).map(([label, values, at, shift]) => (
            <text key={label} class="part" x={x(values[at] || 0) + shift} y={y(at)} text-anchor={shift < 0 ? "end" : "start"}>
              {label}
            </text>
          ))}
          {at !== null && <path class="crosshair" d={`M0,${y(at)}H${width}`} />}
          <text x={8} y={height + 30}>
            entropy rank, of {d}
          </text>
        </svg>
        {at !== null && (
          <div class="tip" style={{ left: 12, top: Math.min(height - 60, y(at) + 8) }}>
            <b>after {String(column(bandwidth, "after")[at] ?? `state ${at}`)}</b>
            <br />
            written {Math.round(written[at]!)} · read {Math.round(read[at]!)} · live {Math.round(live[at]!)}
            <br />
            {numbers(bandwidth, "writers")[at]} writers, {numbers(bandwidth, "readers")[at]} readers to come
          </div>
        )}
      </div>
      <p class="note">Depth from the embedding, above, to the unembedding, after {layers} layers, below.</p>
    </section>
  );
}

/** How many times the width of the stream all writers before, and all readers after, would need. */
export function Demand({ bandwidth, width, height, depth }: Props) {
  const [written, read] = ["oversubscription", "read_oversubscription"].map((name) => numbers(bandwidth, name)) as [number[], number[]];
  const most = Math.max(...written, ...read);
  const x = (value: number) => 8 + ((width - 24) * value) / most;
  const { y, path, states } = axes(bandwidth, height, x);
  const ends = [0.5, 1].map((share) => Number((most * share).toPrecision(1)));
  return (
    <section>
      <h2>
        Demand{" "}
        <Behind
          name="demand"
          rows={() => bandwidth.labels.map((state, i) => ({ state, written_ranks_over_width: written[i]!, read_ranks_over_width: read[i]! }))}
        />
      </h2>
      <svg width={width} height={height + BOTTOM} role="img" aria-label="sum of ranks of writers before and readers after each depth, over the width">
        {[1, ...ends].map((value) => (
          <g key={value} class="tick">
            <path d={`M${x(value)},0V${y(states - 1)}`} />
            <text x={x(value)} y={height + 14} text-anchor="middle">
              {value} ×
            </text>
          </g>
        ))}
        <path class="curve" d={path(written)} />
        <path class="curve dashed" d={path(read)} />
        <text class="part" x={x(written[Math.floor(states * 0.85)]!) + 4} y={y(states * 0.78)}>
          written
        </text>
        <text class="part" x={x(read[Math.floor(states * 0.12)]!) - 6} y={y(states * 0.12)} text-anchor="end">
          read later
        </text>
        {depth !== null && <path class="crosshair" d={`M0,${height * depth}H${width}`} />}
        <text x={8} y={height + 30}>
          sum of ranks over width
        </text>
      </svg>
    </section>
  );
}

function axes(bandwidth: Table, height: number, x: (value: number) => number) {
  const states = bandwidth.labels.length;
  const y = (state: number) => (height * state) / Math.max(1, states - 1);
  const path = (values: number[]) =>
    values.map((value, i) => (Number.isNaN(value) ? "" : `${i ? "L" : "M"}${x(value)},${y(i)}`)).join("");
  return { y, path, states };
}
