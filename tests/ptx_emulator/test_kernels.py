"""The suite's CuTe DSL kernels, compiled host code and all, executed here against the reference."""

import re
import time

import numpy as np
import pytest
import torch

import ptx_emulator
from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90 as sm90, gemm_nvfp4_sm100 as sm100
from ptx_emulator import Fault, emulate

from .golden import gemms as golden


def gemm(m: int, n: int, k: int, act: str = "nvfp4", **kw) -> GemmProblem:
    return GemmProblem(m=m, n=n, k=k, act=act, **kw)


def check(kernel, problem: GemmProblem, config, seed: int = 0, **kw):
    """Random codes and scales, every element compared; returns the launch's statistics."""
    case = testing.case(problem, "cpu", seed)
    with emulate(kernel.ARCH, **kw) as device:
        case.run(kernel, config)
    case.check()
    return device.launches[-1]


@pytest.mark.parametrize(
    ("problem", "config", "schedule"),
    [
        (gemm(5, 72, 256, "bf16"), sm90.Config(tile_m=8, tile_n=64, num_stages=2), "late"),
        (gemm(21, 136, 384, segments=2, out="fp32"), sm90.Config(tile_m=16, tile_n=64, num_stages=3), "eager"),
    ],
    ids=str,
)
def test_gemm_nvfp4_sm90(problem, config, schedule):
    check(sm90, problem, config, schedule=schedule, seed=1)


@pytest.mark.parametrize("number", range(len(golden.CASES)))
def test_sm90_gives_the_bits_of_an_h100(number):
    """The same PTX, by its hash, and every bit of the output (golden/gemms.py records them)."""
    problem, config = golden.CASES[number]
    with np.load(golden.FILE) as record:
        want, recorded = record[f"out{number}"], str(record[f"ptx{number}"])
    case = testing.case(problem, "cpu", number)

    def same(ptx: str) -> str:
        assert golden.digest(ptx) == recorded, "another compiler or another kernel: record again"
        return ptx

    with emulate("sm_90a", rewrite=same):
        case.run(golden.kernel_of(config), config)
    case.check()
    np.testing.assert_array_equal(golden.raw(case.out), want)


def test_bits_are_recorded_as_they_were(tmp_path):
    """What records on a host with an H100, on the emulator's: one case of each kernel."""
    numbers = (0, 8, 12, 16)
    assert {golden.kernel_of(golden.CASES[n][1]) for n in numbers} == {golden.kernel_of(c) for _, c in golden.CASES}
    with emulate("sm_90a"):
        golden.record(tmp_path / "again.npz", numbers, "cpu")
    with np.load(tmp_path / "again.npz") as again, np.load(golden.FILE) as recorded:
        assert sorted(again.files) == sorted(f"{what}{n}" for what in ("out", "ptx") for n in numbers)
        for name in again.files:
            np.testing.assert_array_equal(again[name], recorded[name])


SM100 = [
    (gemm(1, 72, 64), sm100.Config(tile_n=64), "round"),
    (gemm(130, 136, 448, segments=3), sm100.Config(tile_n=128, cluster_m=2), "eager"),
    (
        gemm(390, 264, 576, segments=2, out="fp32"),
        sm100.Config(tile_n=128, mma_ctas=2, cluster_m=4, cluster_n=2),
        "late",
    ),
    (gemm(130, 632, 640), sm100.Config(tile_n=256, mma_ctas=2, cluster_m=2, cluster_n=2), "round"),
]


@pytest.mark.parametrize(("problem", "config", "schedule"), SM100, ids=str)
def test_gemm_nvfp4_sm100(problem, config, schedule):
    stats = check(sm100, problem, config, schedule=schedule, seed=2)
    assert stats.tensor_columns == sm100.budget(config).tmem_columns


@pytest.mark.parametrize(
    ("problem", "config", "clusters"),
    [
        (gemm(140, 264, 64 * 45), sm100.Config(), 2),
        (gemm(140, 264, 64 * 37, segments=3, out="fp32"), sm100.Config(tile_n=256), 1),
        (gemm(260, 136, 64 * 41), sm100.Config(tile_n=64, mma_ctas=2, cluster_m=2), 1),
        (gemm(300, 264, 64 * 33), sm100.Config(tile_n=128, cluster_m=2, cluster_n=2), 1),
    ],
    ids=str,
)
def test_sm100_walks_over_tiles_and_its_ring_wraps(problem, config, clusters, monkeypatch):
    monkeypatch.setattr(sm100, "_sm_count", lambda device: clusters * config.cluster_m * config.cluster_n)
    stats = check(sm100, problem, config, seed=3)
    assert stats.grid[2] == clusters
    tiles = -(-problem.m // (128 * config.cluster_m)) * -(-problem.n // (config.tile_n * config.cluster_n))
    assert tiles > clusters
    assert problem.k // 256 > sm100.budget(config).num_stages


def test_speed():
    """256 x 256 x 512 with 2-CTA tiles: 20 s on one core are the goal."""
    problem, config = gemm(256, 256, 512), sm100.Config(tile_n=256, mma_ctas=2, cluster_m=2)
    check(sm100, problem, config)
    start = time.perf_counter()
    stats = check(sm100, problem, config)
    assert time.perf_counter() - start < 20
    assert stats.events["MMAs"] == 512 // 64
    assert stats.events["MMA flops"] == problem.flops


def test_a_function_without_its_ptx_is_refused_and_settings_come_back():
    from cutlass.cutlass_dsl import CuTeDSL
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction as Compiled

    settings = CuTeDSL._get_dsl().envar
    before = settings.keep_ptx, settings.arch, Compiled.__call__, Compiled.run_compiled_program
    sm90.compiled.cache_clear()
    problem, config = gemm(8, 64, 64), sm90.Config(tile_m=8, tile_n=64, num_stages=2)
    case = testing.case(problem, "cpu", 0)
    sm90.compiled(config, sm90._variant(problem, config))
    with pytest.raises(Fault, match="compiled without keeping its PTX"), emulate("sm_90a"):
        case.run(sm90, config)
    sm90.compiled.cache_clear()
    assert ptx_emulator.active() is None
    assert before == (settings.keep_ptx, settings.arch, Compiled.__call__, Compiled.run_compiled_program)
    with emulate("sm_100a"), pytest.raises(Fault, match="compiled for sm_90a, but sm_100a is emulated"):
        case.run(sm90, config)
    with pytest.raises(ValueError, match="arch must be one of"), emulate("sm_80"):
        pass


def test_memory_that_no_tensor_holds_is_refused():
    config = sm90.Config(tile_m=8, tile_n=64, num_stages=2)
    problem = gemm(8, 64, 128)
    case = testing.case(problem, "cpu", 0)

    def far(ptx: str) -> str:
        """The first copy reads 1 GiB past its source."""
        return re.sub(r"(cp\.async\.cg\.shared\.global\s+\[[^]]+\], \[%rd\d+)", r"\1+1073741824", ptx, count=1)

    with emulate("sm_90a", rewrite=far), pytest.raises(Fault, match="in no array that is known"):
        case.run(sm90, config)
    assert torch.isnan(case.out).all()


def test_the_device_has_as_many_multiprocessors_as_asked_for():
    from cutlass.utils import HardwareInfo

    before = dict(HardwareInfo.__dict__)
    for arguments, count in (({}, 148), ({"multiprocessors": 6}, 6)):
        with emulate("sm_100a", **arguments):
            info = HardwareInfo()
            assert info.get_device_multiprocessor_count() == count
            assert info.get_max_active_clusters(2) == count // 2
    assert dict(HardwareInfo.__dict__) == before
