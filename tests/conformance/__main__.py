"""Judge every flavour of every causal type: ``PYTHONPATH=tests python -m conformance [--types a,b] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from conformance.checkpoints import flavours, model_types
from conformance.law import Verdict, judge

import virtual_weights.architecture as vw_architecture


def main() -> int:
    """Print a line for each flavour and a summary; 1 where anything is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="", help="model types, separated by commas; all where absent")
    parser.add_argument("--flavours", default="", help="only flavours whose name contains this")
    parser.add_argument("--json", type=Path, help="a file for all verdicts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    began, verdicts = time.monotonic(), list[Verdict]()
    for verdict in judged(options.types.split(",") if options.types else list(model_types()), options.flavours):
        verdicts.append(verdict)
        print(line(verdict), flush=True)
    for text in summary(verdicts):
        print(text)
    print(f"{len(verdicts)} flavours in {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return int(any(verdict.verdict in ("wrong", "crashed") for verdict in verdicts))


def judged(types: list[str], part: str = "") -> Iterator[Verdict]:
    """The verdicts on all flavours of some types."""
    for model_type in types:
        opens = model_type in vw_architecture.model_types()
        for flavour in [flavour for flavour in flavours(model_type) if part in flavour.name][: None if opens else 1]:
            with tempfile.TemporaryDirectory() as folder:
                yield judge(model_type, flavour, Path(folder))


def line(verdict: Verdict) -> str:
    """One line for a verdict."""
    error = "" if verdict.error is None else f"{verdict.error:.1e} at {verdict.where}"
    lines = verdict.text.strip().splitlines() or [""]
    return (
        f"{verdict.verdict:13} {verdict.name:48} {error or (lines[-1] if verdict.verdict == 'crashed' else lines[0])}"
    )


def summary(verdicts: list[Verdict]) -> Iterator[str]:
    """How many types are conformant, wrong, refused, crashed; a type is conformant where its base is and no flavour of
    it is wrong or crashed."""
    by_type: dict[str, dict[str, Verdict]] = {}
    for verdict in verdicts:
        model_type, _, flavour = verdict.name.partition("/")
        by_type.setdefault(model_type, {})[flavour] = verdict
    kinds: dict[str, list[str]] = {}
    for model_type, of in by_type.items():
        words = {verdict.verdict for verdict in of.values()}
        bad = next((word for word in ("wrong", "crashed") if word in words), None)
        base = of.get("base") or next(iter(of.values()))
        kinds.setdefault(bad or base.verdict, []).append(model_type)
    yield ""
    for kind in ("conformant", "wrong", "crashed", "refused", "not buildable"):
        yield f"types {kind}: {len(kinds.get(kind, []))} {' '.join(sorted(kinds.get(kind, [])))}"
    counts = Counter(verdict.verdict for verdict in verdicts)
    yield "flavours: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    refusals = Counter(verdict.text.splitlines()[0] for verdict in verdicts if verdict.verdict == "refused")
    yield from (f"{count:5} refused: {sentence}" for sentence, count in refusals.most_common())


if __name__ == "__main__":
    sys.exit(main())
