"""Hooks placed by the tables: what a running model's modules receive and give, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from virtual_weights.architecture import Attention, Mlp, layer_of
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.stream import Group, Stream, centred
from virtual_weights.stream.effective import added, after_scale, embedded, inner_scale
from virtual_weights.stream.group import HEAD_PORTS, READINGS, WRITINGS, Port
from virtual_weights.stream.layout import columns
from virtual_weights.stream.names import Kind

Signal = Literal["state", "inner", "written", "pattern", "after", "within", "features"] | Port
"""What can be seen, B prompts of T tokens:

=============  =============================================================================================
state          (B, T, d) what a norm receives; its place is the number of the state, ``stream.states - 1`` last
inner          (B, T, m, k) what the output map of attention (m heads) or of an MLP (m = 1) receives, over the scalar
               of a norm on that or after the part where there is one
written        (B, T, d) what an MLP writes, without its bias, which is a writer of its own; what embeddings write;
               centred as their maps are, see ``Stream.write``
Q, K, V        (B, T, heads or shared heads, k) before rotary turns them, constants included
gate, up, in   (B, T, n) pre-activations, constants included
unembed        (B, T, V) the logits
pattern        (B, heads, T, T) attention probabilities, [query, key]
after, within  (B, T) the scalar of the norm on what a part gives, and of the norm on its inner activations
features       (B, T, F) activations of an attached dictionary, where edges into it are removed; no module has them
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
    if role == "norm" and not stream.model.has("norm", group):  # a norm without a tensor
        return norm_module(stream, group)
    row = stream.model.row(role, group)
    if row is None:
        raise MissingTensorError(
            f"a model of type {stream.model.family} has no role {role!r} in {group!r}",
            expected=", ".join(
                sorted({role for row in stream.model.rows if group in row.groups for role in row.roles})
            ),
            do="name one of these roles",
        )
    return row.module


def norm_module(stream: Stream, group: str) -> str:
    """The dotted path of the norm through which a group reads, in transformers' spelling."""
    layer, names = layer_of(group), stream.model.hf.names
    if layer is None:
        return f"{names['prefixes'][0]}{names['final']}"
    return f"{names['prefixes'][0]}{names['layer'].format(l=layer)}{names[group.rpartition('.')[2] + '.norm']}"


def block_of(model: nn.Module, stream: Stream, group: Group) -> nn.Module:
    """The module of the layer that a group is a part of."""
    return module_named(model, stream, block_name(stream, group.id))


def block_name(stream: Stream, group: str) -> str:
    """The dotted path of the layer that a group is a part of."""
    names = stream.model.hf.names
    return f"{names['prefixes'][0]}{names['layer'].format(l=layer_of(group))}".rstrip(".")


def state_module(model: nn.Module, stream: Stream, state: int) -> nn.Module:
    """A module that receives a state of the stream first of all: the norm before a reader, or the reader itself."""
    group = stream.groups.sited(state)[0]
    if group.norm is not None:
        return module_of(model, stream, "norm", group.id)
    return module_of(model, stream, READINGS[group.ports[0]], group.id)


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


def port_features(stream: Stream, port: Port, group: str) -> Tensor:
    """Which features of what a port's module gives are the port's: (heads, k) or (n,)."""
    row = stream.model.row(READINGS[port], group)
    assert row is not None
    return columns(row, READINGS[port], stream.model.axes(group))


def port_values(stream: Stream, port: Port, group: str, output: Tensor) -> Tensor:
    """What the module of a port gives, taken apart: queries, keys and values (..., heads, k), or (..., n)."""
    row = stream.model.row(READINGS[port], group)
    if port not in HEAD_PORTS and not (row and row.slots):
        return output
    features = port_features(stream, port, group)
    return output[..., features.to(output.device)] if row and row.slots else output.unflatten(-1, features.shape)


def _wheres(stream: Stream, signal: Signal) -> list[str] | range:
    groups = stream.groups
    if signal == "state":
        return range(stream.states)
    kinds: dict[str, tuple[Kind, ...]] = {
        "written": ("embed", "pos", "mlp"),
        "inner": ("head", "mlp"),
        "pattern": ("head",),
    }
    if signal in ("after", "within"):
        return [g.id for g in (*groups.heads, *groups.mlps) if (g.after if signal == "after" else g.inner) is not None]
    emitters = groups.kind(*kinds[signal]) if signal in kinds else [group for group in groups if signal in group.ports]
    return [group.id for group in emitters]


