"""The flat YAML of small settings files: scalars and lists of scalars under the keys of one mapping, nothing else."""

from __future__ import annotations

import re
from typing import Any

from virtual_weights.checkpoint.dictionaries.tables import malformed

_KEY = re.compile(r"([A-Za-z_][\w.-]*):(?:[ \t]+(.*))?")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}


def parse_flat_yaml(text: str, where: str) -> dict[str, Any]:
    r"""Parse ``key: scalar``, ``key: [scalar, ...]`` and ``key:`` followed by lines ``- scalar``.

    Args:
        text: the file.
        where: its path, for messages.

    Raises:
        MalformedCheckpointError: a line is anything else, such as a nested mapping, an anchor or a block of text.

    Example:
        >>> parse_flat_yaml("kind: set  # a comment\nfiles:\n- a\n- 'b'\nk: 3\n", "config.yaml")
        {'kind': 'set', 'files': ['a', 'b'], 'k': 3}
    """
    result: dict[str, Any] = {}
    key = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = _without_comment(line).rstrip()
        if not stripped.strip() or (number == 1 and stripped == "---"):
            continue
        if key and re.match(r" *- ", stripped + " ") and (result[key] is None or isinstance(result[key], list)):
            result[key] = [*(result[key] or []), _scalar(stripped.strip()[1:].strip(), where, number)]
            continue
        match = _KEY.fullmatch(stripped)
        if match is None or match[1] in result:
            raise _not_understood(where, number, line)
        key = match[1]
        value = (match[2] or "").strip()
        if value.startswith("[") and value.endswith("]"):
            items = [item.strip() for item in value[1:-1].split(",") if item.strip()]
            result[key] = [_scalar(item, where, number) for item in items]
        else:
            result[key] = _scalar(value, where, number)
    return result


def _without_comment(line: str) -> str:
    """A line up to a ``#`` that stands outside quotes at its begin or behind a space."""
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1] in " \t"):
            return line[:index]
    return line


def _scalar(text: str, where: str, number: int) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text[0] in "'\"":
        if len(text) < 2 or text[-1] != text[0] or text[0] in text[1:-1] or "\\" in text:
            raise _not_understood(where, number, text)
        return text[1:-1]
    if (
        text.lower() in ("yes", "no", "on", "off")
        or text[0] in "[]{}&*!|>@`%,?"
        or ": " in text
        or text.startswith("- ")
    ):
        raise _not_understood(where, number, text)
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _not_understood(where: str, number: int, line: str) -> Exception:
    return malformed(
        where,
        f"line {number} is {line.strip()!r:.200}",
        "one level of keys with scalars or lists of scalars, every key once",
        "write the settings in that form",
    )
