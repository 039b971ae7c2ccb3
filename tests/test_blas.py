"""numpy's products are made by one thread where that is asked for, and by as many as before afterwards."""

import ctypes

import numpy as np
import pytest

from qlora_core.adapter_comparison import Update, spectrum
from qlora_core.blas import one_thread

library = ctypes.CDLL(np._core._multiarray_umath.__file__)
threads = getattr(library, "scipy_openblas_get_num_threads64_", None)


@pytest.mark.skipif(threads is None, reason="this numpy multiplies with something else than its own OpenBLAS")
def test_one_thread_multiplies_and_the_others_come_back() -> None:
    set_threads = library.scipy_openblas_set_num_threads64_
    before = threads()
    set_threads(2)
    try:
        with one_thread():
            assert threads() == 1
        assert threads() == 2
        with pytest.raises(ZeroDivisionError), one_thread():
            raise ZeroDivisionError
        assert threads() == 2

        class Watching(dict):
            seen = 0

            def items(self) -> list:
                self.seen = threads()
                return []

        modules = Watching()
        assert spectrum(Update(modules)) == [] and modules.seen == 1 and threads() == 2
    finally:
        set_threads(before)


def test_where_products_are_made_otherwise_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.blas.NAMES", ())
    with one_thread():
        assert (np.eye(3) @ np.eye(3) == np.eye(3)).all()
