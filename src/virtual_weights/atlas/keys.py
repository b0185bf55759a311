"""Keys: the address of a result is a hash of what was asked, so that whoever asks the same finds it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from virtual_weights.errors import UsageError
from virtual_weights.version import VERSION

KEY = re.compile(r"[0-9a-f]{64}")


def task_key(fingerprint: str, question: str, parameters: Mapping[str, Any], stamp: Mapping[str, Any]) -> str:
    """The address of a task's result.

    ``sha256`` over the canonical JSON of the arguments and the version of this package: names sorted,
    no spaces, tuples as lists. Any change of the model, the question, a parameter, a convention or the
    code's version is another address.

    Args:
        fingerprint: the checkpoint's fingerprint.
        question: name of the question.
        parameters: its parameters, plain JSON values.
        stamp: the conventions in force that the asker knows beforehand.

    Returns:
        64 lower-case hex digits.

    Raises:
        UsageError: a value is not plain JSON.

    Example:
        >>> a = task_key("f00d", "composition", {"port": "K", "memory_mb": 256}, {})
        >>> a == task_key("f00d", "composition", {"memory_mb": 256, "port": "K"}, {})
        True
    """
    asked = [fingerprint, question, dict(parameters), dict(stamp), VERSION]
    return hashlib.sha256(canonical(asked).encode()).hexdigest()


def canonical(value: Any) -> str:
    """A plain value as JSON that is equal for equal values.

    Raises:
        UsageError: the value is not plain JSON: NaN, infinity, a tensor, a name that is not text.
    """
    _refuse_other_names(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a parameter cannot be written as JSON: {error}",
            expected="finite numbers, text, true, false, null, lists and objects of these",
            do="pass plain values; name a file or tensor instead of holding it",
        ) from None


def _refuse_other_names(value: Any) -> None:
    """Refuse ``{1: ...}``: JSON would write it as ``{"1": ...}``, and two tasks would share an address."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UsageError(
                    f"a parameter is named {name!r}", expected="names that are text", do=f"use {str(name)!r}"
                )
            _refuse_other_names(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_names(inner)
