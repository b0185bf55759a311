/** What is kept and what is erased: neurons by what they do to what they read, heads by what they do to what they move. */

import { useEffect, useRef, useState } from "preact/hooks";
import { ErasingPairs } from "./memory-pairs";
import { BEHAVIOURS, Glyph, Sign, css, emptied, figure, percent, signed } from "./marks";
import { type SectionProps, columns } from "./structure";
import { Axes, Missing, Tip, framed, raised, significant, useSteps } from "./structure-axes";
import type { Heads, Neurons } from "./structure-document";
import { Behind } from "./table";

export function MemorySection(props: SectionProps) {
  const { map, structure, width, theme } = props;
  const { neurons, heads, erasure } = structure;
  const command = `vweights map ${map.model} -o ATLAS --only memory`;
  const { across, each } = columns(width, 2);
  const wide = across > 1 ? Math.round((width - 40) * 0.58) : each;
  return (
    <section id="memory">
      <h2 class="part-title">Memory: what is kept, and what is erased</h2>
      {neurons ? (
        <>
          <p class="lead">
            A neuron that writes against what it reads weakens it; one that writes along it strengthens it. A head does the same to what
            it moves, through the eigenvalues of its OV circuit.
          </p>
          <div class="charts">
            <Density neurons={neurons} width={wide} theme={theme} />
            <Classes neurons={neurons} width={across > 1 ? width - 40 - wide : each} />
          </div>
        </>
      ) : (
        <Missing what="Neurons by what they do to what they read are" command={command} />
      )}
      {heads ? <HeadsByDepth {...props} heads={heads} /> : <Missing what="Heads that copy or erase are" command={command} />}
      {erasure ? <ErasingPairs {...props} erasure={erasure} /> : <Missing what="Pairs of a writer and its eraser are" command={command} />}
    </section>
  );
}

function counted(neurons: Neurons): Uint32Array {
  const bytes = Uint8Array.from(atob(neurons.counts), (c) => c.charCodeAt(0));
  return new Uint32Array(bytes.buffer);
}

