"""Options that several verbs share: one wording, one meaning each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from virtual_weights.errors import UsageError, writing

if TYPE_CHECKING:  # slow to import, and help needs none of it
    import torch


class Command(TyperCommand):
    """A command in whose help options that take no value are shown without the type ``<bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as typer has them but for that."""
        return _without_bool(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands, likewise."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as typer has them but for that."""
        return _without_bool(super().get_params(ctx))


def _without_bool(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if parameter.param_type_name == "option" and parameter.is_flag:
            parameter.metavar = ""
    return parameters


class ProgressMode(StrEnum):
    """How progress is reported, always on stderr."""

    auto = "auto"
    json = "json"
    none = "none"


class PortName(StrEnum):
    """Through what a component reads: ports of attention heads, of MLPs, the unembedding, and attached encoders."""

    Q = "Q"
    K = "K"
    V = "V"
    gate = "gate"
    up = "up"
    inward = "in"
    unembed = "unembed"
    enc = "enc"


class EdgeFormat(StrEnum):
    """What a file of edges is; a graph is JSON."""

    parquet = "parquet"
    csv = "csv"
    graph = "graph"


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
    """Which components count as writers."""

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
            expected=f"a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB, {_LEAST_MEMORY}MiB or more",
            do="write for example --memory 4GB",
        )
    return size


