"""Where a role of the tables lives in a transformers module: hooks are placed by this, not by hand-written names."""

from __future__ import annotations

from torch import nn

from virtual_weights.architecture import FAMILIES
from virtual_weights.errors import MissingTensorError
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
