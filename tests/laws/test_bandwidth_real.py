"""The figures of docs/bandwidth.md are those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import Bandwidth, bottleneck
from virtual_weights.analysis.pairs.subspaces import Subspaces, figures

PAGE = " ".join((Path(__file__).parents[2] / "docs" / "bandwidth.md").read_text(encoding="utf-8").split())


@pytest.mark.real
def test_the_ledger_of_the_page() -> None:
    record = Bandwidth()(vw.open("smollm2-135m"))
    rows = list(record.rows())
    assert [row["oversubscription"] for row in rows] == list(range(1, 62))
    assert {(row["unread_dim"], row["unwritten_dim"]) for row in rows} == {(0, 0)}
    assert f"add up to {rows[0]['read_ranks']:,}: {63936 - int(rows[0]['read_ranks'])} of 63,936" in PAGE
    shown = ("written_entropy_rank", "read_entropy_rank", "live_entropy_rank")
    for p in (0, 10, 30, 50, 60):
        ranks = " | ".join(f"{rows[p][name]:.1f}" for name in shown)
        assert f"| {p} | {rows[p]['after']} | {p + 1} | {ranks} |" in PAGE
    assert f"{record.stamp['cut']:.1e}".replace("e-05", "e-5") in PAGE
    tightest = bottleneck(record)
    assert f"product is {tightest['neuron_product']:,.0f} and the saving {tightest['saving']:.1f}" in PAGE
    coarse = list(Bandwidth(cut=0.05)(vw.open("smollm2-135m")).rows())
    assert f"{coarse[0]['unwritten_dim']} dimensions are unwritten in state 0 and none from state 6 on" in PAGE
    assert [row["unwritten_dim"] == 0 for row in coarse] == [False] * 6 + [True] * 55
    assert f"leaves {coarse[60]['unread_dim']} unread" in PAGE


@pytest.mark.real
def test_the_subspaces_of_the_page() -> None:
    record = Subspaces("O", "K")(vw.open("smollm2-135m"))
    summary = figures(record)
    assert f"Among the {summary.pairs:,} pairs" in PAGE
    assert summary.independent == 0
    assert f"median tightness is {summary.median_tightness:.2f}" in PAGE
    top = next(record.top(1).rows())
    assert (top["first"], top["second"]) == ("L16H0.O", "L17H3.K")
    assert f"The largest overlap, {top['overlap']:.2f}, {top['null_ratio']:.1f} times chance" in PAGE
