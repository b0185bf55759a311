"""Planted truth: directions whose cosines are known exactly, what they let through, and the command that shows it."""

from __future__ import annotations

import json
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from planting import NEURONS, D, blank, frame, plant_head, plant_neuron
from tiny_models import tiny
from torch import Tensor, nn
from typer.testing import CliRunner

import virtual_weights as vw
from virtual_weights.analysis.crowding.coherence import Coherence, capacity, gap, welch
from virtual_weights.analysis.crowding.directions import directions
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.crowding.recovery import METHODS, Recovery
from virtual_weights.cli.ledger import superposition

app = typer.Typer()
app.command()(superposition)


def writing(rows: Tensor) -> nn.Module:
    """A model whose first neurons, layer after layer, write along these rows (at most 120, 24); all else is 0."""
    model = blank()
    for i, row in enumerate(rows):
        plant_neuron(model, i // NEURONS, i % NEURONS, torch.zeros(D, dtype=torch.float64), row)
    return model


def lattice() -> Tensor:
    """One of each pair of shortest vectors of E_8, in 8 of 24 dimensions, turned: 120 lines, cosines 0 and 1/2."""
    axes = [[s if k == j else float(k == i) for k in range(8)] for i, j in combinations(range(8), 2) for s in (1, -1)]
    halves = [[0.5, *(0.5 * s for s in signs)] for signs in product((1, -1), repeat=7) if signs.count(-1) % 2 == 0]
    return torch.tensor(axes + halves, dtype=torch.float64) @ frame(3)[:, :8].T


def fan(cosine: float) -> Tensor:
    """23 independent directions, all pairs at one cosine."""
    axes = frame(4).T
    return (1 - cosine) ** 0.5 * axes[1:] + cosine**0.5 * axes[:1]


def answer(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_code_of_more_than_d_over_eps_squared_directions() -> None:
    """The 120 neurons of a tiny model hold the lines of E_8: more than d/eps^2 = 92 at a coherence below eps = 0.51."""
    record = Coherence("out")(vw.open(writing(lattice())))
    figures, eps = gap(record), 0.51
    assert figures["directions"] == 120 > capacity(D, eps).published
    assert figures["largest"] == pytest.approx(0.5)
    assert figures["largest"] < eps
    assert figures["frame_potential"] == pytest.approx(120**2 / 8), "a tight frame of the 8 dimensions that it spans"
    assert figures["mean_square"] == pytest.approx((120**2 / 8 - 120) / (120 * 119))
    count = record["count"]
    assert (int(count[0]), int(count[49:51].sum())) == (120 * 63 // 2, 120 * 56 // 2)
    assert int(count.sum()) == 120 * 119 // 2
    assert figures["random_largest"] > figures["largest"] > figures["welch"], (
        "random lines are closer, none below Welch"
    )


def test_a_simplex_meets_welch() -> None:
    simplex = torch.eye(D + 1, dtype=torch.float64) - 1 / (D + 1)
    rows = simplex @ torch.linalg.svd(simplex)[0][:, :D]
    figures = gap(Coherence("out")(vw.open(writing(rows))))
    assert figures["directions"] == D + 1
    assert welch(D + 1, D) == pytest.approx(1 / D)
    assert figures["largest"] == pytest.approx(1 / D, abs=1e-6)
    assert figures["mean_square"] == pytest.approx(1 / D**2, abs=1e-6)
    assert figures["random_largest"] > 3 * figures["welch"]


def test_the_closest_pair_is_named_in_its_own_kind() -> None:
    """L0N3 and L2N7 write at cosine 0.9 and read at 0; L1N0 and L1N1 read at -0.95; two heads write at 0.8."""
    model, axes = blank(), frame(5)

    def at(cosine: float, i: int) -> Tensor:
        return cosine * axes[:, i] + (1 - cosine**2) ** 0.5 * axes[:, i + 1]

    plant_neuron(model, 0, 3, axes[:, 10], 5 * axes[:, 0])
    plant_neuron(model, 2, 7, axes[:, 12], 0.01 * at(0.9, 0))
    plant_neuron(model, 1, 0, axes[:, 14], axes[:, 4])
    plant_neuron(model, 1, 1, -3 * at(0.95, 14), axes[:, 6])
    plant_head(model, 0, 2, 2 * torch.outer(axes[:, 0], axes[:, 8]) + torch.outer(axes[:, 18], axes[:, 9]))
    plant_head(model, 2, 5, 2 * torch.outer(at(0.8, 0), axes[:, 20]) + torch.outer(axes[:, 19], axes[:, 8]))
    stream = vw.open(model)
    expected = {"out": (["L0N3", "L2N7"], 0.9), "in": (["L1N0", "L1N1"], 0.95), "ov": (["L0H2", "L2H5"], 0.8)}
    for kind, (pair, cosine) in expected.items():
        figures = gap(Coherence(kind)(stream))
        assert (figures["largest_pair"], figures["largest"]) == (pair, pytest.approx(cosine, rel=1e-6)), kind
    with pytest.raises(vw.VirtualWeightsError, match="two or more"):
        Coherence("gate")(stream)
    bare, _ = directions(vw.open(model, fold=False), "in")
    assert bare == ("L0N3", "L1N0", "L1N1", "L2N7")
    unfolded = gap(Coherence("in")(vw.open(model, fold=False)))
    assert abs(unfolded["largest"] - 0.95) > 1e-4, "without the norm's gain other directions are read"


def test_a_sample_is_the_same_each_time_and_another_with_another_seed() -> None:
    stream = vw.open(writing(lattice()))
    names, unit = directions(stream, "out", 30, seed=1)
    again, same = directions(stream, "out", 30, seed=1)
    other, _ = directions(stream, "out", 30, seed=2)
    every, rows = directions(stream, "out")
    assert names == again != other
    assert torch.equal(unit, same)
    assert len(set(names)) == 30 < len(every) == 120
    places = [every.index(name) for name in names]
    assert places == sorted(places), "in order of depth"
    assert torch.equal(unit, rows[places])
    assert directions(stream, "out", 500)[0] == every


def test_interference_of_parallel_directions_is_all_there_is() -> None:
    """Every pair at cosine 1: the total is exactly n(n - 1)/2, the squared error n - 1 in expectation."""
    model = writing(frame(6)[:, :1].T.expand(120, D))
    record = Interference("out", trials=200)(vw.open(model))
    assert record.axis("n").labels == ("8", "16", "32", "64")
    n = torch.tensor([8.0, 16, 32, 64], dtype=torch.float64)
    torch.testing.assert_close(record["total"], n * (n - 1) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(record["error"], n - 1, rtol=0.35, atol=0)
    powers = record.stamp["exponents"]
    assert powers["total"]["exponent"] == pytest.approx(powers["total"]["random"], abs=1e-6)
    assert powers["total"]["high"] - powers["total"]["low"] < 1e-6, "no chance in it"
    assert powers["error"]["low"] < powers["error"]["random"] < powers["error"]["high"]


def test_interference_where_directions_are_orthogonal_has_no_power() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=8, vocab_size=11, n_inner=63)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # orthogonal to (1, ..., 1) too, which no reader sees
        hadamard = torch.ones(1, 1)
        for _ in range(6):
            hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model.transformer.h[0].mlp.c_proj.weight.copy_(hadamard[1:])
    record = Interference("out")(vw.open(model))
    assert record["total"].tolist() == record["error"].tolist() == [0.0] * 3
    assert record.stamp["exponents"] == {"total": None, "error": None}


def test_fitted_powers_of_random_directions_are_those_expected() -> None:
    rows = torch.randn(120, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    powers = Interference("out", trials=64)(vw.open(writing(rows))).stamp["exponents"]
    for name, expected in (("total", 2), ("error", 1)):
        assert abs(powers[name]["exponent"] - expected) < 0.15, name
        assert powers[name]["low"] < powers[name]["exponent"] < powers[name]["high"]
        assert powers[name]["random"] == pytest.approx(expected + 0.047, abs=0.02), "n - 1 is no power of n"


def test_what_each_method_recovers_of_coherent_and_of_orthogonal_directions() -> None:
    """Equal cosines: the matched filter finds all signals if the signs balance, else those of the majority; D^+ all."""
    coherent = Recovery("out", size=D, most=8, trials=600)(vw.open(writing(fan(0.9))))
    assert {column.name for column in coherent.columns} == set(METHODS)
    assert coherent.stamp["directions"] == D - 1
    expected = [sum(comb(n, k) * (1 if 2 * k == n else max(k, n - k) / n) for k in range(n + 1)) / 2**n for n in (4, 8)]
    assert coherent["matched"].tolist() == pytest.approx([1, 1, *expected], abs=0.02)
    for name in ("least_squares", "known_support"):
        assert torch.equal(coherent[name], torch.ones(4, dtype=torch.float64)), name
    orthogonal = Recovery("out", size=D, most=8, trials=64)(vw.open(writing(fan(0.0))))
    for column in orthogonal.columns:
        assert torch.equal(column.values, torch.ones(4, dtype=torch.float64)), column.name
    crowded = Recovery("out", size=120, most=32, trials=32)(vw.open(writing(lattice())))
    assert float(crowded["matched"][0]) == float(crowded["sparse"][0]) == 1, "one signal among 120 lines"
    assert float(crowded["matched"][-1]) < 0.5, "32 of 120 lines in 8 dimensions are not to be had"


def test_the_command_shows_the_records(tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path)
    given = answer(tmp_path, "--directions", "in", "--sample", 50, "--seed", 3, "--json", "--progress", "none")
    stream = vw.open(tmp_path)
    figures, (interference, recovered) = given["summary"], given["more"]
    counts = figures.pop("capacity")
    assert figures == gap(Coherence("in", 50, 3)(stream)) | {"largest_pair": figures["largest_pair"]}
    assert figures["directions"] == 50
    growth, recovery = Interference("in", seed=3)(stream), Recovery("in", seed=3)(stream)
    assert interference["summary"] == {"exponents": growth.stamp["exponents"]}
    assert interference["rows"] == list(growth.rows())
    assert (recovered["stamp"]["directions"], recovered["rows"]) == (120, list(recovery.rows()))
    assert counts["eps"] == figures["largest"]
    assert answer(tmp_path, "--eps", 0.1, "--json")["summary"]["capacity"]["published"] == pytest.approx(D / 0.01)
    shown = CliRunner().invoke(app, [str(tmp_path)], catch_exceptions=False, env={"COLUMNS": "200"}).output
    power = growth.stamp["exponents"]["total"]["random"]
    for told in ("Welch", "active at once", f"random directions: {power:.3f}"):
        assert told in shown


def test_the_command_says_what_it_cannot_tell(tmp_path: Path) -> None:
    """18 heads are too few for a power, 24 axes have no cosines; a wrong eps is refused before anything is opened."""
    tiny("llama-full").save_pretrained(tmp_path / "heads")
    heads = answer(tmp_path / "heads", "--directions", "ov", "--json")
    (recovery,) = heads["more"]
    assert recovery["question"] == "recovery", "no interference"
    assert (heads["summary"]["directions"], recovery["stamp"]["directions"]) == (18, 18)
    writing(torch.eye(D, dtype=torch.float64)).save_pretrained(tmp_path / "axes")
    axes = answer(tmp_path / "axes", "--json")
    assert (axes["summary"]["largest"], axes["summary"]["capacity"]) == (0.0, None)
    assert [part["question"] for part in axes["more"]] == ["recovery"]
    writing(torch.eye(D, dtype=torch.float64)[:1].expand(4, D)).save_pretrained(tmp_path / "same")
    same = answer(tmp_path / "same", "--json")
    assert same["summary"]["capacity"]["eps"] == pytest.approx(1.0)
    for name in ("heads", "axes", "same"):
        kind = ["--directions", "ov"] if name == "heads" else []
        shown = CliRunner().invoke(app, [str(tmp_path / name), *kind], catch_exceptions=False).output
        assert "fewer than 32" in shown
    with pytest.raises(vw.VirtualWeightsError, match=r"eps in \(0, 1\)"):
        CliRunner().invoke(app, [str(tmp_path / "none"), "--eps", "1.5"], catch_exceptions=False)
