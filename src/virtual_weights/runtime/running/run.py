"""A run: a model and the tokens that it runs on, the second thing that a question can be asked of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.activations import vocabulary
from virtual_weights.runtime.running.model import ModuleRunner, Runner, Runs
from virtual_weights.runtime.running.text import (
    PADDING,
    beginning,
    chunks,
    is_token,
    padded,
    repeated_tokens,
    texts,
    title,
    token_ids,
    tokenizer_of,
    without_mark,
)
from virtual_weights.stream import Question, Stream

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A model, the tokens that it runs on, the first of them that counts, and how it is run.

    Make one with ``on_text``, ``on_repeats``, ``on_prompt``, ``on_pairs`` or ``on_tokens``. The model is loaded when
    something is first run; ``batch`` and the device are a matter of cost and change no answer beyond rounding.

    Attributes:
        stream: the model's weights.
        chunks: token ids, (T,) each; the context begins anew with each.
        first: the first token of a chunk whose prediction counts, at least 1: half the length where the second half
            repeats the first.
        text: what the tokens are, in words.
        runner: what runs them.
        batch: chunks that run at once.
        partners: of each chunk the tokens (T,) of its partner, from whose run a removal can take what writers write;
            () where chunks have none.
        bos: whether and where a token marks the beginning, in words.

    Raises:
        UsageError: there are no tokens, an id is not in the vocabulary, a chunk is longer than the model has positions,
            or ``first`` or ``batch`` is below 1.

    Example:
        >>> run = Run.on_repeats(stream, tokens=1024)  # doctest: +SKIP
        >>> Ablation([("L16H0", "L18H6.K")])(run)["effect_nats"]  # doctest: +SKIP
    """

    stream: Stream
    chunks: tuple[Tensor, ...]
    first: int
    text: str
    runner: Runner
    batch: int = 4
    partners: tuple[Tensor, ...] = ()
    bos: str = "as in the token ids"

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 80 else f"{self.text[:77]}..."
        return (
            f"Run of {self.stream.source.reference} on {text!r}\n"
            f"  {self.count} tokens in chunks: {len(self.chunks)}, the first that counts: {self.first}\n"
            "  ask it a question that runs the model, such as Ablation([(writer, reader)])(run)"
        )

    def __post_init__(self) -> None:
        if not self.count:
            raise UsageError(f"{self.text} has no tokens", expected="a text to run on", do="pass one that is not empty")
        if self.first < 1 or self.batch < 1:
            raise UsageError(
                f"first={self.first}, batch={self.batch}",
                expected="numbers >= 1",
                do="pass for example first=1, batch=4",
            )
        size, ids = vocabulary(self.stream), torch.cat((*self.chunks, *self.partners))
        wrong = ids[(ids < 0) | (ids >= size)]
        if len(wrong):
            raise UsageError(
                f"{self.text}: token ids {', '.join(map(str, wrong[:4].tolist()))}",
                expected=f"ids from 0 to {size - 1}, the rows of the model's embedding",
                do="correct them; if they come from the tokenizer, it is not this model's",
            )
        length, positions = max(map(len, self.chunks)), _positions(self.stream)
        if positions is not None and length > positions:
            raise UsageError(
                f"{self.text} of {length} tokens",
                expected=f"at most {positions}, as many as the model has positions",
                do="shorten it, or run it as a text, which is cut into chunks (--length)",
            )

    @classmethod
    def on_tokens(  # noqa: PLR0913 - how it is run, by keyword only
        cls,
        stream: Stream,
        tokens: Tensor | Iterable[Tensor],
        first: int = 1,
        text: str = "token ids",
        *,
        model: Runs = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch: int = 4,
    ) -> Run:
        """A run on token ids: (B, T) with ``PADDING`` after the end of shorter rows, or chunks (T,) each.

        Args:
            stream: the model.
            tokens: the ids.
            first: the first token of a chunk whose prediction counts.
            text: what the tokens are, in words.
            model: what runs: a loaded model, see ``load``, or another run's ``runner``; None loads the checkpoint.
            dtype: of the weights, where the checkpoint is loaded.
            device: any torch device, likewise.
            batch: chunks that run at once.
        """
        rows = list(tokens)
        for row in rows:
            if row.ndim != 1 or row.dtype not in _WHOLE:
                raise UsageError(
                    f"tokens of shape {tuple(row.shape)}, {row.dtype}",
                    expected="token ids (T,)",
                    do="pass a vector of whole numbers",
                )
        trimmed = tuple(row[is_token(row[None])[0]].long().cpu() for row in rows)
        runner = model if isinstance(model, Runner) else ModuleRunner(stream, model, dtype, device)
        return cls(stream, tuple(row for row in trimmed if len(row)), first, text, runner, batch)

    @classmethod
    def on_text(
        cls,
        stream: Stream,
        text: str | Path | None = None,
        tokens: int = 4096,
        length: int = 256,
        bos: bool | None = None,
        **how: Any,
    ) -> Run:
        """A run on a text, cut into chunks.

        Args:
            stream: the model.
            text: a file, a folder, ``"-"`` for standard input; None or ``"default"`` for the default text;
                ``"story"`` for a short story, which makes one chunk of 256 tokens or fewer.
            tokens: stop after so many.
            length: tokens of a chunk, at most the positions that the model has embeddings for.
            bos: True puts the model's token for the beginning of a sequence before every chunk, of whose length it is
                part; False puts no special token anywhere; None those that the tokenizer adds to a document.
            how: ``first``, ``model``, ``dtype``, ``device`` and ``batch``, as in ``on_tokens``. With ``first=2`` what
                is predicted at the first token of a chunk, to which many heads attend by default, does not count.

        Raises:
            UsageError: there is no such text, no tokenizer, or no token for the beginning where one is asked for.
        """
        documents = token_ids(texts(text), tokenizer_of(stream), bos is None)
        length, marks = _within(stream, length), beginning(stream)[None] if bos else None
        rows = chunks(documents, length, tokens, marks)
        return cls.on_tokens(stream, rows, text=title(text), **how)._marked(bos)

    @classmethod
    def on_repeats(cls, stream: Stream, tokens: int = 1024, length: int = 128, seed: int = 0, **how: Any) -> Run:
        """A run on random tokens of which the second half of a chunk repeats the first; that half counts.

        Args:
            stream: the model.
            tokens: how many at most, in whole chunks; where one chunk has more, the chunk is shortened.
            length: tokens of a chunk, an even number since both copies count, cut to the positions that the model has
                embeddings for.
            seed: of the tokens.
            how: ``model``, ``dtype``, ``device`` and ``batch``, as in ``on_tokens``.

        Raises:
            UsageError: the length is odd, or there is no room for a token and its repetition.
        """
        half = min(_within(stream, length), tokens) // 2
        if half < 1 or length % 2:
            raise UsageError(
                f"{tokens} repeated tokens in chunks of {length}",
                expected="chunks of an even length, since both copies count, and at least 2 tokens",
                do="pass for example length=128, tokens=1024 (--length, --tokens)",
            )
        rows = repeated_tokens(vocabulary(stream), half, tokens // (2 * half), seed)
        text = f"repeated random tokens (seed {seed}, {half} before the repeat)"
        return cls.on_tokens(stream, rows, half, text, **how)._marked(False)

    @classmethod
    def on_prompt(cls, stream: Stream, prompt: Prompt, bos: bool | None = None, **how: Any) -> Run:
        """A run on one prompt, a text (``bos`` as in ``on_text``) or token ids.

        Raises:
            UsageError: the ids are not in the vocabulary, or a text comes without a tokenizer.
        """
        run = cls.on_tokens(stream, [_prompt(stream, prompt, bos)], text="a prompt", **how)
        return run._marked(bos) if isinstance(prompt, str) else run

    @classmethod
    def on_pairs(
        cls,
        stream: Stream,
        clean: Sequence[Prompt],
        corrupted: Sequence[Prompt],
        bos: bool | None = None,
        **how: Any,
    ) -> Run:
        """A run on prompts, each with a partner that differs in what a removal should take away.

        With ``replacement="partner"`` an ablation puts what a writer writes in the partner's run, at the same place, in
        place of what it writes in its own (interchange, or resampling, from the partner).

        Args:
            stream: the model.
            clean: texts or token ids, all of one number of tokens.
            corrupted: their partners, in the same order, of the same number of tokens.
            bos: as in ``on_text``.
            how: ``first``, ``model``, ``dtype``, ``device`` and ``batch``, as in ``on_tokens``.

        Raises:
            UsageError: there are no pairs, there are more of one than of the other, some are texts and some token
                ids, prompts differ in their number of tokens, or as ``on_prompt``.
        """
        if len({isinstance(prompt, str) for prompt in (*clean, *corrupted)}) > 1:
            raise UsageError("texts and token ids among the prompts", expected="all of one kind", do="choose one")
        rows, partners = ([_prompt(stream, prompt, bos) for prompt in prompts] for prompts in (clean, corrupted))
        if not rows or len(rows) != len(partners):
            raise UsageError(
                f"{len(rows)} clean prompts and {len(partners)} corrupted ones",
                expected="a corrupted prompt for each clean one",
                do="pass two lists of the same length",
            )
        for i, (row, partner) in enumerate(zip(rows, partners, strict=True)):
            if not len(row) == len(partner) == len(rows[0]):
                raise UsageError(
                    f"pair {i + 1} has {len(row)} and {len(partner)} tokens, and the first prompt {len(rows[0])}",
                    expected="the same number of tokens in all prompts, so that places correspond",
                    do="choose words of as many tokens, or run pairs of different lengths apart",
                )
        run, others = (cls.on_tokens(stream, x, text="pairs of prompts", **how) for x in (rows, partners))
        run = replace(run, partners=others.chunks)
        return run._marked(bos) if isinstance(clean[0], str) else run

    @property
    def module(self) -> nn.Module:
        """The module that runs, loaded now if it was not yet."""
        return self.runner.module

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.module.parameters()).device

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return sum(map(len, self.chunks))

    @property
    def identity(self) -> str:
        """A hex sha256 of the tokens, their division into chunks, the first that counts and the dtype of the run."""
        digest = sha256(f"{self.runner.precision} {self.first}".encode())
        for chunk in (*self.chunks, *self.partners):
            digest.update(f" {chunk.tolist()}".encode())
        return digest.hexdigest()

    def _marked(self, bos: bool | None) -> Run:
        """The same run, whose stamp says which special tokens there are."""
        words = {True: "before every chunk", False: "none", None: "as the tokenizer adds it to a document"}
        return replace(self, bos=words[bos])

    def batches(self) -> Iterator[Tensor]:
        """The chunks ``batch`` at a time, (B, T) each, shorter ones ending in ``PADDING``."""
        return padded(self.chunks, self.batch)

    def sequences(self, most: int | None = None, partners: bool = False) -> Tensor:
        """The first whole chunks, those of the greatest length, (sequences, tokens), on the device; or their partners.

        Raises:
            UsageError: they hold no token whose prediction counts, or have no partners.
        """
        if partners and not self.partners:
            raise UsageError(
                f"a run on {self.text}, whose sequences have no partners",
                expected="pairs of clean and corrupted prompts",
                do="make the run with Run.on_pairs (--pairs), or replace by the mean or by resampling",
            )
        length = max(map(len, self.chunks))
        if not self.first < length:
            raise UsageError(
                f"chunks of {length} tokens, of which the first {self.first} do not count",
                expected=f"chunks of more than {self.first} tokens",
                do="pass longer chunks, or count from an earlier token",
            )
        whole = [chunk for chunk in (self.partners if partners else self.chunks) if len(chunk) == length]
        return torch.stack(whole[:most]).to(self.device)

    def prompt(self, most: int | None = None) -> Run:
        """The first chunk alone, or its first tokens."""
        return replace(self, **{name: tuple(row[:most] for row in rows[:1]) for name, rows in self._rows().items()})

    def shortened(self, length: int) -> Run:
        """The same run with shorter chunks: as much before the first token that counts as fits into half, then on."""
        before = min(self.first, max(1, length // 2))
        cut = {
            name: tuple(torch.cat([c[:before], c[self.first : self.first + length - before]]) for c in rows)
            for name, rows in self._rows().items()
        }
        return replace(self, **cut, first=before)

    def halves(self) -> tuple[Run, Run]:
        """The earlier and the later half of the chunks, as runs of their own.

        Raises:
            UsageError: there is one chunk.
        """
        middle, rows = (len(self.chunks) + 1) // 2, self._rows()
        earlier, later = ({name: x[part] for name, x in rows.items()} for part in (slice(middle), slice(middle, None)))
        return (
            replace(self, **earlier, text=f"{self.text}, first half"),
            replace(self, **later, text=f"{self.text}, second half"),
        )

    def _rows(self) -> dict[str, Any]:
        """The fields that hold token ids."""
        return {"chunks": self.chunks, "partners": self.partners}

    def record(self, question: Question[Any], axes: Iterable[Axis], columns: Iterable[Column], **stamp: Any) -> Record:
        """An answer about this run: as ``Stream.record``, with what runs in the stamp.

        That is the text, how many tokens it has, which of a chunk is the first that counts (``first``), whether a token
        marks the beginning (``bos``), and the identity of the run.

        The provenance says how far what ran was from what the maps say, see ``exactness``.
        """
        stamp = {"first": self.first, "bos": self.bos, "run": self.identity, **stamp}
        stamp = {"text": self.text, "tokens": self.count, **stamp}
        record = self.stream.record(question, axes, columns, **stamp)
        return replace(record, provenance={**record.provenance, "exactness_error": self.runner.exactness_error})


Prompt = str | Sequence[int] | Tensor
"""A text, or token ids."""


def _prompt(stream: Stream, prompt: Prompt, bos: bool | None = None) -> Tensor:
    """The token ids of a prompt, (T,)."""
    if isinstance(prompt, str):
        (ids,) = token_ids([without_mark(prompt)], tokenizer_of(stream), bos is None)
        return torch.cat([beginning(stream)[None], ids]) if bos else ids
    if bos is not None:
        raise UsageError(
            f"token ids with bos={bos}", expected="a text, to which special tokens can be added", do="leave bos out"
        )
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"a prompt that is no row of token ids: {error}", expected="whole numbers", do="pass such"
        ) from error
    if ids.ndim != 1:
        raise UsageError(f"a prompt of shape {tuple(ids.shape)}", expected="token ids (T,)", do="pass a row of them")
    if bool((ids == PADDING).any()):
        raise UsageError(f"a prompt: token ids {PADDING}", expected="ids from 0", do="correct them")
    return ids


def _positions(stream: Stream) -> int | None:
    """How many positions the model has embeddings, or rotary frequencies, for; None where it has no such bound."""
    places, spec = stream.model.placements, stream.spec
    place = places.get(("pos", "pos"), places.get(("positions", "positions")))
    bounds = [part.rotary.longest for part in spec.attentions if part.rotary and part.rotary.longest]
    bounds += [stream.source.tensors[place.tensor].shape[0] - spec.unnumbered] if place else []
    bounds += [spec.n_positions] if spec.sinusoidal and spec.n_positions else []
    return min(bounds, default=None)


def _within(stream: Stream, length: int) -> int:
    """A length of chunks that the model has positions for."""
    positions = _positions(stream)
    return length if positions is None else min(length, positions)
