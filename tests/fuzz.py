"""Mutated files by the thousand: each is opened and read in a worker process, which must answer or refuse by type.

``TARGETS`` names what is mutated: how a sound instance is made in a folder, and how it is opened. Every try is
``(target, number)`` and can be repeated: ``python tests/fuzz.py safetensors --first 4711 --tries 1``. What counts is in
``Tally``; all of it must be 0. The suite runs some hundred tries, ``make fuzz`` 10,000 of each target.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_stored

MOST_SECONDS = 2.0
MOST_BYTES = 512 << 20
_DEAD_AFTER = 10.0  # seconds of silence after which a worker is ended
_EXTREMES = (0, 1, 2, 7, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

Bytes = dict[str, bytes]
"""The files of an instance by their names within its folder."""


@dataclass(frozen=True)
class Target:
    """What is mutated.

    Attributes:
        make: writes a sound instance of a number's kind into an empty folder.
        read: opens the instance in a folder and reads all of it; returns its figures and what vouches for them: where
            the figures differ from the sound instance's, that must differ too, or opening must refuse.
        mutate: changes the files; None mutates bytes alone.
        kinds: how many kinds of sound instances there are.
    """

    make: Callable[[Path, int], None]
    read: Callable[[Path], tuple[Any, Any]]
    mutate: Callable[[Bytes, random.Random], None] | None = None
    kinds: int = 1


@dataclass
class Tally:
    """How many tries there were, how many were opened, and how many went wrong in which way."""

    tries: int = 0
    opened: int = 0
    foreign_exceptions: int = 0
    hangs: int = 0
    memory: int = 0
    deaths: int = 0
    changed_figures: int = 0
    control_characters: int = 0
    first: list[str] = field(default_factory=list[str])

    @property
    def wrong(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("tries", "opened", "first"))

    def add(self, way: str, number: int, what: str) -> None:
        setattr(self, way, getattr(self, way) + 1)
        if len(self.first) < 20:
            self.first.append(f"{way} at {number}: {what}")


# -- sources


def _config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 37,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


@cache
def _tensors() -> Mapping[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    layer, rows = "model.layers.0.", {"q": 32, "k": 16, "v": 16, "o": 32}
    shapes = {f"{layer}self_attn.{role}_proj.weight": (n, 32) for role, n in rows.items()}
    shapes |= {f"{layer}mlp.{role}_proj.weight": (64, 32) for role in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (32, 64), "model.embed_tokens.weight": (37, 32)}
    shapes |= {f"{layer}{norm}.weight": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (32,), "lm_head.weight": (37, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _make_safetensors(folder: Path, kind: int) -> None:
    """One file in several types, or two shards with their index."""
    from safetensors.torch import save_file

    tensors = {n: t.bfloat16() if kind == 1 and "mlp" in n else t for n, t in _tensors().items()}
    (folder / "config.json").write_text(json.dumps(_config()))
    vocabulary = {chr(33 + i): i for i in range(37)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "decoder": {"type": "ByteLevel"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if kind < 2:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shards = {f"m-{i}.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _make_gguf(folder: Path, kind: int) -> None:
    """Plain types, or quantised ones; with a vocabulary that stays in the file."""
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    sizes = {"embedding_length": 32, "feed_forward_length": 64, "block_count": 1, "context_length": 64}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    for key, size in sizes.items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("general.name", "tiny")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_token_list([f"t{i}" for i in range(37 if kind == 0 else 5000)])
    writer.add_token_types([1] * (37 if kind == 0 else 5000))
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{role}_proj": f"ffn_{role}" for role in ("gate", "up", "down")}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in _tensors().items():
        bare = name.removesuffix(".weight")
        stored = outer[bare] if bare in outer else f"blk.0.{names[bare.removeprefix('model.layers.0.')]}"
        values = tensor.numpy()
        if kind == 1 and values.ndim == 2:
            raw = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{stored}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{stored}.weight", values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def _read_source(folder: Path) -> tuple[Any, Any]:
    import virtual_weights as vw
    from virtual_weights.checkpoint import open_source
    from virtual_weights.errors import ArchitectureError

    source = open_source(folder)
    figures: list[Any] = [sorted(source.tensors), dict(source.config)]
    figures += [source.read(name).double().numpy().tobytes() for name in sorted(source.tensors)]
    source.token_texts()
    source.at_rest  # noqa: B018 - what lies beside is looked at
    try:
        head: Any = vw.open(source)["L0H0"]
        head.ov.dense()
    except ArchitectureError as error:
        _printable(str(error))
    return figures, source.fingerprint


def _mutate_safetensors(files: Bytes, draw: random.Random) -> None:
    name = draw.choice([name for name in files if name.endswith(".safetensors")])
    if draw.random() < 0.25:
        name = draw.choice(list(files))
    if not name.endswith(".safetensors"):
        files[name] = _mutate_json(files[name], draw)
        return
    length = int.from_bytes(files[name][:8], "little")
    header, data = files[name][8 : 8 + length], files[name][8 + length :]
    header = _mutate_json(header, draw)
    if draw.random() < 0.2:
        data = _mutate_bytes(data, draw)
    length = len(header) if draw.random() < 0.9 else draw.choice(_EXTREMES)
    files[name] = struct.pack("<Q", length) + header + data


def _mutate_json(raw: bytes, draw: random.Random) -> bytes:
    """Change values and keys anywhere in a JSON text, or the text itself."""
    if draw.random() < 0.2:
        return _mutate_bytes(raw, draw)
    value = json.loads(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        node, key = value, _key(value, draw)
        while key is not None and _key(node[key], draw) is not None and draw.random() < 0.7:
            node = node[key]
            key = _key(node, draw)
        if key is None:
            break
        if isinstance(node, dict) and draw.random() < 0.3:
            node[draw.choice(["\x1b[2J", "", "a" * 2000, "\u202e", "é", "\ud800", "__metadata__"])] = node.pop(key)
        elif draw.random() < 0.2:
            del node[key]
        else:
            node[key] = _json_value(draw, node[key])
    text = json.dumps(value)
    if draw.random() < 0.1:
        text = text.replace(":", draw.choice([": ", ":\t", "::", ":\x00"]), draw.randint(1, 5))
    return text.encode()


def _key(node: Any, draw: random.Random) -> Any:
    """A key of an object, a place in a list, or None where there is none."""
    if not isinstance(node, (dict, list)) or not node:
        return None
    return draw.choice(list(node) if isinstance(node, dict) else list(range(len(node))))


def _json_value(draw: random.Random, old: Any) -> Any:
    scalars = [None, True, 1.5, -1, "", "F16", "\x1b[31m", float("nan"), float("inf"), 10**30, [], {}, [[]], *_EXTREMES]
    deep: Any = 1
    for _ in range(draw.choice([3, 70, 300])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    large: Any = [0] * draw.choice([10, 3000, 200_000 if draw.random() < 0.02 else 50])
    many = {f"k{i}": {} for i in range(50_000 if draw.random() < 0.02 else 30)}
    return draw.choice([*scalars, [old, old], old, deep, large, many])


def _mutate_gguf(files: Bytes, draw: random.Random) -> None:
    """Overwrite numbers of the header, most of which are counts, lengths, types or offsets."""
    raw = bytearray(files["model.gguf"])
    header = raw.find(b"output_norm.weight") + 400 if draw.random() < 0.8 else len(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        form = draw.choice(["<I", "<Q", "<Q", "<B"])
        number = draw.choice([*_EXTREMES, *range(14)]) % (1 << 8 * struct.calcsize(form))
        place = draw.choice([draw.randrange(header), draw.randrange(4, 24), draw.randrange(len(raw) - 8)])
        struct.pack_into(form, raw, min(place, len(raw) - 8), number)
    files["model.gguf"] = bytes(raw) if draw.random() < 0.7 else _mutate_bytes(bytes(raw), draw)


def _mutate_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite bytes."""
    changed = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 4])):
        begin = draw.randrange(len(changed) + 1)
        end = min(len(changed), begin + draw.choice([1, 1, 4, 8, 100, 5000]))
        way = draw.randrange(6)
        if way == 0 and begin < len(changed):
            changed[begin] ^= 1 << draw.randrange(8)
        elif way == 1:
            del changed[begin:]
        elif way == 2:
            changed[begin:begin] = changed[begin:end] * draw.choice([1, 3, 1000 if len(changed) < 100_000 else 2])
        elif way == 3:
            changed[begin:end] = draw.choice([b"\xff", b"\x00", b"\x1b", b"{", b"[", b'"', b"\xc3"]) * (end - begin)
        elif way == 4:
            changed[begin:begin] = struct.pack("<Q", draw.choice(_EXTREMES))
        else:
            del changed[begin:end]
    return bytes(changed)


