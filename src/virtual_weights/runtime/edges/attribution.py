"""First-order effect of every direct edge at once, from one backward pass per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.edge import ROLES, Place, check_tokens, next_token_loss
from virtual_weights.runtime.running.hooks import Kind, module_of, split, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.stream import Component, Stream, scale
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers

Metric = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, T, V) and tokens (B, T) to one number a sequence, (B,)."""

_Key = tuple[Port, int | None]  # a port of one layer, None the unembedding's
_Read = Iterator[tuple[_Key, Tensor]]


def attribute(  # noqa: PLR0913 - which edges, by keyword only
    stream: Stream,
    tokens: Tensor,
    metric: Metric | None = None,
    model: nn.Module | None = None,
    batch: int = 2,
    progress: Progress | None = None,
    *,
    ports: Sequence[Port] = HEAD_PORTS,
    writers: Writers = "heads",
) -> dict[str, Record]:
    """What removing each direct edge would do to a metric, to first order.

    For writer i and reader port j, with g the gradient of the metric at the port's output (of heads before rotary, of
    an MLP at all its neurons, of the unembedding at the logits) and y what the writer writes::

        h_j(t) = R~_j^T g_j(t) / s_j(t)
        attribution[j, i] = sum_t < h_j(t), mean y_i - y_i(t) >

    the derivative of the metric along the removal of ``Removal()``, which ``prove`` carries out in full; the mean is
    over all tokens of all sequences. It is exact for small parts of an edge and can be far off where attention
    saturates. The mean over sequences is reported.

    Args:
        stream: the model, with the norm's gain in its readers.
        tokens: (sequences, tokens) ids; nothing is padded.
        metric: of logits and tokens, one number a sequence; None is the mean next-token loss in nats.
        model: what runs; loaded in float32 where None. Its parameters' gradients are left alone.
        batch: sequences in one backward pass; what all writers write to them, (writers, tokens, d), is held at once.
        progress: called with (batches done, batches).
        ports: through what is read: of heads ``"Q"``, ``"K"``, ``"V"``, of MLPs ``"gate"`` and ``"up"`` or ``"in"``,
            and ``"unembed"``.
        writers: ``"heads"``, or ``"all"``: embeddings and MLPs too. Biases are no edge that could be removed: what
            they write is their mean.

    Returns:
        By port, a Record over (reader, writer), both in order of depth, with columns ``attribution`` and ``size``, its
        absolute value. A shared key or value head has the same row under all its readers' names, and its gradient is
        the sum over all of them.

    Raises:
        UsageError: readers without gain, no such port, or tokens of another shape.

    Reference: Syed, Rager, Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery".
    """
    _check(stream, ports, writers)
    tokens, run, metric = check_tokens(tokens), load(stream, model), metric or next_token_loss
    batches = tokens.to(next(run.parameters()).device).split(batch)
    states: dict[_Key, int] = {(p, c.label.layer): c.reads or 0 for p in ports for c in _readers(stream, p)}
    sources = _writers(stream, writers)
    runs = _runs(stream, run, batches, states, sources, metric)
    effects = {key: (x / len(tokens)).cpu() for key, x in _sums(runs, len(batches), progress).items()}
    parameters = {"metric": _name(metric), "sequences": len(tokens), "writers": writers}
    return {port: _record(stream, port, sources, effects, {**parameters, "port": port}) for port in ports}


def logit_difference(logits: Tensor, _tokens: Tensor, token: int, against: int | None = None) -> Tensor:
    """The logit of a token after the last one of each sequence, less that of another, (B,)."""
    last = logits[:, -1]
    return last[:, token] if against is None else last[:, token] - last[:, against]


def ports_of(stream: Stream) -> tuple[Port, ...]:
    """Every port through which this model reads."""
    mlp: tuple[Port, ...] = ("gate", "up") if stream.spec.gated else ("in",)
    every: tuple[Port, ...] = (*HEAD_PORTS, *mlp, "unembed")
    return tuple(port for port in every if _readers(stream, port))


def _check(stream: Stream, ports: Sequence[Port], writers: Writers) -> None:
    if not stream.folded:
        raise UsageError("attribution needs the norm's gain in the readers", expected="folded", do="open it folded")
    allowed = ports_of(stream)
    if not ports or not set(ports) <= set(allowed) or writers not in ("heads", "all"):
        raise UsageError(
            f"ports {', '.join(map(str, ports)) or 'none'} and writers {writers!r} of this model",
            expected=f"ports among {', '.join(allowed)}; heads or all",
            do="name some of these",
        )


def _readers(stream: Stream, port: Port) -> list[Component]:
    kind = "head" if port in HEAD_PORTS else "unembed" if port == "unembed" else "mlp"
    return [c for c in stream.components if c.kind == kind]


def _writers(stream: Stream, writers: Writers) -> list[Component]:
    kinds = ("head",) if writers == "heads" else ("embed", "pos", "head", "mlp")
    return [c for c in stream.components if c.kind in kinds]


def _runs(
    stream: Stream,
    run: nn.Module,
    batches: Sequence[Tensor],
    states: Mapping[_Key, int],
    writers: Sequence[Component],
    metric: Metric,
) -> Iterator[tuple[_Read, Tensor]]:
    """Batch by batch: every port's h, (m, B T, d), one at a time, and what every writer writes, (writers, B T, d)."""
    for part in batches:
        seen, grads = _backward(stream, run, part, states, writers, metric)
        wrote = _wrote(stream, writers, seen, part)
        yield ((key, _at_the_stream(stream, key, grads[key], seen["state", n])) for key, n in states.items()), wrote


