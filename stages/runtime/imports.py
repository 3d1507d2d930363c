"""A block of imports -> the same modules, with no garbage collected meanwhile, and themselves left out of it later."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import what the block imports without collecting garbage, now or later.

    Modules are not garbage: a collection walks through all the objects imported so far and frees next to none. Those
    of the imports take a fifth of a stage's start, and the first full one after it as long as 0.7 s. At the end of the
    process the interpreter frees all again, since some libraries print what it could not.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
            atexit.unregister(gc.unfreeze)
            atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()
