"""Whether attached dictionaries read where they say: pre-activations from maps beside those of the running model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate
from virtual_weights.runtime.running.activations import Activations, prompted
from virtual_weights.runtime.running.hooks import after, module_of
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Stream
from virtual_weights.stream.attached import AttachedPart
from virtual_weights.stream.effective import added, as_seen
from virtual_weights.stream.group import WRITINGS
from virtual_weights.stream.hook_points import HookPoint, hook_point
from virtual_weights.stream.hook_points import reading as read_as

READ_AS = ("state", "normalized", "normed")
"""What an encoder can be given: the state as it is, over its norm's scalar, and that with gain and shift."""


@final
@dataclass(frozen=True)
class Elsewhere:
    """The same state read otherwise.

    Attributes:
        what: the place, such as ``"L8.mlp.state"``: as it is; ``"L8.mlp.normalized"``: over its norm's scalar;
            ``"L8.mlp.normed"``: with gain and shift too.
        distance: of its pre-activations from the dictionary's own, root mean square over root mean square.
        unexplained: as of the dictionary, if it read so.
    """

    what: str
    distance: float
    unexplained: float


@final
@dataclass(frozen=True)
class DictionaryFit:
    """One attached dictionary on a prompt.

    Attributes:
        name: of its features.
        reads: the place that it reads, as named; None where it reads no state.
        error: largest difference between the pre-activations that its maps give of what all writers wrote and its own
            of what the model has at that place, over the largest of them; NaN where it reads no state.
        elsewhere: the other readings of the same state.
        unexplained: squared error over variance of what it stands for (the output of a part, or the state); NaN where
            it stands for nothing.
        active: features that are not 0 at a token, on average.
        unfolded: what it does that no fixed map holds; then there is no other figure.
    """

    name: str
    reads: str | None
    error: float
    elsewhere: tuple[Elsewhere, ...]
    unexplained: float
    active: float
    unfolded: str | None = None


@torch.no_grad()
def dictionary_fits(run: Run) -> list[DictionaryFit]:
    """Check every attached dictionary on one prompt, float64 beside what the model computes.

    Args:
        run: the model with its dictionaries, on one chunk of text; its first token is left out of ``unexplained``.

    Raises:
        UsageError: the run has several chunks, or transformers is missing.
    """
    live = _Live(run)
    return [_fit(live, part) for part in run.stream.attached.parts]


def _fit(live: _Live, part: AttachedPart) -> DictionaryFit:
    reading = part.reading if part.reading is not None else _outside(live.stream, part)
    if part.part.encoder is None or reading is None or part.part.unfolded is not None:
        return DictionaryFit(part.name, part.part.reads, math.nan, (), math.nan, math.nan, part.part.unfolded)
    own = live.own(part, reading)
    activations, error, elsewhere = part.part.activation(own), math.nan, list[Elsewhere]()
    if part.reading is not None:
        error = float((live.from_maps(part) - own).abs().max() / own.abs().max())
        for other in _others(live.stream, reading):
            pre = live.own(part, other)
            distance = float((pre - own).square().mean().sqrt() / own.square().mean().sqrt())
            unexplained = _unexplained(live, part, part.part.activation(pre), other)
            elsewhere.append(Elsewhere(f"{other.site}.{other.what}", distance, unexplained))
    unexplained, active = _unexplained(live, part, activations, reading), (activations != 0).double().sum(1).mean()
    return DictionaryFit(part.name, reading.text, error, tuple(elsewhere), unexplained, float(active))


def _outside(stream: Stream, part: AttachedPart) -> HookPoint | None:
    """Where a dictionary reads that reads the output of a part."""
    return None if part.part.reads is None else hook_point(part.part.reads, stream.model)


def _others(stream: Stream, reading: HookPoint) -> list[HookPoint]:
    """Other readings of the same state, by the norm of the same part or of what reads it first."""
    sited = (group.branch for group in stream.groups.sited(reading.state) if group.branch is not None)
    branch = reading.branch or next(sited, None)
    norm = stream.spec.head.norm if branch is None else branch.before
    if norm is None or (branch is None and reading.state < stream.states - 1):
        return []
    points = {(p.norm, p.gained): p for p in (read_as(what, reading.state, what, branch, norm) for what in READ_AS)}
    return [point for how, point in points.items() if how != (reading.norm, reading.gained)]


