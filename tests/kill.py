"""A small map with a run, ended by SIGKILL before every change of its folder and at random moments, then finished.

``python tests/kill.py`` ends it at every boundary and at 30 random moments; each next run must finish, and what it
leaves must be what an undisturbed run leaves. ``--records`` stores three records instead, in seconds. Every run is a
fork of one process that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "sqlite3.connect")


def make_model(folder: Path) -> None:
    """A tiny random model with a tokenizer of letters."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - before the forks
    from tiny_models import tiny

    torch.set_num_threads(1)
    tiny("llama-grouped-untied").save_pretrained(folder)
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ", 1)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"}
    split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": split}))


def map_once(model: Path, atlas: Path) -> None:
    """A map: composition, and a run with its moments, contributions, attribution and ablation."""
    import virtual_weights as vw
    from virtual_weights.survey.plan import Part

    run = vw.Run.on_text(vw.open(str(model)), str(model.parent / "text.txt"), 64, 16)
    vw.map(str(model), atlas, run=run, plan=vw.Plan((Part.composition,), edges=1), progress=False)


def put_records(atlas: Path) -> None:
    """Three records of every form: a matrix with its edges, a table, a table of edges."""
    import torch

    from virtual_weights.atlas import Atlas
    from virtual_weights.record import Axis, Column, Record

    store = Atlas.create(atlas, {"fingerprint": "f00d", "reference": "none"})
    pair = (Axis("reader", ("R0", "R1")), Axis("writer", ("W0", "W1")))
    rows = (Axis("edge", ("1", "2")),)
    ends = Column("reader", ("R0", "R1")), Column("writer", ("W0", "W1"))
    score = Column("score", torch.tensor([0.5, 0.25]))
    store.put(Record("composition", pair, (Column("score", torch.eye(2)),), {"port": "K"}))
    store.put(Record("bandwidth", (Axis("state", ("1", "2")),), (score,)))
    store.put(Record("ablation", rows, (*ends, score)))


def in_a_fork(work: Callable[[], Any], end_after: float | None = None) -> int:
    """Exit status of a fork of this process that does some work; negative is the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    begin = time.perf_counter()
    while end_after is not None and time.perf_counter() - begin < end_after:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if end_after is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watched(folder: Path, last: int | None, log: Path | None = None) -> None:
    """From now on end this process before its change number ``last`` of a folder; note the number of changes."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opened or event in _CHANGES) or str(folder) not in str(arguments[0]):
            return
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if log is not None:
            os.write(descriptor, b".")

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT) if log is not None else -1
    sys.addaudithook(hook)


def content(atlas: Path) -> dict[str, Any]:
    """What an atlas says, without the times at which it was said."""
    from virtual_weights.atlas import Atlas

    store, found = Atlas.open(atlas), dict[str, Any]()
    for key in store.keys():  # noqa: SIM118 (no mapping)
        record, header = store.get(key), store.header(key)
        plain = {"parameters": record.parameters, "stamp": record.stamp, "provenance": record.provenance}
        arrays = {name: digest for name, digest in header.files.items() if name.endswith(".safetensors")}
        found[key] = [record.question, plain, arrays, record.to_json()]
    for row in store.ledger():  # an account, which may lack what was stored just before an end
        assert row["question"] == found[row["key"]][0]
    found["manifest"] = dict(store.manifest)
    found["files"] = {p.name: p.read_bytes() for p in sorted(atlas.glob("*.safetensors"))}
    return found


def mapping(scratch: Path) -> Callable[[Path], None]:
    """What maps a tiny model into a folder, the model lying in another."""
    make_model(scratch / "model")
    (scratch / "text.txt").write_text("who writes what whom reads and when " * 9)
    time.sleep(2.5)  # the model's files settle, so that their fingerprint is remembered
    return lambda atlas: map_once(scratch / "model", atlas)


def disturbed(
    work: Callable[[Path], None], scratch: Path, boundaries: int | None = None, moments: int = 30, first: int = 0
) -> dict[str, int]:
    """Kill and finish: how many kills of both kinds there were, and how many of the next runs failed or differ.

    Args:
        work: fills a folder.
        scratch: a folder of ours.
        boundaries: at how many boundaries at most, evenly among all; None is all.
        moments: at how many random moments.
        first: the first boundary.
    """
    import duckdb  # noqa: F401 - before the forks, which then need not

    calm, log = scratch / "calm", scratch / "log"
    assert in_a_fork(lambda: (watched(calm, None, log), work(calm))) == 0
    assert in_a_fork(lambda: work(scratch / "again")) == 0
    total = log.stat().st_size
    expected = content(calm)
    assert content(scratch / "again") == expected, "two undisturbed runs differ"
    draw, result = random.Random(0), {"boundaries": total, "killed": 0, "failed": 0, "different": 0}
    chosen: list[int | None] = [*range(first, total, max(1, total // (boundaries or total))), *[None] * moments]
    atlas, seconds = scratch / "disturbed", 0.0
    for place in chosen:
        if place is not None:
            status = in_a_fork(lambda n=place: (watched(atlas, n), work(atlas)))
        else:
            status = in_a_fork(lambda: work(atlas), end_after=draw.uniform(0, seconds))
        result["killed"] += status == -signal.SIGKILL
        begin = time.perf_counter()
        if in_a_fork(lambda: work(atlas)) != 0:
            result["failed"] += 1
        elif (left := content(atlas)) != expected:
            result["different"] += 1
            names = left.keys() | expected.keys()
            sys.stderr.write(f"differs: {[name for name in names if left.get(name) != expected.get(name)]}\n")
        seconds = max(0.9 * seconds, time.perf_counter() - begin)  # of what is left to do, about all after an early end
        shutil.rmtree(atlas)
        sys.stderr.write(f"{place} {result}\n")
    return result | {"tries": len(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(description="end a small map by SIGKILL everywhere, and finish it")
    parser.add_argument("--boundaries", type=int, default=None)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--records", action="store_true", help="store three records instead of mapping a model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VWEIGHTS_CACHE"] = f"{scratch}/cache"
        work = put_records if options.records else mapping(Path(scratch))
        result = disturbed(work, Path(scratch), options.boundaries, options.moments, options.first)
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(bool(result["failed"] or result["different"] or result["killed"] < result["tries"] // 2))


if __name__ == "__main__":
    main()
