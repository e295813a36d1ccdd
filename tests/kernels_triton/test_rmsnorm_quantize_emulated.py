"""The machine code of rmsnorm_quantize for rows in turns: what goes from one thread and one warp to another, which
Triton's interpreter does not have.
"""

import pytest

from fp4suite import testing
from fp4suite.problem import RmsnormQuantizeProblem
from kernels_triton import host, rmsnorm_quantize as kernel

from .test_quantize_emulated import quantised
from .test_rope_emulated import emulate


@pytest.mark.parametrize(
    ("m", "k", "num_warps", "turns", "arch", "sf_layout"),
    [
        (3, 1536, 1, 2, "sm_90a", "linear"),
        (3, 7168, 2, 2, "sm_90a", "linear"),
        (3, 4112, 2, 4, "sm_100a", "linear"),
        (5, 208, 1, 16, "sm_90a", "blocked_128x4"),
    ],
    ids=str,
)
def test_rows_in_turns(m, k, num_warps, turns, arch, sf_layout, pool):
    config = kernel.Config(num_warps=num_warps, held=True, turns=turns)
    problem = RmsnormQuantizeProblem(m=m, k=k, sf_layout=sf_layout)
    assert kernel.supports(problem, config) is None
    case = testing.case(problem, "cpu", 1)
    x, weight, eps, alpha = case.operands
    data, sf = quantised(case)
    (programs, _) = host.grid(m, k, turns, k, sf_layout)
    emulate(pool, kernel, problem, config, arch, (programs, 1), (x, x.stride(0), weight, alpha, data, sf, m, eps))
    case.check()
