"""``vweights frontier``: what would be worth erasing from the stream, and what the model erases."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Batch, ChunkLength, Repeated, TextSource, Tokens, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.runtime import load
from virtual_weights.runtime.fate.frontier import frontier
from virtual_weights.stream import Stream

_PRICES = (
    "price", "lambda", "optimal", "model", "shuffled", "keep_all", "erased_by_optimal", "erased_by_model",
    "agreement", "chance",
)  # fmt: skip
_WRITERS = ("writer", "utility", "interference", "intended", "erased_by_optimal", "erased_by_model", "excess")


def erasure_frontier(
    model: o.ModelArgument,
    text: TextSource = None,
    tokens: Tokens = 512,
    repeated: Repeated = False,
    length: ChunkLength = 256,
    batch: Batch = 2,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many writers in a table")] = 10,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """The best policy of erasing at every price of interference, and where the model's own erasers stand."""
    if repeated and text is not None:
        raise UsageError("--repeated and --text", expected="one of both", do="choose")
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        rows, source = _sequences(stream, text, tokens, length, seed if repeated else None)
        runs = load(stream, device=device)
        found = frontier(stream, rows, runs, batch=batch, progress=step("frontier"))
    prices, writers = list(found.frontier.rows()), list(found.policy.rows())
    if as_json:
        told: dict[str, Any] = {"model": model, "text": source, **found.frontier.parameters}
        told |= {"stamp": found.frontier.stamp, "frontier": prices, "policy": writers}
        put_json(told | {"provenance": stream.provenance})
        return
    table(f"value of policies, nats, mean over units · {model}", _PRICES, [[r[n] for n in _PRICES] for r in prices])
    most = found.policy.top(top, "excess")
    least = sorted(writers, key=lambda row: float(row["excess"] or 0))[:top]
    for title, ranked in (("more", most.rows()), ("less", least)):
        title = f"writers of which the model erases {title} than the policy at the median price"
        table(title, _WRITERS, [[row[name] for name in _WRITERS] for row in ranked])
    line(f"{found.frontier.parameters['units']} units: what one writer wrote at one token, on {source}")


def _sequences(stream: Stream, text: str | None, tokens: int, length: int, seed: int | None) -> tuple[Tensor, str]:
    """Whole sequences of at most so many tokens together, (B, T), and what they are."""
    length = min(length, tokens)
    chunks, source = passages(stream, text, tokens, length, 1, seed)
    rows = [chunk[0] for chunk in chunks if chunk.shape[1] == length]
    if not rows:
        raise UsageError(
            f"less than {length} tokens in {source}", expected="one sequence", do="pass a smaller --length"
        )
    return torch.stack(rows), f"{len(rows)} sequences of {length} tokens of {source}"
