"""What reads or writes nothing has strength 0 and no score; a pair that cannot reach is absent: two marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import frame
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.atlas import Atlas, edges
from virtual_weights.record import Record
from virtual_weights.runtime.fate.persistence import ErasedBy, Persistence
from virtual_weights.stream import Question


def with_dead_parts() -> Any:
    """L0H0 writes nothing, L0H1 nothing but rounding (its O passes what its V does not give), L2H5 has no keys."""
    model: Any = tiny("llama-full", dtype=torch.float64)
    turn = frame(3, 4)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :4] = 0
        first = model.model.layers[0].self_attn
        first.v_proj.weight[4:8] = turn[:, :2] @ turn[:, :2].T @ first.v_proj.weight[4:8]
        first.o_proj.weight[:, 4:8] = first.o_proj.weight[:, 4:8] @ turn[:, 2:] @ turn[:, 2:].T
        model.model.layers[2].self_attn.k_proj.weight[20:] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
        model.model.layers[2].mlp.up_proj.weight[7] = 0
    return model


def marks(record: Record, score: str, size: str, *, dead: tuple[str, str], late: tuple[str, str]) -> None:
    row = record[dead]
    assert (row[score], row[size]) == (None, 0)
    with pytest.raises(vw.VirtualWeightsError, match="no value"):
        record[late]
    rows = json.loads(record.to_json())["rows"]
    ends = [tuple(row[axis.name] for axis in reversed(record.axes)) for row in rows]
    assert dead in ends
    assert late not in ends
    assert rows[ends.index(dead)][score] is None
    assert rows[ends.index(dead)][size] == 0


PAIRS: dict[str, tuple[Question[Any], str, str, tuple[str, str], tuple[str, str]]] = {
    "a head that writes nothing": (
        vw.Composition("V"),
        "score",
        "strength",
        ("L0H0", "L1H2.V"),
        ("L1H0", "L1H2.V"),
    ),
    "a head that writes rounding": (vw.Composition("Q"), "score", "strength", ("L0H1", "L2H2.Q"), ("L2H0", "L2H2.Q")),
    "a head without keys": (vw.Composition("K"), "score", "strength", ("L1H0", "L2H5.K"), ("L2H0", "L2H5.K")),
    "all writers": (
        vw.Composition("K", writers="all"),
        "score",
        "strength",
        ("embed", "L2H5.K"),
        ("L2.mlp", "L2H5.K"),
    ),
    "overlap": (vw.Overlap("K"), "overlap", "dimensions", ("L1H0", "L2H5.K"), ("L2H0", "L2H5.K")),
    "subspaces": (Subspaces("O", "K"), "overlap", "strength", ("L2H5.K", "L0H0.O"), ("L0H1.K", "L0H0.O")),
    "a head and neurons": (HeadNeuron("up"), "score", "strength", ("L0H0", "L1N5.up"), ("L2H0", "L1N5.up")),
    "a dead neuron": (HeadNeuron("up"), "score", "strength", ("L1H0", "L2N7.up"), ("L2H0", "L0N0.up")),
    "neurons and heads": (NeuronHead("V"), "score", "strength", ("L0N3", "L1H1.V"), ("L1N3", "L1H1.V")),
    "erasure": (vw.Erasure(), "erasure", "strength", ("L0H0", "L1H2"), ("L1H0", "L1H2")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_dead_is_told_from_unreachable(name: str) -> None:
    question, score, size, dead, late = PAIRS[name]
    marks(question(vw.open(with_dead_parts())), score, size, dead=dead, late=late)


def test_so_it_is_while_the_model_runs() -> None:
    model = with_dead_parts()
    run = vw.Run.on_tokens(vw.open(model), [torch.arange(20)], model=model)
    marks(Persistence()(run), "projection", "strength", dead=("3", "L0H0"), late=("0", "L0H0"))
    record = ErasedBy()(run)
    i, j = (record.axis("writer").index(name) for name in ("L0H0", "L1H3"))
    assert record["share"][[i, j], [j, i]].isnan().all()
    assert record["strength"][i, j] == 0
    assert record["strength"][j, i].isnan()
    assert record.present().view(record["share"].shape)[[i, j], [j, i]].tolist() == [True, False]


def test_parts_that_do_nothing_have_rows_of_their_own() -> None:
    stream = vw.open(with_dead_parts())
    heads, neurons = HeadErasers(draws=2)(stream), Neurons()(stream)
    rows = {str(row[axis]): row for record, axis in ((heads, "head"), (neurons, "neuron")) for row in record.rows()}
    for name in ("L0H0", "L0H1"):
        assert (rows[name]["copying"], rows[name]["strength"], rows[name]["kept"]) == (None, 0, 1)
    for name in ("L0N3", "L2N7"):
        assert (rows[name]["cosine"], rows[name]["strength"]) == (None, 0)


def test_tables_and_files_tell_them_apart(tmp_path: Path) -> None:
    record = vw.Composition("V")(vw.open(with_dead_parts()))
    record.to_parquet(tmp_path / "v.parquet")
    assert Record.from_parquet(tmp_path / "v.parquet") == record
    atlas = Atlas.create(tmp_path / "atlas", dict(record.provenance))
    assert atlas.get(atlas.put(record)) == record
    (edge,) = edges(atlas, "L1H2.V", "L0H0", by="strength")
    assert (edge["score"], edge["strength"]) == (None, 0)
    assert edges(atlas, "L1H2.V", "L1H0", by="strength") == []
