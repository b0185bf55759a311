"""What a prompt did in a model: what its parts received and gave, and whether that is what the stream's maps say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from virtual_weights.architecture import Attention
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.linalg import accumulate, random_generator
from virtual_weights.runtime.running.hooks import Place, Signal, activation, places, watched, wide
from virtual_weights.stream import Group, Stream, centred
from virtual_weights.stream.effective import after_scale, compared, embedded, inner_scale, norm_gain, projection
from virtual_weights.stream.group import WRITINGS
from virtual_weights.stream.norm import capped, constant, fold

if TYPE_CHECKING:
    from virtual_weights.runtime.running.run import Run

_PROMPT: tuple[Signal, ...] = ("state", "inner", "written", "Q", "K", "V", "gate", "up", "in")


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """What some tokens did in a model.

    Attributes:
        stream: the model.
        tokens: (T,) ids.
        signals: what its modules received and gave, without the batch axis, on the CPU; see ``watching``.
        logits: (T, vocabulary), as the unembedding's maps give them, see ``Stream.read``; empty where not asked for.
    """

    stream: Stream
    tokens: Tensor
    signals: dict[Place, Tensor]
    logits: Tensor

    def state(self, number: int) -> Tensor:
        """A state of the stream, the sum of all that is written before, (T, d) float64; centred as writers are."""
        return centred(self.stream, self.signals["state", number].to(accumulate))

    def scalar(self, number: int) -> Tensor:
        """The norm scalar with which a state is read, (T,) float64."""
        return self.stream.scale(self.state(number), number)

    def written(self, before: int) -> Iterator[tuple[str, Tensor]]:
        """What every writer that reaches a state has added to it, (T, d) float64, in order of depth."""
        for group in self.stream.groups.writers:
            if group.reaches(before):
                yield from zip(group.labels, self._written(group.id), strict=True)

    def _written(self, group: str) -> Tensor:
        """What the components of a group wrote, (m, T, d) float64."""
        if ("written", group) in self.signals:
            return self.signals["written", group].to(accumulate).expand(1, len(self.tokens), -1)
        maps = self.stream.write(group).to(accumulate)
        if ("inner", group) in self.signals:
            return torch.einsum("mdk,tmk->mtd", maps, self.signals["inner", group].to(accumulate))
        return maps[:, :, 0].expand(len(self.tokens), -1, -1).transpose(0, 1)  # a bias


def one_chunk(run: Run) -> Tensor:
    """The tokens (T,) of a run on one prompt.

    Raises:
        UsageError: it has several chunks.
    """
    if len(run.chunks) != 1:
        raise UsageError(f"a run of {len(run.chunks)} chunks", expected="one prompt", do="make it with Run.on_prompt")
    return run.chunks[0]


@torch.no_grad()
def prompted(run: Run, *further: Signal) -> Activations:
    """Run a model on one prompt and keep what its parts did.

    Args:
        run: of one chunk.
        further: signals to keep beside the usual ones, such as ``"pattern"``.

    Raises:
        UsageError: the run has more than one chunk, or transformers is missing.
    """
    tokens = one_chunk(run)
    wanted = places(run.stream, *_PROMPT, *further)
    signals, logits = watched(run.module, run.stream, wanted, tokens[None].to(run.device))
    cpu = {place: tensor[0].cpu() for place, tensor in signals.items()}
    logits = wide(logits[0].cpu())
    return Activations(run.stream, tokens, cpu, logits - logits.mean(-1, keepdim=True) if run.stream.folded else logits)


@final
@dataclass(frozen=True)
class Exactness:
    """How far a running model is from what the stream's maps say of it.

    Attributes:
        error: the largest relative error of a step, dimensionless, >= 0; NaN where a value is not a number.
        place: the step: ``"L3.attn.K"``, ``"the pattern of L3.attn"``, ``"what L3.mlp reads"``.
        kind: what such steps are called: ``"written"``, ``"Q"``, ``"pattern"``, ``"values"``, ``"nonlinearity"``.
    """

    error: float
    place: str
    kind: str


_TOKENS = 32
_VOCABULARY = 1024


def exactness(stream: Stream, module: nn.Module, weights: int) -> Exactness:
    """The worst step of a module, see ``exactness_steps``."""
    steps = exactness_steps(stream, module, weights)
    return max(steps, key=lambda step: math.inf if math.isnan(step.error) else step.error)


@torch.no_grad()
def exactness_steps(stream: Stream, module: nn.Module, weights: int) -> list[Exactness]:
    """Check on one prompt of random tokens that a module computes what a stream's maps say, in float32.

    Of a sample of the stream's states x_p, all where the model is small: ``x_p = x_(p-1) + sum_w O_w z_w`` over the
    writers between them; for whatever reads it ``R~ x_p / s + c`` is what the module's own map gives; a pattern is
    ``softmax(scale q^T R_D^T k)``; inner activations are a pattern's mean of values, or the nonlinearity of
    pre-activations. Where all states are taken these add up to the exactness law: the sum of what writers write, read
    by a reader's map, is what the reader receives.

    Args:
        stream: the model.
        module: what runs, with transformers' names.
        weights: how many to read again, about; of a larger model a sample of its states is taken.

    Raises:
        MissingTensorError: the stream holds a part of the model only.
    """
    _whole(stream)
    stream = replace(stream, folded=True, dtype=torch.float32)
    count = min(_TOKENS, stream.spec.n_positions or _TOKENS)
    tokens = torch.randint(vocabulary(stream), (count,), generator=random_generator(0))
    sample = _sample(stream, weights)
    sites = [group for state in sample for group in stream.groups.sited(state)]
    writers = [group for group in stream.groups.writers if group.first in sample and not group.constant]
    wanted: set[Place] = {("state", state) for p in sample for state in (p - 1, p) if state >= 0}
    wanted |= {(port, group.id) for group in sites for port in group.ports}
    wanted |= {("inner", group.id) for group in (*sites, *writers) if group.kind in ("head", "mlp")}
    wanted |= {("pattern", group.id) for group in sites if group.kind == "head"}
    signals, logits = watched(module, stream, wanted, tokens[None].to(next(module.parameters()).device))
    step = _Step(stream, tokens, {place: x[0].float().cpu() for place, x in signals.items()}, logits[0].float().cpu())
    return [error for state in sample for error in step.errors(state)]


def vocabulary(stream: Stream) -> int:
    """How many tokens the embedding holds; no tensor is read.

    Raises:
        MissingTensorError: the stream holds none.
    """
    place = stream.model.placements.get(("embed", "embed"))
    if place is None:
        raise incomplete(["embed"])
    return stream.source.tensors[place.tensor].shape[0]


def check_tokens(token: int | None, against: int | None) -> None:
    """Refuse a difference of logits without a first token, or of a token and itself.

    Raises:
        UsageError: ``against`` is named without ``token``, or is the same, or one of them is below 0.
    """
    ids = [number for number in (token, against) if number is not None]
    if (against is not None and against == token) or min(ids, default=0) < 0 or (token is None and ids):
        raise UsageError(
            f"the logit of token {token} less that of token {against}" if against is not None else f"token {token}",
            expected="two different tokens, or the first alone; ids from 0",
            do="name another token, or leave the second one out",
        )


def _whole(stream: Stream) -> None:
    """Refuse a part of a model, naming what it lacks."""
    blocks = [branch.id for branch in stream.spec.branches]
    missing = [group for group in ("embed", *blocks, "unembed") if group not in stream.groups]
    if missing:
        raise incomplete(missing)


def incomplete(missing: list[str]) -> MissingTensorError:
    """The error of a checkpoint that lacks what a run needs."""
    return MissingTensorError(
        f"this checkpoint has no {', '.join(missing[:6])}",
        expected="a complete model to run",
        do="open all of it, or ask questions of the weights alone",
    )


def _sample(stream: Stream, weights: int) -> list[int]:
    """States whose neighbourhoods together hold about so many weights, evenly, the first and last among them."""
    ends = {place.tensor for (_, group), place in stream.model.placements.items() if group in ("embed", "unembed")}
    total = sum(math.prod(info.shape) for name, info in stream.source.tensors.items() if name not in ends)
    count = max(3, min(stream.states, weights * stream.states // max(1, total)))
    return sorted({round(x) for x in torch.linspace(0, stream.states - 1, count).tolist()})


@final
@dataclass(frozen=True, eq=False)
class _Step:
    """One prompt in a module, in float32 on the CPU, and its distance from what the maps say."""

    stream: Stream
    tokens: Tensor
    signals: dict[Place, Tensor]
    logits: Tensor

    def errors(self, state: int) -> Iterator[Exactness]:
        """The errors of what is written into a state, what reads it, and what follows from that inside a component."""
        x = centred(self.stream, self.signals["state", state])
        s = self.stream.scale(x, state)[:, None]
        before = centred(self.stream, self.signals["state", state - 1]) if state else torch.zeros_like(x)
        groups = [group for group in self.stream.groups.writers if group.first == state]
        written = before + torch.stack([self._written(group) for group in groups]).sum(0)
        yield Exactness(_distance(written / s, x / s), _what(groups), "written")
        for group in self.stream.groups.sited(state):
            yield from self._read(group, x / s)
            if group.attention is not None:
                yield from self._attended(group, group.attention)
            elif group.kind == "mlp":
                inner, neurons = (
                    self.signals["inner", group.id],
                    self._over_scalar(group, self._neurons(group)[:, None]),
                )
                yield Exactness(_distance(neurons, inner), f"the nonlinearity of {group.id}", "nonlinearity")

    def _attended(self, group: Group, attention: Attention) -> Iterator[Exactness]:
        """The errors of where heads attend and what they take from there; what is outside the maps is not compared."""
        if "sinks" in attention.outside:
            return
        pattern = self.signals["pattern", group.id]
        if "alibi" not in attention.outside:
            yield Exactness(_distance(self._pattern(group), pattern), f"the pattern of {group.id}", "pattern")
        values = self.signals["V", group.id].repeat_interleave(group.sharing, 1)
        mean = self._over_scalar(group, torch.einsum("htu,uhk->thk", pattern, values))
        yield Exactness(_distance(mean, self.signals["inner", group.id]), f"the values of {group.id}", "values")

    def _over_scalar(self, group: Group, z: Tensor) -> Tensor:
        """Inner activations (T, m, k) over the scalar of a norm on them or on what they become."""
        if group.inner is not None:
            return z / inner_scale(self.stream, z, group)[:, None, None]
        if group.after is None:
            return z
        maps = self.stream.weight(WRITINGS[group.kind], group)
        assert maps is not None
        given = torch.einsum("mdk,tmk->td", maps.float() if maps.ndim == 3 else maps.float()[None], z)
        return z / after_scale(self.stream, given, group)[:, None, None]

    def _written(self, group: Group) -> Tensor:
        """What a group writes, (T, d)."""
        stream = self.stream
        if group.kind == "pos":
            return stream.write(group)[0].T[: len(self.tokens)].float()
        if group.kind == "embed":
            name = stream.model.placements[group.kind, group.id].tensor
            rows = [stream.source.read(name, slice(row, row + 1)).float() for row in self.tokens.tolist()]
            table = torch.cat(rows)
            return centred(stream, embedded(stream, group.kind, table))
        maps = stream.write(group).float()
        if group.constant:
            return maps[0, :, 0].expand(len(self.tokens), -1)
        return torch.einsum("mdk,tmk->td", maps, self.signals["inner", group.id])

    def _read(self, group: Group, x: Tensor) -> Iterator[Exactness]:
        """The error of every port of a group that reads x (T, d), the state over its norm scalar."""
        for port in group.ports:
            if port == "unembed":
                maps, constants, received = self._unembedding()
            else:
                read = projection(self.stream, port, group)
                maps, constants, received = read.maps, read.constants, self.signals[port, group.id]
            expected = torch.einsum("mkd,td->tmk", maps.float(), x)
            if constants is not None:
                expected = expected + constants.float()
            # a reader of almost nothing is compared with what its map could have read
            least = float(maps.norm() * x.norm()) / maps.shape[-1]
            yield Exactness(
                _distance(expected.flatten(1), received.flatten(1), least),
                group.id if port == group.id else f"{group.id}.{port}",
                port,
            )

    def _unembedding(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Some rows of the unembedding in one piece: maps (1, n, d), constants (1, n), and their logits (T, 1, n)."""
        stream, place = self.stream, self.stream.model.placements["unembed", "unembed"]
        count = self.logits.shape[-1]
        begin = max(0, count - _VOCABULARY) // 2
        rows = slice(begin, min(count, begin + _VOCABULARY))
        by_token = not place.layout.startswith("d")
        maps = stream.source.read(place.tensor, rows) if by_token else stream.weight("unembed", "unembed")
        assert maps is not None
        maps = maps[None] if by_token else maps[None, rows]
        norm, bias = stream.spec.head.norm, stream.weight("unembed_bias", "unembed")
        gain = norm_gain(stream, "norm", "unembed", norm)
        shift = stream.weight("norm_bias", "unembed")
        constants = constant(maps, shift, None if bias is None else bias[None, rows], stream.dtype)
        return fold(maps, gain, norm, stream.dtype), constants, self.signals["unembed", "unembed"][:, None, rows]

    def _pattern(self, group: Group) -> Tensor:
        """The attention pattern of queries and keys, (m, T, T), over the tokens that the module attends to."""
        queries, keys = (compared(self.stream, port, group, self.signals[port, group.id]) for port in ("Q", "K"))
        scores = torch.einsum("tmk,umk->mtu", queries, keys.repeat_interleave(group.sharing, 1))
        assert group.attention is not None
        scores = capped(scores * group.attention.scale, group.attention.cap)
        return scores.masked_fill(self.signals["pattern", group.id] == 0, -math.inf).softmax(-1)

    def _neurons(self, group: Group) -> Tensor:
        """An MLP's neurons after the nonlinearity of its pre-activations, (T, n)."""
        act = activation(self.stream, group)
        if "gate" not in group.ports:
            return act(self.signals["in", group.id])
        return act(self.signals["gate", group.id]) * self.signals["up", group.id]


def _what(groups: list[Group]) -> str:
    return f"what {' and '.join(group.id for group in groups)} {'writes' if len(groups) == 1 else 'write'}"


def _distance(expected: Tensor, received: Tensor, least: float = 0.0) -> float:
    """``||a - b|| / max(||b||, least)``; 0 where both are nothing."""
    distance = float((expected - received).norm())
    return distance and distance / max(float(received.norm()), least, torch.finfo(torch.float32).tiny)
