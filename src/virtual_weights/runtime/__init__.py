"""The only room that runs a model, through transformers, which is imported when something is run and not before."""

from virtual_weights.runtime.running.run import Run

__all__ = ["Run"]
