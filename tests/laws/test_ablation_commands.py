"""``vweights ablate`` and ``vweights attribute``: one JSON object that says what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.record import Record
from virtual_weights.runtime.edges.ablation import Ablation
from virtual_weights.runtime.edges.attribution import Attribution, LogitDifference
from virtual_weights.runtime.edges.edge import Edge, removed
from virtual_weights.runtime.running.model import load
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import DEFAULT_TEXT, STORY_TEXT, texts, title
from virtual_weights.stream.group import HEAD_PORTS

TEXT = ("--length", "5", "--tokens", "20", "--seed", "3")
RUN = ("--length", "10", "--tokens", "40", "--seed", "3", "--repeated")


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, how: tuple[str, ...] = RUN) -> dict[str, Any]:
    assert run([*map(str, arguments), *how, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def repeats(stream: vw.Stream) -> Run:
    """What ``RUN`` says."""
    return Run.on_repeats(stream, 40, 10, 3)


def by_kind(given: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in given["rows"] if row["kind"] == kind]


def attributions(records: dict[str, Record]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of records by port, by their ends."""
    rows = ((port, row) for port, record in records.items() for row in record.rows())
    return {(str(row["writer"]), str(row["reader"])): row for port, row in rows}


def test_one_edge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "ablate", folder, "L0H1", "L2H4.K", "--random", 3, "--replace", "resample", "--move-scalars")
    stream = vw.open(folder)
    record = Ablation([("L0H1", "L2H4.K")], 3, "resample", "move", seed=3)(repeats(stream))
    rows = list(record.rows())
    assert [edge["effect_nats"] for edge in given["rows"]] == pytest.approx(
        [row["effect_nats"] for row in rows], abs=1e-6
    )
    (edge,) = by_kind(given, "asked")
    assert (edge["writer"], edge["reader"], edge["group"]) == ("L0H1", "L2H4.K", "L2.kv1")
    assert edge["shared_with"] == ["L2H3", "L2H5"]
    assert edge["interval"] == pytest.approx([rows[0]["low"], rows[0]["high"]], abs=1e-6)
    assert edge["verdict"] == rows[0]["verdict"]
    assert given["summary"]["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    assert len(by_kind(given, "random")) == 3
    assert given["stamp"]["text"] == "repeated random tokens (seed 3, 5 before the repeat)"
    assert (given["stamp"]["sequences"], given["stamp"]["tokens"]) == (4, 40)
    assert given["provenance"]["fingerprint"] == stream.source.fingerprint


def test_the_strongest_edges_one_per_group(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "ablate", folder, "--port", "V", "--edges", 6, "--random", 2)
    edges = by_kind(given, "asked")
    groups = [(edge["writer"], edge["group"]) for edge in edges]
    assert len(groups) == len(set(groups)) == 6
    record = vw.Composition("V")(vw.open(folder))
    scores = {(r["writer"], r["reader"]): r["score"] for r in record.rows()}
    best: dict[tuple[object, object], float] = {}
    for row in record.rows():
        key = (row["writer"], row["reader_group"])
        best[key] = max(best.get(key, 0.0), float(row["score"] or 0))
    assert [edge["score"] for edge in edges] == pytest.approx(sorted(best.values(), reverse=True)[:6])
    assert all(edge["score"] == scores[edge["writer"], edge["reader"]] for edge in edges)
    assert {edge["reader"][-2:] for edge in by_kind(given, "random")} == {".V"}


@pytest.mark.parametrize(("port", "ending"), [("up", ".mlp.up"), ("unembed", "unembed"), ("Q", ".Q")])
def test_other_ports(port: str, ending: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "ablate", folder, "--port", port, "--edges", 2, "--random", 1)
    assert len(by_kind(given, "asked")) == 2
    assert len(by_kind(given, "random")) >= 1
    assert all(edge["reader"].endswith(ending) for edge in given["rows"])


def every_row(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The edges into all ports."""
    return [row for part in (given, *given.get("more", ())) for row in part["rows"]]


def test_attribution(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "attribute", folder, "--top", 200)
    assert [part["parameters"]["port"] for part in (given, *given["more"])] == list(HEAD_PORTS)
    run = repeats(vw.open(folder))
    expected = attributions({port: Attribution(port)(run) for port in HEAD_PORTS})
    for part, count in zip((given, *given["more"]), (6 * 12 + 6 * 6, *[6 * 4 + 6 * 2] * 2), strict=True):
        edges, port = part["rows"], part["parameters"]["port"]
        assert len(edges) == count  # of every query head, and of two shared heads of keys and of values
        sizes = [abs(edge["attribution"]) for edge in edges]
        assert sizes == sorted(sizes, reverse=True)
        for edge in edges:
            row = expected[edge["writer"], edge["reader"]]
            assert edge["attribution"] == pytest.approx(row["attribution"], rel=1e-3, abs=1e-7)
            assert edge["reader"].endswith(port)
            assert len(edge["shared_with"]) == (0 if port == "Q" else 2)
    keys = answer(capsys, "attribute", folder, "--top", 5, "--port", "K")
    assert keys["rows"] == given["more"][0]["rows"][:5]
    assert "more" not in keys


def test_a_text(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    letters = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[ord(c) % 37 for c in text]))
    monkeypatch.setattr("virtual_weights.runtime.running.run.tokenizer_of", lambda _: letters)
    (folder / "text.txt").write_text("one two three four five, and a little more")
    arguments = ("ablate", folder, "L0H1", "L2H4.K", "--random", 0, "--text", folder / "text.txt")
    given = answer(capsys, *arguments, "--batch", 2, how=TEXT)
    tokens = torch.tensor([ord(c) % 37 for c in "one two three four f"]).view(4, 5)
    record = Ablation([("L0H1", "L2H4.K")], random=0)(Run.on_tokens(vw.open(folder), tokens))
    assert given["summary"]["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    assert given["stamp"]["text"] == str(folder / "text.txt")
    assert (given["stamp"]["sequences"], given["stamp"]["tokens"]) == (4, 20)
    whole = answer(capsys, *arguments, how=("--length", "60", "--tokens", "60"))
    assert (whole["stamp"]["sequences"], whole["stamp"]["tokens"]) == (1, 42), "all that the text has"
    assert run([*map(str, arguments), "--length", "1"]) == 2
    assert "chunks of 1 tokens, of which the first 1 do not count" in capsys.readouterr().err
    assert run([*map(str, arguments), "--repeated"]) == 2
    assert "more than one kind of text: --text and --repeated" in capsys.readouterr().err


def test_without_a_text_the_default_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[ord(c) % 37 for c in text[:400]]))
    monkeypatch.setattr("virtual_weights.runtime.running.run.tokenizer_of", lambda _: letters)
    tokens = torch.tensor([ord(c) % 37 for c in next(texts())[:20]]).view(4, 5)
    given = answer(capsys, "ablate", folder, "L0H1", "L2H4.K", "--random", 0, how=TEXT)
    stamp = given["stamp"]
    assert (stamp["text"], stamp["sequences"], stamp["tokens"]) == (DEFAULT_TEXT, 4, 20)
    same = Run.on_tokens(vw.open(folder), tokens)
    record = Ablation([("L0H1", "L2H4.K")], random=0)(same)
    assert given["summary"]["clean_loss"] == pytest.approx(record.stamp["clean_loss"], rel=1e-6)
    given = answer(capsys, "attribute", folder, "--top", 1, "--port", "V", how=TEXT)
    assert given["stamp"]["text"] == DEFAULT_TEXT
    best = next(Attribution("V")(same).top(1, "size").rows())
    assert given["rows"][0]["attribution"] == pytest.approx(best["attribution"], rel=1e-3)


def test_attribution_of_a_logit_to_every_kind_of_edge(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("attribute", folder, "--prompt-ids", "3,14,15,9", "--token", "7", "--writers", "all")
    ports = ("--port", "V", "--port", "up", "--port", "unembed", "--top", 500)
    given = answer(capsys, *arguments, *ports, "--against", "2", how=())
    stream, tokens = vw.open(folder), torch.tensor([[3, 14, 15, 9]])
    prompt, metric = Run.on_tokens(stream, tokens), LogitDifference(7, 2)
    expected = attributions({port: Attribution(port, "all", metric)(prompt) for port in ("V", "up", "unembed")})
    assert given["summary"]["metric"] == "the logit of 7 less that of 2"
    edges = [edge for part in (given, *given["more"]) for edge in part["rows"]]
    assert {edge["reader"] for edge in edges} >= {"unembed", "L2.mlp.up", "L2H0.V"}
    assert {edge["writer"] for edge in edges} >= {"embed", "L1.mlp", "L1H5"}
    for edge in edges:
        row = expected[edge["writer"], edge["reader"]]
        assert edge["attribution"] == pytest.approx(row["attribution"], rel=1e-3, abs=1e-6)
    # the unembedding is linear: leaving an edge into it out does what attribution says, all of it
    model: Any = load(stream)
    with torch.no_grad():
        clean = model(tokens).logits[0, -1]
        with removed(model, stream, [Edge.of(stream, "L1.mlp", "unembed")]):
            change = model(tokens).logits[0, -1] - clean
    assert expected["L1.mlp", "unembed"]["attribution"] == pytest.approx(float(change[7] - change[2]), rel=1e-3)
    texts = tuple(f"{' ' if i % 2 else ''}w{i}" for i in range(37))
    monkeypatch.setattr("virtual_weights.checkpoint.safetensors_source.SafetensorsSource.token_texts", lambda _: texts)
    named = answer(capsys, *arguments[:5], " w7", *arguments[6:], *ports, "--against", "w2", how=())
    assert named["summary"]["metric"] == "the logit of ' w7' less that of 'w2'"
    assert named["rows"] == given["rows"]
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
    assert run(["ablate", str(folder), "L0H1", "L2H4.K", "--random", "1", *RUN]) == 0
    shown = capsys.readouterr().out
    assert "random edges of the same port" in shown
    assert "more sequences may decide" in shown
    assert run(["attribute", str(folder), "--top", "2", *RUN]) == 0
    assert "to first order" in capsys.readouterr().out
    assert run(["ablate", str(folder), "L0H1"]) == 2
    assert run(["ablate", str(folder), "L2H1", "L0H1.K", *RUN]) == 2
    assert "cannot reach" in capsys.readouterr().err


def test_an_edge_token_by_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edges = ("L0H1", "L2H4.K", "--edge", "L1.mlp,unembed", "--by-token")
    given = answer(capsys, "ablate", folder, *edges)
    record = vw.EdgeTokens("L0H1", "L2H4.K")(repeats(vw.open(folder)))
    assert given["question"] == "edge_tokens"
    assert [row["loss_without"] for row in given["rows"]] == pytest.approx(
        [row["loss_without"] for row in record.rows()], abs=1e-5
    )
    changes = [row["change"] for row in given["rows"] if row["change"] is not None]
    assert sum(changes) / len(changes) == pytest.approx(given["summary"]["effect_nats"], abs=1e-9)
    (other,) = given["more"]
    assert other["stamp"]["edge"] == "L1.mlp -> unembed"
    assert run(["ablate", str(folder), *edges, *RUN]) == 0
    out = capsys.readouterr().out
    large = sum(abs(row["change"] or 0) > 0.1 for row in other["rows"])
    assert f"{large} of {len(changes)} counted tokens change by more than 0.1 nats without L1.mlp -> unembed" in out
    assert large > 0


@pytest.mark.parametrize(
    ("arguments", "words"), [((), "without an edge"), (("L0H1", "L2H4.K", "--together"), "--together with --by-token")]
)
def test_token_by_token_needs_an_edge_and_nothing_else(
    arguments: tuple[str, ...], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ablate", str(folder), "--by-token", *arguments, *RUN]) == 2
    assert words in capsys.readouterr().err


def test_the_story_goes_by_its_name() -> None:
    (story,) = texts("story")
    assert 110 <= len(story.split()) <= 130
    assert all(story.count(name) >= 3 for name in ("Ilsabet Marrow", "Corin Fennick", "Tolverdale"))
    assert (title("story"), title(), title("book.txt")) == (STORY_TEXT, DEFAULT_TEXT, "book.txt")
