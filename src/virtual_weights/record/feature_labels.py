"""Labels of dictionary features, which somebody or some model has written down: from CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn, final

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record.durable import reading

Key = tuple[str, int]
_FEATURE = re.compile(r"(.+):F(\d{1,18})", re.DOTALL)
_LAYER = re.compile(r"(\d{1,5})(?:-.*)?|[A-Za-z]+(\d{1,5})[a-z]?", re.DOTALL)
_TEXTS = ("label", "description")
_EXPECTED = (
    "CSV with the columns feature,label or layer,feature,label; a JSON object of labels by feature name; or a list or "
    "lines of JSON objects with layer, index and description"
)


@final
@dataclass(frozen=True)
class FeatureLabels:
    """What features are said to stand for.

    A label is somebody's text about a feature: it is kept as it is, may hold anything, HTML too, and proves nothing.

    Attributes:
        texts: labels by the name of the dictionary and the index of the feature.
    """

    texts: Mapping[Key, str]

    def __repr__(self) -> str:
        return f"FeatureLabels of {len(self.texts)} features in {len({name for name, _ in self.texts})} dictionaries"

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return (f"{name}:F{index}" for name, index in self.texts)

    def __contains__(self, feature: object) -> bool:
        return isinstance(feature, str) and self.get(feature) is not None

    def __getitem__(self, feature: str) -> str:
        """The label of a feature, by its name such as ``"tc8:F123"``.

        Raises:
            UsageError: it has none.
        """
        label = self.get(feature)
        if label is None:
            raise UsageError(
                f"no label of {feature!r}",
                expected=f"one of {len(self)} features, such as {next(iter(self), 'none')!r}",
                do="name a feature as tc8:F123, or ask labels.get, which gives None",
            )
        return label

    def get(self, feature: str) -> str | None:
        """The label of a feature, by its name; None where it has none."""
        match = _FEATURE.fullmatch(feature)
        return None if match is None else self.texts.get((match[1], int(match[2])))

    def at(self, layer: int, index: int, attention: bool = False) -> str | None:
        """The label of a feature by layer and index; None where it has none. For many, ask ``of_layers`` once.

        Raises:
            UsageError: several dictionaries label the same layer and index.
        """
        return self.of_layers(attention).get((layer, index))

    def of_layers(self, attention: bool = False) -> dict[tuple[int, int], str]:
        """All labels by layer and index.

        The layer of a dictionary is the number in its name: ``tc8``, ``8``, ``8-res-jb``. Others have no place here.

        Args:
            attention: those of attention's features, dictionaries with ``lorsa`` in their name, instead of all others.

        Raises:
            UsageError: several dictionaries label the same layer and index.
        """
        labels: dict[tuple[int, int], str] = {}
        owner: dict[tuple[int, int], str] = {}
        for (name, index), text in self.texts.items():
            match = _LAYER.fullmatch(name)
            if match is None or ("lorsa" in name.lower()) is not attention:
                continue
            place = int(match[1] or match[2]), index
            if place in labels:
                raise UsageError(
                    f"feature {index} of layer {place[0]} has labels in {owner[place]} and {name}",
                    expected="one dictionary a layer",
                    do="keep the labels of one of them in the file, or look them up by name: labels['tc8:F123']",
                )
            labels[place], owner[place] = text, name
        return labels

    @classmethod
    def load(cls, path: str | Path, names: Mapping[str | int, str] | None = None) -> FeatureLabels:
        """Labels from a file.

        Args:
            path: CSV, ``feature,label`` with features such as ``tc8:F123`` or ``layer,feature,label`` with numbers; a
                JSON object ``{"tc8:F123": label}`` or ``{layer: {index: label}}``; a JSON list or JSON lines of
                objects, as Neuronpedia exports them: ``{"layer": "8-res-jb", "index": "123", "description": label}``.
            names: what a layer of the file is called here, ``{"8-res-jb": "tc8"}`` or ``{8: "tc8"}``. What is not named
                keeps the file's word: ``8-res-jb:F123``, ``8:F123``.

        A feature whose label is empty has none.

        Raises:
            RecordError: there is no such file, a row is malformed, or a feature has two labels.
        """
        path = Path(path).expanduser()
        try:
            with reading(path) as file:
                text = file.read().decode("utf-8-sig")
            rows = list(_rows(text, path.suffix.lower()))
        except OSError as error:
            raise RecordError(
                f"{path} cannot be read: {error.strerror or error}", expected="a file of labels", do="check the path"
            ) from error
        except (ValueError, RecursionError, csv.Error) as error:
            raise RecordError(
                f"{path} is not a file of labels: {error}", expected=_EXPECTED, do="correct it, or export it again"
            ) from error
        called = {str(key): name for key, name in (names or {}).items()}
        texts: dict[Key, str] = {}
        for where, (name, index), label in rows:
            key = called.get(name, name), index
            if key in texts:
                raise RecordError(
                    f"{path}, {where}: {key[0]}:F{index} has a label already",
                    expected="one label a feature",
                    do="keep one; of an export with several explanations, those of one explanationModelName",
                )
            if label:
                texts[key] = label
        return cls(texts)


def _rows(text: str, suffix: str) -> Iterator[tuple[str, Key, str]]:
    """Where every label stands in the file, of which feature it is, and the label."""
    if suffix == ".csv":
        yield from _csv_rows(text)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _line_rows(text)
    elif suffix == ".json":
        yield from _json_rows(json.loads(text, object_pairs_hook=_once))
    else:
        raise ValueError(f"its name ends with {suffix!r}, not with .csv, .json or .jsonl")


def _csv_rows(text: str) -> Iterator[tuple[str, Key, str]]:
    table = csv.reader(StringIO(text, newline=""), strict=True)
    head = [cell.strip() for cell in next(table, [])]
    if sorted(head) not in (["feature", "label"], ["feature", "label", "layer"]):
        raise ValueError(f"its first line is {','.join(head)!r:.100}")
    for cells in table:
        where = f"line {table.line_num}"
        if len(cells) != len(head):
            if cells:
                _malformed(where, f"{len(cells)} cells under {len(head)} heads")
            continue
        row = dict(zip(head, cells, strict=True))
        yield where, _key(row, where), row["label"]


def _line_rows(text: str) -> Iterator[tuple[str, Key, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except ValueError as error:
                _malformed(where, str(error))
            yield where, _key(row, where), _label(row, where)


def _json_rows(content: Any) -> Iterator[tuple[str, Key, str]]:
    if isinstance(content, list):
        for number, row in enumerate(content, 1):
            where = f"row {number}"
            yield where, _key(row, where), _label(row, where)
        return
    if not isinstance(content, dict):
        raise ValueError("it holds neither an object nor a list")
    for name, value in content.items():
        if isinstance(value, dict):
            for index, label in value.items():
                row = {"layer": name, "index": index, "label": label}
                yield f"{name} {index}", _key(row, f"{name} {index}"), _label(row, f"{name} {index}")
        else:
            row = {"feature": name, "label": value}
            yield name, _key(row, name), _label(row, name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no key stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _key(row: Any, where: str) -> Key:
    """The feature of a row: by name, or by layer and index."""
    if not isinstance(row, dict):
        _malformed(where, f"{type(row).__name__} instead of an object")
    if row.get("layer") is None:
        match = _FEATURE.fullmatch(str(row.get("feature", "")))
        if match is None:
            _malformed(where, f"no feature such as 'tc8:F123', but {row.get('feature')!r:.100}")
        return match[1], int(match[2])
    index = row.get("index", row.get("feature"))
    number = str(index).strip()
    if not (number.isascii() and number.isdecimal() and len(number) <= 18):
        _malformed(where, f"the index is {index!r:.100}, not a whole number")
    layer = row["layer"]
    name = str(layer).strip()
    if isinstance(layer, bool) or not isinstance(layer, str | int) or not name:
        _malformed(where, f"the layer is {layer!r:.100}")
    return name, int(number)


def _label(row: Mapping[str, Any], where: str) -> str:
    """The label of a row; empty where it is null."""
    names = [name for name in _TEXTS if name in row]
    label = row[names[0]] if names else 0
    if label is not None and not isinstance(label, str):
        _malformed(where, f"the label is {label!r:.100}, not text" if names else "neither a label nor a description")
    return label or ""


def _malformed(where: str, what: str) -> NoReturn:
    raise ValueError(f"{where}: {what}")
