"""What ``fuzz.py`` does to an atlas and to a file of moments: sound ones, how they are read, how they are changed."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

Bytes = dict[str, bytes]
_EXTREMES = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


# -- an atlas


def make_atlas(folder: Path, kind: int) -> None:
    """An atlas with every form of record, its labels of heads among them, and a ledger."""
    import torch

    from virtual_weights.atlas import Atlas
    from virtual_weights.record import Axis, Column, Record

    generator = torch.Generator().manual_seed(kind)
    store = Atlas.create(folder, {"fingerprint": "f00d", "reference": "none", "sizes": {"d_model": 8}})
    heads = tuple(f"L{layer}H{head}" for layer in range(3) for head in range(2))
    scores = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    scores[:2] = torch.nan
    pairs = (Axis("reader", heads, tuple(f"L{i // 2}.kv0" for i in range(6))), Axis("writer", heads))
    columns = (Column("score", scores, "1", "a ratio"), Column("z", (scores * 7).bfloat16()))
    store.put(Record("composition", pairs, columns, {"port": "K"}, {"norm": "folded"}), seconds=1.5)
    said = Column("label", ("induction", None, "é", "", "\x1b[2J", "x")), Column("count", (1, 2, None, 2**70, 0, -1))
    store.put(Record("labels", (Axis("head", heads),), (*said, Column("x", scores[2]))), seconds=1.5)
    ends = Column("reader", heads), Column("writer", heads[::-1])
    store.put(
        Record("ablation", (Axis("edge", heads),), (*ends, Column("effect", scores[3])), {"seed": kind}), seconds=1.5
    )


def read_atlas(folder: Path) -> tuple[Any, Any]:
    """Everything in it, and the checksums that vouch for it."""
    from virtual_weights.atlas import Atlas, edges

    store = Atlas.open(folder)
    figures: list[Any] = [dict(store.manifest)]
    checksums = [json.loads((folder / "manifest.json").read_bytes())["checksum"]]
    headers = {key: store.header(key) for key in store.keys()}  # noqa: SIM118 (no mapping)
    for key in sorted(headers):
        record = store.get(key)
        columns = [(c.name, c.unit, c.meaning, _plain(c.values)) for c in record.columns]
        figures += [key, record.question, record.axes, columns, record.parameters, record.stamp, record.provenance]
        checksums.append(json.loads((folder / "records" / key / "record.json").read_bytes())["checksum"])
    figures += [edges(store, question=question) for question in ("composition", "ablation")]
    for row in store.ledger():  # what is missing there is no loss, what is there must be right
        entry = row["question"], row["parameters"], row["seconds"]
        if entry not in [(*known, 1.5) for known in _TASKS]:
            raise AssertionError(f"changed entry of the ledger: {row}")
    return figures, checksums


_TASKS = [("composition", '{"port":"K"}'), ("labels", "{}"), ("ablation", '{"seed":0}'), ("ablation", '{"seed":1}')]


def _plain(values: Any) -> Any:
    return values if isinstance(values, tuple) else (str(values.dtype), values.double().numpy().tobytes())


def mutate_atlas(files: Bytes, draw: random.Random) -> None:
    """Change a file anywhere, or a header in its meaning, with a checksum that is right again or not."""
    from fuzz import _mutate_bytes, _mutate_json

    from virtual_weights.atlas.stored import sealed

    name = draw.choice(list(files))
    if not name.endswith(".json"):
        files[name] = _numbers(files[name], draw) if draw.random() < 0.3 else _mutate_bytes(files[name], draw)
        return
    files[name] = _mutate_json(files[name], draw)
    if draw.random() < 0.4:
        try:
            fields = json.loads(files[name])
            files[name] = sealed({k: v for k, v in fields.items() if k != "checksum"}).encode()
        except (ValueError, AttributeError, RecursionError):
            return


def _numbers(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice([1, 2, 8])):
        form = draw.choice(["<I", "<Q", ">I", "<B"])
        number = draw.choice(_EXTREMES) % (1 << 8 * struct.calcsize(form))
        struct.pack_into(form, changed, draw.randrange(max(1, len(changed) - 8)), number)
    return bytes(changed)


# -- moments


def make_moments(folder: Path, kind: int) -> None:
    """Moments of a model with two layers, in double or single precision."""
    import torch

    from virtual_weights.stream.moments import Moments

    draw = torch.Generator().manual_seed(kind)
    states = {n: torch.rand(5, generator=draw) for n in ("norm", "inverse", "inverse_square", "variance", "kurtosis")}

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64 if kind else torch.float32)

    heads, k = ("L0.attn", "L1.attn"), 3
    moments = Moments(
        "f00d",
        64,
        16,
        states=states,
        second={group: some(2, 4, k, k) for group in heads},
        mean={group: some(2, 4, k) for group in heads},
        energy={group: some(2, 4) for group in heads},
        ports={f"{group}.Q": some(4, k, k) for group in heads},
        port_means={f"{group}.Q": some(4, k) for group in heads},
        attention={group: some(4, 3) for group in heads},
        neurons={"L0.mlp": some(3, 8)},
        text="a text",
    )
    moments.save(folder / "moments.safetensors")


def read_moments(folder: Path) -> tuple[Any, Any]:
    """Everything in it, and the checksum that vouches for it."""
    from virtual_weights.stream.moments import Moments

    path = folder / "moments.safetensors"
    moments = Moments.load(path)
    figures: list[Any] = [moments.fingerprint, moments.tokens, moments.length, moments.text]
    for name, tensor in sorted(moments._tensors().items()):
        figures += [name, str(tensor.dtype), tuple(tensor.shape), tensor.double().numpy().tobytes()]
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return figures, header["__metadata__"]["checksum"]


def mutate_moments(files: Bytes, draw: random.Random) -> None:
    """Change bytes, the header, or a tensor with a checksum that is right again."""
    from fuzz import _mutate_bytes, _mutate_json

    (name,) = files
    raw, way = files[name], draw.random()
    length = int.from_bytes(raw[:8], "little")
    if way < 0.4:
        files[name] = _mutate_bytes(raw, draw)
    elif way < 0.7:
        header = _mutate_json(raw[8 : 8 + length], draw)
        length = len(header) if draw.random() < 0.9 else draw.choice(_EXTREMES)
        files[name] = struct.pack("<Q", length) + header + raw[8 + int.from_bytes(raw[:8], "little") :]
    else:
        files[name] = _rewritten(raw, draw)


def _rewritten(raw: bytes, draw: random.Random) -> bytes:
    """A file with another content under its own checksum."""
    import tempfile

    import torch
    from safetensors.torch import load

    from virtual_weights.stream.tensor_file import write_tensors

    tensors = load(raw)
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    metadata = {key: value for key, value in metadata.items() if key not in ("checksum", "format")}
    for _ in range(draw.choice([1, 1, 3])):
        name = draw.choice(sorted(tensors))
        shape = draw.choice([(), (0,), (2,), (1, 1), (2, 4), tuple(tensors[name].shape)])
        value = draw.choice([1.0, float("nan"), float("inf"), -1.0])
        dtype = draw.choice(
            [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
        )
        changed = torch.full(shape, value if dtype.is_floating_point else 1.0).to(dtype)
        tensors[draw.choice([name, "second/x", "x", "/", "states/\x1b[2J", "\u202e/"])] = changed
        tensors.pop(draw.choice([name, ""]), None)
        key = draw.choice(sorted(metadata) or [""])
        metadata[key] = draw.choice(["", "-1", "0", "x\x1b[2J", "9" * 5000, "1e9", metadata.get(key, "")])
        metadata.pop(draw.choice([key, "", ""]), None)
        if not tensors:
            break
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moments.safetensors"
        write_tensors(path, "virtual-weights moments 4", tensors, metadata)
        return path.read_bytes()
