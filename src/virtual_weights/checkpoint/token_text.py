"""The text that each token id stands for, for display.

Byte-level vocabularies spell bytes as printable letters, SentencePiece spells a space as ``▁`` and a
byte as ``<0x0A>``. Both are undone; bytes that do not form a UTF-8 character show in hexadecimal.
The vocabulary is read as plain JSON: no tokenizer is built from a stranger's file. The decoders of the tokenizers
library would not do: they decode sequences, so they drop the first token's space and replace bytes that stand alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from virtual_weights.checkpoint.folder import read_json_object
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.errors import MalformedCheckpointError

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
    except (TypeError, KeyError, ValueError, IndexError) as error:
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
