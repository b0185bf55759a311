"""What every question has: a name, parameters as plain values, and an answer for what it is asked of."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from hashlib import sha256
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Record

Subject = TypeVar("Subject")
Default = TypeVar("Default")


def cost(default: Default) -> Default:
    """A field that only costs time or memory (a device, a budget, a batch size): in no key, and in no comparison."""
    return field(default=default, compare=False, metadata={"cost": True})


class Question(ABC, Generic[Subject]):
    """A frozen dataclass of parameters that answers with a Record: a command's options, a task, a key in an atlas.

    ``Question[Stream]`` is asked of a model's weights, ``Question[Run]`` of a model that runs on tokens.

    Attributes:
        question: its name, in records and in an atlas.
        subject: the type that it is asked of, taken from the brackets.
        stored: whether an atlas keeps the answer; False where it is put together from stored answers at no cost.
    """

    question: ClassVar[str]
    subject: ClassVar[Any]
    stored: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        for base in getattr(cls, "__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, Question) and not isinstance(get_args(base)[0], TypeVar):
                cls.subject = get_args(base)[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """What the answer depends on, as plain values: the key, the record and the caption."""
        described = [f for f in fields(self) if not f.metadata.get("cost")]  # pyright: ignore[reportArgumentType]
        return {f.name: plain(getattr(self, f.name)) for f in described}

    @property
    def addressable(self) -> bool:
        """Whether its parameters name the answer for other processes too, so that an atlas can keep it."""
        return all(_source(getattr(self, f.name)) is not None for f in fields(self))  # pyright: ignore[reportArgumentType]

    @abstractmethod
    def __call__(self, subject: Subject, progress: Progress = silent) -> Record:
        """The answer.

        Args:
            subject: what is asked.
            progress: called with (done, total).
        """

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """Answer several questions of this class; where one pass over the subject serves them all, it is one pass."""
        for question in questions:
            yield question, question(subject, progress)


Ask = Callable[[Sequence[Question[Any]]], list[Record]]
"""Questions to their answers, in order; whoever answers may know some already."""


class Composite(Question[Subject]):
    """A question whose answer is put together from answers to other questions."""

    @abstractmethod
    def __call__(self, subject: Subject, progress: Progress = silent, ask: Ask | None = None) -> Record:
        """The answer.

        Args:
            subject: what is asked.
            progress: called with (done, total).
            ask: answers the other questions, for example from an atlas; None asks the subject.
        """


Work = Sequence[tuple[Any, str]]
"""Blocks to compute: the question under which each is kept, and its name."""
Block = Mapping[str, Tensor]
"""What was computed of one block."""


class Blocked(Question[Subject]):
    """A question about very many pairs, answered block by block.

    A block is a pure function of subject, question and name. Subject and question fix the blocks; what else is computed
    beside one, by whom, on how many threads and within which memory changes no bit of it.
    """

    @property
    def basis(self) -> Blocked[Subject]:
        """The question under which the blocks are kept: one that several share, or this one."""
        return self

    @abstractmethod
    def blocks(self, subject: Subject) -> tuple[str, ...]:
        """The names of the blocks, which can be names of files, in the order in which ``answer`` takes them."""

    @classmethod
    @abstractmethod
    def compute(cls, work: Work, subject: Any, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """Some blocks, each as soon as it is done, in any order.

        Args:
            work: the blocks; their questions are of this class, and each is its own basis.
            subject: what is asked.
            progress: called with (done, total).
        """

    @abstractmethod
    def answer(self, subject: Subject, blocks: Iterable[Block]) -> Record:
        """The answer, put together from all blocks in their order."""

    def __call__(self, subject: Subject, progress: Progress = silent) -> Record:
        """The answer, from blocks that are computed here and now."""
        ((_, record),) = self.together([self], subject, progress)
        return record

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """Answer several questions of this class, whose blocks are computed together."""
        asked = [question for question in questions if isinstance(question, Blocked)]
        bases = dict.fromkeys(question.basis for question in asked)
        work = [(basis, name) for basis in bases for name in basis.blocks(subject)]
        done = {(basis, name): block for basis, name, block in cls.compute(work, subject, progress)}
        for question in asked:
            basis = question.basis
            yield question, question.answer(subject, [done[basis, name] for name in basis.blocks(subject)])


def plain(value: Any) -> Any:
    """A parameter as JSON can hold it: sequences as lists, and whatever has an ``identity`` by that.

    A function goes by its qualified name and a digest of its source; what it takes from outside itself is no part of
    that. One whose source cannot be had, or does not say all (a lambda, a closure, a partial), gets a number that means
    nothing to other processes.
    """
    if isinstance(value, tuple | list | range):
        return [plain(entry) for entry in value]
    source = _source(value)
    if source == "":
        return getattr(value, "identity", value)
    name = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if source is None:
        return f"{name}, number {_UNNAMED.setdefault(value, len(_UNNAMED) + 1)} of this process"
    return f"{name}, sha256 {sha256(source.encode()).hexdigest()[:16]}"


_UNNAMED: dict[Any, int] = {}
"""Functions that nothing but this process can name; they stay alive, so that no other takes their number."""


def _source(value: Any) -> str | None:
    """The text that says what a function does; None where there is none, "" for what needs none."""
    if not callable(value) or getattr(value, "identity", None) is not None:
        return ""
    if not inspect.isfunction(value) or value.__closure__ or value.__name__ == "<lambda>":
        return None
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return None


def subject_of(question: Question[Any], subjects: Iterable[Any]) -> Any:
    """The first of some subjects that a question can be asked of.

    Raises:
        UsageError: it can be asked of none of them.
    """
    for subject in subjects:
        if isinstance(subject, question.subject):
            return subject
    raise UsageError(
        f"{question.question} cannot be asked without a {question.subject.__name__}",
        expected=f"a {question.subject.__name__}: a model together with the tokens that it runs on",
        do="make one, for example Run.on_repeats(stream), and pass it as run",
    )


def asking(*subjects: Any, progress: Progress = silent) -> Ask:
    """Ask subjects directly, each question at most once; the first subject that fits a question answers it."""
    records: dict[Question[Any], Record] = {}

    def ask(questions: Sequence[Question[Any]]) -> list[Record]:
        for batch in batched(question for question in questions if question not in records):
            records.update(type(batch[0]).together(batch, subject_of(batch[0], subjects), progress))
        return [records[question] for question in questions]

    return ask


def batched(questions: Iterable[Question[Any]]) -> list[list[Question[Any]]]:
    """Questions divided into those that are answered together, each question once."""
    batches: dict[Any, list[Question[Any]]] = {}
    for question in dict.fromkeys(questions):
        if isinstance(question, Blocked):
            batches.setdefault(type(question.basis), []).append(question)
            continue
        together = type(question).together.__func__  # pyright: ignore[reportFunctionMemberAccess]
        alone = together is Question.together.__func__  # pyright: ignore[reportFunctionMemberAccess]
        batches.setdefault(question if alone else together, []).append(question)
    return list(batches.values())
