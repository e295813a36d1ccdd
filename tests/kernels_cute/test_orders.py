"""Every GEMM kernel reads weights in one order, and refuses the others before it reads a byte."""

from dataclasses import replace

import pytest
import torch

from fp4suite import layouts, registry, testing
from fp4suite.problem import GemmProblem


@pytest.mark.parametrize("row", registry.kernels("gemm_nvfp4"), ids=lambda row: row.name)
def test_one_order(row):
    module = registry.load(row.name)
    own, config = getattr(module, "WEIGHT_ORDER", "rows"), module.Config()
    supported = [
        p
        for act in ("bf16", "nvfp4", "fp8")
        if module.supports(p := GemmProblem(m=3, n=512, k=4096, act=act, order=own), config) is None
    ]
    assert supported
    for problem in supported:
        for other in set(layouts.ORDERS) - {own}:
            wrong = replace(problem, order=other)
            assert f"weights in the order {other}" in module.supports(wrong, config)
            case = testing.case(wrong)
            a, b, segments = case.operands
            assert b.order == other
            if isinstance(a, type(b)):
                a = a.with_sf_layout(module.SF_LAYOUT)
            out = torch.full((problem.m, problem.n), -1, dtype=torch.bfloat16)
            with pytest.raises(ValueError, match=rf"the order {other}|got {other}"):
                module.launch(a, b, segments, out, config)
            assert (out == -1).all()
