"""The groups of a model, from its table."""

from __future__ import annotations

from collections.abc import Iterator

from virtual_weights.architecture import Attention, Branch, Mlp, Model, layer_of
from virtual_weights.stream.group import HEAD_PORTS, Component, Group, Groups, ports_of
from virtual_weights.stream.names import Label, parse


def groups(model: Model) -> Groups:
    """Every group that the checkpoint holds, in order of depth."""
    return Groups(tuple(_groups(model)))


def _groups(model: Model) -> Iterator[Group]:
    for kind in ("embed", "pos"):
        if model.has(kind, kind) or (kind == "pos" and model.spec.sinusoidal):
            yield Group(kind, kind, (Component(Label(kind), None, 0),), writes=(0,))
    for branch in model.spec.branches:
        if isinstance(branch.part, Attention) and model.has("o", branch.id):
            yield _attention(branch, branch.part)
        elif isinstance(branch.part, Mlp) and model.has("down", branch.id):
            yield _mlp(branch, branch.part)
        else:
            continue
        yield from _bias(model, branch)
    if model.has("unembed", "unembed"):
        last = model.spec.states - 1
        head = (Component(Label("unembed"), last, None),)
        yield Group("unembed", "unembed", head, ("unembed",), last, norm=model.spec.head.norm)


def _attention(branch: Branch, part: Attention) -> Group:
    layer, shared = layer_of(branch.id), part.sharing
    heads = tuple(
        Component(
            Label("head", layer, head),
            branch.reads,
            branch.writes,
            f"L{layer}.kv{head // shared}" if shared > 1 else None,
        )
        for head in range(part.heads)
    )
    return Group(
        branch.id, "head", heads, HEAD_PORTS, branch.reads, (branch.writes,), part.width, branch.before, branch
    )


def _mlp(branch: Branch, part: Mlp) -> Group:
    component = Component(parse(branch.id), branch.reads, branch.writes)
    return Group(
        branch.id,
        "mlp",
        (component,),
        ports_of(part),
        branch.reads,
        (branch.writes,),
        part.width,
        branch.before,
        branch,
    )


def _bias(model: Model, branch: Branch) -> Iterator[Group]:
    id = f"{branch.id}.bias"
    if model.has("bias", id):
        label = parse(id)
        yield Group(
            id, label.kind, (Component(label, None, branch.writes),), writes=(branch.writes,), width=1, branch=branch
        )
