"""Questions asked of one model, each once: the only thing that fills an atlas."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from virtual_weights.atlas import Atlas, task_key
from virtual_weights.atlas.blocks import BLOCKS, BlockStore
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.progress import Progress, Step, quiet, silent
from virtual_weights.record import Record
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Blocked, Composite, Question, Stream
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.provenance import fingerprint_of
from virtual_weights.stream.question import batched, subject_of
from virtual_weights.survey.executors import Executor, Here, executor_of

ENDS = ("port", "role_a", "role_b", "writer", "reader", "kind", "name", "vector")
"""Parameters by which questions of one kind are told apart: what they are about, not how it is computed."""


@contextmanager
def bars(shown: bool | Step | None = None) -> Generator[Step]:
    """Give what begins a step by name: a bar on stderr, with its percentage and the time left, until it is done.

    Args:
        shown: whether bars are drawn; None where they can be watched, on a terminal or in a notebook with ipywidgets.
            A step of the caller's own is given back as it is.
    """
    from rich import progress as rich  # here, since importing the package is cheap by promise
    from rich.console import Console

    console = Console(stderr=True, force_terminal=shown is True or None)
    watched = find_spec("ipywidgets") is not None if console.is_jupyter else sys.stderr.isatty()
    if callable(shown):
        yield shown
    elif not (watched if shown is None else shown):
        yield quiet
    else:
        columns = rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), rich.TaskProgressColumn()
        with rich.Progress(*columns, rich.TimeRemainingColumn(), console=console, transient=True) as display:

            def begin(name: str) -> Progress:
                for task in display.tasks:
                    display.update(task.id, visible=not (task.finished or task.total is None))
                step = display.add_task(name, total=None)
                return lambda done, total: display.update(step, completed=done, total=total, visible=True)

            yield begin


@final
class Survey:
    """Questions asked of one model and of one run of it: already known, read from the atlas, or computed now.

    Args:
        stream: the model.
        atlas: where answers are stored and looked up; None keeps them in memory.
        run: what questions of a run are asked of; None refuses them.
        step: begins a step of the progress by name.
        executor: who computes blocks: ``"local"``, ``"local:N"`` processes, ``"dask"``, ``"dask:tls://host:port"``.
        manner: values of cost fields (``device``, ``memory_mb``, ``batch``) and of ``compute_dtype`` for every question
            that has such a field, those that statements ask among them.

    Example:
        >>> survey = Survey(stream, run=Run.on_repeats(stream))  # doctest: +SKIP
        >>> survey.ask(Composition("K")), survey.ask(Ablation([("L16H0", "L18H6.K")]))  # doctest: +SKIP
    """

    def __init__(
        self,
        stream: Stream,
        atlas: Atlas | None = None,
        run: Run | None = None,
        step: Step = quiet,
        executor: str | Executor = "local",
        **manner: Any,
    ) -> None:
        self.stream, self.atlas, self.run, self.step = stream, atlas, run, step
        self.executor = executor_of(executor)
        if not isinstance(self.executor, Here) and not stream.source.files:
            raise UsageError(
                "a model in memory cannot be sent to other processes",
                expected="a checkpoint in files, which each of them opens",
                do="save the model and open the folder, or use the executor local",
            )
        self._manner = manner
        self._records: dict[str, Record] = {}
        self._expected: dict[Question[Any], float] = {}
        self._passed, self._whole, self._overall = 0.0, 0.0, silent

    def expect(self, seconds: Mapping[Question[Any], float]) -> None:
        """Show the progress of some questions together, by how long each is expected to take, as they are asked."""
        self._expected, self._passed, self._whole = dict(seconds), 0.0, sum(seconds.values())
        self._overall = self.step(f"the weights, about {self._whole:,.0f} s")

    def ask(self, question: Question[Any], subject: Run | None = None) -> Record:
        """The answer to one question, of another run than the survey's own where one is given.

        Raises:
            UsageError: it needs a run, and there is none.
        """
        return self.answers([question], subject)[0]

    def answers(self, questions: Sequence[Question[Any]], subject: Run | None = None) -> list[Record]:
        """The answers to several questions, in order; those that one pass serves are computed together."""
        adapted = self.adapted(questions)
        subjects = (subject or self.run, self.stream)
        keys = [self._key(question, subject_of(question, subjects)) for question in adapted]
        missing = {key: question for key, question in zip(keys, adapted, strict=True) if not self._known(key)}
        self._passed += sum(self._expected.pop(q, 0.0) for q in adapted if q not in missing.values())
        for batch in batched(missing.values()):
            self._compute(batch, subjects)
        return [self._records[key] for key in keys]

    def key(self, question: Question[Any], subject: Run | Stream) -> str:
        """The address of an answer: model, question, parameters and conventions; of a run its identity too."""
        return self._key_of(fingerprint_of(self.stream), question, subject)

    def moments(self, observation: Observation | None = None) -> Moments:
        """The averages of the survey's run, from the atlas or observed now; they are kept in a file beside the records.

        Raises:
            UsageError: there is no run.
        """
        observation = observation or Observation()
        run: Run = subject_of(observation, [self.run])
        key = self._key(observation, run)
        path = None if self.atlas is None else self.atlas.path / f"moments-{key[:16]}.safetensors"
        if path is not None and path.is_symlink():
            raise RecordError(f"{path} is a link", expected="a file in the atlas itself", do="remove the link")
        began = time.monotonic()
        if path is not None and path.exists():
            moments = Moments.load(path, self.stream)
        else:
            moments = observation.moments(run, self.step("observation"))
            if path is not None:
                moments.save(path)
        if not self._known(key):  # a run may have ended between the file and the record
            self._store(key, observation, observation.record(run, moments), time.monotonic() - began)
        return moments

    def _key(self, question: Question[Any], subject: Run | Stream) -> str:
        """The address of an answer; where nothing is stored, one that does not need the model's fingerprint."""
        return self._key_of("" if self.atlas is None else fingerprint_of(self.stream), question, subject)

    def _key_of(self, fingerprint: str, question: Question[Any], subject: Run | Stream) -> str:
        run = {"run": subject.identity} if isinstance(subject, Run) else {}
        conventions = {"norm": self.stream.norm_stamp, **run}
        return task_key(fingerprint, question.question, question.parameters, conventions)

    def adapted(self, questions: Iterable[Question[Any]]) -> list[Question[Any]]:
        """Questions with the survey's own cost fields and dtype, as they are asked."""
        return [self._adapted(question) for question in questions]

    def _adapted(self, question: Question[Any]) -> Question[Any]:
        """The question with the survey's own cost fields and dtype, which change no answer, or that of all alike."""
        names = {f.name for f in fields(question) if f.metadata.get("cost") or f.name == "compute_dtype"}  # pyright: ignore[reportArgumentType]
        manner = {name: value for name, value in self._manner.items() if name in names and value is not None}
        return replace(question, **manner) if manner else question  # pyright: ignore[reportArgumentType]

    def _known(self, key: str) -> bool:
        if key not in self._records and self.atlas is not None and self.atlas.finished(key):
            self._records[key] = self.atlas.get(key)
        return key in self._records

    def _compute(self, batch: Sequence[Question[Any]], subjects: Sequence[Any]) -> None:
        subject, began = subject_of(batch[0], subjects), time.monotonic()
        progress = self._within(self.step(_described(batch)), sum(self._expected.pop(q, 0.0) for q in batch))
        if isinstance(batch[0], Composite):
            ask = partial(self.answers, subject=subjects[0])
            answers = ((question, question(subject, progress, ask)) for question in batch)  # pyright: ignore[reportCallIssue]
        elif isinstance(batch[0], Blocked) and isinstance(subject, Stream):
            answers = self._from_blocks([q for q in batch if isinstance(q, Blocked)], progress)
        else:
            answers = type(batch[0]).together(batch, subject, progress)
        for question, record in answers:
            self._store(self._key(question, subject), question, record, time.monotonic() - began)
            began = time.monotonic()

    def _within(self, progress: Progress, seconds: float) -> Progress:
        """The progress of some questions, and of all that are expected."""
        if not seconds:
            return progress
        before = self._passed
        self._passed += seconds

        def both(done: float, total: float) -> None:
            progress(done, total)
            self._overall(before + seconds * done / (total or 1.0), self._whole)

        return both

    def _from_blocks(self, batch: Sequence[Blocked[Any]], progress: Progress) -> Iterator[tuple[Blocked[Any], Record]]:
        """Answers from blocks, those that an earlier run finished among them."""
        if self.atlas is None and isinstance(self.executor, Here):
            yield from type(batch[0]).together(batch, self.stream, progress)  # pyright: ignore[reportReturnType]
            return
        with ExitStack() as stack:
            folder = stack.enter_context(TemporaryDirectory()) if self.atlas is None else self.atlas.path / BLOCKS
            store = BlockStore(Path(folder))
            names = {basis: basis.blocks(self.stream) for basis in dict.fromkeys(q.basis for q in batch)}
            keys = {basis: self.key(basis, self.stream) for basis in names}
            answers = {basis: [self.key(q, self.stream) for q in batch if q.basis == basis] for basis in names}
            for basis, key in keys.items():
                store.begin(key, basis, names[basis], answers[basis])
            work = store.missing([(basis, name) for basis in names for name in names[basis]], keys)
            if work:
                self.executor.compute(work, self.stream, store, keys, progress)
            for question in batch:
                basis = question.basis
                yield question, question.answer(self.stream, (store.get(keys[basis], name) for name in names[basis]))
            for key in keys.values():
                store.drop(key)

    def _store(self, key: str, question: Question[Any], record: Record, seconds: float) -> None:
        if self.atlas is not None and question.stored and question.addressable:
            self.atlas.put(record, key=key, seconds=seconds)
        self._records[key] = record


def _described(batch: Sequence[Question[Any]]) -> str:
    """The name of a question, and by what it is told apart from another of its kind where it is alone."""
    name, parameters = batch[0].question, batch[0].parameters
    if len(batch) > 1:
        return name
    values = [str(parameters[key]) for key in ENDS if parameters.get(key) is not None]
    return " ".join([name, *values])
