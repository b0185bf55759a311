"""Pages of the documentation whose Python is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(page: Path, text: str | None = None) -> int:
    """Run a page's blocks in order in one namespace, lines numbered as in the page; how many there were."""
    text = page.read_text(encoding="utf-8") if text is None else text
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = list(_BLOCK.finditer(text))
    for block in blocks:
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(page), "exec"), names)
    return len(blocks)
