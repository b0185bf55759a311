"""Nodes and links of attribution graphs, and the rows of JSON that stand for them in files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, final

from virtual_weights.errors import UsageError

NodeKind = Literal["feature", "error", "token", "logit", "other"]
Json = Mapping[str, Any]
_TRANSCODER, _MLP_ERROR = "cross layer transcoder", "mlp reconstruction error"
_EMBEDDING, _LOGIT = "embedding", "logit"
KINDS: dict[str, NodeKind] = {_TRANSCODER: "feature", _MLP_ERROR: "error", _EMBEDDING: "token", _LOGIT: "logit"}
"""The types of circuit-tracer."""
_LORSA: dict[str, NodeKind] = {"lorsa": "feature", "lorsa error": "error"}
_ID = re.compile(r"(\d{1,9}|E)_(?:[a-z]{3}_)?(\d{1,18})_(\d{1,18})")  # Neuronpedia's have a tag: 3_lor_17_5
_EXACT = 51  # bits that JavaScript keeps of a number that it computes
_DEFAULTS: Json = {"is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
_READ = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "clerp", "influence", "activation"}


def cantor_pair(layer: int, index: int) -> int:
    """The number of a pair, (l + i)(l + i + 1)/2 + i: how the files name a feature.

    It is exact. Readers in JavaScript, among them Neuronpedia's page, lose integers above 2^53, which indices from
    134,217,728 on exceed.
    """
    return (layer + index) * (layer + index + 1) // 2 + index


def cantor_unpair(number: int) -> tuple[int, int]:
    """The layer and the index that ``cantor_pair`` has numbered; in integers, so exact at any size.

    Raises:
        UsageError: the number is negative.
    """
    if number < 0:
        wrong(f"{number} is negative", "the number of a layer and an index")
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


@final
@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph: something that happens at one position of the prompt.

    Attributes:
        id: what links call it.
        kind: ``"feature"`` of a dictionary, ``"error"`` of its reconstruction, ``"token"`` (an embedding), ``"logit"``,
            ``"other"``, such as a bias.
        layer: its layer; of a logit as the file has it, beyond the last; None of a token.
        index: of the feature; of a token or logit the vocabulary id; None where there is none.
        position: in the prompt, from 0.
        label: somebody's text about it, kept as it is; ``clerp`` in the files.
        activation: of a feature.
        influence: in files of these two programs the share of all influence that nodes at least as strong have
            together: small is strong.
        probability: of a logit.
        feature_type: the file's word for what it is.
        extras: what else the file says of it, unchanged.
    """

    id: str
    kind: NodeKind
    layer: int | None
    index: int | None
    position: int
    label: str = ""
    activation: float | None = None
    influence: float | None = None
    probability: float = 0.0
    feature_type: str = _TRANSCODER
    extras: Json = field(default_factory=dict[str, Any], hash=False)

    @property
    def name(self) -> str:
        """A short name without the position: ``L8F123``, ``L8 error``, ``token 464``, ``logit 12366``."""
        if self.kind in ("token", "logit"):
            return self.kind if self.index is None else f"{self.kind} {self.index}"
        layer = "" if self.layer is None else f"L{self.layer}"
        if self.kind == "feature":
            return (
                f"{layer}F{self.index}"
                if self.feature_type == _TRANSCODER
                else f"{layer} {self.feature_type} {self.index}"
            )
        return f"{layer} {'error' if self.feature_type == _MLP_ERROR else self.feature_type}".strip()

    @classmethod
    def feature(
        cls, layer: int, index: int, position: int, activation: float | None = None, influence: float | None = None
    ) -> GraphNode:
        """Feature ``index`` of a transcoder in a layer, called ``{layer}_{index}_{position}``."""
        return cls(f"{layer}_{index}_{position}", "feature", layer, index, position, "", activation, influence)

    @classmethod
    def error(cls, layer: int, position: int, influence: float | None = None) -> GraphNode:
        """What a transcoder leaves of a layer's MLP, called ``{layer}_-1_{position}``."""
        name = f"{layer}_-1_{position}"
        return cls(name, "error", layer, None, position, influence=influence, feature_type=_MLP_ERROR)

    @classmethod
    def token(cls, token_id: int, position: int, influence: float | None = None) -> GraphNode:
        """The embedding of a token of the prompt, called ``E_{token_id}_{position}``."""
        name = f"E_{token_id}_{position}"
        return cls(name, "token", None, token_id, position, influence=influence, feature_type=_EMBEDDING)

    @classmethod
    def logit(
        cls, layers: int, token_id: int, position: int, text: str, probability: float, *, target: bool = False
    ) -> GraphNode:
        """The logit of a token after ``layers`` layers, called ``{layers + 1}_{token_id}_{position}``.

        Its label is ``Output "text" (p=0.123)``: Neuronpedia's page reads the probability out of it.
        """
        label = f'Output "{text}" (p={probability:.3f})'
        node = cls(f"{layers + 1}_{token_id}_{position}", "logit", layers + 1, token_id, position, label)
        extras = {"is_target_logit": True} if target else {}
        return replace(node, probability=probability, feature_type=_LOGIT, extras=extras)


NOTHING: Json = {}


@final
@dataclass(frozen=True, slots=True)
class GraphLink:
    """The direct effect of one node on another.

    Attributes:
        source: id of the node from which it comes.
        target: id of the node that it changes.
        weight: the change of the target, in its own unit.
        extras: what else the file says of it, unchanged.
    """

    source: str
    target: str
    weight: float
    extras: Json = field(default_factory=lambda: NOTHING, hash=False)


