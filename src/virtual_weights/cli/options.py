"""Options that several commands share, with one wording each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer


class ProgressMode(StrEnum):
    """How progress is told, always on stderr."""

    auto = "auto"
    json = "json"
    none = "none"


class PortName(StrEnum):
    """Through what a part reads: ports of attention heads, of MLPs, and the unembedding."""

    Q = "Q"
    K = "K"
    V = "V"
    gate = "gate"
    up = "up"
    inward = "in"
    unembed = "unembed"


class StoredDtype(StrEnum):
    """What tensors are written as."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """The same as a torch dtype."""
        return {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}.get(
            self.value, torch.bfloat16
        )


class WriterSet(StrEnum):
    """Who counts as a writer."""

    heads = "heads"
    all = "all"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="built-in name, folder, .safetensors, .gguf or hf://org/name@revision")
]
NoFold = Annotated[bool, typer.Option("--no-fold", help="leave norm gains and centring out of the readers")]
Partial = Annotated[bool, typer.Option("--partial", help="accept a checkpoint in which tensors are missing")]
Offline = Annotated[bool, typer.Option("--offline", help="never fetch anything")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="do not refuse NaN and infinity")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, everything else on stderr")]
ProgressOption = Annotated[
    ProgressMode, typer.Option("--progress", help="auto: bars on a terminal; json: lines on stderr")
]
RotaryOffset = Annotated[
    int | None,
    typer.Option("--rotary-offset", metavar="D", min=0, help="query position minus key position; none is offset 0"),
]
WriterOption = Annotated[
    WriterSet, typer.Option("--writers", help="heads alone, or all: embeddings, MLPs and biases too")
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many edges to show")]
Device = Annotated[str, typer.Option("--device", help="torch device of the kernel, e.g. cpu or cuda")]
ComputeDtype = Annotated[str, typer.Option("--dtype", help="float64 or float32; sums accumulate in float64 either way")]
MemoryMb = Annotated[int, typer.Option("--memory-mb", metavar="MIB", min=16, help="workspace of the all-pairs kernel")]
SaveFile = Annotated[Path | None, typer.Option("--save", metavar="FILE.safetensors", help="write the full matrices")]
OperatingPointFile = Annotated[
    Path | None,
    typer.Option("--operating-point", metavar="FILE", help="norm scalars, attention and gates of a run on a prompt"),
]
