"""First-order effect of every direct edge between heads at once, from one backward pass per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edge import ROLES, Place, check_tokens, next_token_loss
from virtual_weights.runtime.model import load
from virtual_weights.runtime.places import module_of
from virtual_weights.runtime.watch import Kind, split, watching
from virtual_weights.stream import Stream, scale
from virtual_weights.stream.stream import Port

Metric = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, T, V) and tokens (B, T) to one number a sequence, (B,)."""

_PORTS: tuple[Port, ...] = ("Q", "K", "V")
_Key = tuple[Port, int]


def attribute(
    stream: Stream,
    tokens: Tensor,
    metric: Metric | None = None,
    model: nn.Module | None = None,
    batch: int = 2,
    progress: Progress | None = None,
) -> dict[str, Record]:
    """What removing each direct edge between heads would do to a metric, to first order.

    For writer i and reader port j, with g the gradient of the metric at the port's output, before rotary::

        attribution[j, i] = sum_t < g_j(t), R~_j O_i (mean z_i - z_i(t)) / s_j(t) >

    the derivative of the metric along the removal of ``Removal()``, which ``prove`` carries out in full; the mean is
    over all tokens of all sequences. It is exact for small parts of an edge and can be far off where attention
    saturates. The mean over sequences is reported.

    Args:
        stream: the model, with the norm's gain in its readers.
        tokens: (sequences, tokens) ids; nothing is padded.
        metric: of logits and tokens, one number a sequence; None is the mean next-token loss in nats.
        model: what runs; loaded in float32 where None. Its parameters' gradients are left alone.
        batch: sequences in one backward pass; what all heads write to them, (heads, tokens, d), is held at once.
        progress: called with (batches done, batches).

    Returns:
        By port, a Record over (reader, writer), all heads in order of depth, with columns ``attribution`` and
        ``size``, its absolute value. A shared key or value head has the same row under all its readers' names, and
        its gradient is the sum over all of them.

    Raises:
        UsageError: readers without gain, or tokens of another shape.

    Reference: Syed, Rager, Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery".
    """
    if not stream.folded:
        raise UsageError("attribution needs the norm's gain in the readers", expected="folded", do="open it folded")
    tokens, run, metric = check_tokens(tokens), load(stream, model), metric or next_token_loss
    batches = tokens.to(next(run.parameters()).device).split(batch)
    keys: list[_Key] = [(port, layer) for port in _PORTS for layer in stream.attention_layers]
    products: dict[_Key, Tensor] = {}  # (m, writers), sum_t <R~^T g / s, O z>
    gradients: dict[_Key, Tensor] = {}  # (m, d), sum_t R~^T g / s
    written: list[Tensor] = []  # (writers, d), sum_t O z
    for i, part in enumerate(batches):
        seen, grads = _backward(stream, run, part, keys, metric)
        wrote = torch.cat([_writes(stream, layer, seen["inner", layer]) for layer in stream.attention_layers])
        written.append(wrote.sum(1, dtype=torch.float64))
        for key in keys:
            g = _at_the_stream(stream, key, grads[key], seen["state", _state(stream, key[1])])
            _add(products, key, g.flatten(1) @ wrote.flatten(1).T)
            _add(gradients, key, g.sum(1))
        if progress is not None:
            progress(i + 1, len(batches))
    mean = torch.stack(written).sum(0) / tokens.numel()
    effects = {key: ((gradients[key] @ mean.T - products[key]) / len(tokens)).cpu() for key in keys}
    parameters = {"metric": _name(metric), "sequences": len(tokens)}
    return {port: _record(stream, port, effects, {**parameters, "port": port}) for port in _PORTS}


def _backward(
    stream: Stream, run: nn.Module, tokens: Tensor, keys: Sequence[_Key], metric: Metric
) -> tuple[dict[Place, Tensor], dict[_Key, Tensor]]:
    """What heads write from and readers read, and the gradient of the summed metric at each port's output."""
    seen: dict[Place, Tensor] = {}
    outputs: dict[_Key, Tensor] = {}
    places = {("inner", layer) for _, layer in keys} | {("state", _state(stream, layer)) for _, layer in keys}

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        if (kind, layer) in places:
            seen[kind, layer] = tensor

    def begin(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()  # gradients even where no parameter asks for one

    def keep(key: _Key, _module: nn.Module, _given: object, output: Tensor) -> None:
        outputs[key] = output

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watching(run, stream, ("inner", "state"), see))
        stack.callback(module_of(run, stream, "embed").register_forward_hook(begin).remove)
        for key in keys:
            module = module_of(run, stream, ROLES[key[0]], key[1])
            stack.callback(module.register_forward_hook(partial(keep, key)).remove)
        total = metric(run(tokens, use_cache=False).logits, tokens).sum()
        distinct = list({id(output): output for output in outputs.values()}.values())  # fused ports are one output
        found = {id(output): g for output, g in zip(distinct, torch.autograd.grad(total, distinct), strict=True)}
    return seen, {key: split(stream, ROLES[key[0]], found[id(output)]) for key, output in outputs.items()}


def _writes(stream: Stream, layer: int, z: Tensor) -> Tensor:
    """``O z`` of every head of a layer, (heads, B T, d), for z (B, T, heads, k)."""
    z = z.flatten(0, 1).to(torch.promote_types(z.dtype, torch.float32))
    return torch.einsum("hdk,thk->htd", stream.write("head", layer).to(z), z)


def _at_the_stream(stream: Stream, key: _Key, grad: Tensor, x: Tensor) -> Tensor:
    """``R~^T g / s``, (m, B T, d), for g (B, T, m, k) and x (B, T, d)."""
    x = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    s = scale(x, stream.spec.norm, stream.spec.norm_eps)
    maps = stream.read(key[0], key[1]).maps.to(x)
    return torch.einsum("mkd,tmk->mtd", maps, grad.flatten(0, 1).to(x) / s[:, None, None])


def _name(metric: Any) -> str:
    inner, given = (metric.func, metric.keywords) if isinstance(metric, partial) else (metric, {})
    name = getattr(inner, "__name__", type(inner).__name__)
    return ", ".join([name, *(f"{key}={value}" for key, value in given.items())])


def _state(stream: Stream, layer: int) -> int:
    state = stream.heads_of(layer)[0].reads
    assert state is not None
    return state


def _add(sums: dict[_Key, Tensor], key: _Key, more: Tensor) -> None:
    sums[key] = sums[key] + more if key in sums else more.double()


def _record(stream: Stream, port: Port, effects: dict[_Key, Tensor], parameters: dict[str, Any]) -> Record:
    group = 1 if port == "Q" else stream.spec.group
    rows = [effects[port, layer].repeat_interleave(group, 0) for layer in stream.attention_layers]
    reads, writes = (torch.tensor([getattr(c, name) for c in stream.heads]) for name in ("reads", "writes"))
    found = torch.cat(rows).masked_fill(writes > reads[:, None], torch.nan)
    labels = tuple(str(c.label) for c in stream.heads)
    channels = tuple(c.channel or "" for c in stream.heads) if group > 1 else ()
    columns = (
        Column("attribution", found, "nats, or the metric's", "first-order change of the metric without the edge"),
        Column("size", found.abs(), "the same", "|attribution|"),
    )
    stamp = {"norm": stream.norm_stamp, "replacement": "mean", "scalars": "held"}
    axes = (Axis("reader", labels, channels), Axis("writer", labels))
    return Record("attribution", axes, columns, parameters, stamp, stream.provenance)
