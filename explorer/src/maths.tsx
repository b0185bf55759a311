/** Sentences with their formulas set: variables in italics, powers and indices, Greek letters, norms, powers of ten. */

import type { ComponentChildren } from "preact";

const PART =
  /(?<mantissa>\d(?:\.\d+)?)e(?<exponent>[-+]?\d+)|(?<norm>\|\|)|\b(?<greek>eps|lambda)\b|\^(?<power>\d+(?:\.\d+)?|[a-z]\b)|_(?<index>[A-Za-z0-9]\b)|\b(?<layer>T)(?<number>[12])\b|\b(?<product>prod)(?=\()|(?<minus> - )|\b(?<variable>[A-Z](?=_|\[)|[dnNRTOIUVWkmcv])(?![A-Za-z0-9'’])/g;
const GREEK: Record<string, string> = { eps: "ε", lambda: "λ" };

export function Maths({ text }: { text: string }) {
  const parts: ComponentChildren[] = [];
  let end = 0;
  for (const match of text.matchAll(PART)) {
    const { mantissa, exponent, norm, greek, power, index, layer, number, product, minus, variable } = match.groups!;
    parts.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (mantissa !== undefined)
      parts.push(
        <>
          {mantissa} × 10<sup>{String(Number(exponent)).replace("-", "−")}</sup>
        </>,
      );
    else if (norm !== undefined) parts.push("‖");
    else if (greek !== undefined) parts.push(<i>{GREEK[greek]}</i>);
    else if (power !== undefined) parts.push(<sup>{power}</sup>);
    else if (index !== undefined) parts.push(<sub>{index}</sub>);
    else if (layer !== undefined)
      parts.push(
        <>
          <i>{layer}</i>
          <sub>{number}</sub>
        </>,
      );
    else if (product !== undefined) parts.push("∏");
    else if (minus !== undefined) parts.push(" − ");
    else parts.push(<i>{variable}</i>);
  }
  parts.push(text.slice(end));
  return <>{parts}</>;
}
