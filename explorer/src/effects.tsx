/** What the model loses when one connection is removed: each edge with its interval, over the range of random ones. */

import { scaleSymlog } from "d3-scale";
import { useEffect, useMemo } from "preact/hooks";
import { numberOf } from "./address";
import type { Carried, Effect, Table } from "./data";
import { Command, figure, ofLoss, portClass, ramp, signed } from "./marks";
import { type PageProps, useDocument } from "./page";
import { Behind } from "./table";
import { Along, CHANGED, Chosen, ColouredText, rowsOf, tokensOf } from "./text";

const VERDICTS: Record<string, string> = { causal: "matters", negligible: "too small", inconclusive: "open" };
const PORTS: Record<string, string> = { K: "into keys", Q: "into queries", V: "into values" };

export function EffectsPage(props: PageProps) {
  const { map, address, go, width, theme } = props;
  const colour = useMemo(ramp, [theme]);
  const asked = map.effects.filter((one) => one.kind === "asked");
  const manner = map.ablation;
  if (!asked.length || !manner) {
    return (
      <main>
        <h1>What the model loses when one connection is removed</h1>
        <p class="note">
          No edge was removed yet. This removes some: <Command text={`vweights map ${map.model} -o ATLAS --repeated`} /> and this
          any: <Command text={`vweights ablate ${map.model} WRITER READER --repeated`} />
        </p>
      </main>
    );
  }
  const beside = width >= 1240;
  const inner = beside ? Math.round(Math.min(1240, width * 0.6)) : Math.min(1240, width);
  const narrow = width < 760;
  const row = narrow ? 48 : 36;
  const [left, right] = narrow ? [8, inner - 8] : [220, inner - 190];
  const ends = map.effects.flatMap((one) => [one.effect, one.low ?? one.effect, one.high ?? one.effect]);
  const x = scaleSymlog([Math.min(-0.1, ...ends) * 1.1, Math.max(0.1, ...ends) * 1.1], [left, right]).constant(0.006);
  const ports = [...new Set(["K", "Q", "V", ...asked.map((one) => one.port)])].filter((port) => asked.some((one) => one.port === port));
  const key = (one: Effect) => `${one.writer}>${one.reader}.${one.port}`;
  const selected = asked.find((one) => key(one) === address.state.sel) ?? [...asked].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect))[0]!;
  const sel = key(selected);
  let y = 34;
  const blocks = ports.map((port) => {
    const rows = asked.filter((one) => one.port === port).sort((a, b) => b.effect - a.effect);
    const random = map.effects.filter((one) => one.kind === "random" && one.port === port).map((one) => one.effect);
    const top = y;
    y += row * (rows.length + 1) + 14;
    return { port, rows, random, top };
  });
  const ticks = [-5, -1, -0.5, -0.1, -0.01, 0, 0.01, 0.1, 0.5, 1, 5].filter((t) => t >= x.domain()[0]! && t <= x.domain()[1]!);
  const least = Number(manner.least ?? 0.01);
  const rows = () =>
    map.effects.map((one) => ({
      writer: one.writer,
      reader: `${one.reader}.${one.port}`,
      shared_with: one.shared.join(" "),
      kind: one.kind,
      effect_nats: one.effect,
      low: one.low,
      high: one.high,
      verdict: one.verdict,
      loss_changed: one.changed,
    }));
  return (
    <main class="effects">
      <h1>
        What the model loses when one connection is removed <Behind name="effects" rows={rows} />
      </h1>
      <p class="lead">
        {asked.length} edges, removed one at a time, against {map.effects.length - asked.length} random ones.{" "}
        {manner.text}; loss with every edge {figure(manner.clean_loss, 2)} nats.
      </p>
      <div class={beside ? "two" : "one"}>
      <section style={{ width: inner }}>
      <svg width={inner} height={y + 8} role="group" aria-label={`effects of ${asked.length} edges`}>
        {blocks.map(({ port, rows, random, top }) =>
          random.length ? (
            <rect
              key={port}
              class="range"
              x={x(Math.min(...random)) - 3}
              width={x(Math.max(...random)) - x(Math.min(...random)) + 6}
              y={top}
              height={row * (rows.length + 1) + 4}
              rx={3}
            />
          ) : null,
        )}
        {ticks.map((t) => (
          <g key={t} class={t === 0 ? "zero" : "tick"}>
            <path d={`M${x(t)},26V${y}`} />
            {(!narrow || [-0.1, 0, 0.1, 1, 5].includes(t)) && (
              <text x={x(t)} y={20} text-anchor="middle">
                {t === 0 ? "0" : signed(t, 2).replace(/\.?0+$/, "").replace("0.", ".")}
              </text>
            )}
          </g>
        ))}
        {[-least, least].map((t) => (
          <path key={t} class="least" d={`M${x(t)},26V${y}`} />
        ))}
        {!narrow && (
          <>
            <text x={x(0) - 90} y={8} text-anchor="end">
              ← better without
            </text>
            <text x={x(0) + 90} y={8}>
              worse without: the edge helps →
            </text>
          </>
        )}
        {blocks.map(({ port, rows, random, top }) => (
          <g key={port}>
            {random.map((value, i) => (
              <circle key={i} class="random" cx={x(value)} cy={top + 12 + 7 * (i % 3)} r={2.6} />
            ))}
            <text class="part" x={0} y={top + 18}>
              <tspan class={portClass(port)}>{port}</tspan> {PORTS[port] ?? ""}
            </text>
            {!narrow && (
              <text x={inner} y={top + 18} text-anchor="end">
                {random.length ? `${random.length} random, up to ${figure(Math.max(...random.map(Math.abs)))}` : "none random"}
              </text>
            )}
            {rows.map((one, i) => {
              const at = top + row * (i + 1) + (narrow ? 22 : 12); // of the marks; a name stands above them where there is no room beside
              const matters = one.verdict === "causal";
              const shared = one.shared.map((name) => name.replace(/^L\d+/, "")).join(" ");
              const value = signed(one.effect, Math.abs(one.effect) < 0.02 ? 3 : 2);
              const says = VERDICTS[one.verdict] ?? one.verdict;
              return (
                <g
                  key={key(one)}
                  class={`effect-row ${key(one) === sel ? "selected" : ""}`}
                  tabindex={0}
                  role="button"
                  aria-label={`${one.writer} → ${one.reader}.${port} ${shared}, ${value}, ${says}; nats without it`}
                  aria-pressed={key(one) === sel}
                  onClick={() => go({ state: { sel: key(one) } })}
                  onDblClick={() => go({ page: "pair", name: `${one.writer}/${one.reader}.${port}`, state: {} })}
                  onKeyDown={(event) =>
                    event.key === "Enter" && go({ page: "pair", name: `${one.writer}/${one.reader}.${port}`, state: {} })
                  }
                >
                  <rect x={0} y={narrow ? at - 32 : at - 16} width={inner} height={row - 4} />
                  <text class="name" x={4} y={narrow ? at - 16 : at + 4}>
                    {one.writer} → {one.reader}.<tspan class={portClass(port)}>{port}</tspan>
                    <tspan class="others"> {shared}</tspan>
                  </text>
                  {one.low !== null && one.high !== null && (
                    <path
                      class="interval"
                      style={{ stroke: matters ? colour(Math.sign(one.effect)) : undefined }}
                      d={`M${x(one.low)},${at - 5}V${at + 5}M${x(one.low)},${at}H${x(one.high)}M${x(one.high)},${at - 5}V${at + 5}`}
                    />
                  )}
                  <circle
                    class={matters ? "effect" : "effect open"}
                    cx={x(one.effect)}
                    cy={at}
                    r={matters ? 6 : 4}
                    style={{ fill: matters ? colour(ofLoss(one.effect)) : undefined }}
                  />
                  {narrow ? (
                    <text class="value" x={inner} y={at - 16} text-anchor="end">
                      {signed(one.effect, Math.abs(one.effect) < 0.02 ? 3 : 2)}{" "}
                      <tspan class="others">{VERDICTS[one.verdict] ?? one.verdict}</tspan>
                    </text>
                  ) : (
                    <>
                      {" "}
                      <text class="value" x={inner - 96} y={at + 4} text-anchor="end">
                        {value}
                      </text>{" "}
                      <text class={matters ? "verdict matters" : "verdict"} x={inner} y={at + 4} text-anchor="end">
                        {says}
                      </text>
                    </>
                  )}
                </g>
              );
            })}
          </g>
        ))}
      </svg>
      <p class="note">
        Line: 95% interval over {manner.sequences} sequences. Grey band: the range of the random edges of that port, a
        yardstick and never the verdict. Matters: the interval lies beyond ±{figure(least, 2)} nats (dotted). Linear within
        ±.006, logarithmic beyond. Open: it does not decide.
      </p>
      {Number(manner.sequences) < 32 && (
        <p class="note">
          {manner.sequences} sequences were run; a t-interval asks for 32:{" "}
          <Command
            text={`vweights ablate ${map.model} ${selected.writer} ${selected.reader}.${selected.port} --repeated --sequences 32`}
          />
        </p>
      )}
      </section>
      <TextPanel {...props} effect={selected} width={beside ? width - inner - 40 : inner} />
      </div>
    </main>
  );
}

