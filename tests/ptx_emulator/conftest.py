"""Functions compiled outside `emulate` carry no PTX: none stays in a kernel's cache on the way in or out of a test."""

from collections.abc import Iterator

import pytest

from kernels_cute import gemm_nvfp4_sm90, gemm_nvfp4_sm90_skinny, gemm_nvfp4_sm90_wgmma, gemm_nvfp4_sm100

KERNELS = (gemm_nvfp4_sm90, gemm_nvfp4_sm90_skinny, gemm_nvfp4_sm90_wgmma, gemm_nvfp4_sm100)


@pytest.fixture(autouse=True, scope="module")
def _compiled_here() -> Iterator[None]:
    for module in KERNELS:
        module.compiled.cache_clear()
    yield
    for module in KERNELS:
        module.compiled.cache_clear()
