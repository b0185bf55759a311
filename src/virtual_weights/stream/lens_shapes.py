"""A model's weights under TransformerLens's names and in its shapes, where a row vector acts from the left, ``x W``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.stream.group import Port
from virtual_weights.stream.stream import Stream

_HEADS: dict[str, Port] = {"Q": "Q", "K": "K", "V": "V"}
_GATED: dict[str, Port] = {"gate": "gate", "in": "up"}
_PLAIN: dict[str, Port] = {"in": "in"}
_ROLES: dict[Port, str] = {"Q": "q", "K": "k", "V": "v", "gate": "gate", "up": "up", "in": "up", "unembed": "unembed"}
_NORMS = {"ln1": "attn_norm", "ln2": "mlp_norm"}


def in_lens_shapes(stream: Stream, layers: Iterable[int] | None = None, *, folded: bool = False) -> dict[str, Tensor]:
    """Weights as TransformerLens names and shapes them; ours transposed, since there ``y = x W + b``.

    ============================  ==========================  ======================================
    ``embed.W_E``                 (d_vocab, d_model)
    ``pos_embed.W_pos``           (n_ctx, d_model)            learned positions
    ``blocks.3.attn.W_Q``         (n_heads, d_model, d_head)
    ``blocks.3.attn.W_K``, V      (shared, d_model, d_head)   once per key/value head, as the bridge
    ``blocks.3.attn.W_O``         (n_heads, d_head, d_model)
    ``blocks.3.attn.b_Q``, K, V   (heads or shared, d_head)
    ``blocks.3.mlp.W_in``         (d_model, d_mlp)            the up map of a gated MLP
    ``blocks.3.mlp.W_gate``       (d_model, d_mlp)            gated MLPs
    ``blocks.3.mlp.W_out``        (d_mlp, d_model)
    ``blocks.3.ln1.w``, ``ln2.w`` (d_model,)                  gains, ``.b`` shifts; not where folded
    ``ln_final.w``                (d_model,)
    ``unembed.W_U``               (d_model, d_vocab)
    ============================  ==========================  ======================================

    ``attn.b_O``, ``mlp.b_in``, ``b_gate``, ``b_out`` and ``unembed.b_U`` are vectors. What the model lacks has no key:
    TransformerLens writes zeros for some of it.

    Args:
        stream: the model.
        layers: only these blocks; None for the whole model, embeddings and unembedding too.
        folded: readers contain the norm's gain and LayerNorm's centring, and biases what its shift gives
            (``fold_ln``); writers are never centred, nor are value biases moved.

    Returns:
        Tensors by name, read now; unfolded ones in storage dtype. They may be views with other strides.

    Raises:
        UsageError: a layer that the model does not have.

    Example:
        >>> in_lens_shapes(stream, [3])["blocks.3.attn.W_Q"].shape  # doctest: +SKIP
        torch.Size([9, 576, 64])
    """
    own, count = replace(stream, folded=folded), stream.spec.n_layers
    blocks = range(count) if layers is None else tuple(layers)
    wrong = [layer for layer in blocks if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"no layer {wrong[0]}", expected=f"layers 0 to {count - 1}", do="name one of these")
    found: dict[str, Tensor] = {}
    if layers is None:
        found |= _given(own, {"embed.W_E": "embed", "pos_embed.W_pos": "pos"}, None)
    for layer in blocks:
        found |= {f"blocks.{layer}.{name}": tensor for name, tensor in _block(own, layer).items()}
    if layers is None:
        found |= _norm(own, "ln_final", "final_norm", None) | _read(own, "unembed", "U", "unembed", None)
    return found


def _block(stream: Stream, layer: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for place, ports in (("attn", _HEADS), ("mlp", _GATED if stream.spec.gated else _PLAIN)):
        for name, port in ports.items():
            found |= _read(stream, place, name, port, layer)
    written = _given(stream, {"attn.W_O": "o", "mlp.W_out": "down"}, layer)
    found |= {name: tensor.mT for name, tensor in written.items()}
    found |= _given(stream, {"attn.b_O": "o_bias", "mlp.b_out": "down_bias"}, layer)
    for place, role in _NORMS.items():
        found |= _norm(stream, place, role, layer)
    return found


def _read(stream: Stream, place: str, name: str, port: Port, layer: int | None) -> dict[str, Tensor]:
    """One reader and its constant, (heads, d, k) and (heads, k), without the first axis outside attention."""
    if not stream.model.has(_ROLES[port], layer):
        return {}
    read = stream.read(port, layer)
    found = {f"{place}.W_{name}": read.maps.mT}
    if read.constants is not None:
        found[f"{place}.b_{name}"] = read.constants
    return found if place == "attn" else {key: tensor[0] for key, tensor in found.items()}


def _norm(stream: Stream, place: str, role: str, layer: int | None) -> dict[str, Tensor]:
    return {} if stream.folded else _given(stream, {f"{place}.w": role, f"{place}.b": f"{role}_bias"}, layer)


def _given(stream: Stream, names: dict[str, str], layer: int | None) -> dict[str, Tensor]:
    """Roles as they are, where the model has them."""
    found = {name: stream.weight(role, layer) for name, role in names.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
