"""Edges in many files: every query finds what it would find in one, and opens, and checks, few of them."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from virtual_weights.atlas import Atlas, edges
from virtual_weights.atlas.stored import sealed
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Axis, Column, Record

NAN = math.nan


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 rows, of which more than 3 are not read without a look at the best first."""
    monkeypatch.setattr("virtual_weights.atlas.parts.PART_ROWS", 16)
    monkeypatch.setattr(sys.modules["virtual_weights.atlas.edges"], "_FEW", 3)


def matrix(columns: int = 20) -> Record:
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(30, columns, generator=draw).mul(50).round().div(50)  # many are equal
    score[torch.rand(30, columns, generator=draw) < 0.3] = NAN
    z = torch.randn(30, columns, generator=draw).bfloat16()
    z[3, 4] = math.inf
    axes = (
        Axis("reader", tuple(f"L{i}H0.K" for i in range(30)), ("kv0", "kv1") * 15),
        Axis("writer", tuple(f"L{i}H1" for i in range(columns))),
    )
    return Record("composition", axes, (Column("score", score), Column("z", z)), {"port": "K"})


def table() -> Record:
    """The same edges as a table, in another order."""
    rows = list(matrix().rows())[::-1]
    ends = [Column(side, tuple(row[side] for row in rows)) for side in ("reader", "writer")]
    score, z = (
        Column(name, torch.tensor([NAN if row[name] is None else row[name] for row in rows])) for name in ("score", "z")
    )
    axis = Axis("edge", tuple(str(i) for i in range(len(rows))))
    return Record("neuron_edges", (axis,), (*ends, score, z, Column("rank", tuple(range(len(rows))))), {"port": "K"})


@pytest.fixture(params=[matrix, table], ids=["matrix", "table"])
def record(request: pytest.FixtureRequest) -> Record:
    return request.param()


def brief(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["reader"], row["writer"], row["score"]) for row in rows]


@pytest.mark.parametrize("by", ["score", "z"])
@pytest.mark.parametrize(
    "ends", [{}, {"reader": "L7H0.K"}, {"writer": "L12H1"}, {"reader": "L7H0", "writer": "L12H1"}], ids=str
)
def test_every_query_finds_what_a_search_of_all_rows_finds(
    tmp_path: Path, record: Record, by: str, ends: dict[str, str]
):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    key = atlas.put(record)
    assert len(atlas.edge_tables(key)) > 20
    rows = [
        row for row in record.top(10_000, by).rows() if all(label in str(row[side]) for side, label in ends.items())
    ]
    for top in (1, 5, 1000):
        assert brief(edges(atlas, question=record.question, by=by, top=top, **ends)) == brief(rows[:top])


def test_all_rows_are_in_the_parts_once(tmp_path: Path, record: Record):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    header = atlas.header(atlas.put(record))
    assert (
        sum(part.rows for part in header.parts) == len(record) == len(edges(atlas, question=record.question, top=9999))
    )
    assert all(part.rows <= 16 for part in header.parts)


def read_by(atlas: Atlas, key: str, **asked: Any) -> int:
    """How many parts a query reads: those without which it is refused."""
    intact = {path.name: (path, path.read_bytes()) for path in atlas.edge_tables(key)}
    for path, _ in intact.values():
        path.write_bytes(b"damaged")
    count = 0
    while True:
        try:
            edges(atlas, **asked)
        except RecordError as error:
            path, raw = intact[re.findall(r"edges-\d+\.parquet", error.what)[0]]
            path.write_bytes(raw)
            count += 1
        else:
            break
    for path, raw in intact.values():
        path.write_bytes(raw)
    return count


def test_a_query_reads_few_parts(tmp_path: Path):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    draw = torch.rand(48, 48, generator=torch.Generator().manual_seed(1))
    axes = (Axis(side, tuple(f"{side}{i:02}" for i in range(48))) for side in ("reader", "writer"))
    key = atlas.put(Record("composition", tuple(axes), (Column("score", draw),)))
    assert len(atlas.edge_tables(key)) == 144
    for asked in ({"reader": "reader07"}, {"writer": "writer40"}):
        assert 1 <= read_by(atlas, key, **asked) <= 2 * math.sqrt(144)
    assert 1 <= read_by(atlas, key, top=3) <= 3
    assert read_by(atlas, key, reader="reader07", writer="writer40") <= 4


def test_what_is_infinite_comes_first_and_is_no_number(tmp_path: Path):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    record = matrix()
    assert not math.isnan(record["score"][3, 4]), "the edge of infinite z is there"
    key = atlas.put(record)
    first, *rest = edges(atlas, by="z", top=40)
    assert (first["reader"], first["writer"], first["z"]) == ("L3H0.K", "L4H1", None)
    assert all(a["z"] >= b["z"] for a, b in pairwise(rest))
    assert atlas.get(key) == record


def test_a_label_that_no_part_has_is_refused_and_one_without_edges_is_not(tmp_path: Path, record: Record):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    atlas.put(record)
    with pytest.raises(UsageError, match="no reader 'L3H5'"):
        edges(atlas, "L3H5", question=record.question)
    absent = next((i, j) for i, j in torch.isnan(matrix()["score"]).nonzero().tolist())
    ends = f"L{absent[0]}H0.K", f"L{absent[1]}H1"
    assert edges(atlas, *ends, question=record.question, by="score") == []


def test_a_record_without_any_pair_has_no_part(tmp_path: Path):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    axes = Axis("reader", ("L1H0",)), Axis("writer", ("L0H0",))
    key = atlas.put(Record("composition", axes, (Column("score", torch.tensor([[NAN]])),)))
    assert atlas.edge_tables(key) == ()
    assert edges(atlas, "L1H0") == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../../edges-00000.parquet"},
        {"name": 7},
        {"reader": ["a"]},
        {"writer": None},
        {"largest": {"score": "x"}},
        {"rows": "many"},
    ],
    ids=str,
)
def test_a_header_that_describes_parts_otherwise_is_refused(tmp_path: Path, change: dict[str, Any]):
    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    path = atlas.edge_tables(atlas.put(matrix()))[0].with_name("record.json")
    fields = json.loads(path.read_text())
    fields["parts"][0] |= change
    path.write_text(sealed({name: value for name, value in fields.items() if name != "checksum"}))
    with pytest.raises(RecordError, match=r"record\.json cannot be used"):
        edges(atlas)


def test_parts_are_plain_parquet_for_others(tmp_path: Path):
    import polars

    atlas = Atlas.create(tmp_path, {"fingerprint": "f00d"})
    key = atlas.put(matrix())
    frame = polars.read_parquet(f"{tmp_path}/records/{key}/edges-*.parquet")
    names = ["key", "question", "port", "reader", "reader_group", "writer", "score", "z", "record_row"]
    assert frame.columns == names
    rows = [
        {**row, "z": None if math.isinf(row["z"] or 0) else row["z"]} for row in frame.sort("record_row").to_dicts()
    ]
    assert [{name: row[name] for name in names[3:-1]} for row in rows] == list(matrix().rows())
