"""The core abstraction: components with read and write ports at ordered positions of the stream."""

from virtual_weights.stream.build import open_stream
from virtual_weights.stream.group import Component, Group, Groups
from virtual_weights.stream.names import Label, parse
from virtual_weights.stream.norm import scale
from virtual_weights.stream.operating_point import OperatingPoint
from virtual_weights.stream.question import Block, Blocked, Composite, Question, Work, cost
from virtual_weights.stream.stream import Read, Stream, centred, through_norm
from virtual_weights.stream.views import Features, Head, Mlp
from virtual_weights.stream.virtual import virtual_weight

__all__ = [
    "Block",
    "Blocked",
    "Component",
    "Composite",
    "Features",
    "Group",
    "Groups",
    "Head",
    "Label",
    "Mlp",
    "OperatingPoint",
    "Question",
    "Read",
    "Stream",
    "Work",
    "centred",
    "cost",
    "open_stream",
    "parse",
    "scale",
    "through_norm",
    "virtual_weight",
]
