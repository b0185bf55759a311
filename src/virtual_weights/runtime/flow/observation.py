"""What a run shows, noted: averages over its tokens, or the operating point of one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.activations import one_chunk
from virtual_weights.runtime.running.hooks import Signal, activation, forward, places, watching, wide
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token
from virtual_weights.stream import OperatingPoint, Question, Stream, through_norm
from virtual_weights.stream.effective import port_scale, received
from virtual_weights.stream.group import Group, Port
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.operating_point import gate_factor

_STATES = {
    "norm": ("1", "E[s], s the norm scalar with which the state is read"),
    "inverse": ("1", "E[1/s]"),
    "inverse_square": ("1", "E[1/s^2]"),
    "variance": ("1", "of a token's d entries, mean over tokens"),
    "kurtosis": ("1", "of a token's d entries, mean over tokens; a Gaussian's is 3, the least is 1, as of zeros"),
}


@final
@dataclass(frozen=True)
class Observation(Question[Run]):
    """Averages over the tokens of a run: what writers put on the stream, what ports receive, where heads attend.

    Products are taken in the model's dtype (float32 at least) within a batch and summed over batches in float64. The
    answer is a short Record; ``moments`` gives all of it, for the questions that take moments.

    Attributes:
        memory_mb: MiB for the sums of second moments. Where it suffices, heads are held at every reading state, else
            factorised; then MLPs and embeddings, (d, d) each, factorised, else by their energies alone; then, with what
            is left, embeddings at every reading state, and at last MLPs. ``Moments.held`` says how each is held. It
            changes what is held, and so the answer.
        sinks: ``"left out"`` does not count tokens on which heads park attention: the first of a chunk, and those whose
            norm, as a reader sees it, is at some state more than ``SINK`` times the median of their chunk. The model
            runs twice to find them.
    """

    question: ClassVar[str] = "observation"
    memory_mb: int = 1024
    sinks: Literal["kept", "left out"] = "kept"

    def __post_init__(self) -> None:
        if self.sinks not in ("kept", "left out"):
            raise UsageError(f"sinks={self.sinks!r}", expected='"kept" or "left out"', do="choose one of these")

    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the model.

        Args:
            run: the model and the text.
            progress: called with (tokens done, tokens in all).

        Returns:
            A Record over ``state``: ``norm``, ``inverse``, ``inverse_square``, ``variance``, ``kurtosis``. The stamp
            names the moments by their identity, and how each kind of writer is held.

        Raises:
            UsageError: transformers is missing, the model's attention keeps no pattern, or every token is a sink.
        """
        return self.record(run, self.moments(run, progress))

    def record(self, run: Run, moments: Moments) -> Record:
        """The answer, where the moments are there already."""
        columns = (Column(name, moments.states[name], *_STATES[name]) for name in _STATES)
        axis = Axis("state", tuple(map(str, range(run.stream.states))))
        return run.record(self, (axis,), columns, moments=moments.identity, held=moments.held)

    @torch.no_grad()
    def moments(self, run: Run, progress: Progress = silent) -> Moments:
        """All averages; arguments and errors as when called."""
        sums, done = _MomentSums(run.stream, self.memory_mb * 2**20), 0
        signals: list[Signal] = ["state", "inner", "written", "Q", "K", "V", "pattern"]
        watched = places(run.stream, *signals)
        for tokens in run.batches():
            counted = is_token(tokens)
            done += int(counted.sum())
            sums.begin(counted & ~sinks(run, tokens) if self.sinks == "left out" else counted, run.device)
            with watching(run.module, run.stream, watched, sums.see):
                forward(run.module, tokens.clamp(min=0))
            sums.end()
            progress(done, run.count)
        without = ", without sinks" if self.sinks == "left out" else ""
        return sums.moments(f"{run.text}{without}", max(map(len, run.chunks)))


SINK = 20.0
"""How many times the median norm of its chunk makes a token a sink. SmolLM2's first tokens reach 165, others 11."""


@torch.no_grad()
def sinks(run: Run, tokens: Tensor) -> Tensor:
    """Which tokens of a batch (B, T) are sinks, see ``Observation``; on the CPU, undefined at padding."""
    present = is_token(tokens).to(run.device)
    found = torch.zeros_like(present)
    found[:, 0] = True

    def see(_: Signal, __: Any, tensor: Tensor) -> None:
        norms = through_norm(run.stream, wide(tensor)).norm(dim=-1).where(present, torch.nan)
        found.logical_or_(norms > SINK * norms.nanmedian(1, keepdim=True).values)

    with watching(run.module, run.stream, places(run.stream, "state"), see):
        forward(run.module, tokens.clamp(min=0))
    return found.cpu()


