/** What one edge carries: potential, actual, causal; its directions in tokens; gains, angles, offsets; what else arrives. */

import { scaleLinear, scaleSqrt, scaleSymlog } from "d3-scale";
import { useMemo } from "preact/hooks";
import { type Carried, type MapDocument, type Pairs, type Table, numbers } from "./data";
import { type Edge, edgeAt, edgesOf, placeOf } from "./edges";
import { cellsOf } from "./head";
import { BEHAVIOURS, Command, Sign, figure, ofLoss, percent, portClass, ramp, signed } from "./marks";
import { type PageProps, useDocument, usePairs } from "./page";
import { Behind } from "./table";
import { Contexts } from "./text";
import { Tokens, tokenRows } from "./tokens";

const ARRIVES: Record<string, string> = { Q: "these queries", K: "these keys", V: "these values" };

export function PairPage({ map, address, go, width, theme }: PageProps) {
  const [writer = "", target = ""] = address.name.split("/");
  const [reader = "", port = ""] = target.split(".");
  const pairs = usePairs(map.ports.includes(port) ? port : undefined);
  const edge = useMemo(() => {
    const edges = pairs ? edgesOf(map, pairs) : null;
    const at = edges ? placeOf(edges, writer, reader) : -1;
    return edges && pairs && at >= 0 ? exact(edgeAt(edges, at), pairs, reader) : null;
  }, [pairs, address.name]);
  const near = [reader, ...(edge?.others ?? [])].find((name) => map.stored[`${writer}/${name}.${port}`]);
  const stored = near === undefined ? undefined : map.stored[`${writer}/${near}.${port}`];
  const carried = useDocument<Carried>(stored);
  const behaviour = (head: string) => map.behaviours[head]?.label ?? null;
  if (!map.ports.includes(port) || (pairs && !edge)) {
    const example = map.parts.find((part) => part.kind === "head")?.label ?? "L0H0";
    return (
      <main>
        <h1>No edge {address.name.replace("/", " → ")}</h1>
        <p class="note">
          An edge goes from a head to the Q, K or V of a later head, for example from {example} to L1H0.K, and both must write and
          read something.
        </p>
      </main>
    );
  }
  const beside = width >= 1140;
  const wide = beside ? Math.min(800, Math.round((width - 40) / 2.45)) : Math.min(width, 640); // of a chart on the right
  const says = (head: string) => BEHAVIOURS[behaviour(head) ?? ""];
  return (
    <main class="pair">
      <div class="three">
        <h1>
          <Sign behaviour={behaviour(writer)} /> {writer} → <Sign behaviour={behaviour(reader)} /> {reader}.
          <span class={portClass(port)}>{port}</span>
          <small>
            {says(writer) && says(reader) ? `From a head labelled ${says(writer)} to one labelled ${says(reader)}` : `Port ${port}`}
            {edge && edge.others.length > 0 && `; ${port === "V" ? "value" : "key"} shared with ${edge.others.join(", ")}`}
          </small>
        </h1>
        {edge && <Figures map={map} edge={edge} target={target} pairs={pairs!} />}
      </div>
      <p class="actions">
        <button onClick={() => go({ page: "head", name: writer, state: {} })}>All of {writer}</button>
        <button onClick={() => go({ page: "head", name: reader, state: {} })}>All of {reader}</button>
        {edge && (
          <>
            <button onClick={() => go({ page: "map", name: "", state: { port, pin: `${edge.writer}>${edge.reader}.${port}` } })}>
              Pin on the map
            </button>
            {edge.effect && (
              <button onClick={() => go({ page: "effects", name: "", state: { sel: `${edge.effect!.writer}>${edge.effect!.reader}.${port}` } })}>
                Where in a text it matters
              </button>
            )}
          </>
        )}
      </p>
      <div class={beside ? "two" : "one"}>
        <section class="main">
          {stored && near !== reader && (
            <p class="note">
              Directions, angles and tokens below are stored for {near}.{port}, which shares the {port === "K" ? "key" : "value"}; of
              this reader: <Command text={`vweights channel ${map.model} ${writer} ${target} --nearest 5`} />
            </p>
          )}
          {!stored ? (
            <p class="note">
              What it carries is not stored: <Command text={`vweights channel ${map.model} ${writer} ${target} --nearest 5`} />
            </p>
          ) : (
            carried && <Directions wide={beside ? width - wide - 40 : width} carried={carried} writer={writer} target={target} port={port} address={address} go={go} />
          )}
          <p class="note">
            Routes between them through other parts: <Command text={`vweights paths ${map.model} ${writer} ${target}`} />
          </p>
          {carried?.edge_tokens && <Contexts texts={carried.edge_tokens} port={port} />}
        </section>
        <section class="aside">
          {edge && pairs && <MainEffects map={map} edge={edge} pairs={pairs} wide={wide} />}
          {carried?.pair_angles && <Angles angles={carried.pair_angles} wide={wide} />}
          {carried?.offset_profile && <Offsets profile={carried.offset_profile} wide={wide} />}
          {edge && pairs && <Arriving pairs={pairs} reader={edge.reader} writer={writer} port={port} map={map} wide={wide} />}
          {edge?.effect && <Among map={map} edge={edge} theme={theme} wide={wide} />}
        </section>
      </div>
    </main>
  );
}

