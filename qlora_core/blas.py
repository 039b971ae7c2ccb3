"""The threads of numpy's matrix products. Knows nothing of who multiplies."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# Of the OpenBLAS that comes with numpy, and of a system's own.
NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it numpy multiplies with one thread, where its products are made by OpenBLAS; elsewhere nothing changes.

    OpenBLAS' threads spin while they wait for each other: beside another busy process, thousands of small products took 20 to 80
    seconds on two cores, and 3 with one thread (measured).
    """
    try:
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # and all that it is linked with
    except (AttributeError, OSError):
        library = None
    found = next((name for name in NAMES if hasattr(library, name.format("set"))), None)
    if found is None:
        yield
        return
    get, set_ = (getattr(library, found.format(what)) for what in ("get", "set"))
    before = get()
    set_(1)
    try:
        yield
    finally:
        set_(before)
