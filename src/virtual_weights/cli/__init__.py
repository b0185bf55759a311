"""The command line: the only place that wires sources, questions and views together."""

from virtual_weights.cli.app import main, run

__all__ = ["main", "run"]
