/** How crowded the stream is: cosines of its directions, what they cost each other, and what can be read back. */

import { useState } from "preact/hooks";
import { figure } from "./marks";
import { type SectionProps, columns } from "./structure";
import { Axes, Missing, Tip, decades, framed, raised, significant } from "./structure-axes";
import type { Crowd } from "./structure-document";
import { Behind } from "./table";

const KINDS: Record<string, string> = {
  out: "what neurons write",
  in: "what neurons read",
  gate: "what gates read",
  ov: "the strongest direction of every head",
  enc: "what features read",
  dec: "what features write",
};
const METHODS: Record<string, string> = {
  known_support: "if the active ones are known",
  sparse: "sparse recovery",
  least_squares: "least squares",
  matched: "own projection",
};

export function SuperpositionSection({ map, structure, address, go, width }: SectionProps) {
  const kinds = Object.keys(structure.crowds ?? {});
  const kind = kinds.includes(address.state.kind ?? "") ? address.state.kind! : kinds[0];
  const { each } = columns(width, 3);
  if (!kind) {
    return (
      <section id="superposition">
        <h2 class="part-title">Superposition: more directions than dimensions</h2>
        <Missing what="Cosines of the model's directions are" command={`vweights map ${map.model} -o ATLAS --only superposition`} />
      </section>
    );
  }
  const crowd = structure.crowds![kind]!;
  const { coherence, interference, recovery } = crowd;
  return (
    <section id="superposition">
      <h2 class="part-title">Superposition: more directions than dimensions</h2>
      <p class="lead">
        {coherence
          ? `${coherence.directions.toLocaleString("en")} directions (${KINDS[kind]}) in ${coherence.dimension} dimensions cannot all be orthogonal.`
          : `Directions: ${KINDS[kind]}.`}{" "}
        {kinds.length > 1 &&
          kinds.map((name) => (
            <button key={name} class="port" aria-pressed={name === kind} onClick={() => go({ state: { ...address.state, kind: name } })}>
              {KINDS[name] ?? name}
            </button>
          ))}
      </p>
      {coherence && <Figures coherence={coherence} exponent={interference?.exponents.error ?? null} />}
      <div class="charts">
        {coherence && <Cosines coherence={coherence} width={each} name={`cosines-${kind}`} />}
        {interference && <Growth interference={interference} width={each} name={`interference-${kind}`} />}
        {recovery && <Fidelity recovery={recovery} width={each} name={`recovery-${kind}`} />}
      </div>
    </section>
  );
}

type Exponent = { exponent: number; low: number; high: number; random: number } | null;

function Figures({ coherence, exponent }: { coherence: NonNullable<Crowd["coherence"]>; exponent: Exponent }) {
  const more = coherence.mean_square / coherence.random_mean_square - 1;
  return (
    <dl class="three">
      <div>
        <dt>Largest cosine</dt>
        <dd>
          <b>{figure(coherence.largest)}</b>
          <small>{coherence.largest_pair.join(" and ")}</small>
        </dd>
      </div>
      <div>
        <dt>At random</dt>
        <dd>
          <b>{figure(coherence.random_largest)}</b>
          <small>largest of as many random directions</small>
        </dd>
      </div>
      <div>
        <dt>At best</dt>
        <dd>
          <b>{figure(coherence.welch)}</b>
          <small>Welch bound: no arrangement stays below</small>
        </dd>
      </div>
      <div>
        <dt>Mean square</dt>
        <dd>
          <b>{significant(coherence.mean_square)}</b>
          <small>
            {more >= 0 ? `${(100 * more).toFixed(0)} % above random` : `${(-100 * more).toFixed(0)} % below random`}, at best{" "}
            {significant(coherence.welch ** 2)}
          </small>
        </dd>
      </div>
      {exponent && (
        <div>
          <dt>Interference grows as</dt>
          <dd>
            <b>
              n<sup>{exponent.exponent.toFixed(2)}</sup>
            </b>
            <small>
              {exponent.low.toFixed(2)} to {exponent.high.toFixed(2)}; random {exponent.random.toFixed(2)}
            </small>
          </dd>
        </div>
      )}
    </dl>
  );
}

