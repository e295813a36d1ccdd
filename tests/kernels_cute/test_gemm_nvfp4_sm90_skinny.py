"""gemm_nvfp4_sm90_skinny: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import re

import pytest
import torch

from fp4suite import dispatch, ops, reference, testing
from fp4suite.built import resources, sass
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90_skinny as kernel
from kernels_cute.gemm_nvfp4_sm90_skinny import SPACE, Config
from ptx_emulator import emulate

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
    gen = torch.Generator().manual_seed(0)
    a, b, out = torch.zeros(3, 1024, dtype=torch.bfloat16), testing.random_nvfp4(64, 1024, gen), torch.empty(3, 64)
    with pytest.raises(ValueError, match="activations in nvfp4"):
        kernel.launch(testing.random_nvfp4(3, 1024, gen), b, None, out, Config())
    with pytest.raises(TypeError, match="a must be bfloat16"):
        kernel.launch(a.float(), b, None, out, Config())
    with pytest.raises(TypeError, match="out must be bfloat16 or float32"):
        kernel.launch(a, b, None, out.half(), Config())
    with pytest.raises(ValueError, match="do not make"):
        kernel.launch(a, b, None, out[:2], Config())
    with pytest.raises(ValueError, match="columns of out must be adjacent"):
        kernel.launch(a, b, None, torch.empty(64, 3).T, Config())
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        kernel.launch(torch.zeros(3 * 1024 + 1, dtype=torch.bfloat16)[1:].view(3, 1024), b, None, out, Config())
    with pytest.raises(ValueError, match="b must have linear scales"):
        kernel.launch(a, b.with_sf_layout("blocked_128x4"), None, out, Config())


def test_empty_m_is_nothing_to_do():
    b = testing.random_nvfp4(64, 1024, torch.Generator().manual_seed(0))
    kernel.launch(torch.empty(0, 1024, dtype=torch.bfloat16), b, None, torch.empty(0, 64), Config())


@pytest.mark.parametrize("schedule", ["late", "eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_in_the_emulator(config, schedule):
    """Ragged m, n and k; segments; every element against the FP64 product, every access against the others'."""
    kernel.compiled.cache_clear()
    m, parts = min(config.tile_m, 13) if config.tile_m < 16 else config.tile_m + 3, config.split * config.warps_k
    problem = GemmProblem(m=m, n=config.tile_n + 24, k=128 * parts * 2 - 64, act="bf16", out="fp32", segments=2)
    case = testing.case(problem, "cpu", 1)
    with emulate("sm_90a", schedule=schedule):
        case.run(kernel, config)
    kernel.compiled.cache_clear()
    case.check()


# --- on a GPU ---------------------------------------------------------------------------------------------------------

DEFAULT = Config()


def _gemm(a, b, config=DEFAULT, segments=None):
    """launch into NaN, FP32."""
    out = torch.full((a.shape[0], b.shape[0]), float("nan"), device=b.device)
    kernel.launch(a, b, segments, out, config)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(tile_m=8, warps_n=8, warps_k=1, split=3, loops=2)], ids=str)
