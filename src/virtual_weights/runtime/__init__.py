"""The only folder that runs a model, through transformers, which is imported when something is run and not before."""

from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.attribution import attribute
from virtual_weights.runtime.edges.edge import Edge, next_token_loss
from virtual_weights.runtime.edges.removal import Removal, removed
from virtual_weights.runtime.flow.labels import labels
from virtual_weights.runtime.flow.observation import observe, operating_point
from virtual_weights.runtime.flow.trace import lens, passage, trace
from virtual_weights.runtime.running.hooks import module_name, module_of
from virtual_weights.runtime.running.model import load

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
