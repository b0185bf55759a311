"""``vweights plan``: what a map will take, before any of it is computed."""

from __future__ import annotations

from typing import Any

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.map import Only, parts_of
from virtual_weights.cli.show import Answer, Table, header_of
from virtual_weights.cli.verb import Session, verb

_COLUMNS = {
    "part": "part",
    "question": "question",
    "seconds": "seconds",
    "memory_mb": "memory MB",
    "read_mb": "read MB",
    "gigaflops": "Gflop",
    "blocks": "blocks",
    "answers": "answers",
}


@verb("no_fold", "partial", "offline", "allow_non_finite")
def plan(
    session: Session,
    only: Only = None,
    rotary_offset: o.RotaryOffset = None,
    compute_dtype: o.ComputeDtype = "float32",
    memory_mb: o.Memory = None,
) -> Answer:
    """Estimate what a map of the weights takes: time and memory on this machine, bytes read and operations.

    The machine is measured for a second or two; nothing of the model is computed. What a map with --text or --repeated
    adds, the run itself, is not in the estimate.
    """
    from virtual_weights.survey.estimate import PROGRAM_MB, Machine, estimates

    parts, stream = parts_of(only), session.stream
    session.step("machine")
    machine = Machine.measured()
    asked = vw.Plan(parts, rotary_offset)
    survey = vw.Survey(stream, compute_dtype=compute_dtype, memory_mb=memory_mb)
    rows: list[dict[str, Any]] = []
    for part in parts:
        for estimate in estimates(survey.adapted(asked.questions(part, stream)), stream, machine):
            effort = estimate.effort
            rows.append(
                {
                    "part": str(part),
                    "question": estimate.name,
                    "answers": len(estimate.questions),
                    "blocks": effort.blocks,
                    "read_mb": effort.read / 1e6,
                    "gigaflops": effort.flops / 1e9,
                    "memory_mb": effort.memory / 1e6,
                    "seconds": estimate.seconds,
                }
            )
    total = {
        "seconds": sum(row["seconds"] for row in rows),
        "memory_mb": PROGRAM_MB + max((row["memory_mb"] for row in rows), default=0.0),
        "read_mb": sum(row["read_mb"] for row in rows),
        "gigaflops": sum(row["gigaflops"] for row in rows),
        "machine": {name: value / 1e9 for name, value in vars(machine).items()},
    }
    parameters = {"parts": list(parts), "rotary_offset": rotary_offset, "memory_mb": memory_mb}
    line = (
        f"in all about {total['seconds']:,.0f} s, {total['memory_mb']:,.0f} MB at the peak, {PROGRAM_MB} of them the "
        f"program; this machine multiplies {machine.single / 1e9:,.0f} Gflop/s in float32, "
        f"{machine.double / 1e9:,.0f} in float64"
    )
    title = f"plan of a map · {session.name} · from the weights"
    return Answer(header_of("plan", parameters, stream), rows, total, [Table(title, rows, _COLUMNS), line])
