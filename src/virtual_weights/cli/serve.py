"""``vweights serve``: the explorer of an atlas in the browser, from a process that does not load torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from virtual_weights.cli import options as o
from virtual_weights.errors import UsageError


def serve(
    atlas: o.AtlasFolder,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="port of 127.0.0.1; 0 takes one that is free")
    ] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="print the address and open no browser")] = False,
) -> None:
    """Show the explorer of an atlas in the browser, on this machine only, until Ctrl-C.

    The address that is printed works once, in one browser.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UsageError(
            f"this serves pages, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            expected="the packages of the extra 'serve'",
            do="pip install -c constraints.txt '.[serve]' in a clone of this project",
        )
    from virtual_weights.report import serve as server

    server.serve(atlas, port, not no_browser, announce=_announce)


def _announce(address: str) -> None:
    print(address, flush=True)
    print("Open this address, once, in a browser on this machine. Ctrl-C ends the server.", file=sys.stderr, flush=True)
