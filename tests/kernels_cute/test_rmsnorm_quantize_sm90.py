"""rmsnorm_quantize_sm90: its refusals and machine code anywhere, the reference's bytes in the emulator and on a GPU."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, override, recording, reference, registry, table, testing
from fp4suite.built import resources, sass
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RmsnormQuantizeProblem
from kernels_cute import rmsnorm_quantize_sm90 as kernel
from kernels_cute.rmsnorm_quantize_sm90 import Config
from ptx_emulator import emulate

PROBLEM = RmsnormQuantizeProblem(m=4096, k=7168)
CONFIGS = [
    pytest.param(k, config, id=f"{k}-{config}")
    for k in (512, 1536, 4096, 7168, 16384)
    for config in testing.every(kernel, replace(PROBLEM, k=k))
]


@pytest.fixture
def few_ctas(monkeypatch):
    """Two take all rows in turn, and whatever is compiled keeps its PTX."""
    for function in (kernel.compiled, kernel.compiled_finish):
        function.cache_clear()
    monkeypatch.setattr(kernel, "_sms", lambda device: 2)
    yield
    for function in (kernel.compiled, kernel.compiled_finish):
        function.cache_clear()


def rows(m: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Amplitudes of many powers of two; a row of zeros; infinities and NaN in later ones."""
    gen = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=gen) * torch.exp2(torch.randint(-12, 8, (m, 1), generator=gen).float())
    x[:, 32:48] = 0
    x[:, 48:64] = -0.0
    x[:, 64:80] = torch.arange(16) * 0.25
    x[0] = 0
    for row, bad in zip(range(2, m, 3), (torch.inf, -torch.inf, torch.nan, -torch.nan), strict=False):
        x[row, 37 * row % k] = bad
    return x.bfloat16().to(device)


