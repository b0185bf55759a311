"""Reading JSON that a stranger wrote: bounded in size, items and depth, no key twice."""

from __future__ import annotations

import json
from typing import Any

from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.errors import MalformedCheckpointError

MAX_DEPTH = 64
MAX_ITEMS = 4_000_000


def read_json_object(file: PinnedFile, limit: int) -> dict[str, Any]:
    """Read a whole file that holds one JSON object of at most ``limit`` bytes.

    Raises:
        MalformedCheckpointError: too large, not JSON, a key twice, nested too deeply, not an object.
    """
    if file.size > limit:
        raise MalformedCheckpointError(
            f"{str(file.path)!r} has {file.size:,} bytes",
            expected=f"at most {limit:,} bytes of JSON",
            do="check that this is the file it should be",
        )
    return parse_json_object(file.read(0, file.size), str(file.path))


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; ``where`` names it in errors.

    Raises:
        MalformedCheckpointError: not JSON, a key twice, nested too deeply, too many items, not an object.
    """
    # every item but the first of its container follows a comma, so this bounds the memory before it is taken
    if raw.count(b",") > MAX_ITEMS:
        raise _malformed(f"{where!r} has more than {MAX_ITEMS:,} items", "the sizes of a real model")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise _malformed(f"{where!r} has the key {error.args[0]!r:.200} twice", "every key once") from error
    except RecursionError as error:
        raise _malformed(f"the JSON of {where!r} is nested too deeply", f"at most {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise _malformed(f"{where!r} is not JSON: {error!s:.200}", "valid JSON in UTF-8") from error
    if not isinstance(value, dict):
        raise _malformed(f"the JSON of {where!r} is a {type(value).__name__}", "a JSON object")
    _bound_depth(value, where)
    return value


class _DuplicateKeyError(Exception):
    """A key that occurs twice in one object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


def _bound_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise _malformed(f"the JSON of {where!r} is nested too deeply", f"at most {MAX_DEPTH} levels")


def _children(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node
    return [value for value in values if isinstance(value, (dict, list))]


def _malformed(what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(what, expected=expected, do="fetch the file again from where it was published")