/** The same edge with the figures of one of the readers that share the map. */
function exact(edge: Edge, pairs: Pairs, reader: string): Edge {
  const at = pairs.readers.indexOf(reader) * pairs.writers.length + pairs.writers.indexOf(edge.writer);
  const [score, lift, share, attribution] = ["score", "lift", "share", "attribution"].map((name) => pairs.column(name)?.[at] ?? NaN);
  const others = [edge.reader, ...edge.others].filter((name) => name !== reader);
  return { ...edge, reader, others, score: score!, lift: lift!, share: share!, attribution: attribution!, expected: score! * 2 ** (-lift! / 2) };
}

function Figures({ map, edge, target, pairs }: { map: MapDocument; edge: Edge; target: string; pairs: Pairs }) {
  const chance = 1 / Math.sqrt(map.width);
  const cells = cellsOf(pairs, edge.reader, true);
  const place = 1 + cells.filter((cell) => cell.share > edge.share).length;
  const foremost = [...cells].sort((a, b) => b.share - a.share).find((cell) => cell.label !== edge.writer);
  const command = `vweights ablate ${map.model} ${edge.writer} ${target} --repeated`;
  const random = map.effects.filter((one) => one.kind === "random" && one.port === edge.port).map((one) => Math.abs(one.effect));
  return (
    <dl>
      <div>
        <dt>Potential</dt>
        <dd>
          <b>{figure(edge.score / chance, 1)} ×</b> chance, score {figure(edge.score)}
          <small>
            lift {signed(edge.lift)}: {figure(2 ** edge.lift, 1)} × the energy its ends explain
          </small>
        </dd>
      </div>
      <div>
        <dt>Actual</dt>
        <dd>
          {Number.isNaN(edge.share) ? (
            <>
              not run <Command text={`vweights map ${map.model} -o ATLAS --repeated`} />
            </>
          ) : (
            <>
              <b>{percent(edge.share)}</b> of the input of {ARRIVES[edge.port] ?? "this port"}
              <small>
                {place}
                {["th", "st", "nd", "rd"][place % 100 > 3 && place % 100 < 21 ? 0 : Math.min(place % 10, 4) % 4]} of {cells.length} writers
                {foremost && `, ${place === 1 ? "before" : "after"} ${foremost.label}`}
              </small>
            </>
          )}
        </dd>
      </div>
      <div>
        <dt>Causal</dt>
        <dd>
          {edge.effect ? (
            <>
              <b class={edge.effect.effect > 0 ? "up" : "down"}>{signed(edge.effect.effect)}</b> nats without it
              {edge.effect.low !== null && `, 95%: ${figure(edge.effect.low, 2)} to ${figure(edge.effect.high, 2)}`}
              <small>
                {random.length > 0 && `largest of ${random.length} random ${edge.port} edges ${figure(Math.max(...random))}; `}
                {map.ablation?.sequences} sequences
                {Number(map.ablation?.sequences) < 32 && " of the 32 that an interval asks for"}
              </small>
            </>
          ) : (
            <>
              {Number.isNaN(edge.attribution) ? "not run" : `${signed(edge.attribution)} nats, to first order`}{" "}
              <Command text={command} />
            </>
          )}
        </dd>
      </div>
    </dl>
  );
}

