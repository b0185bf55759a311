"""Sums over the tokens of a run of features that are active together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.runtime.edges.dictionary_writes import scaled, stands
from virtual_weights.runtime.features.encoding import Encoder, reading_parts
from virtual_weights.runtime.flow.observation import sinks
from virtual_weights.runtime.running.hooks import Place, Signal, forward, watching, wide
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token
from virtual_weights.stream import Stream
from virtual_weights.stream.coactivations import Coactivations
from virtual_weights.stream.provenance import fingerprint_of

_PAIRS = 1 << 22  # pairs of active features that are written down at once
_BYTES = 32  # of a pair: its key and three sums


@torch.no_grad()
def coactivations(
    run: Run, memory_mb: int = 1024, *, without_sinks: bool = True, progress: Progress = silent
) -> Coactivations:
    """Run a model on text and average over its tokens which features are active together.

    A source is any attached dictionary that reads a state and writes; a target one that reads a state in which that is
    there. A source's activations are those of its encoder: what it would write in place of the model's own part.

    Args:
        run: the model with its dictionaries, and the text.
        memory_mb: MiB for the sums; only pairs that were active together take any.
        without_sinks: leave out first tokens and those of exceptional norm, see ``Observation``.
        progress: called with (tokens done, tokens in all).

    Raises:
        UsageError: no dictionary reads a state, or every token is a sink.
        ResourceError: there are more pairs than memory for them.
    """
    sums = _Sums(run, memory_mb * 2**20)
    done = 0
    for tokens in run.batches():
        counted = is_token(tokens)
        done += int(counted.sum())
        mask = counted & ~sinks(run, tokens) if without_sinks else counted
        sums.begin(mask)
        with watching(run.module, run.stream, sums.wanted, sums.see):
            forward(run.module, tokens.clamp(min=0))
        sums.end()
        progress(done, run.count)
    return sums.result(f"{run.text}{', without sinks' if without_sinks else ''}")


@final
class _Sums:
    """Sums of all dictionaries and pairs of them; of one batch, the states that they read."""

    def __init__(self, run: Run, budget: int) -> None:
        self.stream, self._budget, self._tokens = run.stream, budget, 0
        self._encoders = {part.name: Encoder(run.stream, part, run.device) for part in reading_parts(run.stream)}
        groups = [self.stream.groups[name] for name in self._encoders]
        self._links = [(a.id, b.id) for a in groups if stands(self.stream, a.id) for b in groups if a.reaches(b.reads)]
        self._after = {name: _norm_behind(self.stream, name) for name in {source for source, _ in self._links}}
        self.wanted: set[Place] = {("state", encoder.state) for encoder in self._encoders.values()}
        self.wanted |= {("after", branch) for branch in self._after.values() if branch is not None}
        self._active = {name: torch.zeros(self.stream.groups[name].width, dtype=torch.int64) for name in self._encoders}
        self._mean = {name: torch.zeros(len(count), dtype=torch.float64) for name, count in self._active.items()}
        self._pairs = {link: _PairSums(self.stream.groups[link[1]].width) for link in self._links}

    def begin(self, mask: Tensor) -> None:
        """Take note of which places of a batch count, (B, T)."""
        self._mask, self._seen = mask, dict[Place, Tensor]()
        self._tokens += int(mask.sum())

    def see(self, signal: Signal, where: Any, tensor: Tensor) -> None:
        """Keep a state, or the scalar of a norm behind a part."""
        self._seen[signal, where] = wide(tensor)[self._mask.to(tensor.device)]

    def end(self) -> None:
        """Add the batch, some tokens at a time."""
        count = int(self._mask.sum())
        step = min((encoder.rows for encoder in self._encoders.values()), default=count)
        for start in range(0, count, step):
            cut = slice(start, start + step)
            entries = dict[str, _Entries]()
            for name, encoder in self._encoders.items():
                states, branch = self._seen["state", encoder.state][cut], self._after.get(name)
                behind = None if branch is None else self._seen["after", branch][cut].cpu()
                entries[name] = active = _Entries(encoder(states).cpu(), encoder.scale(states).cpu(), behind)
                self._active[name] += torch.bincount(active.feature, minlength=len(self._active[name]))
                self._mean[name].index_add_(0, active.feature, active.value)
            for source, target in self._links:
                self._pairs[source, target].add(entries[source], entries[target])
        self._check()

    def _check(self) -> None:
        """Refuse to go on where pairs take more memory than there is for them."""
        size = sum(pairs.joined for pairs in self._pairs.values()) * _BYTES
        if size > self._budget:
            raise ResourceError(
                f"{size >> 20} MiB of pairs of features that are active together, after {self._tokens} tokens",
                expected=f"at most {self._budget >> 20} MiB",
                do="raise the memory budget, take fewer tokens, or attach fewer dictionaries at once",
            )

    def result(self, text: str) -> Coactivations:
        """The sums divided by their count."""
        if not self._tokens:
            raise UsageError(
                "every token is a sink", expected="chunks of more than one token", do="pass longer chunks, or keep them"
            )
        tables = {f"{source}>{target}": self._pairs[source, target].table() for source, target in self._links}
        self._check()
        return Coactivations(
            fingerprint_of(self.stream),
            self._tokens,
            text,
            self._active,
            {name: total / self._tokens for name, total in self._mean.items()},
            {key: pairs for key, (pairs, _, _) in tables.items()},
            {key: sums[0] / self._tokens for key, (_, sums, _) in tables.items()},
            {key: sums[1] / self._tokens for key, (_, sums, _) in tables.items()},
            {key: count for key, (_, _, count) in tables.items()},
        )


def _norm_behind(stream: Stream, name: str) -> str | None:
    """The branch whose norm behind the part divides what a dictionary writes; None where none does.

    Raises:
        UsageError: there are several.
    """
    points = [point for point, _ in stream.attached[name].writings]
    branches = {point.branch.id for point in points if scaled(point) and point.branch is not None}
    if branches and len(points) > 1:
        raise UsageError(
            f"what {name} writes passes the norms behind {len(points)} parts, each with a scalar of its own",
            expected="decoders behind these norms, or one decoder",
            do="name where it is added: PATH@READS,L3.mlp.added",
        )
    return next(iter(branches), None)


@final
class _Entries:
    """The features that are not 0, token by token."""

    def __init__(self, activations: Tensor, scale: Tensor, behind: Tensor | None) -> None:
        self.token, self.feature = activations.nonzero(as_tuple=True)
        self.value = activations[self.token, self.feature].double()
        self.written = self.value if behind is None else self.value / behind.double()[self.token]
        self.inverse = 1 / scale.double()
        self.of_token = torch.bincount(self.token, minlength=len(activations))
        self.first = self.of_token.cumsum(0) - self.of_token


@final
class _PairSums:
    """Sums of pairs of a source and a target, by ``i F_j + j``, ascending."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(2, 0, dtype=torch.float64)
        self._together = torch.zeros(0, dtype=torch.int64)
        self._new = list[tuple[Tensor, Tensor]]()  # not joined yet: joining sorts all

    @property
    def joined(self) -> int:
        """How many pairs were active together, as far as they are joined."""
        return len(self._keys)

    @property
    def count(self) -> int:
        """How many pairs are in memory, some of them several times."""
        return len(self._keys) + sum(len(keys) for keys, _ in self._new)

    def add(self, source: _Entries, target: _Entries) -> None:
        """Add all pairs that are active at one token."""
        partners = target.of_token[source.token]  # of every active source, how many targets
        ends = partners.cumsum(0)
        for start, stop in _cuts(ends):
            before = int(ends[start - 1]) if start else 0
            chosen = torch.arange(start, stop).repeat_interleave(partners[start:stop])
            place = torch.arange(len(chosen)) + before - (ends - partners)[chosen]
            other = target.first[source.token[chosen]] + place
            a, b = source.written[chosen], target.value[other]
            flow = a * target.inverse[source.token[chosen]]
            sums = torch.stack([flow * b, torch.where(b > 0, flow, 0.0)])
            self._new.append((source.feature[chosen] * self._width + target.feature[other], sums))
            if self.count - len(self._keys) > max(_PAIRS, len(self._keys) // 2):
                self._join()

    def _join(self) -> None:
        keys, sums = torch.cat([k for k, _ in self._new]), torch.cat([x for _, x in self._new], 1)
        self._new.clear()
        together = torch.cat([self._together, torch.ones(len(keys), dtype=torch.int64)])
        self._keys, place = torch.cat([self._keys, keys]).unique(return_inverse=True)
        count = len(self._keys)
        self._sums = torch.zeros(2, count, dtype=torch.float64).index_add_(1, place, torch.cat([self._sums, sums], 1))
        self._together = torch.zeros(count, dtype=torch.int64).index_add_(0, place, together)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (n, 2) int32, sums (2, n) and counts (n,)."""
        if self._new:
            self._join()
        pairs = torch.stack([self._keys // self._width, self._keys % self._width], 1).to(torch.int32)
        return pairs, self._sums, self._together


def _cuts(ends: Tensor) -> Iterator[tuple[int, int]]:
    """Consecutive sources that make so many pairs at most, or one alone."""
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + _PAIRS, right=True)))
        yield start, stop
        start = stop
