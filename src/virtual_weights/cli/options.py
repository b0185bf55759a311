"""Options that several verbs share: one wording, one meaning each."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virtual_weights.errors import UsageError

if TYPE_CHECKING:  # slow to import, and help needs none of it
    import torch


class ProgressMode(StrEnum):
    """How progress is reported, always on stderr."""

    auto = "auto"
    json = "json"
    none = "none"


class PortName(StrEnum):
    """Through what a component reads: ports of attention heads, of MLPs, and the unembedding."""

    Q = "Q"
    K = "K"
    V = "V"
    gate = "gate"
    up = "up"
    inward = "in"
    unembed = "unembed"


class StoredDtype(StrEnum):
    """What tensors are written as, or what a model runs in."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """The same as a torch dtype."""
        import torch

        return getattr(torch, self.value)


class WriterSet(StrEnum):
    """Who counts as a writer."""

    heads = "heads"
    all = "all"


_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_LEAST_MEMORY = 16  # MiB


def mebibytes(text: str) -> int:
    """``"4GB"`` or ``"512MiB"`` in MiB, rounded down.

    Raises:
        UsageError: it is not a size, or too small a one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]i?b)", text.strip().lower())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]] / 2**20)
    if size < _LEAST_MEMORY:
        raise UsageError(
            f"--memory {text}",
            expected=f"a number with KB, MB, GB, KiB, MiB or GiB, {_LEAST_MEMORY}MiB or more",
            do="write for example --memory 4GB",
        )
    return size


def checked_device(device: str) -> str:
    """A device that this machine has.

    Raises:
        UsageError: torch does not know it, or cannot use it here.
    """
    if device == "cpu":
        return device
    import torch

    try:
        torch.empty(1, device=torch.device(device)).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"device {device!r} cannot be used: {why}",
            expected="cpu, or a device that torch can use on this machine, such as cuda or mps",
            do="leave --device out, or install a build of torch for that device",
        ) from None
    return device


def checked_file(path: Path | None) -> Path | None:
    """A file that can be written.

    Raises:
        UsageError: its folder does not exist or cannot be written to, or the path is a folder.
    """
    if path is None:
        return None
    if path.is_dir():
        raise UsageError(f"{path} is a folder", expected="the name of a file", do="add the name of a file to it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"no folder {path.absolute().parent}", expected="a folder that exists", do="create it first")
    _writable(path.absolute().parent)
    return path


def checked_folder(path: Path | None) -> Path | None:
    """A folder that exists and can be written to, or can be created.

    Raises:
        UsageError: it is a file, or it can be neither written to nor created.
    """
    if path is None:
        return None
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is a file", expected="a folder, new or not", do="name another folder")
    _writable(nearest)
    return path


def _writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {folder}", expected="a folder of your own", do="name another folder")


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="built-in name, folder, .safetensors, .gguf or hf://org/name@revision")
]
NoFold = Annotated[bool, typer.Option("--no-fold", help="leave norm gains and centring out of the readers")]
Partial = Annotated[bool, typer.Option("--partial", help="accept a checkpoint in which tensors are missing")]
Offline = Annotated[bool, typer.Option("--offline", help="never use the network")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="accept NaN and infinity among the weights")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, everything else on stderr")]
Progress = Annotated[
    ProgressMode, typer.Option("--progress", help="auto: bars on a terminal; json: lines on stderr; none")
]
RotaryOffset = Annotated[
    int | None,
    typer.Option("--rotary-offset", metavar="D", min=0, help="query position minus key position, 0 by default"),
]
WriterOption = Annotated[
    WriterSet, typer.Option("--writers", help="heads only, or all: embeddings, MLPs and biases too")
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many rows to show")]
Seed = Annotated[int, typer.Option("--seed", help="seed of every random choice")]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        metavar="DTYPE",
        help="precision of the products, float64 or float32; sums are in float64 either way",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", callback=checked_device, help="where it computes, e.g. cpu or cuda")
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="SIZE", parser=mebibytes, help="most memory for intermediate results, e.g. 4GB"),
]
Save = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE.safetensors", callback=checked_file, help="write the full matrices"),
]
Moments = Annotated[
    Path | None, typer.Option("--moments", metavar="FILE", help="averages over a text, written by vweights observe")
]
Point = Annotated[
    Path | None,
    typer.Option("--point", metavar="FILE", help="operating point of one prompt, written by vweights observe --prompt"),
]
NormScalar = Annotated[
    float, typer.Option("--norm-scalar", metavar="S", help="norm scalar that is assumed where no model ran")
]
Gate = Annotated[float, typer.Option("--gate", help="gate (without gates: slope) that is assumed where no model ran")]
Position = Annotated[int, typer.Option("--position", metavar="I", help="at which token of the prompt; -1 is the last")]
Logit = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="the token whose logit is explained: ' Paris' with its space, or its id"
    ),
]
Against = Annotated[str | None, typer.Option("--against", metavar="TOKEN", help="subtract the logit of this token")]

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="run on a text: a file, a folder, - for stdin, or 'default' for English that comes with Python",
    ),
]
Repeated = Annotated[bool, typer.Option("--repeated", help="run on repeated random tokens")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="run on one prompt")]
PromptIds = Annotated[
    str | None, typer.Option("--prompt-ids", metavar="IDS", help="run on one prompt, given as token ids, e.g. 3,17,5")
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="run on at most N tokens of the text")]
Length = Annotated[int, typer.Option("--length", metavar="T", min=1, help="tokens in a chunk, the repetition included")]
Batch = Annotated[int, typer.Option("--batch", metavar="B", min=1, help="chunks in one forward pass")]
RunDtype = Annotated[StoredDtype, typer.Option("--dtype", help="precision in which the model runs")]