TARGETS: dict[str, Target] = {
    "safetensors": Target(_make_safetensors, _read_source, _mutate_safetensors, kinds=3),
    "gguf": Target(_make_gguf, _read_source, _mutate_gguf, kinds=2),
    "atlas": Target(fuzz_stored.make_atlas, fuzz_stored.read_atlas, fuzz_stored.mutate_atlas, kinds=2),
    "moments": Target(fuzz_stored.make_moments, fuzz_stored.read_moments, fuzz_stored.mutate_moments, kinds=2),
}


# -- tries


class _Control(Exception):
    """A text for people holds a control character."""


def _printable(text: str) -> str:
    if not all(letter.isprintable() or letter == "\n" for letter in text):
        raise _Control(ascii(text)[:200])
    return text


@cache
def _sound(target: str, kind: int) -> tuple[Bytes, Any, Any]:
    """A sound instance's files, figures and what vouches for them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        TARGETS[target].make(folder, kind)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return files, *TARGETS[target].read(folder)


def attempt(target: str, number: int, tally: Tally, scratch: Path) -> None:
    """One try: mutate a sound instance, open it, read all of it, and count what went wrong."""
    from virtual_weights.errors import VirtualWeightsError

    draw = random.Random(f"{target} {number}")
    kinds = [_sound(target, kind) for kind in range(TARGETS[target].kinds)]  # all, so that no try pays for an import
    sound, figures, vouched = draw.choice(kinds)
    files = dict(sound)
    mutate = TARGETS[target].mutate
    if mutate is None or draw.random() < 0.15:
        name = draw.choice(list(files))
        files[name] = _mutate_bytes(files[name], draw)
    else:
        mutate(files, draw)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    tally.tries += 1
    before, begin = _peak(), time.process_time()  # what others do on the machine is no fault; who waits is ended
    try:
        found, voucher = TARGETS[target].read(folder)
        tally.opened += 1
        if found != figures and voucher == vouched:
            tally.add("changed_figures", number, "the figures differ, what vouches for them does not")
    except VirtualWeightsError as error:
        try:
            _printable(str(error))
        except _Control as control:
            tally.add("control_characters", number, str(control))
    except _Control as control:
        tally.add("control_characters", number, str(control))
    except Exception as error:  # noqa: BLE001 - what is looked for
        tally.add("foreign_exceptions", number, f"{type(error).__name__}: {ascii(str(error))[:200]}")
    seconds, grown = time.process_time() - begin, _peak() - before
    if seconds > MOST_SECONDS:
        tally.add("hangs", number, f"{seconds:.1f} s")
    if grown > MOST_BYTES:
        tally.add("memory", number, f"{grown >> 20} MiB")
    shutil.rmtree(folder)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fuzz(target: str, tries: int, first: int = 0) -> Tally:
    """Many tries in worker processes: a death or a hang costs one worker and is counted."""
    total, number, last = Tally(), first, first + tries
    while number < last:
        command = [sys.executable, __file__, target, "--worker", "--first", str(number), "--tries", str(last - number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as worker:
            number = _listen(worker, number, total)
    return total


def _listen(worker: subprocess.Popen[bytes], number: int, total: Tally) -> int:
    """Add what a worker reports, line by line; returns the number of the next try."""
    assert worker.stdout is not None
    rest, begun = b"", False
    while True:
        ready, _, _ = select.select([worker.stdout], [], [], _DEAD_AFTER if begun else 6 * _DEAD_AFTER)
        chunk = worker.stdout.read(1 << 16) if ready else None
        if not chunk:
            break
        begun = True
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number, report = int(line.partition(b" ")[0]) + 1, json.loads(line.partition(b" ")[2])
            for f in fields(total):
                setattr(total, f.name, getattr(total, f.name) + report.get(f.name, type(getattr(total, f.name))()))
    hung = worker.poll() is None and chunk is None
    if hung:
        worker.kill()
    code = worker.wait()
    if not begun and code > 0:
        raise RuntimeError(f"a worker could not begin (exit status {code})")
    if hung or code != 0:
        total.tries += 1
        total.add("hangs" if hung else "deaths", number, f"exit status {code}")
        return number + 1
    return number


def _work(target: str, first: int, tries: int) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(first, first + tries):
            tally = Tally()
            attempt(target, number, tally, Path(scratch))
            report = {name: value for name, value in vars(tally).items() if value}
            sys.stdout.write(f"{number} {json.dumps(report)}\n")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="open mutated files; every count but the first two must be 0")
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        _work(options.targets[0], options.first, options.tries)
        return
    wrong = 0
    for target in options.targets:
        begin, tally = time.perf_counter(), fuzz(target, options.tries, options.first)
        counts = ", ".join(f"{f.name} {getattr(tally, f.name)}" for f in fields(tally) if f.name != "first")
        sys.stdout.write(f"{target}: {counts} ({time.perf_counter() - begin:.0f} s)\n")
        sys.stdout.writelines(f"  {line}\n" for line in tally.first)
        wrong += tally.wrong
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
