"""What a command line asks for in vain is refused by name, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError

Capture = pytest.CaptureFixture[str]
RUNS = ("--repeated", "--tokens", "32", "--length", "16")
PROMPT = ("--prompt-ids", "3,17,5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trace", *PROMPT, "--lens", "--token", "3"), "--token with --lens"),
        (("trace", *PROMPT, "--lens", "--reader", "L1H0.K"), "--reader with --lens"),
        (("trace", *PROMPT, "--reader", "L1H0.K", "--against", "3"), "--against with --reader L1H0.K"),
        (("linear", "--position", "1"), "--position without --point"),
        (("linear", "--all-tokens"), "--all-tokens without --point"),
        (("linear", "--point", "FILE", "--gate", "2"), "--gate with --point"),
        (("ablate", "L0H0", "L1H0.K", "--edges", "3", *RUNS), "--edges where edges are named"),
        (("ablate", "L0H0", "L1H0.K", "--port", "V", *RUNS), "--port where edges are named"),
        (("ablate", "--edge", "L0H0,L1H0.K", "--port", "V", *RUNS), "--port where edges are named"),
        (("ablate", "L0H0", "L1H0.K", *RUNS, "--skip", "2"), "--skip 2 changes nothing"),
        (("ablate", "L0H0", "L1H0.K", *RUNS, "--skip", "7"), "--skip 7 changes nothing"),
        (("channel", "L0H0.ov", "--rotary-offset", "2"), "--rotary-offset with L0H0.ov"),
        (("channel", "L0H0", "L1H0.V", "--rotary-offset", "2"), "--rotary-offset with L1H0.V"),
        (("channel", "L0H0", "L1H0.K", "--blocks", "2"), "--blocks without --nearest"),
        (("composition", "--port", "V", "--rotary-offset", "2"), "--rotary-offset with port V"),
        (("composition", "--tokens", "64"), "--tokens without --text"),
        (("composition", "--by", "share"), "--by share"),
        (("statements", "--only", ","), "--only ',' names nothing"),
        (("statements", "--length", "64"), "--length without a text"),
        (("map", "--only", ""), "--only '' names nothing"),
        (("map", "--edges", "4"), "--edges without a text"),
        (("map", "--tokens", "4"), "--tokens without a text"),
        (("attribute", *PROMPT, "--tokens", "9"), "--tokens with --prompt-ids"),
        (("persistence", "--writer", "L9H9", *RUNS), "L9H9"),
        (("memory", "--by", "nothing"), "--by nothing"),
        (("subspaces", "--by", "nothing"), "--by nothing"),
        (("basis", "--massive", "inf"), "massive=inf"),
        (("linear", "--norm-scalar", "1e-300"), "norm scalar 1e-300"),
        (("linear", "--gate", "nan"), "gate nan"),
        (("paths", "L0H1", "L2H3.K", "--norm-scalar", "1e-60"), "too large for float64"),
        (("memory", "--memory", "1XB"), "GiB or TiB"),
        (("memory", "--norm-scalar", "inf"), "norm scalar inf"),
        (("ablate", "L0H0", "L1H0.K", *RUNS, "--seed", str(2**64)), f"seed {2**64}"),
        (("trace", *PROMPT, "--token", "3", "--against", "3"), "the logit of token 3 less that of token 3"),
        (("attribute", *PROMPT, "--token", "3", "--against", "3"), "the logit of token 3 less that of token 3"),
        (("labels", "--tokens", "32", "--length", "15"), "chunks of 15"),
    ],
)
def test_what_would_mean_nothing_is_refused(
    arguments: tuple[str, ...], said: str, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *rest = arguments
    assert run([verb, str(folder), *rest]) == 2
    out, err = capsys.readouterr()
    assert (said in err, "expected:" in err, out) == (True, True, ""), err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_difference_of_a_token_and_itself_is_refused() -> None:
    for make in (vw.LogitDifference, lambda *ids: vw.Trace("unembed", *ids), lambda *ids: vw.Route("L0H0", *ids)):
        with pytest.raises(UsageError, match="token 5 less that of token 5"):
            make(5, 5)


def test_ports_of_attributions_are_answered_apart_and_once_each(folder: Path, capsys: Capture) -> None:
    assert run(["attribute", str(folder), *RUNS, "--top", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    answers = [answer, *answer["more"]]
    assert [part["parameters"]["port"] for part in answers] == ["Q", "K", "V"]
    for part in answers:
        assert {row["reader"].rpartition(".")[2] for row in part["rows"]} == {part["parameters"]["port"]}
    assert run(["attribute", str(folder), *RUNS, "--port", "K", "--port", "K", "--json"]) == 0
    assert "more" not in json.loads(capsys.readouterr().out)


def test_without_random_edges_an_edge_is_judged_all_the_same(folder: Path, capsys: Capture) -> None:
    assert run(["ablate", str(folder), "L0H0", "L1H0.K", *RUNS, "--random", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (row,) = answer["rows"]
    assert (row["rank"], row["kind"]) == (None, "asked")
    assert run(["ablate", str(folder), "L0H0", "L1H0.K", *RUNS, "--random", "2", "--json"]) == 0
    beside, *others = json.loads(capsys.readouterr().out)["rows"]
    assert [other["kind"] for other in others] == ["random", "random"]
    assert (row["verdict"], row["interval"]) == (beside["verdict"], pytest.approx(beside["interval"], abs=1e-6))


def test_a_set_that_cannot_be_is_refused_before_its_edges_are_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked, call = list[str](), vw.Ablation.__call__

    def watched(question: vw.Ablation, *arguments: Any, **named: Any) -> vw.Record:
        asked.append(question.question)
        return call(question, *arguments, **named)

    monkeypatch.setattr(vw.Ablation, "__call__", watched)
    edges = ["L0.mlp", "L1H0.K", "--edge", "L0N3,L1H0.K"]
    assert run(["ablate", str(folder), *edges, *RUNS, "--random", "0", "--together"]) == 2
    assert "overlap" in capsys.readouterr().err
    assert asked == []
    assert run(["ablate", str(folder), *edges, *RUNS, "--random", "0"]) == 0
    assert asked == ["ablation"]


def test_repeated_tokens_are_at_most_as_many_as_asked() -> None:
    stream = vw.open(module := tiny("llama-grouped-untied"))
    run_of = vw.Run.on_repeats(stream, 70, 32, model=module)
    assert [len(chunk) for chunk in run_of.chunks] == [32, 32]


def test_a_row_that_is_not_there_is_told_from_one_that_is() -> None:
    record = vw.Composition("K")(vw.open(tiny("llama-grouped-untied")))
    with pytest.raises(UsageError) as caught:
        record["L0H1", "L9H9"]
    assert "L9H9" in caught.value.do
    assert "L0H1':" not in caught.value.do, "this one is there"
    with pytest.raises(UsageError, match=r"record\[0\]"):
        record[0]  # type: ignore[index, call-overload]  # pyright: ignore


def test_an_atlas_names_the_parameters_that_it_has(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    vw.map(folder, tmp_path / "atlas", plan=vw.Plan((vw.Part.composition, vw.Part.subspaces)))
    edges = ["edges", str(tmp_path / "atlas")]
    assert run([*edges, "--where", "foo=1"]) == 2
    assert "no parameter 'foo'" in (err := capsys.readouterr().err)
    assert "rotary_offset" in err
    assert run([*edges, "--question", "subspaces"]) == 2
    assert "expected: one of composition" in capsys.readouterr().err
    assert run([*edges, "--where", "port=K", "--reader", "1.0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["reader"] for row in answer["rows"]} == {"L1H0.K"}
    assert answer["stamp"]["norm"] == "gain folded, unembedding centred"


def test_a_later_part_of_a_map_leaves_the_report_whole(folder: Path, tmp_path: Path) -> None:
    atlas = tmp_path / "atlas"
    assert run(["map", str(folder), "-o", str(atlas), "--only", "composition"]) == 0
    assert run(["map", str(folder), "-o", str(atlas), "--only", "bandwidth", "--ignore-config", "x"]) == 3
    assert run(["map", str(folder), "-o", str(atlas), "--only", "bandwidth"]) == 0
    first = (atlas / "report.html").read_bytes()
    data = json.loads(first.split(b'type="application/json">')[1].split(b"</script>")[0])
    assert data["pairs-K"]
    assert data["bandwidth"]
    assert vw.report(vw.Atlas.open(atlas), tmp_path / "again.html") == tmp_path / "again.html"
    assert (
        json.loads(
            (tmp_path / "again.html").read_bytes().split(b'type="application/json">')[1].split(b"</script>")[0]
        ).keys()
        == data.keys()
    )


def test_a_title_names_the_offset_only_where_something_turns(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model: Any = tiny("gpt2")
    model.save_pretrained(tmp_path)
    for path, said in ((folder, True), (tmp_path, False)):
        assert run(["channel", str(path), "L0H0", "L1H0.K"]) == 0
        assert ("at rotary offset 0" in capsys.readouterr().out.splitlines()[0]) is said
        assert run(["channel", str(path), "L0H0", "L1H0.V"]) == 0
        assert "rotary" not in capsys.readouterr().out.splitlines()[0]
