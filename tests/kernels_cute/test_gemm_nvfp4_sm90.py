"""gemm_nvfp4_sm90: its refusals and its machine code anywhere; its numbers on an sm_90 GPU."""

import dataclasses
import itertools
import re

import pytest
import torch

from fp4suite import dispatch, ops, reference, testing
from fp4suite.built import MAX_SHARED_BYTES, resources, sass
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90 as kernel
from kernels_cute.gemm_nvfp4_sm90 import SPACE, Config

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


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("tile_m", "tile_n"), TILES)
def test_every_tile_compiles_without_spills(tile_m, tile_n, act):
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
    a, b, out = _operands()
    with pytest.raises(TypeError, match="a must be bfloat16 or an NVFP4Tensor"):
        kernel.launch(a.float(), b, None, out, Config())
    with pytest.raises(TypeError, match="out must be bfloat16 or float32"):
        kernel.launch(a, b, None, out.half(), Config())
    with pytest.raises(ValueError, match="do not make"):
        kernel.launch(a, b, None, out[:2], Config())
    with pytest.raises(ValueError, match="columns of out must be adjacent"):
        kernel.launch(a, b, None, torch.empty(64, 3).T, Config())
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        kernel.launch(torch.zeros(3, 132, dtype=torch.bfloat16)[:, :128], b, None, out, Config())
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        kernel.launch(torch.zeros(3 * 128 + 1, dtype=torch.bfloat16)[1:].view(3, 128), b, None, out, Config())
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
    _, b, _ = _operands()
    kernel.launch(torch.empty(0, 128, dtype=torch.bfloat16), b, None, torch.empty(0, 64), Config())


# --- on a GPU ---------------------------------------------------------------------------------------------------------


DEFAULT = Config()


def _gemm(a, b, config=DEFAULT, segments=None):
    """launch into NaN, FP32."""
    out = torch.full((a.shape[0], b.shape[0]), float("nan"), device=b.device)
    kernel.launch(a, b, segments, out, config)
    return out


