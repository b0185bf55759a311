"""Neurons as memory management: whether what a neuron writes strengthens or weakens what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import sign_eps
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate, beyond_rounding, random_generator
from virtual_weights.linalg.null import cosine_tail
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream
from virtual_weights.stream.group import no_mlps

_COLUMNS = {
    "cosine": ("1, in [-1, 1]", "cos(w_in, w_out); w_in is the up row where the MLP is gated"),
    "gain": ("1 / (slope / s)", "-<w_in, w_out>: clearing gain per unit slope at norm scalar 1; 1 clears <w_in, x>"),
    "strength": ("weights", "||w_in|| ||w_out||"),
    "gate_cosine": ("1, in [-1, 1]", "cos(w_gate, w_out)"),
    "gate_gain": ("1 / (slope / s)", "-<w_gate, w_out>: clearing gain on what the gate reads"),
    "gate_up_cosine": ("1, in [-1, 1]", "cos(w_gate, w_up)"),
}


@final
@dataclass(frozen=True)
class Neurons(Question[Stream]):
    """Cosines between what each neuron reads and what it writes, its clearing gain and its class.

    A neuron adds ``w_out a`` to the stream, ``a = f(<w_in, x>/s)`` or, gated, ``a = f(<w_gate, x>/s) <w_up, x>/s``.
    This changes ``<w_in, x>`` by ``<w_in, w_out> a``, so where ``a = slope <w_in, x>/s`` the **clearing gain** is
    ``g = -<w_in, w_out> slope / s``: between 0 and 1 it attenuates, 1 clears (``w_out = -w_in/||w_in||^2`` where
    slope/s = 1), 2 reflects, a negative one strengthens. The slope of a gated neuron is its activated gate.

    Classes, by the cosine of w_in (the up row where gated; they assume an activated gate above 0, and change places
    where it is below): **strengthening** above the threshold, **weakening** below its negative, **between** otherwise.
    A neuron that reads or writes nothing has strength 0 and no cosine. A cosine that rounding of the stored weights
    explains is 0, and so is its gain.

    Invariant under re-ordering of neurons and, with RMSNorm folded, under rotation of the stream (the shuffled null
    draws pairs of neurons by their order). The cosines are invariant under scaling of a neuron's maps by positive
    factors, the gains under a factor moved from one map to the other.

    Attributes:
        threshold: cosine that divides the classes, in (0, 1).
        shuffles: how many draws of the shuffled null: outputs shifted by a random number of neurons within their layer.
        seed: seed of these draws.

    Reference: Gerstner and Schuetze 2025 (input-output functionality of gated neurons).
    """

    question: ClassVar[str] = "neurons"
    threshold: float = 0.5
    shuffles: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0 or self.shuffles < 0:
            raise UsageError(
                f"threshold {self.threshold}, {self.shuffles} shuffles",
                expected="a cosine in (0, 1) and at least 0 shuffles",
                do="pass for example threshold=0.5",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compare what every neuron reads with what it writes.

        Args:
            stream: the model.
            progress: called with (layers done, layers in all).

        Returns:
            A Record over ``neuron`` with columns ``cosine``, ``gain``, ``strength``; where gated ``gate_cosine``,
            ``gate_gain``, ``gate_up_cosine``; ``class`` and ``layer``. ``stamp["null"]`` is what independent random
            directions and what the model's own, shuffled, would give; ``census`` sums it up.

        Raises:
            UsageError: the checkpoint holds no MLP.
        """
        groups = stream.groups.mlps
        if not groups:
            raise no_mlps()
        generator = random_generator(self.seed)
        blocks: list[dict[str, Tensor]] = []
        counts: list[Tensor] = []
        for done, group in enumerate(groups, 1):
            rows = _rows(stream, group)
            blocks.append(_values(rows, sign_eps(stream)))
            counts += self._shuffled_counts(rows, generator)
            progress(done, len(groups))
        columns = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        layers = [group.layer for group in groups for _ in range(group.width)]
        return stream.record(
            self,
            (Axis("neuron", tuple(name for group in groups for name in group.neurons)),),
            (
                *(Column(name, values, *_COLUMNS[name]) for name, values in columns.items()),
                Column("class", _classes(columns["cosine"], self.threshold), "", "by cosine and threshold"),
                Column("layer", torch.tensor(layers), "layers", "the neuron's"),
            ),
            gauge="neurons: their own basis",
            classes_by=groups[0].ports[-1],
            norm_scalar=1.0,
            slope=1.0,
            null=self._null(counts, stream.d_model),
        )

    def _shuffled_counts(self, rows: dict[str, Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """For each draw what neurons with another's output give: how many, weakening, strengthening, squares."""
        read, out = _unit(rows["in"]), _unit(rows["out"])
        if len(read) < 2:
            return
        for _ in range(self.shuffles):
            shift = int(torch.randint(1, len(read), (), generator=generator))
            cosine = torch.cat([_dot(read[:shift], out[-shift:]), _dot(read[shift:], out[:-shift])])
            cosine = cosine[~cosine.isnan()]
            below, above = (cosine < -self.threshold).sum(), (cosine > self.threshold).sum()
            yield torch.stack([torch.tensor(len(cosine)), below, above, cosine.square().sum()])

    def _null(self, counts: list[Tensor], d: int) -> dict[str, Any]:
        null: dict[str, Any] = {"dimension": d, "tail": cosine_tail(self.threshold, d), "mean_square": 1 / d}
        total = torch.stack(counts).double().sum(0) if counts else torch.zeros(4)
        if bool(total[0]):
            _, below, above, squares = (total / total[0]).tolist()
            null["shuffled"] = {
                "draws": self.shuffles,
                "weakening_share": below,
                "strengthening_share": above,
                "mean_square": squares,
            }
        return null


def census(record: Record) -> dict[str, Any]:
    """Count the classes of a Neurons record, in all and by layer, beside what the nulls would give.

    Returns:
        ``count`` (neurons that have a cosine), ``weakening``, ``strengthening``, ``between``, ``absent``,
        ``threshold``, ``mean_square`` (of the cosine), ``null`` and ``by_layer``. Where gated also ``gate`` and
        ``gate_up``, the counts below and above the threshold of these cosines. In ``null``: ``dimension``, ``tail``,
        ``weakening`` and ``strengthening`` (expected counts for independent uniform directions), their deviation
        ``std``, ``mean_square`` = 1/d, and ``shuffled``: expected counts when outputs change places within a layer.
    """
    threshold, null = float(record.parameters["threshold"]), dict(record.stamp["null"])
    cosine, layer = record.numbers("cosine"), record.numbers("layer")
    counts = _counts(cosine, threshold)
    n, p = counts["count"], null["tail"]
    null |= {"weakening": n * p, "strengthening": n * p, "std": (n * p * (1 - p)) ** 0.5}
    if "shuffled" in null:
        shares = null["shuffled"]
        null["shuffled"] = {**shares, **{name: n * shares[f"{name}_share"] for name in ("weakening", "strengthening")}}
    present = {column.name for column in record.columns}
    return {
        **counts,
        "absent": int(cosine.isnan().sum()),
        "threshold": threshold,
        "mean_square": float(cosine.square().nanmean()) if n else None,
        **{
            name.removesuffix("_cosine"): _counts(record.numbers(name), threshold)
            for name in ("gate_cosine", "gate_up_cosine")
            if name in present
        },
        "null": null,
        "by_layer": [{"layer": int(i), **_counts(cosine[layer == i], threshold)} for i in layer.unique()],
    }


def _counts(cosine: Tensor, threshold: float) -> dict[str, int]:
    count, below, above = (int(x.sum()) for x in (~cosine.isnan(), cosine < -threshold, cosine > threshold))
    return {"count": count, "weakening": below, "strengthening": above, "between": count - below - above}


def _rows(stream: Stream, group: Group) -> dict[str, Tensor]:
    """What each neuron reads and writes, as rows (n, d) float64: ``in`` (the up row where gated), ``out``, ``gate``."""
    rows = {
        "in": stream.read(group.ports[-1], group).maps[0].to(accumulate),
        "out": stream.write(group)[0].T.to(accumulate).contiguous(),
    }
    if "gate" in group.ports:
        rows["gate"] = stream.read("gate", group).maps[0].to(accumulate)
    return rows


def _values(rows: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    norms = {name: torch.linalg.vector_norm(row, dim=1) for name, row in rows.items()}

    def cosine_and_gain(first: str, second: str) -> tuple[Tensor, Tensor]:
        size = norms[first] * norms[second]
        product = beyond_rounding(_dot(rows[first], rows[second]), size, eps)
        return product / size, -product

    cosine, gain = cosine_and_gain("in", "out")
    values = {"cosine": cosine, "gain": gain, "strength": norms["in"] * norms["out"]}
    if "gate" in rows:
        values["gate_cosine"], values["gate_gain"] = cosine_and_gain("gate", "out")
        values["gate_up_cosine"], _ = cosine_and_gain("gate", "in")
    return values


def _unit(rows: Tensor) -> Tensor:
    """Rows at length 1; a zero row has no direction and becomes NaN."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner products row by row, without a table of products."""
    return (first[:, None] @ second[:, :, None])[:, 0, 0]


def _classes(cosine: Tensor, threshold: float) -> tuple[str | None, ...]:
    def name(c: float) -> str | None:
        if c != c:
            return None
        return "strengthening" if c > threshold else "weakening" if c < -threshold else "between"

    return tuple(map(name, cosine.tolist()))
