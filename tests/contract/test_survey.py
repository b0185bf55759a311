"""Surveys ask each question once, whatever it costs; what cannot be asked is refused; every verb has one JSON shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from operating import operate
from safetensors.torch import save_file
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.atlas import Atlas
from virtual_weights.cli import run as command
from virtual_weights.cli.app import app
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.progress import Progress, quiet
from virtual_weights.record import Record
from virtual_weights.record.durable import sha256_of
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.survey import Part, Plan, Survey, map_model
from virtual_weights.survey.plan import filling

Capture = pytest.CaptureFixture[str]
PARTS = (Part.composition, Part.bandwidth)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def every(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of all questions about edges."""
    path = tmp_path_factory.mktemp("every") / "atlas"
    parts = (Part.composition, Part.overlap, Part.neurons)
    return map_model(folder, path, run=repeats(folder), plan=Plan(parts, edges=3)).path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the questions whose answers were computed, in order: only these are put into an atlas."""
    names, put = list[str](), Atlas.put

    def noting(atlas: Atlas, record: Record, **how: Any) -> str:
        names.append(record.question)
        return put(atlas, record, **how)

    monkeypatch.setattr(Atlas, "put", noting)
    return names


def repeats(folder: Path, **how: Any) -> Run:
    return Run.on_repeats(vw.open(folder), 64, 16, **how)


def mapped(folder: Path, path: Path, plan: Plan, batch: int = 4, **manner: Any) -> Atlas:
    return map_model(folder, path, run=repeats(folder, batch=batch), plan=plan, **manner)


def test_what_only_costs_changes_no_address(folder: Path, tmp_path: Path, computed: list[str]) -> None:
    atlas = mapped(folder, tmp_path / "atlas", Plan(PARTS, edges=3))
    keys = atlas.keys()
    assert len(keys) == len(computed) == len(atlas.ledger()) > 20
    computed.clear()
    again = repeats(folder, batch=1)
    map_model(folder, tmp_path / "atlas", run=again, plan=Plan(PARTS, edges=3), memory_mb=32, device="cpu:0")
    assert computed == []
    assert atlas.keys() == keys
    assert "module" not in vars(again.runner), "nothing ran"


def test_an_interrupted_map_goes_on_where_it_stopped(folder: Path, tmp_path: Path, computed: list[str]) -> None:
    plan, path = Plan(PARTS, edges=2), tmp_path / "atlas"

    def stopping(name: str) -> Progress:
        def report(done: float, total: float) -> None:
            if name.startswith("bandwidth"):
                raise KeyboardInterrupt

        return report

    with pytest.raises(KeyboardInterrupt):
        mapped(folder, path, plan, progress=stopping)
    first = Atlas.open(path).keys()
    assert len(first) == len(computed) >= 6
    mapped(folder, path, plan)
    whole = mapped(folder, tmp_path / "whole", plan).keys()
    assert set(Atlas.open(path).keys()) == set(whole) > set(first)
    assert len(computed) == 2 * len(whole), "none of the first again"


def test_a_map_draws_bars_where_they_can_be_watched(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    plan = Plan((Part.bandwidth,))
    map_model(folder, tmp_path / "quiet", plan=plan)
    assert capfd.readouterr() == ("", "")
    map_model(folder, tmp_path / "shown", plan=plan, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "bandwidth" in err
    assert "100%" in err


def test_one_more_edge_is_one_more_ablation(folder: Path, tmp_path: Path, computed: list[str]) -> None:
    mapped(folder, tmp_path / "atlas", Plan(PARTS, edges=6))
    assert 3 * 10 <= computed.count("edge_ablation") <= 6 + 3 * 10, "ten random edges for each port, or asked about"
    first = edges_of_ablation(tmp_path / "atlas")
    computed.clear()
    mapped(folder, tmp_path / "atlas", Plan(PARTS, edges=8))
    second = edges_of_ablation(tmp_path / "atlas")
    assert first < second
    assert 1 <= len(second - first) == computed.count("edge_ablation") <= 2
    assert computed.count("ablation") == 1, "the summary"


def edges_of_ablation(path: Path) -> set[tuple[str, str]]:
    """The edges of all summaries of an atlas, which need no choice among them and name an edge once."""
    rows = vw.edges(Atlas.open(path), question="ablation", top=1000)
    edges = {(row["writer"], row["reader"]) for row in rows}
    assert len(edges) == len(rows)
    assert {row["verdict"] for row in rows} <= {"causal", "negligible", "inconclusive"}
    assert {row["kind"] for row in rows} == {"asked", "random"}
    return edges


def test_a_metric_that_cannot_be_named_is_answered_but_not_stored(folder: Path, tmp_path: Path) -> None:
    stream, factor = vw.open(folder), 2

    def scaled(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return factor * last_logit(logits, tokens)

    run = Run.on_repeats(stream, 32, 16)
    with filling(tmp_path / "atlas", stream, run, None, quiet) as survey:
        record = survey.ask(vw.EdgeAblation("L0H1", "L2H3.K", metric=scaled))
        assert survey.ask(vw.EdgeAblation("L0H1", "L2H3.K", metric=scaled)) is record
        assert survey.atlas is not None
        assert not survey.atlas.keys()
        plain = survey.ask(vw.EdgeAblation("L0H1", "L2H3.K", metric=last_logit))
        assert len(survey.atlas.keys()) == 1
    assert torch.allclose(record["effect_nats"], factor * plain["effect_nats"])  # type: ignore[operator,arg-type]
    with filling(tmp_path / "atlas", stream, run, None, quiet) as again:
        assert again.ask(vw.EdgeAblation("L0H1", "L2H3.K", metric=last_logit)) == plain


def last_logit(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    del tokens
    return logits[:, -1, 5]


def test_an_atlas_of_an_older_format_is_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    atlas = map_model(folder, tmp_path / "atlas", plan=Plan((Part.bandwidth,)))
    (atlas.path / "manifest.json").write_text(json.dumps({**atlas.manifest, "format": 1}))
    with pytest.raises(RecordError, match="format 1") as caught:
        map_model(folder, atlas.path, plan=Plan((Part.bandwidth,)))
    assert "map the model again into another folder" in caught.value.do
    for verb in (["map", str(folder), "-o", str(atlas.path)], ["edges", str(atlas.path)]):
        assert command(verb) == 3
        assert "map the model again into another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "choices"),
    [
        ({"rotary_offset": 2}, ("rotary_offset=none", "rotary_offset=2")),
        ({"fold": False}, ("norm=gain folded, unembedding centred", "norm=left out")),
    ],
    ids=["offsets", "norm"],
)
def test_edges_under_several_conventions_are_asked_for_one(
    other: dict[str, Any], choices: tuple[str, str], folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, fold = tmp_path / "atlas", other.pop("fold", True)
    atlas = map_model(folder, path, plan=Plan((Part.composition,)))
    before = atlas.keys("composition")
    map_model(vw.open(folder, fold=fold), path, plan=Plan((Part.composition,), **other))
    after = set(atlas.keys("composition")) - set(before)
    assert command(["edges", str(path)]) == 2
    error = capsys.readouterr().err
    assert "several conventions" in error
    assert ", ".join(choices) in error
    for choice, keys in zip(choices, (set(before), after), strict=True):
        assert command(["edges", str(path), "--where", choice, "--top", "999", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert {row["key"] for row in rows} == keys
    assert command(["edges", str(path), "--where", choices[0].replace("=", "=x")]) == 2
    assert " or ".join(choices) in capsys.readouterr().err


def test_a_convention_may_be_a_fraction(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    atlas = map_model(folder, tmp_path / "atlas", plan=Plan(()))
    survey = Survey(vw.open(folder), atlas)
    one, half = (survey.ask(Erasure(slope=slope)) for slope in (1.0, 0.5))
    for choice, record in (("slope=1", one), ("slope=0.5", half)):
        assert command(["edges", str(atlas.path), "--question", "erasure", "--where", choice, "--json"]) == 0
        row = json.loads(capsys.readouterr().out)["rows"][0]
        assert row["erasure"] == next(record.top(1, "erasure").rows())["erasure"]


def test_ids_that_the_vocabulary_lacks_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert command(["observe", str(folder), "-o", str(tmp_path / "x"), "--prompt-ids", "3,99999"]) == 2
    error = capsys.readouterr().err
    assert "token ids 99999" in error
    assert "ids from 0 to 36" in error
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_the_models_positions_is_refused_and_chunks_are_made_to_fit() -> None:
    module = tiny("gpt2")
    with pytest.raises(UsageError, match=r"a prompt of 33 tokens[\s\S]*at most 32, as many as the model has positions"):
        Run.on_prompt(vw.open(module), [1] * 33, model=module)
    run = Run.on_repeats(vw.open(module), 66, 66, model=module)
    assert [len(chunk) for chunk in run.chunks] == [32, 32], "at most 66 tokens"
    assert run.first == 16


def test_questions_of_streams_and_runs_are_asked_together(folder: Path) -> None:
    survey = Survey(vw.open(folder), run=repeats(folder))
    questions = [vw.Composition("K"), vw.Labels(), vw.Statements(("L1",))]
    assert [r.question for r in survey.answers(questions)] == ["composition", "labels", "statements"]
    assert [r.question for r in survey.answers(questions[::-1])] == ["statements", "labels", "composition"]


def test_a_question_of_a_run_needs_one(folder: Path) -> None:
    survey = Survey(vw.open(folder))
    for ask in (lambda: survey.ask(Erased()), survey.moments):
        with pytest.raises(UsageError, match="cannot be asked without a Run") as caught:
            ask()
        assert "Run.on_repeats" in caught.value.do


SHAPE = ["model", "question", "parameters", "stamp", "provenance", "summary", "rows"]
RUNS = ("--repeated", "--tokens", "32", "--length", "16")
VERBS: dict[str, tuple[str, ...]] = {
    "map": ("MODEL", "-o", "NEW", "--only", "composition,neurons,bandwidth"),
    "plan": ("MODEL", "--only", "composition,neurons,bandwidth"),
    "edges": ("ATLAS", "--top", "3"),
    "status": ("ATLAS", "--check"),
    "export": ("ATLAS", "-o", "NEW", "--format", "graph"),
    "report": ("ATLAS",),
    "composition": ("MODEL", "--top", "3", "--moments", "MOMENTS"),
    "channel": ("MODEL", "L0H1", "L1H2.K", "--nearest", "2", "--singular-components", "--offsets", "0:2"),
    "neurons": ("MODEL", "--top", "3"),
    "subspaces": ("MODEL", "--top", "3"),
    "vector": ("MODEL", "VECTOR", "--at", "L1.mlp", "--top", "3"),
    "bandwidth": ("MODEL", "--state", "1"),
    "superposition": ("MODEL",),
    "basis": ("MODEL",),
    "memory": ("MODEL", "--component", "L1H2", "--top", "3"),
    "linear": ("MODEL", "--point", "POINT"),
    "paths": ("MODEL", "L0H1", "L1H2.V"),
    "statements": ("MODEL", "--sample", "2", "--only", "L1,L3,T7,C1"),
    "trace": ("MODEL", "--prompt-ids", "3,17,5", "--lens"),
    "labels": ("MODEL", *RUNS[1:]),
    "graph": ("GRAPH", "--top", "3"),
    "features": ("MODEL", "--attach", "TRANSCODERS", "--least-active", "1", "--top", "3", *RUNS),
    "train": ("MODEL", "-o", "NEW", "--layers", "1", "--features", "8", "--k", "2", "--steps", "3", *RUNS),
    "observe": ("MODEL", "-o", "NEW", *RUNS),
    "attribute": ("MODEL", *RUNS, "--top", "3"),
    "ablate": ("MODEL", "L0H1", "L1H2.K", "--random", "1", "--together", *RUNS),
    "erased": ("MODEL", *RUNS),
    "persistence": ("MODEL", *RUNS, "--writer", "L0H1"),
    "frontier": ("MODEL", *RUNS),
    "validate": ("MODEL", *RUNS, "--edges", "3"),
    "check": ("MODEL",),
    "rotate": ("MODEL", "-o", "NEW"),
}


@pytest.fixture(scope="module", params=["llama-grouped-untied", "gpt2"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands for the capitals in the arguments of verbs."""
    path = tmp_path_factory.mktemp("verbs")
    model = tiny(request.param)
    model.save_pretrained(path / "model")
    stream = vw.open(path / "model")
    operate(model, stream, torch.arange(5))[0].save(path / "point")
    Observation().moments(Run.on_repeats(stream, 32, 16, model=model)).save(path / "moments")
    map_model(stream, path / "atlas", plan=Plan((Part.composition,)))
    save_file({"v": torch.arange(stream.d_model) - 1.5}, path / "vector.safetensors")
    places = {name.upper(): path / name for name in ("model", "point", "moments", "atlas")}
    run = Run.on_repeats(stream, 32, 16, model=model)
    vw.train_transcoders(run, path / "transcoders", (0, 1), features=8, k=2, steps=3)
    cat, feature = vw.GraphNode.token(3, 0), vw.GraphNode.feature(1, 2, 0)
    vw.AttributionGraph.of(["cat"], [cat, feature], [(cat, feature, 0.5)]).save(path / "graph.json")
    places["TRANSCODERS"] = path / "transcoders"
    return {**places, "VECTOR": path / "vector.safetensors", "GRAPH": path / "graph.json"}


