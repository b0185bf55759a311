"""The report: a view of Records as one HTML file, and the server of the explorer. No maths.

A name is imported when it is first used, so that the server does without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
