"""Options that several verbs share: one wording, one meaning each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from virtual_weights.runtime.running.text import DEFAULT_TEXT


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
        return getattr(torch, self.value)


class WriterSet(StrEnum):
    """Who counts as a writer."""

    heads = "heads"
    all = "all"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="built-in name, folder, .safetensors, .gguf or hf://org/name@revision")
]
NoFold = Annotated[bool, typer.Option("--no-fold", help="leave norm gains and centring out of the readers")]
Partial = Annotated[bool, typer.Option("--partial", help="accept a checkpoint in which tensors are missing")]
Offline = Annotated[bool, typer.Option("--offline", help="never fetch anything")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="do not refuse NaN and infinity")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, everything else on stderr")]
Progress = Annotated[
    ProgressMode, typer.Option("--progress", help="auto: bars on a terminal; json: lines on stderr; none")
]
RotaryOffset = Annotated[
    int | None,
    typer.Option("--rotary-offset", metavar="D", min=0, help="query position minus key position; 0 without it"),
]
WriterOption = Annotated[
    WriterSet, typer.Option("--writers", help="heads alone, or all: embeddings, MLPs and biases too")
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many rows to show")]
Seed = Annotated[int, typer.Option("--seed", help="of every random choice")]
ComputeDtype = Annotated[
    str, typer.Option("--compute-dtype", help="float64 or float32 of the kernel; sums accumulate in float64 either way")
]
Device = Annotated[str, typer.Option("--device", help="any torch device, e.g. cpu or cuda")]
MemoryMb = Annotated[int | None, typer.Option("--memory-mb", metavar="MIB", min=16, help="workspace of the kernels")]
Save = Annotated[Path | None, typer.Option("--save", metavar="FILE.safetensors", help="write the full matrices")]
Moments = Annotated[
    Path | None, typer.Option("--moments", metavar="FILE", help="moments that vweights observe wrote: what flows")
]
Point = Annotated[
    Path | None,
    typer.Option("--point", metavar="FILE", help="operating point of a prompt that vweights observe --prompt wrote"),
]
NormScalar = Annotated[
    float, typer.Option("--norm-scalar", metavar="S", help="norm scalar that is assumed where nothing ran")
]
Gate = Annotated[float, typer.Option("--gate", help="gate (ungated: slope) that is assumed where nothing ran")]
Position = Annotated[int, typer.Option("--position", help="at which token of the prompt; -1 is the last")]
Logit = Annotated[
    str | None, typer.Option("--token", metavar="TOKEN", help="whose logit: ' Paris' with its space, or an id")
]
Against = Annotated[str | None, typer.Option("--against", metavar="TOKEN", help="less the logit of this one")]

Text = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help=f"a file, a folder, - for stdin or 'default': {DEFAULT_TEXT}"),
]
Repeated = Annotated[bool, typer.Option("--repeated", help="repeated random tokens in place of a text")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="one prompt in place of a text")]
PromptIds = Annotated[
    str | None, typer.Option("--prompt-ids", metavar="IDS", help="one prompt by its token ids, e.g. 3,17,5")
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="stop after so many tokens")]
Length = Annotated[int, typer.Option("--length", metavar="T", min=1, help="tokens of a chunk, a repetition included")]
Batch = Annotated[int, typer.Option("--batch", metavar="B", min=1, help="chunks that run at once")]
RunDtype = Annotated[StoredDtype, typer.Option("--dtype", help="of the run: float64, float32, float16 or bfloat16")]
