"""Ids are those that transformers gives for the same files, and of SentencePiece in GGUF those of its own algorithm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import virtual_weights as vw
from virtual_weights.checkpoint import Source, open_source
from virtual_weights.checkpoint.tokenizer import SPLITS
from virtual_weights.errors import MalformedCheckpointError, UsageError
from virtual_weights.runtime import Run

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and it isn't 1234 times as quick; naïve café: 日本語 🙂\n\n  x = 1"
] * 4
TEXTS = [
    "the quick brown fox",
    "  two spaces, then\ttab and\n\n\nlines   ",
    "12345 dogs don't JUMP; it's naïve",
    "e\u0301 é ﬁ ½ 日本 🙂\u200d\u00a0end",
    "before<|endoftext|>after <|endoftext|> x",
    "<extra>the<extra> fox",
    "",
    "x",
]


def trained(*, split: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    ends = [("<|endoftext|>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=ends)
    return tokenizer


def whole_files(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def limited(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=5)
    return tokenizer


def regex() -> Any:
    steps = [pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WHOLE = {
    "plain": lambda folder: whole_files(folder, trained()),
    "bos": lambda folder: whole_files(folder, with_bos(trained()), bos_token="<|endoftext|>"),
    "regex and NFC": lambda folder: whole_files(folder, trained(split=regex(), normalizer=normalizers.NFC())),
    "cut and padded": lambda folder: whole_files(folder, limited(trained()), pad_token="<|endoftext|>"),
    "a further token": lambda folder: whole_files(folder, trained(), additional_special_tokens=["<extra>"]),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_tokenizer_gives_the_ids_of_transformers(kind: str, tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path)
    WHOLE[kind](tmp_path)
    _same(tmp_path)


def test_a_token_that_only_the_settings_name_is_added(tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path)
    whole_files(tmp_path, trained())
    path = tmp_path / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    size = trained().get_vocab_size()
    added = {"content": "<extra>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    path.write_text(json.dumps({**stored, "added_tokens_decoder": {str(size): {**added, "special": True}}}))
    _same(tmp_path)
    assert size in _ids(tmp_path, "a <extra>fox")


@pytest.mark.parametrize("model", ["gpt2", "qwen2", "neox-parallel-partial-rotary"])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "bos_token": "<|endoftext|>"}])
def test_vocabulary_and_merges_give_the_ids_of_transformers(
    model: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny(model).save_pretrained(tmp_path)
    trained().model.save(str(tmp_path))
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    _same(tmp_path, [text for text in TEXTS if "<extra>" not in text])


def _ids(folder: Path, text: str) -> list[int]:
    tokenizer = open_source(folder).tokenizer()
    assert tokenizer is not None
    return tokenizer.encode(text).ids


def _same(folder: Path, texts: list[str] = TEXTS) -> None:
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert _ids(folder, text) == peer(text)["input_ids"], text


def vocabulary(folder: Path, kind: str, keys: dict[str, Any], **arrays: list[Any]) -> Source:
    """A GGUF file without tensors to speak of."""
    writer = gguf.GGUFWriter(folder / "model.gguf", keys.pop("architecture", "llama"))
    writer.add_tokenizer_model(kind)
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(name, value)
    for key, value in arrays.items():
        writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("x", torch.zeros(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_source(folder / "model.gguf")


def byte_level(folder: Path, pre: str | None, **keys: Any) -> Source:
    stored = json.loads(trained().to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    merges = [" ".join(merge) for merge in stored["merges"]]
    keys |= {} if pre is None else {"pre": pre}
    types = [3] + [1] * (len(tokens) - 1)
    return vocabulary(
        folder, "gpt2", {"bos_token_id": 0, "eos_token_id": 0, **keys}, tokens=tokens, merges=merges, token_type=types
    )


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_bpe_of_a_gguf_file_gives_the_ids_of_transformers(pre: str, tmp_path: Path) -> None:
    source = byte_level(tmp_path, pre, add_bos_token=False)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        if pre == "qwen2":  # Qwen's own tokenizer composes characters first; the file does not say so
            text = text.replace("e\u0301", "é")
        assert source.tokenizer().encode(text).ids == peer(text)["input_ids"], text  # type: ignore[union-attr]


def test_digits_stand_apart_where_the_split_says_so(tmp_path: Path) -> None:
    source = byte_level(tmp_path, "smollm")
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a  12 dogs")]
    assert pieces == ["a", "ĠĠ", "1", "2", "Ġdogs"]


def test_words_that_the_vocabulary_has_are_taken_whole(tmp_path: Path) -> None:
    tokens, merges = ["<b>", "a", "b", "c", "ab", "abc"], ["a b"]
    arrays: dict[str, list[Any]] = {"tokens": tokens, "merges": merges, "token_type": [3, 1, 1, 1, 1, 1]}
    ids = {}
    for pre in ("llama-bpe", "qwen2"):
        (tmp_path / pre).mkdir()
        source = vocabulary(tmp_path / pre, "gpt2", {"pre": pre, "bos_token_id": 0}, **arrays)
        ids[pre] = source.tokenizer().encode("abc").ids  # type: ignore[union-attr]
    assert ids == {"llama-bpe": [0, 5], "qwen2": [4, 3]}


def test_a_split_that_is_unknown_or_unsaid_is_refused(tmp_path: Path) -> None:
    for pre, architecture in (("new-split", "llama"), (None, "llama"), ("default", "llama")):
        folder = tmp_path / f"{pre}"
        folder.mkdir()
        with pytest.raises(UsageError, match=r"split .*\n.*smollm[\s\S]*pass token ids"):
            byte_level(folder, pre, architecture=architecture).tokenizer()
    (tmp_path / "gpt2").mkdir()
    assert byte_level(tmp_path / "gpt2", None, architecture="gpt2").tokenizer() is not None
    assert all(SPLITS.values())


PIECES = ["<unk>", "<s>", "</s>", "<user>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"theqanx.", "▁t", "th", "he"]
PIECES += ["▁th", "the", "▁the", "an", "ax", "▁a", "qax", "xx", "xxx", "▁▁", "▁x"]
TYPES = [2, 3, 3, 4, *[6] * 256, *[1] * (len(PIECES) - 260)]
SCORES = [0.0] * 260 + [-1000.0 - i for i in range(9)] + [-float((7 * i) % 17) for i in range(len(PIECES) - 269)]


def pieces_of(text: str) -> Iterator[int]:
    """SentencePiece's BPE as its authors describe it: merge the adjacent pair of the best score, leftmost first."""
    ids = {piece: i for i, piece in enumerate(PIECES) if TYPES[i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        best = max(((SCORES[ids[p]], -i) for i, p in enumerate(pairs) if p in ids), default=None)
        if best is None:
            break
        symbols[-best[1] : 2 - best[1]] = [pairs[-best[1]]]
    for symbol in symbols:
        yield from [ids[symbol]] if symbol in ids else [4 + byte for byte in symbol.encode()]


def sentencepiece(folder: Path, **keys: Any) -> Source:
    arrays: dict[str, list[Any]] = {"tokens": PIECES, "token_type": TYPES, "scores": SCORES}
    return vocabulary(folder, "llama", {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **keys}, **arrays)


@settings(max_examples=300)
@given(st.text(alphabet="theqanx. é\n日", max_size=14))
def test_sentencepiece_of_a_gguf_file_is_its_own_algorithm(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "sentencepiece"
    if not folder.exists():
        folder.mkdir()
        sentencepiece(folder)
    tokenizer = open_source(folder / "model.gguf").tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode(text).ids == [1, *pieces_of(text)]


def test_sentencepiece_in_a_gguf_file_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    source = sentencepiece(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    for text in ("the antheq", "the  the", "é qax\n", "<user>", "x"):
        assert tokenizer.encode(text).ids == peer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"add_bos_token": False}, "the"),
        ({"add_eos_token": True}, "<s>the</s>"),
        ({"add_bos_token": False, "add_space_prefix": False}, "(no space)"),
    ],
)
def test_sentencepiece_follows_the_flags_of_its_file(keys: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, **keys).tokenizer()
    assert tokenizer is not None
    place = PIECES.index
    ids = {"the": [place("▁the")], "<s>the</s>": [1, place("▁the"), 2], "(no space)": [place("the")]}
    assert tokenizer.encode("the").ids == ids[expected]


