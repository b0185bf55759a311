"""Virtual weights: how the parts of a language model communicate over its residual stream.

>>> import virtual_weights as vw
>>> stream = vw.open("smollm2-135m")  # doctest: +SKIP
>>> edges = vw.Composition(port="K")(stream)  # doctest: +SKIP
>>> edges.top(10)  # doctest: +SKIP
"""

from virtual_weights.analysis import Channel, Composition, Overlap
from virtual_weights.errors import VirtualWeightsError
from virtual_weights.linalg import LinearMap, Spectrum, Subspace, eigenvalues, principal_angles, svd
from virtual_weights.record import Record
from virtual_weights.statements import Statements
from virtual_weights.stream import Head, Mlp, OperatingPoint, Stream, virtual_weight
from virtual_weights.stream import open_stream as open
from virtual_weights.version import VERSION

__version__ = VERSION

__all__ = [
    "Channel",
    "Composition",
    "Head",
    "LinearMap",
    "Mlp",
    "OperatingPoint",
    "Overlap",
    "Record",
    "Spectrum",
    "Statements",
    "Stream",
    "Subspace",
    "VirtualWeightsError",
    "eigenvalues",
    "open",
    "principal_angles",
    "svd",
    "virtual_weight",
]