@torch.no_grad()
def operating_point(run: Run) -> OperatingPoint:
    """The norm scalars, attention patterns and gates of one prompt.

    With these fixed every block is linear, and ``frozen.replay`` gives back the model's own final residual up to
    rounding of the run's dtype. It lies on the CPU, wherever the model runs.

    Args:
        run: of one chunk.

    Raises:
        UsageError: the run has several chunks, transformers is missing, or the model's attention keeps no pattern.
    """
    tokens, stream = one_chunk(run), run.stream
    scalars: dict[str, Tensor] = {}
    patterns: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}

    def see(signal: Signal, where: Any, tensor: Tensor) -> None:
        values = wide(tensor[0]).cpu()
        if signal == "pattern":
            patterns[where] = values
        elif signal in ("after", "within"):
            scalars[f"{where}.{'after' if signal == 'after' else 'inner'}"] = values
        elif signal in ("Q", "K"):
            if f"{where}.{signal}" in stream.groups[where].sites:
                scalars[f"{where}.{signal}"] = port_scale(stream, signal, where, values)
        elif signal == "state":
            scalars.update({group.id: stream.scale(values, group) for group in stream.groups.sited(where)})
        else:
            function = activation(stream, stream.groups[where])
            gates[where] = function(values) if signal == "gate" else gate_factor(function, values)

    signals: list[Signal] = ["state", "pattern", "gate", "in", "after", "within", "Q", "K"]
    with watching(run.module, stream, places(stream, *signals), see):
        forward(run.module, tokens[None])
    return OperatingPoint(stream.source.fingerprint, tokens, scalars, patterns, gates)


