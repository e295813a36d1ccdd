"""W4A4 on sm_90a beside sm_100a: the same codes and scales give the same numbers, up to the order of FP32 sums.

Each is compared with the FP64 product of the decoded operands, and with the others: what decodes both operands itself,
what decodes a to BF16 first and b on its way to the tensor core, and sm_100a's block-scaled MMA, all in the emulator.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp4suite import WeightLayout, dispatch, ops, reference, testing, warmup
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import GemmProblem
from fp4suite.reference.quant import scaled_codes
from kernels_cute import gemm_nvfp4_sm90, gemm_nvfp4_sm90_wgmma, gemm_nvfp4_sm100
from ptx_emulator import emulate

N, K = 128, 256
SEGMENTS = (48, 24, 56)
KERNELS = {
    "rows": ("sm_90a", "cute_gemm_nvfp4_sm90", WeightLayout()),
    "prepared": ("sm_90a", "cute_gemm_nvfp4_sm90_wgmma", WeightLayout("fragments_sm90")),
    "sm_100a": ("sm_100a", "cute_gemm_nvfp4_sm100", WeightLayout(sf_layout="blocked_128x4")),
}
Operands = tuple[NVFP4Tensor, NVFP4Tensor, tuple[int, ...] | None]


@pytest.fixture(autouse=True, scope="module")
def _compiled_here() -> Iterator[None]:
    """What is compiled outside of `emulate` carries no PTX."""
    modules = (gemm_nvfp4_sm90, gemm_nvfp4_sm90_wgmma, gemm_nvfp4_sm100)
    for module in modules:
        module.compiled.cache_clear()
    yield
    for module in modules:
        module.compiled.cache_clear()


def _random(m: int, seed: int, adversarial: bool) -> Operands:
    gen = torch.Generator().manual_seed(seed)
    a = testing.random_nvfp4(m, K, gen, adversarial=adversarial)
    return a, testing.random_nvfp4(N, K, gen, adversarial=adversarial), None


def _extreme_scales() -> Operands:
    """Rows of the smallest subnormal scale, of 448, of zero scales and of zero codes, of negative zeros and of 6."""
    a, b, segments = _alphas(0.5, 1.0, -2.0, 0.25)()
    for t in (a, b):
        t.sf[0], t.sf[1], t.sf[2] = 2.0**-9, 448.0, 0.0
        t.data[3], t.data[4], t.data[5] = 0, 0x88, 0x77
        t.sf[5] = 448.0
        t.sf[6, ::2], t.sf[6, 1::2] = 2.0**-9, 448.0
    return a, b, segments


def _alphas(alpha_a: float, *alpha_b: float) -> Callable[[], Operands]:
    def made() -> Operands:
        a, b, _ = _random(9, 5, True)
        return replace(a, alpha=torch.tensor(alpha_a)), replace(b, alpha=torch.tensor(alpha_b)), SEGMENTS

    return made


# one config of each kernel a number of rows, so those with segments run what is compiled once
CASES: dict[str, Callable[[], Operands]] = {
    "one row": lambda: _random(1, 1, False),
    "ragged rows, any scale": lambda: _random(67, 2, True),
    "extreme scales": _extreme_scales,
    "large alpha": _alphas(2.0**40, 2.0**-40, 2.0**20, 1.0),
    "small alpha": _alphas(2.0**-40, 2.0**-40, 2.0**20, 1.0),
    "segments": _alphas(0.0123, 1.7, -0.4e-3, 3.1e5),
}


def _prepared(t: NVFP4Tensor, layout: WeightLayout) -> NVFP4Tensor:
    """A copy of a weight in this layout."""
    return replace(t, data=t.data.clone(), sf=t.sf.clone()).lay_out_(layout)


def _run(name: str, operands: Operands, dtype: torch.dtype) -> Tensor:
    arch, kernel, layout = KERNELS[name]
    a, b, segments = operands
    with emulate(arch), dispatch.recording() as choices:
        out = ops.gemm_nvfp4(a, _prepared(b, layout), segments=segments, out_dtype=dtype)
    assert [c.kernel for c in choices if c.op == "gemm_nvfp4"] == [kernel]
    return out


def _exact(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded a and b, and the product of alphas a column, rounded to FP32 as the reference has it; all in FP64."""
    a, b, segments = operands
    columns = torch.tensor(segments or (N,))
    alpha = b.alpha.reshape(-1).repeat_interleave(columns) * a.alpha
    return scaled_codes(a).double(), scaled_codes(b).double(), alpha.double()