function Directions({
  carried,
  writer,
  target,
  port,
  address,
  go,
  wide,
}: { carried: Carried; writer: string; target: string; port: string; wide: number } & Pick<PageProps, "address" | "go">) {
  const rows = carried.channel_tokens ?? [];
  const edge = Number(carried.channel?.stamp.null_edge ?? 0);
  return (
    <>
      <h2>
        What it carries, direction by direction <Behind name="tokens" rows={() => tokenRows(rows)} />
      </h2>
      <p class="lead">
        Written by {writer}, read by {target}. Bold: nearer than the best of as many random directions. Underlined: on both sides,
        which at a cosine near 1 is one finding, not two. Near-equal gains share a row.
      </p>
      <div class={`scroll bars-${port}`} tabIndex={0}>
        <Tokens
          rows={rows}
          ends={["written", "read"]}
          chart
          edge={edge}
          chosen={address.state.row}
          onChoose={(row) => go({ state: { ...address.state, row: row === address.state.row ? "" : row } })}
        />
      </div>
      {carried.channel && <Gains channel={carried.channel} port={port} wide={wide} />}
    </>
  );
}

function Gains({ channel, port, wide }: { channel: Table; port: string; wide: number }) {
  const gains = numbers(channel, "gain");
  const edge = Number(channel.stamp.null_edge ?? 0);
  const y = scaleLinear([0, Math.max(edge, ...gains) * 1.05], [150, 8]);
  const width = wide - 40;
  const step = width / Math.max(1, gains.length);
  const above = gains.filter((gain) => gain > edge);
  const energy = (values: number[]) => values.reduce((sum, gain) => sum + gain * gain, 0);
  return (
    <>
      <h2>
        All {gains.length} gains{" "}
        <Behind name="gains" rows={() => gains.map((gain, i) => ({ direction: i + 1, gain, null_edge: edge }))} />
      </h2>
      <p class="lead">
        {above.length} above the null edge (dotted: what the largest gain reaches in 99% of random orientations); they hold{" "}
        {((100 * energy(above)) / (energy(gains) || 1)).toFixed(0)}% of the energy.
      </p>
      <div class={`scroll bars-${port}`} tabIndex={0}>
        <svg width={width + 40} height={176} role="img" aria-label={`${gains.length} gains, ${above.length} above the null edge`}>
          {gains.map((gain, i) => (
            <rect
              key={i}
              class={gain > edge ? "gain above" : "gain"}
              x={36 + step * i}
              width={Math.max(1, step - 1.5)}
              y={y(gain)}
              height={150 - y(gain)}
            />
          ))}
          <path class="least" d={`M36,${y(edge)}H${width + 36}`} />
          <text x={width + 36} y={y(edge) - 4} text-anchor="end">
            null edge {Number(edge.toPrecision(3))}
          </text>
          {y.ticks(3).map((t) => (
            <text key={t} x={30} y={y(t) + 4} text-anchor="end">
              {t}
            </text>
          ))}
          {[1, above.length, gains.length]
            .filter((n, i, all) => n > 0 && all.indexOf(n) === i)
            .map((n) => (
              <text key={n} x={36 + step * (n - 0.5)} y={166} text-anchor="middle">
                {n}
              </text>
            ))}
        </svg>
      </div>
    </>
  );
}

/** Where the energy of a pair comes from: both main effects and the lift add up in log2. */
function MainEffects({ map, edge, pairs, wide }: { map: MapDocument; edge: Edge; pairs: Pairs; wide: number }) {
  const heard = pairs.writer_effect[pairs.writers.indexOf(edge.writer)] ?? null;
  const listens = pairs.reader_effect[pairs.readers.indexOf(edge.reader)] ?? null;
  if (heard === null || listens === null) return null;
  const total = Math.log2(edge.score ** 2 * map.width);
  const parts: [string, number, number][] = [];
  let at = 0;
  for (const [name, value] of [
    [`heard widely: ${edge.writer}`, heard],
    [`listens widely: ${edge.reader}.${edge.port}`, listens],
    ["less the mean of all", total - heard - listens - edge.lift],
    ["lift of this pair", edge.lift],
  ] as const) {
    parts.push([name, at, at + value]);
    at += value;
  }
  parts.push(["score of the pair", 0, total]);
  const ends = parts.flatMap(([, from, to]) => [from, to]);
  const x = scaleLinear([Math.min(-0.5, ...ends), Math.max(1, ...ends)], [170, wide - 50]);
  return (
    <>
      <h2>
        Where its score comes from <small>log₂ of energy over chance</small>{" "}
        <Behind name="main-effects" rows={() => parts.map(([part, from, to]) => ({ part, log2: to - from }))} />
      </h2>
      <svg width={wide} height={24 * parts.length + 20} role="img" aria-label={parts.map(([name, from, to]) => `${name} ${signed(to - from)}`).join(", ")}>
        {x.ticks(5).map((t) => (
          <g key={t} class={t === 0 ? "zero" : "tick"}>
            <path d={`M${x(t)},0V${24 * parts.length}`} />
            <text x={x(t)} y={24 * parts.length + 14} text-anchor="middle">
              {t === 0 ? "chance" : signed(t, 0)}
            </text>
          </g>
        ))}
        {parts.map(([name, from, to], i) => (
          <g key={name} class={i === 3 ? "part-lift" : i === 4 ? "part-total" : "part-main"}>
            <text class={i > 2 ? "row-name strong" : "row-name"} x={0} y={24 * i + 16}>
              {name}
            </text>
            <rect x={x(Math.min(from, to))} width={Math.max(1, Math.abs(x(to) - x(from)))} y={24 * i + 5} height={14} />
            <text class={i > 2 ? "row-name strong" : "row-name"} x={x(Math.max(from, to)) + 6} y={24 * i + 16}>
              {signed(to - from)}
            </text>
          </g>
        ))}
      </svg>
    </>
  );
}

