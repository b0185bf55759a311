"""Direct logit attribution of paths: what a part tells a logit, split over who told the part."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.flow.observation import activation
from virtual_weights.runtime.flow.trace import CONSTANT, Passage, row
from virtual_weights.stream import Label, parse
from virtual_weights.stream.operating_point import gate_factor


@torch.no_grad()
def route(of: Passage, through: str, token: int, against: int | None = None, position: int = -1) -> Record:
    """The direct contribution of a head, an MLP or a neuron to a logit, split over the writers that it reads.

    With r the row of the unembedding, norm's gain included, A the head's pattern and t the position, of a head::

        logit(i, s) = < r, O A(t, s) R~_V y_i(s) > / (s_V(s) s_final(t))

    for every writer i and token s; of an MLP through its up (or in) port with its gate g fixed at that of the run::

        logit(i, t) = < r, O diag(g(t)) R~_up y_i(t) > / (s_up(t) s_final(t))

    g is ``act(gate)``, without a gate ``act(pre) / pre``. Norm scalars are those of the run. Summed over writers, the
    constant of the port among them, and tokens it is the part's own direct contribution, ``stamp["direct"]``;
    ``stamp["error"]`` is how far the sum is from that, over the sum of absolute values.

    Args:
        of: the prompt, of a head with ``patterns=True``.
        through: ``"L17H3"``, ``"L17.mlp"`` or ``"L17N5"``.
        token: whose logit.
        against: less the logit of this one.
        position: at which token of the prompt; -1 is the last.

    Returns:
        A Record over (writer, token): ``logit``. Of an MLP the only token is its own; tokens after t are absent.

    Raises:
        UsageError: no such part, token or position, or no pattern was kept.
    """
    stream, label, size = of.stream, parse(through), len(of.tokens)
    whole = Label("mlp", label.layer) if label.kind == "neuron" else label
    part = next((c for c in stream.components if c.label == whole and c.writes is not None), None)
    if part is None or part.reads is None or not -size <= position < size:
        raise UsageError(
            f"no path through {through} at token {position} of {size}",
            expected="a head, an MLP or a neuron of this model, such as L5H3, L5.mlp or L5N7, and a token of it",
            do="name one of these",
        )
    t, last = position % size, stream.states - 1
    told = row(stream.read("unembed").maps[0], 0, token, against)[0] / of.scalar(last)[t]
    vector, constant, weights, direct = (_head if label.kind == "head" else _mlp)(of, label, told, t)
    parts = {name: y[: t + 1] @ vector / of.scalar(part.reads)[: t + 1] * weights for name, y in of.written(part.reads)}
    if constant is not None:
        parts[CONSTANT] = constant * weights
    each = torch.stack(list(parts.values()))  # (writers, t + 1)
    error = float((each.sum() - direct).abs() / each.abs().sum())
    if label.kind != "head":
        each = each[:, t:]
    places = range(t + 1) if label.kind == "head" else (t,)
    return Record(
        "route",
        (Axis("writer", tuple(parts)), Axis("token", tuple(map(str, places)))),
        (Column("logit", each, "", f"what the writer tells the logit through {through}"),),
        parameters={"through": through, "token": token, "against": against, "position": t},
        stamp={"norm": stream.norm_stamp, "direct": float(direct), "error": error, "tokens": of.tokens.tolist()},
        provenance=stream.provenance,
    )


_Through = tuple[Tensor, Tensor | None, Tensor, Tensor]


def _head(of: Passage, label: Label, told: Tensor, t: int) -> _Through:
    """The direction (d,) that a head reads for a logit, what its constant gives, its pattern (t + 1,), the whole."""
    layer, index = label.layer or 0, label.index or 0
    if ("pattern", layer) not in of.seen:
        raise UsageError("no pattern was kept", expected="passage(..., patterns=True)", do="run the prompt again so")
    read, shared = of.stream.read("V", layer), index // of.stream.spec.group
    inner = of.stream.write("head", layer)[index].to(accumulate).T @ told
    constant = None if read.constants is None else read.constants[shared].to(accumulate) @ inner
    pattern = of.seen["pattern", layer][index, t, : t + 1].to(accumulate)
    direct = of.seen["inner", layer][t, index].to(accumulate) @ inner
    return read.maps[shared].to(accumulate).T @ inner, constant, pattern, direct


def _mlp(of: Passage, label: Label, told: Tensor, t: int) -> _Through:
    """The same of an MLP or a neuron at its own token, gates fixed."""
    stream, layer = of.stream, label.layer or 0
    rows = slice(None) if label.index is None else slice(label.index, label.index + 1)
    read, act = stream.read("up" if stream.spec.gated else "in", layer), activation(stream.spec.activation)
    pre = of.seen["in", layer][t, rows].to(accumulate)
    gate = act(of.seen["gate", layer][t, rows].to(accumulate)) if stream.spec.gated else gate_factor(act, pre)
    inner = (stream.write("mlp", layer)[0][:, rows].to(accumulate).T @ told) * gate
    constant = None if read.constants is None else read.constants[0, rows].to(accumulate) @ inner
    own = torch.zeros(t + 1, dtype=accumulate)
    own[t] = 1
    direct = pre @ inner if label.kind == "neuron" else of.seen["mlp", layer][t].to(accumulate) @ told
    return read.maps[0, rows].to(accumulate).T @ inner, constant, own, direct