def row_of(node: GraphNode) -> dict[str, Any]:
    """A node as circuit-tracer writes it today."""
    layer, index, at = node.layer, node.index, node.position
    number, page = (None, node.id)
    if node.kind == "feature" and layer is not None and index is not None:
        number, page = cantor_pair(layer, index), f"{layer}_{index}-0"
    elif node.kind == "error":
        number, page = -1, f"{layer}_-1-{at}"
    elif node.kind in ("token", "logit"):
        number, page = (at, f"E_{index}-{at}") if node.kind == "token" else (index, f"L_{index}-{at}")
    return {
        "node_id": node.id,
        "feature": number,
        "layer": "E" if layer is None else str(layer),
        "ctx_idx": at,
        "feature_type": node.feature_type,
        "token_prob": node.probability,
        **_DEFAULTS,
        "jsNodeId": page,
        "clerp": node.label,
        "influence": node.influence,
        "activation": node.activation,
    }


def node_of(row: Any, number: int, newest: bool) -> GraphNode:
    """The node that a row of a file stands for; an error has the id of today.

    Args:
        row: the row.
        number: its place, for errors.
        newest: whether the file is of schema version 1.

    Raises:
        UsageError: it lacks a field, or one is of another type, or they contradict each other.
    """
    where = f"node {number}"
    name, feature_type = (field_of(row, key, str, where) for key in ("node_id", "feature_type"))
    where = f"node {name!r:.60}"
    layer, at = _layer(field_of(row, "layer", (str, int), where), where), field_of(row, "ctx_idx", int, where)
    value = field_of(row, "feature", (int, type(None)), where)
    kind = KINDS.get(feature_type) or _LORSA.get(feature_type, "other")
    if kind == "error" and name == f"0_{layer}_{at}":
        name = f"{layer}_-1_{at}"
    index = _index(kind, name, (layer, at), value, newest)
    numbers = (_number(row.get(key), f"{where}: {key}") for key in ("activation", "influence", "token_prob"))
    activation, influence, probability = numbers
    label = field_of({"clerp": "", **row}, "clerp", (str, type(None)), where) or ""
    node = GraphNode(name, kind, layer, index, at, label, activation, influence, probability or 0.0, feature_type)
    standard = row_of(node)
    extras = {key: row[key] for key in row if key not in _READ and row[key] != standard.get(key, ...)}
    if kind != "feature" and value is not None and value != standard["feature"]:
        extras["feature"] = value
    if kind == "error" and extras.get("jsNodeId") == f"{layer}_{at}-0":  # as a feature of that index is called
        del extras["jsNodeId"]
    return replace(node, extras=extras)


def link_of(row: Any, number: int, names: Mapping[str, str]) -> GraphLink:
    """The link that a row of a file stands for, with new ids for old ones.

    Raises:
        UsageError: it lacks a field, or one is of another type.
    """
    where = f"link {number}"
    source, target = (field_of(row, key, str, where) for key in ("source", "target"))
    weight = _number(field_of(row, "weight", (int, float), where), f"{where}: weight")
    extras = {key: value for key, value in row.items() if key not in ("source", "target", "weight")} or NOTHING
    return GraphLink(names.get(source, source), names.get(target, target), weight or 0.0, extras)


def field_of(row: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """A field of a JSON object.

    Raises:
        UsageError: it is no object, it lacks the field, or the field is of another type.
    """
    if not isinstance(row, dict):
        wrong(f"{where} is {type(row).__name__}", "a JSON object")
    if key not in row:
        wrong(f"{where} has no {key!r}", "every field of the form")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, kinds):
        wrong(f"{where}: {key} is {value!r:.60}", f"a value of type {getattr(kinds, '__name__', kinds)}")
    return value


def wrong(
    what: str, expected: str, do: str = "correct it, or write it again with the program that made it"
) -> NoReturn:
    """Refuse something.

    Raises:
        UsageError: always.
    """
    raise UsageError(what, expected=expected, do=do)


def _layer(layer: str | int, where: str) -> int | None:
    text = str(layer)
    if text == "E":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        wrong(f"{where}: layer is {layer!r:.60}", "a number, or 'E' for embeddings")
    return int(text)


def _index(kind: NodeKind, name: str, place: tuple[int | None, int], value: int | None, newest: bool) -> int | None:
    """The index of a node: of a feature as its id and its number agree; of a token or logit the vocabulary id."""
    layer, at = place
    match = _ID.fullmatch(name)
    named = None
    if match is not None and int(match[3]) == at and match[1] == ("E" if layer is None else str(layer)):
        named = int(match[2])
    if kind == "logit":
        return named if value is None else value
    if kind != "feature":
        return named if kind == "token" else None
    if layer is None or layer < 0 or (value is not None and value < 0):
        wrong(f"feature {name!r:.60} has layer {layer} and number {value}", "a layer and a number from 0")
    if named is not None:
        if value is None or _means(value, layer, named):
            return named
    elif value is not None and not newest:
        return value % 10**5 if str(value)[:-5] == str(layer) else value
    elif value is not None and cantor_unpair(value)[0] == layer:
        return cantor_unpair(value)[1]
    wrong(f"feature {name!r:.60} of layer {layer} has the number {value}", "the Cantor number of its layer and index")


def _means(value: int, layer: int, index: int) -> bool:
    """Whether a number may stand for a feature.

    By Cantor, also where JavaScript has rounded it; before schema version 1 also the index alone, or the layer and five
    digits of the index.
    """
    number = cantor_pair(layer, index)
    return value in (index, int(f"{layer}{index:05d}")) or abs(value - number) <= number >> _EXACT


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong(f"{where} is {value!r:.60}", "a number or null")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # refused with all that is not finite
