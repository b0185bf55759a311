"""``vweights prove`` and ``vweights attribute``: one JSON object that says what the records say."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.cli.prove import ported
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.attribution import attribute, logit_difference
from virtual_weights.runtime.edges.edge import Edge, next_token_loss
from virtual_weights.runtime.edges.removal import removed
from virtual_weights.runtime.running.text import DEFAULT_TEXT, repeated_tokens, texts

TOKENS = repeated_tokens(37, 5, 4, 3)
TEXT = ("--length", "5", "--sequences", "4", "--seed", "3")
RUN = (*TEXT, "--repeated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model: Any = tiny("llama-grouped-untied")
    model.save_pretrained(path)
    return path


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, how: tuple[str, ...] = RUN) -> dict[str, Any]:
    assert run([*map(str, arguments), *how, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_one_edge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "prove", folder, "L0H1", "L2H4.K", "--random", 3, "--replace", "resample", "--move-scalars")
    stream = vw.open(folder)
    record = prove(stream, [("L0H1", "L2H4.K")], TOKENS, Trial("resample", "move", 5, 3, 3))
    own = list(record.rows())
    assert [edge["effect_nats"] for edge in found["edges"] + found["random"]] == pytest.approx(
        [row["effect_nats"] for row in own], abs=1e-6
    )
    (edge,) = found["edges"]
    assert (edge["writer"], edge["reader"], edge["channel"]) == ("L0H1", "L2H4.K", "L2.kv1")
    assert edge["shared_with"] == ["L2H3", "L2H5"]
    assert edge["interval"] == pytest.approx([own[0]["low"], own[0]["high"]], abs=1e-6)
    assert edge["verdict"] == own[0]["verdict"]
    assert found["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    assert len(found["random"]) == 3
    assert "said twice" in found["text"]
    assert found["provenance"]["fingerprint"] == stream.source.fingerprint


def test_the_strongest_edges_one_per_channel(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "prove", folder, "--port", "V", "--top", 6, "--random", 2)
    channels = [(edge["writer"], edge["channel"]) for edge in found["edges"]]
    assert len(channels) == len(set(channels)) == 6
    record = vw.Composition("V")(vw.open(folder))
    own = {(str(r["writer"]), f"{r['reader']}.V"): r["score"] for r in record.rows()}
    best: dict[tuple[object, object], float] = {}
    for row in record.rows():
        key = (row["writer"], row["reader_channel"])
        best[key] = max(best.get(key, 0.0), float(row["score"] or 0))
    assert [edge["score"] for edge in found["edges"]] == pytest.approx(sorted(best.values(), reverse=True)[:6])
    assert all(edge["score"] == own[edge["writer"], edge["reader"]] for edge in found["edges"])
    assert {edge["reader"][-2:] for edge in found["random"]} == {".V"}


@pytest.mark.parametrize(("port", "ending"), [("up", ".mlp.up"), ("unembed", "unembed"), ("Q", ".Q")])
def test_other_ports(port: str, ending: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "prove", folder, "--port", port, "--top", 2, "--random", 1)
    assert len(found["edges"]) == 2
    assert all(edge["reader"].endswith(ending) for edge in found["edges"] + found["random"])


def test_attribution(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "attribute", folder, "--top", 200)
    records = attribute(vw.open(folder), TOKENS, partial(next_token_loss, first=5))
    own = {(str(r["writer"]), f"{r['reader']}.{port}"): r for port in records for r in records[port].rows()}
    edges = found["edges"]
    assert len(edges) == 6 * 12 + 6 * 6 + 2 * (6 * 4 + 6 * 2)  # queries, and two shared heads of keys and of values
    sizes = [abs(edge["attribution"]) for edge in edges]
    assert sizes == sorted(sizes, reverse=True)
    for edge in edges:
        row = own[edge["writer"], edge["reader"]]
        assert edge["attribution"] == pytest.approx(row["attribution"], rel=1e-3, abs=1e-7)
        assert len(edge["shared_with"]) == (0 if edge["reader"].endswith("Q") else 2)
    keys = answer(capsys, "attribute", folder, "--top", 5, "--port", "K")["edges"]
    assert keys == [edge for edge in edges if edge["reader"].endswith("K")][:5]


def test_a_text(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    letters = lambda text, **_: {"input_ids": [ord(c) % 37 for c in text]}  # noqa: E731
    monkeypatch.setattr("virtual_weights.cli.tokens.tokenizer_of", lambda _: letters)
    (folder / "text.txt").write_text("one two three four five, and a little more")
    arguments = ("prove", folder, "L0H1", "L2H4.K", "--random", 0, "--text", folder / "text.txt")
    found = answer(capsys, *arguments, "--batch", 2, how=TEXT)
    tokens = torch.tensor([ord(c) % 37 for c in "one two three four f"]).view(4, 5)
    record = prove(vw.open(folder), [("L0H1", "L2H4.K")], tokens, Trial(random=0))
    assert found["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    assert "4 sequences of 5 tokens" in found["text"]
    assert run([*map(str, arguments), "--length", "60"]) == 2
    assert "less than 60 tokens" in capsys.readouterr().err
    assert run([*map(str, arguments), "--repeated"]) == 2
    assert "a text and random tokens" in capsys.readouterr().err


def test_without_a_text_the_default_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = lambda text, **_: {"input_ids": [ord(c) % 37 for c in text[:400]]}  # noqa: E731
    monkeypatch.setattr("virtual_weights.cli.tokens.tokenizer_of", lambda _: letters)
    tokens = torch.tensor([ord(c) % 37 for c in next(texts())[:20]]).view(4, 5)
    found = answer(capsys, "prove", folder, "L0H1", "L2H4.K", "--random", 0, how=TEXT)
    assert found["text"] == f"the first 4 sequences of 5 tokens of {DEFAULT_TEXT}"
    record = prove(vw.open(folder), [("L0H1", "L2H4.K")], tokens, Trial(random=0))
    assert found["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    found = answer(capsys, "attribute", folder, "--top", 1, "--port", "V", how=TEXT)
    assert DEFAULT_TEXT in found["text"]
    best = next(attribute(vw.open(folder), tokens)["V"].top(1, "size").rows())
    assert found["edges"][0]["attribution"] == pytest.approx(best["attribution"], rel=1e-3)


def test_attribution_of_a_logit_to_every_kind_of_edge(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("attribute", folder, "--prompt-ids", "3,14,15,9", "--token", "7", "--writers", "all")
    ports = ("--port", "V", "--port", "up", "--port", "unembed", "--top", 500)
    found = answer(capsys, *arguments, *ports, "--against", "2", how=())
    tokens = torch.tensor([[3, 14, 15, 9]])
    metric = partial(logit_difference, token=7, against=2)
    records = attribute(vw.open(folder), tokens, metric, ports=("V", "up", "unembed"), writers="all")
    own = {(str(r["writer"]), ported(str(r["reader"]), p)): r for p in records for r in records[p].rows()}
    assert found["metric"] == "the logit of 7 less that of 2"
    assert {edge["reader"] for edge in found["edges"]} >= {"unembed", "L2.mlp.up", "L2H0.V"}
    assert {edge["writer"] for edge in found["edges"]} >= {"embed", "L1.mlp", "L1H5"}
    for edge in found["edges"]:
        row = own[edge["writer"], edge["reader"]]
        assert edge["attribution"] == pytest.approx(row["attribution"], rel=1e-3, abs=1e-6)
    # the unembedding is linear: leaving an edge into it out does what attribution says, all of it
    model: Any = load(vw.open(folder))
    with torch.no_grad():
        clean = model(tokens).logits[0, -1]
        with removed(model, vw.open(folder), [Edge.of(vw.open(folder), "L1.mlp", "unembed")]):
            change = model(tokens).logits[0, -1] - clean
    assert own["L1.mlp", "unembed"]["attribution"] == pytest.approx(float(change[7] - change[2]), rel=1e-3)
    texts = tuple(f"{' ' if i % 2 else ''}w{i}" for i in range(37))
    monkeypatch.setattr("virtual_weights.checkpoint.safetensors_source.SafetensorsSource.token_texts", lambda _: texts)
    named = answer(capsys, *arguments[:5], " w7", *arguments[6:], *ports, "--against", "w2", how=())
    assert named["metric"] == "the logit of ' w7' less that of 'w2'"
    assert named["edges"] == found["edges"]
    assert run([*map(str, arguments[:5]), "w7"]) == 2
    assert "try ' w7'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--token", "7"),
        ("--prompt-ids", "3,4", "--against", "7"),
        ("--prompt-ids", "3,4", "--token", "37"),
        ("--prompt-ids", "3,4", "--token", "cat"),
        ("--prompt-ids", "3,x"),
        ("--prompt-ids", "3,4", "--repeated"),
        ("--prompt-ids", "3,4", "--port", "in"),
    ],
)
def test_what_is_no_metric_or_prompt_is_refused(
    wrong: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = wrong if "--prompt-ids" in wrong else (*wrong, *RUN)
    assert run(["attribute", str(folder), *given]) == 2
    assert "expected:" in capsys.readouterr().err


def test_tables_and_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prove", str(folder), "L0H1", "L2H4.K", "--random", "1", *RUN]) == 0
    told = capsys.readouterr().out
    assert "matched random edges" in told
    assert "not shown to be absent" in told
    assert run(["attribute", str(folder), "--top", "2", *RUN]) == 0
    assert "to first order" in capsys.readouterr().out
    assert run(["prove", str(folder), "L0H1"]) == 2
    assert run(["prove", str(folder), "L2H1", "L0H1.K", *RUN]) == 2
    assert "cannot reach" in capsys.readouterr().err
