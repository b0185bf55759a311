"""The real model: what it is known to contain, and the exactness law on it."""

from __future__ import annotations

import json

import pytest
import torch
from exactness import errors
from tiny_models import flow

import virtual_weights as vw
from virtual_weights.checkpoint import locate
from virtual_weights.cli import run

pytestmark = pytest.mark.real
MODEL = "smollm2-135m"


def test_induction_circuit_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """L16H0, the strongest previous-token head, and L17H8 feed the keys of the strongest induction heads."""
    assert run(["composition", MODEL, "--port", "K", "--top", "10", "--json"]) == 0
    edges = json.loads(capsys.readouterr().out)["rows"]
    induction = {("L16H0", f"{reader}.K") for reader in ("L17H3", "L17H4", "L17H5", "L18H6", "L18H7", "L18H8")}
    induction |= {("L17H8", f"{reader}.K") for reader in ("L18H6", "L18H7", "L18H8")}
    strongest = [edge for edge in edges if (edge["writer"], edge["reader"]) in induction]
    assert len(strongest) == 9
    assert all(0.15 <= edge["score"] <= 0.18 for edge in strongest)
    assert {edge["group"] for edge in strongest} == {"L17.kv1", "L18.kv2"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_exactness_law(dtype: torch.dtype, bound: float) -> None:
    transformers = pytest.importorskip("transformers")
    path = locate(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation="eager"
    )
    tokens = torch.randint(0, 49152, (12,), generator=torch.Generator().manual_seed(0))
    worst = errors(vw.open(MODEL).to(dtype), flow(model.to(dtype).eval(), tokens), tokens)
    assert set(worst) == {"Q", "K", "V", "gate", "up", "unembed"}
    assert max(worst.values()) <= bound, worst
