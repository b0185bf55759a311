/** A head's card: what it attends to, the gains of its circuits, what its OV does, its first directions, its edges. */

import type { Heads, MapDocument, Part } from "./data";
import { BEHAVIOURS, Command, Sign, figure, portClass, signed } from "./marks";
import { useDocument } from "./page";
import { entropyRank } from "./spectrum";
import { Behind } from "./table";
import { Tokens, tokenRows } from "./tokens";

const ATTENDS: Record<string, string> = {
  induction: "Attends to the token that came after an earlier copy of the present one.",
  previous_token: "Attends to the token just before the present one.",
  duplicate_token: "Attends to earlier copies of the present token.",
  self: "Attends to the present token itself.",
  first_token: "Attends to the first token, where heads rest that have nothing to do.",
};

const KINDS: Record<string, string> = { mlp: "MLP", embed: "token embedding", pos: "positions", bias: "a constant" };

interface Props {
  map: MapDocument;
  part: Part;
  onMove: (by: number) => void;
  onPair: (name: string) => void;
}

export function Card({ map, part, onMove, onPair }: Props) {
  const heads = useDocument<Heads>(map.stored.heads);
  const behaviours = map.behaviours[part.label];
  const threshold = map.threshold ?? 0.4;
  const shared = map.parts.filter((one) => part.group && one.group === part.group && one.label !== part.label);
  const effects = map.effects.filter(
    (one) => one.kind === "asked" && (one.writer === part.label || [one.reader, ...one.shared].includes(part.label)),
  );
  const isHead = part.kind === "head";
  const at = heads?.circuits?.labels.indexOf(part.label) ?? -1;
  const clean = (gains: (number | null)[] | undefined) => (gains ?? []).filter((gain): gain is number => gain !== null);
  return (
    <section class="card" aria-label={`card of ${part.label}`}>
      <h1>
        {part.label} {isHead && <Sign behaviour={behaviours?.label} />}{" "}
        <small>{isHead ? (BEHAVIOURS[behaviours?.label ?? ""] ?? (behaviours ? "no label" : "")) : (KINDS[part.kind] ?? part.kind)}</small>
        <span class="step">
          <button onClick={() => onMove(-1)} aria-label={isHead ? "the head before" : "the part before"}>
            ←
          </button>{" "}
          <button onClick={() => onMove(1)} aria-label={isHead ? "the next head" : "the next part"}>
            →
          </button>
        </span>
      </h1>
      <p>
        {ATTENDS[behaviours?.label ?? ""]}{" "}
        {shared.length > 0 && <>Keys and values shared with {shared.map((one) => one.label).join(", ")}.</>}
      </p>
      {isHead && (
<>
      <h3>
        Where it attends <small>mean over repeated random tokens; tick: a label from {figure(threshold, 1)}</small>
      </h3>
      {behaviours ? (
        <table class="bars">
          <tbody>
            {Object.entries(behaviours.scores)
              .sort((a, b) => b[1] - a[1])
              .map(([name, value]) => (
                <tr key={name} class={name === behaviours.label ? "foremost" : ""}>
                  <th scope="row">{BEHAVIOURS[name] ?? name}</th>
                  <td>
                    <i style={{ width: `${100 * value}%` }} />
                    <b style={{ left: `${100 * threshold}%` }} />
                  </td>
                  <td>{figure(value, 2)}</td>
                </tr>
              ))}
          </tbody>
        </table>
      ) : (
        <p class="note">
          Not run: <Command text={`vweights map ${map.model} -o ATLAS --repeated`} />
        </p>
      )}
      {heads?.circuits && at >= 0 ? (
        <>
          <h3>
            Gains of its circuits{" "}
            <Behind
              name={`${part.label}-gains`}
              rows={() => {
                const [ov, qk] = [clean(heads.circuits!.ov[at]), clean(heads.circuits!.qk[at])];
                return Array.from({ length: Math.max(ov.length, qk.length) }, (_, i) => ({ direction: i + 1, ov: ov[i] ?? null, qk: qk[i] ?? null }));
              }}
            />
          </h3>
          <div class="gains">
            <Gains name="OV" gains={clean(heads.circuits.ov[at])} />
            <Gains name="QK" gains={clean(heads.circuits.qk[at])} />
          </div>
        </>
      ) : (
        !map.stored.heads && (
          <p class="note">
            Spectra and tokens of heads are not stored: <Command text={`vweights map ${map.model} -o ATLAS`} />
          </p>
        )
      )}
      {heads?.erasers && <Does heads={heads} label={part.label} count={heads.erasers.labels.length} />}
      {heads?.tokens && (
        <>
          <h3>
            First directions of OV in tokens{" "}
            <Behind name={`${part.label}-tokens`} rows={() => tokenRows(heads.tokens![part.label] ?? [])} />
          </h3>
          <Tokens rows={heads.tokens[part.label] ?? []} ends={["read", "written"]} chart={false} />
        </>
      )}
</>
)}
      <h3>
        When its edges were removed <small>nats</small>
      </h3>
      {effects.length ? (
        <table class="edges">
          <tbody>
            {effects.map((one) => (
              <tr key={`${one.writer}${one.reader}${one.port}`}>
                <td>{one.writer === part.label ? "out" : "in"}</td>
                <td>
                  <button onClick={() => onPair(`${one.writer}/${one.reader}.${one.port}`)}>
                    {one.writer} → {one.reader}.<span class={portClass(one.port)}>{one.port}</span>
                  </button>
                </td>
                <td>
                  <b>{signed(one.effect)}</b>
                </td>
                <td class="muted">
                  {figure(one.low, 2)} to {figure(one.high, 2)}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      ) : (
        <p class="note">
          None was: <Command text={`vweights ablate ${map.model} ${isHead ? `WRITER ${part.label}.K` : part.writes === null ? `WRITER ${part.label}` : `${part.label} READER`} --repeated`} />
        </p>
      )}
      {isHead && (
        <>
          <hr />
          <p class="note">
            What reaches it on a text of yours:{" "}
            <Command text={`vweights trace ${map.model} --prompt "…" --reader ${part.label}.K`} />
          </p>
        </>
      )}
    </section>
  );
}

function Gains({ name, gains }: { name: string; gains: number[] }) {
  if (!gains.length) return null;
  const [width, height] = [146, 62];
  const step = width / gains.length;
  const largest = gains[0] || 1;
  return (
    <svg viewBox={`0 0 ${width} ${height + 16}`} role="img" aria-label={`${gains.length} gains of ${name}, the largest ${figure(largest, 1)}`}>
      {gains.map((gain, i) => (
        <rect key={i} class="gain above" x={step * i} width={Math.max(0.6, step - 0.6)} y={height - (height * gain) / largest} height={(height * gain) / largest} />
      ))}
      <text class="part" x={width} y={10} text-anchor="end">
        {name} {Number(largest.toPrecision(3))}
      </text>
      <text x={width} y={24} text-anchor="end">
        ≈ {Math.round(entropyRank(gains))} of {gains.length} in use
      </text>
      <text x={0} y={height + 12}>
        1
      </text>
      <text x={width} y={height + 12} text-anchor="end">
        {gains.length}
      </text>
    </svg>
  );
}

/** Whether OV copies or erases, with a hair for every other head. */
function Does({ heads, label, count }: { heads: Heads; label: string; count: number }) {
  const erasers = heads.erasers!;
  const at = erasers.labels.indexOf(label);
  const rows = [
    ["copies", erasers.copying.map((value) => value ?? NaN)],
    ["erases", erasers.negative_share.map((value) => value ?? NaN)],
  ] as const;
  const x = (value: number) => 100 + 77 * (1 + value);
  return (
    <>
      <h3>
        What its OV does <small>beside all {count} heads</small>{" "}
        <Behind
          name="copying"
          rows={() => erasers.labels.map((head, i) => ({ head, copying: rows[0][1][i]!, erased_share: rows[1][1][i]! }))}
        />
      </h3>
      <svg class="does" viewBox="0 0 300 66" role="img" aria-label={`copies ${figure(rows[0][1][at], 2)}, erases ${figure(rows[1][1][at], 2)}`}>
        {rows.map(([name, values], row) => (
          <g key={name}>
            <text class="row-name" x={0} y={14 + 22 * row}>
              {name}
            </text>
            {values.map((value, i) =>
              Number.isNaN(value) ? null : <path key={i} class="hair" d={`M${x(value)},${3 + 22 * row}v14`} />,
            )}
            {at >= 0 && !Number.isNaN(values[at]!) && <circle class="dot" cx={x(values[at]!)} cy={10 + 22 * row} r={4.5} />}
            <text class="row-name" x={300} y={14 + 22 * row} text-anchor="end">
              {row === 0 ? signed(values[at], 2).replace("0.", ".") : figure(values[at], 2)}
            </text>
          </g>
        ))}
        {[-1, 0, 1].map((value) => (
          <text key={value} x={x(value)} y={62} text-anchor="middle">
            {String(value).replace("-", "−")}
          </text>
        ))}
      </svg>
    </>
  );
}
