"""The same model on a turned stream: every reader and writer rotated, norm gains folded, ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import einops
import torch
from torch import Tensor

from virtual_weights.architecture import Row, config_for, stored_shape
from virtual_weights.checkpoint.writing import Planned
from virtual_weights.errors import ArchitectureError
from virtual_weights.linalg import accumulate, haar_orthogonal, random_generator
from virtual_weights.stream.group import READINGS
from virtual_weights.stream.norm import fold
from virtual_weights.stream.stream import Stream

_READS = frozenset(READINGS.values())
_WRITES: Mapping[str, int] = {"embed": 1, "pos": 1, "o": 1, "down": 0, "bias": 0}
"""Writers, and which of their canonical axes is the stream."""


@final
@dataclass(frozen=True, eq=False)
class Turned:
    """A stream seen from a turned basis, as tensors to be written.

    ``x -> Q x`` for an orthogonal Q: writers ``O -> Q O`` (embeddings, positions and biases too), readers
    ``R -> R diag(gamma) Q^T`` with gain ``gamma -> 1``. LayerNorm subtracts the mean in whatever basis it stands, so Q
    must leave ``(1, ..., 1)`` where it is: its stream turns in d - 1 dimensions. That direction, which no centred state
    has, then carries the shift into the readers without a division by the gain:
    ``R -> R diag(gamma) P Q^T + (R beta) 1^T / d`` and ``beta -> 1``. Folding the final gain unties an unembedding that
    was the embedding.

    Attributes:
        stream: the model.
        turn: Q, (d, d) float64; any other invertible matrix gives another model, as a test may want to show.
        fold: False leaves the gains in the norm, which also gives another model.
    """

    stream: Stream
    turn: Tensor
    fold: bool = True

    @property
    def files(self) -> list[dict[str, Planned]]:
        """Tensors to write under transformers' names, divided as the source divides them.

        Raises:
            ArchitectureError: a part of this model has no place in what transformers can load; it is named.
        """
        planned, places = dict[str, Planned](), dict[str, tuple[Row, str]]()
        for row in self.stream.model.hf.rows:
            for group in row.groups(self.stream.spec.n_layers):
                if all(self.stream.model.has(role, group) for role in row.roles):
                    name = self._name(row, group)
                    planned[name] = Planned(self._shape(row, group), partial(self._tensor, row, group))
                    places[name] = row, group
        self._refuse_the_rest({(role, group) for row, group in places.values() for role in row.roles})
        return self._divided(planned, places)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All tensors in memory, float64, by transformers' names.

        Raises:
            ArchitectureError: a part of this model has no place in what transformers can load; it is named.
        """
        rows = [(row, group) for row in self.stream.model.hf.rows for group in row.groups(self.stream.spec.n_layers)]
        rows = [(row, group) for row, group in rows if all(self.stream.model.has(role, group) for role in row.roles)]
        self._refuse_the_rest({(role, group) for row, group in rows for role in row.roles})
        return {self.stream.model.hf.spelled(row, group): self._tensor(row, group) for row, group in rows}

    @property
    def changed(self) -> list[str]:
        """What is otherwise in this checkpoint than in its source, besides the basis."""
        changes = ["norm gains are folded into the readers and are 1"] if self.fold else []
        if self.stream.spec.norm == "layer":
            changes.append("the direction (1, ..., 1) stays, the rest is turned; it carries norm shifts, which are 1")
        if self.unties:
            changes.append("the unembedding, tied to the embedding before, is a tensor of its own")
        return changes

    @property
    def unties(self) -> bool:
        """Whether the unembedding was the embedding, and can be no longer."""
        places = self.stream.model.placements
        return places.get(("unembed", "unembed")) == places.get(("embed", "embed"))

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.linalg.inv(self.turn)

    def _name(self, row: Row, group: str) -> str:
        """The source's own name where it is transformers' too, else what the table of that dialect says."""
        name = self.stream.model.placements[row.roles[0], group].tensor
        # one tensor for both ends becomes two, whichever of the two names it had
        borrowed = (row.roles == ("unembed",) and self.unties) or (row.roles == ("embed",) and row.name not in name)
        own = self.stream.source.dialect == "hf" and not borrowed
        return name if own else self.stream.model.hf.spelled(row, group)

    def _shape(self, row: Row, group: str) -> tuple[int, ...]:
        shape = stored_shape(row.layout, self.stream.spec.axes)
        if None in shape:  # only the tensor itself tells how many tokens or positions there are
            shape = tuple(self._tensor(row, group).shape)
        return tuple(int(n or 0) for n in shape)

    def _tensor(self, row: Row, group: str) -> Tensor:
        parts = [self._role(role, group) for role in row.roles]
        whole = parts[0] if len(parts) == 1 else torch.stack(parts)
        stored, canonical = (side.strip() for side in row.layout.split("->"))
        sizes = {n: size for n, size in self.stream.spec.axes.items() if size and n in canonical.split()}
        return einops.rearrange(whole, f"{canonical} -> {stored}", **sizes)

    def _role(self, role: str, group: str) -> Tensor:
        weight = self.stream.weight(role, group)
        assert weight is not None
        weight = weight.to(accumulate)
        if role in _READS:
            return self._read(weight, group) if self.fold else weight @ self._inverse
        if role in _WRITES:
            axis = _WRITES[role]
            return (weight.movedim(axis, -1) @ self.turn.T).movedim(-1, axis)
        if role == "norm":
            return torch.ones_like(weight) if self.fold else weight
        if role == "norm_bias":
            return torch.ones_like(weight) if self.fold else self.turn @ weight
        return weight

    def _read(self, weight: Tensor, group: str) -> Tensor:
        gain, shift = self.stream.weight("norm", group), self.stream.weight("norm_bias", group)
        assert gain is not None
        turned = fold(weight, gain, self.stream.spec.norm, accumulate) @ self._inverse
        if shift is None:
            return turned
        return turned + (weight @ shift.to(accumulate))[..., None] / self.stream.d_model

    def _refuse_the_rest(self, written: set[tuple[str, str]]) -> None:
        rest = [place.tensor for key, place in self.stream.model.placements.items() if key not in written]
        if rest:
            raise ArchitectureError(
                f"{len(rest)} tensors have no place in a checkpoint of transformers: {', '.join(sorted(rest)[:6])}",
                expected="tensors that the transformers table of this family has",
                do="turn the safetensors form of this model",
            )

    def _divided(self, planned: dict[str, Planned], places: Mapping[str, tuple[Row, str]]) -> list[dict[str, Planned]]:
        stored = self.stream.model.placements
        home = {name: i for i, names in enumerate(self.stream.source.at_rest.files) for name in names}
        files: dict[int, dict[str, Planned]] = {}
        for name, tensor in planned.items():
            row, group = places[name]
            files.setdefault(home[stored[row.roles[0], group].tensor], {})[name] = tensor
        return [files[i] for i in sorted(files)]


