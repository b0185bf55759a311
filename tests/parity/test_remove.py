"""Removing an edge equals recomputing the reader's port by the model's own modules, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.edge import Edge, Removal, affected, removed
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.runtime.running.hooks import module_of
from virtual_weights.stream import Stream
from virtual_weights.stream.group import READINGS

TOKENS = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(5))
WRITERS = ("L0H1", "L0.mlp", "L0N3", "embed")


def seen_by(model: nn.Module, places: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs and outputs of modules, and the logits, of a run of TOKENS."""
    given: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given[name], gave[name] = inputs[0].detach(), output.detach()

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in places.items()]
    with torch.no_grad():
        logits = model(TOKENS).logits
    for hook in hooks:
        hook.remove()
    return given, gave, logits


def contribution(model: nn.Module, stream: Stream, writer: str) -> Tensor:
    """What a writer writes: the output of its layer's module less that without the writer's own inner part."""
    if writer in ("embed", "pos"):
        _, gave, _ = seen_by(model, {"it": module_of(model, stream, writer, writer)})
        return gave["it"].expand(len(TOKENS), -1, -1)
    module = module_of(model, stream, *(("o", "L0.attn") if "H" in writer else ("down", "L0.mlp")))
    inner = seen_by(model, {"it": module})[0]["it"]
    k = sizes(stream).d_head
    columns = {"L0H1": slice(k, 2 * k), "L0.mlp": slice(None), "L0N3": slice(3, 4)}[writer]
    emptied = inner.clone()
    emptied[..., columns] = 0
    with torch.no_grad():
        return module(inner) - module(emptied)


def recomputed(
    model: nn.Module, stream: Stream, edge: Edge, wrote: Tensor, instead: Tensor | None, move: bool
) -> tuple[Tensor, int]:
    """The output of the reader's module if the port read x less the writer, by the norm's and the module's weights."""
    norm: Any = module_of(model, stream, "norm", edge.target)
    module: Any = module_of(model, stream, READINGS[edge.port], edge.target)
    x = seen_by(model, {"norm": norm})[0]["norm"]
    without = x - wrote + (wrote.mean((0, 1)) if instead is None else instead)

    def normed(state: Tensor, by: Tensor) -> Tensor:
        layered = sizes(stream).norm == "layer"
        by = by - by.mean(-1, keepdim=True) if layered else by
        state = state - state.mean(-1, keepdim=True) if layered else state
        s = (by.square().mean(-1, keepdim=True) + sizes(stream).norm_eps).sqrt()
        return state / s * norm.weight + (norm.bias if layered else 0)

    with torch.no_grad():
        clean, changed = module(norm(x)), module(normed(without, without if move else x))
    return _graft(clean, changed, stream, edge)


def _graft(clean: Tensor, changed: Tensor, stream: Stream, edge: Edge) -> tuple[Tensor, int]:
    """The clean output with the edge's own columns changed, by each family's way of fusing; and how many columns."""
    k, d, index = sizes(stream).d_head, stream.spec.d_model, edge.reader.index or 0
    if edge.reader.kind == "head":
        shared = index if edge.port == "Q" else index // sizes(stream).group
        part = "QKV".index(edge.port)
        start = {"gpt2": part * d + index * k, "gpt_neox": (3 * index + part) * k}.get(stream.model.family, shared * k)
        columns = slice(start, start + k)
    else:
        columns = slice(index, index + 1) if edge.reader.kind == "neuron" else slice(None)
    clean = clean.clone()
    clean[..., columns] = changed[..., columns]
    return clean, clean[..., columns].shape[-1]


def readers(stream: Stream) -> tuple[str, ...]:
    last = stream.spec.n_layers - 1
    mlp = ("gate", "up") if stream.spec.gated else ("in",)
    return (*(f"L{last}H2.{p}" for p in "QKV"), *(f"L{last}.mlp.{p}" for p in mlp), f"L1N5.{mlp[-1]}", "unembed")


def worst(name: str, dtype: torch.dtype, how: Removal) -> float:
    model = tiny(name, dtype=dtype)
    stream = vw.open(model).to(dtype)
    errors = []
    thorough = dtype == torch.float64 and how.replacement == "mean" and how.scalars == "held"
    writers = WRITERS if thorough else ("L0H1", "embed")
    for writer in (*writers, *(("pos",) if thorough and stream.model.has("pos", "pos") else ())):
        wrote = contribution(model, stream, writer)
        for reader in readers(stream):
            edge = Edge.of(stream, writer, reader)
            module = module_of(model, stream, READINGS[edge.port], edge.target)
            instead = torch.stack([wrote[1], wrote[2], wrote[0]]) if how.replacement == "resample" else None
            expected, width = recomputed(model, stream, edge, wrote, instead, how.scalars == "move")
            _, clean, before = seen_by(model, {"port": module})
            with removed(model, stream, [edge], how):
                _, gave, logits = seen_by(model, {"port": module})
            # the run's own hook notes what comes after the removal: hooks run in the order of their placing
            moved = (expected - clean["port"]).norm()
            assert width in (1, sizes(stream).d_head, expected.shape[-1])
            difference = gave["port"] - expected
            if reader == "unembed":  # a logit is one less the mean over the vocabulary
                difference = difference - difference.mean(-1, keepdim=True)
            errors.append(float(difference.norm() / expected.norm()))
            assert moved > 1e-3
            assert (logits - before).abs().max() > 1e-6
    return max(errors)