def _unexplained(live: _Live, part: AttachedPart, activations: Tensor, reading: HookPoint) -> float:
    """Squared error over variance of what a decoder gives, beside what is there in the model; of one decoder alone."""
    decoders = part.part.decoders
    if len(decoders) != 1 or not decoders[0].writes:
        return math.nan
    target = next((place for place, _ in part.writings), None) or hook_point(decoders[0].writes, live.stream.model)
    y, a = live.value(target)[1:], activations[1:]
    output = a @ decoders[0].rows(slice(0, part.part.features)).to(accumulate)
    if decoders[0].bias is not None:
        output = output + decoders[0].bias.to(accumulate)
    if part.part.skip is not None:
        output = output + live.value(reading)[1:] @ part.part.skip.to(accumulate).T
    return float((output - y).square().sum() / (y - y.mean(0)).square().sum())


@final
class _Live:
    """What a model has at places, on one prompt, as its own modules give it."""

    def __init__(self, run: Run) -> None:
        self.stream = as_seen(replace(run.stream, folded=True), "enc")
        self._norms: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        hooks = list(self._hooks(run, list(_places(run.stream))))
        try:
            self._activations: Activations = prompted(replace(run, stream=self.stream))
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, run: Run, places: Iterable[HookPoint]) -> Iterable[Any]:
        """Hooks on norms and on output maps."""

        def keep(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
            tensors[name] = tensor[0].cpu().to(accumulate)

        for site in {place.site for place in places if place.norm is not None}:
            norm = module_of(run.module, run.stream, "norm", site)
            yield after(norm, lambda tensor, name=site: keep(self._norms, name, tensor))
        for branch in {place.branch.id for place in places if place.branch is not None and place.written}:
            output = module_of(run.module, run.stream, WRITINGS[run.stream.groups[branch].kind], branch)
            yield after(output, lambda tensor, name=branch: keep(self._outputs, name, tensor))

    def value(self, place: HookPoint) -> Tensor:
        """What the model has at a place, (T, d) float64."""
        if not place.written and place.norm is None:
            return self._activations.signals["state", place.state].to(accumulate)
        if place.gained:
            return self._norms[place.site]
        if place.what == "normalized":
            state = self._activations.signals["state", place.state].to(accumulate)
            return state / self.stream.scale(state, place.site)[:, None]
        assert place.branch is not None
        if place.what == "z":
            return self._activations.signals["inner", place.branch.id].to(accumulate).flatten(1)
        output = self._outputs[place.branch.id]
        if place.what == "output" or (place.branch.after is None and place.branch.factor == 1.0):
            return output
        return added(self.stream, output, self.stream.groups[place.branch.id])

    def own(self, part: AttachedPart, place: HookPoint) -> Tensor:
        """Pre-activations (T, F) of what the model has at a place, by the encoder as it lies in the file."""
        assert part.part.encoder is not None
        pre = self.value(place) @ part.part.encoder(slice(0, part.part.features)).to(accumulate).T
        return pre if part.part.bias is None else pre + part.part.bias.to(accumulate)

    def from_maps(self, part: AttachedPart) -> Tensor:
        """Pre-activations (T, F) of the sum of what all writers wrote, by the effective encoder."""
        assert part.reading is not None
        total = sum(written for _, written in self._activations.written(part.reading.state))
        assert isinstance(total, Tensor)
        read = part.read(self.stream)
        pre = total @ read.maps[0].to(accumulate).T / self.stream.scale(total, part.group)[:, None]
        return pre if read.constants is None else pre + read.constants[0].to(accumulate)


def _places(stream: Stream) -> Iterable[HookPoint]:
    """All places of attached dictionaries, and the norms through which the states that they read are read."""
    for part in stream.attached.parts:
        reading = part.reading or _outside(stream, part)
        if reading is not None:
            yield reading
            yield from _others(stream, reading)
        yield from (place for place, _ in part.writings)
        for decoder in part.part.decoders:
            if decoder.writes:
                yield hook_point(decoder.writes, stream.model)
