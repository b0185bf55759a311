"""The same model on a turned stream: every reader and writer rotated, norm gains folded, ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.architecture import Row, stored_shape
from virtual_weights.architecture.config import references
from virtual_weights.checkpoint.writing import Planned
from virtual_weights.errors import ArchitectureError
from virtual_weights.linalg import accumulate, haar_orthogonal, random_generator
from virtual_weights.stream.effective import as_stored, norm_gain
from virtual_weights.stream.group import READINGS
from virtual_weights.stream.layout import packed
from virtual_weights.stream.norm import fold
from virtual_weights.stream.stream import Stream

_READS = frozenset(READINGS.values())
_WRITES: Mapping[str, int] = {"embed": 1, "pos": 1, "positions": 1, "o": 1, "down": 0, "bias": 0}
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
        self._refuse()
        rows = {self._name(row): row for row in self._rows}
        planned = {name: Planned(self._shape(row), partial(self._tensor, row)) for name, row in rows.items()}
        return self._divided(planned, rows)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All tensors in memory, float64, by transformers' names.

        Raises:
            ArchitectureError: a part of this model has no place in what transformers can load; it is named.
        """
        self._refuse()
        return {row.name: self._tensor(row) for row in self._rows}

    @cached_property
    def _rows(self) -> list[Row]:
        """The rows of transformers' table whose tensors the model has."""
        model = self.stream.model
        return [row for row in model.rows if all(model.has(role, row.groups[0]) for role in row.roles)]

    @property
    def changed(self) -> list[str]:
        """What is otherwise in this checkpoint than in its source, besides the basis."""
        changes = (
            ["norm gains are folded into the readers and are 1"] if self.fold and any(self.stream.spec.norms) else []
        )
        if self.stream.spec.centring:
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

    def _name(self, row: Row) -> str:
        """The source's own name where it is transformers' too, else what the table says."""
        name = self.stream.model.placements[row.roles[0], row.groups[0]].tensor
        # one tensor for both ends becomes two, whichever of the two names it had
        return name if self.stream.source.dialect == "hf" and name in (row.name, *row.others) else row.name

    def _shape(self, row: Row) -> tuple[int, ...]:
        shape = stored_shape(row.layout, self.stream.model.axes(row.groups[0]))
        if None in shape:  # only the tensor itself tells how many tokens or positions there are
            shape = tuple(self._tensor(row).shape)
        return tuple(int(n or 0) for n in shape)

    def _tensor(self, row: Row) -> Tensor:
        group = row.groups[0]
        return packed([self._role(role, group) for role in row.roles], row, self.stream.model.axes(group))

    def _role(self, role: str, group: str) -> Tensor:
        weight = as_stored(self.stream, role, group)
        assert weight is not None
        weight = weight.to(accumulate)
        if role in _READS:
            return self._read(weight, group) if self.fold else weight @ self._inverse
        if role in _WRITES:
            axis = _WRITES[role]
            return (weight.movedim(axis, -1) @ self.turn.T).movedim(-1, axis)
        if role == "norm":
            return torch.full_like(weight, 1 - self.stream.model.hf.values["plus"]) if self.fold else weight
        if role == "norm_bias":
            return torch.ones_like(weight) if self.fold else self.turn @ weight
        return weight

    def _read(self, weight: Tensor, group: str) -> Tensor:
        branch = self.stream.spec.branch(group)
        norm = self.stream.spec.head.norm if branch is None else branch.before
        gain, shift = norm_gain(self.stream, "norm", group, norm), self.stream.weight("norm_bias", group)
        turned = fold(weight, gain, norm, accumulate) @ self._inverse
        if shift is None:
            return turned
        return turned + (weight @ shift.to(accumulate))[..., None] / self.stream.d_model

    def _refuse(self) -> None:
        """Refuse what cannot be written: norms after parts that would have to be dense, tensors without a place."""
        model = self.stream.model
        gained = [f"{branch.id}.after" for branch in model.spec.branches if model.has("after", branch.id)]
        gained += ["embed"] if model.has("norm", "embed") else []
        if gained:
            raise ArchitectureError(
                f"{len(gained)} norms stand between a part and the stream, each with a gain: {', '.join(gained[:6])}",
                expected="norms before parts, whose gains can be folded into what reads",
                do="turn another model: on a turned stream such a gain is a dense map, which no norm holds",
            )
        if model.has("positions", "positions") and any(model.spec.norms[:-1]):
            raise ArchitectureError(
                "learned positions are added behind a norm, to what queries and keys read",
                expected="positions on the stream, or no norm before attention",
                do="turn another model: on a turned stream each layer would need positions of its own",
            )
        if self.stream.source.dialect == "gguf":
            missing = [row.name for row in model.rows if not all(model.has(role, row.groups[0]) for role in row.roles)]
            partly = [group.id for group in self.stream.groups.heads if group.rotary and group.rotary.apart]
            partly += [group.id for group in self.stream.groups.heads if "gguf_turned" in model.config]
            if missing or partly:
                raise ArchitectureError(
                    f"transformers' class needs {len(missing)} more tensors: {', '.join(missing[:6])}"
                    if missing
                    else f"{partly[0]} turns {model.config['gguf_turned']} dimensions of a head, not all",
                    expected="what the class of this type in transformers has",
                    do="start from the safetensors form of this model, which has its config.json",
                )
        written = {(role, group) for row in self._rows for group in row.groups for role in row.roles}
        rest = [place.tensor for key, place in model.placements.items() if key not in written]
        if rest:
            raise ArchitectureError(
                f"{len(rest)} tensors have no place in a checkpoint of transformers: {', '.join(sorted(rest)[:6])}",
                expected="tensors that the transformers table of this family has",
                do="turn the safetensors form of this model",
            )

    def _divided(self, planned: dict[str, Planned], rows: Mapping[str, Row]) -> list[dict[str, Planned]]:
        stored = self.stream.model.placements
        home = {name: i for i, names in enumerate(self.stream.source.at_rest.files) for name in names}
        files: dict[int, dict[str, Planned]] = {}
        for name, tensor in planned.items():
            row = rows[name]
            files.setdefault(home[stored[row.roles[0], row.groups[0]].tensor], {})[name] = tensor
        return [files[i] for i in sorted(files)]


def random_turn(stream: Stream, seed: int) -> Tensor:
    """A Haar-random Q for this model, (d, d) float64; with LayerNorm one that leaves (1, ..., 1) where it is."""
    generator = random_generator(seed)
    d = stream.d_model
    if not any(norm is not None and norm.kind == "layer" for norm in stream.spec.norms):
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
    model = turned.stream.model
    config = dict(source.config if source.dialect == "hf" else {**model.config, **model.sizes})
    size = references(model.hf.values["vocab"])[0]
    if config.get(size) is None:
        config[size] = source.tensors[turned.stream.model.placements["embed", "embed"].tensor].shape[0]
    if turned.unties or not spec.tied:
        config["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    return {**config, "dtype": str(dtype).removeprefix("torch.")}
