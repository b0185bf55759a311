"""A model's weights under TransformerLens's names and in its shapes, where a row vector acts from the left, ``x W``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from virtual_weights.architecture import Attention, Norm
from virtual_weights.errors import UsageError
from virtual_weights.stream.effective import norm_gain, own_gain
from virtual_weights.stream.group import READINGS, Port
from virtual_weights.stream.stream import Stream

_HEADS: dict[str, Port] = {"Q": "Q", "K": "K", "V": "V"}
_GATED: dict[str, Port] = {"gate": "gate", "in": "up"}
_PLAIN: dict[str, Port] = {"in": "in"}
_NORMS = {"attn": "ln1", "mlp": "ln2"}


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
    ``blocks.3.ln1_post.w``, ...  (d_model,)                  the same of norms after parts
    ``blocks.3.attn.q_norm.w``, k (d_head,)                   and of norms on queries and keys
    ``ln_final.w``                (d_model,)
    ``unembed.W_U``               (d_model, d_vocab)
    ============================  ==========================  ======================================

    ``attn.b_O``, ``mlp.b_in``, ``b_gate``, ``b_out`` and ``unembed.b_U`` are vectors. What the model lacks has no key:
    TransformerLens writes zeros for some of it.

    Args:
        stream: the model.
        layers: only these blocks; None for the whole model, embeddings and unembedding too.
        folded: as the folded stream's maps: readers contain the norm's gain and LayerNorm's centring, and biases what
            its shift gives (``fold_ln``); writers are centred where the norm is a LayerNorm
            (``center_writing_weights``), and so is the unembedding over tokens (``center_unembed``). Value biases are
            never moved.

    Returns:
        Tensors by name, read now; unfolded ones in storage dtype. They may be views with other strides.

    Raises:
        UsageError: a layer that the model does not have.

    Example:
        >>> in_lens_shapes(stream, [3])["blocks.3.attn.W_Q"].shape  # doctest: +SKIP
        torch.Size([9, 576, 64])
    """
    view, count = replace(stream, folded=folded), stream.spec.n_layers
    blocks = range(count) if layers is None else tuple(layers)
    wrong = [layer for layer in blocks if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"no layer {wrong[0]}", expected=f"layers 0 to {count - 1}", do="name one of these")
    tensors: dict[str, Tensor] = {}
    if layers is None:
        tensors |= _written(view, {"embed.W_E": "embed", "pos_embed.W_pos": "pos"})
    for layer in blocks:
        tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in _block(view, layer).items()}
    if layers is None:
        tensors |= _norm(view, "ln_final", "norm", "unembed", view.spec.head.norm)
        tensors |= _read(view, "unembed", "U", "unembed", "unembed")
    return tensors


def _block(stream: Stream, layer: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    attn, mlp = f"L{layer}.attn", f"L{layer}.mlp"
    for module, group, ports in (
        ("attn", attn, _HEADS),
        ("mlp", mlp, _GATED if stream.model.has("gate", mlp) else _PLAIN),
    ):
        for name, port in ports.items():
            tensors |= _read(stream, module, name, port, group)
        tensors |= _norms(stream, module, group)
    written = {"attn.W_O": attn, "mlp.W_out": mlp, "attn.b_O": f"{attn}.bias", "mlp.b_out": f"{mlp}.bias"}
    return tensors | _written(stream, written)


def _read(stream: Stream, module: str, name: str, port: Port, group: str) -> dict[str, Tensor]:
    """One reader and its constant, (heads, d, k) and (heads, k), without the first axis outside attention."""
    if not stream.model.has(READINGS[port], group):
        return {}
    read = stream.read(port, group)
    tensors = {f"{module}.W_{name}": read.maps.mT}
    if read.constants is not None:
        tensors[f"{module}.b_{name}"] = read.constants
    return tensors if module == "attn" else {key: tensor[0] for key, tensor in tensors.items()}


def _norms(stream: Stream, module: str, group: str) -> dict[str, Tensor]:
    """Gains and shifts of the norms around a part and on its queries and keys, where they are not folded."""
    branch = stream.spec.branch(group)
    if branch is None:
        return {}
    tensors = _norm(stream, _NORMS[module], "norm", group, branch.before)
    tensors |= _norm(stream, f"{_NORMS[module]}_post", "after", group, branch.after)
    if stream.folded or not isinstance(branch.part, Attention) or branch.part.port_norm is None:
        return tensors
    gains = {f"attn.{role}_norm.w": own_gain(stream, role, group, 1) for role in ("q", "k")}
    shifts = {f"attn.{role}_norm.b": stream.weight(f"{role}_norm_bias", group) for role in ("q", "k")}
    return tensors | {name: x.squeeze(0) for name, x in {**gains, **shifts}.items() if x is not None}


def _norm(stream: Stream, name: str, role: str, group: str, norm: Norm | None) -> dict[str, Tensor]:
    """The gain, what is added to it included, and the shift of a norm, where they are not folded."""
    if stream.folded or norm is None:
        return {}
    tensors = {f"{name}.w": norm_gain(stream, role, group, norm), f"{name}.b": stream.weight(f"{role}_bias", group)}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _written(stream: Stream, places: dict[str, str]) -> dict[str, Tensor]:
    """Writers by their groups, the stream's axis last, (heads, k, d); without the first axis outside attention."""
    maps = {name: stream.write(group).mT for name, group in places.items() if group in stream.groups}
    heads = {name for name in maps if stream.groups[places[name]].kind == "head"}
    tensors = {name: tensor if name in heads else tensor[0] for name, tensor in maps.items()}
    return {name: tensor[0] if stream.groups[places[name]].constant else tensor for name, tensor in tensors.items()}
