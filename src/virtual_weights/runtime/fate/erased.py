"""Erasure on text: how much of what it reads each neuron, head and MLP removes, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import WORKSPACE_BYTES, CentralMoments, accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.hooks import Place, Signal, activation, forward, places, watching, wide
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token
from virtual_weights.stream import Group, Question, through_norm
from virtual_weights.stream.names import Kind
from virtual_weights.stream.operating_point import gate_factor

_ERASERS: dict[Kind, tuple[Kind, ...]] = {"head": ("head",), "mlp": ("mlp", "neuron")}  # in a group, in their order


@final
@dataclass(frozen=True)
class Erased(Question[Run]):
    """Which neurons, heads and MLPs erase what they read: always, on some tokens, or never; and which overshoot.

    A neuron with read row w (norm gain folded; the up row where gated) and output column o erases
    ``c(t) = -<w, o> g(t) / s(t)``, with g the activated gate, or ``act(pre)/pre`` where the MLP has none, and s the
    norm scalar: it takes c of ``<w, x> + s b`` from ``<w, x>``, b being what it receives whatever the stream holds.
    A head or MLP that writes y (an MLP without its bias) into a stream that it reads as x takes
    ``c(t) = -||y||^2 / <x, y>`` of what x has along y, both centred where a LayerNorm reads them; where ``<x, y> = 0``
    there is no c. 1 erases all of it, 2 reflects it, a negative coefficient strengthens it. From .5 to 1.5 at least 75%
    of the energy is gone: a token counts as **erased**. Beyond, the component **overshoots**: what it leaves has the
    other sign and, above 2, is larger than what was there. Coefficients of heads and MLPs have heavy tails, since
    <x, y> can be near 0: their mean, spread and bimodality are of values cut to [-tail, tail]; shares of tokens are
    not.

    Memory does not grow with the text. Invariant under re-basing of heads, re-ordering of neurons, a factor moved from
    w to o of a gated MLP, and with RMSNorm under rotation of the stream.

    Attributes:
        clears: a token counts as erased where the coefficient is from this to 2 minus this, and as overshot above.
        always: least share of tokens erased that is ``unconditional``.
        seldom: least share of tokens erased that is ``conditional``; below it is ``rare``.
        tail: where coefficients of heads and MLPs are cut for mean, spread and bimodality.
    """

    question: ClassVar[str] = "erased"
    clears: float = 0.5
    always: float = 0.9
    seldom: float = 0.1
    tail: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.seldom < self.always <= 1 or not 0 <= self.clears < 1 < 2 - self.clears < self.tail < torch.inf:
            raise UsageError(
                f"thresholds {self.parameters}",
                expected="0 < seldom < always <= 1, 0 <= clears < 1 and a finite tail above 2 - clears",
                do="pass for example Erased(clears=0.5)",
            )

    @torch.no_grad()
    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the model and summarise every eraser's coefficients.

        Args:
            run: the model and its tokens, norms folded.
            progress: called with (tokens done, tokens).

        Returns:
            A Record over ``eraser`` (of each layer its heads, its MLP, its neurons): ``mean``, ``spread``, ``erased``,
            ``overshot``, ``strengthened`` (shares of tokens), ``bimodality``, ``tokens``, ``verdict``, ``kind``,
            ``layer``. The verdict is ``"overshoots"`` of what overshoots on ``seldom`` of the tokens or more, and on
            more than it erases on; else, by the share erased, ``"unconditional"``, ``"conditional"``, ``"rare"`` or
            None. An eraser that has a coefficient on no token is absent.

        Raises:
            UsageError: the stream leaves norm gains out, or has no parts.
        """
        stream = run.stream
        if not stream.folded:
            raise UsageError(
                "this stream leaves norm gains out",
                expected="norm gains folded into the readers",
                do="open the model without fold=False (--no-fold)",
            )
        if not stream.groups.kind(*_ERASERS):
            raise UsageError(
                "this model has neither heads nor MLPs",
                expected="a part that reads the stream and writes to it",
                do="open a model with layers",
            )
        coefficients, done = _Coefficients(run, self), 0
        wanted: list[Place] = [("inner", group.id) for group in stream.groups.heads]
        wanted.extend(("written", group.id) for group in stream.groups.mlps)
        wanted.extend(places(stream, "state", "gate", "in"))
        with watching(run.module, stream, wanted, coefficients.see):
            for batch in run.batches():
                mask = is_token(batch)
                coefficients.mask = mask.to(run.device)
                forward(run.module, batch.clamp(min=0))
                done += int(mask.sum())
                progress(done, run.count)
        return self._record(run, coefficients)

    def _record(self, run: Run, coefficients: _Coefficients) -> Record:
        labels, kinds, layers, parts = list[str](), list[Kind](), list[int | None](), list[Tensor]()
        for group in run.stream.groups:
            for kind in _ERASERS.get(group.kind, ()):
                names = group.neurons if kind == "neuron" else group.labels
                labels += names
                kinds += [kind] * len(names)
                layers += [group.layer] * len(names)
                parts.append(coefficients.sums[group.id, kind])
        sums = torch.cat(parts, 1)
        moments, count = CentralMoments(*sums[:5]), sums[0]
        erased, overshot, below = sums[5:] / count
        mean, bimodality = moments.mean.masked_fill(count == 0, torch.nan), moments.bimodality(coefficients.eps)
        verdicts = tuple(map(self._verdict, erased.tolist(), overshot.tolist()))
        return run.record(
            self,
            [Axis("eraser", tuple(labels))],
            [
                Column("mean", mean, "1 (share)", "of what it reads; 1 erases all of it"),
                Column("spread", moments.variance.sqrt(), "1 (share)", "standard deviation over tokens"),
                Column(
                    "erased",
                    erased,
                    "1, in [0, 1]",
                    f"share of tokens with a coefficient from {self.clears:g} to {2 - self.clears:g}",
                ),
                Column("overshot", overshot, "1, in [0, 1]", "share of tokens with one above"),
                Column("strengthened", below, "1, in [0, 1]", "share of tokens with one below 0"),
                Column("bimodality", bimodality, "1, in (0, 1]", "(skewness^2 + 1) / kurtosis; 5/9 for a uniform law"),
                Column("tokens", count.to(torch.int64), "tokens", "on which it has a coefficient"),
                Column("verdict", verdicts, "", "by the shares of tokens erased and overshot"),
                Column("kind", tuple(kinds), "", "head or neuron"),
                Column("layer", torch.tensor(layers), "layers", "in which it is"),
            ],
        )

    def _verdict(self, share: float, overshot: float) -> str | None:
        if overshot > share and overshot >= self.seldom:
            return "overshoots"
        if not share > 0:
            return None
        return "unconditional" if share >= self.always else "conditional" if share >= self.seldom else "rare"


