"""gemm_nvfp4_sm90: its refusals and its machine code anywhere; its numbers on an sm_90 GPU."""

import dataclasses
import itertools
import re

import pytest
import torch

from fp4suite import reference, testing
from fp4suite.built import MAX_SHARED_BYTES, resources, sass
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90 as kernel
from kernels_cute.gemm_nvfp4_sm90 import SPACE, Config

from . import sm90_cases

ONE = GemmProblem(m=1, n=64, k=128)
ACTS = ("bf16", "nvfp4")
TILES = [t for t in itertools.product(SPACE["tile_m"], SPACE["tile_n"]) if t[0] * t[1] <= 256 * 128]


def _most_stages(act: str, **tile: int) -> Config:
    """The config of SPACE with this tile and as many stages as shared memory holds."""
    found = (Config(num_stages=s, **tile) for s in sorted(SPACE["num_stages"], reverse=True))
    return next(c for c in found if kernel.supports(dataclasses.replace(ONE, act=act), c) is None)


# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (GemmProblem(m=1, n=64, k=144), Config(), "k=144 is not a multiple of 64"),
        (GemmProblem(m=1, n=64, k=192), Config(tile_k=128), "k=192 is not a multiple of tile_k=128"),
        (GemmProblem(m=1, n=60, k=128), Config(), "n=60 is not a multiple of 8"),
        (GemmProblem(m=1, n=64, k=128, act="fp8"), Config(), "activations in fp8"),
        (GemmProblem(m=1, n=64, k=128, out="fp16"), Config(), "output in fp16"),
        (ONE, Config(tile_m=12), "tile_m=12 is no N of WGMMA"),
        (ONE, Config(tile_m=512), "tile_m=512 is no N of WGMMA"),
        (ONE, Config(tile_n=96), "tile_n is 64, 128 or 256"),
        (ONE, Config(num_stages=1), "one tile must be on its way"),
        (ONE, Config(tile_m=256, tile_n=256), "256 x 256 accumulators"),
        (ONE, Config(tile_m=256, tile_k=128, num_stages=6), "bytes of shared memory"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(ONE, Config(), "sm_100a")


def test_default_config_runs_every_model_shape():
    shapes = [(1536, 7168), (512, 4096), (65536, 1536), (7168, 16384), (64, 7168), (6144, 7168), (4096, 2048)]
    for (n, k), act in itertools.product(shapes, ACTS):
        assert kernel.supports(GemmProblem(m=3, n=n, k=k, act=act), Config()) is None


# up to 64 tokens need 80 registers at most: only of four warpgroups has a thread few more
SCARCE = [tile for tile in TILES if tile[0] >= 128 or tile[1] == 256]


@pytest.mark.parametrize(
    ("tile_m", "tile_n", "act"),
    [(*t, act) for i, t in enumerate(SCARCE) for act in (ACTS if t[0] == 256 or t == (128, 256) else ACTS[i % 2 :: 2])],
)
def test_every_tile_compiles_without_spills(tile_m, tile_n, act):
    """By either kind of activations where registers are scarcest, else by turns."""
    config = _most_stages(act, tile_m=tile_m, tile_n=tile_n, tile_k=128 if tile_m % 16 else 64)
    built = kernel.build(dataclasses.replace(ONE, act=act), config)
    assert built.shared_bytes == kernel.shared_bytes(config, act) <= MAX_SHARED_BYTES["sm_90a"]
    found = resources(built)
    assert found.spill_bytes == 0
    assert found.registers * config.threads <= 65536
    assert f"wgmma.mma_async.sync.aligned.m64n{tile_m}k16.f32.bf16.bf16" in built.ptx
    assert ".ftz" not in built.ptx  # scales and codes pass through subnormal numbers


def test_multiplication_is_not_serialised():
    """ptxas waits after every WGMMA whose accumulators it cannot follow; here it must wait where the source does."""
    code = sass(kernel.build(ONE, Config()))
    assert len(re.findall(r"\bHGMMA\.64x64x16\.F32\.BF16", code)) == 4
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR", code)) == 2
    assert len(re.findall(r"\bBAR\.SYNC", code)) == 1


def _operands(m=3, n=64, k=128):
    gen = torch.Generator().manual_seed(0)
    return torch.zeros(m, k, dtype=torch.bfloat16), testing.random_nvfp4(n, k, gen), torch.empty(m, n)


def test_launch_refuses_what_it_would_misread():
    sm90_cases.check_refuses_misfits(kernel, Config(), 128)
    a, b, out = _operands()
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        kernel.launch(torch.zeros(3, 132, dtype=torch.bfloat16)[:, :128], b, None, out, Config())
    with pytest.raises(ValueError, match="b must have linear scales"):
        kernel.launch(a, b.with_sf_layout("blocked_128x4"), None, out, Config())
    wide = _operands(k=256)[1]
    with pytest.raises(ValueError, match=r"b\.data and b\.sf must be contiguous"):
        kernel.launch(a, NVFP4Tensor(wide.data[:, :64], wide.sf[:, :8], wide.alpha), None, out, Config())
    two = NVFP4Tensor(b.data, b.sf, torch.ones(2))
    for segments in (None, (64,), (32, 24), (16, 16, 32)):
        with pytest.raises(ValueError, match=r"b\.alpha holds 2 numbers"):
            kernel.launch(a, two, segments, out, Config())


def test_empty_m_is_nothing_to_do():
    sm90_cases.check_empty(kernel, Config(), 128)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(tile_m=8, tile_n=64, tile_k=128, num_stages=2)], ids=str)
