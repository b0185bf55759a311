"""Tokens in parts are the rows of the whole maps, folded alike."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPES, tiny

import virtual_weights as vw
from virtual_weights.stream.effective import token_parts


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parts_are_the_rows_of_the_whole(name: str, fold: bool) -> None:
    stream = vw.open(tiny(name), fold=fold)
    whole = {"embed": stream.write("embed")[0].T, "unembed": stream.read("unembed").maps[0]}
    for side in ("embed", "unembed"):
        parts = list(token_parts(stream, side, rows=7))
        assert max(map(len, parts)) == 7
        torch.testing.assert_close(torch.cat(parts), whole[side], rtol=1e-5, atol=1e-7)
