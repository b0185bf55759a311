"""Laws of the Record: order, absence, groups, strict JSON, safe HTML, long tables."""

from __future__ import annotations

import json
import math

import duckdb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from virtual_weights.errors import UsageError
from virtual_weights.record import Axis, Column, Record

NAN = math.nan


def pairs(scores: list[list[float]], groups: tuple[str, ...] = (), **other: torch.Tensor) -> Record:
    values = torch.tensor(scores, dtype=torch.float64)
    readers = Axis("reader", tuple(f"R{i}" for i in range(values.shape[0])), groups)
    writers = Axis("writer", tuple(f"W{i}" for i in range(values.shape[1])))
    columns = (Column("score", values, "1"), *(Column(name, tensor) for name, tensor in other.items()))
    return Record("composition", (readers, writers), columns, {"port": "K"})


def places(record: Record) -> list[tuple[object, object]]:
    return list(zip(record["reader"], record["writer"], strict=True))


def test_top_is_largest_first_and_ties_keep_their_order():
    record = pairs([[1.0, 3.0, 2.0], [3.0, 0.0, 3.0]])
    top = record.top(4)
    assert places(top) == [("R0", "W1"), ("R1", "W0"), ("R1", "W2"), ("R0", "W2")]
    assert top["score"].tolist() == [3.0, 3.0, 3.0, 2.0]
    assert top.axes[0].labels == ("1", "2", "3", "4")


def test_many_ties_keep_their_order_too():
    top = pairs([[1.0] * 40 for _ in range(40)]).top(1000)
    assert places(top) == [(f"R{i // 40}", f"W{i % 40}") for i in range(1000)]


def test_top_can_be_smallest_first_by_another_column():
    record = pairs([[1.0, 2.0], [3.0, 4.0]], z=torch.tensor([[0, -5], [7, -5]]))
    top = record.top(3, by="z", largest=False)
    assert places(top) == [("R0", "W1"), ("R1", "W1"), ("R0", "W0")]
    assert top["z"].tolist() == [-5, -5, 0]
    assert top.parameters == {"port": "K", "top": 3, "by": "z", "largest": False}


