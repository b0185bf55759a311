"""Questions: each a frozen dataclass of parameters, called on a Stream, answered by a Record."""

from virtual_weights.analysis.channels.channel import Channel, summary
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.analysis.pairs.overlap import Overlap

__all__ = ["Channel", "Composition", "Overlap", "summary"]
