"""One prompt taken apart: what writers put on a reader, what states say to the unembedding, what paths add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.activations import Activations, check_tokens, prompted
from virtual_weights.runtime.running.hooks import activation
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Group, Label, Question, parse
from virtual_weights.stream.group import READINGS
from virtual_weights.stream.operating_point import gate_factor

_MOST = 100_000_000  # contributions at once, in float64
_LENS = {
    "state": ("states", "of the stream"),
    "place": ("place, from 1", "by probability"),
    "token": ("id", "of the vocabulary"),
    "logit": ("logits", "less the mean over the vocabulary"),
    "probability": ("1, in [0, 1]", "softmax of the logits"),
}
CONSTANT = "constant"
"""What a reader receives whatever the stream holds: its bias, and the norm's shift through it."""


@final
@dataclass(frozen=True)
class Trace(Question[Run]):
    """A reader's input as a sum over all writers that reach it, token by token of one prompt.

    ``port(t) = sum_w R~ O_w z_w(t) / s(t) + constant``, exactly: ``stamp["error"]`` is the relative distance to what
    the model itself computed.

    Attributes:
        reader: ``"L17H3.K"`` (before rotary), ``"L5.mlp.up"``, ``"L5N7.gate"`` or ``"unembed"``.
        token: of the unembedding only this row: the contribution of every writer to a token's logit, here as everywhere
            the logit less the mean over the vocabulary (a log-probability up to what all tokens have in common).
        against: less this row: to the difference of two logits.
    """

    question: ClassVar[str] = "trace"
    reader: str = "unembed"
    token: int | None = None
    against: int | None = None

    def __post_init__(self) -> None:
        check_tokens(self.token, self.against)

    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the prompt.

        Returns:
            A Record over (token, writer), the constant last: ``norm`` of the contribution, and ``share``
            ``<c_w, total> / |total|^2``, which sums to 1 over writers; of a logit also ``logit``, the contribution
            itself, of a neuron ``value``.

        Raises:
            UsageError: no such reader, token ids that the vocabulary does not have, twice the same token, or a run of
                several chunks.
            ResourceError: more contributions than memory should hold.
        """
        del progress  # it is one step
        label = parse(self.reader)
        run.stream.groups.of(label)  # refuses a wrong name before the model runs
        activations = prompted(run)
        reading = self._reading(activations, label)
        writers, width = len(run.stream.components), len(reading.rows)
        if run.count * writers * width > _MOST:
            raise ResourceError(
                f"{run.count} tokens, {writers} writers and {width} rows of {self.reader}",
                expected=f"at most {_MOST:,} numbers at once",
                do="name a token of the unembedding, a neuron of the MLP, or take a shorter prompt",
            )
        scalar = activations.scalar(reading.state)[:, None]
        parts = {name: y @ reading.rows.T / scalar for name, y in activations.written(reading.state)}
        if reading.constant is not None:
            parts[CONSTANT] = reading.constant.to(accumulate).expand(run.count, -1)
        values = torch.stack(list(parts.values()), 1)  # (T, writers, k)
        total = values.sum(1)
        share = (values * total[:, None]).sum(2) / total.square().sum(1, keepdim=True)
        columns = [
            Column("norm", values.norm(dim=2), "as the port", "length of R~ O z / s"),
            Column("share", share, "1, sums to 1", "<contribution, total> / |total|^2"),
        ]
        if width == 1:
            name = "logit" if label.kind == "unembed" else "value"
            meaning = "R~ O z / s" + (", less its mean over the vocabulary" if name == "logit" else "")
            columns.insert(0, Column(name, values[:, :, 0], "logits" if name == "logit" else "activation", meaning))
        return run.record(
            self,
            (Axis("token", tuple(map(str, range(run.count)))), Axis("writer", tuple(parts))),
            columns,
            error=float((total - reading.computed).norm() / reading.computed.norm()),
            tokens=activations.tokens.tolist(),
            state=reading.state,
        )

    def _reading(self, activations: Activations, label: Label) -> _Reading:
        """What the reader does to the stream, and what the model computed there."""
        stream, port = activations.stream, label.port or label.kind
        if port not in READINGS or (self.token is not None and port != "unembed"):
            raise UsageError(
                f"{label} is not a port that reads the stream" if self.token is None else f"{label} has no logits",
                expected="L5H3.Q, .K or .V, L5.mlp.gate, .up or .in, L5N7.up, or unembed (with a token for its logit)",
                do="name one of these",
            )
        group = stream.groups.of(label)
        read = stream.read(port, group)
        computed = activations.logits if port == "unembed" else activations.signals[port, group.id]
        index = 0
        if label.kind == "head":
            index = (label.index or 0) // group.shared(port)
            computed = computed[:, index]
        maps, constant = read.maps[index], None if read.constants is None else read.constants[index]
        assert group.reads is not None
        if label.kind != "neuron" and self.token is None:
            return _Reading(maps.to(accumulate), constant, computed, group.reads)
        index, against = (label.index or 0, None) if self.token is None else (self.token, self.against)
        rows = row(maps, 0, index, against)
        constant = None if constant is None else row(constant, 0, index, against)
        return _Reading(rows, constant, row(computed, 1, index, against), group.reads)


@dataclass(frozen=True, eq=False)
class _Reading:
    """A reader's rows (k, d), its constant (k,), what the model computed (T, k), and the state it reads."""

    rows: Tensor
    constant: Tensor | None
    computed: Tensor
    state: int


