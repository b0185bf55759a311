"""The report's edges side by side: potential, actual, causal; and what heads do, wherever they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from drawing import drawn_by_node, needs_node
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.pairs.contribution import Contribution
from virtual_weights.record import Axis, Column, Record
from virtual_weights.report import payload, write_report
from virtual_weights.runtime.edges.ablation import Ablation
from virtual_weights.runtime.edges.attribution import Attribution
from virtual_weights.runtime.flow.labels import Labels
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run

NAN = float("nan")
HEADS = tuple(f"L{layer}H{head}" for layer in range(3) for head in range(2))
GROUPS = tuple(f"L{layer}.kv0" for layer in range(3) for _ in range(2))
MANIFEST: dict[str, Any] = {
    "model": "planted", "reference": "planted", "fingerprint": "f00d", "version": "0", "family": None, "norm": "none",
    "sizes": {"n_layers": 3, "d_model": 16}, "components": [{"kind": "head", "label": h} for h in HEADS],
}  # fmt: skip


Rows = dict[tuple[str, str, str], dict[str, Any]]


def pairs(question: str, port: str, writers: tuple[str, ...], seed: int, **units: str) -> Record:
    """Numbers for every writer of an earlier layer, the rest absent; keys and values shared by a layer's two heads."""
    generator = torch.Generator().manual_seed(seed)
    later = torch.tensor([[w[1] < r[1] for w in writers] for r in HEADS])
    drawn = {name: torch.rand(6, len(writers), dtype=torch.float64, generator=generator) for name in units}
    readers = tuple(f"{head}.{port}" for head in HEADS)
    axes = Axis("reader", readers, GROUPS if port != "Q" else ()), Axis("writer", writers)
    columns = tuple(Column(n, drawn[n].masked_fill(~later, NAN), unit) for n, unit in units.items())
    parameters = {"port": port, "sequences": 4, "metric": "next_token_loss"}
    return Record(question, axes, columns, parameters, {"tokens": 640})


def ablation(rows: list[tuple[str, str, str, float, str, str | None, str]]) -> Record:
    """Effects with an interval of 0.1 either way; a row is kind, writer, reader, effect, verdict, group, shared."""
    kind, writer, reader, effect, verdict, group, shared = zip(*rows, strict=True)
    found = torch.tensor(effect, dtype=torch.float64)
    numbers = {
        "effect_nats": found,
        "low": found - 0.1,
        "high": found + 0.1,
        "loss_changed": torch.full_like(found, 0.25),
    }
    texts = {"verdict": verdict, "kind": kind, "writer": writer, "reader": reader, "group": group}
    columns = [Column(name, values) for name, values in (numbers | texts | {"shared_with": shared}).items()]
    edges = tuple(f"{w} -> {r}" for w, r in zip(writer, reader, strict=True))
    stamp = {"clean_loss": 2.5, "sequences": 4, "rule": "causal if beyond 0.01"}
    return Record("ablation", (Axis("edge", edges),), tuple(columns), {}, stamp)


WEIGHTS = [
    pairs("composition", p, (*HEADS, "L0.mlp"), i, score="", strength="", null_ratio="", z="")
    for i, p in enumerate("KQV")
]
FLOWED = [
    *(pairs("contribution", port, HEADS, 10, contribution="squared logits", share="1") for port in "KQ"),
    pairs("attribution", "K", HEADS, 20, attribution="nats", size="nats"),
]
ABLATED = ablation(
    [
        ("asked", "L0H1", "L2H1.K", 3.0, "causal", "L2.kv0", "L2H0"),
        ("asked", "L0.mlp", "unembed", -0.5, "causal", None, ""),
        ("random", "L0H0", "L1H0.K", 0.02, "inconclusive", "L1.kv0", "L1H1"),
        ("random", "L1H0", "L2H0.K", -0.01, "inconclusive", "L2.kv0", "L2H1"),
        ("random", "L0.mlp", "unembed", 9.0, "causal", None, ""),
        ("random", "L0H0", "L1H0.Q", 7.0, "causal", None, ""),
    ]
)
SAID = Record(
    "labels",
    (Axis("head", HEADS),),
    (
        Column("previous_token", torch.tensor([0.1, 0.9, 0.2, 0.0, 0.0, 0.0]), "", "to the one before"),
        Column("induction", torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.8]), "", "to the one after"),
        Column("label", (None, "previous_token", None, None, None, "induction")),
    ),
    {"threshold": 0.4},
)


