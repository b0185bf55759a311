"""The command ``vweights``: verbs, and how errors become exit codes.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 bad input, 4 refused as unsafe, 5 out of resources, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from virtual_weights.cli.ablate import ablate, attribute
from virtual_weights.cli.channel import channel
from virtual_weights.cli.composition import composition, subspaces
from virtual_weights.cli.depth import linear, paths
from virtual_weights.cli.fate import erased, frontier, persistence
from virtual_weights.cli.ledger import bandwidth, basis, superposition
from virtual_weights.cli.map import edges, map_model
from virtual_weights.cli.memory import memory
from virtual_weights.cli.model import model_commands, rotate
from virtual_weights.cli.neurons import neurons
from virtual_weights.cli.observe import labels, observe
from virtual_weights.cli.statements import statements
from virtual_weights.cli.trace import trace
from virtual_weights.cli.validate import validate
from virtual_weights.errors import VirtualWeightsError

OUT_OF_RESOURCES, INTERRUPTED = 5, 130
# ClickException: typer carries its own click and does not export it
COMMAND_LINE_ERRORS: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="vweights",
    help="Which components of a language model communicate over its residual stream, and how strongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("map")(map_model)
for command in (
    edges,
    composition,
    channel,
    neurons,
    subspaces,
    bandwidth,
    superposition,
    basis,
    memory,
    linear,
    paths,
    statements,
    trace,
    labels,
    observe,
    attribute,
    ablate,
    erased,
    persistence,
    frontier,
    validate,
    rotate,
):
    app.command(command.__name__)(command)
app.add_typer(model_commands, name="model")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="print the version and stop")) -> None:
    if version:
        from virtual_weights import __version__

        print(__version__)
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; only our own bugs raise."""
    try:
        return int(app(args=list(arguments), prog_name="vweights", standalone_mode=False) or 0)
    except VirtualWeightsError as error:
        _complain(str(error))
        return error.exit_code
    except COMMAND_LINE_ERRORS as error:
        error.show(file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (MemoryError, OSError, RuntimeError) as error:
        if not _out_of_resources(error):
            raise
        remedy = "lower --memory-mb, use --compute-dtype float32, or free memory or disk"
        _complain(f"out of resources: {error}\n  to do: {remedy}")
        return OUT_OF_RESOURCES


def main() -> None:
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))


def _complain(text: str) -> None:
    print(f"vweights: {text}", file=sys.stderr)


def _out_of_resources(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (12, 28, 122)  # ENOMEM, ENOSPC, EDQUOT
    return isinstance(error, MemoryError) or "memory" in str(error)