@final
class _MomentSums:
    """Sums over tokens by ``kind/key``; of one batch, what waits for the norm scalars of later states."""

    def __init__(self, stream: Stream, budget: int) -> None:
        self.stream, self.tokens, self.later = stream, 0, 0
        self.sums: dict[str, Tensor] = {}
        self.dtype = torch.float32
        heads, states = stream.groups.heads, stream.states
        once = [8 * len(group.components) * group.width**2 for group in heads]
        always = sum(size * (states - group.first) for size, group in zip(once, heads, strict=True))
        exact = always <= budget
        self.everywhere = {group.id for group in heads if exact}  # held at every reading state
        others = [group for group in stream.groups.writers if group.kind != "head" and not group.constant]
        size = 8 * stream.d_model**2
        rest = budget - (always if exact else sum(once)) - size * len(others)
        self.dense = rest >= 0
        for kinds in (("embed", "pos"), ("mlp",)):
            some = [group for group in others if group.kind in kinds]
            more = sum(size * (states - group.first - 1) for group in some)
            if self.dense and more <= rest:
                self.everywhere |= {group.id for group in some}
                rest -= more
        squares = {group.id: stream.write(group).double() for group in heads}
        self.squares = {id: o.mT @ o for id, o in squares.items()}  # O^T O, so that |O z|^2 costs k^2 and not k d

    def begin(self, counted: Tensor, device: torch.device) -> None:
        """Take note of which places of a batch count, (B, T)."""
        self.mask = counted.to(device)
        self.whole = bool(self.mask.all())
        self.inverse: dict[int, Tensor] = {}
        self.waiting: list[tuple[Group, Tensor]] = []
        self.tokens += int(self.mask.sum())
        self.later += int(self.mask[:, 1:].sum())

    def see(self, signal: Signal, where: Any, tensor: Tensor) -> None:
        """Add what needs no norm scalar, keep the rest until the batch has run."""
        if signal == "pattern":
            self._attention(where, tensor)
            return
        if len(tensor) == 1:
            tensor = tensor.expand(len(self.mask), *tensor.shape[1:])  # learned positions are computed once
        values = tensor.flatten(0, 1) if self.whole else tensor[self.mask]  # without padding there is nothing to pick
        values = wide(values)
        self.dtype = values.dtype
        if signal == "state":
            self._state(where, values)
        elif signal in ("Q", "K", "V"):
            values = values if signal == "V" else self._received(signal, where, values)
            self._add(f"ports/{where}.{signal}", torch.einsum("nmk,nml->mkl", values, values))
            self._add(f"port_means/{where}.{signal}", values.sum(0))
        elif signal == "written":
            self.waiting.append((self.stream.groups[where], values[:, None]))
        elif where in self.squares:
            self.waiting.append((self.stream.groups[where], values))
        else:
            acts = values[:, 0]
            self._add(f"neurons/{where}", torch.stack([acts.sum(0), acts.square().sum(0), (acts > 0).to(acts).sum(0)]))

    def end(self) -> None:
        """Now that every state's norm scalar is known: the moments of what was written."""
        for group, z in self.waiting:
            heads = group.id in self.squares
            weights = torch.stack([self.inverse[p] for p in range(group.first, self.stream.states)])  # 1/s by token
            if heads:
                energy = torch.einsum("nmk,mkl,nml->nm", z, self.squares[group.id].to(z), z)
            else:
                energy = z.square().sum(-1)
            self._add(f"energy/{group.id}", weights.square() @ energy)
            if not heads and not self.dense:
                continue
            held = weights if group.id in self.everywhere else weights[:1]
            by_writer = z.permute(1, 2, 0).contiguous()  # (m, k, tokens)
            self._add(f"mean/{group.id}", torch.einsum("pn,nmk->pmk", held, z))
            weighted = torch.empty_like(by_writer)
            for p, weight in enumerate(held.square()):
                product = torch.bmm(torch.mul(by_writer, weight, out=weighted), by_writer.mT)
                self._add(f"second/{group.id}", product, p, len(held))

    def moments(self, text: str, length: int) -> Moments:
        """The sums divided by their counts."""
        if not self.tokens:
            raise UsageError(
                "every token is a sink",
                expected="chunks of more than one token",
                do="pass longer chunks, or keep the sinks",
            )
        kinds = ("second", "mean", "energy", "ports", "port_means", "attention", "neurons")
        averages: dict[str, dict[str, Tensor]] = {name: {} for name in kinds}
        for name, total in self.sums.items():
            kind, _, key = name.partition("/")
            count = max(self.later, 1) if kind == "attention" else self.tokens
            averages.setdefault(kind, {})[key] = (total / count).to(self.dtype).cpu()
        of_states = averages.pop("state")
        states = {
            name: torch.stack([of_states[str(p)][i] for p in range(self.stream.states)])
            for i, name in enumerate(_STATES)
        }
        return Moments(self.stream.source.fingerprint, self.tokens, length, states=states, text=text, **averages)

    def _state(self, state: int, x: Tensor) -> None:
        s = self.stream.scale(x, state)
        self.inverse[state] = 1 / s
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1).clamp(min=torch.finfo(x.dtype).tiny)
        kurtosis = (centred.square().square().mean(-1) / variance.square()).nan_to_num(1.0)  # of a state that is zero
        self._add(f"state/{state}", torch.stack([s, 1 / s, s**-2, variance, kurtosis]).sum(1))

    def _received(self, port: Port, group: str, values: Tensor) -> Tensor:
        """Queries or keys as read maps give them, (n, m, k); behind a norm on them, whose scalar is noted."""
        if f"{group}.{port}" in self.stream.groups[group].sites:
            inverse = 1 / port_scale(self.stream, port, group, values)
            self._add(f"port_scales/{group}.{port}", torch.stack([inverse, inverse.square()], 2).sum(0))
        return received(self.stream, port, group, values)

    def _attention(self, group: str, pattern: Tensor) -> None:
        """To self, previous and first token; the first token of a chunk has no previous one and is left out."""
        later = self.mask[:, None, 1:]
        to_self = pattern.diagonal(dim1=2, dim2=3)[:, :, 1:]
        previous = pattern.diagonal(offset=-1, dim1=2, dim2=3)
        shares = [(x * later).sum((0, 2)) for x in (to_self, previous, pattern[:, :, 1:, 0])]
        self._add(f"attention/{group}", torch.stack(shares, 1))

    def _add(self, name: str, value: Tensor, index: int = 0, count: int = 0) -> None:
        """Add to a sum, or, where it has ``count`` parts, to one of them."""
        if name not in self.sums:
            shape = (count, *value.shape) if count else value.shape
            self.sums[name] = value.new_zeros(shape, dtype=torch.float64)
        (self.sums[name][index] if count else self.sums[name]).add_(value)
