/** What one edge carries: could, does, costs; its directions in tokens; gains against chance; rotary offsets. */

import { scaleLinear } from "d3-scale";
import { useEffect, useMemo, useState } from "preact/hooks";
import { type Carried, type Pairs, type Table, loadCarried, loadPairs } from "./data";
import { type Edge, edgesOf } from "./edges";
import { Sign, figure, percent, portClass, signed } from "./marks";
import type { PageProps } from "./page";
import { Behind } from "./table";

interface Tokens {
  directions: string;
  gain: number;
  energy: number;
  ends: Record<string, { text: string; cosine: number; random: number }[]>;
}

const column = (table: Table | undefined, name: string) => table?.columns.find((one) => one.name === name)?.values ?? [];

export function PairPage({ map, address, go, width }: PageProps) {
  const [writer = "", target = ""] = address.name.split("/");
  const [reader = "", port = ""] = target.split(".");
  const stored = map.stored[address.name];
  const [pairs, setPairs] = useState<Pairs | null>(null);
  const [carried, setCarried] = useState<Carried | null>(null);
  useEffect(() => {
    setPairs(null);
    setCarried(null);
    if (map.ports.includes(port)) void loadPairs(port).then(setPairs);
    if (stored) void loadCarried(stored).then(setCarried);
  }, [address.name]);
  const edge: Edge | undefined = useMemo(
    () => (pairs ? edgesOf(map, pairs).find((one) => one.writer === writer && [one.reader, ...one.others].includes(reader)) : undefined),
    [pairs],
  );
  const chance = 1 / Math.sqrt(map.width);
  const behaviour = (head: string) => map.behaviours[head]?.label ?? null;
  if (!map.ports.includes(port) || (pairs && !edge)) {
    return (
      <main>
        <h1>No edge {address.name.replace("/", " → ")}</h1>
        <p class="note">An edge goes from a head to a later head's Q, K or V, for example {map.parts.find((p) => p.kind === "head")?.label} → …</p>
      </main>
    );
  }
  return (
    <main class="pair">
      <h1>
        <Sign behaviour={behaviour(writer)} /> {writer} → <Sign behaviour={behaviour(reader)} /> {reader}.
        <span class={portClass(port)}>{port}</span>
        <span class="step">
          <button onClick={() => go({ page: "head", name: writer, state: {} })}>{writer}</button>{" "}
          <button onClick={() => go({ page: "head", name: reader, state: {} })}>{reader}</button>
        </span>
      </h1>
      {edge && (
        <dl class="three">
          <div>
            <dt>could</dt>
            <dd>
              <b>{figure(edge.score / chance, 1)} ×</b> chance
              <small>
                score {figure(edge.score)}, lift {signed(edge.lift)}: {figure(edge.expected)} would be expected of its ends
              </small>
            </dd>
          </div>
          <div>
            <dt>does</dt>
            <dd>
              {Number.isNaN(edge.share) ? (
                <code>vweights map {map.model} -o ATLAS --repeated</code>
              ) : (
                <>
                  <b>{percent(edge.share)}</b> of its {port} input
                  <small>{map.run ? `on ${map.run.text}` : ""}</small>
                </>
              )}
            </dd>
          </div>
          <div>
            <dt>costs</dt>
            <dd>
              {edge.effect ? (
                <>
                  <b>{signed(edge.effect.effect)}</b> nats
                  <small>
                    {figure(edge.effect.low, 2)} to {figure(edge.effect.high, 2)}, removed in a run
                  </small>
                </>
              ) : Number.isNaN(edge.attribution) ? (
                <code>
                  vweights ablate {map.model} {writer} {target} --repeated
                </code>
              ) : (
                <>
                  <b>{signed(edge.attribution)}</b> nats, first order
                  <small>
                    <code>
                      vweights ablate {map.model} {writer} {target} --repeated
                    </code>
                  </small>
                </>
              )}
            </dd>
          </div>
        </dl>
      )}
      {!stored ? (
        <p class="note">
          What it carries is not stored; <code>vweights channel {map.model} {writer} {target} --nearest 5</code> computes it.
        </p>
      ) : (
        carried && <Contents carried={carried} width={width} />
      )}
    </main>
  );
}