@final
class _Coefficients:
    """Sums over tokens of every eraser's coefficients, by group and kind, and the state that the next reader reads."""

    def __init__(self, run: Run, question: Erased) -> None:
        self.stream, self.question = run.stream, question
        self.sums: dict[tuple[str, Kind], Tensor] = {}
        self.mask, self.state, self.eps = torch.empty(0), torch.empty(0), 0.0
        self.outputs = {
            group.id: through_norm(run.stream, run.stream.write(group).mT).mT for group in run.stream.groups.heads
        }
        self.overlaps = {group.id: self._overlap(group).to(run.device) for group in run.stream.groups.mlps}

    def _overlap(self, group: Group) -> Tensor:
        """``<w, o>`` of every neuron, (n,) float64."""
        maps = self.stream.read(group.ports[-1], group).maps[0].to(accumulate)
        return (maps * self.stream.write(group)[0].T.to(accumulate)).sum(1)

    def see(self, signal: Signal, where: Any, tensor: Tensor) -> None:
        """Add one tensor's tokens; a state stands until the next one, for whoever reads it."""
        values = wide(tensor[self.mask])
        if signal == "state":
            self.state, self.eps = through_norm(self.stream, values), torch.finfo(tensor.dtype).eps
        elif signal == "inner":
            maps = self.outputs[where].to(values)
            gram = (maps.to(accumulate).mT @ maps.to(accumulate)).to(values)  # |O z|^2 costs k^2 with it, not k d
            energy = torch.einsum("nmk,mkl,nml->nm", values, gram, values)
            self._along(where, "head", energy, torch.einsum("nd,mdk,nmk->nm", self.state, maps, values))
        elif signal == "written":
            values = through_norm(self.stream, values)
            energy, product = (values * values).sum(1), (self.state * values).sum(1)
            self._along(where, "mlp", energy[:, None], product[:, None])
        else:
            act = activation(self.stream, self.stream.groups[where])
            self._neurons(where, act(values) if signal == "gate" else gate_factor(act, values))

    def _along(self, group: str, kind: Kind, energy: Tensor, product: Tensor) -> None:
        """Add coefficients ``-|y|^2 / <x, y>``, of (tokens, m) each."""
        c = (-energy.to(accumulate) / product.to(accumulate)).masked_fill(product == 0, torch.nan)
        self._add(group, kind, _sums(c, self.question.clears, self.question.tail))

    def _neurons(self, group: str, gate: Tensor) -> None:
        """Add coefficients ``-<w, o> g / s``, for g (tokens, n)."""
        s, step = self.stream.scale(self.state, group).to(accumulate), max(1, WORKSPACE_BYTES // (8 * len(gate)))
        slabs = zip(self.overlaps[group].split(step), gate.split(step, 1), strict=True)
        sums = [_sums(-overlap * g.to(accumulate) / s[:, None], self.question.clears) for overlap, g in slabs]
        self._add(group, "neuron", torch.cat(sums, 1))

    def _add(self, group: str, kind: Kind, sums: Tensor) -> None:
        before, sums = self.sums.get((group, kind)), sums.cpu()
        if before is not None:
            sums = torch.stack([*(CentralMoments(*before[:5]) + CentralMoments(*sums[:5])), *(before[5:] + sums[5:])])
        self.sums[group, kind] = sums


def _sums(c: Tensor, clears: float, tail: float = torch.inf) -> Tensor:
    """The five central moments of coefficients (tokens, n); counts of those that erase, overshoot and strengthen.

    (8, n) float64; NaN where a token has no coefficient.
    """
    over = c > 2 - clears
    counts = (((c >= clears) & ~over).sum(0), over.sum(0), (c < 0).sum(0))
    return torch.stack([*CentralMoments.of(c, tail), *(count.to(accumulate) for count in counts)])
