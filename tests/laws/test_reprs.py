"""What a person sees of an object: a few lines that say what it is."""

from __future__ import annotations

import pytest
import torch

from virtual_weights.linalg import Dense, Identity, Subspace
from virtual_weights.stream.views import Mlp

MAP = Dense(torch.ones(3, 500))
SHOWN = {
    "Dense (3, 500)": MAP,
    "Product (500, 500) = (500, 3) @ (3, 500)": MAP.T @ MAP,
    "Identity (4, 4)": Identity(4),
    "Subspace of rank 2 in R^5": Subspace(torch.eye(5)[:, :2]),
    "Mlp L0.mlp: 3 neurons on a stream of 500": Mlp("L0.mlp", MAP, None, MAP.T, None, None),
}


@pytest.mark.parametrize("start", SHOWN)
def test_a_repr_is_short_and_says_what_it_is(start: str):
    text = repr(SHOWN[start])
    assert text.startswith(start)
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) <= 120
