"""What a report's page holds once its script has run in node and every button was pressed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def drawn_by_node(path: Path) -> dict[str, Any]:
    """Sections, texts and marks of the page, as told by ``golden/page_dom.cjs``."""
    script = Path(__file__).parent / "golden" / "page_dom.cjs"
    process = subprocess.run(["node", str(script), str(path)], check=True, capture_output=True, text=True)
    return json.loads(process.stdout)
