"""The law of reading: a model executed again from the maps of its stream alone computes what transformers computes.

From embeddings to logits, in order of depth: every branch reads a state through its maps, turns and scales its queries
and keys, and writes through its maps. Compared are the state after every layer, the scores between all pairs of
positions (as logarithms of attention patterns, a constant per row aside), and the logits. Where a head attends by more
than its scores (windows, sinks, biases by distance) is outside of the maps: patterns are transformers' own.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conformance.checkpoints import Flavour, NotBuildable, build, prompt
from torch import Tensor, nn
from transformers.activations import ACT2FN

import virtual_weights as vw
from virtual_weights.stream.effective import port_scale, projection

EXACT = 1e-5
"""Relative error below which a reading is right; rotary angles and norms of transformers are in float32."""
_SEEN = 1e-30  # attention below this has lost its logarithm


@dataclass(frozen=True)
class Verdict:
    """What became of one checkpoint.

    Attributes:
        name: ``type/flavour``.
        verdict: ``conformant``, ``wrong``, ``refused``, ``crashed`` or ``not buildable``.
        error: largest relative error, None where nothing was compared.
        where: the first place beyond ``EXACT``, else that of the largest error.
        text: the refusal, traceback or reason.
    """

    name: str
    verdict: str
    error: float | None = None
    where: str = ""
    text: str = ""


@dataclass
class Trace:
    """What transformers computed on a prompt: states before the first and after every layer, (layers + 1, T, d)."""

    model: nn.Module
    states: list[Tensor] = field(default_factory=list)
    patterns: list[Tensor | None] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def judge(
    model_type: str, flavour: Flavour, folder: Path, run_refused: bool = True, table: Path | None = None
) -> Verdict:
    """Build a checkpoint in a folder, open it, and compare; what is refused is run too, unless nobody wants to know
    whether transformers could. A table goes before the one built in."""
    name = f"{model_type}/{flavour.name}"
    try:
        model = build(model_type, flavour, folder)
        tokens = prompt(model)
    except NotBuildable as reason:
        return Verdict(name, "not buildable", text=str(reason))
    try:
        stream = vw.open(folder, table=table).to(torch.float64)
    except vw.VirtualWeightsError as refusal:
        reason = _fails(model, tokens) if run_refused else ""
        return Verdict(name, "not buildable", text=reason) if reason else Verdict(name, "refused", text=str(refusal))
    except Exception:  # noqa: BLE001 - that is what is looked for
        return Verdict(name, "crashed", text=traceback.format_exc())
    if reason := _fails(model, tokens):
        return Verdict(name, "not buildable", text=reason)
    try:
        longest = min(
            (part.rotary.longest or len(tokens) for part in stream.spec.attentions if part.rotary), default=12
        )
        tokens = tokens[:longest]  # other frequencies hold beyond, as the spec says
        with torch.no_grad():
            return _verdict(name, list(errors(stream, tokens, run(model, tokens))))
    except Exception:  # noqa: BLE001
        return Verdict(name, "crashed", text=traceback.format_exc())


def _fails(model: nn.Module, tokens: Tensor) -> str:
    """Why transformers itself cannot run a model, without any hook of ours; nothing where it can."""
    try:
        with torch.no_grad():
            copy.deepcopy(model)(tokens[None], use_cache=False)
    except Exception as reason:  # noqa: BLE001 - whatever it is
        return f"does not run: {type(reason).__name__}: {reason}"
    return ""


def _verdict(name: str, sites: list[tuple[str, float]]) -> Verdict:
    beyond = next(((where, error) for where, error in sites if not error <= EXACT), None)  # NaN is beyond too
    where, error = beyond or max(sites, key=lambda site: site[1])
    return Verdict(name, "conformant" if beyond is None else "wrong", error, where)


def run(model: nn.Module, tokens: Tensor) -> Trace:
    """Run transformers on a prompt in float64, or in float32 where it cannot, on a copy: dynamic scaling stays."""
    try:
        return _run(copy.deepcopy(model).double(), tokens)
    except (RuntimeError, TypeError):
        return _run(copy.deepcopy(model), tokens)


def _run(model: Any, tokens: Tensor) -> Trace:
    trace, hooks = Trace(model), []

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        state = args[0] if args else keywords["hidden_states"]
        trace.states.append(state[0].detach().double())

    def after(module: nn.Module, args: Any, out: Any) -> None:
        trace.states.append(
            (out[0] if isinstance(out, tuple | list) else out).reshape(len(tokens), -1).detach().double()
        )

    layers = decoder_layers(model)
    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        with torch.no_grad():
            out = model(tokens[None], output_attentions=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    patterns = getattr(out, "attentions", None) or [None] * len(layers)
    trace.patterns = [None if pattern is None else pattern[0].double() for pattern in patterns]
    trace.logits = out.logits[0].double()
    return trace


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: the longest list of modules that is in no other such list."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [part for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return list(max(outer, key=len))


def errors(stream: Any, tokens: Tensor, trace: Trace) -> Iterator[tuple[str, float]]:
    """Relative error of every site in order of depth, ``||ours - theirs|| / ||theirs||``.

    What no reader sees is not compared: the mean over coordinates of the states, where every norm takes it away, and
    the mean of the logits over the vocabulary.
    """
    replay = Replay(stream, tokens, trace)
    yield "embedding", _relative(replay.state(0), trace.states[0], stream.spec.centring)
    for group in stream.groups:
        if group.kind == "head":
            yield from replay.attention(group)
        elif group.kind == "mlp":
            replay.mlp(group)
        last = [g for g in stream.groups if g.layer == group.layer][-1]
        if group.layer is not None and group is last:
            state = replay.state(max(g.writes[-1] for g in stream.groups if g.layer == group.layer and g.writes))
            yield (
                f"state after layer {group.layer}",
                _relative(state, trace.states[group.layer + 1], stream.spec.centring),
            )
    logits, cap = trace.logits, stream.spec.head.cap
    if cap is not None:
        logits = cap * (logits / cap).atanh()
    yield "logits", _relative(replay.logits(), logits, centred=True)


def _relative(ours: Tensor, theirs: Tensor, centred: bool) -> float:
    if centred:
        ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


class Replay:
    """The states of a stream on a prompt, computed from its maps; patterns are transformers' own."""

    def __init__(self, stream: Any, tokens: Tensor, trace: Trace) -> None:
        self.stream, self.model = stream, trace.model
        self.writes: list[tuple[int, Tensor]] = []
        self.attended = iter(trace.patterns)
        for group in stream.groups:
            if group.kind in ("embed", "pos"):
                columns = tokens if group.kind == "embed" else torch.arange(len(tokens))
                self.writes.append((group.writes[0], stream.write(group)[0].double()[:, columns].T))

    def state(self, number: int) -> Tensor:
        """The sum of what was written up to a state, (T, d)."""
        return torch.stack([vector for position, vector in self.writes if position <= number]).sum(0)

    def read(self, port: str, group: Any, maps: Any = None) -> Tensor:
        """What a port receives, (T, m, k)."""
        x, read = self.state(group.reads), maps or self.stream.read(port, group)
        values = torch.einsum("mkd,td->tmk", read.maps.double(), x) / self.stream.scale(x, group)[:, None, None]
        return values if read.constants is None else values + read.constants.double()

    def through_port_norm(self, port: str, group: Any) -> Tensor:
        """Queries or keys over the scalar of their norm, (T, m, k)."""
        values, part = self.read(port, group), self.stream.spec.branch(group.id).part
        if part.port_norm is None:
            return values
        plain = self.read(port, group, projection(self.stream, port, group))
        values = values / port_scale(self.stream, port, group, plain)[..., None]
        shift = self.stream.read(port, group).shift
        return values if shift is None else values + shift.double()

    def scores(self, group: Any) -> Tensor:
        """``scale q_m^T R_(m-n)^T k_n`` of every head, capped, (heads, T, T); 0 above the diagonal.

        Behind a norm with gains after rotary there is no such law: then ``q_m^T R_m^T G R_n k_n`` with maps less G.
        """
        part = self.stream.spec.branch(group.id).part
        q, k = (self.through_port_norm(port, group) for port in "QK")
        after = part.port_norm is not None and part.port_norm.after_rotary
        if after:
            gains = [self.stream.weight(role, group) for role in ("q_norm", "k_norm")]
            gain = 1.0 if gains[0] is None else gains[0].double() * gains[1].double()
            turns = torch.stack([self.stream.rotation(place, group).double() for place in range(len(q))])
            q, k = (torch.einsum("tij,tmj->tmi", turns, x) for x in (q, k / gain))
            q = q * gain
        k = k.repeat_interleave(group.sharing, dim=1)
        scores = torch.zeros(q.shape[1], len(q), len(q), dtype=torch.float64)
        for offset in range(len(q)):
            turn = None if after else self.stream.rotation(offset, group)
            query = q[offset:] if turn is None else q[offset:] @ turn.double().mT
            scores += torch.diag_embed(torch.einsum("tmk,tmk->mt", query, k[: len(q) - offset]), -offset)
        scores = scores * part.scale
        return scores if part.cap is None else part.cap * (scores / part.cap).tanh()

    def attention(self, group: Any) -> Iterator[tuple[str, float]]:
        """Compare scores with patterns, then write what the heads attend to."""
        scores, pattern = self.scores(group), next(self.attended)
        if pattern is None:
            masked = torch.ones_like(scores[0]).triu(1).bool()
            pattern = scores.masked_fill(masked, float("-inf")).softmax(-1)
        else:
            outside = self.stream.spec.branch(group.id).part.outside
            yield f"scores of {group.id}", score_error(scores, pattern, "alibi" in outside)
            if "sinks" in outside and bool((pattern.sum(-1) > 1 - EXACT).all()):  # reported before what the sinks take
                total = scores.masked_fill(pattern <= _SEEN, float("-inf")).logsumexp(-1)
                sinks = self.stream.weight("sinks", group).double()[:, None]
                pattern = pattern * (total - sinks).sigmoid()[..., None]
        v = self.read("V", group).repeat_interleave(group.sharing, dim=1)
        self.write(group, torch.einsum("mtu,umk->tmk", pattern, v))

    def mlp(self, group: Any) -> None:
        """Write what the neurons do."""
        act = self.activation(group)
        if "gate" in group.ports:
            inner = act(self.read("gate", group)) * self.read("up", group)
        else:
            inner = act(self.read("in", group))
        self.write(group, inner)

    def activation(self, group: Any) -> Any:
        """The nonlinearity by its name; one with weights of its own is taken from the module."""
        name = self.stream.spec.branch(group.id).part.activation
        learned = [
            part for part in decoder_layers(self.model)[group.layer].modules() if "xielu" in type(part).__name__.lower()
        ]
        return learned[0] if learned else ACT2FN[name]

    def write(self, group: Any, inner: Tensor) -> None:
        """Add what a group and its bias write, over the scalar of a norm after the part."""
        within = self.stream.spec.branch(group.id).inner
        if within is not None:
            inner = inner / (inner.square().mean((1, 2), keepdim=True) + within.eps).sqrt()
        out = torch.einsum("mdk,tmk->td", self.stream.write(group).double(), inner)
        bias = f"{group.id}.bias"
        if bias in self.stream.groups:
            out = out + self.stream.write(bias).double()[0, :, 0]
        self.writes.append((group.writes[0], out / self.after_scale(group, inner)))

    def after_scale(self, group: Any, inner: Tensor) -> Tensor:
        """The scalar of the norm on what a part gives, (T, 1); 1 where there is none."""
        norm = self.stream.spec.branch(group.id).after
        if norm is None:
            return torch.ones(1, dtype=torch.float64)
        role = "o" if group.kind == "head" else "down"
        maps, bias = self.stream.weight(role, group), self.stream.weight("bias", f"{group.id}.bias")
        out = torch.einsum("mdk,tmk->td", (maps if maps.ndim == 3 else maps[None]).double(), inner)
        out = out if bias is None else out + bias.double()
        if norm.kind == "layer":
            out = out - out.mean(-1, keepdim=True)
        return (out.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    def logits(self) -> Tensor:
        """Logits before their cap, less what is the same for all tokens, (T, tokens)."""
        return self.read("unembed", self.stream.groups["unembed"])[:, 0]


def score_error(scores: Tensor, pattern: Tensor, alibi: bool) -> float:
    """Relative error of scores (heads, T, T) against the logarithms of a pattern, a constant per row aside.

    Where attention is biased by distance, a slope per head is aside as well: one number for all pairs of positions.
    """
    open_pairs = pattern > _SEEN

    def within_rows(x: Tensor) -> Tensor:
        x = x.masked_fill(~open_pairs, 0)
        return (x - x.sum(-1, keepdim=True) / open_pairs.sum(-1, keepdim=True).clamp(min=1)).masked_fill(~open_pairs, 0)

    theirs = within_rows(pattern.clamp(min=_SEEN).log())
    rest = theirs - within_rows(scores)
    if alibi:
        distance = torch.arange(scores.shape[-1], dtype=torch.float64).expand_as(scores)
        distance = within_rows(distance)
        slope = (rest * distance).sum((-2, -1), keepdim=True) / distance.square().sum((-2, -1), keepdim=True)
        rest = rest - slope * distance
    return float(rest.norm() / theirs.norm())
