"""The explorer in a browser: first paint, script time of a frame, and the walk, on an atlas and at the size of 8B.

    PYTHONPATH=tests python benchmarks/explorer.py ATLAS         # its report.html, and random numbers that are served
    PYTHONPATH=tests python benchmarks/explorer.py ATLAS --walk  # questions, and tables of 30 heads against vw.edges

The atlas of the shape of 8B is random: 32 layers of 32 heads with 8 key/value heads and width 4096, all edges
of Q, K and V with shares, attributions and labels. The browser is that of the system; ``npm ci`` brings its driver.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import walking

import virtual_weights as vw
from virtual_weights.record import Axis, Column, Record
from virtual_weights.report.documents import documents, write_documents
from virtual_weights.report.format import FOLDER

LAYERS, HEADS, KV_HEADS, WIDTH = 32, 32, 8, 4096
LOADS, STEPS, WALKED = 5, 60, 30
BEHAVIOURS = ("previous_token", "induction", "duplicate_token", "self", "first_token")


def manifest() -> dict[str, Any]:
    """What an atlas says of a model with the sizes of Llama 3.1 8B."""
    components: list[dict[str, Any]] = [
        {"label": "embed", "kind": "embed", "layer": None, "reads": None, "writes": 0, "group": None}
    ]
    for layer in range(LAYERS):
        state = 2 * layer
        place = {"layer": layer, "reads": state, "writes": state + 1}
        components += [
            {"label": f"L{layer}H{h}", "kind": "head", **place, "group": f"L{layer}.kv{h * KV_HEADS // HEADS}"}
            for h in range(HEADS)
        ]
        place = {"layer": layer, "reads": state + 1, "writes": state + 2}
        components.append({"label": f"L{layer}.mlp", "kind": "mlp", **place, "group": None})
    sizes = {"d_model": WIDTH, "n_layers": LAYERS}
    return {
        "model": "random of 8B's shape",
        "norm": "gain folded",
        "version": "0",
        "sizes": sizes,
        "components": components,
    }


def port_records(port: str, generator: torch.Generator) -> Iterator[Record]:
    """Composition, shares and attributions of one port: log-normal main effects and lifts with a heavy tail."""
    heads = [f"L{layer}H{h}" for layer in range(LAYERS) for h in range(HEADS)]
    writers = [
        "embed",
        *(name for layer in range(LAYERS) for name in (*heads[HEADS * layer :][:HEADS], f"L{layer}.mlp")),
    ]
    late = torch.arange(LAYERS).repeat_interleave(HEADS)[:, None]
    early = torch.tensor([-1, *(layer for layer in range(LAYERS) for _ in range(HEADS + 1))])
    apart = (late <= early).double()
    absent = torch.where(apart.bool(), torch.nan, 0.0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = len(heads), len(writers)
    writer, reader = 0.8 * normal(1, shape[1]), 0.7 * normal(shape[0], 1)
    lift = 0.5 * normal(*shape) * (1 + normal(*shape).exp() / 4)
    if port != "Q":  # one key or value for four heads, which read it the same
        lift, reader = (x[:: HEADS // KV_HEADS].repeat_interleave(HEADS // KV_HEADS, 0) for x in (lift, reader))
    score = (2 ** (writer + reader + lift) / WIDTH).sqrt().clamp(max=1)
    share = (normal(*shape) - 6).exp()
    groups = tuple(f"L{layer}.kv{h * KV_HEADS // HEADS}" for layer in range(LAYERS) for h in range(HEADS))
    axes = (
        Axis("reader", tuple(f"{head}.{port}" for head in heads), () if port == "Q" else groups),
        Axis("writer", tuple(writers)),
    )

    def record(question: str, **columns: torch.Tensor) -> Record:
        values = tuple(Column(name, v.expand(shape) + absent, "1", name) for name, v in columns.items())
        return Record(question, axes, values, {"port": port}, {"text": "random", "tokens": 1})

    yield record("composition", score=score, lift=lift, writer_effect=writer, reader_effect=reader)
    yield record("contribution", share=share)
    yield record("attribution", attribution=0.01 * normal(*shape) * normal(*shape).exp())


def labels_record() -> Record:
    """Labels of every tenth head."""
    heads = tuple(f"L{layer}H{h}" for layer in range(LAYERS) for h in range(HEADS))
    names = tuple(BEHAVIOURS[i % 5] if i % 10 == 0 else None for i in range(len(heads)))
    scores = [Column(name, torch.full((len(heads),), 0.2), "1", name) for name in BEHAVIOURS]
    return Record(
        "labels", (Axis("head", heads),), (*scores, Column("label", names, "", "label")), {"threshold": 0.4}, {}
    )


def write_random(folder: Path) -> None:
    """The documents of an atlas of 8B's shape, through the functions that write those of any."""
    generator = torch.Generator().manual_seed(0)
    records = [labels_record(), *(record for port in "QKV" for record in port_records(port, generator))]
    write_documents(folder / FOLDER, documents(records, manifest()))


def show(title: str, measured: dict[str, Any]) -> None:
    def spread(values: list[float]) -> str:
        ordered = sorted(values)
        return f"{statistics.median(ordered):8.1f} {ordered[max(0, round(0.95 * len(ordered)) - 1)]:8.1f}"

    print(f"\n{title}\n{'':32}{'median':>8} {'95%':>8}   ms")
    print(f"{'first contentful paint':32}{spread(measured['paint'])}   of {len(measured['paint'])} cold loads")
    print(f"{'map drawn':32}{spread(measured['drawn'])}")
    for name, steps in {"nothing moved": measured["idle"], **measured["frames"]}.items():
        for kind in ("script", "task"):
            print(f"{f'{name}, {kind}':32}{spread([step[kind] for step in steps])}   of {len(steps)} frames")


def walk(scripts: Path, atlas: vw.Atlas) -> None:
    """The walk over a report and a server, and the tables of heads drawn by a seed against ``vw.edges``."""
    heads = random.Random(0).sample(walking.heads_of(atlas), WALKED)
    with walking.served(atlas.path) as address:
        answer = walking.walk(
            scripts / "walk.mjs",
            targets=walking.targets(atlas.path, address),
            edge=walking.stored_pair(atlas),
            vector=None,
            heads=heads,
        )
    print(f"{len(answer['failures'])} failures", *answer["failures"], sep="\n")
    print(f"{walking.check_tables(atlas, answer['tables'], heads):,} edges of {WALKED} heads are those of vw.edges")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path)
    parser.add_argument("--walk", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scripts = walking.scripts(Path(scratch))
        atlas = vw.Atlas.open(options.atlas)
        if options.walk:
            walk(scripts, atlas)
            return
        report = atlas.path / "report.html"
        size = report.stat().st_size / 1e6
        measured = walking.walk(scripts / "measure.mjs", address=report.as_uri(), loads=LOADS, steps=STEPS)
        show(f"report.html of {atlas.manifest['model']}, {size:.1f} MB", measured)
        write_random(Path(scratch))
        size = sum(path.stat().st_size for path in (Path(scratch) / FOLDER).iterdir()) / 1e6
        with walking.served(Path(scratch)) as address:
            measured = walking.walk(scripts / "measure.mjs", address=address, loads=1, steps=STEPS)
        show(f"random of 8B's shape, served, {size:.1f} MB", measured)


if __name__ == "__main__":
    main()