def _ordered(x: Tensor) -> Tensor:
    """BF16 numbers as integers in their order, neighbours one apart."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name: str) -> None:
    operands = CASES[name]()
    a, b, alpha = _exact(operands)
    want = (a @ b.T) * alpha
    room = (a.abs() @ b.abs().T) * alpha.abs() * (K / 16 + 16) * 2.0**-23 + want.abs() * 2.0**-23
    sums = {which: _run(which, operands, torch.float32) for which in KERNELS}
    for which, got in sums.items():
        testing.assert_gemm_close(got, a, b, alpha)
        for other, beside in sums.items():
            apart = (got.double() - beside.double()).abs() - 2 * room
            assert apart.max() <= 0, (which, other)

    rounded = {which: _run(which, operands, torch.bfloat16) for which in KERNELS}
    sure = room <= want.abs() * 2.0**-9  # elsewhere cancellation leaves few bits of the sum, whatever its order
    assert sure.double().mean() > 0.9
    for which, got in rounded.items():
        testing.assert_gemm_close(got, a, b, alpha)
        for beside in (want.bfloat16(), *rounded.values()):
            units = (_ordered(got) - _ordered(beside)).abs()
            assert units[sure].max() <= 1, which
            assert (units[sure] == 0).double().mean() > 0.98, which


def test_every_product_is_exact() -> None:
    """One nonzero block of K in each row: no sum of sixteen that FP32 cannot hold, so no order either."""
    a, b, _ = _random(67, 6, True)
    for t in (a, b):
        keep = torch.zeros(t.shape[0], K // BLOCK, dtype=torch.bool)
        keep[torch.arange(t.shape[0]), torch.arange(t.shape[0]) * 3 % (K // BLOCK)] = True
        t.sf.view(torch.uint8)[~keep] = 0
    b = replace(b, alpha=torch.tensor(2.0**-5))
    exact, other, alpha = _exact((a, b, None))
    want = ((exact @ other.T) * alpha).float()
    assert (want != 0).any()
    for which in KERNELS:
        assert torch.equal(_run(which, (a, b, None), torch.float32), want), which


@pytest.mark.parametrize("layout", ["linear", "blocked_128x4"])
@pytest.mark.parametrize("which", ["rows", "prepared"])
def test_nvfp4_output_has_the_bytes_of_quantizing_the_sums(which: str, layout: str) -> None:
    arch, _, order = KERNELS[which]
    a, b, segments = CASES["segments"]()
    b = _prepared(b, order)
    alpha = torch.tensor(0.05)
    with emulate(arch):
        got = ops.gemm_nvfp4(a, b, segments=segments, out_alpha=alpha, out_sf_layout=layout)
        whole = ops.gemm_nvfp4(a, b, segments=segments, out_dtype=torch.float32)
    want = reference.quantize_nvfp4(whole, alpha=alpha, sf_layout=layout)
    testing.assert_same_bytes(got.data, want.data, "data")
    testing.assert_same_bytes(got.sf, want.sf, "sf")
    exact, other, product = _exact((a, b, segments))
    testing.assert_gemm_quantized(got, exact, other, product)


def test_scales_of_activations_in_either_layout() -> None:
    """As a caller on Blackwell has them."""
    a, b, _ = _random(7, 8, True)
    want = _run("prepared", (a, b, None), torch.float32)
    assert torch.equal(_run("prepared", (a.with_sf_layout("blocked_128x4"), b, None), torch.float32), want)


def test_choice_says_what_runs() -> None:
    """The kernel and the entries of W4A16: one weight in memory serves both kinds of activations."""
    packed = GemmProblem(m=8, n=7168, k=3072, act="nvfp4", order="fragments_sm90")
    plain = replace(packed, act="bf16")
    target = dispatch.Target("sm_90a", "nvidia-h100-80gb-hbm3")
    got, want = (dispatch.choose_for("gemm_nvfp4", p, target) for p in (packed, plain))
    assert (got.kernel, got.config, got.problem) == (want.kernel, want.config, plain)
    assert got.reason == f"activations decoded to bf16, {want.reason}"
    with dispatch.on_target("sm_90a"):
        for act in ("bf16", "nvfp4"):
            assert dispatch.weight_layout(7168, 3072, "cpu", act=act).order == "fragments_sm90"
        with dispatch.override(kernel="cute_gemm_nvfp4_sm90_wgmma", config=gemm_nvfp4_sm90_wgmma.Config()):
            assert dispatch.choose("gemm_nvfp4", packed, "cpu").problem == plain
        with (
            dispatch.override(kernel="cute_gemm_nvfp4_sm90_skinny"),
            pytest.raises(ValueError, match="weights in the order fragments_sm90: this kernel reads rows"),
        ):
            dispatch.choose("gemm_nvfp4", packed, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 13, 300])
def test_both_ways_on_a_gpu(m: int, device: torch.device) -> None:
    """Of the decoded activations the BF16 product is the same to the bit: alpha is one FP32 product either way."""
    gen = torch.Generator(device=device).manual_seed(9)
    a = testing.random_nvfp4(m, K, gen, adversarial=True, alpha=torch.tensor(0.0123, device=device))
    alphas = torch.tensor([1.7, -0.4e-3, 3.1e5], device=device)
    b = testing.random_nvfp4(N, K, gen, adversarial=True, alpha=alphas)
    prepared = _prepared(b, WeightLayout("fragments_sm90"))
    for dtype in (torch.bfloat16, torch.float32):
        got = ops.gemm_nvfp4(a, prepared, segments=SEGMENTS, out_dtype=dtype)
        decoded = ops.dequant_nvfp4(replace(a, alpha=torch.ones_like(a.alpha)))
        plain = ops.gemm_nvfp4(decoded, replace(prepared, alpha=alphas * a.alpha), segments=SEGMENTS, out_dtype=dtype)
        assert torch.equal(got, plain)
        exact = a.to("cpu"), b.to("cpu"), SEGMENTS
        testing.assert_gemm_close(got.cpu(), *_exact(exact))
        testing.assert_gemm_close(ops.gemm_nvfp4(a, b, segments=SEGMENTS, out_dtype=dtype).cpu(), *_exact(exact))


@pytest.mark.gpu
def test_opcheck_graphs_and_compiled_functions(device: torch.device) -> None:
    problem = GemmProblem(m=24, n=N, k=K, act="nvfp4", order="fragments_sm90")
    (choice,) = warmup([problem], device)
    assert choice.problem == replace(problem, act="bf16")
    gen = torch.Generator(device=device).manual_seed(10)
    a = testing.random_nvfp4(24, K, gen, adversarial=True)
    b = testing.random_nvfp4(N, K, gen, adversarial=True).lay_out_(WeightLayout("fragments_sm90"))

    def call(data: Tensor, alpha: Tensor) -> Tensor:
        return ops.gemm_nvfp4(NVFP4Tensor(data, a.sf, alpha), b)

    right = (b.data, b.sf.view(torch.uint8), b.alpha, "linear", "fragments_sm90", [])
    left = (a.data, a.sf.view(torch.uint8), a.alpha, "linear")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fp4suite.gemm_w4a4.default, (*left, *right, torch.bfloat16), test_utils=checks)
    own = torch.ones((), device=device)
    operator = torch.ops.fp4suite.gemm_w4a4_quantize.default
    torch.library.opcheck(operator, (*left, *right, own, "blocked_128x4"), test_utils=checks)

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(a.data, a.alpha), call(a.data, a.alpha))
    torch._dynamo.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(a.data, a.alpha)
    for turn in range(3):
        a.data.copy_(torch.roll(a.data, turn + 1, dims=0))
        a.alpha.mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.clone(), call(a.data.clone(), a.alpha.clone()))
