"""Moments of a model's activations on text, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.runtime.running.text import kept
from virtual_weights.stream import OperatingPoint, Stream, scale
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.operating_point import gate_factor


@torch.no_grad()
def operating_point(stream: Stream, tokens: Tensor, model: nn.Module | None = None) -> OperatingPoint:
    """Run a model on one prompt and note its norm scalars, attention patterns and gates.

    With these fixed every block is linear, and ``frozen.replay`` gives back the model's own final residual up
    to rounding of the run's dtype.

    Args:
        stream: the model.
        tokens: (T,) token ids.
        model: a loaded model with eager attention; without it the checkpoint is loaded in float32.

    Raises:
        UsageError: no tokens, transformers is missing, or the model's attention keeps no pattern.
    """
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point():
        raise UsageError(
            f"a prompt of shape {tuple(tokens.shape)}, {tokens.dtype}", expected="token ids (T,)", do="pass one prompt"
        )
    runs = load(stream, model)
    act = activation(stream.spec.activation)
    scalars: dict[str, Tensor] = {}
    patterns: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        own = tensor[0].to(torch.promote_types(tensor.dtype, torch.float32))
        if kind == "pattern":
            patterns[layer] = own
        elif kind == "state":
            s = scale(own, stream.spec.norm, stream.spec.norm_eps)
            scalars.update(dict.fromkeys(sites(stream, layer), s))
        else:
            gates[layer] = act(own) if kind == "gate" else gate_factor(act, own)

    with watching(runs, stream, ("state", "pattern", "gate" if stream.spec.gated else "in"), see):
        forward(runs, tokens[None])
    return OperatingPoint(stream.source.fingerprint, tokens.cpu(), scalars, patterns, gates)


def sites(stream: Stream, state: int) -> tuple[str, ...]:
    """The norm sites that see a state: ``("L3.attn",)``, ``("L3.mlp",)``, both in a parallel block, ``("final",)``."""
    if state == stream.states - 1:
        return ("final",)
    if stream.spec.parallel:
        return f"L{state}.attn", f"L{state}.mlp"
    return (f"L{state // 2}.{'mlp' if state % 2 else 'attn'}",)


def forward(model: nn.Module, tokens: Tensor) -> None:
    """Run the blocks on (B, T) token ids; the unembedding, which nothing here looks at, is left out."""
    body: Any = getattr(model, "base_model", model)  # transformers' name for a model without its head
    body(tokens.to(next(model.parameters()).device), use_cache=False)


def activation(name: str) -> nn.Module:
    """A nonlinearity by transformers' name for it."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


Sums = dict[str, Tensor]


