/** Who could erase what whom wrote: the strongest pair of every two layers, and the foremost of all. */

import { useMemo } from "preact/hooks";
import { isHead } from "./edges";
import { Sign, figure, ramp, signed } from "./marks";
import { type SectionProps, columns } from "./structure";
import { Tip, significant, useSteps } from "./structure-axes";
import type { Erasure } from "./structure-document";
import { Behind } from "./table";

interface Cell {
  writing: number;
  erasing: number;
  value: number;
  writer: string;
  eraser: string;
}

const LISTED = 14;
const END = 0.6;
/** Where an alignment stands on the ramp: linear, ends at ±.6; what is erased is below. */
const ofAlignment = (value: number) => Math.max(-1, Math.min(1, -value / END));

export function ErasingPairs({ map, erasure, go, width, theme }: SectionProps & { erasure: Erasure }) {
  const colour = useMemo(ramp, [theme]);
  const cells = erasure.largest.map(
    (value, i): Cell => ({
      value,
      writing: erasure.writing[i]!,
      erasing: erasure.erasing[i]!,
      writer: erasure.writer[i]!,
      eraser: erasure.eraser[i]!,
    }),
  );
  const open = (label: string) => isHead(label) && go({ page: "head", name: label, state: {} });
  const said_ = (cell: Cell) => `${cell.writer} erased by ${cell.eraser}, alignment ${signed(cell.value)}`;
  const { current, set, stop, said } = useSteps(
    cells,
    said_,
    (cell) => open(cell.eraser),
    (from, key) => {
      const writing = from.writing + ({ ArrowRight: 1, ArrowLeft: -1 }[key] ?? 0);
      const erasing = from.erasing + ({ ArrowDown: 1, ArrowUp: -1 }[key] ?? 0);
      return cells.find((cell) => cell.writing === writing && cell.erasing === erasing);
    },
  );
  const { across, each } = columns(width, 2);
  const side = across > 1 ? Math.round((width - 40) * 0.5) : each;
  const [left, top] = [52, 22];
  const depths = map.layers + 1;
  const wide = (side - left - 8) / depths;
  const tall = Math.min(wide, 560 / map.layers);
  const height = top + tall * map.layers + 38;
  const under = height - 20;
  const x = (layer: number) => left + wide * (layer + 1);
  const y = (layer: number) => top + tall * layer;
  const every = Math.ceil(map.layers / 8) || 1;
  const marked = Array.from({ length: map.layers }, (_, layer) => layer).filter((layer) => layer % every === 0);
  const foremost = new Set(erasure.pairs.slice(0, LISTED).map((pair) => `${pair.writer}>${pair.eraser}`));
  const behaviour = (label: string) => map.behaviours[label]?.label ?? null;
  const rows = () => erasure.pairs.map((pair) => ({ ...pair }));
  return (
    <div class="charts">
      <div class="chart" style={{ width: side }}>
        <h3>
          Who could erase what whom wrote{" "}
          <Behind
            name="erasing-layers"
            rows={() =>
              cells.map((cell) => ({
                writing_layer: cell.writing < 0 ? "embed" : cell.writing,
                erasing_layer: cell.erasing,
                alignment: cell.value,
                writer: cell.writer,
                eraser: cell.eraser,
              }))
            }
          />
        </h3>
        <p class="note">
          Cell: the pair of largest alignment between two layers. +1: the eraser subtracts just what was written; below 0 it adds to it.
          Outlined: the foremost pairs.
        </p>
        <div class="plot" style={{ width: side, height }}>
          <svg width={side} height={height} role="img" aria-label={`${cells.length} pairs of layers by erasure`} {...stop} onPointerLeave={() => set(null)}>
            <text class="axis" x={0} y={12}>
              ↓ erasing layer
            </text>
            {cells.map((cell) => (
              <rect
                key={`${cell.writing} ${cell.erasing}`}
                x={x(cell.writing) + 0.4}
                y={y(cell.erasing) + 0.4}
                width={Math.max(1, wide - 0.8)}
                height={Math.max(1, tall - 0.8)}
                fill={colour(ofAlignment(cell.value))}
                class={foremost.has(`${cell.writer}>${cell.eraser}`) ? "cell outlined" : "cell"}
                onPointerEnter={() => set(cell)}
                onClick={() => open(cell.eraser)}
              />
            ))}
            {marked.map((layer) => (
              <g key={layer}>
                <text class="axis" x={left - 8} y={y(layer) + tall / 2 + 4} text-anchor="end">
                  {layer}
                </text>
                <text class="axis" x={x(layer) + wide / 2} y={under} text-anchor="middle">
                  {layer}
                </text>
              </g>
            ))}
            <text class="axis" x={x(-1)} y={under} text-anchor="middle">
              embed
            </text>
            <text class="axis" x={side} y={height - 4} text-anchor="end">
              writing layer →
            </text>
            {current && (
              <rect class="cursor" x={x(current.writing)} y={y(current.erasing)} width={wide} height={tall} />
            )}
          </svg>
          <p class="legend in-corner">
            adds, −.6 <span class="ramp reversed" /> +.6, erases
          </p>
          {current && (
            <Tip x={x(current.writing)} y={y(current.erasing)} width={side}>
              <b>
                {current.writer} → {current.eraser}
              </b>
              <br />
              alignment {signed(current.value)}
            </Tip>
          )}
          {said}
        </div>
      </div>
      <div class="chart" style={{ width: across > 1 ? width - 40 - side : each }}>
        <h3>
          The foremost pairs{" "}
          <small>
            {Math.min(LISTED, erasure.pairs.length)} of {erasure.of.toLocaleString("en")}
          </small>{" "}
          <Behind name="erasing-pairs" rows={rows} />
        </h3>
        <table class="edges">
          <thead>
            <tr>
              <th>what was written → its eraser</th>
              <th>alignment</th>
              <th>from chance, s.d.</th>
              <th>share removed at norm scalar {significant(erasure.norm_scalar)}</th>
            </tr>
          </thead>
          <tbody>
            {erasure.pairs.slice(0, LISTED).map((pair) => (
              <tr key={`${pair.writer}>${pair.eraser}`} tabIndex={0} onClick={() => open(pair.eraser)} onKeyDown={(event) => event.key === "Enter" && open(pair.eraser)}>
                <td>
                  {isHead(pair.writer) && <Sign behaviour={behaviour(pair.writer)} />} <b>{pair.writer}</b> →{" "}
                  {isHead(pair.eraser) && <Sign behaviour={behaviour(pair.eraser)} />} <b>{pair.eraser}</b>
                </td>
                <td>{figure(pair.alignment)}</td>
                <td>{pair.z === null ? "–" : signed(pair.z, Math.abs(pair.z) < 10 ? 1 : 0)}</td>
                <td>{significant(pair.erasure)}</td>
              </tr>
            ))}
          </tbody>
        </table>
        <p class="note">
          If the eraser attends to nothing but the place where it was written. A share above 1 removes more than there was: the weights
          alone do not fix the scale. {erasure.of > erasure.pairs.length ? `The table has the ${erasure.pairs.length} of largest alignment.` : ""}
        </p>
      </div>
    </div>
  );
}
