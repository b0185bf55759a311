"""The report: the explorer and its documents in one HTML file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from virtual_weights.atlas import Atlas
from virtual_weights.errors import writing
from virtual_weights.record import Record
from virtual_weights.record.durable import replacing
from virtual_weights.report.against import against as comparison
from virtual_weights.report.documents import documents, write_documents
from virtual_weights.report.format import FOLDER
from virtual_weights.survey.plan import shown_of

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
<div id="page"><noscript>This report is drawn by the script inside this file; please allow scripts.</noscript></div>
<script id="documents" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def report(
    atlas: Atlas, path: str | Path | None = None, *, records: Sequence[Record] = (), against: Atlas | None = None
) -> Path:
    """Write the report of an atlas: the explorer in one HTML file.

    Args:
        atlas: the atlas.
        path: the file, replaced whole; by default ``report.html`` in the folder of the atlas, and with it what
            ``vweights serve`` shows, in its folder ``explorer``.
        records: answers that are shown rather than others which the atlas holds to the same questions, such as those
            under another convention.
        against: another atlas, of this model or of another, with whose pairs these are compared.

    Returns:
        The path.

    Example:
        >>> vw.report(vw.Atlas.open("atlas"))  # doctest: +SKIP
    """
    answers = shown_of(atlas, records)
    compared = None if against is None else comparison(answers, atlas.manifest, against)
    shown = documents(answers, atlas.manifest, compared)
    file = atlas.path / "report.html" if path is None else Path(path)
    with writing(file):
        with replacing(file) as aside:
            aside.write_text(page(shown), encoding="utf-8")
        if path is None:
            write_documents(atlas.path / FOLDER, shown)
    return file


def page(shown: Mapping[str, Any]) -> str:
    """The explorer with its documents inside; its policy allows this style and this script, and no request at all."""
    static = files("virtual_weights.report") / "static"
    style, script = ((static / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return _PAGE.format(
        title=html.escape(f"virtual weights of {shown['map']['model']}"),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'",
        data=_embedded(shown),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever names a checkpoint carries."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
