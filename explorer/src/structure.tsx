/** The stream as a whole: how crowded it is, what its neurons and heads keep and erase, and whether its axes matter. */

import { useEffect } from "preact/hooks";
import { BasisSection } from "./basis";
import { MemorySection } from "./memory";
import { type PageProps, useDocument } from "./page";
import type { Structure } from "./structure-document";
import { SuperpositionSection } from "./superposition";

const SECTIONS = { superposition: "Superposition", memory: "Memory", basis: "Basis" };

export interface SectionProps extends PageProps {
  structure: Structure;
}

export function StructurePage(props: PageProps) {
  const { map, address } = props;
  const stored = useDocument<Structure>(map.stored.structure);
  const structure = map.stored.structure ? stored : {};
  useEffect(() => {
    if (structure && address.name) document.getElementById(address.name)?.scrollIntoView();
  }, [structure, address.name]);
  return (
    <main class="structure">
      <h1>How the stream is shared</h1>
      <p class="lead">
        {map.width} dimensions carry everything that {map.model} writes.{" "}
        {Object.entries(SECTIONS).map(([id, name]) => (
          <a key={id} href={`#/structure/${id}`} aria-current={address.name === id ? "location" : undefined}>
            {name}
          </a>
        ))}
        <a href="#/layers">Width by depth</a>
        <a href="#/vector">Attached directions</a>
      </p>
      {structure ? (
        <>
          <SuperpositionSection {...props} structure={structure} />
          <MemorySection {...props} structure={structure} />
          <BasisSection {...props} structure={structure} />
        </>
      ) : (
        <p class="note">Reading …</p>
      )}
    </main>
  );
}

/** How many charts stand side by side, and how wide each is. */
export function columns(width: number, most: number): { across: number; each: number } {
  const across = Math.max(1, Math.min(most, width >= 1160 ? most : width >= 760 ? 2 : 1));
  return { across, each: Math.floor((width - 40 * (across - 1)) / across) };
}
