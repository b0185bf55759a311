"""Tensors of a run in one safetensors file that knows its format and the checkpoint that ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from virtual_weights.errors import RecordError
from virtual_weights.record.durable import replacing

Result = TypeVar("Result")


def write_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, whole or not at all; its metadata hold the format and what is given.

    Raises:
        UsageError: the file's folder does not exist.
    """
    from safetensors.torch import save_file  # here, since importing the package is cheap by promise

    with replacing(Path(path)) as aside:
        save_file(_whole(tensors), aside, {"format": form, **metadata})


def read_tensors(
    path: str | Path, form: str, make: Callable[[dict[str, dict[str, Tensor]], dict[str, str]], Result], what: str
) -> Result:
    """Read what ``write_tensors`` wrote.

    Args:
        path: the file.
        form: the format that it must have.
        make: makes the result of tensors by kind and key (``"kind/key"`` in the file) and of the metadata.
        what: what is expected there, for the error.

    Raises:
        RecordError: the file is not there, has another format, or ``make`` misses something.
    """
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise ValueError(f"format {metadata.get('format')!r}")
            for name in file.keys():  # noqa: SIM118 (no mapping)
                kind, _, key = name.partition("/")
                parts.setdefault(kind, {})[key] = file.get_tensor(name)
        return make(parts, metadata)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RecordError(
            f"{path} is not a file of {what}: {error}",
            expected=f"a safetensors file of format {form!r}",
            do=f"name the file in which vweights observe wrote its {what}",
        ) from error


def identity(tensors: Mapping[str, Tensor], description: str) -> str:
    """A hex sha256 of tensors and of a text."""
    from safetensors.torch import save

    return sha256(
        save(_whole(tensors), {"of": description})
    ).hexdigest()  # one entry: their order in a file is not fixed


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with storage of its own, in order, as safetensors wants it."""
    return {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
