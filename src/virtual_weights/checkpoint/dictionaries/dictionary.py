"""What every dictionary is once its file format is read: features that read one place and write to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.checkpoint.source import Source

Rows = Callable[[slice], Tensor]
"""The vectors (n, d) of some features, read anew each time, in storage dtype."""

DictionaryKind = Literal["sae", "tc", "clt", "lorsa", "comp", "lora", "vec"]
"""Sparse autoencoder, transcoder, cross-layer transcoder, Lorsa heads, parameter components, low-rank factors, plain
vectors."""

KIND_NAMES: Mapping[DictionaryKind, str] = {
    "sae": "a sparse autoencoder",
    "tc": "a transcoder",
    "clt": "a cross-layer transcoder",
    "lorsa": "Lorsa heads",
}
"""What one is called before the name of its format."""


@final
@dataclass(frozen=True, eq=False)
class Activation:
    """From pre-activations to activations.

    Attributes:
        kind: ``"linear"``; ``"relu"``; ``"jumprelu"``, ``x 1[x > threshold]``; ``"topk"``, the k largest of a token
            as they are; ``"gated"``, ``1[x > 0] relu(scale (x - offset) + shift)``.
        threshold: (F,) or (), of a JumpReLU.
        k: of a top-k.
        weights: (F,), by which a top-k compares ``weights x``; None compares x.
        positive: whether a top-k or a JumpReLU never gives what is below 0.
        scale, offset, shift: (F,), of a gated one: x is the gate's pre-activation, whose bias is ``offset``.
    """

    kind: Literal["linear", "relu", "jumprelu", "topk", "gated"] = "relu"
    threshold: Tensor | None = None
    k: int | None = None
    weights: Tensor | None = None
    positive: bool = False
    scale: Tensor | None = None
    offset: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, pre: Tensor) -> Tensor:
        """Activations of pre-activations (..., F), same shape and dtype."""
        if self.kind == "linear":
            return pre
        if self.kind == "relu":
            return pre.relu()
        if self.kind == "gated":
            assert self.scale is not None and self.offset is not None and self.shift is not None
            magnitude = self.scale.to(pre) * (pre - self.offset.to(pre)) + self.shift.to(pre)
            return torch.where(pre > 0, magnitude.relu(), 0.0)
        if self.kind == "jumprelu":
            assert self.threshold is not None
            open_gate = pre > self.threshold.to(pre)
            return torch.where(open_gate & (pre > 0) if self.positive else open_gate, pre, 0.0)
        assert self.k is not None
        values = pre.relu() if self.positive else pre
        strongest = (values if self.weights is None else values * self.weights.to(pre)).topk(self.k).indices
        return torch.zeros_like(values).scatter(-1, strongest, values.gather(-1, strongest))


@final
@dataclass(frozen=True, eq=False)
class Decoder:
    """Where features write.

    Attributes:
        writes: the place, as the file names it, see ``virtual_weights.stream.hook_points``.
        rows: decoder vectors.
        bias: (d,), what is added beside them; None where nothing.
    """

    writes: str
    rows: Rows
    bias: Tensor | None = None


@final
@dataclass(frozen=True, eq=False)
class DictionaryPart:
    """The features that read one place: one layer of a dictionary.

    Whatever the file does to its input before the encoder (a subtracted bias, a factor) is in ``encoder`` and ``bias``
    here: the pre-activation of an input x is ``encoder x + bias``.

    Attributes:
        layer: of the model, for its name; None where the file does not say.
        features: how many, F.
        reads: the place, as the file names it; None where it says nothing, or where nothing is read.
        encoder: encoder vectors, (F, d); None where it only writes.
        bias: (F,); None where nothing.
        activation: what follows.
        decoders: where it writes, in order of depth; of a cross-layer one several.
        skip: (d_out, d_in), ``y += skip x``; None where there is none.
        tag: distinguishes parts of one layer: ``"q"`` of low-rank factors of queries, else "".
        unfolded: what this format does at every token that no fixed map holds, such as a layer norm of the input;
            None where nothing.
    """

    layer: int | None
    features: int
    reads: str | None
    encoder: Rows | None
    bias: Tensor | None = None
    activation: Activation = Activation()
    decoders: tuple[Decoder, ...] = ()
    skip: Tensor | None = None
    tag: str = ""
    unfolded: str | None = None


@final
@dataclass(frozen=True, eq=False)
class Dictionary:
    """A dictionary as it lies on the disk.

    Attributes:
        path: of the file or folder.
        kind: what it is.
        format: who writes such files, in words.
        parts: in order of depth.
        sources: of the tensors; their fingerprints and the settings make the identity.
        settings: what else decides how it is read.
    """

    path: str
    kind: DictionaryKind
    format: str
    parts: tuple[DictionaryPart, ...]
    sources: tuple[Source, ...]
    settings: str = ""
