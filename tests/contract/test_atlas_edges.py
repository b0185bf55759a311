"""Edges of an atlas: the strongest pairs, by label and port, in a fraction of a second, whatever a label says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from virtual_weights.atlas import Atlas, edges
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Axis, Column, Record

NAN = float("nan")
EVIL = "x' OR '1'='1"


def pairs(port: str | None, scores: list[list[float]], question: str = "composition", **other: torch.Tensor) -> Record:
    values = torch.tensor(scores, dtype=torch.float64)
    end = "" if port is None else f".{port}"
    readers = (*(f"L{i + 1}H0{end}" for i in range(len(scores) - 1)), EVIL)
    groups = tuple("kv0" for _ in readers) if port == "K" else ()
    axes = (Axis("reader", readers, groups), Axis("writer", tuple(f"L0H{i}" for i in range(values.shape[1]))))
    columns = (Column("score", values), *(Column(name, tensor) for name, tensor in other.items()))
    return Record(question, axes, columns, {} if port is None else {"port": port})


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    atlas = Atlas.create(tmp_path / "an [odd] 'name'*", {"fingerprint": "f00d"})
    z = torch.tensor([[1.0, 9.0], [NAN, 2.0], [3.0, 4.0]])
    atlas.put(pairs("K", [[0.1, 0.5], [0.9, NAN], [0.2, 0.3]], z=z))
    atlas.put(pairs("Q", [[0.6, 0.0], [0.5, 0.5], [0.7, 0.4]]))
    atlas.put(pairs(None, [[0.99, 0.98], [0.97, 0.96], [0.95, 0.94]], "overlap"))
    return atlas


def brief(rows: list[dict]) -> list[tuple]:
    return [(row["port"], row["reader"], row["writer"], row["score"]) for row in rows]


def test_the_strongest_come_first_over_all_ports_of_the_question(atlas: Atlas):
    assert brief(edges(atlas, top=3)) == [
        ("K", "L2H0.K", "L0H0", 0.9),
        ("Q", EVIL, "L0H0", 0.7),
        ("Q", "L1H0.Q", "L0H0", 0.6),
    ]


def test_an_edge_is_json_and_names_its_record(atlas: Atlas):
    strongest, second = edges(atlas, top=2)
    assert strongest == {
        "key": atlas.keys("composition", port="K")[0],
        "question": "composition",
        "port": "K",
        "reader": "L2H0.K",
        "reader_group": "kv0",
        "writer": "L0H0",
        "score": 0.9,
        "z": None,
    }
    assert "reader_group" not in second


def test_a_reader_is_found_with_its_port_or_without(atlas: Atlas):
    assert {row["reader"] for row in edges(atlas, "L1H0")} == {"L1H0.Q", "L1H0.K"}
    assert brief(edges(atlas, "L1H0.K")) == [("K", "L1H0.K", "L0H1", 0.5), ("K", "L1H0.K", "L0H0", 0.1)]
    with pytest.raises(UsageError, match=r"no reader 'L1H0\.V'"):  # of this port nothing is stored
        edges(atlas, "L1H0.V")


def test_both_ends_may_be_asked(atlas: Atlas):
    assert brief(edges(atlas, "L2H0", "L0H1")) == [("Q", "L2H0.Q", "L0H1", 0.5)]
    assert {row["writer"] for row in edges(atlas, writer="L0H1")} == {"L0H1"}


def test_a_pair_that_cannot_reach_is_no_edge(atlas: Atlas):
    rows = edges(atlas, top=100)
    assert len(rows) == 11
    assert ("K", "L2H0.K", "L0H1") not in [row[:3] for row in brief(rows)]
    assert edges(atlas, "L2H0.K", "L0H1") == []


def test_order_may_be_by_another_number_and_absent_ones_do_not_count(atlas: Atlas):
    assert [row["z"] for row in edges(atlas, by="z")] == [9.0, 4.0, 3.0, 1.0]


def test_equal_values_keep_the_order_of_the_record(atlas: Atlas):
    rows = edges(atlas, "L2H0.Q")
    assert [row["writer"] for row in rows] == ["L0H0", "L0H1"]


def test_another_question_has_its_own_edges(atlas: Atlas):
    assert brief(edges(atlas, question="overlap", top=1)) == [(None, "L1H0", "L0H0", 0.99)]


def test_a_label_is_a_value_and_never_code(atlas: Atlas):
    assert {row["reader"] for row in edges(atlas, EVIL)} == {EVIL}
    with pytest.raises(UsageError, match="no reader"):
        edges(atlas, "' OR 1=1 --")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"reader": "L9H9"}, "no reader 'L9H9'"),
        ({"reader": ""}, "no reader ''"),
        ({"writer": "L1H0"}, "no writer 'L1H0'"),
        ({"by": "score) --"}, "no column of numbers"),
        ({"by": "reader"}, "no column of numbers"),
        ({"by": "file_row_number"}, "no column of numbers"),
        ({"question": "statements"}, "no edges of 'statements'"),
        ({"top": 0}, "top=0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_meant_is_refused_with_what_can(atlas: Atlas, asked: dict, message: str):
    with pytest.raises(UsageError) as caught:
        edges(atlas, **asked)
    assert message in caught.value.what
    assert caught.value.expected


def test_a_broken_table_of_pairs_says_so(atlas: Atlas):
    atlas.edge_tables(atlas.keys("overlap")[0])[0].write_text("no parquet")
    with pytest.raises(RecordError, match=r"edges-00000\.parquet was changed"):
        edges(atlas, question="overlap")


def test_two_hundred_thousand_edges_answer_in_a_fraction_of_a_second(tmp_path: Path):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    names = tuple(f"L{layer}H{head}" for layer in range(25) for head in range(18))
    scores = torch.rand(450, 450, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axes = (Axis("reader", tuple(f"{name}.K" for name in names)), Axis("writer", names))
    atlas.put(Record("composition", axes, (Column("score", scores), Column("z", scores * 7)), {"port": "K"}))
    edges(atlas, top=1)  # loads the database
    began = time.perf_counter()
    rows = edges(atlas, "L20H3.K", top=20)
    assert time.perf_counter() - began < 1.0
    expected = scores[names.index("L20H3")].sort(descending=True).values[:20]
    assert [row["score"] for row in rows] == expected.tolist()


def test_a_table_of_edges_is_asked_like_a_matrix(tmp_path: Path):
    atlas = Atlas.create(tmp_path / "table", {"fingerprint": "f00d"})
    ends = (Column("reader", ("L1N0.up", "L1N1.up", "L2N0.up")), Column("writer", ("L0N0", "L0N1", "L0N1")))
    score = Column("score", torch.tensor([0.1, -0.5, 0.4]))
    atlas.put(Record("neuron_edges", (Axis("edge", ("1", "2", "3")),), (*ends, score), {"port": "up"}))
    assert brief(edges(atlas, question="neuron_edges")) == [
        ("up", "L2N0.up", "L0N1", pytest.approx(0.4)),
        ("up", "L1N0.up", "L0N0", pytest.approx(0.1)),
        ("up", "L1N1.up", "L0N1", pytest.approx(-0.5)),
    ]
    assert len(edges(atlas, "L2N0.up", question="neuron_edges")) == 1
    assert len(edges(atlas, "L2N0", question="neuron_edges")) == 1
    with pytest.raises(UsageError, match=r"no reader 'L2N0\.gate'"):
        edges(atlas, "L2N0.gate", question="neuron_edges")
    with pytest.raises(UsageError, match="no writer 'L9N9'"):
        edges(atlas, writer="L9N9", question="neuron_edges")


def test_edges_tell_what_their_ends_do_where_heads_are_labelled(atlas: Atlas):
    assert "writer_label" not in edges(atlas, top=1)[0], "no labels yet"
    said = ("previous_token", None, "induction")
    for label in ("older", *said[:1]):  # the newest labels count
        heads = Axis("head", ("L0H0", "L0H1", "L2H0"))
        atlas.put(Record("labels", (heads,), (Column("label", (label, *said[1:])),), {"threshold": len(label)}))
    strongest, second = edges(atlas, top=2)
    assert (strongest["writer"], strongest["writer_label"]) == ("L0H0", "previous_token")
    assert (strongest["reader"], strongest["reader_label"]) == ("L2H0.K", "induction")
    assert (second["reader"], second["reader_label"]) == (EVIL, None)
    assert edges(atlas, writer="L0H1", top=1)[0]["writer_label"] is None
    assert edges(atlas, "L2H0.K", "L0H1") == []


@pytest.mark.parametrize("question", ["contribution", "attribution"])
def test_what_flowed_is_asked_like_what_could(atlas: Atlas, question: str):
    atlas.put(
        pairs(
            "K",
            [[-0.7, 0.1], [0.3, NAN], [0.2, 0.3]],
            question,
            size=torch.tensor([[0.7, 0.1], [0.3, NAN], [0.2, 0.3]]),
        )
    )
    assert brief(edges(atlas, question=question, top=2))[0] == ("K", "L2H0.K", "L0H0", 0.3)
    assert edges(atlas, question=question, by="size", top=1)[0]["score"] == -0.7


def test_an_ablation_names_readers_by_port_and_has_labels_too(atlas: Atlas):
    atlas.put(Record("labels", (Axis("head", ("L2H0",)),), (Column("label", ("induction",)),)))
    columns = Column("effect_nats", torch.tensor([3.0])), Column("writer", ("L0.mlp",)), Column("reader", ("L2H0.K",))
    atlas.put(Record("ablation", (Axis("edge", ("L0.mlp -> L2H0.K",)),), columns))
    (row,) = edges(atlas, "L2H0.K", question="ablation")
    assert (row["effect_nats"], row["reader_label"], row["writer_label"]) == (3.0, "induction", None)
