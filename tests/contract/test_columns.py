"""Every column of every answer says what it is and in what unit, and verbs know the columns before they compute."""

from __future__ import annotations

import pytest
import torch
from every_question import KINDS, Subject, questions
from research_models import research
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli.composition import columns


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny("llama-grouped-untied", seed=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def bare() -> Subject:
    """Attention alone, without norms."""
    return Subject(*research("attention-only", dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_a_meaning_and_numbers_a_unit(subject: Subject, bare: Subject, kind: str) -> None:
    silent = [
        f"{answer.question}.{column.name}"
        for subject in (subject, bare)
        for question in questions(subject)[kind]
        for answer in subject.answers(question)
        for column in answer.columns
        if not column.meaning or (isinstance(column.values, torch.Tensor) and not column.unit)
    ]
    assert not silent


@pytest.mark.parametrize("port", ["Q", "K", "V", "up", "unembed"])
def test_composition_knows_its_columns(subject: Subject, port: str) -> None:
    composition = vw.Composition(port, None, "all")(subject.stream)
    contribution = vw.Contribution(port, subject.moments, False, "all")(subject.stream)
    names = [column.name for column in composition.columns]
    assert columns(port, observed=False) == tuple(names)
    assert columns(port, observed=True) == (*names, *(column.name for column in contribution.columns))
