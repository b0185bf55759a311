"""The exceptions of the package, each with the exit code that the command line gives it.

::

    VirtualWeightsError                 3
    ├── UsageError                      2   a parameter or label that cannot be meant
    ├── CheckpointError                 3   a checkpoint that cannot be read
    │   ├── MissingTensorError          3   a name, file or shard that is not there
    │   ├── MalformedCheckpointError    3   bytes that contradict their own format
    │   └── NonFiniteError              3   NaN or infinity in the weights
    ├── ArchitectureError               3   a model that the tables do not account for
    ├── RecordError                     3   a stored result that cannot be read
    ├── UnsafeCheckpointError           4   refused: opening it could do harm
    ├── OfflineError                    3   a download is needed and was forbidden or failed
    └── ResourceError                   5   the stated memory or disk budget does not suffice

Every message has three parts: what was wrong, what was expected, what to do. What steers a terminal is escaped in it.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any


def printable(text: str, keep: str = "\n") -> str:
    r"""A text in which what steers a terminal or reorders what is read is escaped: control and bidirectional marks.

    Args:
        text: any text, such as a token or the name of a file.
        keep: characters that are not printable and stay all the same.

    Example:
        >>> printable("a\x1b[2J\u202e")
        'a\\x1b[2J\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class VirtualWeightsError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what was wrong, with names and shapes.
        expected: what was expected instead.
        do: what the reader can do about it.
    """

    exit_code = 3

    def __init__(self, what: str, *, expected: str, do: str) -> None:
        self.what, self.expected, self.do = printable(what), printable(expected), printable(do)
        super().__init__(f"{self.what}\n  expected: {self.expected}\n  to do: {self.do}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes, which make it of its three parts."""
        return partial(type(self), expected=self.expected, do=self.do), (self.what,)


class UsageError(VirtualWeightsError):
    """A parameter, label or option that cannot be meant."""

    exit_code = 2


class CheckpointError(VirtualWeightsError):
    """A checkpoint that cannot be read."""


class MissingTensorError(CheckpointError):
    """A tensor, file or shard that is not there."""


class MalformedCheckpointError(CheckpointError):
    """Bytes that contradict their own format or each other."""


class NonFiniteError(CheckpointError):
    """NaN or infinity in a tensor, where it was not allowed."""


class ArchitectureError(VirtualWeightsError):
    """A model whose tensors or configuration no table accounts for."""


class RecordError(VirtualWeightsError):
    """A stored result that cannot be read back."""


class UnsafeCheckpointError(VirtualWeightsError):
    """A file whose mere opening could do harm (pickle, a path leaving the folder)."""

    exit_code = 4


class OfflineError(VirtualWeightsError):
    """Something must be fetched, and fetching is forbidden or failed."""


class ResourceError(VirtualWeightsError):
    """The stated budget of memory or disk does not suffice."""

    exit_code = 5


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG, errno.EMFILE, errno.ENFILE)


def write_error(place: object, error: OSError) -> UsageError | ResourceError:
    """What the system's refusal to write somewhere is among these exceptions.

    Args:
        place: the file or folder.
        error: the refusal.
    """
    if error.errno in _NO_ROOM:
        return ResourceError(
            f"{place} cannot be written: {error.strerror}",
            expected="room on the disk, within the quota and the limits of this user",
            do="free disk space, or name a folder on another disk; what was finished before is kept",
        )
    return UsageError(
        f"{place} cannot be written: {error.strerror or error}",
        expected="a place that this user may write to",
        do="name another place, or check the permissions and the disk",
    )


@contextmanager
def writing(place: object) -> Generator[None]:
    """Turn the system's refusal to write a file or folder into an error of this package.

    Raises:
        UsageError: the system does not let us write there.
        ResourceError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise write_error(place, error) from error
