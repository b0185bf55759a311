"""Frozen at one prompt, all blocks in sequence give back transformers' own final residual."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operating import operate
from safetensors.torch import save_file
from tiny_models import SHAPES, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import replay
from virtual_weights.stream import centred
from virtual_weights.stream.operating_point import FORMAT, OperatingPoint, gate_factor

TOKENS = torch.tensor([3, 17, 5, 5, 30, 1, 22])


def _error(residual: Tensor, expected: Tensor) -> float:
    return float((residual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_replay_is_transformers_own_final_residual(name: str, dtype: torch.dtype, bound: float) -> None:
    model = tiny(name, seed=1, dtype=dtype)
    stream = vw.open(model)
    point, residual = operate(model, stream, TOKENS)
    residual = centred(stream, residual)
    assert _error(replay(stream, point), residual) < bound
    later = replace(point, patterns={i: p.mT for i, p in point.patterns.items()})
    assert _error(replay(stream, later), residual) > 1e-2


@pytest.mark.parametrize("kind", ["scalars", "patterns", "gates"])
def test_every_kind_of_figure_matters(kind: str) -> None:
    """One number changed by one part in a hundred moves the residual: nothing in the point is left unused."""
    model = tiny("neox-parallel-partial-rotary", dtype=torch.float64)
    stream = vw.open(model)
    point, residual = operate(model, stream, TOKENS)
    residual = centred(stream, residual)
    for key, tensor in getattr(point, kind).items():
        if key != "unembed":  # read by the unembedding alone
            changed = replace(point, **{kind: {**getattr(point, kind), key: tensor * 1.01}})
            assert _error(replay(stream, changed), residual) > 1e-6, key


def test_gate_factor_takes_the_slope_at_zero() -> None:
    pre = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    for act, slope in ((torch.nn.GELU(), 0.5), (torch.nn.SiLU(), 0.5), (torch.nn.Tanh(), 1.0)):
        factor = gate_factor(act, pre)
        assert factor[1] == slope
        torch.testing.assert_close(factor * pre, act(pre))


def test_a_file_gives_the_same_point(tmp_path: Path) -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    point, _ = operate(model, stream, TOKENS)
    point.save(tmp_path / "point.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["point.safetensors"]
    again = OperatingPoint.load(tmp_path / "point.safetensors", stream)
    assert again.identity == point.identity
    assert torch.equal(replay(stream, again), replay(stream, point))
    assert point.identity != replace(point, tokens=point.tokens.flip(0)).identity
    other = vw.open(tiny("gpt2", seed=9))
    with pytest.raises(vw.VirtualWeightsError, match="another checkpoint"):
        OperatingPoint.load(tmp_path / "point.safetensors", other)
    with pytest.raises(vw.VirtualWeightsError, match="gain"):
        replay(vw.open(model, fold=False), point)


@pytest.mark.parametrize("case", ["absent", "garbage", "foreign", "no tokens", "unknown part"])
def test_a_file_that_is_no_point_is_refused(case: str, tmp_path: Path) -> None:
    path, good = tmp_path / "x.safetensors", {"format": FORMAT, "fingerprint": "f"}
    if case == "garbage":
        path.write_bytes(b"\xff" * 64)
    elif case == "foreign":
        save_file({"tokens": TOKENS}, path, {**good, "format": "another 1"})
    elif case == "no tokens":
        save_file({"scalars/unembed": torch.ones(7)}, path, good)
    elif case == "unknown part":
        save_file({"tokens": TOKENS, "weights/3": torch.ones(7)}, path, good)
    said = "cannot be read: No such file" if case == "absent" else "not a file of operating point"
    with pytest.raises(vw.VirtualWeightsError, match=said):
        OperatingPoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": TOKENS[:6]},
        {"tokens": TOKENS.double()},
        {"scalars": {"unembed": torch.zeros(7)}},
        {"patterns": {"L0.attn": torch.ones(4, 7, 6)}},
        {"gates": {"L0.mlp": torch.full((7, 96), float("nan"))}},
    ],
)
def test_a_malformed_point_is_refused(change: dict[str, object]) -> None:
    model = tiny("gpt2")
    point, _ = operate(model, vw.open(model), TOKENS)
    with pytest.raises(vw.VirtualWeightsError, match="malformed"):
        replace(point, **change)


@pytest.mark.parametrize("lost", ["scalars", "patterns", "gates"])
def test_an_incomplete_point_is_refused(lost: str) -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    point, _ = operate(model, stream, TOKENS)
    rest = dict(getattr(point, lost))
    del rest[next(iter(rest))]
    with pytest.raises(vw.VirtualWeightsError, match="lacks"):
        replay(stream, replace(point, **{lost: rest}))
