"""Pages of the documentation whose Python is run as it stands."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run_blocks(page: Path, text: str | None = None, *, checks: str | None = None, outputs: bool = True) -> int:
    """Run a page's blocks in order in one namespace, lines numbered as in the page; how many there were.

    A block of text that follows is what the block prints, unless ``outputs`` is False. What else holds is checked after
    it by the block of the same number in ``checks/`` beside the tests of the pages, where there is one. ``text`` and
    ``checks`` are put in place of what the files hold.
    """
    text = page.read_text(encoding="utf-8") if text is None else text
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = list(_BLOCK.finditer(text))
    statements = _checks(page.stem, checks)
    assert set(statements) <= set(range(1, len(blocks) + 1)), "a check without its block"
    for number, block in enumerate(blocks, 1):
        above = text.count("\n", 0, block.start(1))
        with redirect_stdout(StringIO()) as printed:
            exec(compile("\n" * above + block[1], str(page), "exec"), names)
        if outputs and block[2] is not None:
            assert printed.getvalue() == block[2], f"what block {number} of {page.name} prints"
        exec(statements.get(number, ""), names)
    return len(blocks)


def checks_of(name: str) -> Path:
    """The file of statements that hold after the blocks of a page."""
    return Path(__file__).parent / "docs" / "checks" / f"{name}.py"


def _checks(name: str, text: str | None) -> dict[int, Any]:
    """Statements to run after each block of a page, by the number of the block, lines numbered as in their file."""
    path = checks_of(name)
    if text is None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    start, *parts = re.split(r"^# after block (\d+)\n", text, flags=re.MULTILINE)
    assert not start.strip(), f"{path.name} begins with another line than '# after block N'"
    statements: dict[int, Any] = {}
    line = start.count("\n")
    for number, code in zip(map(int, parts[::2]), parts[1::2], strict=True):
        assert number not in statements, f"{path.name} names a block twice"
        statements[number] = compile("\n" * (line + 1) + code, str(path), "exec")
        line += 1 + code.count("\n")
    return statements
