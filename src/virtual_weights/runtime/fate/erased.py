"""Clearing coefficients over text: how much of what it reads each neuron, head and MLP removes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.flow.observation import activation, forward
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.runtime.running.text import kept
from virtual_weights.stream import Stream, scale
from virtual_weights.stream.operating_point import gate_factor

_SLAB = 1 << 22  # coefficients whose powers are held at once, in float64


@final
@dataclass(frozen=True)
class Thresholds:
    """Where the words begin.

    Attributes:
        clears: a coefficient above this counts as cleared.
        always: least share of tokens cleared that is ``unconditional``.
        seldom: least share of tokens cleared that is ``conditional``; below it is ``rare``.
        tail: coefficients of heads and MLPs are cut to [-tail, tail] for mean, spread and bimodality.
    """

    clears: float = 0.5
    always: float = 0.9
    seldom: float = 0.1
    tail: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.seldom < self.always <= 1 or not 0 <= self.clears < self.tail < float("inf"):
            raise UsageError(
                f"thresholds {asdict(self)}",
                expected="0 < seldom < always <= 1 and 0 <= clears < tail",
                do="pass for example Thresholds(clears=0.5)",
            )


@torch.no_grad()
def cleared(
    stream: Stream,
    batches: Iterable[Tensor],
    model: nn.Module | None = None,
    *,
    thresholds: Thresholds | None = None,
    progress: Callable[[int], None] | None = None,
) -> Record:
    """Run a model over batches of tokens and tell which parts clear what they read, always or on some tokens.

    A neuron with read row w (norm gain folded; the up row where gated) and output column o clears
    ``c(t) = -<w, o> g(t) / s(t)``, with g the activated gate, or ``act(pre)/pre`` where the MLP has none, and s the
    norm scalar: it takes c of ``<w, x> + s b`` from ``<w, x>``, b being what it receives whatever the stream holds.
    A head or MLP that writes y (an MLP without its bias) into a stream that it reads as x takes
    ``c(t) = -||y||^2 / <x, y>`` of what x has along y; where ``<x, y> = 0`` there is no c. 1 clears, 2 reflects, a
    negative one strengthens. Coefficients of heads and MLPs have heavy tails, since <x, y> can be near 0: their mean,
    spread and bimodality are of values cut to [-4, 4] (``thresholds.tail``); their shares of tokens are not affected.

    Powers are summed in float64 about the mean of each batch and joined, so that nothing cancels and memory does not
    grow with the text. Invariant under re-basing of heads, re-ordering of neurons, a factor moved from w to o of an
    MLP that is gated, and with RMSNorm under rotation of the stream.

    Args:
        stream: the model, norms folded.
        batches: token ids (B, T) each, ``PADDING`` after the end of shorter rows, which never counts.
        model: a loaded model; without it the checkpoint is loaded in float32.
        thresholds: where the words begin.
        progress: called with the number of tokens so far after each batch.

    Returns:
        A Record over ``eraser`` (of each layer its heads, its MLP, its neurons): ``mean``, ``spread``, ``cleared``,
        ``strengthened``, ``bimodality``, ``tokens``, ``verdict``, ``kind``, ``layer``. A part that has a coefficient
        on no token is absent. ``stamp["text"]`` is a digest of the rows of tokens.

    Raises:
        UsageError: there are no tokens, padding stands before a token, or the stream leaves norm gains out.

    Reference: Pebay 2008 (joining central moments); Pfister et al. 2013 (Sarle's bimodality coefficient).
    """
    if not stream.folded:
        raise UsageError("this stream leaves norm gains out", expected="gains folded", do="open it without fold=False")
    limits, runs = thresholds or Thresholds(), load(stream, model)
    watch = _Watch(stream, limits)
    digest, tokens = sha256(), 0
    with watching(runs, stream, ("state", "inner", "mlp", "gate" if stream.spec.gated else "in"), watch.see):
        for batch in batches:
            there = kept(batch)
            watch.kept = there.to(next(runs.parameters()).device)
            forward(runs, batch.clamp(min=0))
            for row, of_row in zip(batch.cpu(), there.cpu(), strict=True):
                digest.update(f"{row[of_row].tolist()}".encode())
            tokens += int(there.sum())
            if progress is not None:
                progress(tokens)
    if not tokens:
        raise UsageError("there are no tokens to run on", expected="a text", do="pass one that is not empty")
    return _record(stream, watch, limits, {"tokens": tokens, "text": digest.hexdigest()})


@final
class _Watch:
    """Sums of each layer's coefficients, by ``(kind, layer)``, and the state that the next reader reads."""

    def __init__(self, stream: Stream, limits: Thresholds) -> None:
        self.stream, self.limits, self.act = stream, limits, activation(stream.spec.activation)
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.inner: dict[int, Tensor] = {}
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept, self.x, self.eps = torch.empty(0), torch.empty(0), 0.0

    def see(self, kind: Kind, layer: int, tensor: Tensor) -> None:
        """Add one tensor's tokens; a state stands until the next one, for whoever reads it."""
        own = tensor[self.kept]
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        if kind == "state":
            self.x, self.eps = own, torch.finfo(tensor.dtype).eps
        elif kind == "inner":
            out, square = self._head(layer, own)
            self._along("head", layer, torch.einsum("nmk,mkl,nml->nm", own, square, own), own, out)
        elif kind == "mlp":
            self._along("mlp", layer, own.square().sum(1, keepdim=True), own[:, None], None)
        else:
            gate = self.act(own) if kind == "gate" else gate_factor(self.act, own)
            s = scale(self.x, self.stream.spec.norm, self.stream.spec.norm_eps).to(accumulate)
            inner = self._inner(layer).to(own.device)
            step = max(1, _SLAB // max(1, len(own)))
            parts = [
                _sums(-inner[at] * gate[:, at].to(accumulate) / s[:, None], self.limits.clears)
                for at in torch.arange(len(inner)).split(step)
            ]
            self._add("neuron", layer, torch.cat(parts, 1))

    def _along(self, kind: str, layer: int, energy: Tensor, z: Tensor, out: Tensor | None) -> None:
        """Coefficients ``-|y|^2 / <x, y>``, ``y = out z`` (tokens, m), or z itself."""
        met = (z @ self.x[:, :, None])[..., 0] if out is None else torch.einsum("nd,mdk,nmk->nm", self.x, out, z)
        c = torch.where(met == 0, torch.nan, -energy.to(accumulate) / met.to(accumulate))
        self._add(kind, layer, _sums(c, self.limits.clears, self.limits.tail))

    def _add(self, kind: str, layer: int, sums: Tensor) -> None:
        held = self.sums.get((kind, layer))
        self.sums[kind, layer] = sums.cpu() if held is None else _joined(held, sums.cpu())

    def _head(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """O of every head (m, d, k), and O^T O, so that |O z|^2 costs k^2 and not k d."""
        if layer not in self.heads:
            out = self.stream.write("head", layer)
            square = out.to(accumulate).mT @ out.to(accumulate)
            self.heads[layer] = out.to(like), square.to(like)
        return self.heads[layer]

    def _inner(self, layer: int) -> Tensor:
        """``<w, o>`` of every neuron (n,)."""
        if layer not in self.inner:
            read = self.stream.read("up" if self.stream.spec.gated else "in", layer).maps[0].to(accumulate)
            self.inner[layer] = (read * self.stream.write("mlp", layer)[0].T.to(accumulate)).sum(1)
        return self.inner[layer]


def _sums(c: Tensor, clears: float, tail: float = torch.inf) -> Tensor:
    """Count, mean, sums of 2nd to 4th central powers, counts of cleared and of strengthened, (7, n) float64.

    Of coefficients (tokens, n), NaN where there is none.
    """
    there = ~c.isnan()
    count = there.sum(0).to(accumulate)
    cut = c.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-tail, tail)
    mean = cut.sum(0) / count.clamp(min=1)
    away = (cut - mean) * there
    square = away.square()
    powers = (square.sum(0), (square * away).sum(0), square.square().sum(0))
    return torch.stack([count, mean, *powers, *(x.sum(0).to(accumulate) for x in (c > clears, c < 0))])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """What ``_sums`` gives of two batches together."""
    (na, ma, a2, a3, a4), (nb, mb, b2, b3, b4) = a[:5], b[:5]
    n, d = na + nb, mb - ma
    p, q = na / n.clamp(min=1), nb / n.clamp(min=1)
    second = a2 + b2 + d**2 * na * q
    third = a3 + b3 + d**3 * na * q * (p - q) + 3 * d * (p * b2 - q * a2)
    fourth = a4 + b4 + d**4 * na * q * (p * p - p * q + q * q)
    fourth = fourth + 6 * d**2 * (p * p * b2 + q * q * a2) + 4 * d * (p * b3 - q * a3)
    return torch.stack([n, p * ma + q * mb, second, third, fourth, *(a[5:] + b[5:])])


def _verdict(share: float, limits: Thresholds) -> str | None:
    if not share > 0:
        return None
    return "unconditional" if share >= limits.always else "conditional" if share >= limits.seldom else "rare"


def _record(stream: Stream, watch: _Watch, limits: Thresholds, stamp: dict[str, object]) -> Record:
    labels, kinds, layers, parts = list[str](), list[str](), list[int](), list[Tensor]()
    for layer in range(stream.spec.n_layers):
        for kind, name in (("head", f"L{layer}H{{}}"), ("mlp", f"L{layer}.mlp"), ("neuron", f"L{layer}N{{}}")):
            part = watch.sums[kind, layer]
            labels += [name.format(i) for i in range(part.shape[1])]
            kinds += [kind] * part.shape[1]
            layers += [layer] * part.shape[1]
            parts.append(part)
    count, mean, second, third, fourth, clears, strengthens = torch.cat(parts, 1)
    variance = second / count
    # a spread within the rounding of the run has no form
    flat = variance <= (16 * watch.eps) ** 2 * (mean.square() + variance)
    skewness, kurtosis = third / count / variance**1.5, fourth / count / variance.square()
    bimodality = torch.where(flat, torch.nan, (skewness.square() + 1) / kurtosis)
    share = clears / count
    return Record(
        "cleared",
        (Axis("eraser", tuple(labels)),),
        (
            Column("mean", torch.where(count > 0, mean, torch.nan), "1 (share)", "of what it reads; 1 clears"),
            Column("spread", variance.sqrt(), "1 (share)", "standard deviation over tokens"),
            Column("cleared", share, "1, in [0, 1]", f"share of tokens with a coefficient above {limits.clears:g}"),
            Column("strengthened", strengthens / count, "1, in [0, 1]", "share of tokens with one below 0"),
            Column("bimodality", bimodality, "1, in (0, 1]", "(skewness^2 + 1) / kurtosis; 5/9 for a uniform law"),
            Column("tokens", count.to(torch.int64), "tokens", "on which it has a coefficient"),
            Column("verdict", tuple(_verdict(x, limits) for x in share.tolist()), "", "by the share of tokens cleared"),
            Column("kind", tuple(kinds)),
            Column("layer", torch.tensor(layers), "layers"),
        ),
        parameters=asdict(limits),
        stamp={"norm": stream.norm_stamp, **stamp},
        provenance=stream.provenance,
    )
