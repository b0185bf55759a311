"""One prompt taken apart: what every writer puts on a reader, token by token, summing to what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.edge import ROLES
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.stream import Component, Label, Stream, parse, scale
from virtual_weights.stream.group import Port

_MOST = 100_000_000  # contributions held at once, in float64
CONSTANT = "constant"
"""What a reader receives whatever the stream holds: its bias, and the norm's shift through it."""


@final
@dataclass(frozen=True, eq=False)
class Passage:
    """What one prompt did in a model.

    Attributes:
        stream: the model's stream.
        tokens: (T,) ids.
        seen: what its parts received and gave, by kind and layer, without the batch axis; see ``watching``.
        logits: (T, vocabulary).
    """

    stream: Stream
    tokens: Tensor
    seen: dict[tuple[Kind, int], Tensor]
    logits: Tensor

    def state(self, number: int) -> Tensor:
        """A state of the stream, (T, d) float64."""
        return self.seen["state", number].to(accumulate)

    def scalar(self, number: int) -> Tensor:
        """The norm scalar with which a state is read, (T,) float64."""
        return scale(self.state(number), self.stream.spec.norm, self.stream.spec.norm_eps)

    def written(self, before: int) -> Iterator[tuple[str, Tensor]]:
        """What every writer that reaches a state has added to it, (T, d) float64, in order of depth."""
        for component in self.stream.components:
            if component.writes is not None and component.writes <= before:
                yield str(component.label), self._written(component)

    def _written(self, component: Component) -> Tensor:
        kind, layer = component.kind, component.label.layer or 0
        if kind in ("embed", "pos"):
            return self.seen[kind, 0].to(accumulate).expand(len(self.tokens), -1)
        if kind == "mlp":
            return self.seen["mlp", layer].to(accumulate)
        if kind == "head":
            inner = self.seen["inner", layer][:, component.label.index]
            out = self.stream.write("head", component.label.layer)[component.label.index]
            return inner.to(accumulate) @ out.to(accumulate).T
        bias = self.stream.weight("o_bias" if kind == "attn_bias" else "down_bias", layer)
        assert bias is not None
        return bias.to(accumulate).expand(len(self.tokens), -1)


@torch.no_grad()
def passage(stream: Stream, tokens: Tensor, model: nn.Module | None = None, *, patterns: bool = False) -> Passage:
    """Run a model on one prompt and keep what its parts did.

    Args:
        stream: the model.
        tokens: (T,) token ids.
        model: a loaded model; without it the checkpoint is loaded in float32.
        patterns: keep attention too, (heads, T, T) a layer; ``route`` needs it.

    Raises:
        UsageError: no tokens, or transformers is missing.
    """
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point():
        raise UsageError(
            f"a prompt of shape {tuple(tokens.shape)}, {tokens.dtype}", expected="token ids (T,)", do="pass one prompt"
        )
    runs: Any = load(stream, model)
    seen: dict[tuple[Kind, int], Tensor] = {}
    kinds: list[Kind] = ["state", "inner", "mlp", "embed", "Q", "K", "V", "gate", "in"]
    wanted: list[Kind] = [kind for kind in kinds if kind != "gate" or stream.spec.gated]
    if stream.model.has("pos"):
        wanted.append("pos")
    if patterns:
        wanted.append("pattern")

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        seen[kind, layer] = tensor[0].cpu()

    with watching(runs, stream, wanted, see):
        logits = runs(tokens[None].to(next(runs.parameters()).device), use_cache=False).logits[0]
    return Passage(stream, tokens.cpu(), seen, logits.detach().cpu())


def trace(of: Passage, reader: str, token: int | None = None, against: int | None = None) -> Record:
    """A reader's input as a sum over all writers that reach it, token by token.

    ``port(t) = sum_w R~ O_w z_w(t) / s(t) + constant``, exactly: ``stamp["error"]`` is the relative distance to what
    the model itself computed.

    Args:
        of: the prompt.
        reader: ``"L17H3.K"`` (before rotary), ``"L5.mlp.up"``, ``"L5N7.gate"`` or ``"unembed"``.
        token: of the unembedding only this row: the contribution of every writer to a token's logit.
        against: less this row: to the difference of two logits.

    Returns:
        A Record over (token, writer), the constant last: ``norm`` of the contribution, and ``share``
        ``<c_w, total> / |total|^2``, which sums to 1 over writers; of a logit also ``logit``, the contribution itself.

    Raises:
        UsageError: no such reader, or token ids that the vocabulary does not have.
        ResourceError: more contributions than memory should hold.
    """
    stream, label = of.stream, parse(reader)
    rows, constant, own, state = _reading(of, label, token, against)
    scalar = of.scalar(state)[:, None]
    size = len(of.tokens) * len(stream.components) * len(rows)
    if size > _MOST:
        raise ResourceError(
            f"{len(of.tokens)} tokens, {len(stream.components)} writers and {len(rows)} rows of {reader}",
            expected=f"at most {_MOST:,} numbers at once",
            do="name a token of the unembedding, a neuron of the MLP, or take a shorter prompt",
        )
    names, parts = list[str](), list[Tensor]()
    for name, vectors in of.written(state):
        names.append(name)
        parts.append(vectors @ rows.T / scalar)
    if constant is not None:
        names.append(CONSTANT)
        parts.append(constant.to(accumulate).expand(len(of.tokens), -1))
    each = torch.stack(parts, 1)  # (T, writers, k)
    total = each.sum(1)
    share = (each * total[:, None]).sum(2) / total.square().sum(1, keepdim=True)
    columns = [
        Column("norm", each.norm(dim=2), "as the port", "length of R~ O z / s"),
        Column("share", share, "1, sums to 1", "<contribution, total> / |total|^2"),
    ]
    if rows.shape[0] == 1:
        columns.insert(0, Column("logit" if label.kind == "unembed" else "value", each[:, :, 0], "", "R~ O z / s"))
    return Record(
        "trace",
        (Axis("token", tuple(map(str, range(len(of.tokens))))), Axis("writer", tuple(names))),
        tuple(columns),
        parameters={"reader": reader, "token": token, "against": against},
        stamp={
            "norm": stream.norm_stamp,
            "error": float((total - own).norm() / own.norm()),
            "tokens": of.tokens.tolist(),
            "state": state,
        },
        provenance=stream.provenance,
    )


