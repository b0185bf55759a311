/** An edge on a text, token by token: where its removal costs, and where it carries most. */

import { interpolateLab } from "d3-interpolate";
import { type Table, column, numbers } from "./data";
import { css, figure, percent, ramp, signed } from "./marks";
import { Behind } from "./table";

export const CHANGED = 0.1; // nats from which a token's change is marked
const ENDS = 2; // nats at which colours end

export interface Said {
  at: number;
  sequence: number;
  position: number;
  text: string;
  loss: number;
  without: number;
  change: number;
  share: number;
  likeliest: string | null;
  likeliestWithout: string | null;
}

/** The tokens of one table of an edge, in order. */
export function tokensOf(table: Table): Said[] {
  const [sequence, position, loss, without, share] = ["sequence", "position", "loss", "loss_without", "share"].map((name) =>
    numbers(table, name),
  ) as [number[], number[], number[], number[], number[]];
  const [text, ids, likeliest, other] = ["text", "token", "likeliest_text", "likeliest_text_without"].map((name) => column(table, name));
  return sequence.map((_, i) => ({
    at: i,
    sequence: sequence[i]!,
    position: position[i]!,
    text: typeof text![i] === "string" ? String(text![i]) : ` #${String(ids![i])}`,
    loss: loss[i]!,
    without: without[i]!,
    change: without[i]! - loss[i]!,
    share: share[i]!,
    likeliest: (likeliest![i] as string | null | undefined) ?? null,
    likeliestWithout: (other![i] as string | null | undefined) ?? null,
  }));
}

export const rowsOf = (tokens: Said[]) =>
  tokens.map(({ sequence, position, text, loss, without, change, share }) => ({
    sequence,
    position,
    token: text,
    loss,
    loss_without: without,
    change,
    share,
  }));

interface TextProps {
  tokens: Said[];
  chosen: number;
  onChoose: (at: number) => void;
}

/** A text with every token coloured by its change of loss: solid underline more, dotted less, plain below .1 nats. */
export function ColouredText({ tokens, chosen, onChoose }: TextProps) {
  const shade = ramp();
  const [ink, paper] = [css("ink"), css("paper")];
  const keyed = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = tokens.findIndex((token) => token.at === chosen);
    onChoose(tokens[Math.max(0, Math.min(tokens.length - 1, at + step))]!.at);
    event.preventDefault();
  };
  return (
    <p class="text" tabIndex={0} role="application" aria-label="text, token by token; arrows go through it" onKeyDown={keyed}>
      {tokens.map((token) => {
        const strong = Math.abs(token.change) > CHANGED;
        const space = /^\s*/.exec(token.text)![0];
        const tone = strong ? shade(Math.sign(token.change) * Math.sqrt(Math.min(1, Math.abs(token.change) / ENDS))) : undefined;
        return (
          <>
            {space.includes("\n") ? <br /> : space}
            <span
              key={token.at}
              class={`said${strong ? (token.change > 0 ? " more" : " less") : ""}${token.at === chosen ? " chosen" : ""}`}
              style={tone ? ground(tone, ink, paper) : undefined}
              onClick={() => onChoose(token.at)}
            >
              {token.text.trimStart() || "␣"}
            </span>
          </>
        );
      })}
    </p>
  );
}

const LEGIBLE = 4.5; // to 1: the contrast that text of this size has at least

/** A colour as a ground for text, and ink or paper on it, whichever is read better; paler where neither can be read. */
function ground(tone: string, ink: string, paper: string): { background: string; color: string } {
  const paler = interpolateLab(tone, paper);
  for (let share = 0; ; share += 0.05) {
    const background = paler(Math.min(1, share));
    const [dark, light] = [contrast(background, ink), contrast(background, paper)];
    if (Math.max(dark, light) >= LEGIBLE || share >= 1) return { background, color: dark >= light ? ink : paper };
  }
}

