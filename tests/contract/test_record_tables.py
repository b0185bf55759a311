"""Records in the hands of others: Arrow, pandas, polars, DuckDB, Parquet, and back."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from virtual_weights.atlas import Atlas
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Axis, Column, Record

NAN = math.nan
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
COUNTS = [torch.bool, torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64]
NAMES = ["reader", "writer", "score", "it's", 'a "name"', "é; --", "z"]
text = st.text(st.characters(codec="utf-8"), max_size=4)
floats = st.floats() | st.just(NAN)
cells = st.one_of(
    st.lists(st.none() | text),
    st.lists(st.none() | st.booleans()),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.none() | st.floats()),
    st.lists(st.none() | st.booleans() | st.integers() | st.floats() | text),
)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    size, dtype = math.prod(shape), draw(st.sampled_from([*FLOATS, *COUNTS]))
    entries = floats if dtype in FLOATS else st.integers(0, 100)
    values = draw(st.lists(entries, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64 if dtype in FLOATS else torch.int64).to(dtype).view(shape)


@st.composite
def records(draw: st.DrawFn) -> Record:
    names = iter(draw(st.permutations(NAMES)))
    axes = []
    for name in (next(names) for _ in range(draw(st.integers(1, 2)))):
        labels = tuple(draw(st.lists(text, unique=True, max_size=4)))
        groups = draw(st.lists(text, min_size=len(labels), max_size=len(labels)))
        axes.append(Axis(name, labels, tuple(groups) if draw(st.booleans()) else ()))
    shape = tuple(len(axis.labels) for axis in axes)
    count = draw(st.integers(0, 3))
    columns = [Column(next(names), draw(tensors(shape)), draw(text), draw(text)) for _ in range(count)]
    if len(axes) == 1:
        values = draw(cells)
        columns.append(Column(next(names), tuple((values + [None] * shape[0])[: shape[0]])))
    plain = st.dictionaries(text, st.none() | st.integers() | text | st.lists(st.booleans(), max_size=2), max_size=2)
    return Record(draw(text), tuple(axes), tuple(columns), draw(plain), draw(plain), draw(plain))


def as_rows(record: Record, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a typed table as ``rows()`` has them: without infinity, and mixed columns read from their JSON."""
    mixed = {column.name for column in record.columns if column.kind == "json"}

    def value(name: str, cell: Any) -> Any:
        cell = json.loads(cell) if name in mixed and isinstance(cell, str) else cell
        missing = cell is None or cell is pd.NA or (isinstance(cell, float) and not math.isfinite(cell))
        return None if missing else cell

    return [{name: value(name, cell) for name, cell in row.items()} for row in rows]


def from_duckdb(record: Record) -> list[dict[str, Any]]:
    with duckdb.connect() as database:
        table = database.sql("from record")
        return [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]


TABLES: dict[str, Callable[[Record], list[dict[str, Any]]]] = {
    "pyarrow": lambda record: pa.table(record).to_pylist(),
    "polars": lambda record: pl.DataFrame(record).to_dicts(),
    "duckdb": from_duckdb,
    "pandas": lambda record: record.to_pandas().to_dict("records"),
}


@pytest.mark.parametrize("library", TABLES)
@settings(max_examples=20)
@given(record=records())
def test_a_table_of_another_library_holds_the_rows(library: str, record: Record):
    rows = as_rows(record, TABLES[library](record))
    assert repr(rows) == repr(list(record.rows()))  # as text, since 1 == 1.0 == True


@settings(max_examples=20)
@given(record=records())
def test_a_record_comes_back_from_parquet(tmp_path_factory: pytest.TempPathFactory, record: Record):
    path = tmp_path_factory.mktemp("record") / "record.parquet"
    record.to_parquet(path)
    found = Record.from_parquet(path)
    assert found == record
    assert found.provenance == record.provenance
    assert repr(list(found.rows())) == repr(list(record.rows()))


