"""gemm_nvfp4_sm90_skinny: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import itertools
import re

import pytest
import torch

from fp4suite import testing
from fp4suite.built import resources, sass
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90_skinny as kernel
from kernels_cute.gemm_nvfp4_sm90_skinny import SPACE, Config
from ptx_emulator import emulate

from . import sm90_cases

ONE = GemmProblem(m=1, n=64, k=1024, act="bf16")
WHOLE = Config(split=1, warps_k=1)  # one warp walks over all of k
CONFIGS = [
    WHOLE,
    Config(),
    Config(tile_m=1, warps_n=8, warps_k=1, loops=4, depth=6),
    Config(tile_m=2, warps_n=1, warps_k=4, split=3, depth=2),
    Config(tile_m=4, warps_n=2, warps_k=4, split=1, loops=2, depth=3),
    Config(tile_m=8, warps_n=1, warps_k=8, split=1, depth=2),
    Config(tile_m=32, warps_n=4, warps_k=1, split=6, loops=2, depth=3),
]

# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (GemmProblem(m=1, n=64, k=1024, act="nvfp4"), Config(), "activations in nvfp4"),
        (GemmProblem(m=1, n=64, k=1024, act="bf16", out="fp16"), Config(), "output in fp16"),
        (GemmProblem(m=1, n=60, k=1024, act="bf16"), Config(), "n=60 is not a multiple of 8"),
        (GemmProblem(m=1, n=64, k=1056, act="bf16"), Config(), "k=1056 is not a multiple of 64"),
        (GemmProblem(m=65, n=64, k=1024, act="bf16"), Config(), "m=65: this kernel is for 64 rows at most"),
        (GemmProblem(m=1, n=64, k=256, act="bf16"), Config(), "k=256 leaves nothing for the last of 4 parts"),
        (GemmProblem(m=1, n=64, k=16384, act="bf16"), Config(), "bytes of shared memory"),
        (ONE, Config(tile_m=3), "tile_m=3 is not one of"),
        (GemmProblem(m=9, n=64, k=1024, act="bf16"), Config(tile_m=8), "m=9 is more than tile_m=8"),
        (ONE, Config(warps_n=8, warps_k=8), "8 x 8 warps: a CTA has 4 or 8"),
        (ONE, Config(split=9), "a cluster has 1 to 8 CTAs"),
        (ONE, Config(loops=3), "loops=3, depth=4: not of"),
        (ONE, Config(tile_m=32, depth=6), "do not fit the registers"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(ONE, Config(), "sm_100a")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_without_spills(config):
    problem = GemmProblem(m=1, n=64, k=3072, act="bf16", segments=2)
    built = kernel.build(problem, config)
    assert built.shared_bytes == kernel.shared_bytes(config, kernel.steps_of(problem.k, config))
    assert resources(built).spill_bytes == 0
    assert ".ftz" not in built.ptx  # scales and codes pass through subnormal numbers


def test_main_loop_has_no_barrier_and_reads_whole_pieces():
    code = sass(kernel.build(GemmProblem(m=1, n=64, k=4096, act="bf16"), WHOLE))
    assert len(re.findall(r"\bBAR\.SYNC", code)) == 2
    assert len(re.findall(r"\bLDG\.\S*128", code)) >= 4 * WHOLE.depth  # before the loop and in it


def test_launch_refuses_what_it_would_misread():
    sm90_cases.check_refuses_misfits(kernel, Config(), 1024)
    gen = torch.Generator().manual_seed(0)
    a, b, out = torch.zeros(3, 1024, dtype=torch.bfloat16), testing.random_nvfp4(64, 1024, gen), torch.empty(3, 64)
    with pytest.raises(ValueError, match="activations in nvfp4"):
        kernel.launch(testing.random_nvfp4(3, 1024, gen), b, None, out, Config())
    with pytest.raises(ValueError, match="b must have linear scales"):
        kernel.launch(a, b.with_sf_layout("blocked_128x4"), None, out, Config())


def test_empty_m_is_nothing_to_do():
    sm90_cases.check_empty(kernel, Config(), 1024)


@pytest.mark.parametrize(("config", "schedule"), list(zip(CONFIGS, itertools.cycle(("late", "eager")))), ids=str)
def test_in_the_emulator(config, schedule):
    """Ragged m, n and k; segments; every element against the FP64 product, every access against the others'."""
    kernel.compiled.cache_clear()
    m, parts = min(config.tile_m, 13), config.split * config.warps_k
    if config.tile_m == 16:  # two tiles
        m = 19
    problem = GemmProblem(m=m, n=config.tile_n + 24, k=128 * parts * 2 - 64, act="bf16", out="fp32", segments=2)
    case = testing.case(problem, "cpu", 1)
    with emulate("sm_90a", schedule=schedule):
        case.run(kernel, config)
    kernel.compiled.cache_clear()
    case.check()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(tile_m=8, warps_n=8, warps_k=1, split=3, loops=2)], ids=str)
def test_single_elements_land_where_they_belong(config, device):
    n, k = config.tile_n + 8, 128 * config.split * config.warps_k * 2
    columns = [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 200, k // 2, k - 1]
    rows = [0, 1, 7, 8, 9, 15, 16, 33, config.tile_n - 1, config.tile_n, n - 1]
    sm90_cases.check_single_elements(kernel, config, 6, n, k, columns, rows, device)


@pytest.mark.gpu
def test_every_code_under_every_scale_is_exact(device):
    sm90_cases.check_decodes(kernel, Config(), device, most=kernel.MAX_M)


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel, most=40), ids=str)
def test_configs(config, device):
    for problem in (
        GemmProblem(m=13, n=520, k=4096 + 64, act="bf16", out="fp32", segments=2),
        GemmProblem(m=1, n=136, k=1088, act="bf16"),
        GemmProblem(m=50, n=136, k=1088, act="bf16"),
    ):
        sm90_cases.check_runs_or_refuses(kernel, problem, config, device)


@pytest.mark.gpu
def test_ragged_m(device):
    for m in range(1, 65):
        tile_m = next((t for t in SPACE["tile_m"] if t >= m), 32 if m % 2 else 16)
        case = testing.case(GemmProblem(m=m, n=136, k=1024, act="bf16"), device, seed=m)
        case.run(kernel, Config(tile_m=tile_m, depth=3))
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 2048, 7168), (2, 64, 7168), (5, 1024, 4096), (16, 7168, 2048), (33, 1536, 1536), (8, 65536, 1536)],
)
def test_model_shapes(m, n, k, device):
    for segments, out in ((1, "bf16"), (2, "fp32")):
        case = testing.case(GemmProblem(m=m, n=n, k=k, act="bf16", out=out, segments=segments), device, seed=7)
        case.run(kernel, Config())
        case.check()


@pytest.mark.gpu
def test_alpha_acts_on_the_sum(device):
    sm90_cases.check_alpha_acts_on_the_sum(kernel, Config(), 1024, device)


@pytest.mark.gpu
def test_strided_rows_are_read_and_written_in_place(device):
    sm90_cases.check_strided_rows(kernel, Config(), 1024, device)


@pytest.mark.gpu
def test_repeated_runs_and_graph_replays_agree_to_the_bit(device):
    problem = GemmProblem(m=12, n=4096, k=4096, act="bf16")
    sm90_cases.check_repeats(kernel, problem, Config(), device)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    sm90_cases.check_the_op_runs_it(kernel, "cute_gemm_nvfp4_sm90_skinny", Config(), device)
