"""The command line: the only place that wires sources, questions and views together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

_OUT_OF_ROOM, INTERRUPTED = 5, 130


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; only our own bugs raise."""
    from virtual_weights.cli.app import run as run_

    return run_(arguments)


def main() -> None:
    """Entry point of the command: interrupted at any moment, imports among them, it ends with 130 and no traceback."""
    interruptions: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        if _imports(frame):  # where a library's own start may swallow an exception, or abort; files are written whole
            os._exit(INTERRUPTED)
        interruptions.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = _end_if_interrupted
    try:
        _open_streams()
        code = _flushed(run(sys.argv[1:]))
    except BaseException:
        if not interruptions:  # else whatever it became on its way through somebody's import
            raise
        code = INTERRUPTED
    if interruptions:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """An interruption where Python cannot raise it, as in a finaliser, ends the process: what is written is whole."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(unraisable)


def _open_streams() -> None:
    """Let stdout take any text in any encoding, and let a stream that is closed swallow what it is given."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _flushed(code: int) -> int:
    """The exit code once all that was printed has arrived; a reader who has gone is not an error."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # where what is left goes when Python ends
            if not isinstance(error, BrokenPipeError):
                print(f"vweights: the output cannot be written: {error.strerror}", file=sys.stderr)
                code = _OUT_OF_ROOM
    return code


__all__ = ["main", "run"]
