"""Every executor gives the same answers to the last bit, keeps finished blocks, and goes on where another stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.atlas.blocks import BLOCKS, BlockStore, at_work, holder_of
from virtual_weights.stream import Question, Stream
from virtual_weights.survey.executors import Executor, Here, Processes, executor_of

needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="Dask distributed is not installed")
EXECUTORS = ["local", "local:2", pytest.param("dask", marks=needs_dask)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def questions(stream: Stream) -> list[Question[Any]]:
    compositions = [vw.Composition(port, None, "all") for port in stream.groups.ports]
    return [*compositions, vw.Overlap("K"), vw.NeuronNeuron("up")]


def same(one: Sequence[vw.Record], other: Sequence[vw.Record]) -> bool:
    return all(
        torch.equal(torch.as_tensor(a[c.name]).nan_to_num(7.0), torch.as_tensor(b[c.name]).nan_to_num(7.0))
        for a, b in zip(one, other, strict=True)
        for c in a.columns
        if isinstance(a[c.name], torch.Tensor)
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[vw.Record]:
    stream = vw.open(folder)
    return [question(stream) for question in questions(stream)]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("stored", [True, False], ids=["atlas", "memory"])
def test_answers_are_the_same_to_the_last_bit(
    executor: str, stored: bool, folder: Path, expected: list[vw.Record], tmp_path: Path
) -> None:
    stream = vw.open(folder)
    atlas = vw.Atlas.create(tmp_path / "atlas", {"fingerprint": stream.source.fingerprint}) if stored else None
    survey = vw.Survey(stream, atlas, executor=executor)
    assert same(survey.answers(questions(stream)), expected)
    assert atlas is None or not list((atlas.path / BLOCKS).iterdir())


class Stopping(Executor):
    """Computes some blocks and then fails, as a full disk or a lost machine would make it."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def compute(self, work: Any, stream: Stream, store: BlockStore, keys: Any, progress: Any = None) -> None:
        for question, name in work:
            if not self.left:
                raise vw.ResourceError("stopped", expected="more", do="go on")
            self.left -= 1
            Here().compute([(question, name)], stream, store, keys)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_finished_blocks_are_kept_and_not_computed_again(
    executor: str, folder: Path, expected: list[vw.Record], tmp_path: Path
) -> None:
    stream = vw.open(folder)
    atlas = vw.Atlas.create(tmp_path / "atlas", {"fingerprint": stream.source.fingerprint})
    with pytest.raises(vw.ResourceError, match="stopped"):
        vw.Survey(stream, atlas, executor=Stopping(4)).answers(questions(stream))
    files = sorted((atlas.path / BLOCKS).glob("*/*.safetensors"))
    assert len(files) == 4
    # what lies there is used: a block that nobody would compute so
    store = BlockStore(atlas.path / BLOCKS)
    key, name = files[0].parent.name, files[0].name.removesuffix(".safetensors")
    block = dict(store.get(key, name))
    store.put(key, name, {**block, "products": block["products"] * 4.0})
    answers = vw.Survey(stream, atlas, executor=executor).answers(questions(stream))
    differing = [not same([a], [b]) for a, b in zip(answers, expected, strict=True)]
    assert sum(differing) == 1


@needs_dask
def test_a_cluster_of_our_own_listens_on_loopback_alone(folder: Path) -> None:
    import psutil  # comes with Dask

    heard: set[str] = set()
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error):
                    heard.update(c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN")
            stop.wait(0.05)

    watcher = threading.Thread(target=listen)
    watcher.start()
    try:
        vw.Survey(vw.open(folder), executor="dask").ask(vw.Composition("K"))
    finally:
        stop.set()
        watcher.join()
    assert heard == {"127.0.0.1"}


def test_a_worker_that_is_killed_loses_nothing(folder: Path, expected: list[vw.Record], tmp_path: Path) -> None:
    stream = vw.open(folder)
    atlas = vw.Atlas.create(tmp_path / "atlas", {"fingerprint": stream.source.fingerprint})
    killed: list[int] = []

    def kill_one() -> None:
        for _ in range(200):
            for worker in active_children():
                assert worker.pid is not None
                killed.append(worker.pid)
                worker.kill()
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    answers = vw.Survey(stream, atlas, executor=Processes(2)).answers(questions(stream)[:2])
    killer.join()
    assert killed
    assert same(answers, expected[:2])


@pytest.mark.parametrize("name", ["locals", "local:0", "local:x", "dask:tcp://10.0.0.1:8786", "dask:10.0.0.1:8786"])
def test_what_is_no_executor_is_refused(name: str) -> None:
    with pytest.raises(vw.UsageError, match="expected"):
        executor_of(name)


def test_a_model_in_memory_stays_in_this_process() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    assert vw.Survey(stream).ask(vw.Composition("K")).question == "composition"
    with pytest.raises(vw.UsageError, match="in memory"):
        vw.Survey(stream, executor="local:2")


def test_the_second_run_of_an_atlas_waits_and_says_for_whom(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom virtual_weights.atlas.blocks import at_work\n"
        "with at_work(Path(sys.argv[1]), print):\n    print('holds', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        assert str(other.pid) in str(holder_of(tmp_path))
        said: list[str] = []

        def told(text: str) -> None:
            said.append(text)
            os.kill(other.pid, signal.SIGKILL)

        with at_work(tmp_path, told):
            assert holder_of(tmp_path) is not None
    assert len(said) == 1
    assert said[0].startswith(f"process {other.pid} on ")
    assert "waiting until it is done" in said[0]
    assert holder_of(tmp_path) is None


def test_what_a_worker_cannot_do_is_said_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtual_weights.survey.executors._lean", lambda question, workers: question)
    with pytest.raises(vw.ResourceError, match="MiB for pairs of maps") as caught:
        vw.Survey(vw.open(folder), executor="local:2").ask(vw.Composition("K", memory_mb=0))
    assert "raise the memory budget" in caught.value.do


def test_what_a_killed_run_left_is_swept_when_its_answers_are_there(folder: Path, tmp_path: Path) -> None:
    stream = vw.open(folder)
    atlas = vw.Atlas.create(tmp_path / "atlas", {"fingerprint": stream.source.fingerprint})
    question = vw.Composition("K")
    survey = vw.Survey(stream, atlas)
    store, key = BlockStore(atlas.path / BLOCKS), survey.key(question, stream)
    store.begin(key, question, question.blocks(stream), [key])
    store.sweep(atlas.finished)
    assert (atlas.path / BLOCKS / key).is_dir()
    survey.ask(question)
    store.begin(key, question, question.blocks(stream), [key])
    store.sweep(atlas.finished)
    assert not (atlas.path / BLOCKS / key).exists()