def test_single_elements_land_where_they_belong(config, device):
    m, n, k = 6, config.tile_n + 8, 128 * config.split * config.warps_k * 2
    for column in (0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 200, k // 2, k - 1):
        for row in (0, 1, 7, 8, 9, 15, 16, 33, config.tile_n - 1, config.tile_n, n - 1):
            data = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
            data[row, column // 2] = 0xF0 if column % 2 else 0x01  # -6 or 0.5
            sf = torch.zeros(n, k // BLOCK, device=device)
            sf[row, column // BLOCK] = 2
            b = NVFP4Tensor(data, sf.to(torch.float8_e4m3fn), torch.ones((), device=device))
            a = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
            a[:, column] = torch.arange(1, m + 1, device=device)
            want = torch.zeros(m, n, device=device)
            want[:, row] = a[:, column].float() * (-12.0 if column % 2 else 1.0)
            torch.testing.assert_close(_gemm(a, b, config), want, rtol=0, atol=0, msg=f"b[{row}, {column}]")


@pytest.mark.gpu
def test_every_code_under_every_scale_is_exact(device):
    """a picks single elements of b, so that d is b decoded: no sum, no rounding."""
    n, k = 128, 512  # row r has scale byte r (126 at most), and all codes in every position of a block
    data = torch.arange(256, device=device, dtype=torch.int32).to(torch.uint8).expand(n, k // 2).contiguous()
    scales = torch.arange(n, device=device, dtype=torch.uint8).clamp(max=126)
    sf = scales[:, None].expand(n, k // BLOCK).contiguous().view(torch.float8_e4m3fn)
    b = NVFP4Tensor(data, sf, torch.ones((), device=device))
    want = reference.dequant_nvfp4(b, torch.float32).T
    for at in range(0, k, 64):
        got = _gemm(torch.eye(k, dtype=torch.bfloat16, device=device)[at : at + 64], b)
        torch.testing.assert_close(got, want[at : at + 64], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel, most=40), ids=str)
def test_configs(config, device):
    for problem in (
        GemmProblem(m=13, n=520, k=4096 + 64, act="bf16", out="fp32", segments=2),
        GemmProblem(m=1, n=136, k=1088, act="bf16"),
        GemmProblem(m=50, n=136, k=1088, act="bf16"),
    ):
        if reason := kernel.supports(problem, config):
            with pytest.raises(ValueError, match=re.escape(reason)):
                testing.case(problem, device).run(kernel, config)
            continue
        case = testing.case(problem, device, seed=1)
        case.run(kernel, config)
        case.check()


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
    """2^40 and 2^-40 overflow or vanish if folded into scales; as powers of two they must leave all bits in place."""
    a, b, _ = testing.case(GemmProblem(m=9, n=128, k=1024, act="bf16", out="fp32"), device, seed=3).operands
    one = _gemm(a, NVFP4Tensor(b.data, b.sf, torch.ones((), device=device)))
    alphas = torch.tensor([2.0**40, 2.0**-40, -1.0], device=device)
    segments = (8, 72, 48)
    got = _gemm(a, NVFP4Tensor(b.data, b.sf, alphas), segments=segments)
    torch.testing.assert_close(
        got, one * alphas.repeat_interleave(torch.tensor(segments, device=device)), rtol=0, atol=0
    )


@pytest.mark.gpu
def test_strided_rows_are_read_and_written_in_place(device):
    gen = torch.Generator(device=device).manual_seed(6)
    b = testing.random_nvfp4(128, 1024, gen)
    wide = testing.random_activations((30, 2048), gen)
    frame = torch.full((30, 200), float("nan"), device=device)
    kernel.launch(wide[:, 1024:], b, None, frame[:, 8:136], Config())
    torch.testing.assert_close(frame[:, 8:136], _gemm(wide[:, 1024:].contiguous(), b), rtol=0, atol=0)
    assert frame[:, :8].isnan().all()
    assert frame[:, 136:].isnan().all()


@pytest.mark.gpu
def test_repeated_runs_and_graph_replays_agree_to_the_bit(device):
    problem = GemmProblem(m=12, n=4096, k=4096, act="bf16")
    kernel.warm(problem, Config())
    case = testing.case(problem, device, seed=8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    case.poison()
    with torch.cuda.graph(graph, stream=stream):
        case.launch(kernel, Config())
    graph.replay()
    case.check()
    first = case.out.clone()
    for _ in range(20):
        case.poison()
        graph.replay()
        assert torch.equal(case.out, first)
        case.run(kernel, Config())
        assert torch.equal(case.out, first)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    gen = torch.Generator(device=device).manual_seed(9)
    b = testing.random_nvfp4(256, 1024, gen)
    a = testing.random_activations((2, 5, 1024), gen)
    with dispatch.override(kernel="cute_gemm_nvfp4_sm90_skinny"), dispatch.recording() as choices:
        got = ops.gemm_nvfp4(a, b, out_dtype=torch.float32)
    assert [c.kernel for c in choices] == ["cute_gemm_nvfp4_sm90_skinny"]
    decoded = reference.dequant_nvfp4(b, torch.float64)
    ones = torch.ones(256, dtype=torch.float64, device=device)
    testing.assert_gemm_close(got.flatten(0, 1), a.flatten(0, 1).double(), decoded, ones)
