/** What stands for what: behaviours are shapes, measures are a ramp, ports are hues. */

import { interpolateLab } from "d3-interpolate";
import { useState } from "preact/hooks";

export const BEHAVIOURS: Record<string, string> = {
  induction: "induction",
  previous_token: "previous token",
  duplicate_token: "duplicate",
  self: "self",
  first_token: "first token",
};

const SHAPES: Record<string, string> = {
  induction: "M4.2,0A4.2,4.2 0 1 1 -4.2,0A4.2,4.2 0 1 1 4.2,0Z",
  previous_token: "M-4.2,0L3.4,-4.4L3.4,4.4Z",
  duplicate_token: "M-3.6,-3.6H3.6V3.6H-3.6Z",
  self: "M0,-4.8L4.8,0L0,4.8L-4.8,0Z",
  first_token: "M3.7,0A3.7,3.7 0 1 1 -3.7,0A3.7,3.7 0 1 1 3.7,0Z",
};

/** A head's behaviour as a shape, in ink; a ring for the first token, a dot for none. */
export function Glyph({ behaviour, x = 0, y = 0 }: { behaviour: string | null | undefined; x?: number; y?: number }) {
  const at = `translate(${x},${y})`;
  if (!behaviour) return <circle class="glyph none" cx={x} cy={y} r={1.6} />;
  return <path class={`glyph ${behaviour}`} d={SHAPES[behaviour]} transform={at} />;
}

/** The same within text. */
export function Sign({ behaviour }: { behaviour: string | null | undefined }) {
  return (
    <svg class="sign" width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true">
      <Glyph behaviour={behaviour} />
    </svg>
  );
}

export const css = (name: string) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Colours of a measure around chance or no change, in Lab: down, mid, up. */
export function ramp(): (t: number) => string {
  const below = interpolateLab(css("mid"), css("down"));
  const above = interpolateLab(css("mid"), css("up"));
  return (t) => (t < 0 ? below(Math.min(1, -t)) : above(Math.min(1, t)));
}

/** Where a score over chance stands on the ramp: exponent .62 on log2, ends at a quarter and four times chance. */
export const overChance = (ratio: number) => {
  const l = Math.log2(ratio) / 2;
  return Math.sign(l) * Math.abs(l) ** 0.62;
};

/** Where a change of loss stands: square root, ends at 3 nats. */
export const ofLoss = (nats: number) => Math.sign(nats) * Math.sqrt(Math.min(1, Math.abs(nats) / 3));

export const figure = (value: number | null | undefined, digits = 3) =>
  value === null || value === undefined || Number.isNaN(value)
    ? "–"
    : value.toFixed(digits).replace(/^(-?)0\./, "$1.").replace("-", "−");

export const signed = (value: number | null | undefined, digits = 2) =>
  value === null || value === undefined || Number.isNaN(value)
    ? "–"
    : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;

export const percent = (value: number | null | undefined) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : `${(100 * value).toFixed(1)} %`;

export const portClass = (port: string) => (["Q", "K", "V"].includes(port) ? `port-${port}` : "port-MLP");

/** A command to run, with a button that copies it. */
export function Command({ text }: { text: string }) {
  const [copied, setCopied] = useState(false);
  return (
    <span class="command">
      <code>{text}</code>{" "}
      <button
        aria-label={`copy ${text}`}
        onClick={() => void navigator.clipboard?.writeText(text).then(() => setCopied(true), () => setCopied(false))}
      >
        {copied ? "copied" : "copy"}
      </button>
    </span>
  );
}

/** What draws on an empty canvas of so many pixels of the page, as fine as the screen is. */
export function emptied(canvas: HTMLCanvasElement | null, width: number, height: number): CanvasRenderingContext2D | null {
  const pen = canvas?.getContext("2d") ?? null;
  if (!canvas || !pen) return null;
  const density = devicePixelRatio || 1;
  canvas.width = width * density;
  canvas.height = height * density;
  pen.setTransform(density, 0, 0, density, 0, 0);
  return pen;
}
