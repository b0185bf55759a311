"""L9, T5, L10, C6: directions of the model that share the stream, and what can be read of each."""

from __future__ import annotations

from virtual_weights.analysis.crowding.coherence import Coherence, capacity
from virtual_weights.analysis.crowding.dictionary import Kind
from virtual_weights.analysis.crowding.interference import FEWEST, Interference
from virtual_weights.analysis.crowding.recovery import Recovery
from virtual_weights.record import Record
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell

_FAITHFUL = 0.95  # of the signals found
_FALL = 0.05
_KIND: Kind = "out"
_NONE = "the checkpoint holds no MLP, and so no directions of neurons"


def recovery(bench: Bench) -> Finding:
    """L9: signals along neurons' output directions, read out by methods that are not told which are active."""
    if not _neurons(bench):
        return cannot_tell(_NONE)
    record = bench.ask(Recovery(_KIND, seed=bench.seed))
    counts = [int(n) for n in record.axis("n").labels]
    limits = {name: _limit(record, name, counts) for name in _blind(record)}
    evidence: dict[str, Figure] = {"directions": int(record.stamp["directions"]), "dimension": bench.stream.d_model}
    for name, limit in limits.items():
        evidence[f"signals_recovered_{name}"] = limit
        evidence[f"fidelity_{name}_at_{counts[-1]}"] = float(record.numbers(name)[-1])
    best = max(limits, key=lambda name: limits[name])
    told = ", ".join(f"{limit} by {name.replace('_', ' ')}" for name, limit in limits.items())
    if min(limits.values()) == counts[-1]:
        return Finding("holds", f"every method finds all of {counts[-1]} signals", None, evidence)
    if limits[best] < min(2, counts[-1]):
        return Finding("fails", "no method finds two signals at once", None, evidence)
    why = f"of {evidence['directions']} directions so many signals at once are found ({_FAITHFUL:.0%} of them): {told}"
    return Finding("holds under", why, f"no more than {limits[best]} signals are active at once", evidence)


def trade_off(bench: Bench) -> Finding:
    """C6: fidelity against the number of signals, method by method."""
    if not _neurons(bench):
        return cannot_tell(_NONE)
    record = bench.ask(Recovery(_KIND, seed=bench.seed))
    counts, evidence = record.axis("n").labels, dict[str, Figure]()
    falling = list[str]()
    for name in _blind(record):
        curve = record.numbers(name)
        for n, value in zip(counts[::2], curve[::2].tolist(), strict=True):
            evidence[f"{name}_at_{n}"] = value
        if float(curve[0] - curve[-1]) > _FALL:
            falling.append(f"{name.replace('_', ' ')} from {float(curve[0]):.2f} to {float(curve[-1]):.2f}")
    if not falling:
        return Finding("fails", f"up to {counts[-1]} signals no method loses any", None, evidence)
    return Finding("holds", f"from 1 to {counts[-1]} signals fidelity falls: {'; '.join(falling)}", None, evidence)


def growth(bench: Bench) -> Finding:
    """L10: powers of n with which the total over pairs, and the squared error of one signal, grow."""
    if _neurons(bench) < 4 * FEWEST:
        return cannot_tell(f"fewer than {4 * FEWEST} neurons are too few for a power")
    fitted = bench.ask(Interference(_KIND, seed=bench.seed)).stamp["exponents"]
    total, error = fitted["total"], fitted["error"]
    if total is None or error is None:
        return cannot_tell("these directions are orthogonal: no interference grows")
    evidence: dict[str, Figure] = {
        f"{name}_{each}": float(value)
        for name, found in (("total_over_pairs", total), ("squared_error_of_a_signal", error))
        for each, value in found.items()
    }
    told = f"total over pairs n^{total['exponent']:.2f}, squared error of a signal n^{error['exponent']:.2f}"
    quadratic, linear = abs(total["exponent"] - 2) < 0.25, abs(error["exponent"] - 1) < 0.25
    if quadratic and linear:
        return Finding(
            "holds under",
            told,
            "the total over all pairs is meant, not the error of one signal, and signs are random",
            evidence,
        )
    if quadratic and abs(error["exponent"] - 2) < 0.25:
        return Finding("holds", told, None, evidence)
    return Finding("fails", told, None, evidence)


def capacity_bound(bench: Bench) -> Finding:
    """T5: the model's own directions, and as many random ones, against d / eps^2 at their own largest cosine."""
    if _neurons(bench) < 2:
        return cannot_tell(_NONE)
    stamp = bench.ask(Coherence(_KIND, seed=bench.seed)).stamp
    n, d = int(stamp["directions"]), bench.stream.d_model
    own, chance = (min(float(stamp[name]), 1 - 1e-7) for name in ("largest", "random_largest"))
    evidence: dict[str, Figure] = {
        "directions": n,
        "dimension": d,
        "largest_cosine": own,
        "welch_bound": float(stamp["welch"]),
        "mean_square_times_d": float(stamp["mean_square"]) * d,
        "random_largest_cosine": chance,
    }
    for name, eps in (("model", own), ("random_code", chance)):
        if eps > 0:
            counts = capacity(d, eps)
            evidence[f"published_bound_at_{name}"] = counts.published
            evidence[f"log10_of_random_code_at_{name}"] = counts.log10_random_code
            evidence[f"signals_active_at_once_at_{name}"] = counts.active_signals
    beyond = [
        f"{n} {kind} with cosines up to {eps:.3f}: d / eps^2 is {d / eps**2:.0f}"
        for kind, eps in (("directions of neurons", own), ("random directions", chance))
        if eps > 0 and n > d / eps**2
    ]
    if beyond:
        return Finding("fails", f"{n} directions exceed d / eps^2", None, evidence, tuple(beyond))
    why = f"{n} directions are fewer than d / eps^2, the model's own as well as random ones"
    return Finding("holds under", why, "so few directions as this model has; in general no bound", evidence)


def _neurons(bench: Bench) -> int:
    return sum(bench.stream.spec.d_mlp for c in bench.stream.components if c.kind == "mlp")


def _blind(record: Record) -> list[str]:
    """Methods that are not told which signals are active."""
    return [column.name for column in record.columns if column.name != "known_support"]


def _limit(record: Record, name: str, counts: list[int]) -> int:
    """The largest number of signals up to which a method is faithful throughout; 0 for none."""
    faithful = (record.numbers(name) >= _FAITHFUL).tolist()
    first = faithful.index(False) if False in faithful else len(counts)
    return counts[first - 1] if first else 0