def matrix() -> Record:
    """Pairs of which one is absent; beside the score, what cannot be NaN and what has a value all the same."""
    axes = Axis("reader", ("L1H0.K", "L1H1.K"), ("L1.kv0", "L1.kv0")), Axis("writer", ("L0H0", "L1H0"))
    columns = (
        Column("score", torch.tensor([[0.5, NAN], [0.25, math.inf]], dtype=torch.bfloat16), "1", "a ratio"),
        Column("n", torch.tensor([[1, 7], [2, 3]])),
        Column("z", torch.tensor([[1.0, 7.0], [NAN, 3.0]])),
    )
    stamp, provenance = {"norm": "gain folded"}, {"fingerprint": "f00d", "model": "'; --"}
    return Record("composition", axes, columns, {"port": "K", "rotary_offset": None}, stamp, provenance)


def test_tables_keep_types_and_put_groups_after_their_axis():
    schema = pa.table(matrix()).schema
    assert schema.names == ["reader", "reader_group", "writer", "score", "n", "z"]
    assert [str(kind) for kind in schema.types] == ["string", "string", "string", "float", "int64", "float"]
    frame = matrix().to_pandas()
    assert list(frame.columns) == schema.names
    assert [str(kind) for kind in frame.dtypes] == ["str", "str", "str", "float32", "int64", "float32"]
    pd.testing.assert_frame_equal(pd.DataFrame.from_arrow(matrix()), frame)
    optional = Record("q", (Axis("a", ("x", "y")),), (Column("n", (1, None)), Column("b", (None, True))))
    assert [str(kind) for kind in optional.to_pandas().dtypes] == ["str", "Int64", "boolean"]


def test_a_schema_that_is_asked_for_is_given():
    schema = pa.table(matrix()).schema.set(3, pa.field("score", pa.float64()))
    assert pa.table(matrix(), schema=schema).schema == schema


def test_a_stream_owns_its_data():
    record = matrix()
    expected = pa.table(record)
    capsule = record.__arrow_c_stream__()
    del record
    gc.collect()
    assert pa.RecordBatchReader._import_from_c_capsule(capsule).read_all().equals(expected)


def test_a_frame_says_where_it_is_from():
    attrs = matrix().to_pandas().attrs
    assert attrs["question"] == "composition"
    assert (attrs["parameters"]["port"], attrs["stamp"], attrs["provenance"]["fingerprint"]) == (
        "K",
        {"norm": "gain folded"},
        "f00d",
    )


def test_without_pandas_its_installation_is_advised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas is not installed") as caught:
        matrix().to_pandas()
    assert caught.value.do == "pip install pandas"