/** Cosines of all principal angles, over those of random subspaces. */
function Angles({ angles, wide }: { angles: Table; wide: number }) {
  const cosines = numbers(angles, "cosine");
  const [low, high] = [numbers(angles, "random_low"), numbers(angles, "random_high")];
  const y = scaleLinear([0, 1], [110, 8]);
  const x = (i: number) => 34 + ((wide - 50) * i) / Math.max(1, cosines.length - 1);
  const above = cosines.filter((cosine, i) => cosine > high[i]!).length;
  const band = [...high.map((v, i) => [x(i), y(v)]), ...low.map((v, i) => [x(i), y(v)]).reverse()];
  return (
    <>
      <h2>
        Do they meet in the same subspace?{" "}
        <Behind
          name="angles"
          rows={() => cosines.map((cosine, i) => ({ direction: i + 1, cosine, random_low: low[i]!, random_high: high[i]! }))}
        />
      </h2>
      <p class="lead">
        Cosines of the {cosines.length} principal angles; {above} above the band of random subspaces.
      </p>
      <svg width={wide} height={130} role="img" aria-label={`${cosines.length} principal angles, ${above} above random`}>
        <path class="range" d={`M${band.map((p) => p.join()).join("L")}Z`} />
        {cosines.map((cosine, i) => (
          <circle key={i} class="end" cx={x(i)} cy={y(cosine)} r={2.2} />
        ))}
        {[0, 0.5, 1].map((t) => (
          <text key={t} x={28} y={y(t) + 4} text-anchor="end">
            {figure(t, 1).replace(".0", "")}
          </text>
        ))}
        <text x={34} y={126}>
          1
        </text>
        <text x={wide - 16} y={126} text-anchor="end">
          {cosines.length}
        </text>
      </svg>
    </>
  );
}

function Offsets({ profile, wide }: { profile: Table; wide: number }) {
  const scores = numbers(profile, "score");
  const offsets = profile.labels.map(Number);
  const [least, most] = [Math.min(...scores), Math.max(...scores)];
  const y = scaleLinear([0, most * 1.1], [110, 8]);
  const x = scaleSymlog([0, Math.max(1, ...offsets)], [34, wide - 16]).constant(2);
  return (
    <>
      <h2>
        By rotary offset <Behind name="offsets" rows={() => profile.labels.map((offset, i) => ({ offset, score: scores[i]! }))} />
      </h2>
      <p class="lead">
        Score where the key stands so many tokens before its query:{" "}
        {most > 0 && most - least < 0.02 * most ? "flat, " : ""}
        {most > 0 ? `${((100 * (most - least)) / most).toFixed(1)}% between its least and its most.` : "zero."}
      </p>
      <svg width={wide} height={130} role="img" aria-label={`score by rotary offset, from ${figure(least)} to ${figure(most)}`}>
        <path class="curve" d={scores.map((score, i) => `${i ? "L" : "M"}${x(offsets[i]!)},${y(score)}`).join("")} />
        {offsets
          .filter((offset) => [0, 1, 4, 16, 32, 64, 256, 1024].includes(offset) || offset === Math.max(...offsets))
          .map((offset) => (
            <text key={offset} x={x(offset)} y={126} text-anchor="middle">
              {offset}
            </text>
          ))}
        {[0, most].map((t) => (
          <text key={t} x={28} y={y(t) + 4} text-anchor="end">
            {t === 0 ? "0" : figure(t)}
          </text>
        ))}
      </svg>
    </>
  );
}

interface ArrivingProps {
  map: MapDocument;
  pairs: Pairs;
  reader: string;
  writer: string;
  port: string;
  wide: number;
}

