"""Every question and every statement answers on models of every kind: norms after parts, on queries and keys, caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.checkpoints import build, flavours
from every_question import KINDS, TOKENS, Subject, questions

import virtual_weights as vw

TYPES = ("gemma2", "gemma3_text", "olmo2", "bitnet", "nanochat", "bloom")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=TYPES)
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    model: Any = build(request.param, flavours(request.param)[0], folder / request.param)
    assert int(TOKENS.max()) < model.config.vocab_size
    return Subject(model.double())


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_answers(kind: str, subject: Subject) -> None:
    for question in questions(subject)[kind]:
        for record in subject.answers(question):
            assert isinstance(record, vw.Record), question
            values = [column.values for column in record.columns if isinstance(column.values, torch.Tensor)]
            assert all(not bool(x.double().isinf().any()) for x in values), question
