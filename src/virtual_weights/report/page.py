"""One self-contained HTML file: data, style and script inside, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from virtual_weights.record import Record
from virtual_weights.report.payload import payload

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
<main id="page"><noscript>This report draws itself with the script inside this file; please allow it.</noscript></main>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def write_report(path: Path, records: Iterable[Record], manifest: Mapping[str, Any]) -> None:
    """Write the report of a model.

    Args:
        path: the file, replaced whole.
        records: any Records; see ``payload`` for what becomes of them.
        manifest: the model's name, sizes, components and provenance.
    """
    text = page(payload(records, manifest))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
