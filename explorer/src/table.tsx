/** The plain table behind a picture, shown in place of it, or saved as CSV. */

import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

export type Rows = Record<string, string | number | null>[];

function saved(name: string, rows: Rows) {
  const columns = Object.keys(rows[0] ?? {});
  const cell = (value: string | number | null) => {
    const text = value === null || (typeof value === "number" && Number.isNaN(value)) ? "" : String(value);
    const plain = /^[=+\-@\t]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return /[",\n]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
  };
  const lines = [columns.join(","), ...rows.map((row) => columns.map((column) => cell(row[column] ?? null)).join(","))];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n")], { type: "text/csv" }));
  link.download = `${name}.csv`;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** "Table · CSV" beside a title; the table opens over the page. */
export function Behind({ name, rows }: { name: string; rows: () => Rows }) {
  const [open, setOpen] = useState(false);
  const shown = open ? rows() : [];
  const columns = Object.keys(shown[0] ?? {});
  return (
    <span class="behind">
      <button onClick={() => setOpen(!open)} aria-expanded={open}>
        Table
      </button>{" "}
      · <button onClick={() => saved(name, rows())}>CSV</button>
      {open && (
        <div class="sheet" role="dialog" aria-label={name}>
          <p>
            {shown.length.toLocaleString("en")} rows{shown.length > 500 ? ", the first 500 shown" : ""}
            <button onClick={() => setOpen(false)}>Close</button>
          </p>
          <div class="scroll" tabIndex={0}>
            <table>
              <thead>
                <tr>
                  {columns.map((column) => (
                    <th key={column}>{column}</th>
                  ))}
                </tr>
              </thead>
              <tbody>
                {shown.slice(0, 500).map((row, i) => (
                  <tr key={i}>
                    {columns.map((column) => {
                      const value = row[column];
                      return (
                        <td key={column}>
                          {typeof value === "number" ? (Number.isNaN(value) ? "–" : +value.toPrecision(4)) : value}
                        </td>
                      );
                    })}
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </div>
      )}
    </span>
  );
}

interface EdgeRowProps {
  pinned: boolean;
  onPin: () => void;
  onOpen: () => void;
  children: ComponentChildren;
}

/** A row of a list of edges: a click pins it, Enter pins it and then opens it. */
export function EdgeRow({ pinned, onPin, onOpen, children }: EdgeRowProps) {
  return (
    <tr class={pinned ? "selected" : ""} tabIndex={0} onClick={onPin} onKeyDown={(event) => event.key === "Enter" && (pinned ? onOpen() : onPin())}>
      {children}
    </tr>
  );
}
