"""What kernels read of their modules: Triton compares it with what it compiled, at every launch."""

import importlib
import pkgutil

import pytest
import triton.language as tl

import kernels_triton

MODULES = [m.name for m in pkgutil.iter_modules(kernels_triton.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_constants_equal_themselves(name: str) -> None:
    """NaN does not: a kernel that read it would be refused from its second launch on."""
    module = importlib.import_module(f"kernels_triton.{name}")
    found = {n: v.value for n, v in vars(module).items() if isinstance(v, tl.constexpr)}
    assert [n for n, value in found.items() if value != value] == []
