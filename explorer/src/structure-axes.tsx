/** What the pictures of Structure share: axes without rotated text, and one stop of the keyboard for a whole chart. */

import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

export interface Frame {
  width: number;
  height: number;
  left: number;
  right: number;
  top: number;
  bottom: number;
}

export const framed = (width: number, height: number, left = 48, top = 26): Frame => ({
  width,
  height,
  left,
  right: width - 8,
  top,
  bottom: height - 38,
});

/** Three digits that say something: 1234 → 1,234; .04106 → .0411; 2.00 → 2. */
export function significant(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-4) return `${value < 0 ? "−" : ""}${power(Math.log10(Math.abs(value)), value)}`;
  const short = Number(value.toPrecision(digits));
  return short.toLocaleString("en", { maximumFractionDigits: 8 }).replace(/^(-?)0\./, "$1.").replace("-", "−");
}

function power(log: number, value: number): string {
  const exponent = Math.floor(log);
  const digit = Math.round(Math.abs(value) / 10 ** exponent);
  return `${digit === 1 ? "" : `${digit} · `}10${raised(exponent)}`;
}

/** An exponent in raised figures. */
export const raised = (exponent: number) => String(exponent).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]!));

/** Ticks of a logarithmic axis: 1, 2 and 5 where it is short, powers of ten where it is long. */
export function decades(low: number, high: number): number[] {
  const ticks: number[] = [];
  const short = Math.log10(high / low) < 2.2;
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
    for (const digit of short ? [1, 2, 5] : [1]) {
      const tick = digit * 10 ** p;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  const every = Math.ceil(ticks.length / 7);
  return ticks.filter((_, i) => i % every === 0);
}

interface AxesProps {
  frame: Frame;
  x: (value: number) => number;
  y: (value: number) => number;
  xTicks: [number, string][];
  yTicks: [number, string][];
  xTitle: string;
  yTitle: string;
  upright?: boolean;
}

/** Ticks and titles; horizontal lines, and with `upright` vertical ones. */
export function Axes({ frame, x, y, xTicks, yTicks, xTitle, yTitle, upright = false }: AxesProps) {
  return (
    <>
      <text class="axis" x={0} y={12}>
        ↑ {yTitle}
      </text>
      {yTicks.map(([value, name]) => (
        <g key={value} class="tick">
          <path d={`M${frame.left},${y(value)}H${frame.right}`} />
          <text x={frame.left - 8} y={y(value) + 4} text-anchor="end">
            {name}
          </text>
        </g>
      ))}
      {xTicks.map(([value, name]) => (
        <g key={value} class="tick">
          {upright && <path d={`M${x(value)},${frame.top}V${frame.bottom}`} />}
          <text x={x(value)} y={frame.bottom + 16} text-anchor="middle">
            {name}
          </text>
        </g>
      ))}
      <text class="axis" x={frame.right} y={frame.height - 4} text-anchor="end">
        {xTitle} →
      </text>
    </>
  );
}

/** A chart is one stop: arrows go through its items, or where `move` says; Enter opens, Escape leaves; moves are announced. */
export function useSteps<T>(
  items: T[],
  said: (item: T) => string,
  open?: (item: T) => void,
  move?: (from: T, key: string) => T | undefined,
) {
  const [name, setName] = useState<string | null>(null);
  const at = name === null ? -1 : items.findIndex((item) => said(item) === name);
  const current = items[at] ?? null;
  const set = (item: T | null) => setName(item === null ? null : said(item));
  const onKeyDown = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step && items.length) {
      const next = at < 0 && step < 0 ? items.length - 1 : at + step;
      if (current !== null && move) set(move(current, event.key) ?? current);
      else set(items[Math.max(0, Math.min(items.length - 1, next))]!);
    } else if (event.key === "Enter" && current !== null && open) open(current);
    else if (event.key === "Escape" && current !== null) {
      set(null);
      event.stopPropagation();
    } else return;
    event.preventDefault();
  };
  const announced = (
    <span class="announced" role="status">
      {name}
    </span>
  );
  return { current, set, stop: { tabindex: 0, onKeyDown }, said: announced };
}

/** What is not stored, and the command that computes it. */
export function Missing({ what, command }: { what: string; command: string }) {
  return (
    <p class="note">
      {what} not stored: <code>{command}</code>
    </p>
  );
}

/** What the pointer or the keyboard is on, beside the place. */
export function Tip({ x, y, width, children }: { x: number; y: number; width: number; children: ComponentChildren }) {
  return (
    <div class="tip" style={x > width / 2 ? { right: width - x + 12, top: y - 12 } : { left: x + 12, top: y - 12 }}>
      {children}
    </div>
  );
}
