"""Where a dictionary reads and writes: names of hooks and modules as states of the stream and the norms before them.

===============================  ====================================  ==========================================
TransformerLens                  here                                  what it is
===============================  ====================================  ==========================================
``blocks.8.hook_resid_pre``      ``L8.begin``                          the state that layer 8 begins with
``blocks.8.hook_resid_mid``      ``L8.mlp.state``                      the state that its MLP reads, no norm
``blocks.8.hook_resid_post``     ``L8.end``                            the state that it ends with
``blocks.8.ln2.hook_normalized`` ``L8.mlp.normalized``                 RMSNorm: before the gain; LayerNorm: behind
``blocks.8.mlp.hook_in``         ``L8.mlp.normed``                     behind norm, gain and shift
``blocks.8.mlp.hook_out``        ``L8.mlp.output``                     what the MLP's map gives, before a norm behind
``blocks.8.hook_mlp_out``        ``L8.mlp.added``                      what is added to the stream
``blocks.8.attn.hook_z``         ``L8.attn.z``                         heads' values side by side, before their map
``hook_embed``                   ``0``                                 a state by its number
``ln_final.hook_normalized``     ``unembed.normalized``                before the gain of the last norm
===============================  ====================================  ==========================================

The same of ``ln1`` and ``attn``. Modules of transformers are named with ``.input`` or ``.output`` behind them, such as
``model.layers.8.mlp.input``; which norm is which is looked up in the model's own table.

``hook_mlp_in`` is what dictionaries that name it read, behind the norm, as circuit-tracer takes it; HookedTransformer
of TransformerLens calls so what comes before the norm: name the place where that is meant. ``hook_embed`` is a state
only of a model without learned positions.

Source: circuit-tracer, ``utils/tl_nnsight_mapping.py``; TransformerLens issue 747 for LayerNorm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from virtual_weights.architecture import Branch, Model, Norm
from virtual_weights.errors import UsageError

_LENS = {
    "hook_resid_pre": "begin",
    "hook_resid_mid": "mlp.state",
    "hook_resid_post": "end",
    "ln1.hook_normalized": "attn.normalized",
    "ln2.hook_normalized": "mlp.normalized",
    "attn.hook_in": "attn.normed",
    "hook_attn_in": "attn.state",
    "mlp.hook_in": "mlp.normed",
    "hook_mlp_in": "mlp.normed",
    "attn.hook_out": "attn.output",
    "mlp.hook_out": "mlp.output",
    "hook_attn_out": "attn.added",
    "hook_mlp_out": "mlp.added",
    "attn.hook_z": "attn.z",
}
_LENS_NAME = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<hook>[\w.]+)")
_OWN = re.compile(r"L(?P<layer>\d+)\.(?P<what>begin|end|(?:attn|mlp)\.(?:state|normalized|normed|output|added|z))")
_MODULE = re.compile(
    r"(?P<module>(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)(?P<rest>(?:\.\w+)*))\.(?P<end>input|output)"
)
_LAST = {
    "ln_final.hook_normalized": "normalized",
    "unembed.hook_in": "normed",
    "unembed.normalized": "normalized",
    "unembed.normed": "normed",
    "unembed.state": "state",
}
_HEAD = re.compile(r"(?:.*\.)?lm_head\.input")
_EMBED = re.compile(r"(?:.*\.)?(?:embed_tokens|wte)\.output")
_READS = ("state", "normalized", "normed")


@final
@dataclass(frozen=True)
class HookPoint:
    """A place of the stream, or of a branch.

    Attributes:
        text: as it was named.
        state: the state that is read there, or in which what is written there first appears.
        what: ``"state"``, ``"normalized"`` or ``"normed"`` of what reads; ``"output"``, ``"added"`` or ``"z"`` of what
            a branch gives.
        branch: whose norm or output it is; None of a state, and before the unembedding.
        norm: through which is read here; None where the state is read as it is.
    """

    text: str
    state: int
    what: str
    branch: Branch | None = None
    norm: Norm | None = None

    @property
    def site(self) -> str:
        """Whose norm it is: the id of a branch, or ``"unembed"``."""
        return "unembed" if self.branch is None else self.branch.id

    @property
    def gained(self) -> bool:
        """Whether what is read here contains the gain and the shift of the norm."""
        return self.what == "normed" or (self.norm is not None and self.norm.kind == "layer")

    @property
    def written(self) -> bool:
        """Whether it is what a branch gives, rather than a state or what reads one."""
        return self.what in ("output", "added", "z")


def hook_point(text: str, model: Model) -> HookPoint:
    """A place by its name.

    Args:
        text: a number of a state, a name as in the table above, or a module of transformers.
        model: whose stream it is.

    Raises:
        UsageError: this model has no such place.
    """
    if text.isdecimal() and int(text) < model.spec.states:
        return HookPoint(text, int(text), "state")
    if (text in ("hook_embed", "embed") or _EMBED.fullmatch(text)) and not model.has("pos", "pos"):
        return HookPoint(text, 0, "state")
    if text in _LAST or _HEAD.fullmatch(text):
        what = _LAST.get(text, "normed")
        return reading(text, model.spec.states - 1, what, None, model.spec.head.norm)
    lens, own, module = _LENS_NAME.fullmatch(text), _OWN.fullmatch(text), _MODULE.fullmatch(text)
    place = None
    if lens is not None and lens["hook"] in _LENS:
        place = _layer_place(text, int(lens["layer"]), _LENS[lens["hook"]], model)
    elif own is not None:
        place = _layer_place(text, int(own["layer"]), own["what"], model)
    elif module is not None:
        place = _layer_place(text, int(module["layer"]), _module_what(module, model), model)
    if place is None:
        raise UsageError(
            f"{text!r} is not a place of this model",
            expected=f"a state from 0 to {model.spec.states - 1}, L3.begin, L3.end, L3.mlp.normed (behind the norm), "
            "L3.mlp.normalized (before its gain), L3.mlp.state, L3.mlp.output, L3.mlp.added, or a hook's name",
            do="correct it, or name the place behind the path: PATH@READS or PATH@READS,WRITES",
        )
    return place


def _layer_place(text: str, layer: int, what: str | None, model: Model) -> HookPoint | None:
    branches = [branch for branch in model.spec.branches if branch.id.startswith(f"L{layer}.")]
    if not branches or what is None:
        return None
    if what in ("begin", "end"):
        ends = (min(b.reads for b in branches), max(b.writes for b in branches))
        return HookPoint(text, ends[what == "end"], "state")
    part, _, kind = what.partition(".")
    branch = model.spec.branch(f"L{layer}.{part}")
    if branch is None or (kind == "z" and part != "attn"):
        return None
    if kind in _READS:
        return reading(text, branch.reads, kind, branch, branch.before)
    return HookPoint(text, branch.writes, kind, branch)


def reading(text: str, state: int, what: str, branch: Branch | None, norm: Norm | None) -> HookPoint:
    """A place that is read: a state as it is, or what a norm makes of it."""
    return HookPoint(text, state, what, branch, None if what == "state" else norm)


def _module_what(module: re.Match[str], model: Model) -> str | None:
    """What the input or the output of a module of transformers is, as this module's own names have it."""
    if not module["rest"]:
        return "begin" if module["end"] == "input" else "end"
    layer = int(module["layer"])
    tail = f".{module['layer']}{module['rest']}"
    for part, role in (("attn", "o"), ("mlp", "down")):
        id = f"L{layer}.{part}"
        names = {r: n.removesuffix(".weight") for r in ("norm", "after", role) for n in _names(model, r, id)}
        if names.get(role, "").rpartition(".")[0].endswith(tail):  # the module around the output map
            return f"{part}.normed" if module["end"] == "input" else f"{part}.output"
        if names.get("norm", "").endswith(tail):
            return f"{part}.state" if module["end"] == "input" else f"{part}.normed"
        if names.get("after", "").endswith(tail):
            return f"{part}.output" if module["end"] == "input" else f"{part}.added"
    return None


def _names(model: Model, role: str, group: str) -> list[str]:
    """The name in transformers of the tensor that plays a role, none or one."""
    return [row.name for row in model.rows if role in row.roles and group in row.groups][:1]