def told(records: list[Record]) -> Rows:
    """Rows of the section by port, writer and reader."""
    found = payload(records, MANIFEST)["evidence"]["rows"]
    keyed = {(row["port"], row["writer"], row["reader"]): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def of(record: Record, column: str, reader: str, writer: str) -> float:
    return float(record[column][HEADS.index(reader), record.axis("writer").index(writer)])  # type: ignore[index]


def test_a_group_comes_once_by_its_strongest_reader():
    rows = told([*WEIGHTS, *FLOWED])
    for record in WEIGHTS:
        port, best = record.parameters["port"], {}
        for row in record.rows():
            end = row["writer"], row["reader"] if port == "Q" else row["reader_group"]
            if "H" in row["writer"] and row["score"] > best.get(end, {"score": 0})["score"]:
                best[end] = row
        wanted = sorted(best.values(), key=lambda row: -row["score"])
        found = [row for row in rows.values() if row["port"] == port]
        assert [(r["writer"], r["reader"], r["score"], r["z"]) for r in found] == [
            (r["writer"], r["reader"].removesuffix(f".{port}"), r["score"], r["z"]) for r in wanted
        ]
        for row in found:
            layer = row["reader"][:2]
            shared = (None, []) if port == "Q" else (f"{layer}.kv0", [f"{layer}H0", f"{layer}H1"])
            assert (row["group"], row["shared"]) == shared


def test_a_port_shows_its_twenty_strongest_groups():
    names = tuple(f"L{layer}H{head}" for layer in range(6) for head in range(6))
    scores = torch.rand(36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    groups = tuple(f"{name[:2]}.kv{int(name[3]) // 3}" for name in names)
    axes = Axis("reader", tuple(f"{name}.V" for name in names), groups), Axis("writer", names)
    record = Record(
        "composition", axes, tuple(Column(n, scores) for n in ("score", "strength", "null_ratio", "z")), {"port": "V"}
    )
    flow = Record("contribution", axes, (Column("contribution", scores),), {"port": "V"})
    best: dict[tuple[str, str], float] = {}
    for row in record.rows():
        end = row["writer"], row["reader_group"]
        best[end] = max(best.get(end, 0.0), row["score"])
    found = payload([record, flow], MANIFEST)["evidence"]["rows"]
    assert [row["score"] for row in found] == sorted(best.values(), reverse=True)[:20]


def test_what_flowed_is_that_of_the_reader_named_and_ranked_among_its_writers():
    rows = told([*WEIGHTS, *FLOWED])
    contribution, _, attribution = FLOWED
    for (port, writer, reader), row in rows.items():
        if port != "K":
            continue
        assert row["contribution"] == of(contribution, "contribution", reader, writer)
        assert row["share"] == of(contribution, "share", reader, writer)
        assert row["attribution"] == of(attribution, "attribution", reader, writer)
        others = [of(contribution, "contribution", reader, w) for w in HEADS if w[1] < reader[1]]
        assert (row["rank"], row["of"]) == (1 + sum(x > row["contribution"] for x in others), len(others))
    assert {row["rank"] for row in rows.values() if row["port"] == "K"} >= {1, 2, 3, 4}


def test_removal_is_held_against_the_random_edges_of_its_own_kind():
    rows = {key: row for key, row in told([*WEIGHTS, *FLOWED, ABLATED]).items() if row["effect"] is not None}
    (keys, mlp) = sorted(rows.values(), key=lambda row: row["port"])
    assert (keys["port"], keys["writer"], keys["group"], keys["shared"]) == ("K", "L0H1", "L2.kv0", ["L2H0", "L2H1"])
    assert (keys["effect"], keys["low"], keys["high"], keys["verdict"]) == (3.0, 2.9, 3.1, "causal")
    assert keys["random"] == {"low": -0.01, "high": 0.02, "count": 2}
    assert keys["score"] == max(of(WEIGHTS[0], "score", reader, "L0H1") for reader in ("L2H0", "L2H1"))
    assert (mlp["writer"], mlp["reader"], mlp["effect"], mlp["random"]["low"]) == ("L0.mlp", "unembed", -0.5, 9.0)


def test_what_is_not_known_is_absent_and_never_zero():
    assert payload(WEIGHTS, MANIFEST)["evidence"] is None, "nothing was run"
    rows = told([*WEIGHTS, *FLOWED])
    values = [row for row in rows.values() if row["port"] == "V"]
    text = (
        "contribution",
        "share",
        "rank",
        "of",
        "attribution",
        "effect",
        "low",
        "high",
        "changed",
        "verdict",
        "random",
    )
    assert values
    assert all(row[name] is None for row in values for name in text)
    holed = pairs("contribution", "K", HEADS, 10, contribution="squared logits", share="1")
    for column in holed.columns:
        column.values[HEADS.index("L2H0") :, 0] = NAN  # type: ignore[index]
    keys = [row for row in told([WEIGHTS[0], holed]).values() if row["writer"] == "L0H0"]
    assert [row["contribution"] is None for row in keys] == [row["group"] == "L2.kv0" for row in keys]
    (row,) = (row for row in keys if row["group"] == "L2.kv0")
    assert all(row[name] is None for name in ("contribution", "share", "rank", "of"))
    (removed, mlp) = told([ABLATED]).values()
    assert removed["shared"] == ["L2H1", "L2H0"]
    assert all(row[name] is None for row in (removed, mlp) for name in ("score", "z", "contribution", "attribution"))
    one = ablation([("asked", "L0H0", "L1H0.Q", 0.0, "negligible", None, "")])
    bare = Record("ablation", one.axes, tuple(_without_interval(c) for c in one.columns), {}, one.stamp)
    (row,) = told([bare]).values()
    assert (row["effect"], row["low"], row["random"]) == (0.0, None, None)


def _without_interval(column: Column) -> Column:
    return Column(column.name, torch.tensor([NAN])) if column.name in ("low", "high") else column


def test_real_records_fit():
    model = tiny("llama-grouped-untied")
    stream = vw.open(model)
    tokens = torch.randint(0, 37, (3, 12), generator=torch.Generator().manual_seed(0))
    run = Run.on_tokens(stream, tokens, model=model)
    ablated = Ablation([("L0H1", "L2H4.K"), ("L1.mlp", "unembed")], random=2)(run)
    flowed = Contribution("K", Observation().moments(run))(stream), *(Attribution(port)(run) for port in "QKV")
    labels = Labels()(Run.on_tokens(stream, tokens.repeat(1, 2), first=12, model=model))
    found = payload([vw.Composition("K")(stream), *flowed, ablated, labels], MANIFEST)
    assert [table["labels"] for table in found["labels"]] == [[str(c.label) for c in stream.heads]]
    rows = found["evidence"]["rows"]
    asked = [row for row in rows if row["effect"] is not None]
    assert [row["effect"] for row in asked] == [row["effect_nats"] for row in ablated.rows()][:2]
    assert asked[0]["shared"] == ["L2H3", "L2H4", "L2H5"]
    assert all(
        asked[0][name] is not None for name in ("score", "z", "contribution", "share", "rank", "attribution", "changed")
    )
    top = [row for row in rows if row["port"] == "K"]
    assert len(top) >= 20
    assert found["evidence"]["stamps"]["contribution"]["tokens"] == tokens.numel()


@needs_node
def test_the_page_puts_them_side_by_side(tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(path, [*WEIGHTS, *FLOWED, ABLATED, SAID], MANIFEST)
    shown = drawn_by_node(path)
    assert shown["sections"][:2] == ["stream", "evidence"]
    assert shown["bad"] == []
    text = shown["text"]["evidence"]
    assert all(each in text for each in ("640 tokens", "4 sequences", "2.5 nats", "next_token_loss", "causal"))
    assert set(map(tuple, shown["absent"])) == {
        ("–", why)
        for why in (
            "this edge was not removed", "not computed for this port",
            "the atlas has no composition through this port", "given for queries, keys and values only",
        )
    }  # fmt: skip
    axis, *bars = shown["effects"]
    assert not axis["told"]
    assert [bar["told"].split(";")[0] for bar in bars] == ["3 nats", "−0.5 nats"], "sorted by effect"
    keys, mlp = (bar["marks"] for bar in bars)
    at = {name: float(marks["circle"]["cx"]) for name, marks in (("keys", keys), ("mlp", mlp))}
    zero, band = float(keys["zero"]["x1"]), keys["band"]
    assert at["mlp"] < zero < at["keys"]
    assert float(band["x"]) <= zero <= float(band["x"]) + float(band["width"])
    assert float(keys["interval"]["x1"]) < at["keys"] < float(keys["interval"]["x2"])
    assert float(mlp["band"]["x"]) > at["keys"], "one scale for all: the random MLP did more"
    for effect in (2.0, -2.0):
        write_report(path, [ablation([("asked", "L0H0", "L1H0.Q", effect, "causal", None, "")])], MANIFEST)
        marks = drawn_by_node(path)["effects"][1]["marks"]
        assert 0 < float(marks["zero"]["x1"]) < 158, "0 is on the scale though nothing is there"
        assert (float(marks["circle"]["cx"]) > float(marks["zero"]["x1"])) == (effect > 0)
    write_report(path, [ABLATED], MANIFEST)
    alone = drawn_by_node(path)
    assert (alone["sections"], alone["bad"]) == (["evidence", "others", "guide"], [])


@needs_node
def test_heads_are_labelled_wherever_they_are_named(tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(path, [*WEIGHTS, *FLOWED, SAID], MANIFEST)
    shown = drawn_by_node(path)
    assert set(shown["tags"]["evidence"]) == set(shown["tags"]["edges"]) == {"previous token", "induction"}
    assert "L0H1 (previous token)" in " ".join(shown["said"])
    assert ("–", "not run on text: no edge was removed") in set(map(tuple, shown["absent"])), "nothing was removed"
    write_report(path, [*WEIGHTS, *FLOWED], MANIFEST)
    assert not any(drawn_by_node(path)["tags"].values())
