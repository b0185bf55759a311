"""The command ``vweights``: verbs, and how errors become exit codes.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 bad input, 4 refused as unsafe, 5 out of resources, 130 interrupted.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import StringIO
from typing import Any

import typer

from virtual_weights.cli import INTERRUPTED
from virtual_weights.cli.ablate import ablate, attribute
from virtual_weights.cli.atlas import export, report, status
from virtual_weights.cli.channel import channel
from virtual_weights.cli.composition import composition, subspaces
from virtual_weights.cli.depth import linear, paths
from virtual_weights.cli.fate import erased, frontier, persistence
from virtual_weights.cli.features import features, train
from virtual_weights.cli.graph import graph
from virtual_weights.cli.ledger import bandwidth, basis, superposition
from virtual_weights.cli.map import edges, map_model
from virtual_weights.cli.memory import memory
from virtual_weights.cli.model import check, model_commands, rotate
from virtual_weights.cli.neurons import neurons
from virtual_weights.cli.observe import labels, observe
from virtual_weights.cli.options import Command, Group
from virtual_weights.cli.plan import plan
from virtual_weights.cli.serve import serve
from virtual_weights.cli.statements import statements
from virtual_weights.cli.trace import trace
from virtual_weights.cli.validate import validate
from virtual_weights.cli.vector import vector
from virtual_weights.errors import ResourceError, VirtualWeightsError, printable, write_error

OUT_OF_RESOURCES = 5
# ClickException: typer carries its own click and does not export it
COMMAND_LINE_ERRORS: Any = typer.BadParameter.__mro__[2]


def _paragraphs(text: str | None) -> str:
    """A docstring with its paragraphs in one line each, to be wrapped at the width of the terminal."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


app = typer.Typer(
    name="vweights",
    cls=Group,
    help="Find which components of a language model communicate over its residual stream, and how strongly.\n\n"
    "To begin: vweights map smollm2-135m -o atlas",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
START, PAIRS, CHANNEL, STREAM = "Start here", "Who talks to whom", "What a channel carries", "How the stream is used"
RUNS, CAUSES, MODELS = "What happens on a text", "Cause and effect", "Models"
WEIGHTS, RUN, EITHER = "from the weights alone", "runs the model", "runs the model only if you name a text"
_M = "smollm2-135m"
_PROMPT = '--prompt "The capital of France is"'
VERBS: tuple[tuple[str, Callable[..., None], str, str, str, str], ...] = (
    ("map", map_model, START, "2 min", EITHER, f"{_M} -o atlas"),
    ("plan", plan, START, "4 s", WEIGHTS, f"{_M}"),
    ("edges", edges, START, "4 s", "reads an atlas", "atlas --reader L18H6.K --top 10"),
    ("status", status, START, "2 s", "reads an atlas", "atlas"),
    ("report", report, START, "5 s", "reads an atlas", "atlas"),
    ("export", export, START, "4 s", "reads an atlas", "atlas -o edges.parquet --question composition"),
    ("serve", serve, START, "", "reads an atlas", "atlas --no-browser"),
    ("composition", composition, START, "4 s", EITHER, f"{_M} --port K --top 10"),
    ("trace", trace, START, "10 s", RUN, f"{_M} {_PROMPT}"),
    ("neurons", neurons, PAIRS, "3 s", WEIGHTS, f"{_M} --reader L18N5"),
    ("vector", vector, PAIRS, "12 s", EITHER, f"{_M} happy.npy --at L18.mlp"),
    ("subspaces", subspaces, PAIRS, "10 s", WEIGHTS, f"{_M} --roles O-K"),
    ("paths", paths, PAIRS, "3 s", WEIGHTS, f"{_M} L16H0 L18H6.K --order 2"),
    ("channel", channel, CHANNEL, "8 s", WEIGHTS, f"{_M} L23H4 unembed --nearest 5"),
    ("bandwidth", bandwidth, STREAM, "25 s", WEIGHTS, f"{_M} --state 3"),
    ("superposition", superposition, STREAM, "15 s", WEIGHTS, f"{_M} --directions in"),
    ("basis", basis, STREAM, "10 s", WEIGHTS, f"{_M} --top 5"),
    ("memory", memory, STREAM, "12 s", WEIGHTS, f"{_M} --component L5H3"),
    ("linear", linear, STREAM, "8 s", WEIGHTS, f"{_M} --every 3"),
    ("statements", statements, STREAM, "10 s", EITHER, f"{_M} --only L5,T3"),
    ("labels", labels, RUNS, "10 s", RUN, f"{_M} --top 3"),
    ("observe", observe, RUNS, "20 s", RUN, f"{_M} --tokens 4096 -o moments.safetensors"),
    ("persistence", persistence, RUNS, "20 s", RUN, f"{_M} --writer L23H2"),
    ("erased", erased, RUNS, "15 s", RUN, f"{_M} --tokens 2048 --kind head"),
    ("frontier", frontier, RUNS, "20 s", RUN, f"{_M} --tokens 256"),
    ("features", features, RUNS, "2 min", RUN, f"{_M} --attach transcoders --top 5"),
    ("graph", graph, RUNS, "2 s", "reads a file", "graph.json --top 5"),
    ("attribute", attribute, CAUSES, "15 s", RUN, f"{_M} --port K --repeated"),
    ("ablate", ablate, CAUSES, "90 s", RUN, f"{_M} L16H0 L18H6.K --repeated"),
    ("validate", validate, CAUSES, "2 min", RUN, f"{_M} --tokens 1024 --edges 16"),
    ("check", check, MODELS, "10 s", RUN, _M),
    ("train", train, MODELS, "2 min", RUN, f"{_M} -o transcoders"),
    ("rotate", rotate, MODELS, "8 s", WEIGHTS, f"{_M} -o rotated --seed 1"),
)
"""Every verb with its group, about how long its example takes ("" if it does not end), whether it runs the model, and
the example."""
for _name, _function, _panel, _time, _runs, _example in VERBS:
    _about = f"The example takes about {_time} on two processor cores." if _time else "Ends with Ctrl-C."
    _about = f"{_runs[0].upper()}{_runs[1:]}. {_about}"
    _epilog = f"{_about}\n\nExample: vweights {_name} {_example}"
    _help = _paragraphs(_function.__doc__)
    app.command(_name, cls=Command, help=_help, rich_help_panel=_panel, epilog=_epilog)(_function)
app.add_typer(model_commands, name="model", rich_help_panel=MODELS)


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
        shown = StringIO()
        error.show(file=shown)
        with suppress(BrokenPipeError):
            print(printable(shown.getvalue()), end="", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except SystemExit as error:  # what typer and rich make of a reader who has gone
        if isinstance(error.__context__, BrokenPipeError):
            return 0
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        typed = write_error(error.filename or "the output", error) if isinstance(error, OSError) else None
        if isinstance(typed, ResourceError):
            _complain(f"out of resources: {typed}")
            return OUT_OF_RESOURCES
        if _out_of_resources(error):
            remedy = "lower --memory, use --compute-dtype float32, or free memory or disk"
            _complain(f"out of resources: {error}\n  to do: {remedy}")
            return OUT_OF_RESOURCES
        if not isinstance(error, OSError):
            raise
        _complain(f"the system refused: {error}\n  to do: check the path, its permissions and the disk")
        return VirtualWeightsError.exit_code


def _complain(text: str) -> None:
    with suppress(BrokenPipeError):
        print(f"vweights: {printable(text)}", file=sys.stderr)


def _out_of_resources(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