def test_single_elements_land_where_they_belong(config, device):
    m, n, k = config.tile_m + 3, config.tile_n + 8, 2 * config.tile_k
    columns = [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 100, k - 1]
    rows = [0, 1, 7, 8, 9, 16, 33, 63, config.tile_n - 1, config.tile_n, n - 1]
    sm90_cases.check_single_elements(kernel, config, m, n, k, columns, rows, device)
    for column in columns:
        for row in rows:
            a, b = (sm90_cases.one_hot(at, column, of, k, device) for at, of in ((m - 1, m), (row, n)))
            want = torch.zeros(m, n, device=device)
            want[m - 1, row] = 144.0 if column % 2 else 1.0
            got = sm90_cases.gemm(kernel, a, b, config)
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=f"W4A4 b[{row}, {column}]")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(tile_m=256, tile_k=128, num_stages=2)], ids=str)
def test_every_code_under_every_scale_is_exact(config, device):
    sm90_cases.check_decodes(kernel, config, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("act", "out"), [("bf16", "bf16"), ("nvfp4", "fp32")])
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
def test_configs(config, act, out, device):
    problem = GemmProblem(m=77, n=264, k=640, act=act, out=out, segments=2)
    sm90_cases.check_runs_or_refuses(kernel, problem, config, device)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_ragged_m(act, device):
    for m in range(1, 301):
        config = Config(tile_m=SPACE["tile_m"][m % 5])
        case = testing.case(GemmProblem(m=m, n=136, k=128, act=act), device, seed=m)
        case.run(kernel, config)
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 2048, 7168), (2, 64, 7168), (5, 1024, 4096), (16, 7168, 2048), (33, 1536, 1536), (64, 512, 16384),
     (129, 4096, 1024), (300, 2304, 3072), (1000, 6144, 512)],
)  # fmt: skip
@pytest.mark.parametrize("act", ACTS)
def test_model_shapes(m, n, k, act, device):
    for segments, out in ((1, "bf16"), (2, "fp32")):
        case = testing.case(GemmProblem(m=m, n=n, k=k, act=act, out=out, segments=segments), device, seed=7)
        case.run(kernel, Config())
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_alpha_acts_on_the_sum(act, device):
    sm90_cases.check_alpha_acts_on_the_sum(kernel, Config(), 256, device, act)


@pytest.mark.gpu
def test_zero_blocks_and_the_largest_scale(device):
    gen = torch.Generator(device=device).manual_seed(5)
    b = testing.random_nvfp4(256, 512, gen)
    for byte in (0x00, 0x01, 0x7E):
        sf = torch.full((256, 32), byte, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        x = NVFP4Tensor(b.data, sf, torch.ones((), device=device))
        a = testing.random_activations((40, 512), gen)
        got = sm90_cases.gemm(kernel, a, x, Config())
        decoded = reference.dequant_nvfp4(x, torch.float64)
        testing.assert_gemm_close(got, a.double(), decoded, torch.ones(256, dtype=torch.float64, device=device))
        assert byte or not got.any()


@pytest.mark.gpu
def test_strided_rows_are_read_and_written_in_place(device):
    sm90_cases.check_strided_rows(kernel, Config(), 256, device)
    gen = torch.Generator(device=device).manual_seed(6)
    b, wide = testing.random_nvfp4(128, 256, gen), testing.random_activations((30, 512), gen)
    row = wide[3:4].as_strided((1, 256), (3, 1))  # what views of a single row may look like
    want = sm90_cases.gemm(kernel, wide[:4, :256].contiguous(), b, Config())[3:]
    torch.testing.assert_close(sm90_cases.gemm(kernel, row, b, Config()), want, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_repeated_runs_and_graph_replays_agree_to_the_bit(act, device):
    problem = GemmProblem(m=70, n=2048, k=2048, act=act)
    sm90_cases.check_repeats(kernel, problem, Config(tile_m=32), device)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    sm90_cases.check_the_op_runs_it(kernel, "cute_gemm_nvfp4_sm90", Config(tile_m=16), device)