def test_top_of_a_top_is_the_top():
    record = pairs([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    assert places(record.top(5).top(2)) == places(record.top(2))


@given(st.lists(st.one_of(st.just(NAN), st.floats(-2, 2)), min_size=1, max_size=12), st.integers(0, 15))
def test_top_holds_the_largest_present_values_and_no_absent_one(values: list[float], n: int):
    column = Column("x", torch.tensor(values, dtype=torch.float64))
    record = Record("q", (Axis("part", tuple(map(str, range(len(values))))),), (column,))
    top = record.top(n)
    expected = sorted((v for v in values if not math.isnan(v)), reverse=True)[:n]
    assert top["x"].tolist() == expected
    assert all(float(values[int(label)]) == x for label, x in zip(top["part"], top["x"].tolist(), strict=True))


def test_an_absent_pair_is_no_row_but_a_missing_detail_is_none():
    record = pairs([[NAN, 0.5], [0.25, NAN]], z=torch.tensor([[1.0, NAN], [math.inf, 1.0]]))
    assert list(record.rows()) == [
        {"reader": "R0", "writer": "W1", "score": 0.5, "z": None},
        {"reader": "R1", "writer": "W0", "score": 0.25, "z": None},
    ]
    assert record.present().tolist() == [False, True, True, False]


def test_zero_is_a_value_and_not_absence():
    assert len(list(pairs([[0.0, -0.0]]).rows())) == 2


def test_a_table_led_by_text_still_drops_absent_rows():
    labels, scores = ("a", "b"), torch.tensor([1.0, NAN])
    record = Record("q", (Axis("part", labels),), (Column("text", ("x", "y")), Column("score", scores)))
    assert [row["part"] for row in record.rows()] == ["a"]


def test_groups_stand_beside_their_labels():
    record = pairs([[1.0], [2.0]], groups=("g0", "g0"))
    row = next(record.rows())
    assert row == {"reader": "R0", "reader_group": "g0", "writer": "W0", "score": 1.0}
    assert list(row) == ["reader", "reader_group", "writer", "score"]
    assert record.top(1)["reader_group"] == ("g0",)


def test_json_is_strict():
    record = pairs([[NAN, 0.5], [math.inf, 0.25]])
    text = record.to_json()
    loaded = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert loaded["question"] == "composition"
    assert loaded["parameters"] == {"port": "K"}
    assert [row["score"] for row in loaded["rows"]] == [0.5, None, 0.25]


def test_html_escapes_whatever_a_checkpoint_may_say():
    evil = "<script>alert('x')</script>"
    record = Record(evil, (Axis(evil, (evil,)),), (Column("token", (evil,)), Column("x", torch.ones(1))), {evil: evil})
    page = record._repr_html_()
    assert "<script" not in page
    assert "'x'" not in page
    assert page.count("&lt;script&gt;") == 6  # caption: question, name, value; head; cells: label, token


def test_html_shows_the_strongest_pairs_and_says_when_there_are_none():
    page = pairs([[0.125, 0.75]])._repr_html_()
    assert page.index("0.75") < page.index("0.125")
    assert "no entries" in pairs([[NAN]])._repr_html_()


@pytest.mark.parametrize(
    ("ask", "kind"),
    [(lambda r: r["scor"], "column"), (lambda r: r.axis("writers"), "axis"), (lambda r: r.top(1, by="Z"), "column")],
)
def test_an_unknown_name_is_refused_with_the_known_ones(ask, kind: str):
    with pytest.raises(UsageError, match=f"no {kind}") as caught:
        ask(pairs([[1.0]]))
    assert ("score" if kind == "column" else "reader, writer") in caught.value.expected


def test_text_has_no_order_of_size():
    record = Record("q", (Axis("part", ("a",)),), (Column("text", ("x",)), Column("n", torch.ones(1))))
    with pytest.raises(UsageError, match="holds text, not numbers") as caught:
        record.top(1, by="text")
    assert "'n'" in caught.value.expected
    assert record.top(1)["n"].tolist() == [1.0]
    with pytest.raises(UsageError, match="no numbers"):
        Record("q", record.axes, record.columns[:1]).top(1)


def test_an_unknown_label_is_refused_with_some_known_ones():
    with pytest.raises(UsageError, match="no reader 'L9H9'") as caught:
        pairs([[1.0]]).axis("reader").index("L9H9")
    assert "R0" in caught.value.expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: Record("q", (Axis("a", ("x", "y")),), (Column("v", torch.ones(3)),)),
        lambda: Record("q", (Axis("a", ("x",)),), (Column("a", torch.ones(1)),)),
        lambda: Record("q", (Axis("a", ("x",)),), (Column("v", torch.ones(1, dtype=torch.complex64)),)),
        lambda: Record("q", (Axis("a", ("x", "y"), ("g",)),), ()),
    ],
    ids=["shape", "name twice", "complex", "groups for some"],
)
def test_a_record_that_contradicts_itself_is_our_own_bug(build):
    with pytest.raises(AssertionError):
        build()


def test_parquet_holds_the_rows_under_their_names(tmp_path):
    record = pairs([[NAN, 0.5], [0.25, 0.125]], groups=("g0", "g0"), z=torch.tensor([[1.0, NAN], [2.0, 3.0]]))
    record.to_parquet(tmp_path / "edges.parquet")
    with duckdb.connect() as database:
        table = database.read_parquet(str(tmp_path / "edges.parquet"))
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    assert rows == list(record.rows())


def test_parquet_keeps_the_kinds_of_a_table(tmp_path):
    columns = (
        Column("half", torch.tensor([0.1, 2.0, -3.0], dtype=torch.bfloat16)),
        Column("n", torch.tensor([2**40, -1, 0])),
        Column("yes", torch.tensor([True, False, True])),
        Column("text", ("late", None, "quote ' \" ;")),
        Column("flag", (True, None, False)),
        Column("mixed", (1, "one", None)),
        Column("nothing", (None, None, None)),
    )
    record = Record("q", (Axis("part", ("a", "b", "c")),), columns)
    record.to_parquet(tmp_path / "t.parquet")
    with duckdb.connect() as database:
        table = database.read_parquet(str(tmp_path / "t.parquet"))
        types, rows = [str(t) for t in table.types], table.fetchall()
    assert types == ["VARCHAR", "FLOAT", "BIGINT", "BOOLEAN", "VARCHAR", "BOOLEAN", "VARCHAR", "VARCHAR"]
    assert rows[0] == ("a", pytest.approx(0.1, rel=1e-2), 2**40, True, "late", True, "1", None)
    assert rows[1][4:] == (None, None, '"one"', None)
    assert rows[2][4:] == ("quote ' \" ;", False, None, None)


