"""From text to token ids and back, from data alone: no code of a checkpoint runs, and no folder is given to a library.

**Ids of a text** come from the tokenizers library, which is given the bytes of ``tokenizer.json``, or a vocabulary and
merges: those of ``vocab.json`` and ``merges.txt``, or of a GGUF file.

**The text of an id** is for display. Byte-level vocabularies spell bytes as printable letters, SentencePiece spells a
space as ``▁`` and a byte as ``<0x0A>``. Both are undone; bytes that do not form a UTF-8 character show in hexadecimal.
The library's decoders would not do: they decode sequences, so they drop the first token's space and replace bytes that
stand alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from virtual_weights.checkpoint.folder import read_json_object
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.errors import MalformedCheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER = 128 << 20
MAX_TOKENS = 4_000_000
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_text(token: str) -> str:
    """Undo the spelling of bytes by letters (GPT-2's table); a token outside the table is its own text.

    Example:
        >>> byte_level_text("Ġthe")
        ' the'
    """
    try:
        raw = bytes(_LETTER_BYTES[letter] for letter in token)
    except KeyError:
        return token
    return raw.decode("utf-8", errors="backslashreplace")


def sentencepiece_text(token: str) -> str:
    """Undo SentencePiece's spelling of spaces and single bytes.

    Example:
        >>> sentencepiece_text("▁the"), sentencepiece_text("<0x21>")
        (' the', '!')
    """
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1]).decode("utf-8", errors="backslashreplace")
    return token.replace("▁", " ")


def texts_of_gguf(model: str, tokens: Iterable[str], literal: Iterable[bool]) -> tuple[str, ...]:
    """Texts of a GGUF vocabulary.

    Args:
        model: ``tokenizer.ggml.model``.
        tokens: ``tokenizer.ggml.tokens``.
        literal: for each token, whether it is a control or user-defined one, which is spelled as it is.
    """
    text = {"gpt2": byte_level_text, "none": str, "rwkv": str}.get(model, sentencepiece_text)
    return tuple(token if as_is else text(token) for token, as_is in zip(tokens, literal, strict=True))


def texts_of_tokenizer_json(file: PinnedFile) -> tuple[str, ...]:
    """Texts of a ``tokenizer.json``; an id that no token has is the empty text.

    Raises:
        MalformedCheckpointError: it is not such a file.
    """
    content = read_json_object(file, MAX_TOKENIZER)
    model, added = content.get("model"), content.get("added_tokens") or []
    try:
        ids = _model_ids(model["vocab"])  # type: ignore[index]
        literal = {int(entry["id"]): str(entry["content"]) for entry in added}
        largest = max((*ids, *literal), default=-1)
    except (TypeError, KeyError, ValueError, IndexError, OverflowError) as error:
        raise _malformed(file, f"no vocabulary can be read from it ({error!r:.100})", "model.vocab") from error
    if largest >= MAX_TOKENS or min((*ids, *literal), default=0) < 0:
        raise _malformed(file, "its token ids leave all bounds", f"ids from 0 to {MAX_TOKENS:,}")
    text = _text_rule(content)
    texts = [""] * (largest + 1)
    for index, token in ids.items():
        texts[index] = text(token)
    for index, token in literal.items():
        texts[index] = token
    return tuple(texts)


def _model_ids(vocab: Any) -> dict[int, str]:
    if isinstance(vocab, dict):
        return {int(index): token for token, index in vocab.items()}
    return {index: str(entry[0]) for index, entry in enumerate(vocab)}  # Unigram: [token, score]


def _text_rule(content: Mapping[str, Any]) -> Callable[[str], str]:
    """How the decoder spells bytes and spaces, as a function that undoes it."""
    types = set(_types([content.get("decoder"), content.get("pre_tokenizer")]))
    if "ByteLevel" in types:
        return byte_level_text
    return sentencepiece_text if types & {"Metaspace", "ByteFallback"} else str


def _types(nodes: Iterable[Any]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, dict):
            yield str(node.get("type"))
            yield from _types(value for value in node.values() if isinstance(value, (dict, list)))
        elif isinstance(node, list):
            yield from _types(node)


def _letter_bytes() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the letters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTER_BYTES = _letter_bytes()


def _malformed(file: PinnedFile, what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"{str(file.path)!r} is not a sound tokenizer: {what}",
        expected=expected,
        do="fetch tokenizer.json again, or remove it to see token ids alone",
    )


LITERAL, _NORMAL, _CONTROL = (3, 4), 1, 3
"""llama.cpp's types of tokens that are spelled as they are: control (3) and user-defined (4)."""
_END = "<|endoftext|>"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2, _LLAMA3 = rf"{_WORDS}|\p{{N}}|{_REST}", rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_GPT2, _DIGITS = "gpt2", "digits"  # the split that the library has by itself; the same with every digit apart

SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
"""How text is split before merging, by the name that GGUF files give it in ``tokenizer.ggml.pre``."""

_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Splits whose words are taken whole where the vocabulary has them, and whose texts begin with a token of their own."""


def tokenizer_of_folder(file: Callable[[str], PinnedFile | None], model_type: str) -> Tokenizer | None:
    """The tokenizer beside a model's weights; of its settings only tokens are read, never what names code.

    Args:
        file: a file of the folder by its name, None where it is not there.
        model_type: decides how text is split where only a vocabulary and merges are there.

    Returns:
        A tokenizer that neither cuts nor pads; None where the folder has none.

    Raises:
        MalformedCheckpointError: a file is not what its name says.
        UsageError: there is only SentencePiece's own file, or the tokenizers library is not installed.
    """
    whole, vocab, merges = (file(name) for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    settings = _settings(file)
    if whole is not None:
        with _building(str(whole.path)) as library:
            tokenizer = library.Tokenizer.from_buffer(_content(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            _add(tokenizer, settings, ())
        return tokenizer
    if vocab is not None and merges is not None:
        ids = read_json_object(vocab, MAX_TOKENIZER)
        lines = _content(merges).decode("utf-8", errors="backslashreplace").split("\n")
        pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
        split = _QWEN2 if model_type == "qwen2" else _GPT2
        ends = [
            _spelled(settings.get(f"{end}_token", _END)) if settings.get(f"add_{end}_token") is True else None
            for end in ("bos", "eos")
        ]
        with _building(f"{vocab.path} with {merges.path.name}"):
            tokenizer = _byte_level(ids, pairs, split, normalised=model_type in ("qwen2", "gpt_neox"))
            _add(tokenizer, settings, [_END] if _END in ids else ())
            _frame(tokenizer, *ends)
        return tokenizer
    sentencepiece = file("tokenizer.model")
    if sentencepiece is None:
        return None
    raise UsageError(
        f"the only tokenizer beside the weights is {str(sentencepiece.path)!r}, in SentencePiece's own format",
        expected="tokenizer.json, or vocab.json with merges.txt",
        do="pass token ids, or fetch tokenizer.json from where the model was published",
    )


def tokenizer_of_gguf(path: str, metadata: Mapping[str, Any], array: Callable[[str], list[Any] | None]) -> Tokenizer:
    """The tokenizer in a GGUF file: byte-level BPE or SentencePiece, as llama.cpp reads them.

    Args:
        path: names the file in errors.
        metadata: of the file.
        array: a long array of the metadata by its key.

    Raises:
        UsageError: the file has no tokenizer, or one of another kind, or the tokenizers library is not installed.
        MalformedCheckpointError: its vocabulary contradicts itself.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre == "default":  # what older files say; of these families there is one split
        pre = {"gpt2": "gpt-2", "qwen2": "qwen2"}.get(str(metadata.get("general.architecture")), pre)
    tokens = array("tokenizer.ggml.tokens") or []
    if not tokens or kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in SPLITS):
        raise UsageError(
            f"{path!r} has " + (f"a tokenizer of kind {kind!r:.50}, split {pre!r:.50}" if tokens else "no tokenizer"),
            expected=f"SentencePiece (llama), or BPE (gpt2) with a split among {', '.join(SPLITS)}",
            do="pass token ids",
        )
    types = array("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    begins = kind == "llama" or pre in _WHOLE_WORDS
    with _building(path) as library:
        if kind == "llama":
            tokenizer = _sentencepiece(metadata, tokens, types, array("tokenizer.ggml.scores") or [])
        else:
            vocab, merges = {token: i for i, token in enumerate(tokens)}, array("tokenizer.ggml.merges") or []
            tokenizer = _byte_level(vocab, merges, SPLITS[pre], normalised=pre == "qwen2", whole=pre in _WHOLE_WORDS)
        literal = [(token, type == _CONTROL) for token, type in zip(tokens, types, strict=True) if type in LITERAL]
        added_tokens = [library.AddedToken(token, normalized=False, special=special) for token, special in literal]
        tokenizer.add_tokens(added_tokens)
        ends = {"bos": (1, begins), "eos": (2, False)}  # where the file does not say: which token, and whether
        added = (metadata.get(f"tokenizer.ggml.add_{end}_token", whether) for end, (_, whether) in ends.items())
        ids = (metadata.get(f"tokenizer.ggml.{end}_token_id", token) for end, (token, _) in ends.items())
        _frame(tokenizer, *(tokens[i] if is_added else None for i, is_added in zip(ids, added, strict=True)))
    return tokenizer


@contextmanager
def _building(where: str) -> Generator[Any]:
    """The tokenizers library, whose refusals become ours.

    Raises:
        UsageError: it is not installed.
        MalformedCheckpointError: it refuses what it is given.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "reading a text needs the tokenizers library",
            expected="the extra 'runtime' of this package",
            do="pip install '.[runtime]' in this project's folder, or pass token ids",
        ) from error
    try:
        yield tokenizers
    except BaseException as error:
        # the library raises Exception itself, and where its own checks fail what no except clause is meant to catch
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MalformedCheckpointError(
            f"no tokenizer can be made of {where!r}: {error!r:.300}",
            expected="a vocabulary and merges that belong together",
            do="fetch it again, or pass token ids",
        ) from error


def _byte_level(
    vocab: Mapping[str, int], merges: Sequence[str], split: str, *, normalised: bool, whole: bool = False
) -> Tokenizer:
    """Byte-level BPE: text is normalised (NFC) or not, split, spelled in GPT-2's letters for bytes, and merged."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.strip("\r").partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(dict(vocab), pairs, ignore_merges=whole))
    own = split in (_GPT2, _DIGITS)
    first: list[Any] = [] if own else [pre_tokenizers.Split(Regex(split), "isolated")]
    first += [pre_tokenizers.Digits(individual_digits=True)] if split == _DIGITS else []
    steps = [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalised:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> Tokenizer:
    """SentencePiece's BPE: the adjacent pieces whose union has the best score are merged; the rest is bytes."""
    from tokenizers import Tokenizer, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    score = {token: s for token, s, type in zip(tokens, scores, types, strict=True) if type == _NORMAL}
    merges = [
        (-s, vocab[token], token[:i], token[i:])
        for token, s in score.items()
        for i in range(1, len(token))
        if token[:i] in score and token[i:] in score
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    return tokenizer


def _settings(file: Callable[[str], PinnedFile | None]) -> dict[str, Any]:
    """What the files beside a tokenizer say of its tokens."""
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    special, settings, added = (
        {} if found is None else read_json_object(found, MAX_TOKENIZER) for found in map(file, names)
    )
    older = {str(i): {"content": token, "normalized": False} for token, i in added.items()}
    return {"added_tokens_decoder": older, **special, **settings}


def _add(tokenizer: Tokenizer, settings: Mapping[str, Any], further: Iterable[str]) -> None:
    """Give a tokenizer the tokens that its settings name and it does not know as such, as transformers does."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    entries = {int(i): entry for i, entry in settings["added_tokens_decoder"].items()}
    tokens: list[dict[str, Any]] = [{"special": False, **entries[i]} for i in sorted(entries)]
    named = (_spelled(settings.get(name)) for name in _NAMED)
    tokens += [{"content": token, "special": True} for token in (*named, *further) if token]
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for token in tokens:
        if token["content"] not in known:
            known.add(token["content"])
            tokenizer.add_tokens([AddedToken(token["content"], **{k: token[k] for k in flags if k in token})])


def _spelled(token: Any) -> str | None:
    """A token that settings give as a text, or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def _frame(tokenizer: Tokenizer, begin: str | None, end: str | None) -> None:
    """Have every text begin and end with a token, where there is one."""
    from tokenizers import processors

    template = [*([begin] if begin else []), "$A", *([end] if end else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in {begin, end} if token]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _content(file: PinnedFile) -> bytes:
    if file.size > MAX_TOKENIZER:
        raise _malformed(file, f"it has {file.size:,} bytes", f"at most {MAX_TOKENIZER:,}")
    return file.read(0, file.size)
