"""Hooks placed by the tables: what a running model's parts receive and give, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal

import einops
import torch
from torch import Tensor, nn

from virtual_weights.architecture import FAMILIES
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.stream import Stream


def module_name(stream: Stream, role: str, layer: int | None = None) -> str:
    """The dotted path of the module that holds a role's weight, in transformers' spelling.

    Args:
        stream: the model; it may come from a file of another dialect.
        role: a role of the tables, e.g. ``"o"``, ``"down"``, ``"attn_norm"``, ``"embed"``.
        layer: the layer; None outside the blocks.

    Raises:
        MissingTensorError: transformers' table of this family has no such role.

    Example:
        >>> module_name(stream, "o", 3)  # doctest: +SKIP
        'model.layers.3.self_attn.o_proj'
    """
    table = next(f for f in FAMILIES if f.name == stream.model.family).dialects["hf"]
    row = next((row for row in table.rows if role in row.roles), None)
    if row is None:
        raise MissingTensorError(
            f"the {stream.model.family} family has no role {role!r}",
            expected=", ".join(sorted({each for one in table.rows for each in one.roles})),
            do="name one of these roles",
        )
    spelling = row.name.split("|")[-1]
    name = spelling[1:] if spelling.startswith("/") else table.prefixes[0] + spelling
    return name.format(l=layer).rpartition(".")[0]


def module_of(model: nn.Module, stream: Stream, role: str, layer: int | None = None) -> nn.Module:
    """The module itself, in a model with its head (``AutoModelForCausalLM``) or the base model of one."""
    modules = dict(model.named_modules())
    name = module_name(stream, role, layer)
    for spelling in (name, name.partition(".")[2]):
        if spelling in modules:
            return modules[spelling]
    raise MissingTensorError(
        f"this {type(model).__name__} has no module {name!r}",
        expected=f"a transformers model of the {stream.model.family} family",
        do="pass the model that the stream was opened from",
    )


Kind = Literal["state", "inner", "neurons", "mlp", "embed", "pos", "Q", "K", "V", "gate", "in", "pattern"]
"""What can be seen, B prompts of T tokens:

===========  ===============================================================================================
state        (B, T, d) what a norm receives; its layer is the number of the state, ``stream.states - 1`` last
inner        (B, T, heads, k) what the heads' output map receives
neurons      (B, T, n) what the MLP's output map receives
mlp          (B, T, d) what the MLP writes, without its bias, which is a writer of its own
embed, pos   (B, T, d) what the embeddings write
Q, K, V      (B, T, heads or shared heads, k) before rotary turns them, constants included
gate, in     (B, T, n) pre-activations, constants included
pattern      (B, heads, T, T) attention probabilities, [query, key]
===========  ===============================================================================================
"""

See = Callable[[Kind, int, Tensor], None]
_ROLES = {"Q": "q", "K": "k", "V": "v", "gate": "gate", "in": "up"}


@contextmanager
def watching(model: nn.Module, stream: Stream, kinds: Iterable[Kind], see: See) -> Generator[None]:
    """Call ``see(kind, layer, tensor)`` whenever the model computes one of these; embeddings have layer 0.

    Args:
        model: what runs, see ``load``.
        stream: the same model.
        kinds: what is wanted.
        see: gets the model's own tensors, detached; it must not change them.

    Raises:
        MissingTensorError: the model is not of the stream's family.
        UsageError: while it runs, a pattern is wanted and the model's attention keeps none.
    """
    hooks = [hook for kind in kinds for hook in _hooks(model, stream, kind, see)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def split(stream: Stream, role: str, output: Tensor) -> Tensor:
    """What the module of a role gives, taken apart as its table says: queries, keys and values (..., heads, k)."""
    table = next(f for f in FAMILIES if f.name == stream.model.family).dialects["hf"]
    row = next(row for row in table.rows if role in row.roles)
    # the weight's layout without the stream's axis is that of the output: "d (three h k)" gives "(three h k)"
    given, wanted = (" ".join(x for x in side.split() if x != "d") for side in row.layout.split("->"))
    fused = len(row.roles) > 1
    wanted = f"{wanted.split()[0]} ... {wanted.partition(' ')[2]}" if fused else f"... {wanted}"
    letters = set(wanted.split())
    sizes = {name: size for name, size in stream.spec.axes.items() if size and name in letters}
    tensor = einops.rearrange(output, f"... {given} -> {wanted}", **sizes)
    return tensor[row.roles.index(role)] if fused else tensor


def _hooks(model: nn.Module, stream: Stream, kind: Kind, see: See) -> list[Any]:
    """The hooks of one kind, in every layer."""
    spec, layers = stream.spec, range(stream.spec.n_layers)

    def before(role: str, layer: int | None, at: int, change: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            see(kind, at, change(given[0].detach()))

        return module_of(model, stream, role, layer).register_forward_pre_hook(hook)

    def after(role: str, layer: int | None, at: int, change: Callable[[Tensor], Tensor]) -> Any:
        def hook(_module: nn.Module, _given: object, output: Tensor) -> None:
            see(kind, at, change(output.detach()))

        return module_of(model, stream, role, layer).register_forward_hook(hook)

    if kind == "state":
        norms = ("attn_norm",) if spec.parallel else ("attn_norm", "mlp_norm")
        places = [(norm, layer) for layer in layers for norm in norms]
        return [before(role, layer, at) for at, (role, layer) in enumerate([*places, ("final_norm", None)])]
    if kind == "inner":
        return [before("o", i, i, lambda z: z.unflatten(-1, (spec.n_heads, spec.d_head))) for i in layers]
    if kind == "neurons":
        return [before("down", i, i) for i in layers]
    if kind == "mlp":
        biases = [stream.weight("down_bias", i) for i in layers]
        return [after("down", i, i, lambda x, b=b: x if b is None else x - b.to(x)) for i, b in enumerate(biases)]
    if kind in ("embed", "pos"):
        return [after(kind, None, 0, lambda x: x)]
    if kind == "pattern":
        return [_pattern_hook(model, stream, i, see) for i in layers]
    return [after(_ROLES[kind], i, i, lambda x: split(stream, _ROLES[kind], x)) for i in layers]


def _pattern_hook(model: nn.Module, stream: Stream, layer: int, see: See) -> Any:
    """Attention probabilities are the second thing that the module around the output map gives."""
    name = module_name(stream, "o", layer).rpartition(".")[0]
    modules = dict(model.named_modules())
    attention = modules.get(name) or modules[name.partition(".")[2]]

    def hook(_module: nn.Module, _given: object, output: tuple[Tensor | None, ...]) -> None:
        if len(output) < 2 or not torch.is_tensor(output[1]):
            raise UsageError(
                f"the attention of this {type(model).__name__} keeps no pattern",
                expected="eager attention",
                do="run what load(stream, model) gives, or load it with attn_implementation='eager'",
            )
        see("pattern", layer, output[1].detach())

    return attention.register_forward_hook(hook)
