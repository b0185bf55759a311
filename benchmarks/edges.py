"""The store at size: an atlas of 100 million edges, and one of many records.

    python benchmarks/edges.py --folder SCRATCH                 # writes 10,000 x 10,000 edges, then asks for some
    python benchmarks/edges.py --folder SCRATCH --records 5000  # how long a query takes beside unrelated records

Prints one JSON object; deletes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from virtual_weights.atlas import Atlas, edges, export, status
from virtual_weights.record import Axis, Column, Record


def matrix(side: int) -> Record:
    """Random scores between directions of two layers."""
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(side, side, generator=draw)
    readers, writers = (tuple(f"L{layer}N{i}{port}" for i in range(side)) for layer, port in ((7, ".up"), (3, "")))
    axes = Axis("reader", readers), Axis("writer", writers)
    columns = Column("score", score), Column("z", torch.randn(side, side, generator=draw))
    return Record("composition", axes, columns, {"port": "up"}, {"norm": "gain folded"})


def timed(call: Callable[[], Any], times: int = 3) -> dict[str, float]:
    """Seconds of the first call, and the best of further ones."""
    seconds = list[float]()
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return {"first_s": seconds[0], "best_s": min(seconds[1:])}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def many_edges(folder: Path, side: int) -> dict[str, Any]:
    record = matrix(side)
    store = Atlas.create(folder, {"fingerprint": "f00d"})
    before, began = peak_mb(), time.perf_counter()
    key = store.put(record)
    written = {"edges": len(record), "write_s": time.perf_counter() - began, "peak_mb_beyond": peak_mb() - before}
    files = [path for path in (folder / "records" / key).iterdir() if path.suffix == ".parquet"]
    written |= {"files": len(files), "megabytes": sum(path.stat().st_size for path in files) / 1e6}
    reader, writer = record.axes[0].labels[side // 3], record.axes[1].labels[side // 2]
    row = int(record["score"][side // 3].argmax())
    del record
    edges(store, reader, writer)  # loads the database
    assert edges(store, reader, top=1)[0]["writer"] == f"L3N{row}"
    asked = {"reader": lambda: edges(store, reader), "writer": lambda: edges(store, writer=writer)}
    asked |= {"both": lambda: edges(store, reader, writer), "all": lambda: edges(store)}
    asked |= {"all_by_z": lambda: edges(store, by="z")}
    figures = {**written, **{name: timed(call) for name, call in asked.items()}, "peak_mb": peak_mb()}
    whole = {"status": lambda: status(store), "check": lambda: status(store, check=True)}
    whole |= {f"export_{kind}": lambda kind=kind: export(store, folder / f"all.{kind}") for kind in ("parquet", "csv")}
    for name, call in whole.items():
        began = time.perf_counter()
        call()
        figures[f"{name}_s"] = time.perf_counter() - began
    return {**figures, "peak_mb_at_the_end": peak_mb()}


def many_records(folder: Path, counts: list[int]) -> dict[str, Any]:
    """Time of a query beside so many records of another question."""
    store, figures = Atlas.create(folder, {"fingerprint": "f00d"}), dict[str, Any]()
    names = tuple(f"L{i // 9}H{i % 9}" for i in range(270))
    pairs = Axis("reader", tuple(f"{name}.K" for name in names)), Axis("writer", names)
    store.put(Record("composition", pairs, (Column("score", torch.rand(270, 270)),), {"port": "K"}))
    written = 0
    for count in counts:
        for n in range(written, count):
            store.put(Record("channel", (Axis("direction", names),), (Column("gain", torch.rand(270)),), {"n": n}))
        written = count
        asked = {"edges": lambda: edges(store, "L20H3.K"), "find": lambda: store.find("composition", port="K")}
        asked |= {"keys": lambda: store.keys("composition")}
        figures[str(count)] = {name: timed(call, 5) for name, call in asked.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the atlas; a temporary folder if none")
    parser.add_argument("--side", type=int, default=10_000, help="readers, and writers")
    parser.add_argument("--records", type=int, nargs="+", help="count unrelated records instead")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = many_records(folder, options.records) if options.records else many_edges(folder, options.side)
        print(json.dumps(figures))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
