"""Names of components and ports: one grammar, parsed and formatted without loss.

==================  =============================================
``L5H3``            head 3 of layer 5
``L5H3.Q``          its query port; also ``.K``, ``.V``, ``.O``
``L5.mlp``          the MLP of layer 5 as a whole
``L5.mlp.up``       one of its ports: ``in``, ``gate``, ``up``, ``out``
``L5N123``          neuron 123 of that MLP; ports as the MLP's
``L5.attn.bias``    what the attention of layer 5 always adds
``L5.mlp.bias``     what its MLP always adds
``tc8:F``           all features of the attached dictionary ``tc8``; its ports ``.enc`` and ``.dec``
``tc8:F123``        one of them; of a cross-layer one ``clt3:F@7`` is what it has written by state 7
``embed``           the token embedding, ``pos`` the learned positions, ``unembed`` the unembedding
``5.3``             short for ``L5H3``; ``5.3.K`` for ``L5H3.K``
==================  =============================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from virtual_weights.errors import UsageError

Kind = Literal["embed", "pos", "head", "mlp", "neuron", "attn_bias", "mlp_bias", "unembed", "dictionary", "feature"]

_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("head", re.compile(r"(?:L(?P<layer>\d{1,5})H|(?P<short>\d{1,5})\.)(?P<index>\d{1,5})(?:\.(?P<port>[QKVO]))?")),
    ("mlp", re.compile(r"L(?P<layer>\d{1,5})\.mlp(?:\.(?P<port>in|gate|up|out))?")),
    ("neuron", re.compile(r"L(?P<layer>\d{1,5})N(?P<index>\d{1,7})(?:\.(?P<port>in|gate|up|out))?")),
    ("attn_bias", re.compile(r"L(?P<layer>\d{1,5})\.attn\.bias")),
    ("mlp_bias", re.compile(r"L(?P<layer>\d{1,5})\.mlp\.bias")),
    ("embed", re.compile(r"embed")),
    ("pos", re.compile(r"pos")),
    ("unembed", re.compile(r"unembed")),
    ("dictionary", re.compile(r"(?P<name>[A-Za-z][\w-]{0,63}):F(?:@(?P<state>\d{1,5}))?(?:\.(?P<port>enc|dec))?")),
    (
        "feature",
        re.compile(
            r"(?P<name>[A-Za-z][\w-]{0,63}):F(?P<index>\d{1,9})(?:@(?P<state>\d{1,5}))?(?:\.(?P<port>enc|dec))?"
        ),
    ),
)


@dataclass(frozen=True)
class Label:
    """A parsed name.

    Attributes:
        kind: what it names.
        layer: its layer, None outside the blocks.
        index: head, neuron or feature, None where the kind has none.
        port: ``"Q"``, ``"K"``, ``"V"``, ``"O"``, ``"in"``, ``"gate"``, ``"up"``, ``"out"``, ``"enc"``, ``"dec"`` or
            None.
        name: of the dictionary, None of what belongs to the model.
        state: of a cross-layer dictionary that writes, by which state; None leaves it to the reader.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    port: str | None = None
    name: str | None = None
    state: int | None = None

    def __str__(self) -> str:
        """The canonical spelling; ``parse(str(label)) == label``."""
        by_state = "" if self.state is None else f"@{self.state}"
        stem = {
            "head": f"L{self.layer}H{self.index}",
            "mlp": f"L{self.layer}.mlp",
            "neuron": f"L{self.layer}N{self.index}",
            "attn_bias": f"L{self.layer}.attn.bias",
            "mlp_bias": f"L{self.layer}.mlp.bias",
            "dictionary": f"{self.name}:F{by_state}",
            "feature": f"{self.name}:F{self.index}{by_state}",
        }.get(self.kind, self.kind)
        return f"{stem}.{self.port}" if self.port else stem


def parse(text: str) -> Label:
    """Read a name.

    Raises:
        UsageError: it follows no pattern of the grammar.

    Example:
        >>> str(parse("17.3.K"))
        'L17H3.K'
    """
    for kind, pattern in _PATTERNS:
        found = pattern.fullmatch(text)
        if found:
            groups = found.groupdict()
            layer, index = groups.get("layer") or groups.get("short"), groups.get("index")
            state = _number(groups.get("state"))
            return Label(kind, _number(layer), _number(index), groups.get("port"), groups.get("name"), state)
    raise UsageError(
        f"{text!r} names no component",
        expected="a name such as L5H3, L5H3.K, L5.mlp, L5.mlp.up, L5N123, L5.attn.bias, tc8:F123, embed, pos, unembed "
        "or 5.3",
        do="correct the name",
    )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
