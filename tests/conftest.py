"""What every test shares: one thread per worker, and Hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tiny_models import norms_in_full_precision, tiny

torch.set_num_threads(1)  # two workers on two cores: more threads only wait for each other
os.environ.pop("COLUMNS", None)  # output in a pipe is as wide as it likes, but workers name a width
settings.register_profile("patient", deadline=None, max_examples=25)
settings.load_profile("patient")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads share keys and values, as a checkpoint; modules with needs of their own make another."""
    path = tmp_path_factory.mktemp("model")
    model: Any = tiny("llama-grouped-untied")
    model.save_pretrained(path)
    return path


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers takes softmax and RMSNorm in float32 whatever it is given: too coarse for small differences."""
    own = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: own(x, dim=dim))
    with norms_in_full_precision():
        yield
