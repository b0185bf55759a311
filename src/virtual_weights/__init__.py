"""Virtual weights: how the parts of a language model communicate over its residual stream.

>>> import virtual_weights as vw
>>> stream = vw.open("smollm2-135m")  # doctest: +SKIP
>>> edges = vw.Composition(port="K")(stream)  # doctest: +SKIP
>>> edges.top(10)  # doctest: +SKIP

What there is stands in ``__init__.pyi``. A name is imported when it is first used: this import alone costs nothing.
"""

import lazy_loader

from virtual_weights.version import VERSION

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = VERSION
