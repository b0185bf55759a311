"""Attribution graphs of a prompt, in the JSON that circuit-tracer and Neuronpedia read and write."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, final

import torch

from virtual_weights.errors import RecordError, UnsafeCheckpointError, UsageError
from virtual_weights.record.axes import Axis, Column
from virtual_weights.record.durable import reading, replacing
from virtual_weights.record.feature_labels import FeatureLabels
from virtual_weights.record.graph_node import (
    KINDS,
    GraphLink,
    GraphNode,
    Json,
    field_of,
    link_of,
    node_of,
    row_of,
    wrong,
)
from virtual_weights.record.record import Record

Style = Literal["circuit-tracer", "neuronpedia"]
STYLES: tuple[Style, ...] = ("circuit-tracer", "neuronpedia")
SCHEMA = 1  # version of the form, in which `feature` is a Cantor number
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
_EXPECTED = "the JSON of circuit-tracer or Neuronpedia: metadata, qParams, nodes and links"
_VIEW: Json = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}


@final
@dataclass(frozen=True, repr=False)
class AttributionGraph:
    """An attribution graph: what happens on a prompt, and what changes what.

    Attributes:
        metadata: ``slug``, ``scan``, ``prompt_tokens``, ``prompt`` and whatever else the file says.
        nodes: the nodes.
        links: the links.
        view: the state of the page, such as pinned nodes; ``qParams`` in the files.
        extras: further parts of the file, unchanged, such as ``qk_only_nodes``.

    Raises:
        UsageError: metadata lack a field, two nodes share an id, a link ends nowhere, or a number is not finite.
    """

    metadata: Json
    nodes: tuple[GraphNode, ...]
    links: tuple[GraphLink, ...]
    view: Json = field(default_factory=dict[str, Any])
    extras: Json = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for name, kind in {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}.items():
            field_of(self.metadata, name, kind, "metadata")
        if {type(token) for token in self.metadata["prompt_tokens"]} - {str}:
            wrong("metadata.prompt_tokens are not all text", "a list of texts")
        count = Counter(node.id for node in self.nodes)
        if len(count) < len(self.nodes):
            name = next(name for name, n in count.items() if n > 1)
            _twice(name, [node.feature_type for node in self.nodes if node.id == name])
        for node in self.nodes:
            numbers = (node.activation, node.influence, node.probability)
            if not all(number is None or math.isfinite(number) for number in numbers) or node.position < 0:
                wrong(f"node {node.id!r} has a number that is not finite, or a negative position", "finite numbers")
        for link in self.links:
            if link.source not in count or link.target not in count:
                name = link.target if link.source in count else link.source
                wrong(f"a link {link.source!r} to {link.target!r}, but no node {name!r}", "links between nodes")
            if not math.isfinite(link.weight):
                wrong(f"the link {link.source!r} to {link.target!r} weighs {link.weight}", "a finite weight")

    def __repr__(self) -> str:
        slug = f"{self.metadata['slug']!r:.60}"
        return f"AttributionGraph {slug}: {len(self.nodes)} nodes, {len(self.links)} links, {len(self.tokens)} tokens"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the prompt, as text."""
        return tuple(self.metadata["prompt_tokens"])

    @classmethod
    def of(
        cls,
        tokens: Sequence[str],
        nodes: Iterable[GraphNode],
        links: Iterable[tuple[GraphNode | str, GraphNode | str, float]],
        metadata: Json | None = None,
    ) -> AttributionGraph:
        """A graph of values in memory.

        Args:
            tokens: the tokens of the prompt, as text.
            nodes: made by ``GraphNode.feature``, ``error``, ``token`` and ``logit``.
            links: source, target and weight; ends are nodes or their ids.
            metadata: ``slug`` (the graph's name), ``scan`` (the model, as Neuronpedia calls it), ``prompt``, others.

        Raises:
            UsageError: two nodes share an id, a link ends nowhere, or a number is not finite.

        Example:
            >>> cat, feature = GraphNode.token(464, 0), GraphNode.feature(2, 123, 0, activation=1.5)
            >>> AttributionGraph.of([" cat"], [cat, feature], [(cat, feature, 0.7)])
            AttributionGraph 'graph': 2 nodes, 1 links, 1 tokens
        """
        about: dict[str, Any] = {"slug": "graph", "scan": "", "prompt": "".join(tokens), "prompt_tokens": list(tokens)}
        ends = ((*(end if isinstance(end, str) else end.id for end in link[:2]), float(link[2])) for link in links)
        between = tuple(GraphLink(source, target, weight) for source, target, weight in ends)
        return cls(_newest({**about, **(metadata or {})}), tuple(nodes), between, _VIEW)

    @classmethod
    def load(cls, path: str | Path) -> AttributionGraph:
        """A graph from a JSON file of circuit-tracer, of any version, or of Neuronpedia.

        Errors that are called ``0_{layer}_{position}``, as before circuit-tracer 0.5.1, get the ids of today, wherever
        they are named. What a node is, its ``feature_type`` says, never its id.

        Raises:
            UnsafeCheckpointError: the file is a pickle, as ``Graph.to_pt`` writes it.
            RecordError: there is no such file, or it is not such a graph.
        """
        path = Path(path).expanduser()
        try:
            with reading(path) as file:
                raw = file.read()
            if path.suffix.lower() in _PICKLES or raw[:1] == b"\x80" or raw[:4] == b"PK\x03\x04":
                raise UnsafeCheckpointError(
                    f"{path} is a pickle, which can run any code when it is opened",
                    expected=_EXPECTED,
                    do="write it as JSON where you trust it: circuit_tracer.utils.create_graph_files",
                )
            return _graph(json.loads(raw, parse_constant=_no_constant))
        except OSError as error:
            raise RecordError(
                f"{path} cannot be read: {error.strerror or error}", expected=_EXPECTED, do="check the path"
            ) from error
        except UsageError as error:
            raise RecordError(f"{path}: {error.what}", expected=error.expected, do=error.do) from error
        except (ValueError, RecursionError) as error:
            what = f"{path} is not JSON: {error}"
            raise RecordError(what, expected=_EXPECTED, do="write it again with the program that made it") from error

    def save(self, path: str | Path, style: Style = "circuit-tracer") -> None:
        """Write it as JSON of schema version 1, from which ``load`` makes an equal graph.

        Args:
            path: the file; an existing one is replaced, whole or not at all.
            style: ``"circuit-tracer"`` has every field that its classes demand, and only its four types of nodes;
                ``"neuronpedia"`` takes any, and leaves out a ``node_threshold`` that is not set, as its schema wants.

        Raises:
            UsageError: there is no such style, the style has no such nodes, or something is not plain JSON.
            ResourceError: the disk is full.
        """
        if style not in STYLES:
            wrong(f"style {style!r}", f"one of {', '.join(STYLES)}", "name one of them")
        foreign = sorted({node.feature_type for node in self.nodes} - KINDS.keys())
        if foreign and style == "circuit-tracer":
            wrong(
                f"circuit-tracer has no nodes {', '.join(map(repr, foreign))}", "its four types", "style='neuronpedia'"
            )
        optional = {"node_threshold": None} if style == "circuit-tracer" else {}
        content = {
            "metadata": {**optional, **self.metadata},
            "qParams": self.view,
            "nodes": [{**row_of(node), **node.extras} for node in self.nodes],
            "links": [{"source": k.source, "target": k.target, "weight": k.weight, **k.extras} for k in self.links],
            **self.extras,
        }
        try:
            text = json.dumps(content, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            wrong(f"the graph cannot be written as JSON: {error}", "finite numbers, text, lists and objects")
        with replacing(Path(path)) as aside:
            aside.write_text(text, encoding="ascii")

    def labelled(self, labels: FeatureLabels) -> AttributionGraph:
        """The same graph with the labels of features replaced, where there are others.

        A dictionary with ``lorsa`` in its name labels attention's features, any other those of transcoders.

        Raises:
            UsageError: several dictionaries of a layer have labels.
        """
        texts = {attention: labels.of_layers(attention) for attention in (False, True)}

        def labelled(node: GraphNode) -> GraphNode:
            if node.kind != "feature" or node.layer is None or node.index is None:
                return node
            label = texts[node.feature_type not in KINDS].get((node.layer, node.index))
            return node if label is None else replace(node, label=label)

        return replace(self, nodes=tuple(map(labelled, self.nodes)))

    def records(self) -> tuple[Record, Record]:
        """The nodes and the links as tables; the links' ``size`` is the absolute weight, to sort by."""
        texts = dict(enumerate(map(_encodable, self.tokens)))
        about: dict[str, Any] = {name: self.metadata[name] for name in ("slug", "scan", "prompt")}
        columns = {
            "name": ([_encodable(node.name) for node in self.nodes], "L8F123: feature 123 of layer 8"),
            "kind": ([node.kind for node in self.nodes], "feature, error, token, logit or other"),
            "layer": ([node.layer for node in self.nodes], "of a logit beyond the last"),
            "feature": ([node.index for node in self.nodes], "index of the feature, or vocabulary id"),
            "position": ([node.position for node in self.nodes], "in the prompt, from 0"),
            "token": ([texts.get(node.position, "") for node in self.nodes], "of the prompt at this position"),
            "label": ([_encodable(node.label) for node in self.nodes], "somebody's text about it"),
            "activation": ([node.activation for node in self.nodes], "of a feature"),
            "influence": ([node.influence for node in self.nodes], "cumulative share: small is strong"),
        }
        described = tuple(Column(name, tuple(values), "", about_) for name, (values, about_) in columns.items())
        nodes = Record("graph_nodes", (Axis("node", tuple(_encodable(n.id) for n in self.nodes)),), described, about)
        place = {node.id: i for i, node in enumerate(self.nodes)}
        weight = torch.tensor([link.weight for link in self.links], dtype=torch.float64)
        ends = {side: [getattr(link, side) for link in self.links] for side in ("source", "target")}
        described = (
            Column("weight", weight, "of the target", "direct effect of the source on the target"),
            Column("size", weight.abs(), "of the target", "absolute weight"),
            *(Column(side, tuple(map(_encodable, ids)), "", f"id of the {side}") for side, ids in ends.items()),
            *(
                Column(f"{side}_{name}", tuple(columns[name][0][place[i]] for i in ids), "", columns[name][1])
                for name in ("name", "position", "label")
                for side, ids in ends.items()
            ),
        )
        axis = Axis("link", tuple(str(i + 1) for i in range(len(self.links))))
        return nodes, Record("graph_links", (axis,), described, about)


def _graph(content: Any) -> AttributionGraph:
    """The graph of a file's content."""
    metadata, view = (field_of(content, name, dict, "the file") for name in ("metadata", "qParams"))
    rows, links = (field_of(content, name, list, "the file") for name in ("nodes", "links"))
    version = metadata.get("schema_version")
    if version not in (None, 0, SCHEMA):
        wrong(f"schema_version {version!r:.40}", f"at most {SCHEMA}", "convert it with the program that made it")
    nodes = tuple(node_of(row, number, version == SCHEMA) for number, row in enumerate(rows))
    count = Counter(row["node_id"] for row in rows)
    names = {row["node_id"]: node.id for row, node in zip(rows, nodes, strict=True) if row["node_id"] != node.id}
    for name in names:
        if count[name] > 1:
            _twice(name, [row["feature_type"] for row in rows if row["node_id"] == name])
    between = tuple(link_of(row, number, names) for number, row in enumerate(links))
    extras = {name: value for name, value in content.items() if name not in ("metadata", "qParams", "nodes", "links")}
    return AttributionGraph(_newest(metadata), nodes, between, _renamed(view, names) if names else view, extras)


def _newest(metadata: Json) -> Json:
    """Metadata of schema version 1; a threshold that is null is none."""
    about = {"transcoder_list": [], **metadata, "schema_version": SCHEMA}
    return {name: value for name, value in about.items() if (name, value) != ("node_threshold", None)}


def _renamed(view: Json, names: Mapping[str, str]) -> Json:
    """The state of the page with new ids for old ones; the first item of a supernode is its label."""

    def ids(value: Any) -> Any:
        if isinstance(value, list):
            return [ids(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    changed = {name: ids(view[name]) for name in ("pinnedIds", "clickedId") if name in view}
    groups: Any = view.get("supernodes")
    if isinstance(groups, list):
        changed["supernodes"] = [group[:1] + ids(group[1:]) if isinstance(group, list) else group for group in groups]
    return {**view, **changed}


def _twice(name: str, types: list[str]) -> NoReturn:
    wrong(
        f"two nodes are called {name!r:.60}: {' and '.join(map(repr, types))}",
        "one id a node",
        "write it again with circuit-tracer 0.5.1 or later, whose errors have ids of their own",
    )


def _encodable(text: str) -> str:
    """A text that UTF-8 can hold: half a pair of surrogates, which JSON allows, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, which is not a number of JSON")