/** Neurons by cosine and gain, as counts; ink is log of the count. */
function Density({ neurons, width, theme }: { neurons: Neurons; width: number; theme: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<{ c: number; r: number } | null>(null);
  const [wide, tall] = neurons.bins;
  const counts = counted(neurons);
  const [largest, all] = counts.reduce(([most, sum], count) => [Math.max(most!, count), sum! + count], [1, 0]) as [number, number];
  const frame = framed(width, 380, 44, 26);
  const [low, high] = neurons.log_gain;
  const [left, right] = neurons.cosine;
  const x = (cosine: number) => frame.left + ((frame.right - frame.left) * (cosine - left)) / (right - left);
  const y = (log: number) => frame.bottom - ((frame.bottom - frame.top) * (log - low)) / (high - low);
  const cosine = (c: number) => left + ((right - left) * c) / wide;
  const gain = (r: number) => 10 ** (low + ((high - low) * r) / tall);
  useEffect(() => {
    const pen = emptied(canvas.current, width, frame.height);
    if (!pen) return;
    pen.fillStyle = css("ink");
    for (let c = 0; c < wide; c++) {
      const [from, to] = [x(cosine(c)), x(cosine(c + 1))];
      for (let r = 0; r < tall; r++) {
        const count = counts[c * tall + r]!;
        if (!count) continue;
        pen.globalAlpha = 0.1 + (0.86 * Math.log(count)) / Math.log(largest + 1);
        const [top, bottom] = [y(Math.log10(gain(r + 1))), y(Math.log10(gain(r)))];
        pen.fillRect(from, top, to - from - 0.5, bottom - top - 0.5);
      }
    }
  }, [neurons, width, theme]);
  const pointed = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const c = Math.floor((wide * (event.clientX - box.left - frame.left)) / (frame.right - frame.left));
    const r = Math.floor((tall * (frame.bottom - event.clientY + box.top)) / (frame.bottom - frame.top));
    setAt(c >= 0 && r >= 0 && c < wide && r < tall ? { c, r } : null);
  };
  const yTicks: [number, string][] = [];
  for (let p = Math.ceil(low); p <= high; p++) yTicks.push([p, p < -2 || p > 3 ? `10${raised(p)}` : significant(10 ** p)]);
  const t = neurons.threshold;
  const { tail, shuffled } = neurons.null;
  const rows = () =>
    [...counts].flatMap((count, i) => {
      const [c, r] = [Math.floor(i / tall), i % tall];
      return count ? [{ cosine_from: cosine(c), cosine_to: cosine(c + 1), gain_from: gain(r), gain_to: gain(r + 1), neurons: count }] : [];
    });
  return (
    <div class="chart" style={{ width }}>
      <h3>
        What neurons do to what they read <small>{all.toLocaleString("en")} neurons</small> <Behind name="neurons" rows={rows} />
      </h3>
      <div class="plot" style={{ width, height: frame.height }} onPointerMove={(event) => pointed(event as unknown as PointerEvent)} onPointerLeave={() => setAt(null)}>
        <canvas ref={canvas} style={{ width, height: frame.height }} role="img" aria-label={`${all} neurons by cosine of what they read with what they write, and by gain`} />
        <svg width={width} height={frame.height} aria-hidden="true">
          <Axes
            frame={frame}
            x={x}
            y={y}
            xTicks={[-1, -0.5, 0, 0.5, 1].filter((v) => v >= left && v <= right).map((v) => [v, figure(v, 1).replace(/\.0$/, "").replace(/^$/, "0")])}
            yTicks={yTicks}
            xTitle="cosine of what it reads with what it writes"
            yTitle="|gain| (log): 1 clears or doubles what it reads"
          />
          {[-t, t].map((v) => (
            <path key={v} class="least" d={`M${x(v)},${frame.top}V${frame.bottom}`} />
          ))}
          {low < 0 && high > 0 && <path class="least" d={`M${frame.left},${y(0)}H${frame.right}`} />}
          <text class="part" x={frame.left + 8} y={frame.bottom - 10}>
            weakening
          </text>
          <text class="part" x={frame.right - 8} y={frame.bottom - 10} text-anchor="end">
            strengthening
          </text>
          {at && (
            <rect class="cursor" x={x(cosine(at.c))} width={x(cosine(at.c + 1)) - x(cosine(at.c))} y={y(Math.log10(gain(at.r + 1)))} height={y(0) - y(Math.log10(gain(1) / gain(0)))} />
          )}
        </svg>
        {at && (
          <Tip x={x(cosine(at.c))} y={y(Math.log10(gain(at.r)))} width={width}>
            <b>{counts[at.c * tall + at.r]!.toLocaleString("en")}</b> neurons
            <br />
            cosine {figure(cosine(at.c), 2)} to {figure(cosine(at.c + 1), 2)}, |gain| {significant(gain(at.r), 2)} to {significant(gain(at.r + 1), 2)}
          </Tip>
        )}
      </div>
      <p class="note">
        {neurons.classes_by === "up" ? "Read: the up row. " : ""}Dotted: cosines of ±{figure(t, 1)}, and gain 1.{" "}
        {tail !== undefined &&
          (tail < 1e-6
            ? "Independent random directions would practically never lie beyond. "
            : `Independent random directions: ${percent(tail)} beyond each. `)}
        {shuffled &&
          `The same directions paired at random within their layer: ${
            shuffled.weakening_share + shuffled.strengthening_share
              ? `${percent(shuffled.weakening_share)} weaken, ${percent(shuffled.strengthening_share)} strengthen.`
              : "none beyond."
          }`}
        {neurons.below ? ` The lowest row also counts ${neurons.below.toLocaleString("en")} smaller gains.` : ""}
        {neurons.absent ? ` ${neurons.absent.toLocaleString("en")} neurons read or write nothing.` : ""}
      </p>
    </div>
  );
}

