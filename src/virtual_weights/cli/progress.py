"""Progress on stderr: bars with time left on a terminal, JSON lines on request, else silence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from virtual_weights.cli.options import ProgressMode

Tick = Callable[[float, float], None]


@contextmanager
def steps(mode: ProgressMode) -> Generator[Callable[[str], Tick]]:
    """Give a function that begins a step by name and returns how to tell (done, total) of it."""
    if mode is ProgressMode.json:
        yield _json_step
    elif mode is ProgressMode.auto and sys.stderr.isatty():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

            def begin(name: str) -> Tick:
                task = bars.add_task(name, total=None)
                return lambda done, total: bars.update(task, completed=done, total=total)

            yield begin
    else:
        yield lambda name: lambda done, total: None


def _json_step(name: str) -> Tick:
    def tell(done: float, total: float) -> None:
        print(json.dumps({"step": name, "done": done, "total": total}), file=sys.stderr, flush=True)

    return tell
