"""A plan counts what a map will do, leaves no question out, and its progress ends where it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.linalg.gram_blocks import triangle
from virtual_weights.progress import Progress
from virtual_weights.survey import Part, Plan, map_model
from virtual_weights.survey.estimate import Effort, Machine, estimates

MACHINE = Machine(read=1e9, single=1e11, double=5e10, cubes=1e9, small=1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)  # pyright: ignore[reportCallIssue]
    return path


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_every_question_of_a_map_has_an_estimate(name: str) -> None:
    stream, plan = vw.open(tiny(name)), Plan()
    for part in Part:
        questions = plan.questions(part, stream)
        found = estimates(questions, stream, MACHINE)
        assert {q for estimate in found for q in estimate.questions} == set(questions)
        for estimate in found:
            assert estimate.effort.flops > 0 or estimate.effort.read > 0
            assert estimate.effort.blocks >= 1
            assert estimate.seconds > 0


def test_the_operations_of_pairs_are_counted(folder: Path) -> None:
    """Heads alone in one piece: as many Grams as heads on both sides, and all pairs of the piece."""
    stream = vw.open(folder)
    question = vw.Composition("K")
    (estimate,) = estimates([question], stream, MACHINE)
    heads, width = len(stream.heads), stream.groups.heads[0].width
    area = triangle(stream.d_model)
    grams, products = 2 * 2 * area * heads * width, 2 * area * heads**2
    assert estimate.effort.single == pytest.approx(3.2 * grams + 2.4 * products)


def test_memory_is_what_is_needed_and_no_more_than_is_allowed(folder: Path) -> None:
    stream = vw.open(folder)
    plenty, none = (estimates([vw.Composition("K", memory_mb=mb)], stream, MACHINE)[0] for mb in (10_000, 0))
    assert 0 < plenty.effort.memory < 2**20
    assert none.effort.memory == 0


def test_efforts_one_after_the_other_add_up_but_for_memory() -> None:
    both = Effort(2, single=3.0, memory=5.0) + Effort(1, single=1.0, memory=2.0)
    assert (both.blocks, both.single, both.memory) == (3, 4.0, 5.0)


def test_the_progress_of_a_map_ends_at_its_whole(folder: Path, tmp_path: Path) -> None:
    steps: dict[str, list[tuple[float, float]]] = {}

    def begin(name: str) -> Progress:
        return lambda done, total: steps.setdefault(name, []).append((done, total))

    map_model(folder, tmp_path / "atlas", plan=Plan((Part.composition, Part.bandwidth)), progress=begin)
    (whole,) = (calls for name, calls in steps.items() if name.startswith("the weights"))
    done = [call[0] for call in whole]
    assert done == sorted(done)
    assert whole[-1][0] == pytest.approx(whole[-1][1])
