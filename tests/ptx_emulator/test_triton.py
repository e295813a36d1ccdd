"""Triton's PTX of the quantiser, the hardware's FP4 conversion on sm_100a included, to the reference's bytes."""

import concurrent.futures
import multiprocessing
import os

import pytest
import torch

import ptx_emulator
from fp4suite import testing
from fp4suite.problem import QuantizeProblem
from kernels_triton import host, quantize_nvfp4


@pytest.fixture(scope="module")
def pool():
    """A process in which Triton compiles; in this one it may interpret."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as p:
        yield p
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize("rule", ["absmax", "modelopt_weight"])
@pytest.mark.parametrize("layout", ["linear", "blocked_128x4"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_quantise(arch, layout, rule, pool):
    problem, config = QuantizeProblem(m=5, k=512, rule=rule, sf_layout=layout), quantize_nvfp4.Config()
    built = pool.submit(quantize_nvfp4.build, problem, config, arch).result()
    assert ("cvt.rn.satfinite.e2m1x2.f32" in built.ptx) == (arch == "sm_100a")
    case = testing.case(problem, "cpu", 1)
    case.poison()
    x, alpha = case.operands
    arrays = [t.view(torch.uint8).numpy() for t in (x, case.out.data, case.out.sf)]
    module = ptx_emulator.load(built.ptx)
    module.launch(
        grid=host.grid(problem.m, problem.k, config.block_m, config.block_k, layout),
        block=module.program().kernel.required_threads,
        args=[arrays[0], x.stride(0), alpha.reshape(1).numpy(), *arrays[1:], problem.m, problem.k, 0, 0],
        shared=built.shared_bytes,
    )
    case.check()
