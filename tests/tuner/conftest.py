"""A registry with one fake kernel, a cache and an environment of the test's own."""

import pytest
import torch

from fp4suite import registry
from fp4suite.problem import GemmProblem

FAKE = registry.Kernel("gemm_nvfp4", "fake_gemm", "tests.tuner.fake_kernel", ("sm_90a",), predicted=True)


@pytest.fixture(autouse=True)
def _no_gpu(request, monkeypatch):
    """Only tests marked gpu see the GPU of a machine that has one: what the others expect does not depend on it."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The fake kernel is the only one; builds are cached in a folder of the test."""
    before = list(registry.KERNELS)
    registry.KERNELS[:] = [FAKE]
    registry.load.cache_clear()
    registry.source_hash.cache_clear()
    monkeypatch.setenv("FP4SUITE_CACHE_DIR", str(tmp_path / "cache"))
    yield registry.load("fake_gemm")
    monkeypatch.undo()
    registry.KERNELS[:] = before
    registry.load.cache_clear()
    registry.source_hash.cache_clear()


@pytest.fixture
def problem():
    return GemmProblem(m=16, n=512, k=512)