function Contents({ carried, width }: { carried: Carried; width: number }) {
  const [all, setAll] = useState(false);
  const rows = useMemo(() => tokensOf(carried.channel_tokens), [carried]);
  const above = rows.some((row) => Object.values(row.ends).some((end) => end.some((one) => Math.abs(one.cosine) > one.random)));
  const tokens = (row: Tokens, end: string) => {
    const tokens = (row.ends[end] ?? []).filter((one) => all || Math.abs(one.cosine) > one.random);
    return tokens.length === 0 ? (
      <span class="muted">none above chance</span>
    ) : (
      tokens.slice(0, 5).map((one, i) => (
        <span key={i} class={Math.abs(one.cosine) > one.random ? "token above" : "token"}>
          {one.text} <small>{figure(one.cosine, 2)}</small>
        </span>
      ))
    );
  };
  const table = () =>
    rows.flatMap((row) =>
      Object.entries(row.ends).flatMap(([end, tokens]) =>
        tokens.map((one) => ({ directions: row.directions, gain: row.gain, end, token: one.text, cosine: one.cosine, chance: one.random })),
      ),
    );
  return (
    <div class={width >= 1140 ? "two" : "one"}>
      <section style={{ flex: 1.35, minWidth: 0 }}>
        <h2>
          What is written, and what is read <Behind name="tokens" rows={table} />
        </h2>
        <p class="lead">
          Directions by gain; beside each the nearest tokens, embedding or unembedding.{" "}
          {above ? "" : "No token of any direction stands nearer than chance. "}
          <button onClick={() => setAll(!all)}>{all ? "Only those above chance" : "Show the nearest anyway"}</button>
        </p>
        <div class="scroll" tabIndex={0}>
          <table class="tokens">
            <thead>
              <tr>
                <th>written tokens</th>
                <th>gain</th>
                <th>read tokens</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <tr key={row.directions}>
                  <td>{tokens(row, "written")}</td>
                  <td>
                    <b>{row.gain.toPrecision(3)}</b>
                    <small> {row.directions}</small>
                  </td>
                  <td>{tokens(row, "read")}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </section>
      <section style={{ flex: 1, minWidth: 0 }}>
        <Gains channel={carried.channel} />
        {carried.offset_profile && <Offsets profile={carried.offset_profile} />}
      </section>
    </div>
  );
}

function tokensOf(table: Table | undefined): Tokens[] {
  const rows = new Map<string, Tokens>();
  const [directions, gains, energies, ends, texts, ids, cosines, randoms] = [
    "directions", "gain", "energy", "end", "text", "token", "cosine", "random",
  ].map((name) => column(table, name)) as [string[], number[], number[], string[], (string | null)[], number[], number[], number[]];
  for (let i = 0; i < directions.length; i++) {
    const key = directions[i]!;
    let row = rows.get(key);
    if (!row) rows.set(key, (row = { directions: key, gain: gains[i]!, energy: energies[i]!, ends: {} }));
    const text = texts[i] === null || texts[i] === undefined ? `#${ids[i]}` : `“${texts[i]!.replaceAll("\n", "⏎")}”`;
    (row.ends[ends[i]!] ??= []).push({ text, cosine: cosines[i]!, random: randoms[i]! });
  }
  for (const row of rows.values())
    for (const end of Object.values(row.ends)) end.sort((a, b) => Math.abs(b.cosine) - Math.abs(a.cosine));
  return [...rows.values()];
}

function Gains({ channel }: { channel: Table | undefined }) {
  if (!channel) return null;
  const gains = column(channel, "gain") as number[];
  const edge = Number(channel.stamp.null_edge ?? 0);
  const y = scaleLinear([0, Math.max(edge, ...gains) * 1.05], [150, 8]);
  const step = 460 / Math.max(1, gains.length);
  const over = gains.filter((gain) => gain > edge).length;
  return (
    <>
      <h2>
        All gains{" "}
        <Behind name="gains" rows={() => gains.map((gain, i) => ({ direction: i + 1, gain, null_edge: edge }))} />
      </h2>
      <p class="lead">
        {over} of {gains.length} are larger than the largest of a random orientation would be (dotted).
      </p>
      <svg width={500} height={176} role="img" aria-label={`${gains.length} gains, ${over} above chance`}>
        {gains.map((gain, i) => (
          <rect key={i} class={gain > edge ? "gain above" : "gain"} x={30 + step * i} width={Math.max(1, step - 1)} y={y(gain)} height={150 - y(gain)} />
        ))}
        <path class="least" d={`M30,${y(edge)}H490`} />
        <text x={24} y={154} text-anchor="end">
          0
        </text>
        <text x={24} y={y(Math.max(...gains)) + 4} text-anchor="end">
          {Math.max(...gains).toPrecision(2)}
        </text>
        <text x={30} y={168}>
          1
        </text>
        <text x={490} y={168} text-anchor="end">
          {gains.length}
        </text>
      </svg>
    </>
  );
}

function Offsets({ profile }: { profile: Table }) {
  const scores = column(profile, "score") as number[];
  const labels = profile.labels;
  const y = scaleLinear([0, Math.max(...scores) * 1.1], [110, 8]);
  const x = (i: number) => 34 + (450 * i) / Math.max(1, scores.length - 1);
  return (
    <>
      <h2>
        By rotary offset <Behind name="offsets" rows={() => labels.map((offset, i) => ({ offset, score: scores[i]! }))} />
      </h2>
      <p class="lead">Score where the key stands so many tokens before its query.</p>
      <svg width={500} height={136} role="img" aria-label="score by rotary offset">
        <path class="curve" d={scores.map((score, i) => `${i ? "L" : "M"}${x(i)},${y(score)}`).join("")} />
        {scores.map((score, i) => (
          <circle key={i} class="end" cx={x(i)} cy={y(score)} r={2} />
        ))}
        {labels.map((label, i) =>
          i % 5 === 0 ? (
            <text key={label} x={x(i)} y={128} text-anchor="middle">
              {label}
            </text>
          ) : null,
        )}
        <text x={28} y={y(Math.max(...scores)) + 4} text-anchor="end">
          {figure(Math.max(...scores))}
        </text>
        <text x={28} y={114} text-anchor="end">
          0
        </text>
      </svg>
    </>
  );
}