@torch.no_grad()
def observe(
    stream: Stream,
    batches: Iterable[Tensor],
    model: nn.Module | None = None,
    *,
    memory_mb: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> Moments:
    """Run a model over batches of tokens and average what its parts write and read.

    Products are taken in the model's dtype (float32 at least) within a batch and summed over batches in float64; what
    is returned has the former.

    Args:
        stream: the model.
        batches: token ids (B, T) each, ``PADDING`` after the end of shorter rows; see ``text.batches``.
        model: a loaded model with eager attention; without it the checkpoint is loaded in float32.
        memory_mb: MiB for the sums of second moments. Heads are held at every reading state where that fits, else
            factorised (``Moments.form`` says which); then MLPs and embeddings, (d, d) each, where they fit too, else
            they have energies but no second moments.
        progress: called with the number of tokens so far after each batch.

    Raises:
        UsageError: there are no tokens, transformers is missing, or the model's attention keeps no pattern.
    """
    runs = load(stream, model)
    observed = _Observed(stream, memory_mb * 2**20)
    kinds = ["state", "inner", "neurons", "mlp", "embed", "Q", "K", "V", "pattern"]
    kinds += ["pos"] if stream.model.has("pos") else []
    with watching(runs, stream, kinds, observed.see):  # type: ignore[arg-type]
        for tokens in batches:
            observed.begin(tokens, next(runs.parameters()).device)
            forward(runs, tokens.clamp(min=0))
            observed.end()
            if progress is not None:
                progress(observed.tokens)
    return observed.moments()


@final
class _Observed:
    """Sums over tokens by ``kind/key``; of one batch, what waits for the norm scalars of later states."""

    def __init__(self, stream: Stream, budget: int) -> None:
        self.stream, self.tokens, self.length, self.later = stream, 0, 0, 0
        self.sums: Sums = {}
        self.dtype = torch.float32
        spec, states = stream.spec, stream.states
        heads = [8 * spec.n_heads * spec.d_head**2 * (states - w) for w in self._writes("head").values()]
        self.exact = sum(heads) <= budget
        left = budget - (sum(heads) if self.exact else sum(8 * spec.n_heads * spec.d_head**2 for _ in heads))
        self.wide = 8 * spec.d_model**2 * (2 + spec.n_layers) <= left
        squares = {i: stream.write("head", i).double() for i in self._writes("head")}
        self.squares = {i: o.mT @ o for i, o in squares.items()}  # O^T O, so that |O z|^2 costs k^2 and not k d

    def _writes(self, kind: str) -> dict[int, int]:
        parts = (c for c in self.stream.components if c.kind == kind)
        return {c.label.layer or 0: c.writes for c in parts if c.writes is not None}

    def begin(self, tokens: Tensor, device: torch.device) -> None:
        """Take note of which places of a batch hold tokens."""
        self.kept = kept(tokens).to(device)
        self.whole = bool(self.kept.all())
        self.inverse: dict[int, Tensor] = {}
        self.waiting: dict[str, tuple[int, Tensor]] = {}
        self.tokens += int(self.kept.sum())
        self.later += int(self.kept[:, 1:].sum())
        self.length = max(self.length, int(self.kept.sum(1).max()))

    def see(self, kind: Kind, layer: int, tensor: Tensor) -> None:
        """Add what needs no norm scalar, keep the rest until the batch has run."""
        if kind == "pattern":
            self._attention(layer, tensor)
            return
        if len(tensor) == 1:
            tensor = tensor.expand(len(self.kept), *tensor.shape[1:])  # learned positions are computed once
        own = tensor.flatten(0, 1) if self.whole else tensor[self.kept]  # without padding there is nothing to pick out
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        self.dtype = own.dtype
        if kind == "state":
            self._state(layer, own)
        elif kind in ("Q", "K", "V"):
            self._add(f"ports/L{layer}.{kind}", torch.einsum("nmk,nml->mkl", own, own))
            self._add(f"port_means/L{layer}.{kind}", own.sum(0))
        elif kind == "neurons":
            self._add(f"neurons/{layer}", torch.stack([own.sum(0), own.square().sum(0), (own > 0).to(own).sum(0)]))
        elif kind == "inner":
            self.waiting[f"L{layer}.heads"] = self._writes("head")[layer], own
        else:
            writes = self._writes("mlp")[layer] if kind == "mlp" else 0
            self.waiting[f"L{layer}.mlp" if kind == "mlp" else kind] = writes, own[:, None]

    def end(self) -> None:
        """Now that every state's norm scalar is known: the moments of what was written."""
        for group, (writes, z) in self.waiting.items():
            heads = group.endswith(".heads")
            weights = torch.stack([self.inverse[p] for p in range(writes, self.stream.states)])  # (states, tokens), 1/s
            if heads:
                square = self.squares[int(group[1:-6])].to(z)
                energy = torch.einsum("nmk,mkl,nml->nm", z, square, z)
            else:
                energy = z.square().sum(-1)
            self._add(f"energy/{group}", weights.square() @ energy)
            if not heads and not self.wide:
                continue
            held = weights if heads and self.exact else weights[:1]
            by_writer = z.permute(1, 2, 0).contiguous()  # (m, k, tokens)
            self._add(f"mean/{group}", torch.einsum("pn,nmk->pmk", held, z))
            weighted = torch.empty_like(by_writer)
            for p, weight in enumerate(held.square()):
                product = torch.bmm(torch.mul(by_writer, weight, out=weighted), by_writer.mT)
                self._add(f"second/{group}", product, p, len(held))

    def moments(self) -> Moments:
        """The sums divided by their counts."""
        if not self.tokens:
            raise UsageError("there are no tokens to observe", expected="a text", do="pass one that is not empty")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, total in self.sums.items():
            kind, _, key = name.partition("/")
            count = max(self.later, 1) if kind == "attention" else self.tokens
            parts.setdefault(kind, {})[key] = (total / count).to(self.dtype).cpu()
        for kind in ("second", "mean", "neurons"):
            parts.setdefault(kind, {})
        states = {
            name: torch.stack([parts["state"][f"{p}"][i] for p in range(self.stream.states)])
            for i, name in enumerate(("norm", "inverse", "inverse_square", "variance", "kurtosis"))
        }
        del parts["state"]
        return Moments(self.stream.source.fingerprint, self.tokens, self.length, states=states, **parts)

    def _state(self, state: int, x: Tensor) -> None:
        s = scale(x, self.stream.spec.norm, self.stream.spec.norm_eps)
        self.inverse[state] = 1 / s
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1).clamp(min=torch.finfo(x.dtype).tiny)
        kurtosis = centred.square().square().mean(-1) / variance.square()
        self._add(f"state/{state}", torch.stack([s, 1 / s, s**-2, variance, kurtosis]).sum(1))

    def _attention(self, layer: int, pattern: Tensor) -> None:
        """To self, previous and first token; the first token of a chunk has no previous one and is left out."""
        later = self.kept[:, None, 1:]
        own = pattern.diagonal(dim1=2, dim2=3)[:, :, 1:]
        previous = pattern.diagonal(offset=-1, dim1=2, dim2=3)
        self._add(
            f"attention/{layer}",
            torch.stack([(x * later).sum((0, 2)) for x in (own, previous, pattern[:, :, 1:, 0])], 1),
        )

    def _add(self, name: str, value: Tensor, at: int = 0, of: int = 0) -> None:
        """Add to a sum, or, where it has ``of`` parts, to one of them."""
        if name not in self.sums:
            self.sums[name] = value.new_zeros((of, *value.shape) if of else value.shape, dtype=torch.float64)
        (self.sums[name][at] if of else self.sums[name]).add_(value)
