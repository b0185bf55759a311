"""Remove exactly one direct edge while a model runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.edge import Edge, Place, Written
from virtual_weights.runtime.running.hooks import Kind, module_name, module_of, split, watching
from virtual_weights.stream import Stream, scale


@contextmanager
def restarted(model: nn.Module, stream: Stream, layer: int, state: Tensor) -> Generator[None]:
    """Let the blocks before a layer give what they gave in an earlier run, at no cost.

    The model goes on as it does after them, by its own modules: embeddings, masks and rotary angles are made as ever.
    Hooks inside the blocks left out do not fire.

    Args:
        model: what runs, see ``load``.
        stream: the same model.
        layer: the first block that runs; ``n_layers`` runs none.
        state: (B, T, d) what that block is given, as an earlier run on the same tokens showed it: state
            ``attention_reads(stream.model, layer)``, the last of all where no block runs.
    """
    modules = dict(model.named_modules())
    names = [module_name(stream, "attn_norm", i).rpartition(".")[0] for i in range(layer)]
    blocks: list[Any] = [modules.get(name) or modules[name.partition(".")[2]] for name in names]
    kept = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *_, **__: state
    try:
        yield
    finally:
        for block, own in zip(blocks, kept, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


Replacement = Literal["mean", "resample"]
Scalars = Literal["held", "move"]


@dataclass(frozen=True, eq=False)
class Removal:
    """How an edge is removed.

    The reader's port, before any rotary embedding, gets ``f R~ (r(t) - O z(t)) / s(t)`` added, where r replaces what
    the writer writes. Where scalars move, it gets ``R~ (x'/s(x') - x/s(x))`` with ``x' = x + f (r - O z)``.

    Attributes:
        replacement: r is the writer's mean over tokens, or what it writes at the same place of the next sequence.
        scalars: the norm scalar is held at its value of the run, or follows the stream without the edge.
        fraction: f, how much of it is removed; 1 is all.
        means: writers' means, (d,) each, by label; a writer that is not there gets its mean over the pass.
    """

    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    fraction: float = 1.0
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if self.replacement not in ("mean", "resample") or self.scalars not in ("held", "move"):
            raise UsageError(
                f"a removal by {self.replacement!r} with scalars {self.scalars!r}",
                expected="mean or resample; held or move",
                do="choose one of these",
            )

    def change(self, stream: Stream, edge: Edge, written: Tensor, x: Tensor) -> Tensor:
        """What is added to the port: (B, T, k), of ``O z`` (B, T, d) and the stream x (B, T, d) at the reader."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        written = written.to(x)
        if self.replacement == "mean":
            mean = self.means.get(str(edge.writer))
            instead = written.mean((0, 1)) if mean is None else mean.to(written)
        else:
            instead = written.roll(-1, 0)
        moved, norm, eps = self.fraction * (instead - written), stream.spec.norm, stream.spec.norm_eps
        s = scale(x, norm, eps)[..., None]
        if self.scalars == "move":
            without = x + moved
            return (without / scale(without, norm, eps)[..., None] - x / s) @ edge.maps(stream, x).T
        return moved @ edge.maps(stream, x).T / s


@contextmanager
def removed(
    model: nn.Module,
    stream: Stream,
    edges: Sequence[Edge],
    how: Removal | None = None,
    known: Mapping[Place, Tensor] | None = None,
) -> Generator[None]:
    """Let the model run without an edge; several edges along the batch, each removed from its own block of it.

    With E edges a batch has E times B sequences, and block i runs without edge i alone. All else is the model's own.

    Args:
        model: what runs, see ``load``.
        stream: the same model, with the norm's gain in its readers.
        edges: one per block of the batch.
        how: ``Removal()`` where None.
        known: what an earlier run on the same batch showed of blocks that do not run in this one, see ``restarted``.

    Raises:
        UsageError: readers without gain; while it runs, a batch that is no multiple of the edges, or fewer than two
            sequences where each gets another's.

    Example:
        >>> with removed(model, stream, [Edge.of(stream, "L16H0", "L18H6.K")]):  # doctest: +SKIP
        ...     logits = model(tokens).logits
    """
    if not stream.folded:
        raise UsageError("removal needs the norm's gain in the readers", expected="folded", do="open it folded")
    how = how or Removal()
    written = [Written.of(stream, edge.writer) for edge in edges]
    wanted: set[Place] = {*(("state", edge.state) for edge in edges), *(each.place for each in written)}
    seen: dict[Place, Tensor] = dict(known or {})

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        if (kind, layer) in wanted:
            seen[kind, layer] = tensor

    def without(role: str, layer: int | None) -> Any:
        own = [i for i, edge in enumerate(edges) if (edge.role, edge.reader.layer) == (role, layer)]

        def hook(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
            output = output.clone()
            ports = {edges[i].port: split(stream, role, output) for i in own}  # views: what is added stays
            for i in own:
                block = _block(len(output), len(edges), i, how.replacement)
                port = ports[edges[i].port][block]
                target = port[..., edges[i].row(stream), :] if edges[i].reader.kind == "head" else port
                o_z = written[i](seen[written[i].place]).expand(len(output), -1, -1)[block]
                x = seen["state", edges[i].state][block]
                target[..., edges[i].inner] += how.change(stream, edges[i], o_z, x)
            return output

        return module_of(model, stream, role, layer).register_forward_hook(hook)

    with ExitStack() as stack:
        stack.enter_context(watching(model, stream, {kind for kind, _ in wanted}, see))
        for role, layer in {(edge.role, edge.reader.layer) for edge in edges}:
            stack.callback(without(role, layer).remove)
        yield


def _block(size: int, edges: int, i: int, replacement: Replacement) -> slice:
    each = size // edges
    if size % edges or (replacement == "resample" and each < 2):
        raise UsageError(
            f"a batch of {size} sequences for {edges} edges",
            expected=f"a multiple of {edges if replacement == 'mean' else 2 * edges} sequences",
            do="repeat the batch once per edge",
        )
    return slice(i * each, (i + 1) * each)