def listed(option: str, text: str, expected: str) -> tuple[str, ...]:
    """The names in ``"L5, T3"``, each once.

    Raises:
        UsageError: there is none.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{option} {text!r} names nothing", expected=expected, do=f"name some, or leave {option} out")
    return names


def checked_seed(seed: int) -> int:
    """A seed that random choices can be made from.

    Raises:
        UsageError: it does not fit into 64 bits.
    """
    from virtual_weights.linalg import random_generator

    random_generator(seed)
    return seed


def checked_column(name: str, columns: Sequence[str]) -> str:
    """The column to sort by, before the columns are computed.

    Raises:
        UsageError: the answer will not have it.
    """
    if name not in columns:
        raise UsageError(f"--by {name}", expected=f"one of {', '.join(columns)}", do="sort by one of these columns")
    return name


def refuse_unused(context: typer.Context, where: str, *names: str) -> None:
    """Refuse options that the command line has and the answer would not depend on.

    Args:
        context: of the command.
        where: when they mean nothing, such as ``"without --point"``.
        names: the parameters of the command that mean nothing then.

    Raises:
        UsageError: one of them is given.
    """
    given: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            given.append(parameter.opts[0])
    if given:
        raise UsageError(
            f"{' and '.join(given)} {where}",
            expected="only options that the answer depends on",
            do=f"leave {'it' if len(given) == 1 else 'them'} out",
        )


def refuse_offsets(context: typer.Context, end: str, *names: str) -> None:
    """Refuse options of rotary offsets where an end, a reader or a circuit, is not turned by them.

    Raises:
        UsageError: one of them is given.
    """
    if end == "unembed" or end.rpartition(".")[2] in ("V", "ov", "gate", "up", "in"):
        refuse_unused(context, f"with {end}, which no rotary embedding turns", *names)


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
    with writing(path):
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder", expected="a file, new or to be replaced", do="add a file name to it"
            )
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", expected="a new or regular file", do="name another file")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"no folder {folder}", expected="a folder that exists", do="create it first")
        _writable(folder)
    return path


def checked_folder(path: Path | None) -> Path | None:
    """A folder that exists and can be written to, or can be created.

    Raises:
        UsageError: it is a file, or it can be neither written to nor created.
    """
    if path is None:
        return None
    with writing(path):
        path.is_dir()  # refuses a name that is too long
        nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not nearest.is_dir():
            raise UsageError(f"{nearest} is a file", expected="a folder, existing or new", do="name another folder")
        _writable(nearest)
    return path


def _writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"cannot write to {folder}", expected="a folder that you may write to", do="name another folder"
        )


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="built-in name, folder, .safetensors, .gguf or hf://org/name@revision")
]
AtlasFolder = Annotated[Path, typer.Argument(metavar="ATLAS", help="folder that vweights map has written")]
Reader = Annotated[
    str | None, typer.Option("--reader", metavar="NAME", help="only edges into it, e.g. L18H6.K, L18H6, L5.mlp.up")
]
Writer = Annotated[
    str | None, typer.Option("--writer", metavar="NAME", help="only edges out of it, e.g. L16H0, L3.mlp, embed")
]
EdgesOf = Annotated[
    str | None,
    typer.Option(
        "--question",
        metavar="NAME",
        help="which answers: composition, the default, or overlap, erasure, contribution, attribution, ablation, "
        "neuron_edges",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="NAME=VALUE", help="only results with this parameter, e.g. rotary_offset=2"),
]
By = Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="column to sort by; the first by default")]
NoFold = Annotated[bool, typer.Option("--no-fold", help="leave norm gains and all centring out of the maps")]
Partial = Annotated[bool, typer.Option("--partial", help="accept a checkpoint in which tensors are missing")]
Offline = Annotated[bool, typer.Option("--offline", help="never use the network")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="accept NaN and infinity among the weights")]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config", metavar="KEY", help="ignore an unknown configuration key that changes nothing; repeatable"
    ),
]
OwnTable = Annotated[
    Path | None, typer.Option("--table", metavar="FILE", help="a TOML file that describes models of types of your own")
]
Attach = Annotated[
    list[str] | None,
    typer.Option(
        "--attach",
        metavar="PATH[@PLACE]",
        help="a LoRA adapter to fold into the weights, or a dictionary whose features read and write; repeatable",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, everything else on stderr")]
Progress = Annotated[
    ProgressMode, typer.Option("--progress", help="auto: bars on a terminal; json: lines on stderr; none")
]
RotaryOffset = Annotated[
    int | None,
    typer.Option("--rotary-offset", metavar="D", min=0, help="query position minus key position, 0 by default"),
]
WriterOption = Annotated[
    WriterSet, typer.Option("--writers", help="heads only, or all: also embeddings, MLPs and biases")
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="show at most N rows of each ranking")]
Seed = Annotated[int, typer.Option("--seed", callback=checked_seed, help="seed of every random choice")]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        metavar="DTYPE",
        help="precision of the products, float32 or float64; sums are in float64 either way",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", callback=checked_device, help="device to compute on, e.g. cpu or cuda"),
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="SIZE", parser=mebibytes, help="memory limit for intermediate results, e.g. 4GB"),
]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="WHO",
        help="who computes pairs: local (this process), local:N (N processes), dask (a cluster on this machine), "
        "dask:tls://host:port",
    ),
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
    typer.Option("--point", metavar="FILE", help="operating point of a prompt, written by vweights observe --prompt"),
]
NormScalar = Annotated[
    float, typer.Option("--norm-scalar", metavar="S", help="norm scalar to assume, as the model does not run")
]
Gate = Annotated[
    float,
    typer.Option(
        "--gate", metavar="G", help="gate of every neuron to assume, as the model does not run; without gates, slope"
    ),
]
Position = Annotated[
    int, typer.Option("--position", metavar="I", help="position in the prompt, counted from 0; -1 is the last token")
]
Logit = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="token whose logit is explained: its text, its space included, or its id"
    ),
]
Against = Annotated[str | None, typer.Option("--against", metavar="TOKEN", help="subtract the logit of this token")]

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="run on a text: a file, a folder, - for stdin, 'default' for Python's help topics, or 'story'",
    ),
]
Repeated = Annotated[bool, typer.Option("--repeated", help="run on repeated random tokens")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="run on one prompt")]
PromptIds = Annotated[
    str | None, typer.Option("--prompt-ids", metavar="IDS", help="run on one prompt, given as token ids, e.g. 3,17,5")
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="run on at most N tokens")]
Length = Annotated[
    int, typer.Option("--length", metavar="T", min=1, help="tokens per chunk; if repeated, both copies together")
]
Batch = Annotated[int, typer.Option("--batch", metavar="B", min=1, help="chunks per forward pass")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="begin every chunk with the beginning-of-sequence token, or add no special token",
        show_default="what the tokenizer adds",
    ),
]
RunDtype = Annotated[
    StoredDtype,
    typer.Option(
        "--dtype", metavar="DTYPE", help="precision in which the model runs: float64, float32, float16 or bfloat16"
    ),
]
