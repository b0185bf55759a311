"""``vweights bandwidth``: the ledger of the stream, state by state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from virtual_weights.analysis.ledger.bandwidth import Bandwidth, bottleneck, in_tokens, unread, unwritten
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.linalg import Subspace
from virtual_weights.record import Record
from virtual_weights.stream import Stream

_SHOWN = {
    "state": "state",
    "after": "after",
    "write_ranks": "written",
    "oversubscription": "/d",
    "written_dim": "span",
    "written_entropy_rank": "eff.",
    "read_ranks": "to read",
    "read_dim": "span",
    "read_entropy_rank": "eff.",
    "live_dim": "live",
    "live_entropy_rank": "eff.",
    "unread_dim": "unread",
    "unwritten_dim": "unwritten",
    "neurons_before_per_d": "N_b/d",
    "neurons_after_per_d": "N_a/d",
    "saving": "saving",
}


def bandwidth(
    model: o.ModelArgument,
    state: Annotated[int | None, typer.Option("--state", min=0, help="show this state's unused directions")] = None,
    cut: Annotated[float | None, typer.Option("--cut", help="share of the largest gain that counts as zero")] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many directions to show")] = 5,
    no_fold: o.NoFold = False,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """What has been written and what is read later, at every state of the stream."""
    question = Bandwidth(cut)
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        spaces = {} if state is None else _spaces(stream, state, cut)
        record = question(stream, step("bandwidth"))
    told = {name: _directions(stream, space, top) for name, space in spaces.items()}
    if as_json:
        put_json(
            {
                "model": model,
                "d_model": record.stamp["d_model"],
                "norm": record.stamp["norm"],
                "cut": record.stamp["cut"],
                "states": list(record.rows()),
                "bottleneck": bottleneck(record),
                "directions": None if state is None else {"state": state, **told},
                "stamp": record.stamp,
                "provenance": record.provenance,
            }
        )
        return
    _show(model, record)
    for name, found in told.items():
        _show_directions(f"{name} at state {state}: {found['dim']} dimensions", found["directions"])


def _show(model: str, record: Record) -> None:
    d = record.stamp["d_model"]
    rows = [[_short(row[name]) for name in _SHOWN] for row in record.rows()]
    table(f"bandwidth · {model} · d {d} · norm {record.stamp['norm']}", list(_SHOWN.values()), rows)
    tightest = bottleneck(record)
    if tightest["state"] is not None:
        line(
            f"tightest at state {tightest['state']} (after {tightest['after']}): {tightest['neurons_before']} neurons "
            f"before, {tightest['neurons_after']} after; a map through d saves {tightest['saving']:.4g} times "
            f"(N_b N_a / d^2 = {tightest['neuron_product']:.4g})"
        )
    line(f"singular values up to {record.stamp['cut']:.2g} of the largest count as zero; every map counts alike")


def _short(cell: object) -> object:
    """One decimal is what a table of states has room for; all digits are in the JSON."""
    return f"{cell:.1f}" if isinstance(cell, float) else cell


def _spaces(stream: Stream, state: int, cut: float | None) -> dict[str, Subspace]:
    return {
        "unread": unread(stream, state, cut=cut),
        "unread by blocks": unread(stream, state, unembed=False, cut=cut),
        "unwritten": unwritten(stream, state, cut=cut),
    }


def _directions(stream: Stream, space: Subspace, top: int) -> dict[str, Any]:
    shown = space.basis[:, :top]
    if not shown.shape[1]:
        return {"dim": 0, "directions": []}
    sides = [in_tokens(stream, shown, side=side) for side in ("unembed", "embed")]
    found = [{"unembed": [asdict(t) for t in a], "embed": [asdict(t) for t in b]} for a, b in zip(*sides, strict=True)]
    return {"dim": space.rank, "directions": found}


def _show_directions(title: str, directions: list[dict[str, Any]]) -> None:
    def words(tokens: list[dict[str, Any]]) -> str:
        return "  ".join(f"{t['token'] if t['text'] is None else repr(t['text'])} {t['cosine']:+.2f}" for t in tokens)

    if not directions:
        line(title)
        return
    rows = [[i + 1, words(each["unembed"]), words(each["embed"])] for i, each in enumerate(directions)]
    table(title, ["direction", "unembedding (cosine)", "embedding (cosine)"], rows)