@final
@dataclass(frozen=True)
class Lens(Question[Run]):
    """Logit lens: which tokens every state of the stream would say, read by the unembedding with its own scalar.

    Attributes:
        top: how many tokens of every state.
        position: at which token of the prompt; -1 is the last.
    """

    question: ClassVar[str] = "lens"
    top: int = 5
    position: int = -1

    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the prompt.

        Returns:
            A Record over ``row``: ``state``, ``place`` (1 is most likely), ``token``, ``logit`` (less the mean over
            the vocabulary) and ``probability``.
        """
        activations, unembed = prompted(run), run.stream.read("unembed")
        maps, columns = unembed.maps[0].to(accumulate), dict[str, list[float]]()
        for number in range(run.stream.states):
            logits = maps @ activations.state(number)[self.position] / activations.scalar(number)[self.position]
            if unembed.constants is not None:
                logits = logits + unembed.constants[0].to(accumulate)
            best, probabilities = logits.topk(min(self.top, len(logits))).indices, logits.softmax(0)
            for place, token in enumerate(best.tolist(), 1):
                entry = {"state": number, "place": place, "token": token}
                entry |= {"logit": float(logits[token]), "probability": float(probabilities[token])}
                for name, value in entry.items():
                    columns.setdefault(name, []).append(value)
            progress(number + 1, run.stream.states)
        return run.record(
            self,
            (Axis("row", tuple(map(str, range(1, len(columns["state"]) + 1)))),),
            (Column(name, torch.tensor(values), *_LENS[name]) for name, values in columns.items()),
            tokens=activations.tokens.tolist(),
        )


def row(rows: Tensor, axis: int, index: int, against: int | None = None) -> Tensor:
    """One row of a reader along an axis, which stays, in float64; less another where one is named.

    Raises:
        UsageError: there is no such row.
    """
    wrong = [i for i in (index, against) if i is not None and not 0 <= i < rows.shape[axis]]
    if wrong:
        last = rows.shape[axis] - 1
        raise UsageError(f"there is no token or neuron {wrong[0]}", expected=f"ids from 0 to {last}", do="correct it")
    first = rows.narrow(axis, index, 1).to(accumulate)
    return first if against is None else first - rows.narrow(axis, against, 1).to(accumulate)


@final
@dataclass(frozen=True)
class Route(Question[Run]):
    """The direct contribution of a head, an MLP or a neuron to a logit, split over the writers that it reads.

    With r the row of the unembedding, norm's gain included, A the head's pattern and t the position, of a head::

        logit(i, s) = < r, O A(t, s) R~_V y_i(s) > / (s_V(s) s_final(t))

    for every writer i and token s; of an MLP through its up (or in) port with its gate g fixed at that of the run::

        logit(i, t) = < r, O diag(g(t)) R~_up y_i(t) > / (s_up(t) s_final(t))

    g is ``act(gate)``, without a gate ``act(pre) / pre``. Norm scalars are those of the run. Summed over writers, the
    constant of the port among them, and tokens it is the component's own direct contribution, ``stamp["direct"]``;
    ``stamp["error"]`` is how far the sum is from that, over the sum of absolute values.

    Attributes:
        through: ``"L17H3"``, ``"L17.mlp"`` or ``"L17N5"``.
        token: whose logit.
        against: less the logit of this one; None for the logit less the mean over the vocabulary.
        position: at which token of the prompt; -1 is the last.
    """

    question: ClassVar[str] = "route"
    through: str
    token: int
    against: int | None = None
    position: int = -1

    def __post_init__(self) -> None:
        check_tokens(self.token, self.against)

    @torch.no_grad()
    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the prompt.

        Returns:
            A Record over (writer, token): ``logit``. Of an MLP the only token is its own; tokens after t are absent.

        Raises:
            UsageError: no such component, token or position, twice the same token, or a run of several chunks.
        """
        del progress  # it is one step
        stream, label, size = run.stream, parse(self.through), run.count
        group = stream.groups.of(label)
        if group.reads is None or not group.writes or label.port or not -size <= self.position < size:
            raise UsageError(
                f"no path through {self.through} at token {self.position} of {size}",
                expected="a head, an MLP or a neuron of this model, such as L5H3, L5.mlp or L5N7, and a token of it",
                do="name one of these",
            )
        heads = label.kind == "head"
        activations = prompted(run, *(("pattern",) if heads else ()))
        t = self.position % size
        last = stream.groups["unembed"].reads or 0
        logit = row(stream.read("unembed").maps[0], 0, self.token, self.against)[0] / activations.scalar(last)[t]
        passage = (_head if heads else _mlp)(activations, group, label, logit, t)
        scalar = activations.scalar(group.reads)[: t + 1]
        parts = {
            name: y[: t + 1] @ passage.vector / scalar * passage.weights for name, y in activations.written(group.reads)
        }
        if passage.constant is not None:
            parts[CONSTANT] = passage.constant * passage.weights
        values = torch.stack(list(parts.values()))  # (writers, t + 1)
        error = float((values.sum() - passage.direct).abs() / values.abs().sum())
        tokens = range(t + 1) if heads else (t,)
        return run.record(
            self,
            (Axis("writer", tuple(parts)), Axis("token", tuple(map(str, tokens)))),
            (
                Column(
                    "logit",
                    values if heads else values[:, t:],
                    "logits",
                    f"what the writer contributes through {self.through}",
                ),
            ),
            direct=float(passage.direct),
            error=error,
            tokens=activations.tokens.tolist(),
        )