/** Where in a text the selected edge matters. */
function TextPanel({ map, address, go, effect, width, theme }: PageProps & { effect: Effect }) {
  const stored = map.stored[`${effect.writer}/${effect.reader}.${effect.port}`];
  const carried = useDocument<Carried>(stored);
  const texts: Table[] = carried?.edge_tokens ?? [];
  const at = Math.max(0, Math.min(texts.length - 1, numberOf(address.state.text, 1) - 1));
  const table = texts[at];
  const all = useMemo(() => (table ? tokensOf(table) : []), [table]);
  const set = (state: Record<string, string>) => go({ state: { sel: address.state.sel ?? "", ...state } });
  const turn = (by: number) => texts.length > 1 && set({ text: String(((at + by + texts.length) % texts.length) + 1) });
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (event.target instanceof HTMLInputElement) return;
      if (event.key === "[") turn(-1);
      else if (event.key === "]") turn(1);
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  });
  const shown = useMemo(() => all.filter((token) => token.sequence === all[0]?.sequence), [all]);
  const counted = all.filter((token) => !Number.isNaN(token.change));
  const changed = counted.filter((token) => Math.abs(token.change) > CHANGED).length;
  const mean = counted.reduce((sum, token) => sum + token.change, 0) / (counted.length || 1);
  const strongest = [...shown].filter((t) => !Number.isNaN(t.change)).sort((a, b) => Math.abs(b.change) - Math.abs(a.change))[0];
  const chosen = shown.find((token) => String(token.at) === address.state.token) ?? strongest;
  const several = new Set(all.map((token) => token.sequence)).size;
  return (
    <section class="aside" key={theme}>
      <h2>
        Where in a text{" "}
        <small>
          without {effect.writer} → {effect.reader}.<span class={portClass(effect.port)}>{effect.port}</span>
        </small>{" "}
        {texts.length > 1 && (
          <span class="step">
            text <b>{at + 1}</b> of {texts.length}{" "}
            <button onClick={() => turn(-1)} aria-label="the text before">
              [
            </button>
            <button onClick={() => turn(1)} aria-label="the next text">
              ]
            </button>
          </span>
        )}
        {all.length > 0 && <Behind name="tokens" rows={() => rowsOf(all)} />}
      </h2>
      {!stored || (carried && !table) ? (
        <p class="note">
          Its effect token by token is not stored:{" "}
          <Command text={`vweights ablate ${map.model} ${effect.writer} ${effect.reader}.${effect.port} --by-token`} />
        </p>
      ) : !carried ? (
        <p class="note">Reading …</p>
      ) : (
        <>
          <ColouredText tokens={shown} chosen={chosen?.at ?? -1} onChoose={(token) => set({ text: address.state.text ?? "", token: String(token) })} />
          <p class="legend">
            −2 nats <span class="ramp" /> +2 nats
            <span>
              {changed} of {counted.length} tokens change by more than {figure(CHANGED, 1)} nats; the mean is {signed(mean, 3)}.
            </span>
          </p>
          {chosen && <Chosen token={chosen} />}
          {shown.length > 2 && (
            <>
              <h2>
                Along the text{" "}
                <small>
                  loss by position{several > 1 ? `, mean of ${several} sequences` : ""}
                </small>
              </h2>
              <p class="legend">
                <span>
                  <i class="key along without" /> without the edge
                </span>
                <span>
                  <i class="key along" /> with it
                </span>
                <span>{String(table?.stamp.text ?? "")}</span>
              </p>
              <Along tokens={all} width={Math.min(width, 700)} />
            </>
          )}
        </>
      )}
      <p class="actions">
        <button onClick={() => go({ page: "pair", name: `${effect.writer}/${effect.reader}.${effect.port}`, state: {} })}>
          Open the pair
        </button>
      </p>
    </section>
  );
}
