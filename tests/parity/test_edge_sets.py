"""Sets of edges removed at once equal a computation that sums every writer's output itself, port by port."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import in_float64
from torch import Tensor

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.linalg import mean_estimate
from virtual_weights.record import Record
from virtual_weights.runtime.edges.ablation import EdgeAblation, EdgeSetAblation

pytestmark = pytest.mark.usefixtures("full_precision")

CLEAN, CORRUPTED = torch.randint(0, 37, (2, 5, 7), generator=torch.Generator().manual_seed(4))
EDGES = [("L0H1", "L2H4.K"), ("L0H1", "L1H2.V"), ("L1H2", "L2H4.K"), ("L1.mlp", "L2H0.Q"), ("L1H3", "L2H0.Q")]
Removed = Callable[[str, str], bool]
"""Whether a writer is removed from a reader, both by name; of heads that share a key or value the first names it."""


class Dense:
    """A tiny model with its own hooks: what every writer writes, and ports that read a sum over writers."""

    def __init__(self, model: Any) -> None:
        self.model, self.gpt2 = model, hasattr(model, "transformer")
        body = model.transformer if self.gpt2 else model.model
        self.blocks = body.h if self.gpt2 else body.layers
        self.embeds = {"embed": body.wte, "pos": body.wpe} if self.gpt2 else {"embed": body.embed_tokens}
        self.heads = 4 if self.gpt2 else 6
        self.kv_heads, self.width = (4, 6) if self.gpt2 else (2, 4)

    def run(self, tokens: Tensor, removed: Removed, instead: dict[str, Tensor], move: bool) -> tuple[Tensor, Any]:
        """Logits, and what every writer wrote."""
        self.wrote: dict[str, Tensor] = {}
        with self._hooks(removed, instead, move), torch.no_grad():
            return self.model(tokens).logits, self.wrote

    @contextmanager
    def _hooks(self, removed: Removed, instead: dict[str, Tensor], move: bool) -> Generator[None]:
        hooks = []
        for name, embed in self.embeds.items():
            hooks.append(embed.register_forward_hook(lambda _m, _g, out, name=name: self.wrote.update({name: out})))
        for i, block in enumerate(self.blocks):
            attention = block.attn if self.gpt2 else block.self_attn
            o, down = (attention.c_proj, block.mlp.c_proj) if self.gpt2 else (attention.o_proj, block.mlp.down_proj)
            norm = block.ln_1 if self.gpt2 else block.input_layernorm
            hooks.append(o.register_forward_pre_hook(lambda m, given, i=i: self._heads(i, m, given[0])))
            hooks.append(down.register_forward_pre_hook(lambda m, given, i=i: self._mlp(i, m, given[0])))
            hooks.append(norm.register_forward_pre_hook(lambda _m, given, i=i: self._state(i, given[0])))
            if self.gpt2:
                readers = [(attention.c_attn, "QKV")]
            else:
                readers = [(attention.q_proj, "Q"), (attention.k_proj, "K"), (attention.v_proj, "V")]
            for module, ports in readers:
                change = lambda m, _g, out, i=i, p=ports, n=norm: out + self._change(i, m, n, p, removed, instead, move)  # noqa: E731
                hooks.append(module.register_forward_hook(change))
        yield
        for hook in hooks:
            hook.remove()

    def _weight(self, module: Any) -> Tensor:
        return module.weight.T if self.gpt2 else module.weight

    def _heads(self, layer: int, module: Any, z: Tensor) -> None:
        for h in range(self.heads):
            part = slice(h * z.shape[-1] // self.heads, (h + 1) * z.shape[-1] // self.heads)
            self.wrote[f"L{layer}H{h}"] = z[..., part] @ self._weight(module)[:, part].T

    def _mlp(self, layer: int, module: Any, z: Tensor) -> None:
        self.wrote[f"L{layer}.mlp"] = z @ self._weight(module).T

    def _state(self, layer: int, x: Tensor) -> None:
        self.state = x

    def _change(
        self, layer: int, module: Any, norm: Any, ports: str, removed: Removed, instead: dict[str, Tensor], move: bool
    ) -> Tensor:
        """What a projection gives less or more where some writers are removed, head by head."""

        def normed(x: Tensor, by: Tensor) -> Tensor:
            x, by = (y - y.mean(-1, keepdim=True) if self.gpt2 else y for y in (x, by))
            eps = norm.eps if self.gpt2 else norm.variance_epsilon
            return x / (by.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight

        parts = []
        for port in ports:
            count = self.heads if port == "Q" else self.kv_heads
            for head in range(count):
                name = f"L{layer}H{head * self.heads // count}.{port}"
                gone = [writer for writer in self.wrote if removed(writer, name)]
                without = self.state + sum(
                    (instead[writer] - self.wrote[writer] for writer in gone), torch.zeros_like(self.state)
                )
                parts.append(normed(without, without if move else self.state) - normed(self.state, self.state))
        weight = self._weight(module)
        rows = weight.unflatten(0, (len(parts), -1))
        return torch.cat([part @ row.T for part, row in zip(parts, rows, strict=True)], -1)


def first(stream: vw.Stream, reader: str) -> str:
    """The first name of the heads that share what this one reads through."""
    shared = stream.groups.of(reader).shared(reader[-1])
    head = int(reader[3]) // shared * shared
    return f"{reader[:3]}{head}{reader[4:]}"


def loss(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, CLEAN[:, 1:], reduction="none").mean(1)


def quantities(record: Record) -> dict[str, tuple[float, float, float]]:
    return {str(r["quantity"]): (r["value"], r["low"], r["high"]) for r in record.rows()}  # type: ignore[misc]


@pytest.mark.parametrize("scalars", ["held", "move"])
@pytest.mark.parametrize("replacement", ["mean", "partner"])
@pytest.mark.parametrize(("name", "others"), [("llama-grouped-untied", "readers"), ("gpt2", "ports")])
def test_a_set_is_removed_kept_and_taken_apart(name: str, others: Any, replacement: Any, scalars: Any) -> None:
    model, stream = in_float64(name)
    edges = [(w, r) for w, r in EDGES if int(r[3]) < len(stream.groups.heads[0].labels)]
    edges += [("L0H1", "L2H3.K")] if name == "gpt2" else []
    dense, nothing = Dense(model), lambda _writer, _reader: False
    clean, wrote = dense.run(CLEAN, nothing, {}, False)
    if replacement == "mean":
        instead = {writer: x.mean((0, 1)) for writer, x in wrote.items()}
    else:
        instead = {writer: x.clone() for writer, x in dense.run(CORRUPTED, nothing, {}, False)[1].items()}
    members = {(writer, first(stream, reader)) for writer, reader in edges}
    readers, ports = {reader for _, reader in members}, {reader[-1] for _, reader in members}
    inside: Callable[[str], bool] = lambda r: r in readers if others == "readers" else r[-1] in ports  # noqa: E731

    def effect(removed: Removed) -> Tensor:
        return loss(dense.run(CLEAN, removed, instead, scalars == "move")[0]) - loss(clean)

    removed = effect(lambda w, r: (w, r) in members)
    kept = effect(lambda w, r: inside(r) and (w, r) not in members)
    everything = effect(lambda w, r: inside(r))
    singles = sum((effect(lambda w, r, pair=pair: (w, r) == pair) for pair in members), torch.zeros(5))
    run = vw.Run.on_pairs(stream, list(CLEAN), list(CORRUPTED), model=model)
    record = EdgeSetAblation(edges, others, replacement, scalars, batch=3)(run)
    values = quantities(record)
    expected = {"removed": removed, "kept": kept, "all_removed": everything}
    expected |= {"sum_of_singles": singles, "interaction": removed - singles}
    for quantity, effects in expected.items():
        estimate = mean_estimate(effects)
        assert values[quantity] == pytest.approx(
            (float(estimate.mean), float(estimate.low), float(estimate.high)), rel=1e-9, abs=1e-9
        ), quantity
    assert min(abs(float(effects.mean())) for effects in expected.values()) > 1e-6
    whole = mean_estimate(everything)
    if float(whole.low) <= 0 <= float(whole.high):
        assert "faithfulness" not in values
    else:
        assert values["faithfulness"][0] == pytest.approx(float(1 - kept.mean() / everything.mean()), rel=1e-9)


def test_a_set_that_is_all_there_is_keeps_everything() -> None:
    """With every writer of a reader in the set, removing the others does nothing: faithfulness 1."""
    model, stream = in_float64("llama-grouped-untied")
    writers = ["embed", *(str(head.label) for head in stream.heads), *(f"L{layer}.mlp" for layer in range(3))]
    run = vw.Run.on_tokens(stream, torch.cat([CLEAN, CORRUPTED]), model=model)
    record = EdgeSetAblation([(writer, "unembed") for writer in writers])(run)
    values = quantities(record)
    assert values["kept"] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert values["removed"] == pytest.approx(values["all_removed"], rel=1e-9)
    assert values["faithfulness"] == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    one = quantities(EdgeSetAblation([("L0H1", "L1H0.V"), ("L0H1", "L1H2.V")])(run))
    alone = next(EdgeAblation("L0H1", "L1H0.V")(run).rows())
    assert one["removed"][0] == pytest.approx(alone["effect_nats"], rel=1e-9)
    assert one["interaction"] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12), "two names of one edge"


@pytest.mark.parametrize(
    "edges",
    [[("L0.mlp", "L1H0.V"), ("L0N3", "L1H0.V")], [("L0H1", "L1.mlp.up"), ("L0H1", "L1N4.up")]],
)
def test_what_would_be_removed_twice_is_refused(edges: list[tuple[str, str]]) -> None:
    model, stream = in_float64("llama-grouped-untied")
    with pytest.raises(UsageError, match="overlap: one contains the other"):
        EdgeSetAblation(edges)(vw.Run.on_tokens(stream, CLEAN, model=model))
    apart = [edges[0], (edges[1][0], "L2H0.Q")]
    values = quantities(EdgeSetAblation(apart)(vw.Run.on_tokens(stream, CLEAN, model=model)))
    assert all(math.isfinite(values[name][0]) for name in ("removed", "kept", "all_removed", "interaction"))


def test_all_that_leads_into_the_ports_of_a_neuron_is_refused() -> None:
    """The rest of its MLP reads through the same map, so its rows would lose everything twice."""
    model, stream = in_float64("llama-grouped-untied")
    run = vw.Run.on_tokens(stream, CLEAN, model=model)
    with pytest.raises(UsageError, match=r"L0H1 -> L1N3\.up") as refused:
        EdgeSetAblation([("L0H1", "L1N3.up")], "ports")(run)
    assert "the MLP" in refused.value.do
    assert "others='readers'" in refused.value.do
    whole = quantities(EdgeSetAblation([("L0H1", "L1.mlp.up")], "ports")(run))
    again = quantities(EdgeSetAblation([("L0.mlp", "L1.mlp.up")], "ports")(run))
    assert whole["all_removed"] == pytest.approx(again["all_removed"], rel=1e-9)
