"""Inputs that the quantising kernels' tests share."""

import concurrent.futures
import multiprocessing
import os

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def hard_rows():
    """make(m, k, dtype, device) -> [m, k] rows of several amplitudes with blocks that stress the rules.

    Zeros, -0, one spike, ties, equal elements, subnormal numbers; in every row that is long enough, in some order.
    """

    def make(m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k // 16, 16, generator=gen) * torch.exp2(
            torch.randint(-12, 8, (m, 1, 1), generator=gen).float()
        )
        special = torch.stack(
            [
                torch.zeros(16),
                -torch.zeros(16),
                torch.eye(16)[5] * 300,
                torch.full((16,), -0.0117),
                torch.arange(16) * 0.25,
                torch.arange(16) * -0.125 + 0.0625,
                torch.eye(16)[15] * -1e-38,
                torch.tensor([2688.0] + [3.0] * 15),
                torch.tensor([1.0] * 8 + [2.0**-20] * 8),
                torch.full((16,), 6e-8),
            ]
        )
        for i in range(m):
            order = torch.randperm(len(special), generator=gen)[: k // 16]
            at = torch.randperm(k // 16, generator=gen)[: len(order)]
            x[i, at] = special[order]
        return x.view(m, k).to(dtype).to(device)

    return make


@pytest.fixture(scope="session")
def blocks_at_ties():
    """make(alpha, device) -> FP32 [126, 80]: blocks whose scale lies within two units of a tie between E4M3 numbers."""

    def make(alpha: float, device: torch.device) -> Tensor:
        e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        amax = ((e4m3[1:] + e4m3[:-1]) / 2 * 6 * torch.tensor(alpha).double()).float()
        near = torch.stack([(amax.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-2, 3)], dim=-1)
        x = torch.linspace(-0.9, 0.9, 16) * near[..., None]
        x[..., 7] = near
        return x.flatten(-2).to(device)

    return make


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """Triton's interpreter computes in numpy, which warns where a GPU does not: of infinities that tests are about."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def pool():
    """Processes in which Triton compiles; in this one it may interpret."""
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
    before = os.environ.pop("TRITON_INTERPRET", None)  # children have what there is when they start, at their first job
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as p:
        for _ in range(workers):
            p.submit(os.getpid)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        yield p
