"""Pages of the documentation whose Python is run as it stands."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run_blocks(page: Path, text: str | None = None, *, outputs: bool = True) -> int:
    """Run a page's blocks in order in one namespace, lines numbered as in the page; how many there were.

    A block of text that follows is what the block prints, unless ``outputs`` is False. What else holds is checked after
    it by the block of the same number in ``checks/`` beside the tests of the pages, where there is one.
    """
    text = page.read_text(encoding="utf-8") if text is None else text
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = list(_BLOCK.finditer(text))
    checks = _checks(page.stem)
    assert set(checks) <= set(range(1, len(blocks) + 1)), "a check without its block"
    for number, block in enumerate(blocks, 1):
        above = text.count("\n", 0, block.start(1))
        with redirect_stdout(StringIO()) as printed:
            exec(compile("\n" * above + block[1], str(page), "exec"), names)
        if outputs and block[2] is not None:
            assert printed.getvalue() == block[2], f"what block {number} of {page.name} prints"
        exec(checks.get(number, ""), names)
    return len(blocks)


def _checks(name: str) -> dict[int, Any]:
    """Statements to run after each block of a page, by the number of the block."""
    path = Path(__file__).parent / "docs" / "checks" / f"{name}.py"
    if not path.exists():
        return {}
    parts = re.split(r"^# after block (\d+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not parts[0].strip(), f"{path.name} begins with another line than '# after block N'"
    assert len(set(parts[1::2])) == len(parts[1::2]), f"{path.name} names a block twice"
    return {
        int(number): compile(code, str(path), "exec") for number, code in zip(parts[1::2], parts[2::2], strict=True)
    }
