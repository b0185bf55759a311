"""Tables: which tensor plays which role in which layout. Data; no tensors, no files."""

from virtual_weights.architecture.config import config_for
from virtual_weights.architecture.families import FAMILIES
from virtual_weights.architecture.resolve import Model, Placement, resolve, without_keys
from virtual_weights.architecture.table import Dialect, Family, ModelSpec, RotarySpec, Row, stored_shape

__all__ = [
    "FAMILIES",
    "Dialect",
    "Family",
    "Model",
    "ModelSpec",
    "Placement",
    "RotarySpec",
    "Row",
    "config_for",
    "resolve",
    "stored_shape",
    "without_keys",
]
