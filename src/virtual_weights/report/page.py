"""The report: what it shows, picked from Records as plain JSON, in one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from virtual_weights.atlas import Atlas
from virtual_weights.errors import writing
from virtual_weights.record import Record
from virtual_weights.record.durable import replacing
from virtual_weights.report.documents import write_documents
from virtual_weights.report.evidence import evidence
from virtual_weights.report.format import FOLDER
from virtual_weights.report.tables import EDGES_PER_PORT, density, drawn, plain, statements, strongest, table
from virtual_weights.survey.plan import shown_of

MOST_LISTED = 200
_ERASURES = ("alignment", "z", "erasure")
_TABLES = ("bandwidth", "head_erasers", "channel", "labels")
_BESIDE = ("contribution", "attribution", "channel_tokens", "offset_profile")
"""Of the first two the page shows what they say of the leading edges; the last two are the explorer's."""


def payload(records: Iterable[Record], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page needs.

    Args:
        records: any Records. A question that the page knows gets a section of its own; of the others a table of at most
            ``MOST_LISTED`` rows is kept as it is, and of anything larger the name and the size.
        manifest: the model's name, sizes, components and provenance.

    Returns:
        A JSON-able dictionary: ``model``; ``maps`` (quantised matrices by question, port and kind of writer), ``edges``
        (the strongest of every port) and ``stamps`` (of every port); ``bandwidth``, ``head_erasers``, ``channel``,
        ``labels``, ``erasure``, ``neurons`` and ``statements`` (lists, one entry a record); ``evidence``, see there;
        ``others`` and ``too_large``.
    """
    records = list(records)
    sections: dict[str, Any] = {"model": dict(manifest), "maps": [], "edges": [], "stamps": {}}
    sections |= {name: [] for name in (*_TABLES, "erasure", "neurons", "statements", "others", "too_large")}
    for record in records:
        _pick(record, sections)
    return sections | {"evidence": evidence(records)}


def _pick(record: Record, sections: dict[str, Any]) -> None:
    question = record.question
    if question in ("composition", "overlap"):
        maps, edges = drawn(record)
        sections["maps"] += maps
        sections["edges"] += edges
        if question == "composition":
            sections["stamps"][str(record.parameters["port"])] = plain(dict(record.stamp))
    elif question in _TABLES:
        sections[question].append(table(record))
    elif question == "erasure":
        sections[question].append(strongest(record, _ERASURES, EDGES_PER_PORT))
    elif question == "neurons":
        sections[question].append(density(record))
    elif question == "statements":
        sections[question].append(statements(record))
    elif question in _BESIDE:
        return
    elif len(record.axes) == 1 and record.size <= MOST_LISTED:
        sections["others"].append(table(record))
    else:
        sections["too_large"].append({"question": question, "axes": {a.name: len(a.labels) for a in record.axes}})


_SCRIPTS = (
    "draw",
    "labels",
    "spine",
    "evidence",
    "statements",
    "pairs",
    "ledger",
    "memory",
    "report",
)  # one script in this order
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="page"><noscript>This report is drawn by the script inside this file; please allow scripts.</noscript></main>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def report(atlas: Atlas, path: str | Path | None = None, *, records: Sequence[Record] = ()) -> Path:
    """Write the report of everything that an atlas holds.

    Args:
        atlas: the atlas.
        path: the file, replaced whole; by default ``report.html`` in the folder of the atlas, and with it what the
            explorer shows (``vweights serve``), in its folder ``explorer``.
        records: answers that are shown rather than others which the atlas holds to the same questions, such as those
            under another convention.

    Returns:
        The path.

    Example:
        >>> vw.report(vw.Atlas.open("atlas"))  # doctest: +SKIP
    """
    shown = shown_of(atlas, records)
    file = atlas.path / "report.html" if path is None else Path(path)
    with writing(file):
        write_report(file, shown, atlas.manifest)
        if path is None:
            write_documents(atlas.path / FOLDER, shown, atlas.manifest)
    return file


def write_report(path: Path, records: Iterable[Record], manifest: Mapping[str, Any]) -> None:
    """Write the report of a model.

    Args:
        path: the file, replaced whole.
        records: any Records; see ``payload`` for what becomes of them.
        manifest: the model's name, sizes, components and provenance.
    """
    with replacing(path) as aside:
        aside.write_text(page(payload(records, manifest)), encoding="utf-8")


def page(data: Mapping[str, Any]) -> str:
    """The HTML text; a content security policy allows this style and this script, and no request at all."""
    static = files("virtual_weights.report") / "static"
    style = (static / "report.css").read_text(encoding="utf-8")
    script = "\n".join((static / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return _PAGE.format(
        title=html.escape(f"virtual weights of {data['model']['model']}"),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'",
        data=_embedded(data),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever names a checkpoint carries."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
