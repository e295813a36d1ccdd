"""What the tests of a module have compiled is let go: the emulator keeps up to a hundred thousand objects of a kernel,
and looks for tensors among all that there are at every launch.
"""

import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    kernels = [module for name, module in sys.modules.items() if name.startswith("kernels_cute.")]
    for module in (*kernels, request.module):
        for name in ("compiled", "for_emulator"):
            if clear := getattr(getattr(module, name, None), "cache_clear", None):
                clear()
    gc.collect()