/** Pairs by cosine, on a log scale, over what random directions would have. */
function Cosines({ coherence, width, name }: { coherence: NonNullable<Crowd["coherence"]>; width: number; name: string }) {
  const [at, setAt] = useState<number | null>(null);
  const { count, random, welch, largest, random_largest } = coherence;
  const bins = count.length;
  const frame = framed(width, 300, 44, 44);
  const top = Math.log10(Math.max(...count, ...random, 10));
  const x = (value: number) => frame.left + (frame.right - frame.left) * value;
  const y = (value: number) => frame.bottom - ((frame.bottom - frame.top) * Math.max(0, Math.log10(Math.max(value, 0.7)) + 0.155)) / (top + 0.155);
  const steps = (values: number[]) =>
    values.map((value, i) => `${i ? "L" : "M"}${x(i / bins)},${y(value)}H${x((i + 1) / bins)}`).join("");
  const every = Math.ceil(top / 4);
  const ticks = Array.from({ length: Math.floor(top / every) + 1 }, (_, i): [number, string] => [10 ** (i * every), i ? `10${raised(i * every)}` : "1"]);
  const marks: [number, string][] = [
    [welch, `Welch ${figure(welch)}`],
    [random_largest, `random up to ${figure(random_largest)}`],
    [largest, `model up to ${figure(largest)}`],
  ];
  const rows = () =>
    count.map((value, i) => ({ cosine_from: i / bins, cosine_to: (i + 1) / bins, pairs: value, pairs_of_random: random[i]! }));
  return (
    <div class="chart" style={{ width }}>
      <h3>
        How close they lie <small>pairs by |cosine|, log scale</small> <Behind name={name} rows={rows} />
      </h3>
      <svg
        width={width}
        height={frame.height}
        role="img"
        aria-label={`pairs of directions by cosine: up to ${figure(largest)}, of random directions up to ${figure(random_largest)}`}
        onPointerMove={(event) => {
          const place = event.clientX - event.currentTarget.getBoundingClientRect().left;
          const bin = Math.floor((bins * (place - frame.left)) / (frame.right - frame.left));
          setAt(bin >= 0 && bin < bins ? bin : null);
        }}
        onPointerLeave={() => setAt(null)}
      >
        <Axes
          frame={frame}
          x={x}
          y={y}
          xTicks={[0, 0.2, 0.4, 0.6, 0.8, 1].map((t) => [t, figure(t, 1).replace(/^\.0$|^0\.0$/, "0").replace("1.0", "1")])}
          yTicks={ticks}
          xTitle="|cosine| of two directions"
          yTitle="pairs"
        />
        <path class="random-area" d={`${steps(random)}V${frame.bottom}H${frame.left}Z`} />
        <path class="curve" d={steps(count)} />
        {marks.map(([value, text], i) => {
          const late = x(value) > width * 0.66;
          return (
            <g key={text}>
              <path class="least" d={`M${x(value)},${frame.top - 14 + 14 * i - 6}V${frame.bottom}`} />
              <text class="line-label" x={x(value) + (late ? -4 : 4)} y={frame.top - 14 + 14 * i} text-anchor={late ? "end" : "start"}>
                {text}
              </text>
            </g>
          );
        })}
        {at !== null && <rect class="cursor" x={x(at / bins)} y={frame.top} width={(frame.right - frame.left) / bins} height={frame.bottom - frame.top} />}
      </svg>
      {at !== null && (
        <Tip x={x(at / bins)} y={90} width={width}>
          |cosine| {figure(at / bins, 2)} to {figure((at + 1) / bins, 2)}
          <br />
          {count[at]!.toLocaleString("en")} pairs, {random[at]!.toLocaleString("en")} of random directions
        </Tip>
      )}
      <p class="legend">
        <i class="line" /> the model <i class="area-key" /> random directions
      </p>
    </div>
  );
}

/** What n signals at once add to the reading of one. */
function Growth({ interference, width, name }: { interference: NonNullable<Crowd["interference"]>; width: number; name: string }) {
  const { n, error, random_error, exponents } = interference;
  const frame = framed(width, 300, 44, 44);
  const ends = [...error, ...random_error].filter((value): value is number => value !== null && value > 0);
  const [low, high] = [Math.min(...ends) / 1.3, Math.max(...ends) * 1.3];
  const log = (value: number, from: number, to: number) => Math.log(value / from) / Math.log(to / from);
  const x = (value: number) => frame.left + 10 + (frame.right - frame.left - 20) * log(value, n[0]!, n.at(-1)!);
  const y = (value: number) => frame.bottom - (frame.bottom - frame.top) * log(value, low, high);
  const path = (values: (number | null)[]) =>
    values.map((value, i) => (value ? `${i ? "L" : "M"}${x(n[i]!)},${y(value)}` : "")).join("");
  const fit = exponents.error ?? null;
  const label = `error of one signal among n${fit ? `: grows as n to the ${fit.exponent.toFixed(2)}, of random directions ${fit.random.toFixed(2)}` : ""}`;
  const rows = () =>
    n.map((signals, i) => ({
      signals,
      error: error[i] ?? null,
      random_error: random_error[i] ?? null,
      total: interference.total[i] ?? null,
      random_total: interference.random_total[i] ?? null,
    }));
  const shown = n.filter((_, i) => i % Math.ceil(n.length / (width / 56)) === 0);
  return (
    <div class="chart" style={{ width }}>
      <h3>
        What they cost each other <small>both log scales</small> <Behind name={name} rows={rows} />
      </h3>
      <svg width={width} height={frame.height} role="img" aria-label={label}>
        <Axes
          frame={frame}
          x={x}
          y={y}
          xTicks={shown.map((t) => [t, String(t)])}
          yTicks={decades(low, high).map((t) => [t, significant(t)])}
          xTitle="signals at once, n"
          yTitle="mean squared error of one signal (1: as large as the signal)"
        />
        <path class="curve dashed" d={path(random_error)} />
        <path class="curve" d={path(error)} />
        {error.map((value, i) => (value ? <circle key={i} class="mark" cx={x(n[i]!)} cy={y(value)} r={3} /> : null))}
      </svg>
      <p class="legend">
        <i class="line" /> the model <i class="line dashed" /> random directions
      </p>
      {exponents.total && (
        <p class="note">
          The sum over all pairs grows as n<sup>{exponents.total.exponent.toFixed(2)}</sup> ({exponents.total.low.toFixed(2)} to{" "}
          {exponents.total.high.toFixed(2)}), of random directions as n<sup>{exponents.total.random.toFixed(2)}</sup>.
        </p>
      )}
    </div>
  );
}