/** What else arrives at the same input, by share. */
function Arriving({ map, pairs, reader, writer, port, wide }: ArrivingProps) {
  const cells = cellsOf(pairs, reader, true)
    .filter((cell) => !Number.isNaN(cell.share))
    .sort((a, b) => b.share - a.share);
  if (!cells.length) return null;
  const y = scaleSqrt([0, cells[0]!.share], [110, 14]);
  const step = (wide - 50) / cells.length;
  const marked = [...new Set([0, 1, 2, cells.findIndex((cell) => cell.label === writer)])].filter((i) => cells[i]);
  return (
    <>
      <h2>
        What else arrives at {ARRIVES[port] ?? reader} <small>share, {cells.length} writers, square-root scale</small>{" "}
        <Behind name={`${reader}-${port}-shares`} rows={() => cells.map(({ label, share }) => ({ writer: label, share }))} />
      </h2>
      <svg
        width={wide}
        height={124}
        role="img"
        aria-label={`shares of ${cells.length} writers on ${map.run?.text ?? "the text"}; the largest ${cells[0]!.label}, ${percent(cells[0]!.share)}`}
      >
        {cells.map((cell, i) => (
          <rect
            key={cell.label}
            class={cell.label === writer ? `bar fill-${port}` : "bar"}
            x={44 + step * i}
            width={Math.max(0.8, step - 0.8)}
            y={y(cell.share)}
            height={110 - y(cell.share)}
          />
        ))}
        {marked.map((i, row) => (
          <g key={i} class="named">
            <path d={`M${44 + step * (i + 0.5)},${y(cells[i]!.share)}L${96 + step * i},${18 + 18 * row}`} />
            <text x={100 + step * i} y={22 + 18 * row}>
              {cells[i]!.label} {percent(cells[i]!.share)}
            </text>
          </g>
        ))}
        {[cells[0]!.share, 0.01].map((t) => (
          <text key={t} x={38} y={y(t) + 4} text-anchor="end">
            {percent(t)}
          </text>
        ))}
      </svg>
    </>
  );
}

/** The effect of the edge among those of random edges of its port. */
function Among({ map, edge, theme, wide }: { map: MapDocument; edge: Edge; theme: string; wide: number }) {
  const colour = useMemo(ramp, [theme]);
  const random = map.effects.filter((one) => one.kind === "random" && one.port === edge.port).map((one) => one.effect);
  const effect = edge.effect!.effect;
  const ends = [...random, effect, -0.01, 0.01];
  const x = scaleSymlog([Math.min(...ends) * 1.1, Math.max(...ends) * 1.1], [20, wide - 20]).constant(0.006);
  const largest = Math.max(...random.map(Math.abs));
  return (
    <>
      <h2>
        Does it matter?{" "}
        <small>
          loss without the edge, nats{random.length > 0 && `; grey: ${random.length} random ${edge.port} edges`}
        </small>
      </h2>
      <svg width={wide} height={84} role="img" aria-label={`${signed(effect)} nats, ${random.length ? `random edges up to ${figure(largest)}` : "no random edges"}`}>
        {random.length > 0 && (
          <rect class="range" x={x(Math.min(...random)) - 3} width={x(Math.max(...random)) - x(Math.min(...random)) + 6} y={4} height={54} rx={3} />
        )}
        {[-1, -0.1, -0.01, 0, 0.01, 0.1, 1, 5]
          .filter((t) => t >= x.domain()[0]! && t <= x.domain()[1]!)
          .map((t) => (
            <g key={t} class={t === 0 ? "zero" : "tick"}>
              <path d={`M${x(t)},4V58`} />
              <text x={x(t)} y={74} text-anchor="middle">
                {t === 0 ? "0" : signed(t, 2).replace(/\.?0+$/, "").replace("0.", ".")}
              </text>
            </g>
          ))}
        {random.map((value, i) => (
          <circle key={i} class="random" cx={x(value)} cy={28 + 8 * (i % 3)} r={3} />
        ))}
        <circle class="effect" cx={x(effect)} cy={22} r={6} style={{ fill: colour(ofLoss(effect)) }} />
        <text class="row-name strong" x={x(effect) + (effect > 0 ? -12 : 12)} y={26} text-anchor={effect > 0 ? "end" : "start"}>
          {signed(effect)} nats{random.length > 0 && largest > 0 && Math.abs(effect) > 2 * largest ? `, ${Math.round(Math.abs(effect) / largest)} × the largest random edge` : ""}
        </text>
      </svg>
    </>
  );
}
