"""A model, the tokens it runs on, and what its modules receive and give."""

from virtual_weights.runtime.running.hooks import module_name, module_of, watching
from virtual_weights.runtime.running.model import ModuleRunner, Runner, load
from virtual_weights.runtime.running.run import Run

__all__ = ["ModuleRunner", "Run", "Runner", "load", "module_name", "module_of", "watching"]
