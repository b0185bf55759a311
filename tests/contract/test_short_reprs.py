"""What a person sees of an object in a shell: what it is, in at most a dozen lines of at most 120 columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.linalg import Dense, MapStack
from virtual_weights.record import Axis, Column, Record

MODEL = tiny("llama-grouped-untied")
STREAM = vw.open(MODEL)
LABELS = tuple(f"L{i}H0.K" for i in range(300))
AXIS = Axis("reader", LABELS, tuple(f"L{i // 3}.kv0" for i in range(300)))
COLUMN = Column("score", torch.rand(300), "1, in [0, 1]", "how much of what is written is read, " * 9)
TOKENS = Column("token", tuple(["\n", "\x1b[31m red", "a long token " * 12] * 100))
STACK = MapStack(torch.ones(2, 3, 500), torch.zeros(300, dtype=torch.int64), None, torch.zeros(300))

RUN = vw.Run.on_repeats(STREAM, tokens=32, length=16, model=MODEL)

SHOWN: dict[str, Callable[[], object]] = {
    "Stream of <LlamaForCausalLM in memory> (llama)\n  3 layers": lambda: STREAM,
    "Groups (8): embed, L0.attn, L0.mlp, L1.attn, ...": lambda: STREAM.groups,
    "Group L1.attn: L1H0, L1H1, L1H2, L1H3, ...; reads state 2 through Q, K, V; writes state 3": lambda: STREAM.groups[
        "L1.attn"
    ],
    "Group unembed: unembed; reads state 6 through unembed": lambda: STREAM.groups["unembed"],
    "Head L1H0: width 4": lambda: STREAM["L1H0"],
    "Mlp L1.mlp: 40 neurons": lambda: STREAM["L1.mlp"],
    "Product (24, 24) = (24, 4) @ (4, 24)": lambda: STREAM["L1H0"].ov,
    "Run of <LlamaForCausalLM in memory> on 'repeated random tokens": lambda: RUN,
    "Moments of 32 tokens in chunks of 16: repeated random tokens": lambda: vw.Observation().moments(RUN),
    "OperatingPoint of 3 tokens": lambda: vw.OperatingPoint("f", torch.arange(3), {}, {}, {}),
    "Spectrum (300): 1 to 1; numerical rank 300, stable rank 300": lambda: vw.Spectrum(torch.ones(300)),
    "Spectrum (0): empty": lambda: vw.Spectrum(torch.zeros(0)),
    "SVD: U (300, 4), S (4): 2 to 2, V (4, 4)": lambda: vw.svd(Dense(2.0 * torch.eye(300, 4))),
    "MapStack (300): outer (2, 3, 500), torch.float32": lambda: STACK,
    "Axis 'reader' (300); groups: 100: L0H0.K, L1H0.K, L2H0.K, L3H0.K, ...": lambda: AXIS,
    "Column 'score' [1, in [0, 1]], torch.float32 (300,): how much": lambda: COLUMN,
    "Column 'token', str (300,)": lambda: TOKENS,
    "Record 'q' over reader (300), 300 rows\ncolumns: score [1, in [0, 1]], token\nreader": lambda: Record(
        "q", (AXIS,), (COLUMN, TOKENS)
    ),
}


@pytest.mark.parametrize("start", SHOWN)
def test_a_repr_is_short_and_says_what_it_is(start: str):
    text = repr(SHOWN[start]())
    assert text.startswith(start)
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) <= 120
    assert all(line.isprintable() for line in text.splitlines())


def test_an_atlas_says_where_it_is_and_how_much_it_holds(tmp_path_factory: pytest.TempPathFactory):
    atlas = vw.map(STREAM, tmp_path_factory.mktemp("a") / "atlas", plan=vw.Plan((vw.Part.bandwidth,)))
    assert repr(atlas) == f"Atlas in {atlas.path}: {len(atlas.keys())} records; .keys(question), .get(key).top(10)"


def test_help_calls_open_by_its_public_name():
    import pydoc

    assert pydoc.plain(pydoc.render_doc(vw.open)).splitlines()[2].startswith("open(reference:")
