"""Names to tensors, lazily; knows files, not models."""

from virtual_weights.checkpoint.catalog import BuiltIn, built_in, is_cached, locate
from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.checkpoint.reference import open_source
from virtual_weights.checkpoint.source import Source, TensorInfo, text_of

__all__ = [
    "BuiltIn",
    "MappingSource",
    "Source",
    "TensorInfo",
    "built_in",
    "is_cached",
    "locate",
    "open_source",
    "text_of",
]
