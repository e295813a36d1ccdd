"""Threads of numpy's matrix multiplication: the emulator's matrices are too small to share out.

numpy's wheels carry OpenBLAS, whose number of threads can be changed while it runs. Another BLAS keeps its own.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, one thread where that can be asked for."""
    control = _control()
    if control is None:
        yield
        return
    get, put = control
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@functools.cache
def _control() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions of the OpenBLAS that came with numpy, if it is one."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("libscipy_openblas64_*")):
            library = ctypes.CDLL(str(path))
            return library.scipy_openblas_get_num_threads64_, library.scipy_openblas_set_num_threads64_
    return None