def lens(of: Passage, top: int = 5, position: int = -1) -> Record:
    """Logit lens: which tokens every state of the stream would say, read by the unembedding with its own scalar.

    Returns:
        A Record over ``row``: ``state``, ``place`` (1 is most likely), ``token``, ``logit`` and ``probability``.
    """
    unembed = of.stream.read("unembed")
    rows, columns = unembed.maps[0].to(accumulate), dict[str, list[float]]()
    for number in range(of.stream.states):
        logits = rows @ of.state(number)[position] / of.scalar(number)[position]
        if unembed.constants is not None:
            logits = logits + unembed.constants[0].to(accumulate)
        best = logits.topk(min(top, len(logits)))
        chance = logits.softmax(0)
        for place, token in enumerate(best.indices.tolist(), 1):
            told = {"state": number, "place": place, "token": token}
            told |= {"logit": float(logits[token]), "probability": float(chance[token])}
            for name, value in told.items():
                columns.setdefault(name, []).append(value)
    count = len(columns["state"])
    return Record(
        "lens",
        (Axis("row", tuple(map(str, range(1, count + 1)))),),
        tuple(Column(name, torch.tensor(values)) for name, values in columns.items()),
        parameters={"top": top, "position": position},
        stamp={"norm": of.stream.norm_stamp, "tokens": of.tokens.tolist()},
        provenance=of.stream.provenance,
    )


def _reading(
    of: Passage, label: Label, token: int | None, against: int | None
) -> tuple[Tensor, Tensor | None, Tensor, int]:
    """A reader's rows (k, d), its constant (k,), what the model computed (T, k), and the state it reads."""
    stream = of.stream
    port: Port | None = next((p for p in ROLES if p == (label.port or label.kind)), None)
    whole = Label("mlp", label.layer) if label.kind == "neuron" else Label(label.kind, label.layer, label.index)
    place = next((c for c in stream.components if c.label == whole), None)
    if port is None or place is None or place.reads is None or (token is not None and port != "unembed"):
        raise UsageError(
            f"{label} is no port that reads the stream" if token is None else f"{label} has no logits",
            expected="L5H3.Q, .K or .V, L5.mlp.gate, .up or .in, L5N7.up, or unembed (with a token for its logit)",
            do="name one of these",
        )
    read = stream.read(port, label.layer)
    if label.kind == "head":
        assert label.index is not None
        at = label.index // (1 if port == "Q" else stream.spec.group)
        constant = None if read.constants is None else read.constants[at]
        return read.maps[at].to(accumulate), constant, of.seen[_seen(port), label.layer or 0][:, at], place.reads
    maps, constant = read.maps[0], None if read.constants is None else read.constants[0]
    own = of.logits if port == "unembed" else of.seen[_seen(port), label.layer or 0]
    if token is None and label.index is None:
        return maps.to(accumulate), constant, own, place.reads
    index = token if token is not None else label.index or 0
    told = None if constant is None else row(constant, 0, index, against)
    return row(maps, 0, index, against), told, row(own, 1, index, against), place.reads


def row(of_rows: Tensor, axis: int, index: int, against: int | None = None) -> Tensor:
    """One row of a reader along an axis, which stays, in float64; less another where one is named.

    Raises:
        UsageError: there is no such row.
    """
    wrong = [i for i in (index, against) if i is not None and not 0 <= i < of_rows.shape[axis]]
    if wrong:
        last = of_rows.shape[axis] - 1
        raise UsageError(f"no row {wrong[0]}", expected=f"ids from 0 to {last}", do="correct the token id")
    own = of_rows.narrow(axis, index, 1).to(accumulate)
    return own if against is None else own - of_rows.narrow(axis, against, 1).to(accumulate)


def _seen(port: Port) -> Kind:
    assert port != "unembed"
    return "in" if port == "up" else port
