"""The command ``vweights``: verbs, and how errors become exit codes.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 bad input, 4 refused as unsafe, 5 out of resources, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from virtual_weights.cli.agree import agree
from virtual_weights.cli.attribute import attribute_edges
from virtual_weights.cli.bandwidth import bandwidth
from virtual_weights.cli.basis import basis
from virtual_weights.cli.channel import channel
from virtual_weights.cli.cleared import cleared_on_text
from virtual_weights.cli.composition import composition
from virtual_weights.cli.edges import edges
from virtual_weights.cli.frontier import erasure_frontier
from virtual_weights.cli.labels import label_heads
from virtual_weights.cli.lifetime import follow
from virtual_weights.cli.linear import linear
from virtual_weights.cli.map import map_model
from virtual_weights.cli.memory import memory
from virtual_weights.cli.model import model_commands
from virtual_weights.cli.neurons import neurons
from virtual_weights.cli.observe import observe_model
from virtual_weights.cli.paths import paths
from virtual_weights.cli.prove import prove_edges
from virtual_weights.cli.rotate import rotate
from virtual_weights.cli.statements import statements
from virtual_weights.cli.subspaces import subspaces
from virtual_weights.cli.superposition import superposition
from virtual_weights.cli.trace import trace_prompt
from virtual_weights.errors import VirtualWeightsError

OUT_OF_RESOURCES, INTERRUPTED = 5, 130
# ClickException: typer carries its own click and does not export it
COMMAND_LINE_ERRORS: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="vweights",
    help="Who talks to whom over a language model's residual stream: virtual weights from the checkpoint alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("map")(map_model)
app.command("composition")(composition)
app.command("edges")(edges)
app.command("channel")(channel)
app.command("subspaces")(subspaces)
app.command("bandwidth")(bandwidth)
app.command("superposition")(superposition)
app.command("memory")(memory)
app.command("basis")(basis)
app.command("rotate")(rotate)
app.command("statements")(statements)
app.command("neurons")(neurons)
app.command("linear")(linear)
app.command("paths")(paths)
app.command("attribute")(attribute_edges)
app.command("prove")(prove_edges)
app.command("observe")(observe_model)
app.command("trace")(trace_prompt)
app.command("frontier")(erasure_frontier)
app.command("labels")(label_heads)
app.command("cleared")(cleared_on_text)
app.command("lifetime")(follow)
app.command("agree")(agree)
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
        _complain(f"out of resources: {error}\n  to do: lower --memory-mb, use --dtype float32, or free memory or disk")
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
