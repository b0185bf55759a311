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

Every message has three parts: what was wrong, what was expected, what to do.
"""

from __future__ import annotations


class VirtualWeightsError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what was wrong, with names and shapes.
        expected: what was expected instead.
        do: what the reader can do about it.
    """

    exit_code = 3

    def __init__(self, what: str, *, expected: str, do: str) -> None:
        self.what, self.expected, self.do = what, expected, do
        super().__init__(f"{what}\n  expected: {expected}\n  to do: {do}")


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
