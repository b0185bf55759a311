"""``vweights statements``: 25 published statements about the residual stream, and which of them hold on a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Repeated, TextSource, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import Tick, steps
from virtual_weights.cli.show import line, put_json
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.fate.erased import cleared
from virtual_weights.runtime.fate.frontier import frontier
from virtual_weights.runtime.fate.persistence import lifetime
from virtual_weights.runtime.flow.observation import operating_point as run_prompt
from virtual_weights.runtime.running.text import PADDING, token_ids, tokenizer_of
from virtual_weights.statements import Statements
from virtual_weights.stream import OperatingPoint, Stream

_TOKENS, _LENGTH, _BATCH = 4096, 256, 4
_PROMPT = 32  # tokens of the text that serve as the prompt where none is named
_WHOLE = 2  # chunks on which the frontier is measured, which holds all that flows at once


def statements(
    model: o.ModelArgument,
    only: Annotated[
        str | None, typer.Option("--only", metavar="IDS", help="some of them, separated by commas, e.g. L5,T3")
    ] = None,
    operating_point: o.OperatingPointFile = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="run the model on this, for statements about runs"),
    ] = None,
    text: TextSource = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help=f"run on so many tokens of the text; {_TOKENS} with --text"),
    ] = None,
    repeated: Repeated = False,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="pairs of heads that a check looks at where it cannot look at all")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="seed of these choices and of the nulls")] = 0,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Check lemmas L1-L12, theorems T1-T7 and corollaries C1-C6 on a model: verdicts, each with its evidence."""
    if prompt is not None and operating_point is not None:
        raise UsageError("a prompt and an operating point", expected="one of both", do="leave one out")
    wanted = tuple(dict.fromkeys(part.strip() for part in only.split(",") if part.strip())) if only else ()
    question = Statements(wanted, samples, seed)
    with steps(progress) as step:
        stream = open_model(model, step("open"), partial=partial, offline=offline, non_finite=allow_non_finite)
        point = None if operating_point is None else OperatingPoint.load(operating_point, stream)
        if prompt is not None:
            step("run")
            (ids,) = token_ids([prompt], tokenizer_of(stream))
            point = run_prompt(stream, ids)
        runs, source = dict[str, Record](), None
        if text is not None or tokens is not None or repeated:
            chunks, source = passages(stream, text, tokens or _TOKENS, _LENGTH, _BATCH, seed if repeated else None)
            batches = list(chunks)
            loaded = load(stream)
            runs = {name: found() for name, found in runners(stream, batches, loaded, step).items()}
            point = point or run_prompt(stream, prompt_of(batches), loaded)
        record = question(stream, step("statements"), point=point, runs=runs)
    rows = rows_of(record)
    if as_json:
        put_json(_told(model, record, source))
        return
    for row in rows:
        _show(row)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in dict.fromkeys(verdicts(rows))}
    line(f"{len(rows)} statements on {model}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))


def runners(
    stream: Stream, batches: Sequence[Tensor], model: nn.Module, step: Callable[[str], Tick]
) -> dict[str, Callable[[], Record]]:
    """What can be run on batches of token ids, by question: statements take what they know of (``Bench.runs``)."""
    total = sum(int((each != PADDING).sum()) for each in batches)

    def counted(name: str) -> Callable[[int], None]:
        tick = step(name)
        return lambda done: tick(done, total)

    found: dict[str, Callable[[], Record]] = {
        "cleared": lambda: cleared(stream, batches, model, progress=counted("cleared")),
        "lifetime": lambda: lifetime(stream, batches, model, progress=counted("lifetime")).projection,
    }
    whole = [row for batch in batches for row in batch if int(row.min()) >= 0 and len(row) == batches[0].shape[1] > 1]
    if whole:
        rows = torch.stack(whole[:_WHOLE])
        found["frontier"] = lambda: frontier(stream, rows, model, progress=step("frontier")).frontier
    return found


def prompt_of(batches: Sequence[Tensor]) -> Tensor:
    """The first tokens of a text, (T,)."""
    return next(row[row != PADDING][:_PROMPT] for row in batches[0])


def rows_of(record: Record) -> list[dict[str, Any]]:
    """The statements of a record as plain rows: id first, evidence as an object, witnesses as a list."""
    rows = list[dict[str, Any]]()
    for row in record.rows():
        told: dict[str, Any] = {
            "id": row["statement"],
            **{name: value for name, value in row.items() if name != "statement"},
        }
        told["evidence"] = json.loads(str(row["evidence"]))
        told["witnesses"] = [each for each in str(row["witnesses"]).split("; ") if each]
        rows.append(told)
    return rows


def _told(model: str, record: Record, source: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "norm": record.stamp["norm"],
        "run": record.stamp["run"],
        "text": source,
        "statements": rows_of(record),
        "parameters": record.parameters,
        "provenance": record.provenance,
    }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The verdicts of rows, in their order."""
    return [str(row["verdict"]) for row in rows]


def _show(row: dict[str, Any]) -> None:
    condition = f": {row['condition']}" if row["condition"] else ""
    line(f"{row['id']}  {row['title']}")
    line(f"    claim    {row['seed']}")
    line(f"    verdict  {row['verdict'].upper()}{condition}")
    line(f"    because  {row['why']}")
    for witness in row["witnesses"]:
        line(f"    witness  {witness}")
    line("")