/** Shares of the classes by layer: strengthening upwards, weakening downwards. */
function Classes({ neurons, width }: { neurons: Neurons; width: number }) {
  const { layers, classes } = neurons;
  const shares = layers.map((layer, i) => {
    const [weakening, between, strengthening] = [classes.weakening[i]!, classes.between[i]!, classes.strengthening[i]!];
    const all = weakening + between + strengthening || 1;
    return { layer, weakening: weakening / all, strengthening: strengthening / all, counts: [weakening, strengthening] as const, all };
  });
  const { current, set, stop, said } = useSteps(
    shares,
    (one) => `layer ${one.layer}: ${percent(one.weakening)} weakening, ${percent(one.strengthening)} strengthening`,
  );
  const frame = framed(width, 380, 48, 26);
  const [up, down] = [Math.max(...shares.map((one) => one.strengthening), 0.005), Math.max(...shares.map((one) => one.weakening), 0.005)];
  const slot = (frame.right - frame.left) / Math.max(1, layers.length);
  const y = (share: number) => frame.top + ((frame.bottom - frame.top) * (up - share)) / (up + down);
  const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((one) => (up + down) / one <= 7) ?? 1;
  const ticks: [number, string][] = [];
  for (let i = -Math.floor(down / step); i <= up / step; i++) ticks.push([i * step, `${significant(Math.abs(100 * i * step))} %`]);
  const every = Math.ceil(layers.length / (width / 34));
  const total = (name: "weakening" | "strengthening") => classes[name].reduce((a, b) => a + b, 0);
  const all = shares.reduce((sum, one) => sum + one.all, 0);
  const at = current ? shares.indexOf(current) : -1;
  return (
    <div class="chart" style={{ width }}>
      <h3>
        Where they stand{" "}
        <small>
          {percent(total("weakening") / all)} weaken, {percent(total("strengthening") / all)} strengthen
        </small>{" "}
        <Behind
          name="neuron-classes"
          rows={() =>
            layers.map((layer, i) => ({ layer, weakening: classes.weakening[i]!, between: classes.between[i]!, strengthening: classes.strengthening[i]! }))
          }
        />
      </h3>
      <div class="plot" style={{ width, height: frame.height }}>
        <svg
          width={width}
          height={frame.height}
          role="img"
          aria-label="shares of weakening and of strengthening neurons by layer"
          {...stop}
          onPointerMove={(event) =>
            set(shares[Math.floor((event.clientX - event.currentTarget.getBoundingClientRect().left - frame.left) / slot)] ?? null)
          }
          onPointerLeave={() => set(null)}
        >
          <Axes
            frame={frame}
            x={(i) => frame.left + slot * (i + 0.5)}
            y={y}
            xTicks={layers.flatMap((layer, i): [number, string][] => (i % every === 0 ? [[i, String(layer)]] : []))}
            yTicks={ticks}
            xTitle="layer"
            yTitle="strengthening, + ; below zero: weakening, −"
          />
          {at >= 0 && <rect class="hit" x={frame.left + slot * at} width={slot} y={frame.top} height={frame.bottom - frame.top} />}
          {shares.map((one, i) => (
            <g key={one.layer}>
              <rect class="bar-up" x={frame.left + slot * (i + 0.12)} width={slot * 0.76} y={y(one.strengthening)} height={y(0) - y(one.strengthening)} />
              <rect class="bar-down" x={frame.left + slot * (i + 0.12)} width={slot * 0.76} y={y(0)} height={y(-one.weakening) - y(0)} />
            </g>
          ))}
          <path class="axis-line" d={`M${frame.left},${y(0)}H${frame.right}`} />
        </svg>
        {current && (
          <Tip x={frame.left + slot * (at + 0.5)} y={frame.top + 20} width={width}>
            <b>layer {current.layer}</b>
            <br />
            {current.counts[1]} strengthen, {percent(current.strengthening)}
            <br />
            {current.counts[0]} weaken, {percent(current.weakening)}
          </Tip>
        )}
        {said}
      </div>
    </div>
  );
}

interface Head {
  label: string;
  layer: number;
  head: number;
  value: number;
  negative: number;
}

