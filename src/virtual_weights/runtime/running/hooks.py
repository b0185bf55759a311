"""Hooks placed by the tables: what a running model's modules receive and give, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import einops
import torch
from torch import Tensor, nn

from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.stream import Stream, centred
from virtual_weights.stream.group import READINGS, WRITINGS, Port
from virtual_weights.stream.names import Kind

Signal = Literal["state", "inner", "written", "pattern"] | Port
"""What can be seen, B prompts of T tokens:

=============  =============================================================================================
state          (B, T, d) what a norm receives; its place is the number of the state, ``stream.states - 1`` last
inner          (B, T, m, k) what the output map of attention (m heads) or of an MLP (m = 1) receives
written        (B, T, d) what an MLP writes, without its bias, which is a writer of its own; what embeddings write;
               centred as their maps are, see ``Stream.write``
Q, K, V        (B, T, heads or shared heads, k) before rotary turns them, constants included
gate, up, in   (B, T, n) pre-activations, constants included
unembed        (B, T, V) the logits
pattern        (B, heads, T, T) attention probabilities, [query, key]
=============  =============================================================================================
"""

Place = tuple[Signal, str | int]
"""A signal and the id of its group; of a state its number."""

See = Callable[[Signal, Any, Tensor], None]
Hook = Any


def places(stream: Stream, *signals: Signal) -> list[Place]:
    """Every place of some signals in a model."""
    return [(signal, where) for signal in signals for where in _wheres(stream, signal)]


@contextmanager
def watching(module: nn.Module, stream: Stream, wanted: Collection[Place], see: See) -> Generator[None]:
    """Call ``see(signal, place, tensor)`` whenever the model computes one of these.

    Args:
        module: what runs, see ``load``.
        stream: the same model.
        wanted: places, see ``places``.
        see: gets the model's own tensors, detached; it must not change them.

    Raises:
        MissingTensorError: the model is not of the stream's family.
        UsageError: while it runs, a pattern is wanted and the model's attention keeps none.
    """
    hooks = [_hook(module, stream, place, see) for place in wanted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def watched(
    module: nn.Module, stream: Stream, wanted: Collection[Place], tokens: Tensor
) -> tuple[dict[Place, Tensor], Tensor]:
    """Run a model on tokens (B, T); what it computed at some places, and its logits (B, T, V)."""
    signals: dict[Place, Tensor] = {}

    def see(signal: Signal, place: Any, tensor: Tensor) -> None:
        signals[signal, place] = tensor

    with watching(module, stream, set(wanted), see):
        logits: Tensor = module(tokens, use_cache=False).logits
    return signals, logits


def module_name(stream: Stream, role: str, group: str) -> str:
    """The dotted path of the module that holds a role's weight, in transformers' spelling.

    Args:
        stream: the model; it may come from a file of another dialect.
        role: a role of the tables, e.g. ``"o"``, ``"down"``, ``"norm"``, ``"embed"``.
        group: whose, e.g. ``"L3.attn"``, ``"embed"``, ``"unembed"`` (the last norm too).

    Raises:
        MissingTensorError: transformers' table of this family has no such role.

    Example:
        >>> module_name(stream, "o", "L3.attn")  # doctest: +SKIP
        'model.layers.3.self_attn.o_proj'
    """
    table = stream.model.hf
    row = table.row(role, group)
    if row is None:
        raise MissingTensorError(
            f"the {stream.model.family} family has no role {role!r} in {group!r}",
            expected=", ".join(sorted({f"{role} of {row.group}" for row in table.rows for role in row.roles})),
            do="name one of these roles",
        )
    return table.spelled(row, group).rpartition(".")[0]


def module_of(model: nn.Module, stream: Stream, role: str, group: str) -> nn.Module:
    """The module itself, in a model with its head (``AutoModelForCausalLM``) or the base model of one."""
    return module_named(model, stream, module_name(stream, role, group))


def module_named(model: nn.Module, stream: Stream, name: str) -> nn.Module:
    """A module by its dotted path in the model with its head."""
    modules = dict(model.named_modules())
    for spelling in (name, name.partition(".")[2]):
        if spelling in modules:
            return modules[spelling]
    raise MissingTensorError(
        f"this {type(model).__name__} has no module {name!r}",
        expected=f"a transformers model of the {stream.model.family} family",
        do="pass the model that the stream was opened from",
    )


def split(stream: Stream, role: str, group: str, output: Tensor) -> Tensor:
    """What the module of a role gives, taken apart as its table says: queries, keys and values (..., heads, k)."""
    row = stream.model.hf.row(role, group)
    assert row is not None
    # the weight's layout without the stream's axis is that of the output: "d (three h k)" gives "(three h k)"
    given, wanted = (" ".join(x for x in side.split() if x != "d") for side in row.layout.split("->"))
    fused = len(row.roles) > 1
    wanted = f"{wanted.split()[0]} ... {wanted.partition(' ')[2]}" if fused else f"... {wanted}"
    letters = set(wanted.split())
    sizes = {name: size for name, size in stream.spec.axes.items() if size and name in letters}
    tensor = einops.rearrange(output, f"... {given} -> {wanted}", **sizes)
    return tensor[row.roles.index(role)] if fused else tensor


def _wheres(stream: Stream, signal: Signal) -> list[str] | range:
    groups = stream.groups
    if signal == "state":
        return range(stream.states)
    kinds: dict[str, tuple[Kind, ...]] = {
        "written": ("embed", "pos", "mlp"),
        "inner": ("head", "mlp"),
        "pattern": ("head",),
    }
    emitters = groups.kind(*kinds[signal]) if signal in kinds else [group for group in groups if signal in group.ports]
    return [group.id for group in emitters]


def _hook(module: nn.Module, stream: Stream, place: Place, see: See) -> Hook:
    """The hook of one place."""
    signal, where = place
    if signal == "state":
        site = stream.groups.sited(int(where))[0].id
        return _before(module_of(module, stream, "norm", site), partial(see, signal, where))
    group = stream.groups[str(where)]
    if signal == "pattern":
        return _pattern(module, stream, group.id, partial(see, signal, where))
    if signal in ("inner", "written"):
        output = module_of(module, stream, WRITINGS[group.kind], group.id)
        if signal == "inner":
            shape = len(group.components), group.width
            return _before(output, lambda tensor: see(signal, where, tensor.unflatten(-1, shape)))
        bias = stream.weight("bias", f"{group.id}.bias")

        def written(tensor: Tensor) -> None:
            see(signal, where, centred(stream, tensor if bias is None else tensor - bias.to(tensor)))

        return _after(output, written)
    role = READINGS[signal]
    reader = module_of(module, stream, role, group.id)
    return _after(reader, lambda tensor: see(signal, where, split(stream, role, group.id, tensor)))


def _before(module: nn.Module, see: Callable[[Tensor], None]) -> Hook:
    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        see(given[0].detach())

    return module.register_forward_pre_hook(hook)


def _after(module: nn.Module, see: Callable[[Tensor], None]) -> Hook:
    def hook(_module: nn.Module, _given: object, output: Tensor) -> None:
        see(output.detach())

    return module.register_forward_hook(hook)


def _pattern(module: nn.Module, stream: Stream, group: str, see: Callable[[Tensor], None]) -> Hook:
    """Attention probabilities are the second thing that the module around the output map gives."""

    def hook(_module: nn.Module, _given: object, output: tuple[Tensor | None, ...]) -> None:
        probabilities = output[1] if len(output) > 1 else None
        if probabilities is None:
            raise UsageError(
                f"the attention of this {type(module).__name__} keeps no pattern",
                expected="eager attention",
                do="run what load(stream, model) gives, or load it with attn_implementation='eager'",
            )
        see(probabilities.detach())

    name = module_name(stream, "o", group).rpartition(".")[0]
    return module_named(module, stream, name).register_forward_hook(hook)


def forward(module: nn.Module, tokens: Tensor) -> None:
    """Run the blocks on (B, T) token ids; the unembedding, which nothing here looks at, is left out."""
    body: Any = getattr(module, "base_model", module)  # transformers' name for a model without its head
    body(tokens.to(next(module.parameters()).device), use_cache=False)


def activation(name: str) -> nn.Module:
    """A nonlinearity by transformers' name for it."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def leaf(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
    """A forward hook that makes a module's output a leaf: gradients even where no parameter asks for one."""
    return output.detach().requires_grad_()


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
