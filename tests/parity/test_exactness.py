"""The exactness law against transformers, for every family, in both precisions."""

from __future__ import annotations

import pytest
import torch
from exactness import errors
from tiny_models import SHAPES, flow, norms_in_full_precision, tiny
from uniform import sizes

import virtual_weights as vw

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 36, 0, 11])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_sum_over_writers_is_what_every_reader_receives(name: str, dtype: torch.dtype, bound: float) -> None:
    model = tiny(name, dtype=dtype)
    worst = errors(vw.open(model), flow(model, TOKENS), TOKENS)
    assert set(worst) >= {"Q", "K", "V", "unembed"}
    assert max(worst.values()) <= bound, worst


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2"])
def test_the_law_fails_when_the_norm_is_left_out(name: str) -> None:
    model = tiny(name)
    worst = errors(vw.open(model, fold=False), flow(model, TOKENS), TOKENS)
    assert min(worst.values()) > 1e-2


@pytest.mark.parametrize("name", [n for n in SHAPES if not n.startswith("gpt2")])
def test_rotary_offset_gives_the_attention_logits_of_transformers(name: str) -> None:
    """``x_q^T QK(D) x_k`` summed with constants equals rotated q . rotated k at every offset."""
    model = tiny(name, dtype=torch.float64)
    stream, signals = vw.open(model), flow(model, TOKENS)
    module = model.get_submodule({"gpt_neox": "gpt_neox"}.get(model.config.model_type, "model"))
    places = torch.arange(len(TOKENS))[None]
    cos, sin = module.rotary_emb(torch.zeros(1, dtype=torch.float64), places)
    k = sizes(stream).d_head
    for head in (0, sizes(stream).n_heads - 1):
        q = signals.reads["Q", 1].unflatten(-1, (-1, k))[:, head]
        key = signals.reads["K", 1].unflatten(-1, (-1, k))[:, head // sizes(stream).group]
        turned = _apply(model, q, key, cos, sin)
        logits = turned[0] @ turned[1].T
        for offset in (0, 1, 4):
            rotate = stream.rotation(offset)
            assert rotate is not None
            ours = (q @ rotate.T * key.roll(offset, 0)).sum(-1)[offset:]
            torch.testing.assert_close(ours, logits.diagonal(-offset), rtol=1e-5, atol=1e-5)


def _apply(model, q, k, cos, sin):
    import importlib

    kind = model.config.model_type
    code = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    q4, k4 = q[None, None], k[None, None]
    turned_q, turned_k = code.apply_rotary_pos_emb(q4, k4, cos, sin)
    return turned_q[0, 0], turned_k[0, 0]


def test_norms_patch_restores_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    before = LlamaRMSNorm.forward
    with norms_in_full_precision():
        assert LlamaRMSNorm.forward is not before
    assert LlamaRMSNorm.forward is before
