"""What to erase from the stream: the best policy at every price of interference, and where the model's own stands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.edge import Place, check_tokens, next_token_loss
from virtual_weights.runtime.running.hooks import Kind, module_of, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.stream import Stream, scale
from virtual_weights.stream.group import Port


@final
@dataclass(frozen=True, eq=False)
class Units:
    """One unit is what one writer w (a head, an MLP, an embedding) wrote at one token t, ``y = y_w(t)``.

    Tensors are (writers, tokens); NaN where a writer wrote exactly nothing, which is no unit.

    Attributes:
        writers: their labels, in order of depth.
        utility: ``U = <g_q(t), mean y_w - y_w(t)>``, nats: the first-order change of the sequence's summed next-token
            loss when y is replaced by its mean over tokens. g_q is the loss's gradient at q, the state in which y
            first appears, through all that follows (attention, norm scalars). Positive where y helps.
        interference: ``I = sum_r |R~_r y|^2 / s_p(t)^2 / e_r`` over the reading blocks r that y reaches but for the
            intended one. A block is all rows of Q, K and V of a layer, or of an MLP's gate and up, or the unembedding;
            p is the state that it reads, s its norm scalar, and ``e_r = mean_t |R~_r x_p(t)|^2 / s_p(t)^2`` the energy
            that it receives in all, so that blocks compare: the unit is one block's whole input.
        erased: ``m = clamp(-<x_final(t) - x_q(t), y> / |y|^2, 0, 1)``: how much of y later writers took back.
        intended: the block on which a writer's mean share of energy is largest, None where nothing reads it.
    """

    writers: tuple[str, ...]
    utility: Tensor
    interference: Tensor
    erased: Tensor
    intended: tuple[str | None, ...]


@dataclass(eq=False)
class _Group:
    """The writers of one kind in one layer, and the energy they put on readers."""

    names: list[str]
    writes: int
    inner: Tensor  # (m, tokens, k)
    maps: Tensor | None  # (m, d, k), None for the identity

    def __post_init__(self) -> None:
        self.largest = self.inner.new_zeros(self.inner.shape[:2])  # energy on the intended reader, and on the others
        self.others = torch.zeros_like(self.largest)
        self.intended: list[str | None] = [None] * len(self.names)

    def along(self, vectors: Tensor) -> Tensor:
        """``O^T v(t)``, (m, tokens, k), for (tokens, d): products with y are those of z with it."""
        return vectors[None] if self.maps is None else torch.einsum("mdk,nd->mnk", self.maps, vectors)

    def energy(self, gram: Tensor | None = None) -> Tensor:
        """``y^T G y``, (m, tokens), as ``z^T (O^T G O) z``; without G ``|y|^2``."""
        if self.maps is None:
            turned = self.inner if gram is None else self.inner @ gram
        else:
            turned = self.inner @ (self.maps.mT @ (self.maps if gram is None else gram @ self.maps))
        return (turned * self.inner).sum(-1).clamp(min=0)

    def put(self, block: str, energy: Tensor) -> None:
        """Count the energy put on one more reader; the one of largest mean is the intended one."""
        larger = energy.mean(1) > self.largest.mean(1)
        self.others += torch.where(larger[:, None], self.largest, energy)
        self.largest = torch.where(larger[:, None], energy, self.largest)
        self.intended = [block if yes else old for yes, old in zip(larger.tolist(), self.intended, strict=True)]


def units(
    stream: Stream, tokens: Tensor, model: nn.Module | None = None, batch: int = 2, progress: Progress | None = None
) -> Units:
    """Run a model on tokens, once forward and back, and measure every unit.

    The last token of a sequence predicts nothing that counts and gives no unit. All states, gradients and inner
    activations are held, some six numbers a layer, token and width; every pair of a writer and a block costs about
    ``d^2 k`` for heads and ``tokens d^2`` for MLPs.

    Args:
        stream: the model, with the norm's gain in its readers.
        tokens: (sequences, tokens) ids; nothing is padded.
        model: what runs; loaded in float32 where None. Its parameters' gradients are left alone.
        batch: sequences in one backward pass.
        progress: called with (steps done, steps): batches, then reading blocks.

    Returns:
        The units of all writers but biases, sequences after one another. None of it depends on the basis of the stream,
        utility and erasure not on the heads' inner bases either; interference does, being energy at a port.

    Raises:
        UsageError: readers without gain, or tokens of another shape.
    """
    if not stream.folded:
        raise UsageError("interference needs the norm's gain in the readers", expected="folded", do="open it folded")
    run = load(stream, model)
    batches = check_tokens(tokens).to(next(run.parameters()).device).split(batch)
    blocks = list(_blocks(stream))
    held: list[tuple[dict[Place, Tensor], list[Tensor]]] = []
    for i, part in enumerate(batches):
        held.append(_backward(stream, run, part))
        if progress is not None:
            progress(i + 1, len(batches) + len(blocks))
    seen = {place: torch.cat([each[place] for each, _ in held]) for place in held[0][0]}
    gradients = [torch.cat(parts) for parts in zip(*(each for _, each in held), strict=True)]
    groups = list(_groups(stream, seen))
    for i, (name, state, ports) in enumerate(blocks):
        _read(stream, groups, seen["state", state], (name, state, ports))
        if progress is not None:
            progress(len(batches) + i + 1, len(batches) + len(blocks))
    return _units(groups, gradients, [seen["state", p] for p in range(stream.states)])


def _units(groups: list[_Group], gradients: list[Tensor], states: list[Tensor]) -> Units:
    """Put the groups together."""
    found: list[Tensor] = []
    for group in groups:
        z, size = group.inner, group.energy()
        utility = (group.along(gradients[group.writes]) * (z.mean(1, keepdim=True) - z)).sum(-1)
        later = (group.along(states[-1] - states[group.writes]) * z).sum(-1)
        erased = (-later / size).clamp(0, 1)
        found.append(torch.stack([utility, group.others, erased]).masked_fill(size == 0, torch.nan))
    utility, interference, erased = torch.cat(found, 1).cpu()
    names = tuple(name for group in groups for name in group.names)
    return Units(names, utility, interference, erased, tuple(block for group in groups for block in group.intended))


def _read(stream: Stream, groups: list[_Group], x: Tensor, block: tuple[str, int, tuple[Port, ...]]) -> None:
    """Count what every writer puts on one reading block; a block that receives nothing reads nothing."""
    name, state, ports = block
    layer = None if name == "unembed" else int(name[1:].partition(".")[0])
    gram = torch.zeros((x.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)
    for port in ports:
        rows = stream.read(port, layer).maps.flatten(0, 1).to(x)
        gram += rows.T @ rows
    weight = 1 / scale(x, stream.spec.norm, stream.spec.norm_eps).square()
    received = ((x @ gram) * x).sum(1).mul(weight).mean()
    if received > 0:
        for group in groups:
            if group.writes <= state:
                group.put(name, group.energy(gram) * weight / received)


def _blocks(stream: Stream) -> Iterator[tuple[str, int, tuple[Port, ...]]]:
    """Name, state and ports of every reading block: ``("L3.attn", 6, ("Q", "K", "V"))``."""
    inner: tuple[Port, ...] = ("gate", "up") if stream.spec.gated else ("in",)
    for component in stream.components:
        label, state = component.label, component.reads
        if state is None or (label.kind == "head" and label.index):
            continue
        if label.kind == "head":
            yield f"L{label.layer}.attn", state, ("Q", "K", "V")
        elif label.kind == "mlp":
            yield str(label), state, inner
        else:
            yield "unembed", state, ("unembed",)


def _groups(stream: Stream, seen: dict[Place, Tensor]) -> Iterator[_Group]:
    """Who wrote what: the heads of a layer together, MLPs and embeddings one by one."""
    for component in stream.components:
        label, writes = component.label, component.writes
        if writes is None or label.kind in ("attn_bias", "mlp_bias") or (label.kind == "head" and label.index):
            continue
        if label.kind == "head":
            assert label.layer is not None
            z = seen["inner", label.layer].transpose(0, 1)
            names = [str(c.label) for c in stream.heads_of(label.layer)]
            yield _Group(names, writes, z, stream.write("head", label.layer).to(z))
        else:
            kind: Kind = "mlp" if label.kind == "mlp" else "pos" if label.kind == "pos" else "embed"
            yield _Group([str(label)], writes, seen[kind, label.layer or 0][None], None)


def _backward(stream: Stream, run: nn.Module, tokens: Tensor) -> tuple[dict[Place, Tensor], list[Tensor]]:
    """What a batch's parts wrote and the states they made, and the gradient of the summed loss at every state.

    All are (tokens, ...), without the last token of each sequence.
    """
    seen: dict[Place, Tensor] = {}
    states: dict[int, Tensor] = {}
    spec = stream.spec
    norms = ("attn_norm",) if spec.parallel else ("attn_norm", "mlp_norm")
    places = [*((role, layer) for layer in range(spec.n_layers) for role in norms), ("final_norm", None)]

    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().expand(len(tokens), *tensor.shape[1:])  # learned positions are computed once
        return tensor[:, :-1].flatten(0, 1).to(torch.promote_types(tensor.dtype, torch.float32))

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        seen[kind, layer] = flat(tensor)

    def begin(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()  # gradients even where no parameter asks for one

    def keep(state: int, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        states[state] = given[0]

    kinds: list[Kind] = ["state", "inner", "mlp", "embed", *(["pos"] if stream.model.has("pos") else [])]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(module_of(run, stream, "embed").register_forward_hook(begin).remove)
        stack.enter_context(watching(run, stream, kinds, see))
        for state, (role, layer) in enumerate(places):
            module = module_of(run, stream, role, layer)
            stack.callback(module.register_forward_pre_hook(partial(keep, state)).remove)
        total = next_token_loss(run(tokens, use_cache=False).logits, tokens).sum() * (tokens.shape[1] - 1)
        gradients = torch.autograd.grad(total, [states[p] for p in range(stream.states)])
    return seen, [flat(each) for each in gradients]


QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
STAMP = {
    "utility": "first-order change of the sequence's summed next-token loss when replaced by the mean over tokens",
    "interference": "energy on reading blocks but for the intended one, each over the mean energy it receives",
    "intended": "the reading block of largest mean share",
    "model": "clamp(-<x_final - x_q, y> / |y|^2, 0, 1), x_q the state in which y first appears",
}


@final
@dataclass(frozen=True, eq=False)
class Frontier:
    """Two Records of the same units.

    Attributes:
        frontier: over ``price``; values are nats, mean over units.
        policy: over ``writer``; means over its tokens.
    """

    frontier: Record
    policy: Record


def optimum(found: Units, price: float) -> Tensor:
    """``m = 1 iff U < price I``, (writers, tokens): what maximises ``value``, unit by unit."""
    return (found.utility < price * found.interference).to(found.utility)


def value(found: Units, policy: Tensor, price: float) -> float:
    """``E[(1 - m)(U - price I)]``, nats, mean over units, for a policy m (writers, tokens) in 0 .. 1; 1 erases."""
    return float(((1 - policy) * (found.utility - price * found.interference)).double().nanmean())


def frontier(
    stream: Stream,
    tokens: Tensor,
    model: nn.Module | None = None,
    *,
    batch: int = 2,
    prices: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """The policy that maximises ``E[(1 - m)(U - price I)]`` at each price, beside what the model does.

    A unit is what one writer wrote at one token; U, I and the model's own m are the estimators of ``Units``, named in
    the stamp. What is kept is worth U and costs price times I, what is erased neither, so that the best policy is the
    threshold ``m = 1 iff U < price I``.

    Args:
        stream: the model, with the norm's gain in its readers.
        tokens: (sequences, tokens) ids; nothing is padded. Some 500 tokens: all that flows is held at once.
        model: what runs; loaded in float32 where None.
        batch: sequences in one backward pass.
        prices: nats for one reader's whole input, at least 0; None takes 0 and quantiles of U/I where both are
            positive, at which so much of what helps is no longer worth its disturbance.
        progress: called with (steps done, steps).

    Returns:
        The frontier over prices, and per writer what the policy does at the median of U/I and what the model does.

    Raises:
        UsageError: readers without gain, tokens of another shape, prices below 0, or no unit both helps and
            disturbs.
    """
    if prices is not None and (
        not prices or len(set(prices)) < len(prices) or not all(0 <= p < math.inf for p in prices)
    ):
        raise UsageError(f"prices {list(prices)}", expected="different numbers >= 0", do="pass such, or none")
    found = units(stream, tokens, model, batch, progress)
    both = (found.utility > 0) & (found.interference > 0)
    if not both.any():
        raise UsageError("no unit helps and disturbs", expected="text on which some do", do="pass other tokens")
    ratios = (found.utility[both].double() / found.interference[both].double()).sort().values
    at = {f"{q:.0%}": float(ratios[round(q * (len(ratios) - 1))]) for q in QUANTILES}
    listed = {"0": 0.0, **at} if prices is None else {repr(float(p)): float(p) for p in prices}
    parameters = {
        "sequences": len(tokens),
        "length": tokens.shape[1],
        "units": int((~found.utility.isnan()).sum()),
        "median_price": at["50%"],
    }
    stamp = {"norm": stream.norm_stamp, "tokens": tokens.numel(), **STAMP}
    shared: dict[str, Any] = {"parameters": parameters, "stamp": stamp, "provenance": stream.provenance}
    return Frontier(_over_prices(found, listed, shared), _over_writers(found, at["50%"], shared))


def _over_prices(found: Units, prices: dict[str, float], shared: dict[str, Any]) -> Record:
    there = ~found.utility.isnan()
    own, keep = found.erased, torch.zeros_like(found.erased)
    share = float(own.double().nanmean())
    often = float((own > 0.5)[there].double().mean())
    rows: list[tuple[float, ...]] = []
    for price in prices.values():
        best = optimum(found, price)
        kept = value(found, keep, price)
        erased = float(best[there].double().mean())
        same = float(((own > 0.5) == (best > 0.5))[there].double().mean())
        chance = erased * often + (1 - erased) * (1 - often)
        values = value(found, best, price), value(found, own, price), (1 - share) * kept, kept, 0.0
        rows.append((price, *values, erased, share, same, chance))
    nats = "nats, mean over units"
    said = (
        ("lambda", "nats for a reader's whole input", "the price itself"),
        ("optimal", nats, "value of m = 1 iff U < price I"),
        ("model", nats, "value of what the model erases"),
        ("shuffled", nats, "expected value of the model's m dealt out to units at random"),
        ("keep_all", nats, "value of m = 0"),
        ("erase_all", nats, "value of m = 1"),
        ("erased_by_optimal", "share of units", "mean m of the optimum"),
        ("erased_by_model", "share", "mean m of the model"),
        ("agreement", "share of units", "(m of the model > 1/2) = optimum"),
        ("chance", "share of units", "agreement of independent policies that erase as often"),
    )
    values = torch.tensor(rows, dtype=torch.float64).T
    columns = tuple(Column(name, v, unit, text) for (name, unit, text), v in zip(said, values, strict=True))
    return Record("frontier", (Axis("price", tuple(prices)),), columns, **shared)


def _over_writers(found: Units, price: float, shared: dict[str, Any]) -> Record:
    best = optimum(found, price).masked_fill(found.utility.isnan(), torch.nan)
    utility, interference, by_best, by_model = (
        x.double().nanmean(1) for x in (found.utility, found.interference, best, found.erased)
    )
    columns = (
        Column("utility", utility, "nats", "mean U over its tokens"),
        Column("interference", interference, "readers' inputs", "mean I over its tokens"),
        Column("intended", found.intended, "", "the reading block of largest mean share"),
        Column("erased_by_optimal", by_best, "share of tokens", "U < median price * I"),
        Column("erased_by_model", by_model, "share", "mean m of the model"),
        Column("excess", by_model - by_best, "share", "what the model erases beyond the policy; below 0 less"),
    )
    return Record("policy", (Axis("writer", found.writers),), columns, **shared)