def test_arrow_needs_neither_pyarrow_nor_pandas():
    code = """
import sys
sys.modules |= {"pyarrow": None, "pandas": None}
import duckdb, polars, torch
from virtual_weights.record import Axis, Column, Record
record = Record("q", (Axis("a", ("x", "y")),), (Column("v", torch.tensor([1.0, 2.0])),))
assert polars.DataFrame(record).rows() == duckdb.sql("from record").fetchall() == [("x", 1.0), ("y", 2.0)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_says_what_the_record_says():
    header = json.loads(pq.read_schema(written(matrix())).metadata[b"virtual_weights"])
    assert (header["question"], header["parameters"]) == ("composition", {"port": "K", "rotary_offset": None})
    assert (header["stamp"], header["provenance"]) == (matrix().stamp, matrix().provenance)
    assert header["axes"][0]["labels"] == ["L1H0.K", "L1H1.K"]
    assert header["columns"][0] == {"name": "score", "kind": "torch.bfloat16", "unit": "1", "meaning": "a ratio"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def written(record: Record, name: str = "record.parquet") -> Path:
    record.to_parquet(name)
    return Path(name)


def test_what_is_absent_comes_back_as_nan():
    found = Record.from_parquet(written(matrix()))
    assert torch.isnan(found["score"]).tolist() == [[False, True], [False, False]]
    assert found["score"].dtype == torch.bfloat16
    assert torch.isnan(found["z"]).tolist() == [[False, True], [True, False]]
    assert found["n"].tolist() == [[1, 0], [2, 3]]
    assert found == matrix()


def test_what_stands_at_an_absent_entry_is_no_difference_and_what_stands_elsewhere_is():
    record, n = matrix(), torch.tensor([[1, 8], [2, 3]])
    other = replace(record, columns=(record.columns[0], Column("n", n), record.columns[2]))
    assert other == record
    assert replace(other, columns=(record.columns[0], Column("n", n.T), record.columns[2])) != record
    scores = record["score"].nan_to_num(nan=0.5, posinf=math.inf)
    there = replace(record, columns=(replace(record.columns[0], values=scores), *record.columns[1:]))
    assert there != record
    assert record != there


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "it's ? $path.parquet", "port=K/x[1].parquet"])
def test_a_file_is_read_by_its_own_name(name: str):
    Path(name).parent.mkdir(exist_ok=True)
    written(matrix().top(1), "a1.parquet")
    assert Record.from_parquet(written(matrix(), name)) == matrix()


def test_an_atlas_reads_its_own_tables():
    other, own = (Atlas.create(name, {"fingerprint": "f00d"}) for name in ("a1", "a[1]"))
    table = matrix().top(2)
    less = replace(
        table, columns=tuple(replace(c, values=c.values[:1]) for c in table.columns), axes=(Axis("place", ("1",)),)
    )
    assert other.put(less) == own.put(table)
    assert own.get(own.put(table)) == table


def test_writing_replaces_a_file_and_leaves_nothing_beside():
    path = written(matrix())
    matrix().top(1).to_parquet(path)
    assert Record.from_parquet(path) == matrix().top(1)
    assert [file.name for file in Path().iterdir()] == ["record.parquet"]


def test_what_could_not_be_read_back_is_not_written():
    with pytest.raises(UsageError, match="no folder"):
        matrix().to_parquet("nowhere/record.parquet")
    with pytest.raises(UsageError, match="repeats a label"):
        matrix().select("writer", ["L0H0", "L0H0"]).to_parquet("record.parquet")
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        replace(matrix(), parameters={"x": NAN}).to_parquet("record.parquet")
    assert list(Path().iterdir()) == []


def restated(change: Callable[[dict[str, Any]], Any]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        header = json.loads(table.schema.metadata[b"virtual_weights"])
        change(header)
        return table.replace_schema_metadata({"virtual_weights": json.dumps(header)})

    return apply


def recast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        i = table.schema.get_field_index(name)
        return table.set_column(i, name, table[name].cast(kind))

    return apply


def relabelled(name: str, *labels: str | None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(labels))


def renamed(table: pa.Table) -> pa.Table:
    names = ["reader", "reader_group", "writer", "score", "m", "z"]
    return table.rename_columns(names).replace_schema_metadata(table.schema.metadata)


ALTERED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "no header": (lambda table: table.replace_schema_metadata(None), "do not describe"),
    "a header that is no JSON": (lambda table: table.replace_schema_metadata({"virtual_weights": "x"}), "Expecting"),
    "a header that is a list": (lambda table: table.replace_schema_metadata({"virtual_weights": "[]"}), "a field is"),
    "a deep header": (lambda table: table.replace_schema_metadata({"virtual_weights": "[" * 100_000}), "it is nested"),
    "a header of bytes": (lambda table: table.replace_schema_metadata({"virtual_weights": b"\xff"}), "decode"),
    "no stamp": (restated(lambda header: header.pop("stamp")), "'stamp'"),
    "another format": (restated(lambda header: header.update(format=2)), "its format is 2"),
    "another reader": (restated(lambda header: header["axes"][0]["labels"].__setitem__(0, "A")), "no reader L1H0.K"),
    "another key/value head": (restated(lambda header: header["axes"][0]["groups"].__setitem__(0, "A")), "its groups"),
    "too many groups": (restated(lambda header: header["axes"][0]["groups"].append("A")), "groups for some"),
    "an unknown kind": (restated(lambda header: header["columns"][0].update(kind="torch.load")), "kind torch.load"),
    "another dtype": (restated(lambda header: header["columns"][0].update(kind="torch.float64")), "kind torch.float64"),
    "a kind of text": (restated(lambda header: header["columns"][0].update(kind="str")), "kind str"),
    "a column twice": (restated(lambda header: header["columns"].append(header["columns"][0])), "its columns"),
    "a row less": (lambda table: table.slice(1), "its rows are 2, of which 2"),
    "a row more": (lambda table: pa.concat_tables([table, table.slice(2)]), "its rows are 4"),
    "a row twice": (lambda table: pa.concat_tables([table.slice(1), table.slice(2)]), "its rows are 3, of which 2"),
    "a column less": (lambda table: table.drop_columns(["n"]), "its columns"),
    "another order": (lambda table: table.select([0, 1, 2, 3, 5, 4]), "its columns"),
    "another name": (renamed, "its columns"),
    "another type": (recast("n", pa.float64()), "kind torch.int64"),
    "text for numbers": (recast("n", pa.string()), "kind torch.int64"),
    "another writer": (relabelled("writer", "L0H0", "L0H0", "L7H7"), "no writer L7H7"),
    "no writer": (relabelled("writer", "L0H0", "L0H0", None), "no writer None"),
    "another group": (relabelled("reader_group", "L1.kv0", "L1.kv0", "L1.kv1"), "its groups"),
    "a missing count": (lambda table: table.set_column(4, "n", pa.array([1, None, 3])), "kind torch.int64"),
}


@pytest.mark.parametrize(("alter", "message"), ALTERED.values(), ids=list(ALTERED))
def test_an_altered_file_is_refused(alter: Callable[[pa.Table], pa.Table], message: str):
    path = written(matrix())
    pq.write_table(pq.read_table(path), path)
    assert Record.from_parquet(path) == matrix()  # whoever copies a file with its metadata keeps the record
    pq.write_table(alter(pq.read_table(path)), path)
    with pytest.raises(RecordError, match=f"cannot be read as a record: .*{message}") as caught:
        Record.from_parquet(path)
    assert "to_parquet wrote" in caught.value.expected


def test_rows_in_another_order_are_the_same_record():
    path = written(matrix())
    pq.write_table(pq.read_table(path).sort_by("score"), path)
    assert Record.from_parquet(path) == matrix()


def test_what_is_not_a_parquet_file_is_refused():
    Path("folder").mkdir()
    Path("table.csv").write_text("reader,writer\n")
    for path in ("nowhere.parquet", "folder", "http://127.0.0.1:9/record.parquet"):  # nothing is fetched
        with pytest.raises(RecordError, match="there is no such file"):
            Record.from_parquet(path)
    with pytest.raises(RecordError, match="cannot be read as a record"):
        Record.from_parquet("table.csv")


def test_a_shell_completes_columns_and_the_labels_of_rows():
    assert matrix()._ipython_key_completions_() == [
        *("score", "n", "z"),
        *(("L0H0", "L1H0.K"), ("L0H0", "L1H1.K"), ("L1H0", "L1H1.K")),
    ]
    for record in (matrix(), matrix().top(2)):  # a matrix, and a table of edges
        keys = [key for key in record._ipython_key_completions_() if isinstance(key, tuple)]
        assert len(keys) == len(record)
        assert all(record[key]["writer"] == key[0] for key in keys)
    table = Record("q", (Axis("part", ("a",)),), (Column("v", torch.ones(1)),))
    assert table._ipython_key_completions_() == ["v"]
    large = Record("q", (Axis("a", tuple(map(str, range(400)))), Axis("b", tuple(map(str, range(400))))), ())
    assert large._ipython_key_completions_() == []