@dataclass(frozen=True, eq=False)
class _Passage:
    """How a component passes on what it reads: ``sum_s weights(s) (<vector, y(s)> / s(s) + constant) = direct``."""

    vector: Tensor
    constant: Tensor | None
    weights: Tensor
    direct: Tensor


def _head(activations: Activations, group: Group, label: Label, logit: Tensor, t: int) -> _Passage:
    """Of a head: weighted by its pattern."""
    index = label.index or 0
    read, shared = activations.stream.read("V", group), index // group.sharing
    inner = activations.stream.write(group)[index].to(accumulate).T @ logit
    return _Passage(
        read.maps[shared].to(accumulate).T @ inner,
        None if read.constants is None else read.constants[shared].to(accumulate) @ inner,
        activations.signals["pattern", group.id][index, t, : t + 1].to(accumulate),
        activations.signals["inner", group.id][t, index].to(accumulate) @ inner,
    )


def _mlp(activations: Activations, group: Group, label: Label, logit: Tensor, t: int) -> _Passage:
    """Of an MLP or a neuron: at its own token, gates fixed."""
    stream, port = activations.stream, group.ports[-1]
    rows = slice(None) if label.index is None else slice(label.index, label.index + 1)
    read, function = stream.read(port, group), activation(stream, group)
    pre = activations.signals[port, group.id][t, rows].to(accumulate)
    if "gate" in group.ports:
        gate = function(activations.signals["gate", group.id][t, rows].to(accumulate))
    else:
        gate = gate_factor(function, pre)
    inner = (stream.write(group)[0][:, rows].to(accumulate).T @ logit) * gate
    weights = torch.zeros(t + 1, dtype=accumulate)
    weights[t] = 1
    whole = activations.signals["written", group.id][t].to(accumulate) @ logit
    return _Passage(
        read.maps[0, rows].to(accumulate).T @ inner,
        None if read.constants is None else read.constants[0, rows].to(accumulate) @ inner,
        weights,
        pre @ inner if label.kind == "neuron" else whole,
    )
