"""Help: every example runs; what an answer needs is checked before anything is computed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command

import virtual_weights as vw
from virtual_weights.cli import options, run, verb
from virtual_weights.cli.app import VERBS, app
from virtual_weights.cli.map import PARTS

Capture = pytest.CaptureFixture[str]
NAMES = [entry[0] for entry in VERBS]
ENDING = [name for name in NAMES if name != "serve"]  # which test_serve.py runs
SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, vocab_size=97)
LAYERS = {"3": "0", "5": "1", "16": "0", "17": "1", "18": "2", "23": "1"}  # of the examples, of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=512)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def help_of(name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    assert run([name, "--help"]) == 0
    return capsys.readouterr().out


def example_of(text: str, folder: Path) -> list[str]:
    """The example of a help text, made for the small model."""
    (example,) = re.findall(r"Example: vweights (.*)", text)
    example = re.sub(r"\bL(\d+)(?=[HN.])", lambda match: f"L{LAYERS[match[1]]}", example.strip())
    example = re.sub(r"H(\d+)", lambda match: f"H{int(match[1]) % 6}", example)
    example = re.sub(r"--tokens \d+", "--tokens 512", example)
    example = re.sub(
        "-o transcoders", "-o transcoders --layers 0,1 --features 16 --k 4 --steps 3 --tokens 512", example
    )
    return [str(folder) if word == "smollm2-135m" else word for word in shlex.split(example)]


@pytest.mark.parametrize("name", ENDING)
def test_the_example_of_a_verb_runs(
    name: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = help_of(name, capsys, monkeypatch)
    assert re.search(r"about \d+ (s|min)", text)
    if name in ("edges", "status", "export", "report"):
        assert run(["map", str(folder), "-o", "atlas", "--only", "composition"]) == 0
    if name == "vector":
        np.save("happy.npy", np.arange(vw.open(folder).d_model))
    if name == "features":
        stream = vw.open(folder)
        repeats = vw.Run.on_repeats(stream, 64, 16)
        vw.train_transcoders(repeats, "transcoders", (0, 1), features=8, k=2, steps=3)
    if name == "graph":
        vw.AttributionGraph.of(["a"], [vw.GraphNode.token(3, 0)], []).save("graph.json")
    code = run(example_of(text, folder))
    assert code == 0, capsys.readouterr().err


def test_every_verb_stands_in_one_group(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "─ Commands ─" not in text
    assert all(len(re.findall(rf"^│ {name} ", text, re.MULTILINE)) == 1 for name in [*NAMES, "model"])


def test_an_option_takes_the_same_value_in_every_verb() -> None:
    """What ``-o`` names is a folder or a file, and what ``--only`` lists depends on the verb.

    A port is one of a component, or of this machine for ``serve``. ``--against`` names another token, or another atlas.
    """
    values: dict[str, set[str]] = {}
    commands: Any = get_command(app)
    for name, command in commands.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        for parameter in command.get_params(context):
            values.setdefault(parameter.opts[0], set()).add(parameter.display_type_rich(ctx=context))
    assert {name for name, kinds in values.items() if len(kinds) > 1} == {"-o", "--only", "--port", "--against"}


@pytest.mark.parametrize(
    ("name", "absent"), [("trace", ("--tokens", "--length", "--batch", "--seed")), ("labels", ("--repeated", "--text"))]
)
def test_help_has_no_option_without_a_meaning(
    name: str, absent: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(name, capsys, monkeypatch)
    assert "--dtype" in text
    assert not any(option in text for option in (*absent, "<bool>"))


@pytest.mark.parametrize("name", [*NAMES, "model"])
def test_paragraphs_of_help_fill_the_width(name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    words = help_of(name, capsys, monkeypatch).partition("╭")[0].strip().splitlines()
    assert all(line == "" or line.rstrip().endswith((".", "?", "}", "]", "...")) for line in map(str.strip, words)), (
        words
    )


def test_the_parts_of_a_map_are_listed() -> None:
    assert PARTS.split(", ") == list(vw.Part)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 3814), ("4GiB", 4096), ("512 mib", 512), ("20000KB", 19), ("1.5GiB", 1536)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert options.mebibytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["composition", "MODEL", "--memory", "4"], "--memory 4"),
        (["composition", "MODEL", "--memory", "1MB"], "16MiB or more"),
        (["composition", "MODEL", "--device", "abacus"], "abacus"),
        (["map", "MODEL", "--device", "cuda:99"], "cuda:99"),
        (["map", "MODEL", "-o", "FILE"], "is a file"),
        (["map", "MODEL", "-o", "FILE/atlas"], "is a file"),
        (["rotate", "MODEL", "-o", "FILE"], "is a file"),
        (["observe", "MODEL", "-o", "nowhere/moments.safetensors"], "no folder"),
        (["observe", "MODEL", "-o", "."], "is a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_opened(
    arguments: list[str], words: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert run(arguments) == 2  # MODEL does not exist, which would be 3
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n  ") == 2, error  # what was expected, what to do
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["map", "MODEL", "--repeated"],
        ["composition", "MODEL", "--text", "default"],
        ["statements", "MODEL", "--prompt", "word"],
        *([name, "MODEL"] for name in ("trace", "labels", "attribute", "ablate", "erased", "persistence", "validate")),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_repeatswithout_transformers_is_refused_at_once(
    arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> Any:
        return None

    monkeypatch.setattr(verb, "find_spec", nothing)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "transformers and tokenizers are not installed" in error
    assert "pip install -c constraints.txt '.[runtime]'" in error
