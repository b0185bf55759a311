"""``vweights bandwidth``, ``superposition`` and ``basis``: the stream as a whole."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, verb

_LEDGER = {
    "state": "state",
    "after": "after",
    "write_ranks": "written",
    "oversubscription": "written / d",
    "read_ranks": "to read",
    "live_dim": "live",
    "unread_dim": "unread",
    "unwritten_dim": "unwritten",
    "written_dim": "written span",
    "written_entropy_rank": "written eff.",
    "read_dim": "read span",
    "read_entropy_rank": "read eff.",
    "live_entropy_rank": "live eff.",
    "neurons_before_per_d": "N_b / d",
    "neurons_after_per_d": "N_a / d",
    "saving": "saving",
}


class DirectionKind(StrEnum):
    """Whose directions in the stream."""

    out = "out"
    inward = "in"
    gate = "gate"
    ov = "ov"
    enc = "enc"
    dec = "dec"


@verb("no_fold", "partial", "offline", "allow_non_finite")
def bandwidth(
    session: Session,
    context: typer.Context,
    state: Annotated[
        int | None, typer.Option("--state", metavar="N", min=0, help="also show the unused directions at this state")
    ] = None,
    cut: Annotated[
        float | None,
        typer.Option("--cut", metavar="SHARE", help="singular values below this share of the largest count as zero"),
    ] = None,
    top: o.Top = 5,
) -> Answer:
    """Show how many dimensions of the stream are written, and how many are still read, at every depth."""
    from virtual_weights.analysis.ledger.bandwidth import bottleneck

    if state is None:
        o.refuse_unused(context, "without --state", "top")
    question = vw.Bandwidth(cut)
    spaces = {} if state is None else _spaces(session.stream, state, cut)
    record = session.ask(question)
    unused = {name: _directions(session.stream, space, top) for name, space in spaces.items()}
    figures: dict[str, Any] = {"bottleneck": bottleneck(record)}
    if state is not None:
        figures["directions"] = {"state": state, **unused}
    shown = _ledger(session.name, record)
    for name, space in unused.items():
        shown.append(_directions_shown(f"{name} at state {state}: {space['dim']} dimensions", space["directions"]))
    return Answer(record, None, figures, shown)


@verb("no_fold", "partial", "offline", "allow_non_finite")
def superposition(
    session: Session,
    directions: Annotated[
        DirectionKind,
        typer.Option("--directions", help="out, in or gate of neurons, ov of heads, enc or dec of attached features"),
    ] = DirectionKind.out,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=2, help="use at most N directions, drawn at random")
    ] = 20_000,
    eps: Annotated[
        float | None,
        typer.Option(
            "--eps", metavar="C", help="largest cosine to tolerate in the capacity counts; by default the largest found"
        ),
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
) -> Answer:
    """Measure how crowded the stream is: how close its directions lie, and how many signals can be read back.

    Compares the directions with random ones, and with the least closeness that is possible (the Welch bound).
    """
    from virtual_weights.analysis.crowding.coherence import capacity, gap
    from virtual_weights.analysis.crowding.interference import FEWEST

    kind = directions.value
    question = vw.Coherence(kind, sample, seed, device=device)
    if eps is not None:
        capacity(1, eps)  # refuses a wrong one before the work
    coherence, recovery = session.ask(question), session.ask(vw.Recovery(kind, seed=seed))
    crowd, curves = gap(coherence), list(recovery.rows())
    counts = _counts(session.stream.d_model, crowd["largest"] if eps is None else eps)
    title = f"{crowd['directions']} directions ({kind}) in {crowd['dimension']} dimensions · {session.name}"
    shown: list[Table | str] = [_crowd(title, crowd), f"closest: {' and '.join(crowd['largest_pair'])}"]
    shown += [] if counts is None else [_capacity(counts)]
    summary = {"directions": recovery.stamp["directions"]}
    more = [Answer(recovery, curves, summary, _recovered(recovery, curves))]
    if recovery.stamp["directions"] >= 4 * FEWEST:
        more.insert(0, _growth(session.ask(vw.Interference(kind, seed=seed))))
    else:
        shown.append(f"interference: fewer than {4 * FEWEST} directions are too few for an exponent")
    return Answer(coherence, None, {**crowd, "capacity": counts}, shown, more)


@verb("no_fold", "partial", "offline", "allow_non_finite")
def basis(
    session: Session,
    massive: Annotated[
        float,
        typer.Option("--massive", metavar="X", help="call a coordinate massive if its energy exceeds X times the mean"),
    ] = 3.0,
    seed: o.Seed = 0,
    top: o.Top = 10,
) -> Answer:
    """Test whether the coordinates of the stream are special, or whether any rotation would do as well.

    Shows the kurtosis of the weights over coordinates, as trained and after a random rotation, and the coordinates with
    the most energy.
    """
    from virtual_weights.analysis.ledger.basis import summary

    record = session.ask(vw.Basis(massive, seed))
    figures, strongest = summary(record), list(record.top(top, "write_energy").rows())
    rows = [
        {"": side, "trained": figures[f"{side}_kurtosis"], "rotated": figures[f"{side}_kurtosis_turned"]}
        for side in ("write", "read")
    ]
    coordinates = ", ".join(str(entry["coordinate"]) for entry in figures["massive"][:20])
    names = ("coordinate", "write_energy", "write_kurtosis", "read_energy", "read_kurtosis")
    shown = [
        Table(f"mean kurtosis over coordinates · {session.name} · norm {record.stamp['norm']}", rows),
        f"without a preferred basis it would be {figures['gaussian']:.3f}",
        Table(f"the {len(strongest)} coordinates with the most energy written", strongest, names),
        f"{len(figures['massive'])} massive coordinates (energy above {massive:g} times the mean): "
        f"{coordinates or 'none'}",
    ]
    return Answer(record, strongest, figures, shown)


def _ledger(model: str, record: vw.Record) -> list[Table | str]:
    from virtual_weights.analysis.ledger.bandwidth import bottleneck

    rows = [{name: _short(row[name]) for name in _LEDGER} for row in record.rows()]
    title = f"bandwidth · {model} · d {record.stamp['d_model']} · norm {record.stamp['norm']}"
    shown: list[Table | str] = [Table(title, rows, _LEDGER)]
    tightest = bottleneck(record)
    if tightest["state"] is not None:
        shown.append(
            f"tightest at state {tightest['state']} (after {tightest['after']}): {tightest['neurons_before']} neurons "
            f"before, {tightest['neurons_after']} after; a map through d saves {tightest['saving']:.4g} times "
            f"(N_b N_a / d^2 = {tightest['neuron_product']:.4g})"
        )
    cut = record.stamp["cut"]
    return [*shown, f"eff.: entropy rank; singular values up to {cut:.2g} of the largest count as zero"]


def _short(cell: object) -> object:
    """A float with one decimal: a table of states has no room for more. All digits are in the JSON."""
    return f"{cell:.1f}" if isinstance(cell, float) else cell


def _spaces(stream: vw.Stream, state: int, cut: float | None) -> dict[str, vw.Subspace]:
    from virtual_weights.analysis.ledger.bandwidth import unread, unwritten

    return {
        "unread": unread(stream, state, cut=cut),
        "unread by blocks": unread(stream, state, unembed=False, cut=cut),
        "unwritten": unwritten(stream, state, cut=cut),
    }


def _directions(stream: vw.Stream, space: vw.Subspace, top: int) -> dict[str, Any]:
    from virtual_weights.analysis.ledger.bandwidth import in_tokens

    vectors = space.basis[:, :top]
    if not vectors.shape[1]:
        return {"dim": 0, "directions": []}
    sides = [in_tokens(stream, vectors, side=side) for side in ("unembed", "embed")]
    directions = [
        {"unembed": [asdict(token) for token in out], "embed": [asdict(token) for token in into]}
        for out, into in zip(*sides, strict=True)
    ]
    return {"dim": space.rank, "directions": directions}


def _directions_shown(title: str, directions: list[dict[str, Any]]) -> Table | str:
    def words(tokens: list[dict[str, Any]]) -> str:
        return "  ".join(f"{t['token'] if t['text'] is None else repr(t['text'])} {t['cosine']:+.2f}" for t in tokens)

    rows = [
        {"direction": i, "unembedding (cosine)": words(entry["unembed"]), "embedding (cosine)": words(entry["embed"])}
        for i, entry in enumerate(directions, 1)
    ]
    return Table(title, rows) if rows else title


def _counts(d: int, eps: float) -> dict[str, Any] | None:
    # parallel directions have a cosine of exactly 1, which no count is for; orthogonal ones of 0 have none
    from virtual_weights.analysis.crowding.coherence import capacity
    from virtual_weights.linalg import BELOW_ONE

    return {"eps": eps, **asdict(capacity(d, min(eps, BELOW_ONE)))} if eps > 0 else None


def _crowd(title: str, crowd: dict[str, Any]) -> Table:
    least = "least possible (Welch)"
    rows = [
        {"": "largest |cos|", "model": crowd["largest"], "random": crowd["random_largest"], least: crowd["welch"]},
        {
            "": "mean square cosine",
            "model": crowd["mean_square"],
            "random": crowd["random_mean_square"],
            least: crowd["welch"] ** 2,
        },
    ]
    return Table(title, rows)


def _capacity(counts: dict[str, Any]) -> Table:
    figures = {
        "directions, d / eps^2 (as published; not a bound)": counts["published"],
        "directions, random code that exists (log10)": counts["log10_random_code"],
        "directions at most (Welch; where eps^2 < 1/d)": counts["welch"],
        "signals active at once, read linearly": counts["active_signals"],
    }
    rows = [{"count": name, "value": value} for name, value in figures.items()]
    return Table(f"how many fit at cosines up to {counts['eps']:.3g}", rows)


def _growth(record: vw.Record) -> Answer:
    exponents = record.stamp["exponents"]
    words = "grows as n^{exponent:.3f} ({low:.3f} to {high:.3f}; random directions: {random:.3f})"
    lines = [
        f"interference of n signals, {name}: {'none' if fitted is None else words.format(**fitted)}"
        for name, fitted in exponents.items()
    ]
    return Answer(record, None, {"exponents": exponents}, lines)


def _recovered(record: vw.Record, curves: list[Any]) -> list[Table | str]:
    from virtual_weights.analysis.crowding.recovery import METHODS

    names = [name for name in METHODS if name in curves[0]]
    title = f"share of n signals recovered, among {record.stamp['directions']} directions"
    shown: list[Table | str] = [Table(title, curves, ("n", *names))]
    if "sparse" not in names:
        shown.append(
            "sparse recovery needs scikit-learn: pip install -c constraints.txt '.[recovery]' in a clone of this "
            "project"
        )
    return shown
