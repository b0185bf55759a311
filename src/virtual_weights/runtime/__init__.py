"""The only folder that runs a model, through transformers, which is imported when something is run and not before."""

from virtual_weights.runtime.attribute import attribute
from virtual_weights.runtime.edge import Edge, next_token_loss
from virtual_weights.runtime.labels import labels
from virtual_weights.runtime.model import load
from virtual_weights.runtime.observe import observe
from virtual_weights.runtime.operate import operating_point
from virtual_weights.runtime.places import module_name, module_of
from virtual_weights.runtime.prove import Trial, prove
from virtual_weights.runtime.remove import Removal, removed
from virtual_weights.runtime.trace import lens, passage, trace

__all__ = [
    "Edge",
    "Removal",
    "Trial",
    "attribute",
    "labels",
    "lens",
    "load",
    "module_name",
    "module_of",
    "next_token_loss",
    "observe",
    "operating_point",
    "passage",
    "prove",
    "removed",
    "trace",
]