/** Every head by depth: copying above zero, erasing below. */
function HeadsByDepth({ map, heads, address, go, width }: SectionProps & { heads: Heads }) {
  const tokens = address.state.space === "tokens" && !!heads.columns.token_copying;
  const [column, negative] = tokens ? ["token_copying", "token_negative_share"] : ["copying", "negative_share"];
  const points = heads.labels.flatMap((label, i): Head[] => {
    const match = /^L(\d+)H(\d+)$/.exec(label);
    const value = heads.columns[column!]?.[i] ?? null;
    if (!match || value === null) return [];
    return [{ label, layer: Number(match[1]), head: Number(match[2]), value, negative: heads.columns[negative!]?.[i] ?? NaN }];
  });
  const behaviour = (label: string) => map.behaviours[label]?.label ?? null;
  const open = (head: Head) => go({ page: "head", name: head.label, state: {} });
  const { current, set, stop, said } = useSteps(points, (one) => `${one.label}, copying ${signed(one.value)}`, open);
  const drawn = Math.max(width, 760);
  const frame = framed(drawn, 320, 44, 26);
  const most = Math.max(1, ...points.map((one) => one.head + 1));
  const step = (frame.right - frame.left) / map.layers;
  const x = (one: Head) => frame.left + step * (one.layer + 0.12 + (0.76 * (one.head + 0.5)) / most);
  const y = (value: number) => frame.top + ((frame.bottom - frame.top) * (1.04 - value)) / 2.08;
  const none = heads.null[column!];
  const band = typeof none === "object" ? ([none.mean - 2 * none.std, none.mean + 2 * none.std] as const) : null;
  const sorted = [...points].sort((a, b) => a.value - b.value);
  const named: Head[] = [];
  for (const one of [...sorted.slice(0, 8), ...sorted.slice(-8).reverse()]) {
    if (named.every((other) => Math.abs(x(other) - x(one)) > 110 || Math.abs(y(other.value) - y(one.value)) > 13)) named.push(one);
  }
  const beyond = band ? points.filter((one) => one.value < band[0]).length : 0;
  const every = Math.ceil(map.layers / (drawn / 34));
  const rows = () =>
    heads.labels.map((head, i) => ({ head, ...Object.fromEntries(Object.entries(heads.columns).map(([name, values]) => [name, values[i] ?? null])) }));
  return (
    <div class="chart" style={{ width }}>
      <h3>
        Heads that copy, and heads that erase{" "}
        <small>
          {points.length.toLocaleString("en")}
          {heads.of > heads.labels.length ? ` of ${heads.of.toLocaleString("en")}, those furthest from chance` : " heads"}
          {band ? `, ${beyond} erase beyond chance` : ""}
        </small>{" "}
        <Behind name="heads" rows={rows} />
      </h3>
      <p class="note">
        {heads.columns.token_copying && (
          <>
            {(["stream", "tokens"] as const).map((space) => (
              <button
                key={space}
                class="port"
                aria-pressed={(space === "tokens") === tokens}
                onClick={() => go({ state: { ...address.state, space: space === "tokens" ? space : "" } })}
              >
                {space === "tokens" ? "from token to token" : "in the stream"}
              </button>
            ))}{" "}
          </>
        )}
        Sum of the eigenvalues' real parts over the sum of their sizes. Band: two standard deviations around random heads.
      </p>
      <div class="scroll" tabIndex={drawn > width ? 0 : -1}>
      <div class="plot" style={{ width: drawn, height: frame.height }}>
        <svg width={drawn} height={frame.height} role="group" aria-label={`${points.length} heads by layer and copying`} {...stop} onPointerLeave={() => set(null)}>
          <Axes
            frame={frame}
            x={(layer) => frame.left + step * (layer + 0.5)}
            y={y}
            xTicks={Array.from({ length: map.layers }, (_, layer): [number, string] => [layer, String(layer)]).filter(([layer]) => layer % every === 0)}
            yTicks={[-1, -0.5, 0, 0.5, 1].map((v) => [v, v === 0 ? "0" : signed(v, 1).replace("0.", ".").replace(".0", "")])}
            xTitle="layer"
            yTitle="copying: +1 copies, −1 erases"
          />
          {Array.from({ length: map.layers }, (_, layer) =>
            layer % 2 === 0 ? <rect key={layer} class="band" x={frame.left + step * layer} width={step} y={frame.top} height={frame.bottom - frame.top} /> : null,
          )}
          {band && <rect class="range" x={frame.left} width={frame.right - frame.left} y={y(band[1])} height={y(band[0]) - y(band[1])} />}
          <path class="axis-line" d={`M${frame.left},${y(0)}H${frame.right}`} />
          {points.map((one) => (
            <g key={one.label} class="head" onPointerEnter={() => set(one)} onClick={() => open(one)}>
              <rect class="target" x={x(one) - 6} y={y(one.value) - 6} width={12} height={12} />
              <Glyph behaviour={behaviour(one.label)} x={x(one)} y={y(one.value)} />
            </g>
          ))}
          {named.map((one) => {
            const late = x(one) > frame.right - 60;
            return (
              <text key={one.label} class="part" x={x(one) + (late ? -8 : 8)} y={y(one.value) + 4} text-anchor={late ? "end" : "start"}>
                {one.label}
              </text>
            );
          })}
          {current && <circle class="pin" cx={x(current)} cy={y(current.value)} r={8} />}
        </svg>
        {current && (
          <Tip x={x(current)} y={y(current.value)} width={drawn}>
            <Sign behaviour={behaviour(current.label)} /> <b>{current.label}</b> {BEHAVIOURS[behaviour(current.label) ?? ""] ?? ""}
            <br />
            copying {signed(current.value)}, {percent(current.negative)} of it erases
          </Tip>
        )}
        {said}
      </div>
      </div>
    </div>
  );
}
