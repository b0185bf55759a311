"""A checkpoint with an adapter folded into it: ``W + scale B A`` wherever a weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from virtual_weights.architecture import Model, Placement, Row, stored_shape
from virtual_weights.architecture.describe import rows_of
from virtual_weights.checkpoint import Source
from virtual_weights.checkpoint.adapter import Adapter
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.source import AtRest
from virtual_weights.errors import ArchitectureError, UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.stream.layout import packed, unpacked

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@final
class AdaptedSource(Source):
    """A source whose tensors contain what an adapter adds; the sum is taken in float64 and comes in float32 at least.

    The adapter names modules of transformers. Whatever the base's own names and layouts are (a GGUF file, fused
    projections), what is added goes to the same weights there.

    Args:
        base: the checkpoint that the adapter was trained on.
        model: which tensor of the base plays which role.
        adapter: what is added.

    Raises:
        ArchitectureError: the adapter names a module that this model has not, or factors of another shape.
    """

    def __init__(self, base: Source, model: Model, adapter: Adapter) -> None:
        super().__init__(
            f"{base.reference} + {adapter.folder}", base.dialect, base.config, base.tensors, allow_non_finite=True
        )
        self._base, self._model, self._adapter = base, model, adapter
        rows = ((name, row) for row in reversed(model.rows) for name in (*row.others, row.name))
        modules = {name.removesuffix(".weight"): row for name, row in rows}
        self._rows = {module: self._row(modules, module) for module in adapter.modules}
        self._added = self._places()

    @property
    def recipe(self) -> dict[str, Any]:
        base = self._base.recipe
        return {**base, "attach": [*base.get("attach", []), str(self._adapter.folder)]}

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        return (*self._base.files, *self._adapter.weights.files) if self._base.files else ()

    @property
    def at_rest(self) -> AtRest:
        return self._base.at_rest

    @property
    def fingerprint(self) -> str:
        return self._joined(self._base.fingerprint)

    def identify(self, progress: Progress = silent) -> str:
        return self._joined(self._base.identify(progress))

    def token_texts(self) -> tuple[str, ...] | None:
        return self._base.token_texts()

    def tokenizer(self) -> Tokenizer | None:
        return self._base.tokenizer()

    def _joined(self, base: str) -> str:
        return sha256(json.dumps(["adapted 1", base, self._adapter.fingerprint]).encode()).hexdigest()

    def _read(self, name: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        rows = slice(first_row, first_row + shape[0]) if shape else None
        weight = self._base.read(name, rows)
        row = self._added.get(name)
        if row is None:
            return weight
        added = self._delta(row, rows or slice(None))
        return (weight.to(accumulate) + added).to(torch.promote_types(weight.dtype, torch.float32))

    def _stored_bytes(self, name: str, begin: int, end: int) -> bytes:
        raise UsageError(
            f"{name}, bytes {begin} to {end}, of {self.reference} lies nowhere as it is read",
            expected="a checkpoint without an adapter",
            do="merge the adapter into its base to have its bytes",
        )

    def _places(self) -> dict[str, Row]:
        """The rows of the base's own tensors to which something is added."""
        wanted = {(role, group) for row in self._rows.values() for group in row.groups for role in row.roles}
        own = dict[str, Row]()
        for row in rows_of(self._model.entry, self._model.config, self._model.spec):
            keys = [(role, group) for group in row.groups for role in row.roles]
            if wanted & set(keys):
                placed = [self._model.placements[key] for key in keys if key in self._model.placements]
                own |= {place.tensor: row for place in placed}
                wanted -= set(keys)
        return own

    def _delta(self, row: Row, some: slice) -> Tensor:
        """What is added to some rows of a stored tensor, in its own layout."""
        module = next((module for module, other in self._rows.items() if other == row), None)
        if module is not None:  # stored as transformers does: no more is multiplied than is asked for
            left, right = self._adapter.factors(module)
            return left[some] @ right
        group = row.groups[0]
        return packed([self._role(role, group) for role in row.roles], row, self._model.axes(group))[some]

    def _role(self, role: str, group: str) -> Tensor:
        """What is added to one role, in canonical axes."""
        axes = self._model.axes(group)
        for module, row in self._rows.items():
            if role in row.roles and group in row.groups:
                left, right = self._adapter.factors(module)
                return unpacked(left @ right, Placement(row.name, row.layout, row.slot(role)), axes)
        place = self._model.placements[role, group]  # beside an adapted one in a fused tensor
        return torch.zeros_like(unpacked(self._base.read(place.tensor), place, axes), dtype=accumulate)

    def _row(self, rows: Mapping[str, Row], module: str) -> Row:
        """The row of the tensor that is a module's weight."""
        where, row = str(self._adapter.folder), rows.get(module)
        if row is None:
            raise ArchitectureError(
                f"the adapter {where!r} changes {module}, which this model has not",
                expected=f"a module such as {next(name for name, row in rows.items() if row.roles[0] in 'qo')}",
                do="open the base that the adapter was trained on, which its base_model_name_or_path names",
            )
        ends = {("embed", "embed"), ("unembed", "unembed")}
        if self._model.spec.tied and ends & {(role, group) for role in row.roles for group in row.groups}:
            raise ArchitectureError(
                f"the adapter {where!r} changes {module}, which is embedding and unembedding at once",
                expected="an adapter of attentions and MLPs, where both ends are one tensor",
                do="merge it by peft and open the merged model",
            )
        shape, given = stored_shape(row.layout, self._model.axes(row.groups[0])), self._adapter.shape(module)
        if any(size is not None and size != n for size, n in zip(shape, given, strict=False)):
            raise ArchitectureError(
                f"the adapter {where!r} adds a map of shape {given} to {module}, whose weight is {shape}",
                expected="factors that fit, transposed where fan_in_fan_out says so",
                do="open the base that the adapter was trained on, which its base_model_name_or_path names",
            )
        return row


def adapted(source: Source, model: Model, paths: Iterable[str | Path]) -> Source:
    """A source with adapters folded in, one after the other.

    Raises:
        CheckpointError: a path is no adapter that peft wrote.
        ArchitectureError: an adapter does not fit the model.
    """
    for path in paths:
        source = AdaptedSource(source, model, Adapter(path))
    return source