function contrast(a: string, b: string): number {
  const light = (text: string) => {
    const parts = text.startsWith("#") ? [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16)) : (text.match(/[\d.]+/g) ?? []).map(Number);
    const [r, g, b] = parts.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const [x, y] = [light(a), light(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
}

/** Where an edge carries most: the foremost tokens by share, each with what stands around it. */
export function Contexts({ texts, port }: { texts: Table[]; port: string }) {
  const text = texts[0];
  if (!text) return null;
  const tokens = tokensOf(text);
  const foremost: Said[] = [];
  for (const token of [...tokens].filter((one) => !Number.isNaN(one.share)).sort((a, b) => b.share - a.share)) {
    if (foremost.length === 5) break;
    if (foremost.every((one) => one.sequence !== token.sequence || Math.abs(one.position - token.position) > 6)) foremost.push(token);
  }
  if (!foremost.length) return null;
  return (
    <>
      <h2>
        Where it carries most <small>share of what arrives, token by token</small> <Behind name="contexts" rows={() => rowsOf(tokens)} />
      </h2>
      <table class={`contexts bars-${port}`}>
        <tbody>
          {foremost.map((token) => (
            <tr key={token.at}>
              <th scope="row">{percent(token.share)}</th>
              <td>
                {tokens
                  .filter((one) => one.sequence === token.sequence && Math.abs(one.position - token.position) <= 8)
                  .map((one) => (
                    <span key={one.at} class={one === token ? "said carrier chosen" : "said carrier"} style={{ "--share": String(one.share || 0) }} title={percent(one.share)}>
                      {one.text.replaceAll("\n", "⏎")}
                    </span>
                  ))}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </>
  );
}

interface AlongProps {
  tokens: Said[];
  width: number;
}

/** Loss by position with and without an edge, the mean over sequences. */
export function Along({ tokens, width }: AlongProps) {
  const means = (of: (token: Said) => number) => {
    const sums = new Map<number, [number, number]>();
    for (const token of tokens) {
      const value = of(token);
      if (Number.isNaN(value)) continue;
      const [sum, count] = sums.get(token.position) ?? [0, 0];
      sums.set(token.position, [sum + value, count + 1]);
    }
    return [...sums].sort((a, b) => a[0] - b[0]).map(([position, [sum, count]]) => [position, sum / count] as const);
  };
  const [intact, without] = [means((token) => token.loss), means((token) => token.without)];
  if (intact.length < 2) return null;
  const [first, last] = [intact[0]![0], intact.at(-1)![0]];
  const top = Math.max(...intact.map((p) => p[1]), ...without.map((p) => p[1]));
  const x = (position: number) => 28 + ((width - 36) * (position - first)) / (last - first);
  const y = (loss: number) => 150 - (138 * loss) / (top || 1);
  const path = (points: (readonly [number, number])[]) => points.map(([p, v], i) => `${i ? "L" : "M"}${x(p)},${y(v)}`).join("");
  return (
    <svg width={width} height={172} role="img" aria-label="loss by position, with and without the edge">
      {[0, 0.5, 1].map((share) => (
        <g key={share} class="tick">
          <path d={`M28,${y(top * share)}H${width - 8}`} />
          <text x={22} y={y(top * share) + 4} text-anchor="end">
            {figure(top * share, 0)}
          </text>
        </g>
      ))}
      <path class="between" d={`${path(without)}${path([...intact].reverse()).replace("M", "L")}Z`} />
      <path class="curve without" d={path(without)} />
      <path class="curve" d={path(intact)} />
      {[first, Math.round((first + last) / 2), last].map((position) => (
        <text key={position} x={x(position)} y={166} text-anchor="middle">
          {position}
        </text>
      ))}
    </svg>
  );
}

/** One token: its loss with and without the edge, and what was likeliest. */
export function Chosen({ token }: { token: Said }) {
  return (
    <div class="token-card" role="status">
      <p>
        <b class="said chosen">{token.text.trim() || "␣"}</b>{" "}
        {Number.isNaN(token.change) ? (
          "is not counted"
        ) : (
          <>
            <b class={token.change > 0 ? "up" : "down"}>{signed(token.change)}</b> nats, <b>{figure(token.loss, 2)}</b> with the edge,{" "}
            <b>{figure(token.without, 2)}</b> without
          </>
        )}
      </p>
      {token.likeliest !== null && (
        <p class="note">
          Likeliest here: with the edge “{token.likeliest.trim()}”, without it “{token.likeliestWithout?.trim()}”. The edge is{" "}
          {percent(token.share)} of what arrives here.
        </p>
      )}
    </div>
  );
}