def test_parquet_keeps_text_that_comes_late(tmp_path):
    n = 5000
    record = Record("q", (Axis("part", tuple(map(str, range(n)))),), (Column("t", (*[None] * (n - 1), "x")),))
    record.to_parquet(tmp_path / "t.parquet")
    with duckdb.connect() as database:
        assert database.read_parquet(str(tmp_path / "t.parquet")).fetchall()[-1] == (str(n - 1), "x")


def test_select_keeps_values_with_their_labels_and_groups():
    axes = (Axis("reader", ("a", "b", "c"), ("x", "y", "y")), Axis("writer", ("p", "q")))
    record = Record("pairs", axes, (Column("score", torch.arange(6.0).view(3, 2)),), {"port": "K"})
    selection = record.select("reader", ("c", "a"))
    assert (selection.axis("reader").labels, selection.axis("reader").groups) == (("c", "a"), ("y", "x"))
    assert selection["score"].tolist() == [[4, 5], [0, 1]]
    assert selection.select("writer", ["q"])["score"].tolist() == [[5], [1]]
    assert selection.parameters == {"port": "K"}
    table = Record("list", (Axis("row", ("1", "2")),), (Column("name", ("one", "two")),))
    assert table.select("row", ["2"])["name"] == ("two",)
    with pytest.raises(UsageError, match="no reader 'z'"):
        record.select("reader", ["z"])


def test_a_record_has_rows_is_equal_to_its_like_and_shows_itself_shortly():
    record = pairs([[NAN, 0.5], [0.25, NAN]])
    assert len(record) == 2
    assert list(record) == list(record.rows())
    assert record == pairs([[NAN, 0.5], [0.25, NAN]])
    assert record != pairs([[NAN, 0.5], [0.5, NAN]])
    assert record != 1
    lines = repr(pairs([[float(i + j) for i in range(40)] for j in range(40)])).splitlines()
    assert lines[0] == "Record 'composition' over reader (40) x writer (40), 1600 rows"
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 120


def into_keys() -> Record:
    axes = Axis("reader", ("L1H0.K", "L1H1.K")), Axis("writer", ("L0H0", "L1H0"))
    return Record("composition", axes, (Column("score", torch.tensor([[0.5, NAN], [0.25, NAN]])),), {"port": "K"})


def test_a_row_is_found_by_writer_and_reader_in_either_order_with_the_port_or_without():
    record = into_keys()
    row = {"reader": "L1H1.K", "writer": "L0H0", "score": 0.25}
    for asked in (record, record.top(2), record.top(2).top(2)):
        found = [asked[labels] for labels in (("L0H0", "L1H1.K"), ("L1H1.K", "L0H0"), ("L0H0", "L1H1"))]
        assert all(row.items() <= one.items() for one in found)
    assert record["L0H0", "L1H1"] == row


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("L0H0", "L1H1.Q"), "no row at L0H0, L1H1.Q"),  # another port
        (("L1H0", "L1H1.K"), "no value at L1H0, L1H1.K"),  # cannot reach
        (("L0H0", "L9H9.K"), "no row"),
        (("L0H0",), "no row"),
    ],
)
def test_a_missing_pair_is_refused(labels: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        into_keys()[labels]
    with pytest.raises(UsageError, match="no row at "):  # a table holds no pair that cannot reach
        into_keys().top(2)[labels]


def test_a_table_of_edges_into_many_ports_is_asked_by_the_whole_name():
    writers, readers = ("L0H0", "L0H0", "L0.mlp"), ("L1H0.K", "L1H0.V", "unembed")
    columns = Column("effect", torch.tensor([1.0, 2.0, 3.0])), Column("writer", writers), Column("reader", readers)
    record = Record("ablation", (Axis("edge", ("1", "2", "3")),), columns)
    assert record["L0H0", "L1H0.V"] == {"edge": "2", "effect": 2.0, "writer": "L0H0", "reader": "L1H0.V"}
    assert record["L0.mlp", "unembed"]["effect"] == 3.0
    for labels in (("L0H0", "L1H0"), ("L0H0", "unembed"), ("L0.mlp", "L1H0.K")):
        with pytest.raises(UsageError, match="no row at ") as caught:
            record[labels]
        assert caught.value.expected == "a label of each: writer, reader"