@pytest.mark.parametrize("how", [Removal(), Removal("resample"), Removal(scalars="move")], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_recomputation_by_the_models_own_modules(name: str, how: Removal) -> None:
    with norms_in_full_precision():
        assert worst(name, torch.float64, how) <= 1e-9


@pytest.mark.parametrize("name", SHAPES)
def test_in_float32(name: str) -> None:
    assert worst(name, torch.float32, Removal()) <= 1e-5


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_stacked_edges_are_each_alone(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    edges = [Edge.of(stream, w, r) for w, r in (("L0H1", "L2H2.K"), ("L0H1", "L1H3.V"), ("embed", "L2H2.K"))]
    edges += [Edge.of(stream, "L1.mlp", "unembed"), Edge.of(stream, "L0H0", "L2H0.Q")]
    with torch.no_grad():
        with removed(model, stream, edges):
            together = model(TOKENS.repeat(5, 1)).logits.unflatten(0, (5, 3))
        for edge, logits in zip(edges, together, strict=True):
            with removed(model, stream, [edge]):
                assert torch.allclose(model(TOKENS).logits, logits, rtol=0, atol=1e-10)
    assert len({round(float(x.sum()), 6) for x in together}) == 5


def test_a_mean_of_the_whole_text_and_a_fraction() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    edge = Edge.of(stream, "L0H1", "L2H2.K")
    wrote = contribution(model, stream, "L0H1")
    port = {"port": module_of(model, stream, "k", "L2.attn")}
    clean = seen_by(model, port)[1]["port"]
    other = torch.linspace(-1, 1, 24, dtype=torch.float64)
    with removed(model, stream, [edge], Removal(means={"L0H1": other})), norms_in_full_precision():
        without = seen_by(model, port)[1]["port"]
    instead = other.expand_as(wrote)
    with norms_in_full_precision():
        expected, _ = recomputed(model, stream, edge, wrote, instead, move=False)
    assert torch.allclose(without, expected, rtol=0, atol=1e-6)
    with removed(model, stream, [edge], Removal(fraction=0.25, means={"L0H1": other})):
        quarter = seen_by(model, port)[1]["port"]
    assert torch.allclose(quarter - clean, (without - clean) / 4, rtol=0, atol=1e-6)


def test_an_edge_says_which_heads_share_its_group() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    edge = Edge.of(stream, "L0H1", "L2H4.K")
    assert (edge.kv_group, edge.shared_with, str(edge)) == ("L2.kv1", ("L2H3", "L2H5"), "L0H1 -> L2H4.K")
    assert edge.key == Edge.of(stream, "L0H1", "L2H3.K").key != Edge.of(stream, "L0H1", "L2H3.V").key
    assert Edge.of(stream, "L0H1", "L2H4.Q").kv_group is None
    write = affected(stream, edge)
    assert write is not None
    assert (write.place, write.components) == (("inner", "L2.attn"), slice(3, 6))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("L1H0", "L1H1.K"),
        ("L2H0", "L1H1.K"),
        ("L1.mlp", "L1.mlp.up"),
        ("unembed", "L1H1.K"),
        ("L0H0.O", "L1H1.K"),
        ("L0H0", "L1H1"),
        ("L0H0", "L1H1.O"),
        ("L0H0", "L1.mlp.in"),
        ("L0H0", "L1.mlp"),
        ("L0H9", "L1H1.K"),
        ("L0N99", "L1H1.K"),
        ("L0H0", "L9H1.K"),
        ("L0.mlp.bias", "L1H1.K"),
        ("L0H0", "embed"),
    ],
)
def test_refused(writer: str, reader: str) -> None:
    stream = vw.open(tiny("llama-biases-wide-heads"))
    with pytest.raises(UsageError):
        Edge.of(stream, writer, reader)


def test_refused_while_running() -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    edge = Edge.of(stream, "L0H1", "L2H2.K")
    with pytest.raises(UsageError, match="3 sequences for 2 edges"), removed(model, stream, [edge, edge]):
        model(TOKENS)
    with pytest.raises(UsageError, match="1 sequences"), removed(model, stream, [edge], Removal("resample")):
        model(TOKENS[:1])
    with pytest.raises(UsageError, match="removal"):
        Removal("zero")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gain"), removed(model, vw.open(model, fold=False), [edge]):
        pass


def test_nothing_is_left_behind() -> None:
    """No hook stays, and who looked at the port before the removal keeps what it saw."""
    model = tiny("gpt2")
    stream = vw.open(model)
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _given: object, output: Tensor) -> None:
        outputs.append(output)

    hook = module_of(model, stream, "k", "L2.attn").register_forward_hook(note)
    with torch.no_grad():
        before = model(TOKENS).logits
        with removed(model, stream, [Edge.of(stream, "L0H1", "L2H2.K")]):
            without = model(TOKENS).logits
        after = model(TOKENS).logits
    hook.remove()
    assert torch.equal(before, after)
    assert not torch.equal(before, without)
    assert torch.equal(outputs[0], outputs[1])


def test_the_loss_is_that_of_transformers() -> None:
    model = tiny("llama-full")
    with torch.no_grad():
        out = model(TOKENS, labels=TOKENS)
    assert torch.allclose(next_token_loss(out.logits, TOKENS).mean(), out.loss, rtol=1e-5, atol=0)
    late = next_token_loss(out.logits, TOKENS, 4)
    logs = out.logits.log_softmax(-1)[1, [3, 4, 5], TOKENS[1, [4, 5, 6]]]
    assert torch.allclose(late[1], -logs.mean(), rtol=1e-5, atol=0)
