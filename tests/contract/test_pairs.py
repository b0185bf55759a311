"""Clean and corrupted prompts, in Python and on the command line, and text with or without a beginning token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import in_float64, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import virtual_weights as vw
from virtual_weights.cli import run as command
from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.edge import Edge, Removal, removed
from virtual_weights.runtime.running.hooks import watched

CLEAN, CORRUPTED = torch.randint(0, 37, (2, 3, 6), generator=torch.Generator().manual_seed(7))
EDGE = ("L0H1", "L2H4.K")
WORDS = [f"w{i}" for i in range(37)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose words are w0 to w36, of which w1 begins a document and w2 ends it."""
    path = tmp_path_factory.mktemp("model")
    model: Any = tiny("llama-grouped-untied")
    model.config.bos_token_id = 1
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("w1", 1), ("w2", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A w2", special_tokens=ends)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def words(ids: Tensor) -> str:
    return " ".join(WORDS[i] for i in ids.tolist())


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert command([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_partners_output_takes_the_place_of_the_writers() -> None:
    model, stream = in_float64("llama-grouped-untied")
    run = vw.Run.on_pairs(stream, list(CLEAN), list(CORRUPTED), model=model)
    metric = vw.LogitDifference([3, 4, 5], [6, 7, 8])
    record = vw.Ablation([EDGE], 0, "partner", metric=metric, batch=2)(run)
    edge = Edge.of(stream, *EDGE)
    with torch.no_grad():
        partners, _ = watched(model, stream, {("inner", "L0.attn")}, CORRUPTED)
        clean = model(CLEAN).logits[:, -1]
        with removed(model, stream, [edge], Removal("partner", partners=partners)):
            other = model(CLEAN).logits[:, -1]
        # the same by hand: the key of the partner's writer, in place of the clean one's
        o, z = stream.write("L0.attn")[1], watched(model, stream, {("inner", "L0.attn")}, CLEAN)[0]["inner", "L0.attn"]
        swapped = (partners["inner", "L0.attn"] - z)[:, :, 1] @ o.T
        with removed(model, stream, [edge], Removal(means={"L0H1": z[:, :, 1] @ o.T + swapped})):
            by_hand = model(CLEAN).logits[:, -1]
    torch.testing.assert_close(other, by_hand, rtol=1e-10, atol=1e-10)
    change = [float((other - clean)[i, 3 + i] - (other - clean)[i, 6 + i]) for i in range(3)]
    assert record["effect_nats"].tolist() == pytest.approx([sum(change) / 3], rel=1e-6)  # type: ignore[union-attr]
    assert abs(sum(change)) > 1e-4
    same = vw.Run.on_pairs(stream, list(CLEAN), list(CLEAN), model=model)
    assert vw.Ablation([EDGE], 0, "partner")(same)["effect_nats"].tolist() == pytest.approx([0.0], abs=1e-12)  # type: ignore[union-attr]
    assert same.identity != run.identity


def answered(logits: Tensor, tokens: Tensor) -> Tensor:
    rows = torch.arange(len(tokens))
    return logits[rows, -1, rows + 3] - logits[rows, -1, rows + 9]


def test_attribution_takes_the_answers_prompt_by_prompt() -> None:
    model, stream = in_float64("gpt2")
    run = vw.Run.on_pairs(stream, list(CLEAN), list(CORRUPTED), model=model)
    answers = [vw.Attribution("V", metric=m, batch=b)(run)["attribution"] for m, b in (
        (vw.LogitDifference([3, 4, 5], [9, 10, 11]), 2), (vw.LogitDifference([3, 4, 5], [9, 10, 11]), 3), (answered, 3)
    )]  # fmt: skip
    for other in answers[1:]:
        torch.testing.assert_close(answers[0], other, rtol=1e-9, atol=1e-12, equal_nan=True)
    with pytest.raises(UsageError, match="2 tokens whose logits"):
        vw.Attribution("V", metric=vw.LogitDifference([3, 4]))(run)
    with pytest.raises(UsageError, match="3 tokens against 2"):
        vw.LogitDifference([3, 4, 5], [6, 7])
    with pytest.raises(UsageError, match="logit of token 4 less that of token 4"):
        vw.LogitDifference([3, 4], 4)


@pytest.mark.parametrize(
    ("clean", "corrupted", "what"),
    [
        ([[1, 2, 3]], [[1, 2]], "pair 1 has 3 and 2 tokens"),
        ([[1, 2, 3], [1, 2]], [[1, 2, 4], [3, 4]], "pair 2 has 2 and 2 tokens"),
        ([[1, 2, 3]], [], "1 clean prompts and 0 corrupted"),
        ([], [], "0 clean prompts"),
        ([[1, 2, 99]], [[1, 2, 3]], "token ids 99"),
        ([[1, 2, 3]], [[1, 2, 99]], "token ids 99"),
        ([[1, 2, 3]], [[1, -1, 3]], "token ids -1"),
        ([5], [6], "a prompt of shape"),
        ([[[1, 2]]], [[[1, 3]]], "a prompt of shape"),
        ([[1, 2], "w1 w2"], [[1, 3], "w1 w3"], "texts and token ids"),
        ([[1, 2]], ["w1 w2"], "texts and token ids"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(clean: Any, corrupted: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        vw.Run.on_pairs(vw.open(tiny("gpt2")), clean, corrupted)


def test_parts_of_a_run_keep_their_partners() -> None:
    run = vw.Run.on_pairs(vw.open(tiny("gpt2")), list(CLEAN), list(CORRUPTED), first=2)
    assert torch.equal(run.halves()[1].sequences(partners=True), CORRUPTED[2:])
    assert torch.equal(run.prompt(4).sequences(partners=True), CORRUPTED[:1, :4])
    assert torch.equal(run.shortened(4).sequences(partners=True), CORRUPTED[:, :4])
    with pytest.raises(UsageError, match="no partners"):
        vw.Run.on_tokens(run.stream, CLEAN).sequences(partners=True)


@pytest.mark.parametrize("form", ["json lines", "columns"])
def test_pairs_from_a_file(form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        {"clean": words(c), "corrupted": words(x), "token": f"w{5 + i}", "against": "w9"}
        for i, (c, x) in enumerate(zip(CLEAN, CORRUPTED, strict=True))
    ]
    file = tmp_path / "pairs"
    table = ["\t".join(pairs[0]), *("\t".join(pair.values()) for pair in pairs)]
    file.write_text("\n".join(map(json.dumps, pairs) if form == "json lines" else table))
    given = answer(capsys, "ablate", folder, *EDGE, "--pairs", file, "--no-bos", "--random", 2, "--together")
    stream = vw.open(folder)
    run = vw.Run.on_pairs(stream, list(CLEAN), list(CORRUPTED))
    record = vw.Ablation([EDGE], 2, "partner", metric=vw.LogitDifference([5, 6, 7], [9, 9, 9]))(run)
    rows = list(record.rows())
    assert [row["effect_nats"] for row in given["rows"]] == pytest.approx([r["effect_nats"] for r in rows], abs=1e-5)
    assert [row["kind"] for row in given["rows"]] == [row["kind"] for row in rows]
    assert given["stamp"]["text"] == "pairs of prompts"
    assert given["stamp"]["bos"] == "none"
    assert given["stamp"]["run"] == run.identity
    (together,) = given["more"]
    assert together["question"] == "set_ablation"
    assert together["rows"][0]["quantity"] == "removed"
    assert together["rows"][0]["value"] == pytest.approx(rows[0]["effect_nats"], abs=1e-5)
    loss = answer(capsys, "ablate", folder, *EDGE, "--pairs", _without(file, pairs), "--replace", "mean", "--random", 0)
    assert loss["stamp"]["tokens"] == 3 * 8, "with what the tokenizer adds"
    assert loss["stamp"]["bos"] == "as the tokenizer adds it to a document"


def _without(file: Path, pairs: list[dict[str, str]]) -> Path:
    """The same pairs without answers."""
    other = file.with_name("bare")
    other.write_text("\n".join(json.dumps({side: p[side] for side in ("clean", "corrupted")}) for p in pairs))
    return other


@pytest.mark.parametrize(
    ("content", "options", "what"),
    [
        ("", (), "no pairs"),
        ("clean\tcorrupted\n", (), "no pairs"),
        ("clean\tother\nw1\tw2", (), "line 1: unknown 'other'"),
        ("clean\tcorrupted\nw1", (), "line 2: 1 columns below 2 names"),
        ("clean\ttoken\nw1\tw2", (), "line 2: a prompt is missing"),
        ("\nclean\tcorrupted\n\nw1\tw3\n\t \nw1\t", (), "line 6: a prompt is missing"),
        ('{"clean": "w1 w3"', (), "line 1: Expecting"),
        ('\n{"clean": "w1", "corrupted": "w3"}\n\n["w1", "w3"]', (), "line 4: no JSON object"),
        ('[{"clean": "w1", "corrupted": "w3"}]', (), "line 1: no JSON object"),
        ('{"clean": "w4", "corrupted": "w5", "tokens": "w1"}', (), "line 1: unknown 'tokens'"),
        ('{"clean": 5, "corrupted": 6}', ("--token", "w3"), "a prompt of shape"),
        ('{"clean": [5, 6], "corrupted": "w1 w3"}', (), "texts and token ids"),
        ('{"clean": "w4", "corrupted": "w5"}', ("--against", "w3"), "--against without --token"),
        ('{"clean": "w4", "corrupted": "w5", "against": "w3"}', (), "'against' without 'token'"),
        ('{"clean": "w4", "corrupted": "w5", "against": 0}', (), "'against' without 'token'"),
        ('{"clean": "w1 w3", "corrupted": "w1"}', (), "pair 1 has 4 and 3 tokens"),
        ('{"clean": "w4", "corrupted": "w5", "token": "w1"}', ("--token", "w3"), "beside answers"),
        ('{"clean": "w4", "corrupted": "w5", "token": "w1"}\n\n{"clean": "w4", "corrupted": "w5"}', (), "line 3"),
        ("clean\tcorrupted\ttoken\nw4\tw5\tw1\nw4\tw5\t", (), "line 3 of"),
        ('{"clean": "w4", "corrupted": "w5", "token": "cat"}', (), "no token 'cat'"),
        ('{"clean": "w4", "corrupted": "w5"}', ("--length", "5"), "--length with --pairs"),
        ('{"clean": "w4", "corrupted": "w5"}', ("--repeated",), "--repeated with --pairs"),
    ],
)
def test_files_of_pairs_that_are_refused(
    content: str, options: tuple[str, ...], what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs"
    file.write_text(content)
    assert command(["ablate", str(folder), *EDGE, "--pairs", str(file), *options]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert what in err
    assert "expected:" in err


@pytest.mark.parametrize(("name", "what"), [("", "Is a directory"), ("default", "No such file")])
def test_what_is_no_file_of_pairs_is_refused(
    name: str, what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["ablate", str(folder), *EDGE, "--pairs", name or str(tmp_path)]) == 2
    assert what in (err := capsys.readouterr().err)
    assert "folder of them" not in err


def test_ids_of_answers_and_the_separators_of_unicode(folder: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pairs"
    pairs = [{"clean": f"w{i}\u2028w4\fw5", "corrupted": "w6 w7 w8", "token": i, "against": 9} for i in (3, 0)]
    file.write_text("\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs))
    given = answer(capsys, "ablate", folder, *EDGE, "--pairs", file, "--no-bos", "--random", 0)
    assert given["parameters"]["metric"] == "logit_difference, token=[3, 0], against=[9, 9]"
    assert given["stamp"]["tokens"] == 6
    file.write_text(json.dumps(pairs[1]))
    given = answer(capsys, "ablate", folder, *EDGE, "--pairs", file, "--no-bos", "--random", 0)
    assert given["parameters"]["metric"] == "logit_difference, token=[0], against=[9]"


def test_text_with_a_beginning_token_without_any_and_as_the_tokenizer_has_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, text = vw.open(folder), tmp_path / "text"
    text.write_text("w5 w6 w7 w8 w9")
    runs = {bos: vw.Run.on_text(stream, text, length=3, bos=bos) for bos in (None, False, True)}
    rows = {bos: [row.tolist() for row in run.chunks] for bos, run in runs.items()}
    assert rows == {
        None: [[1, 5, 6], [7, 8, 9], [2]],
        False: [[5, 6, 7], [8, 9]],
        True: [[1, 5, 6], [1, 7, 8], [1, 9]],
    }
    assert [run.bos for run in runs.values()] == [
        "as the tokenizer adds it to a document", "none", "before every chunk",
    ]  # fmt: skip
    assert vw.Run.on_prompt(stream, "w5 w6", bos=True).chunks[0].tolist() == [1, 5, 6]
    where = ("--text", text, "--length", 3, "--random", 0)
    given = answer(capsys, "ablate", folder, *EDGE, *where, "--bos", "--skip", 1)
    assert (given["stamp"]["tokens"], given["stamp"]["bos"], given["stamp"]["first"]) == (8, "before every chunk", 2)
    assert given["stamp"]["sequences"] == 2
    assert answer(capsys, "ablate", folder, *EDGE, *where)["stamp"]["bos"] == "as the tokenizer adds it to a document"
    assert command(["ablate", str(folder), *EDGE, "--repeated", "--bos"]) == 2
    assert "--bos with --repeated" in capsys.readouterr().err
    with pytest.raises(UsageError, match="token ids with bos=True"):
        vw.Run.on_prompt(stream, [1, 2], bos=True)
    with pytest.raises(UsageError, match="no token that marks the beginning"):
        vw.Run.on_text(vw.open(folder, config={**stream.source.config, "bos_token_id": None}), text, bos=True)
    with pytest.raises(UsageError, match="room for a token"):
        vw.Run.on_text(stream, text, length=1, bos=True)


def test_further_edges_and_the_least_effect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("--repeated", "--length", 10, "--tokens", 40, "--random", 2, "--edge", "L1H2,L2H4.K")
    given = answer(capsys, "ablate", folder, *EDGE, *run, "--together", "--least", 100)
    asked = [row for row in given["rows"] if row["kind"] == "asked"]
    assert [(row["writer"], row["verdict"]) for row in asked] == [("L0H1", "negligible"), ("L1H2", "negligible")]
    assert given["summary"]["negligible"] == 2
    record = vw.EdgeSetAblation([EDGE, ("L1H2", "L2H4.K")])(vw.Run.on_repeats(vw.open(folder), 40, 10))
    expected = [row["value"] for row in record.rows()]
    assert [row["value"] for row in given["more"][0]["rows"]] == pytest.approx(expected, abs=1e-5)
    assert command(["ablate", str(folder), "--edge", "L0H1", "--repeated"]) == 2
    assert "WRITER,READER" in capsys.readouterr().err