/** Which of n signals can be read back, by method. */
function Fidelity({ recovery, width, name }: { recovery: NonNullable<Crowd["recovery"]>; width: number; name: string }) {
  const { n, methods, directions } = recovery;
  const frame = framed(width, 300, 44, 44);
  const named = width > 400 ? 104 : 84;
  const inner = frame.right - named;
  const x = (value: number) => frame.left + 10 + ((inner - frame.left - 10) * Math.log(value / n[0]!)) / Math.log((n.at(-1) ?? 2) / n[0]! || 2);
  const y = (value: number) => frame.bottom - (frame.bottom - frame.top) * value;
  const path = (values: (number | null)[]) =>
    values.map((value, i) => (value === null ? "" : `${i ? "L" : "M"}${x(n[i]!)},${y(value)}`)).join("");
  const lines = methods
    .map((method, i) => ({ ...method, style: i, end: method.fidelity.at(-1) ?? 0 }))
    .sort((a, b) => b.end - a.end);
  const names: number[] = [];
  for (const line of lines) names.push(Math.max(y(line.end) + 4, (names.at(-1) ?? -99) + 26));
  const rows = () =>
    n.map((signals, i) => ({
      signals,
      ...Object.fromEntries(methods.map((method) => [method.name, method.fidelity[i] ?? null])),
      chance: signals / (2 * directions),
    }));
  return (
    <div class="chart" style={{ width }}>
      <h3>
        What can be read back <small>of n signals at once</small> <Behind name={name} rows={rows} />
      </h3>
      <svg width={width} height={frame.height} role="img" aria-label={`share of signals recovered by ${methods.length} methods`}>
        <Axes
          frame={{ ...frame, right: inner }}
          x={x}
          y={y}
          xTicks={n.filter((_, i) => i % Math.ceil(n.length / (width / 56)) === 0).map((t) => [t, String(t)])}
          yTicks={[0, 0.25, 0.5, 0.75, 1].map((t) => [t, significant(t)])}
          xTitle={`signals at once, among ${directions.toLocaleString("en")}`}
          yTitle="share recovered with the right sign"
        />
        <path class="curve thin dotted" d={path(n.map((one) => one / (2 * directions)))} />
        {lines.map((line, i) => {
          const text = METHODS[line.name] ?? line.name.replaceAll("_", " ");
          const [first, ...rest] = text.split(" ");
          const half = Math.ceil(rest.length / 2);
          const two = text.length * 5.6 > named ? [[first, ...rest.slice(0, half)].join(" "), rest.slice(half).join(" ")] : [text];
          return (
            <g key={line.name} class={`method style-${line.style}`}>
              <path class="curve" d={path(line.fidelity)} />
              {line.fidelity.map((value, j) => (value === null ? null : <circle key={j} class="mark" cx={x(n[j]!)} cy={y(value)} r={2.2} />))}
              <path class="leader" d={`M${inner},${y(line.end)}L${inner + 8},${names[i]! - 4}`} />
              {two.map((part, j) => (
                <text key={j} class="line-label" x={inner + 10} y={names[i]! + 12 * j}>
                  {part}
                </text>
              ))}
              <title>{line.meaning}</title>
            </g>
          );
        })}
      </svg>
      <p class="legend">
        <i class="line dotted" /> by chance, n / (2 · {directions.toLocaleString("en")})
      </p>
    </div>
  );
}
