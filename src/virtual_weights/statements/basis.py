"""L1: is the stream free of a privileged basis?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate, haar_orthogonal
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell
from virtual_weights.stream import Stream, scale

_SAME = 1e-9  # relative, in float64: rounding of a product over the stream is far below, a gain far above
_STATES = 64


def no_privileged_basis(bench: Bench) -> Finding:
    """L1: turn every reader and writer by one random orthogonal matrix, with the norm folded and without."""
    stream = bench.stream
    if not stream.model.has("embed") or not stream.heads:
        return cannot_tell("the checkpoint lacks its embedding or its attention")
    generator = torch.Generator().manual_seed(bench.seed)
    turn = haar_orthogonal(stream.d_model, generator)
    skew = turn * torch.logspace(-0.5, 0.5, stream.d_model, dtype=accumulate)  # invertible, not orthogonal
    bare = replace(stream, folded=False)
    layers = bench.chosen(stream.attention_layers[1:] or stream.attention_layers, 4)
    centred = stream.spec.norm == "layer"
    states = _states(stream, bench)
    centred_states = states - states.mean(-1, keepdim=True) if centred else states
    evidence: dict[str, Figure] = {
        "virtual_weights_folded": max(_moved(stream, None, layer, turn) for layer in layers),
        "virtual_weights_gains_left_in_place": max(_moved(stream, bare, layer, turn) for layer in layers),
        "norm_scalar_orthogonal_centred": _scalar_moved(centred_states, turn, "rms"),
        "norm_scalar_orthogonal": _scalar_moved(states, turn, stream.spec.norm),
        "norm_scalar_not_orthogonal": _scalar_moved(centred_states, skew, "rms"),
    }
    evidence["kurtosis_of_writes"] = _kurtosis(stream, layers)
    evidence["kurtosis_of_writes_turned"] = _kurtosis(stream, layers, turn)
    folded = max(float(evidence[n] or 0) for n in ("virtual_weights_folded", "norm_scalar_orthogonal_centred"))
    plain = max(float(evidence[n] or 0) for n in ("virtual_weights_gains_left_in_place", "norm_scalar_orthogonal"))
    if folded > _SAME:
        return Finding("fails", f"turned readers and writers differ by {folded:.2g} though folded", None, evidence)
    if plain <= _SAME:
        return Finding("holds", "turning changes nothing even with the gains left in the norm", None, evidence)
    condition = "gains folded into the readers, and orthogonal maps only"
    if centred:
        condition = "gains folded into the readers, writers centred, and orthogonal maps only"
    why = f"turned, virtual weights move by {folded:.1g} when folded and by {plain:.2g} when the norm is left as it is"
    return Finding("holds under", why, condition, evidence)


def _states(stream: Stream, bench: Bench) -> Tensor:
    """Some states of the stream at its beginning, (n, d)."""
    embed = stream.write("embed")[0]
    tokens = bench.chosen(range(embed.shape[1]), _STATES)
    states = embed[:, tokens].T.to(accumulate)
    return states[states.abs().sum(1) > 0]


def _moved(stream: Stream, bare: Stream | None, layer: int, turn: Tensor) -> float:
    """Relative change of what a layer's keys read of the embedding and of an earlier head, when all is turned.

    ``bare``: the gain stays in the norm, between a turned reader and a turned writer.
    """
    writer = stream.write("head", stream.attention_layers[0])[0].to(accumulate)
    if stream.spec.norm == "layer":
        writer = writer - writer.mean(0)
    if bare is None:
        read = stream.read("K", layer).maps[0].to(accumulate)
        before, after = read @ writer, (read @ turn.T) @ (turn @ writer)
    else:
        read, gain = bare.read("K", layer).maps[0].to(accumulate), stream.weight("attn_norm", layer)
        assert gain is not None
        gain = gain.to(accumulate)
        before, after = (read * gain) @ writer, ((read @ turn.T) * gain) @ (turn @ writer)
    return float(torch.linalg.norm(after - before) / torch.linalg.norm(before))


def _scalar_moved(states: Tensor, by: Tensor, norm: str) -> float:
    before, after = (scale(x, "layer" if norm == "layer" else "rms", 0.0) for x in (states, states @ by.T))
    return float(((after - before).abs() / before).max())


def _kurtosis(stream: Stream, layers: list[int], turn: Tensor | None = None) -> float:
    """Mean over heads' outputs of the kurtosis of a column over the stream's coordinates; 3 has no preferred basis."""
    outs = torch.cat([stream.write("head", layer).to(accumulate).transpose(1, 2).flatten(0, 1) for layer in layers])
    rows = outs if turn is None else outs @ turn.T
    rows = rows - rows.mean(1, keepdim=True)
    each = rows.pow(4).mean(1) / rows.square().mean(1).square()
    return float(each[~each.isnan()].mean())