def _one_hot(code_at: tuple[int, int], n: int, k: int, device) -> NVFP4Tensor:
    """All zero but one code, 0.5 (even k) or -6 (odd k), under its own scale 2."""
    row, column = code_at
    data = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
    data[row, column // 2] = 0xF0 if column % 2 else 0x01
    sf = torch.zeros(n, k // BLOCK, device=device)
    sf[row, column // BLOCK] = 2
    return NVFP4Tensor(data, sf.to(torch.float8_e4m3fn), torch.ones((), device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(tile_m=8, tile_n=64, tile_k=128, num_stages=2)], ids=str)
def test_single_elements_land_where_they_belong(config, device):
    m, n, k = config.tile_m + 3, config.tile_n + 8, 2 * config.tile_k
    spots_k = [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 100, k - 1]
    spots_n = [0, 1, 7, 8, 9, 16, 33, 63, config.tile_n - 1, config.tile_n, n - 1]
    spots_m = [0, 1, 2, 7, config.tile_m - 1, config.tile_m, m - 1]
    for column in spots_k:
        for row in spots_n:
            b = _one_hot((row, column), n, k, device)
            value = -12.0 if column % 2 else 1.0
            a = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
            for spot in spots_m:
                a[spot, column] = spot + 1
            want = torch.zeros(m, n, device=device)
            want[:, row] = a[:, column].float() * value
            torch.testing.assert_close(_gemm(a, b, config), want, rtol=0, atol=0, msg=f"b[{row}, {column}]")
            packed = _one_hot((spots_m[-1], column), m, k, device)
            want = torch.zeros(m, n, device=device)
            want[spots_m[-1], row] = value * value
            torch.testing.assert_close(_gemm(packed, b, config), want, rtol=0, atol=0, msg=f"W4A4 b[{row}, {column}]")


@pytest.mark.gpu
def test_every_code_under_every_scale_is_exact(device):
    """a picks single elements of b, so that d is b decoded: no sum, no rounding."""
    n, k = 128, 512  # row r has scale byte r (126 at most), and all codes in every position of a block
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    data[:, :128] = torch.arange(128, device=device, dtype=torch.uint8)
    data[:, 128:] = torch.arange(128, 256, device=device, dtype=torch.uint8)
    scales = torch.arange(n, device=device, dtype=torch.uint8).clamp(max=126)
    sf = scales[:, None].expand(n, k // BLOCK).contiguous().view(torch.float8_e4m3fn)
    b = NVFP4Tensor(data, sf, torch.ones((), device=device))
    want = reference.dequant_nvfp4(b, torch.float32).T
    for config in (Config(), Config(tile_m=256, tile_k=128, num_stages=2)):
        got = _gemm(torch.eye(k, dtype=torch.bfloat16, device=device), b, config)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("act", "out"), [("bf16", "bf16"), ("nvfp4", "fp32")])
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
def test_configs(config, act, out, device):
    problem = GemmProblem(m=77, n=264, k=640, act=act, out=out, segments=2)
    if reason := kernel.supports(problem, config):
        assert "shared memory" in reason or "accumulators" in reason
        with pytest.raises(ValueError, match=re.escape(reason)):
            testing.case(problem, device).run(kernel, config)
        return
    case = testing.case(problem, device, seed=1)
    case.run(kernel, config)
    case.check()


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
    """2^40 and 2^-40 overflow or vanish if folded into scales; as powers of two they must leave all bits in place."""
    plain = testing.case(GemmProblem(m=9, n=128, k=256, act=act, out="fp32"), device, seed=3)
    a, b, _ = plain.operands
    one = _gemm(a, NVFP4Tensor(b.data, b.sf, torch.ones((), device=device)))
    alphas = torch.tensor([2.0**40, 2.0**-40, -1.0], device=device)
    segments = (8, 72, 48)
    got = _gemm(a, NVFP4Tensor(b.data, b.sf, alphas), segments=segments)
    factors = alphas.repeat_interleave(torch.tensor(segments, device=device))
    torch.testing.assert_close(got, one * factors, rtol=0, atol=0)


@pytest.mark.gpu
def test_zero_blocks_and_the_largest_scale(device):
    gen = torch.Generator(device=device).manual_seed(5)
    b = testing.random_nvfp4(256, 512, gen)
    for byte in (0x00, 0x01, 0x7E):
        sf = torch.full((256, 32), byte, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        x = NVFP4Tensor(b.data, sf, torch.ones((), device=device))
        a = testing.random_activations((40, 512), gen)
        got = _gemm(a, x)
        decoded = reference.dequant_nvfp4(x, torch.float64)
        testing.assert_gemm_close(got, a.double(), decoded, torch.ones(256, dtype=torch.float64, device=device))
        assert byte or not got.any()


@pytest.mark.gpu
def test_strided_rows_are_read_and_written_in_place(device):
    gen = torch.Generator(device=device).manual_seed(6)
    b = testing.random_nvfp4(128, 256, gen)
    wide = testing.random_activations((30, 512), gen)
    row = wide[3:4].as_strided((1, 256), (3, 1))  # what views of a single row may look like
    torch.testing.assert_close(_gemm(row, b), _gemm(wide[:4, :256].contiguous(), b)[3:], rtol=0, atol=0)
    frame = torch.full((30, 200), float("nan"), device=device)
    kernel.launch(wide[:, 256:], b, None, frame[:, 8:136], Config())
    torch.testing.assert_close(frame[:, 8:136], _gemm(wide[:, 256:].contiguous(), b), rtol=0, atol=0)
    assert frame[:, :8].isnan().all()
    assert frame[:, 136:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_repeated_runs_and_graph_replays_agree_to_the_bit(act, device):
    problem = GemmProblem(m=70, n=2048, k=2048, act=act)
    config = Config(tile_m=32)
    kernel.warm(problem, config)
    case = testing.case(problem, device, seed=8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    case.poison()
    with torch.cuda.graph(graph, stream=stream):
        case.launch(kernel, config)
    graph.replay()
    case.check()
    first = case.out.clone()
    for _ in range(20):
        case.poison()
        graph.replay()
        assert torch.equal(case.out, first)
        case.run(kernel, config)
        assert torch.equal(case.out, first)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    gen = torch.Generator(device=device).manual_seed(9)
    b = testing.random_nvfp4(256, 512, gen, alpha=torch.tensor([0.5, 2.0], device=device))
    a = testing.random_activations((2, 5, 512), gen)
    with dispatch.override(kernel="cute_gemm_nvfp4_sm90", config=Config(tile_m=16)), dispatch.recording() as choices:
        got = ops.gemm_nvfp4(a, b, segments=(96, 160), out_dtype=torch.float32)
    assert [c.kernel for c in choices] == ["cute_gemm_nvfp4_sm90"]
    assert got.shape == (2, 5, 256)
    decoded = reference.dequant_nvfp4(NVFP4Tensor(b.data, b.sf, torch.ones((), device=device)), torch.float64)
    alpha = b.alpha.double().repeat_interleave(torch.tensor([96, 160], device=device))
    testing.assert_gemm_close(got.flatten(0, 1), a.flatten(0, 1).double(), decoded, alpha)
