"""Dictionaries attached to a stream: their features as readers and writers at states of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from virtual_weights.architecture import Model
from virtual_weights.checkpoint.adapter import is_adapter
from virtual_weights.checkpoint.dictionaries import Decoder, Dictionary, DictionaryPart, open_dictionary, open_factors
from virtual_weights.errors import ArchitectureError, UsageError
from virtual_weights.stream.effective import Read, norm_gain, through_output
from virtual_weights.stream.group import Component, Group
from virtual_weights.stream.hook_points import HookPoint, hook_point
from virtual_weights.stream.names import Label
from virtual_weights.stream.norm import constant, fold

if TYPE_CHECKING:
    from virtual_weights.stream.stream import Stream

_REFERENCE = re.compile(r"(?:(?P<name>[A-Za-z][\w-]{0,63})=)?(?P<path>.+?)(?:@(?P<place>[\w.,]*))?")
_FACTORS = "factors"  # in place of a place: an adapter's factors, not folded into the weights
_TAKEN = ("embed", "pos", "unembed")
_ADDED_KINDS = ("vec",)  # whose decoders are added to a state, rather than reconstruct it


@final
@dataclass(frozen=True)
class Reference:
    """What a user attaches: ``[NAME=]PATH[@READS[,WRITES]]``, or ``PATH@factors`` of an adapter.

    Attributes:
        path: of the file or folder.
        name: of its features; None takes it from kind and layer.
        reads, writes: places, instead of those in the file.
        factors: whether an adapter's factors are readers and writers of their own.
    """

    path: Path
    name: str | None = None
    reads: str | None = None
    writes: str | None = None
    factors: bool = False

    def __str__(self) -> str:
        places = _FACTORS if self.factors else (self.reads or "") + (f",{self.writes}" if self.writes else "")
        name = "" if self.name is None else f"{self.name}="
        return f"{name}{self.path}{'@' if places else ''}{places}"

    @classmethod
    def of(cls, text: str | Path) -> Reference:
        """The parts of a reference; a path that is there may hold ``=`` and ``@`` itself."""
        whole = Path(text).expanduser()
        if whole.exists():
            return cls(whole.absolute())
        match = _REFERENCE.fullmatch(str(text))
        if match is None or match["place"] == "":
            raise UsageError(
                f"{str(text)!r} names nothing to attach",
                expected="a path, NAME=PATH, PATH@READS or PATH@READS,WRITES",
                do="write for example tc8=transcoder.safetensors@L8.mlp.normed,L8.mlp.added",
            )
        path = Path(match["path"]).expanduser().absolute()
        if match["place"] == _FACTORS:
            return cls(path, match["name"], factors=True)
        reads, _, writes = (match["place"] or "").partition(",")
        return cls(path, match["name"], reads or None, writes or None)


@final
@dataclass(frozen=True, eq=False, repr=False)
class AttachedPart:
    """The features of a dictionary that read one place, at their places in one model.

    Attributes:
        name: of the features, ``"tc8"``.
        part: encoder, decoders and activation.
        reading: the place that is read; None where it is no state of the stream.
        writings: the places that are written, in order of depth, each with its decoder.
    """

    name: str
    part: DictionaryPart
    reading: HookPoint | None
    writings: tuple[tuple[HookPoint, Decoder], ...]

    def __repr__(self) -> str:
        reads = "" if self.reading is None else f" reads {self.reading.text};"
        writes = ", ".join(place.text for place, _ in self.writings)
        return f"AttachedPart {self.name}: {self.part.features} features;{reads} writes {writes or 'nothing'}"

    @cached_property
    def group(self) -> Group:
        """Its features as a group of the stream."""
        reads = None if self.reading is None else self.reading.state
        writes = tuple(sorted({place.state for place, _ in self.writings}))
        component = Component(Label("dictionary", name=self.name), reads, writes[0] if writes else None)
        return Group(
            self.name,
            "dictionary",
            (component,),
            () if self.reading is None else ("enc",),
            reads,
            writes,
            self.part.features,
            None if self.reading is None else self.reading.norm,
        )

    def read(self, stream: Stream, rows: slice | None = None) -> Read:
        """Effective encoder rows (1, n, d) and constants (1, n): pre-activations are ``(R~ x) / s`` and the constant.

        Args:
            stream: the model.
            rows: which features; None for all.

        Raises:
            UsageError: it reads no state of the stream.
        """
        if self.reading is None or self.part.encoder is None:
            raise UsageError(
                f"{self.name} reads no state of the stream",
                expected="a dictionary whose encoder reads a state, raw or through a norm",
                do="ask about what it writes",
            )
        rows = rows or slice(0, self.part.features)
        maps = _checked(
            self.part.encoder(rows), (rows.stop - rows.start, stream.d_model), f"the encoder of {self.name}"
        )
        bias = None if self.part.bias is None else self.part.bias[rows]
        norm, site = self.reading.norm, self.reading.site
        if not stream.folded or norm is None:
            return Read(maps[None], None if bias is None else bias[None])
        gain = shift = None
        if self.reading.gained:
            gain, shift = norm_gain(stream, "norm", site, norm), stream.weight("norm_bias", site)
        received = constant(maps, shift, bias, stream.dtype)
        return Read(fold(maps, gain, norm, stream.dtype)[None], None if received is None else received[None])

    def write(self, stream: Stream, state: int | None = None, rows: slice | None = None) -> Tensor:
        """What features have written by a state, (1, d, n); each decoder counts once.

        Args:
            stream: the model.
            state: that somebody reads; None is the last one.
            rows: which features; None for all.

        Raises:
            UsageError: nothing is written by then.
        """
        decoders = [(place, decoder) for place, decoder in self.writings if state is None or place.state <= state]
        if not decoders:
            raise UsageError(
                f"{self.name} has written nothing to state {state}" if self.writings else f"{self.name} does not write",
                expected="a dictionary that adds to the stream before",
                do="name another writer; the decoder of what reconstructs a state writes nothing",
            )
        rows = rows or slice(0, self.part.features)
        maps = [self.written(stream, place, decoder.rows(rows)) for place, decoder in decoders]
        if len(maps) == 1:
            return maps[0][None]
        dtype = torch.promote_types(maps[0].dtype, stream.dtype)
        total = torch.zeros(maps[0].shape, dtype=dtype)
        for part in maps:
            total += part
        return total[None]

    def written(self, stream: Stream, place: HookPoint, rows: Tensor) -> Tensor:
        """Decoder rows (n, d') of one place as they enter the stream, (d, n), up to the scalar of a norm behind."""
        if place.what in ("output", "z"):
            assert place.branch is not None
            return through_output(stream, rows, place.branch.id, mixed=place.what == "z")
        return _checked(rows, (len(rows), stream.d_model), f"a decoder of {self.name}").T

    @property
    def stands_for_parts(self) -> bool:
        """Whether its activations say what it wrote: it reads a state, and stands for what parts of the model give.

        A steering vector on a state writes nothing that the model has; of the output of a part without its input
        nothing says what is active.
        """
        return self.reading is not None and bool(self.writings) and all(place.written for place, _ in self.writings)


@final
@dataclass(frozen=True, eq=False)
class Attached:
    """Everything that is attached to a stream, besides adapters that are folded into its weights.

    Attributes:
        references: how a user named it.
        dictionaries: as they lie on the disk.
        parts: their features, at places of the stream.
    """

    references: tuple[Reference, ...] = ()
    dictionaries: tuple[Dictionary, ...] = ()
    parts: tuple[AttachedPart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> AttachedPart:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, AttachedPart]:
        return {part.name: part for part in self.parts}

    @cached_property
    def identity(self) -> str:
        """A hex sha256 of content, settings, names and places, by which results with it are told apart."""
        content = [
            [[source.fingerprint for source in dictionary.sources], dictionary.settings]
            for dictionary in self.dictionaries
        ]
        places = [
            [part.name, part.reading and part.reading.text, [place.text for place, _ in part.writings]]
            for part in self.parts
        ]
        return sha256(json.dumps(["attached 1", content, places]).encode()).hexdigest()

    @property
    def raw(self) -> bool:
        """Whether something reads a state as it is, with whatever a norm would take away."""
        return any(part.reading is not None and part.reading.norm is None for part in self.parts)


def divided(attach: Iterable[str | Path]) -> tuple[list[Path], list[Reference]]:
    """Adapters to fold into the weights, and everything else."""
    wanted = [Reference.of(text) for text in attach]
    folded = [reference for reference in wanted if is_adapter(reference.path) and not reference.factors]
    return [reference.path for reference in folded], [reference for reference in wanted if reference not in folded]


def attached(model: Model, wanted: Iterable[Reference]) -> Attached:
    """Dictionaries at their places in a model.

    Raises:
        CheckpointError: a path is no dictionary that can be read.
        ArchitectureError: it does not fit the model.
        UsageError: a place is not named, or is none of the model; or two have one name.
    """
    references, dictionaries, parts = tuple(wanted), list[Dictionary](), list[AttachedPart]()
    for reference in references:
        dictionary = (open_factors if reference.factors else open_dictionary)(reference.path)
        dictionaries.append(dictionary)
        parts.extend(_placed(model, dictionary, reference))
    names = [part.name for part in parts]
    taken = next((name for name in names if name in _TAKEN), None)
    if taken is not None:
        raise UsageError(
            f"a dictionary called {taken}, as a part of the model is", expected="another name", do="write NAME=PATH"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two dictionaries are called {twice}",
            expected="one name each",
            do="name them: vw.open(model, attach=['early=PATH', 'late=PATH']), --attach early=PATH",
        )
    return Attached(references, tuple(dictionaries), tuple(parts))


def _placed(model: Model, dictionary: Dictionary, reference: Reference) -> Iterable[AttachedPart]:
    several = len(dictionary.parts) > 1
    if several and (reference.reads or reference.writes):
        raise UsageError(
            f"{dictionary.path!r} has {len(dictionary.parts)} parts, and one place was given",
            expected="places as the files have them",
            do="attach the parts one by one, or leave the place out",
        )
    for part in dictionary.parts:
        layer = "" if part.layer is None or (reference.name and not several) else str(part.layer)
        name = f"{reference.name or dictionary.kind}{layer}{part.tag}"
        yield _part(model, dictionary, part, reference, name)


def _part(model: Model, dictionary: Dictionary, part: DictionaryPart, reference: Reference, name: str) -> AttachedPart:
    reads = reference.reads or part.reads
    decoders = part.decoders
    if reference.writes or (reference.reads and dictionary.kind == "vec"):
        decoders = tuple(replace(decoder, writes=reference.writes or reference.reads) for decoder in decoders[:1])
    if dictionary.kind == "sae":  # it reconstructs what it reads
        decoders = tuple(replace(decoder, writes=reference.writes or reads or "") for decoder in decoders)
    silent_reads = part.encoder is not None and not reads
    if silent_reads or any(not decoder.writes for decoder in decoders):
        raise UsageError(
            f"{dictionary.path!r} does not say where it {'reads' if silent_reads else 'writes'}",
            expected="a place: L8.mlp.normed, L8.mlp.normalized, L8.begin, a hook's name or a state's number",
            do="name it behind the path: PATH@READS, or PATH@READS,WRITES",
        )
    place = hook_point(reads, model) if reads and part.encoder is not None else None
    writings = [(hook_point(decoder.writes, model), decoder) for decoder in decoders]
    adds = dictionary.kind in _ADDED_KINDS
    writings = [(p, decoder) for p, decoder in writings if p.written or (adds and p.what == "state")]
    writings.sort(key=lambda pair: pair[0].state)
    reading = None if place is None or place.written else place
    if reading is None and not writings:
        raise UsageError(
            f"{dictionary.path!r} neither reads a state of the stream nor adds to one",
            expected="an encoder on the stream, or decoders that are added to it",
            do="name the place that it reads behind the path: PATH@READS",
        )
    return AttachedPart(name, part, reading, tuple(writings))


def _checked(rows: Tensor, shape: tuple[int, int], what: str) -> Tensor:
    if tuple(rows.shape) != shape:
        raise ArchitectureError(
            f"{what} has vectors of {rows.shape[-1]} coordinates",
            expected=f"{shape[1]}, the width of this stream",
            do="attach it to the model that it was trained on",
        )
    return rows
