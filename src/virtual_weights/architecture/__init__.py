"""Tables: what a model of each type is, and which tensor plays which role in which layout. No tensors."""

from virtual_weights.architecture.resolve import Model, Placement, Tables, resolve, without_keys
from virtual_weights.architecture.spec import Attention, Branch, Mlp, ModelSpec, Norm, Part, PortNorm, Rotary
from virtual_weights.architecture.table import Entry, Row, Slot, layer_of, letters, model_types, stored_shape

__all__ = [
    "Attention",
    "Branch",
    "Entry",
    "Mlp",
    "Model",
    "ModelSpec",
    "Norm",
    "Part",
    "Placement",
    "PortNorm",
    "Rotary",
    "Row",
    "Slot",
    "Tables",
    "layer_of",
    "letters",
    "model_types",
    "resolve",
    "stored_shape",
    "without_keys",
]