def _hook(module: nn.Module, stream: Stream, place: Place, see: See) -> Hook:
    """The hook of one place."""
    signal, where = place
    if signal == "state":
        return before(state_module(module, stream, int(where)), partial(see, signal, where))
    group = stream.groups[str(where)]
    if signal == "pattern":
        return _pattern(module, stream, group.id, partial(see, signal, where))
    shape = len(group.components), group.width
    if signal == "after":
        output = module_of(module, stream, WRITINGS[group.kind], group.id)
        return after(output, lambda tensor: see(signal, where, after_scale(stream, tensor, group)))
    if group.inner is not None and signal in ("inner", "within"):

        def normed(z: Tensor) -> None:
            z = z.unflatten(-1, shape)
            scalar = inner_scale(stream, z, group)
            see(signal, where, scalar if signal == "within" else z / scalar[..., None, None])

        return before(module_of(module, stream, "inner", group.id), normed)
    if signal == "inner":

        def inner(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            z = given[0].detach().unflatten(-1, shape)
            scalar = None if group.after is None else after_scale(stream, output.detach(), group)
            see(signal, where, z if scalar is None else z / scalar[..., None, None])

        return module_of(module, stream, WRITINGS[group.kind], group.id).register_forward_hook(inner)
    if signal == "written":
        return _written(module, stream, group, partial(see, signal, where))
    assert signal not in ("within", "features")
    reader = module_of(module, stream, READINGS[signal], group.id)
    return after(reader, lambda tensor: see(signal, where, port_values(stream, signal, group.id, tensor)))


def _written(module: nn.Module, stream: Stream, group: Group, see: Callable[[Tensor], None]) -> Hook:
    """What an MLP or an embedding writes, as the write maps say it."""
    if group.kind == "pos" and stream.spec.sinusoidal:
        table = stream.write("pos")[0].T
        tokens = module_of(module, stream, "embed", "embed")
        return after(tokens, lambda tensor: see(table[None, : tensor.shape[1]].to(tensor)))
    output = module_of(module, stream, WRITINGS[group.kind], group.id)
    if group.kind == "embed" and (stream.spec.embedding.factor != 1 or stream.spec.embedding.norm is not None):

        def rows(embedding: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
            table = dict(embedding.named_parameters())["weight"].detach()
            see(centred(stream, embedded(stream, "embed", functional.embedding(given[0], table))))

        return output.register_forward_hook(rows)
    bias = stream.weight("bias", f"{group.id}.bias")

    def written(tensor: Tensor) -> None:
        given = tensor if bias is None else tensor - bias.to(tensor)
        see(centred(stream, added(stream, given, group) if group.kind == "mlp" else given))

    return after(output, written)


def before(module: nn.Module, see: Callable[[Tensor], None]) -> Hook:
    """Call ``see`` with what a module receives."""

    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        see(given[0].detach())

    return module.register_forward_pre_hook(hook)


def after(module: nn.Module, see: Callable[[Tensor], None]) -> Hook:
    """Call ``see`` with what a module gives."""

    def hook(_module: nn.Module, _given: object, output: Tensor) -> None:
        see(output.detach())

    return module.register_forward_hook(hook)


def _pattern(module: nn.Module, stream: Stream, group: str, see: Callable[[Tensor], None]) -> Hook:
    """Attention probabilities are the second thing that the module around the output map gives."""
    branch = stream.spec.branch(group)
    sinks = branch is not None and isinstance(branch.part, Attention) and "sinks" in branch.part.outside

    def hook(_module: nn.Module, _given: object, output: tuple[Tensor | None, ...]) -> None:
        probabilities = output[1] if len(output) > 1 else None
        if sinks:
            raise UsageError(
                f"the pattern of {type(module).__name__} leaves out what its attention sinks take",
                expected="attention whose pattern is what values are weighed with",
                do="ask questions that need no pattern",
            )
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


def activation(stream: Stream, group: Group) -> nn.Module:
    """The nonlinearity of an MLP, by transformers' name for it, with the numbers of its own that it may have."""
    assert group.branch is not None and isinstance(group.branch.part, Mlp)
    if stream.model.hf.values["runs"] == "here":
        return _ACTIVATIONS[group.branch.part.activation]
    from transformers.activations import ACT2FN

    module = ACT2FN[group.branch.part.activation]
    for role, name in (("act.p", "alpha_p"), ("act.n", "alpha_n"), ("act.beta", "beta"), ("act.eps", "eps")):
        number = stream.weight(role, group)
        if number is not None:
            getattr(module, name).data = number
    return module


_ACTIVATIONS: Mapping[str, nn.Module] = {
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), nn.GELU("tanh")),
}
"""The nonlinearities of what runs here."""


def leaf(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
    """A forward hook that makes a module's output a leaf: gradients even where no parameter asks for one."""
    return output.detach().requires_grad_()


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