def weights(k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (1 + 0.3 * torch.randn(k, generator=torch.Generator().manual_seed(k))).to(dtype)


def check(
    x: Tensor, weight: Tensor, alpha: float, sf_layout: Any, config: Config | None = None, eps: float = 1e-6
) -> None:
    """The reference's bytes, into room of other ones."""
    m, k = x.shape
    scale = torch.tensor(alpha, device=x.device)
    out = NVFP4Tensor.empty((m, k), scale, sf_layout)
    out.data.fill_(0xFF)
    out.sf.view(torch.uint8).fill_(0xFF)
    config = config or kernel.default(replace(PROBLEM, m=m, k=k))
    kernel.launch(x, weight.to(x.device), eps, scale, out, "absmax", config)
    want = reference.rmsnorm_quantize(x, weight.to(x.device), eps, alpha=scale, sf_layout=sf_layout)
    testing.assert_same_bytes(out.data, want.data, "data")
    testing.assert_same_bytes(out.sf, want.sf, "sf")


# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (replace(PROBLEM, x="fp32"), Config(), "x=fp32 rule=absmax: this kernel takes rows in bf16 by rule absmax"),
        (replace(PROBLEM, rule="mse"), Config(), "x=bf16 rule=mse"),
        (replace(PROBLEM, k=7184), Config(), "k=7184 is not a multiple of 1024 columns for each warp"),
        (replace(PROBLEM, k=7168), Config(tiles=3), "k=7168 is not a multiple of 1536 columns for each warp"),
        (PROBLEM, Config(tiles=1, groups=3), "has 1504 threads, more than 1024"),
        (replace(PROBLEM, k=32768), Config(tiles=2, groups=1), "has 1184 threads, more than 1024"),
        (replace(PROBLEM, k=24576), Config(tiles=3, groups=1, summing=4), "shared memory holds 4 rows, too few"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


def test_refusals_at_launch():
    x, weight, alpha = rows(2, 512), weights(512), torch.tensor(0.01)
    out = NVFP4Tensor.empty((2, 512), alpha, "linear")
    with pytest.raises(ValueError, match="takes rule absmax"):
        kernel.launch(x, weight, 1e-6, alpha, out, "mse", Config(tiles=1))
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        kernel.launch(x.T.contiguous().T, weight, 1e-6, alpha, out, "absmax", Config(tiles=1))
    with pytest.raises(ValueError, match=r"x=torch\.float16"):
        kernel.launch(x.half(), weight, 1e-6, alpha, out, "absmax", Config(tiles=1))
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(PROBLEM, Config(), "sm_100a")


def test_dispatch(monkeypatch, tmp_path):
    """Only what asks for it has this kernel, as long as it has not been timed."""
    monkeypatch.setattr(table, "shipped_dir", lambda: tmp_path)
    dispatch.reread_tables()
    target = dispatch.Target("sm_90a", "sm_90a")
    chosen = {dispatch.choose_for(p.op, p, target).kernel for p in (PROBLEM, replace(PROBLEM, m=131072, k=1536))}
    assert chosen == {"triton_rmsnorm_quantize"}
    monkeypatch.undo()
    dispatch.reread_tables()
    with override(kernel="cute_rmsnorm_quantize_sm90"), dispatch.on_target("sm_90a"):
        assert dispatch.choose(PROBLEM.op, PROBLEM, "cpu").kernel == "cute_rmsnorm_quantize_sm90"
        few = replace(PROBLEM, m=kernel.LEAST_TOKENS - 1)
        with pytest.raises(ValueError, match="below 1024 rows the Triton kernel is taken"):
            dispatch.choose(few.op, few, "cpu")


@pytest.mark.parametrize("k", [512, 1024, 1536, 4096, 5120, 7168, 8704, 16384])
def test_machine_code(k):
    """Nothing spills; a code takes one minimum of three lines, a block one store of its codes."""
    problem = replace(PROBLEM, k=k)
    config = kernel.default(problem)
    assert kernel.supports(problem, config) is None
    built = kernel.build(problem, config)
    found = resources(built)
    assert found.spill_bytes == 0
    assert found.registers * config.threads(k) <= 65536
    code = sass(built)
    of_blocks = config.tiles * 16
    assert len(re.findall(r"\bVIMNMX3\b", code)) == of_blocks  # the lowest of three lines, of each element
    assert len(re.findall(r"\bSTG\.E\.64\b", code)) == config.tiles  # a block's codes at a time


@pytest.mark.parametrize(
    ("m", "k", "config", "sf_layout", "schedule"),
    [
        (9, 7168, None, "linear", "eager"),
        (7, 7168, Config(tiles=1, groups=1, summing=1), "blocked_128x4", "late"),
        (70, 512, Config(tiles=1, groups=8, summing=3), "blocked_128x4", "late"),
        (40, 1536, Config(tiles=3, groups=8, summing=2), "linear", "late"),
        (30, 1536, Config(tiles=1, groups=4, summing=3), "blocked_128x4", "eager"),
        (20, 4096, Config(tiles=2, groups=3, summing=2), "linear", "round"),
        (1, 1024, Config(tiles=1, groups=6, summing=2), "linear", "round"),
    ],
)
def test_in_the_emulator(m, k, config, sf_layout, schedule, few_ctas):
    """More rows than slots and fewer than warps; no bank conflict but in the table of factors."""
    with emulate("sm_90a", schedule=schedule) as gpu:
        check(rows(m, k), weights(k), 0.002, sf_layout, config)
    assert gpu.launches[0].bank_conflicts <= m * k // 16


def test_operands_in_the_emulator(few_ctas):
    """Rows of any stride, at odd addresses too; weights of FP32 and FP16; alphas that nothing fits; zeros, no eps."""
    wide = rows(24, 2048)
    with emulate("sm_90a"):
        for x in (wide[::3, :1536], wide[1::2, 5:1541], wide[:, 8:1544]):
            check(x, weights(1536, torch.float32), 0.002, "linear")
        check(wide[:, :512], weights(512, torch.float16), 0.002, "linear")
        for alpha in (0.0, 1e-38, 1e-30, 1e30, float("nan")):
            check(wide[:5, :512], weights(512), alpha, "linear")
        check(torch.zeros(3, 512).bfloat16(), weights(512), 0.002, "linear", eps=0.0)


def test_global_scale_in_the_emulator(few_ctas):
    """To the bit, which a code would hide; of all rows; NaN."""
    x, weight = rows(40, 1536), weights(1536)
    finite = x[torch.isfinite(x).all(1)]
    with emulate("sm_90a"):
        for these, eps in ((finite, 1e-6), *((row[None], 1e-6) for row in finite[:6]), (x, 1e-6), (x[:1], 0.0)):
            alpha = torch.full((), 123.0)
            kernel.global_scale(these, weight, eps, alpha, Config(tiles=3, groups=2))
            want = reference.rmsnorm_quantize(these, weight, eps).alpha
            torch.testing.assert_close(alpha, want, rtol=0, atol=0, equal_nan=True)
    kernel.global_scale(x[:0], weight, 1e-6, alpha, Config(tiles=3))
    assert alpha == 0


def test_nothing_to_do():
    case = testing.case(replace(PROBLEM, m=0), "cpu")
    case.run(kernel, Config())


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "config"), CONFIGS)
def test_configs(k, config, device):
    """Fewer rows than SMs, a few for each, more than slots; both layouts."""
    for m, sf_layout in ((5, "linear"), (1000, "blocked_128x4"), (9000, "linear")):
        check(rows(m, k, device), weights(k), 0.002, sf_layout, config)


@pytest.mark.gpu
def test_all_numbers(device):
    """Every BF16 number, in rows of 4096 with others of its size."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for eps in (1e-6, 0.0):
        check(bits.view(16, 4096).to(device), weights(4096), 0.002, "linear", eps=eps)


@pytest.mark.gpu
def test_the_op_runs_it_in_a_graph(device):
    """The global scale too; replayed on new inputs."""
    m, k = 4096, 7168
    x, weight = rows(m, k, device), weights(k).to(device)
    x[~torch.isfinite(x)] = 1
    graph = torch.cuda.CUDAGraph()
    with override(kernel="cute_rmsnorm_quantize_sm90"):
        with recording() as choices:
            ops.rmsnorm_quantize(x, weight, 1e-6)
        assert {c.kernel for c in choices} == {"cute_rmsnorm_quantize_sm90"}
        with torch.cuda.graph(graph):
            got = ops.rmsnorm_quantize(x, weight, 1e-6)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(m, k, device=device) * 10.0**seed)
        graph.replay()
        want = reference.rmsnorm_quantize(x, weight, 1e-6)
        assert torch.equal(got.alpha, want.alpha)
        testing.assert_same_bytes(got.data, want.data, "data")
        testing.assert_same_bytes(got.sf, want.sf, "sf")


@pytest.mark.gpu
def test_two_streams_at_once(device):
    cases = [testing.case(replace(PROBLEM, m=3000), device, seed) for seed in (5, 6)]
    config = registry.default_config(kernel, PROBLEM)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(10):
        for case, stream in zip(cases, streams, strict=True):
            case.poison()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                case.launch(kernel, config)
        torch.cuda.synchronize()
        for case in cases:
            case.check()
