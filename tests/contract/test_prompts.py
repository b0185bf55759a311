"""Prompts and texts that cannot be used are refused by name, or give the right ids, before a model is built."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.runtime import Run
from virtual_weights.runtime.running import ModuleRunner
from virtual_weights.runtime.running.text import texts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPT-2 of 32 positions and 37 tokens whose tokenizer has 260; building it is a failure."""
    folder = tmp_path / "model"
    tiny("gpt2").save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**{letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ.")}}
    vocab |= {letter: 28 + i for i, letter in enumerate(letter for letter in letters if letter not in vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    def built(_self: ModuleRunner) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(ModuleRunner, "module", property(built))
    monkeypatch.setattr(ModuleRunner, "exactness_error", property(built))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n  expected: ") == error.count("\n  to do: ") == 1
    return error


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a" * 33, "a prompt of 33 tokens"),
        ("ABC", r"a prompt: token ids \d+, \d+, \d+[\s\S]*0 to 36[\s\S]*tokenizer"),
        ("\udcff", "not a character"),
        ("ab\ud800c", "after 2 characters"),
        ("", "a prompt has no tokens"),
        ([1] * 33, "33 tokens"),
        ([37], "token ids 37"),
        ([3, -1], "token ids -1"),
        ([-2, 3], "token ids -2"),
        ([], "token ids"),
        ([2**70], "no row of token ids"),
        ([1.5, 2.0], "float32"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ([[1], [2, 3]], "no row of token ids"),
        ([True, False], "torch.bool"),
        (["a"], "no row of token ids"),
        (torch.tensor(3), r"shape \(\)"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(prompt: Any, message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Run.on_prompt(vw.open(folder), prompt)


def test_a_prompt_of_one_token_and_one_with_a_mark_are_run(folder: Path) -> None:
    stream = vw.open(folder)
    assert [chunk.tolist() for chunk in Run.on_prompt(stream, "b").chunks] == [[1]]
    assert torch.equal(Run.on_prompt(stream, "\ufeffa b").chunks[0], Run.on_prompt(stream, "a b").chunks[0])
    assert Run.on_prompt(stream, torch.tensor([3, 4], dtype=torch.int16)).chunks[0].dtype is torch.int64


def test_the_command_refuses_them_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = ("trace", folder, "--prompt")
    assert "a prompt of 40 tokens" in refusal(capsys, *trace, "abcd" * 10)
    assert "0 to 36" in refusal(capsys, *trace, "ABC")
    assert "token ids 99" in refusal(capsys, "trace", folder, "--prompt-ids", "1,99")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt has no tokens"),
        (b"\xef\xbb\xbf", "a.txt has no tokens"),
        (b"abc\xff", r"a\.txt': byte 3 is not UTF-8"),
        ("abc".encode("utf-16"), r"a\.txt': byte 0 is not UTF-8"),
        (b"\0\0ABC", "a.txt: token ids"),
    ],
)
def test_a_text_that_cannot_be_run_is_refused(content: bytes, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Run.on_text(vw.open(folder), tmp_path / "a.txt")


def test_the_file_of_a_folder_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t" / "inner").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"t' holds no file"):
        list(texts(tmp_path / "t"))
    (tmp_path / "t" / "a.txt").write_text("the quick")
    (tmp_path / "t" / "inner" / ".DS_Store").write_bytes(b"\0\1Bud1\xff\xfe")
    with pytest.raises(UsageError, match=r"inner/\.DS_Store': byte 6"):
        Run.on_text(vw.open(folder), tmp_path / "t")
    with pytest.raises(UsageError, match=r"none': No such file"):
        list(texts(tmp_path / "none"))
    with pytest.raises(UsageError, match="no text in"):
        list(texts("a\0b"))


def test_a_mark_before_a_text_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe quick")
    assert list(texts(tmp_path / "a.txt")) == ["the quick"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffpiped"))
    assert list(texts("-")) == ["piped"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    with pytest.raises(UsageError, match="standard input': byte 2"):
        list(texts("-"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="not a character"):
        list(texts("-"))


def test_chunks_of_texts_and_repeats_are_made_to_fit_the_positions(folder: Path, tmp_path: Path) -> None:
    stream = vw.open(folder)
    (tmp_path / "a.txt").write_text("the quick brown fox " * 8)
    assert [len(chunk) for chunk in Run.on_text(stream, tmp_path / "a.txt").chunks] == [32] * 5
    assert [len(chunk) for chunk in Run.on_text(stream, tmp_path / "a.txt", 40, 9).chunks] == [9, 9, 9, 9, 4]
    repeats = Run.on_repeats(stream, 64)
    assert ([len(chunk) for chunk in repeats.chunks], repeats.first) == ([32, 32], 16)
    assert torch.equal(repeats.chunks[0][:16], repeats.chunks[0][16:])
