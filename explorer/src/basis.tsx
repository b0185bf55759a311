/** Whether the coordinates of the stream are special: kurtosis and energy of each, beside a rotated model. */

import { figure, percent } from "./marks";
import { type SectionProps, columns } from "./structure";
import { Axes, Missing, Tip, decades, framed, significant, useSteps } from "./structure-axes";
import type { Basis } from "./structure-document";
import { Behind } from "./table";

const SIDES = { write: "written", read: "read" } as const;

export function BasisSection({ map, structure, width }: SectionProps) {
  const { basis } = structure;
  const { across, each } = columns(width, 3);
  if (!basis) {
    return (
      <section id="basis">
        <h2 class="part-title">Basis: are its axes special?</h2>
        <Missing what="Kurtosis and energy of the coordinates are" command={`vweights map ${map.model} -o ATLAS --only basis`} />
      </section>
    );
  }
  const energies = (["write_energy", "read_energy"] as const).map((name) => basis.columns[name]);
  return (
    <section id="basis">
      <h2 class="part-title">Basis: are its axes special?</h2>
      <p class="lead">
        Rotating the stream changes nothing that the model computes. If weights prefer some axes all the same, their kurtosis over
        coordinates is above {figure(basis.gaussian, 2)}, that of a direction without a preferred axis.
      </p>
      <div class="charts">
        {(["write", "read"] as const).map((side) => (
          <Coordinates key={side} basis={basis} side={side} width={each} />
        ))}
        <div class="chart" style={{ width: across === 2 ? width : each }}>
          <h3>
            Massive coordinates{" "}
            <small>
              {basis.of_massive} of {map.width}, above {significant(basis.threshold)} × the mean
            </small>
            <Behind
              name="massive"
              rows={() => basis.massive.map((i) => ({ coordinate: i, ...Object.fromEntries(Object.entries(basis.columns).map(([name, values]) => [name, values[i] ?? null])) }))}
            />
          </h3>
          {basis.massive.length ? (
            <table>
              <thead>
                <tr>
                  <th>coordinate</th>
                  <th>energy written</th>
                  <th>read</th>
                  <th>kurtosis written</th>
                  <th>read</th>
                </tr>
              </thead>
              <tbody>
                {basis.massive.slice(0, 10).map((i) => (
                  <tr key={i}>
                    <td>{i}</td>
                    <td>{significant(basis.columns.write_energy[i])} ×</td>
                    <td>{significant(basis.columns.read_energy[i])} ×</td>
                    <td>{significant(basis.columns.write_kurtosis[i])}</td>
                    <td>{significant(basis.columns.read_kurtosis[i])}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          ) : (
            <p class="note">
              None. The largest energy is {significant(Math.max(...energies.flat().map((value) => value ?? 0)))} times the mean.
            </p>
          )}
          {basis.of_massive > 10 && <p class="note">{basis.of_massive - 10} more{basis.of_massive > basis.massive.length ? `, the first ${basis.massive.length - 10} of them in the table` : " in the table"}.</p>}
          {basis.of_massive > 0 && (
            <p class="note">
              They hold{" "}
              {percent(basis.massive.reduce((sum, i) => sum + (basis.columns.write_energy[i] ?? 0), 0) / map.width)} of the energy written and{" "}
              {percent(basis.massive.reduce((sum, i) => sum + (basis.columns.read_energy[i] ?? 0), 0) / map.width)} of what is read, in{" "}
              {percent(basis.massive.length / map.width)} of the dimensions.
            </p>
          )}
        </div>
      </div>
    </section>
  );
}

interface Point {
  coordinate: number;
  energy: number;
  kurtosis: number;
}

/** Each coordinate by energy and by what it adds to the kurtosis, over the line of Gaussian weights. */
function Coordinates({ basis, side, width }: { basis: Basis; side: "write" | "read"; width: number }) {
  const [energy, kurtosis] = [basis.columns[`${side}_energy`], basis.columns[`${side}_kurtosis`]];
  const points = energy
    .map((value, coordinate): Point => ({ coordinate, energy: value ?? NaN, kurtosis: kurtosis[coordinate] ?? NaN }))
    .filter((point) => point.energy > 0 && point.kurtosis > 0)
    .sort((a, b) => b.kurtosis - a.kurtosis);
  const { current, set, stop, said } = useSteps(
    points,
    (point) => `coordinate ${point.coordinate}: energy ${significant(point.energy)} times the mean, kurtosis ${significant(point.kurtosis)}`,
  );
  const { trained, turned, quantiles } = basis.means[side];
  if (!points.length) return null;
  const frame = framed(width, 340, 44, 26);
  const ends = (values: number[]) => [Math.min(...values) / 1.25, Math.max(...values) * 1.35] as const;
  const [x0, x1] = ends([...points.map((point) => point.energy), basis.threshold]);
  const [y0, y1] = ends([...points.map((point) => point.kurtosis), quantiles[0] ?? 3, quantiles[2] ?? 3]);
  const log = (value: number, from: number, to: number) => Math.log(value / from) / Math.log(to / from);
  const x = (value: number) => frame.left + (frame.right - frame.left) * log(value, x0, x1);
  const y = (value: number) => frame.bottom - (frame.bottom - frame.top) * log(value, y0, y1);
  const massive = new Set(basis.massive);
  const named: Point[] = [];
  for (const point of points) {
    const free = (other: Point) => Math.abs(x(other.energy) - x(point.energy)) > 34 || Math.abs(y(other.kurtosis) - y(point.kurtosis)) > 12;
    if (massive.has(point.coordinate) && named.every(free)) named.push(point);
  }
  const clip = `clip-${side}`;
  const at = (event: { clientX: number; clientY: number; currentTarget: Element }) => {
    const box = event.currentTarget.getBoundingClientRect();
    let [best, distance]: [Point | null, number] = [null, 400];
    for (const point of points) {
      const d = (x(point.energy) - event.clientX + box.left) ** 2 + (y(point.kurtosis) - event.clientY + box.top) ** 2;
      if (d < distance) [best, distance] = [point, d];
    }
    set(best);
  };
  return (
    <div class="chart" style={{ width }}>
      <h3>
        What is {SIDES[side]}{" "}
        <small>
          mean kurtosis {figure(trained, 2)}, rotated {figure(turned, 2)}
        </small>{" "}
        <Behind name={`basis-${side}`} rows={() => points.map((point) => ({ ...point }))} />
      </h3>
      <div class="plot" style={{ width, height: frame.height }}>
        <svg
          width={width}
          height={frame.height}
          role="img"
          aria-label={`${points.length} coordinates by energy and kurtosis of what is ${SIDES[side]}; mean kurtosis ${figure(trained, 2)}, rotated ${figure(turned, 2)}`}
          {...stop}
          onPointerMove={(event) => at(event)}
          onPointerLeave={() => set(null)}
        >
          <clipPath id={clip}>
            <rect x={frame.left} y={frame.top} width={frame.right - frame.left} height={frame.bottom - frame.top} />
          </clipPath>
          <rect class="brush" x={x(basis.threshold)} y={frame.top} width={Math.max(0, frame.right - x(basis.threshold))} height={frame.bottom - frame.top} />
          {quantiles[0] && quantiles[2] && (
            <rect class="range" x={frame.left} width={frame.right - frame.left} y={y(quantiles[2])} height={y(quantiles[0]) - y(quantiles[2])} />
          )}
          <Axes
            frame={frame}
            x={x}
            y={y}
            xTicks={decades(x0, x1).map((t) => [t, significant(t)])}
            yTicks={decades(y0, y1).map((t) => [t, significant(t)])}
            xTitle="energy over the mean (log)"
            yTitle="what it adds to the kurtosis (log)"
          />
          <g clip-path={`url(#${clip})`}>
            <path class="as-expected" d={`M${x(x0)},${y(basis.gaussian * x0 ** 2)}L${x(x1)},${y(basis.gaussian * x1 ** 2)}`} />
          </g>
          {points.map((point) => (
            <circle key={point.coordinate} class={massive.has(point.coordinate) ? "mark" : "point"} cx={x(point.energy)} cy={y(point.kurtosis)} r={massive.has(point.coordinate) ? 3.6 : 1.8} />
          ))}
          {named.map((point) => {
            const late = x(point.energy) > frame.right - 36;
            return (
              <text key={point.coordinate} class="part" x={x(point.energy) + (late ? -7 : 7)} y={y(point.kurtosis) + 4} text-anchor={late ? "end" : "start"}>
                {point.coordinate}
              </text>
            );
          })}
          {current && <circle class="pin" cx={x(current.energy)} cy={y(current.kurtosis)} r={7} />}
        </svg>
        {current && (
          <Tip x={x(current.energy)} y={y(current.kurtosis)} width={width}>
            <b>coordinate {current.coordinate}</b>
            <br />
            energy {significant(current.energy)} × the mean, kurtosis {significant(current.kurtosis)}
          </Tip>
        )}
        {said}
      </div>
      <p class="note">Line: what Gaussian weights of that energy would add. Band: 98 % of the coordinates of a rotated model. Shaded: massive.</p>
    </div>
  );
}
