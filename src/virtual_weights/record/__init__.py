"""The typed result of a question.

A name is imported when it is first used: ``record.durable`` is for programs without torch too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