def _sums(runs: Iterable[tuple[_Read, Tensor]], batches: int, progress: Progress | None) -> dict[_Key, Tensor]:
    """``sum_t <h(t), mean y - y(t)>`` over all tokens, (m, writers) float64 by port."""
    products: dict[_Key, Tensor] = {}  # (m, writers), sum_t <h, y>
    gradients: dict[_Key, Tensor] = {}  # (m, d), sum_t h
    written: list[Tensor] = []  # (writers, d), sum_t y
    tokens = 0
    for i, (read, wrote) in enumerate(runs):
        written.append(wrote.sum(1, dtype=torch.float64))
        tokens += wrote.shape[1]
        for key, h in read:
            _add(products, key, h.flatten(1) @ wrote.flatten(1).T)
            _add(gradients, key, h.sum(1))
        if progress is not None:
            progress(i + 1, batches)
    mean = torch.stack(written).sum(0) / tokens
    return {key: gradients[key] @ mean.T - products[key] for key in products}


def _backward(
    stream: Stream,
    run: nn.Module,
    tokens: Tensor,
    states: Mapping[_Key, int],
    writers: Sequence[Component],
    metric: Metric,
) -> tuple[dict[Place, Tensor], dict[_Key, Tensor]]:
    """What writers write from and readers read, and the gradient of the summed metric at each port's output."""
    seen: dict[Place, Tensor] = {}
    outputs: dict[_Key, Tensor] = {}
    places: set[Place] = {*map(_place, writers), *(("state", state) for state in states.values())}

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        if (kind, layer) in places:
            seen[kind, layer] = tensor

    def begin(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()  # gradients even where no parameter asks for one

    def keep(key: _Key, _module: nn.Module, _given: object, output: Tensor) -> None:
        outputs[key] = output

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watching(run, stream, {kind for kind, _ in places}, see))
        stack.callback(module_of(run, stream, "embed").register_forward_hook(begin).remove)
        for key in states:
            module = module_of(run, stream, ROLES[key[0]], key[1])
            stack.callback(module.register_forward_hook(partial(keep, key)).remove)
        total = metric(run(tokens, use_cache=False).logits, tokens).sum()
        distinct = list({id(output): output for output in outputs.values()}.values())  # fused ports are one output
        found = {id(output): g for output, g in zip(distinct, torch.autograd.grad(total, distinct), strict=True)}
    return seen, {key: split(stream, ROLES[key[0]], found[id(output)]) for key, output in outputs.items()}


def _place(writer: Component) -> Place:
    kinds: dict[str, Kind] = {"head": "inner", "mlp": "mlp", "embed": "embed", "pos": "pos"}
    return kinds[writer.kind], writer.label.layer or 0


def _wrote(stream: Stream, writers: Sequence[Component], seen: Mapping[Place, Tensor], tokens: Tensor) -> Tensor:
    """What every writer writes, (writers, B T, d): ``O z`` of heads for z (B, T, heads, k), a layer at a time."""
    found: list[Tensor] = []
    for kind, layer in dict.fromkeys(_place(c) for c in writers):
        z = seen[kind, layer]
        z = z.to(torch.promote_types(z.dtype, torch.float32)).expand(*tokens.shape, *z.shape[2:]).flatten(0, 1)
        heads = kind == "inner"
        found.append(torch.einsum("hdk,thk->htd", stream.write("head", layer).to(z), z) if heads else z[None])
    return torch.cat(found)


def _at_the_stream(stream: Stream, key: _Key, grad: Tensor, x: Tensor) -> Tensor:
    """``R~^T g / s``, (m, B T, d), for g (B, T, m, k), of one reader (B, T, k), and x (B, T, d)."""
    x = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    s = scale(x, stream.spec.norm, stream.spec.norm_eps)
    maps = stream.read(key[0], key[1]).maps.to(x)
    grad = grad.flatten(0, 1).to(x).reshape(len(x), *maps.shape[:2])
    return torch.einsum("mkd,tmk->mtd", maps, grad / s[:, None, None])


def _name(metric: Any) -> str:
    inner, given = (metric.func, metric.keywords) if isinstance(metric, partial) else (metric, {})
    name = getattr(inner, "__name__", type(inner).__name__)
    return ", ".join([name, *(f"{key}={value}" for key, value in given.items())])


def _add(sums: dict[_Key, Tensor], key: _Key, more: Tensor) -> None:
    sums[key] = sums[key] + more if key in sums else more.double()


def _record(
    stream: Stream, port: Port, writers: Sequence[Component], effects: dict[_Key, Tensor], parameters: dict[str, Any]
) -> Record:
    readers = _readers(stream, port)
    group = stream.spec.group if port in ("K", "V") else 1
    rows = [effects[port, layer].repeat_interleave(group, 0) for layer in dict.fromkeys(c.label.layer for c in readers)]
    reads, writes = torch.tensor([c.reads for c in readers]), torch.tensor([c.writes for c in writers])
    found = torch.cat(rows).masked_fill(writes > reads[:, None], torch.nan)
    channels = tuple(c.channel or "" for c in readers) if group > 1 else ()
    columns = (
        Column("attribution", found, "nats, or the metric's", "first-order change of the metric without the edge"),
        Column("size", found.abs(), "the same", "|attribution|"),
    )
    stamp = {"norm": stream.norm_stamp, "replacement": "mean", "scalars": "held"}
    names, sources = (tuple(str(c.label) for c in each) for each in (readers, writers))
    axes = (Axis("reader", names, channels), Axis("writer", sources))
    return Record("attribution", axes, columns, parameters, stamp, stream.provenance)