SCHEMA: dict[str, Any] = json.loads((files("virtual_weights.cli") / "answer.schema.json").read_text())


def check_shape(answer: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(answer)
    assert list(answer) == SHAPE + (["more"] if "more" in answer else [])
    for further in answer.get("more", []):
        check_shape(further)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_one_shape(verb: str, places: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    arguments = [str({**places, "NEW": tmp_path / "new"}.get(text, text)) for text in VERBS[verb]]
    assert command([verb, *arguments, "--json"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    refuse: Callable[[str], None] = lambda word: pytest.fail(f"{word} is no JSON")  # noqa: E731
    answer = json.loads(out, parse_constant=refuse)
    check_shape(answer)
    attach = [places["TRANSCODERS"]] if verb == "features" else []
    opened = vw.open(places["MODEL"], attach=attach).provenance["fingerprint"]
    opened = sha256_of(places["GRAPH"]) if verb == "graph" else opened
    assert answer["provenance"]["fingerprint"] == opened


@pytest.mark.parametrize("question", ["overlap", "attribution", "ablation", "neuron_edges", "contribution"])
def test_stored_edges_of_every_question_have_the_one_shape(question: str, every: Path, capsys: Capture) -> None:
    assert command(["edges", str(every), "--question", question, "--top", "40", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_shape(answer)
    assert answer["rows"]
    for row in answer["rows"]:
        assert row["reader"] not in row.get("shared_with", ())
        assert ("group" in row) == ("shared_with" in row)


@pytest.mark.parametrize("arguments", [["list"], ["fetch", "smollm2-135m"]])
def test_what_opens_no_model_has_the_one_shape(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("virtual_weights.checkpoint.locate", lambda *_, **__: tmp_path / "model.gguf")
    assert command(["model", *arguments, "--json"]) == 0
    check_shape(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("question", "wrong"),
    [
        ("composition", {"rows": [{"writer": "L0H1", "reader": "L1H2"}]}),
        ("composition", {"rows": [{"writer": "L0H1", "reader": "L1H2.K", "group": "L1.kv0"}]}),
        ("ablation", {"rows": [{"writer": "L0H1", "reader": "L1H2.K", "effect_nats": "0.1"}]}),
        ("statements", {"rows": [{"id": "L1", "verdict": "perhaps", "evidence": {}}]}),
        ("validation", {"rows": [{"predictor": "overlap", "port": "K", "target": "effect"}]}),
        ("neurons", {"summary": {"count": 3}}),
        ("basis", {"provenance": {}}),
        ("basis", {"more": [{}]}),
    ],
)
def test_the_schema_refuses_what_is_wrong(question: str, wrong: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"model": "m", "question": question, "parameters": {}, "stamp": {}, "summary": {}}
    shape |= {"provenance": {"fingerprint": "f"}, "rows": []}
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(shape) == (question != "neurons")
    assert not validator.is_valid({**shape, **wrong})


def test_no_verb_is_left_out() -> None:
    without_an_answer = {"serve"}  # it ends with Ctrl-C, see test_serve.py
    assert {entry.name for entry in app.registered_commands} == VERBS.keys() | without_an_answer