@pytest.mark.parametrize(
    ("keys", "arrays", "error", "message"),
    [
        ({}, {"tokens": ["a"], "token_type": [1], "scores": [0.0, 1.0]}, MalformedCheckpointError, "no tokenizer can"),
        ({"bos_token_id": 9}, {"tokens": ["a"], "token_type": [1], "scores": [0.0]}, MalformedCheckpointError, "index"),
        ({}, {"scores": [0.0]}, UsageError, "has no tokenizer"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    keys: dict[str, Any], arrays: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        vocabulary(tmp_path, "llama", keys, **arrays).tokenizer()


def test_sentencepieces_own_file_alone_is_refused_and_none_is_none(tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path)
    assert open_source(tmp_path).tokenizer() is None
    with pytest.raises(UsageError, match=r"no tokenizer[\s\S]*pass token ids"):
        Run.on_prompt(vw.open(tmp_path), "text")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>")
    with pytest.raises(UsageError, match=r"tokenizer\.model'[\s\S]*pass token ids"):
        Run.on_prompt(vw.open(tmp_path), "text")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(MalformedCheckpointError, match=r"tokenizer\.json"):
        Run.on_prompt(vw.open(tmp_path), "text")


def test_a_text_that_the_vocabulary_does_not_cover_is_refused(tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    assert Run.on_prompt(vw.open(tmp_path), "a").count == 1
    with pytest.raises(UsageError, match="cannot read the text"):
        Run.on_prompt(vw.open(tmp_path), "b")


def test_what_the_library_breaks_at_is_refused_as_well(tmp_path: Path) -> None:
    """It panics where the vocabulary lacks what two tokens merge to; that is no Exception."""
    arrays: dict[str, list[Any]] = {"tokens": [*"the", "th"], "merges": ["t h", "th e"], "token_type": [1, 1, 1, 1]}
    with pytest.raises(MalformedCheckpointError, match="no tokenizer can be made"):
        vocabulary(tmp_path, "gpt2", {"pre": "gpt-2"}, **arrays).tokenizer()


@pytest.mark.real
def test_the_built_in_model_has_the_ids_of_transformers() -> None:
    """But where spaces or a letter's space precede a digit, which the file says to split off: transformers does not."""
    from virtual_weights.checkpoint import locate

    path = locate("smollm2-135m")
    peer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = open_source("smollm2-135m").tokenizer()
    assert tokenizer is not None
    for text in (*(text for text in TEXTS if "½" not in text), "Hello world! 123", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.encode(text).ids == peer(text)["input_ids"], text
    assert tokenizer.encode("a  7").ids != peer("a  7")["input_ids"]
    assert tokenizer.get_added_tokens_decoder()[1] == AddedToken("<|im_start|>", normalized=False, special=True)
