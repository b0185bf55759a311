"""The only folder that runs a model, through transformers, which is imported when something is run and not before."""

from virtual_weights.runtime.model import load
from virtual_weights.runtime.places import module_name, module_of

__all__ = ["load", "module_name", "module_of"]