def random_turn(stream: Stream, seed: int) -> Tensor:
    """A Haar-random Q for this model, (d, d) float64; with LayerNorm one that leaves (1, ..., 1) where it is."""
    generator = random_generator(seed)
    d = stream.d_model
    if stream.spec.norm == "rms":
        return haar_orthogonal(d, generator)
    inner = haar_orthogonal(d - 1, generator)
    # a reflection that takes the first axis to (1, ..., 1)/sqrt(d): Q turns what is orthogonal to it
    axis = torch.full((d,), d**-0.5, dtype=accumulate)
    axis[0] -= 1.0
    mirror = torch.eye(d, dtype=accumulate) - 2 * torch.outer(axis, axis) / axis.square().sum()
    return mirror @ torch.block_diag(torch.ones(1, 1, dtype=accumulate), inner) @ mirror


def config_of(turned: Turned, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of the turned checkpoint: the source's own, or one made from a GGUF file's sizes.

    Raises:
        ArchitectureError: a GGUF file of a family whose configuration is not known.
    """
    source, spec = turned.stream.source, turned.stream.spec
    config = dict(source.config) if source.dialect == "hf" else config_for(turned.stream.model)
    context = source.config.get(f"{spec.model_type}.context_length")
    if source.dialect == "gguf" and spec.n_positions is None and context is not None:
        config["max_position_embeddings"] = context
    if config.get("vocab_size") is None:
        config["vocab_size"] = source.tensors[turned.stream.model.placements["embed", "embed"].tensor].shape[0]
    if turned.unties or not spec.tied:
        config["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    return {**config, "dtype": str(dtype).removeprefix("torch.")}
