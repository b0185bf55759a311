"""Who computes the blocks of an answer: this process, other processes on this machine, or machines under Dask."""

from __future__ import annotations

import os
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any, cast, final

import torch

from virtual_weights.atlas.blocks import BlockStore
from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.stream import Stream, Work

Keys = Mapping[Any, str]
"""The address of every question under which blocks are kept."""
_TASKS = 3  # for each worker: a task that takes long delays the end by a third at most
_TRIES = 3  # of a task whose worker died


class Executor(ABC):
    """Computes blocks and puts each into the store as soon as it is done."""

    @abstractmethod
    def compute(self, work: Work, stream: Stream, store: BlockStore, keys: Keys, progress: Progress = silent) -> None:
        """Compute all blocks of some questions of one class.

        Args:
            work: the blocks.
            stream: the model.
            store: where they are put.
            keys: the address of every question in ``work``.
            progress: called with (done, total).
        """


@final
class Here(Executor):
    """This process."""

    def compute(self, work: Work, stream: Stream, store: BlockStore, keys: Keys, progress: Progress = silent) -> None:
        for question, name, block in type(work[0][0]).compute(work, stream, progress):
            store.put(keys[question], name, block)


@final
@dataclass(frozen=True)
class Task:
    """Some blocks, for another process: everything that it needs to know.

    Attributes:
        stream: the model, pickled: a reference by which the checkpoint is opened again.
        work: the blocks.
        keys: as for ``Executor.compute``.
        folder: of the store, which all processes share.
        threads: on which it is computed; None leaves their number.
    """

    stream: bytes
    work: Work
    keys: Keys
    folder: str
    threads: int | None

    def __call__(self) -> int:
        """Compute what is not there yet; how many blocks were wanted."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        store = BlockStore(Path(self.folder))
        work = store.missing(self.work, self.keys)
        if work:
            Here().compute(work, _opened(self.stream), store, self.keys)
        return len(self.work)


@lru_cache(maxsize=2)
def _opened(stream: bytes) -> Stream:
    """The model, opened once in a process."""
    return pickle.loads(stream)  # noqa: S301 - from the process that started this one


def tasks(work: Work, stream: Stream, store: BlockStore, keys: Keys, workers: int, threads: int | None) -> list[Task]:
    """Blocks divided for some workers, neighbours together, and the memory of each question with them."""
    step = -(-len(work) // (workers * _TASKS))
    shared = [(_lean(question, workers), name) for question, name in work]
    pickled, folder = pickle.dumps(stream), str(store.folder.absolute())
    return [
        Task(pickled, part, {question: keys[question] for question, _ in part}, folder, threads)
        for part in (shared[start : start + step] for start in range(0, len(shared), step))
    ]


def _lean(question: Any, workers: int) -> Any:
    """The question with its share of the memory."""
    memory = getattr(question, "memory_mb", None)
    return question if memory is None else replace(question, memory_mb=max(16, memory // workers))


@final
class Processes(Executor):
    """Several processes on this machine, each with its share of memory and cores.

    They share nothing but the folder of the store, so that one that is killed, whenever that is, stops no other.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def compute(self, work: Work, stream: Stream, store: BlockStore, keys: Keys, progress: Progress = silent) -> None:
        """As the base says; what a worker that died did not finish is tried again.

        Raises:
            ResourceError: workers die again and again.
        """
        threads, done = max(1, torch.get_num_threads() // self.workers), 0
        for _ in range(_TRIES):
            total = done + len(work)
            for count in self._run(tasks(work, stream, store, keys, self.workers, threads)):
                done += count
                progress(done, total)
            work = store.missing(work, keys)
            if not work:
                return
        raise ResourceError(
            f"worker processes were killed {_TRIES} times",
            expected="enough memory for all workers together",
            do="give fewer workers or less --memory, and run the command again: finished blocks are kept",
        )

    def _run(self, parts: Sequence[Task]) -> Iterator[int]:
        """Run tasks in processes until each has ended; what every finished task gives."""
        context, workers = get_context("spawn"), dict[Any, Any]()
        try:
            for shares in (parts[first :: self.workers] for first in range(min(self.workers, len(parts)))):
                receiver, sender = context.Pipe(duplex=False)
                workers[receiver] = context.Process(target=_work, args=(shares, sender), daemon=True)
                workers[receiver].start()
                sender.close()  # so that the death of the only one who holds it ends what is received
            running = list(workers)
            while running:
                for receiver in wait(running):
                    try:
                        message = cast("Any", receiver).recv()
                    except EOFError:
                        running.remove(receiver)
                        continue
                    if isinstance(message, BaseException):
                        raise message
                    yield message
        finally:
            for worker in workers.values():
                worker.terminate()
                worker.join()


def _work(parts: Sequence[Task], sender: Connection) -> None:
    """What a worker does: it reports every task, or why it cannot go on."""
    signal(SIGINT, SIG_IGN)  # the process that started it says when to stop
    try:
        for part in parts:
            sender.send(part())
    except Exception as error:  # noqa: BLE001 - it is raised where the answer was asked for
        sender.send(error)


@final
class Dask(Executor):
    """Workers of Dask distributed: a cluster of our own on this machine, or one that is there already.

    Args:
        address: of a scheduler, ``tls://host:port``, or ``tcp://127.0.0.1:port`` on this machine; or a cluster as
            Dask has it, such as dask-jobqueue makes; None starts workers here, which are stopped with this process.
    """

    def __init__(self, address: Any = None) -> None:
        self.address = address
        if find_spec("distributed") is None:
            raise UsageError(
                "the executor dask needs Dask distributed, which is not installed",
                expected="the packages of the extra 'cluster'",
                do="pip install -c constraints.txt '.[cluster]' in a clone of this project",
            )
        if isinstance(address, str) and not address.startswith("tls://") and not _LOOPBACK.match(address):
            raise UsageError(
                f"the scheduler {address}",
                expected="tls://host:port, since Dask has no passwords, or tcp://127.0.0.1:port on this machine",
                do="start the scheduler with --protocol tls, see docs/scaling.md",
            )

    def compute(self, work: Work, stream: Stream, store: BlockStore, keys: Keys, progress: Progress = silent) -> None:
        """As the base says; what a worker that died did not finish goes to another.

        Raises:
            UsageError: there is no scheduler at the address.
        """
        from distributed import as_completed as completed

        with _client(self.address) as client:
            threads = None if self.address is not None else 1
            workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
            parts = tasks(work, stream, store, keys, workers, threads)
            futures = [client.submit(task, pure=False, retries=_TRIES) for task in parts]
            done = 0
            for future in completed(futures):
                done += future.result()
                progress(done, len(work))


_LOOPBACK = re.compile(r"(tcp://)?(127\.0\.0\.1|localhost|\[::1\]):\d+$")


@contextmanager
def _client(address: Any) -> Generator[Any]:
    """A client of a scheduler; of one on this machine alone where no address is given."""
    from dask.config import set as configured
    from distributed import Client, LocalCluster
    from distributed.security import Security

    nowhere = "127.0.0.1:0"  # a page that only this machine sees, at any port: without it Dask listens everywhere
    if address is None:
        with (
            configured({"distributed.worker.daemon": True}),
            LocalCluster(
                n_workers=max(1, (os.cpu_count() or 1)),
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=nowhere,
                worker_dashboard_address=nowhere,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        security = Security() if isinstance(address, str) and address.startswith("tls://") else None
        client = Client(address, security=security, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {address}: {error}",
            expected="a scheduler that runs, and for tls:// certificates in Dask's configuration",
            do="start it, and check the address and DASK_DISTRIBUTED__COMM__TLS__CA_FILE and its like",
        ) from error
    with client:
        yield client


def executor_of(name: str | Executor) -> Executor:
    """An executor by its name.

    Args:
        name: ``"local"``, ``"local:N"`` for N processes, ``"dask"``, or ``"dask:tls://host:port"``.

    Raises:
        UsageError: it is none of these, or Dask is not installed.
    """
    if isinstance(name, Executor):
        return name
    kind, _, rest = name.partition(":")
    if kind == "local" and (not rest or (rest.isdecimal() and 1 <= int(rest) <= _MOST_WORKERS)):
        return Here() if not rest else Processes(int(rest))
    if kind == "dask" and (rest or name == "dask"):
        return Dask(rest or None)
    raise UsageError(
        f"executor {name!r}",
        expected=f"local, local:N with N from 1 to {_MOST_WORKERS}, dask, or dask:tls://host:port",
        do="choose one of these",
    )


_MOST_WORKERS = 1024
