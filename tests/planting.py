"""Models with a known stream: groups, ranks, erasers and unused dimensions that a test has put there itself."""

from __future__ import annotations

import torch
from tiny_models import tiny
from torch import Tensor, nn

D, HEADS, WIDTH, NEURONS, TOKENS = 24, 6, 4, 40, 37


def frame(seed: int, d: int = D) -> Tensor:
    """Orthonormal columns: directions of the stream to plant along."""
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def quiet(name: str = "llama-full") -> nn.Module:
    """A model in which no head writes anything and every gain of a norm stays random."""
    model = tiny(name, dtype=torch.float64)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("o_proj.weight"):
                weight.zero_()
    return model


def blank(name: str = "llama-full") -> nn.Module:
    """A model in which nothing is written and nothing read: every matrix is 0, every gain random."""
    model = tiny(name, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.zero_()
    return model


def plant_head(model: nn.Module, layer: int, head: int, ov: Tensor) -> None:
    """Give a head this OV circuit, of rank <= 4, with the norm folded."""
    u, s, vh = torch.linalg.svd(ov)
    attention, gain = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm.weight
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    with torch.no_grad():
        attention.o_proj.weight[:, rows] = u[:, :WIDTH] * s[:WIDTH]
        attention.v_proj.weight[rows] = vh[:WIDTH] / gain


def plant_qk(model: nn.Module, layer: int, head: int, qk: Tensor) -> None:
    """Give a head this QK circuit, of rank <= 4, with the norm folded."""
    u, s, vh = torch.linalg.svd(qk)
    attention, gain = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm.weight
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    with torch.no_grad():
        attention.q_proj.weight[rows] = (u[:, :WIDTH] * s[:WIDTH]).T / gain
        attention.k_proj.weight[rows] = vh[:WIDTH] / gain


def plant_neuron(model: nn.Module, layer: int, neuron: int, read: Tensor, write: Tensor) -> None:
    """Give a neuron this effective up row and this output."""
    mlp, gain = model.model.layers[layer].mlp, model.model.layers[layer].post_attention_layernorm.weight
    with torch.no_grad():
        mlp.up_proj.weight[neuron] = read / gain
        mlp.down_proj.weight[:, neuron] = write


def confine(model: nn.Module, space: Tensor) -> None:
    """Let every reader, heads', MLPs' and unembedding, see nothing outside these orthonormal columns."""
    onto = space @ space.T
    with torch.no_grad():
        for layer in model.model.layers:
            for part, gain, names in (
                (layer.self_attn, layer.input_layernorm.weight, ("q_proj", "k_proj", "v_proj")),
                (layer.mlp, layer.post_attention_layernorm.weight, ("gate_proj", "up_proj")),
            ):
                for name in names:
                    weight = part.get_submodule(name).weight
                    weight.copy_((weight * gain) @ onto / gain)
        model.lm_head.weight.copy_((model.lm_head.weight * model.model.norm.weight) @ onto / model.model.norm.weight)


def echo(gain: float) -> nn.Module:
    """The embedding writes unit vectors in four dimensions; a token alone in its row gets ``gain`` of it from L1H2."""
    model, axes = blank(), frame(2)
    content = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    content = content / content.norm(dim=1, keepdim=True)
    s = (1 / D + model.config.rms_norm_eps) ** 0.5
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(content @ axes[:, :4].T)
    plant_head(model, 1, 2, gain * s * axes[:, :4] @ axes[:, :4].T)
    return model
