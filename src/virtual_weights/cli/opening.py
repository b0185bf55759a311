"""Opening the model that a command names."""

from __future__ import annotations

from virtual_weights.checkpoint import open_source
from virtual_weights.cli.progress import Tick
from virtual_weights.stream import Stream, open_stream


def open_model(
    reference: str,
    tick: Tick,
    *,
    fold: bool = True,
    partial: bool = False,
    offline: bool = False,
    non_finite: bool = False,
) -> Stream:
    """Open a checkpoint, telling the progress of a download where there is one."""
    source = open_source(
        reference,
        offline=offline,
        allow_non_finite=non_finite,
        progress=lambda done, total, text: tick(done, total),
    )
    return open_stream(source, fold=fold, partial=partial)
