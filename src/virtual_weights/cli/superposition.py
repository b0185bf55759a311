"""``vweights superposition``: how crowded the stream is, and what can be read out of it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from virtual_weights.analysis.crowding.coherence import Coherence, capacity, gap
from virtual_weights.analysis.crowding.dictionary import KINDS
from virtual_weights.analysis.crowding.interference import FEWEST, Interference
from virtual_weights.analysis.crowding.recovery import METHODS, Recovery
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table


def superposition(
    model: o.ModelArgument,
    kind: Annotated[
        str, typer.Option("--kind", help=f"directions: {', '.join(KINDS)} (neurons write, read, gate; heads' channels)")
    ] = "out",
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=2, help="at most N directions, chosen by the seed")
    ] = 20_000,
    eps: Annotated[
        float | None, typer.Option("--eps", help="cosine for the capacity counts; the measured largest one if none")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of all choices and of random directions")] = 0,
    no_fold: o.NoFold = False,
    device: o.Device = "cpu",
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Coherence of the model's directions beside chance and Welch, capacity counts, interference and recovery."""
    chosen: Any = kind
    coherence = Coherence(chosen, sample, seed, device)
    if eps is not None:
        capacity(1, eps)  # refuses a wrong one before the work
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        crowd = gap(coherence(stream, step("coherence")))
        recovery = Recovery(chosen, seed=seed)(stream, step("recovery"))
        enough = recovery.stamp["directions"] >= 4 * FEWEST
        growth = Interference(chosen, seed=seed)(stream, step("interference")) if enough else None
    found: dict[str, Any] = {
        "model": model,
        "norm": stream.norm_stamp,
        "kind": kind,
        "coherence": crowd,
        "capacity": _counts(stream.d_model, crowd["largest"] if eps is None else eps),
        "interference": growth and {"exponents": growth.stamp["exponents"], "by_n": list(growth.rows())},
        "recovery": {"directions": recovery.stamp["directions"], "by_n": list(recovery.rows())},
        "parameters": {"sample": sample, "seed": seed},
        "provenance": stream.provenance,
    }
    put_json(found) if as_json else _show(found)


def _counts(d: int, eps: float) -> dict[str, Any] | None:
    # parallel directions have a cosine of exactly 1, which no count is for; orthogonal ones of 0 have none
    return {"eps": eps, **asdict(capacity(d, min(eps, 1 - 1e-7)))} if eps > 0 else None


def _show(found: dict[str, Any]) -> None:
    crowd = found["coherence"]
    title = f"{crowd['directions']} directions ({found['kind']}) in {crowd['dimension']} dimensions · {found['model']}"
    rows = [
        ["largest |cos|", crowd["largest"], crowd["random_largest"], crowd["welch"]],
        ["mean square cosine", crowd["mean_square"], crowd["random_mean_square"], crowd["welch"] ** 2],
    ]
    table(title, ["", "model", "as many random ones", "least possible (Welch)"], rows)
    line(f"closest: {' and '.join(crowd['largest_pair'])}")
    if found["capacity"] is not None:
        _show_counts(found["capacity"])
    for name, fitted in (found["interference"] or {"exponents": {}})["exponents"].items():
        told = "n^{exponent:.3f} ({low:.3f} to {high:.3f}; random directions {random:.3f})"
        line(f"interference, {name}: {'none' if fitted is None else told.format(**fitted)}")
    if found["interference"] is None:
        line(f"interference: fewer than {4 * FEWEST} directions give no power")
    curves = found["recovery"]["by_n"]
    names = [name for name in METHODS if name in curves[0]]
    table(
        f"share of n signals recovered, among {found['recovery']['directions']} directions",
        ["n", *(name.replace("_", " ") for name in names)],
        [[row["n"], *(row[name] for name in names)] for row in curves],
    )
    if "sparse" not in names:
        line("sparse recovery needs scikit-learn: pip install 'virtual-weights[recovery]'")


def _show_counts(counts: dict[str, Any]) -> None:
    table(
        f"what fits at cosines up to {counts['eps']:.3g}",
        ["count", "value"],
        [
            ["directions, d / eps^2 (as published; no bound)", counts["published"]],
            ["directions, random code that exists (log10)", counts["log10_random_code"]],
            ["directions at most (Welch; where eps^2 < 1/d)", counts["welch"]],
            ["signals active at once, read linearly", counts["active_signals"]],
        ],
    )
