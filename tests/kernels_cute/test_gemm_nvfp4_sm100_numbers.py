"""gemm_nvfp4_sm100 executed in `ptx_emulator`: every knob against the FP64 product, NVFP4 output, exactness.

`python -m tests.kernels_cute.sweep_sm100` runs many more configs.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, reference, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem
from fp4suite.reference.quant import global_scale, scaled_codes
from kernels_cute import gemm_nvfp4_sm100 as kernel
from kernels_cute.gemm_nvfp4_sm100 import Config
from ptx_emulator import Fault, emulate
from ptx_emulator.machine import SCHEDULES

from . import sm100_cases

BY_VALUE = sm100_cases.by_value()
SUMMED = Config(tile_n=16, swap_ab=True, split_k=4)


@pytest.fixture(autouse=True, scope="module")
def _compiled_here() -> Iterator[None]:
    """What is compiled outside `emulate` carries no PTX."""
    kernel.compiled.cache_clear()
    yield
    kernel.compiled.cache_clear()


@pytest.fixture(autouse=True)
def _two_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough that they walk over several tiles; more than one where a cluster has fewer CTAs than four."""
    monkeypatch.setattr(kernel, "_sm_count", lambda device: 4)


@pytest.mark.parametrize("config", BY_VALUE, ids=str)
def test_every_value_of_every_knob(config: Config) -> None:
    number = BY_VALUE.index(config)
    case = sm100_cases.case(sm100_cases.awkward(config, number), seed=number)
    with emulate("sm_100a", schedule=SCHEDULES[number % len(SCHEDULES)], races="strict") as device:
        case.run(kernel, config)
    case.check()
    stats = device.launches[-1]
    assert stats.tensor_columns == kernel.budget(config).tmem_columns
    if not config.swap_ab and config.split_k == 1:
        p, tile = case.problem, (128 * config.cluster_m, config.tile_n * config.cluster_n)
        columns = {"bf16": 64, "fp32": 32, "nvfp4": 64}[p.out]
        stores = -(-p.m // tile[0]) * tile[0] // 128 * -(-p.n // tile[1]) * tile[1] // columns
        assert stats.events["TMA stores"] == stores  # one lane issues each


def operands(m: int, n: int, k: int, alpha_a: float = 2.0**-6, alpha_b: float = 2.0**-5) -> tuple[NVFP4Tensor, ...]:
    """Any finite scale, zero and subnormal ones included; every code; some blocks of zeros."""
    gen = torch.Generator().manual_seed(m + n + k)
    made = []
    for rows, alpha in ((m, alpha_a), (n, alpha_b)):
        t = testing.random_nvfp4(rows, k, gen, adversarial=True, alpha=torch.tensor(alpha))
        zeros = torch.rand(rows, k // 16, generator=gen) < 0.05
        t.data[zeros.repeat_interleave(8, dim=1)] = 0
        t.sf[1, :] = 2.0**-9
        t.sf[2, :] = 448.0
        blocked = t.with_sf_layout("blocked_128x4")
        sm100_cases.poison_padding(blocked)
        made.append(blocked)
    return tuple(made)


def run(a: NVFP4Tensor, b: NVFP4Tensor, config: Config, out: str | Tensor, schedule: str = "round"):
    """BF16 or FP32, or NVFP4 under a global scale."""
    shape = (a.shape[0], b.shape[0])
    if isinstance(out, Tensor):
        made = NVFP4Tensor.empty(shape, out, "blocked_128x4")
        made.data.fill_(0xFF)
        made.sf.view(torch.uint8).fill_(0xFF)
    else:
        made = torch.full(shape, torch.nan, dtype=testing.TORCH_DTYPES[out])
    with emulate("sm_100a", schedule=schedule):
        kernel.launch(a, b, None, made, config)
    return made


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (130, Config(tile_n=64)),
        (9, SUMMED),
        (70, Config(tile_n=64, split_k=2)),
    ],
    ids=str,
)
def test_nvfp4_output_has_the_bytes_of_quantizing_the_fp32_output(m: int, config: Config) -> None:
    a, b = operands(m, 192, 64 * 13)
    whole = run(a, b, config, "fp32")
    alpha = global_scale(whole)
    # the last: too small to have an inverse
    for own in (alpha, alpha / 8, torch.tensor(2.0**-120)) if m < 70 else (alpha / 4,):
        want = reference.quantize_nvfp4(whole, alpha=own, sf_layout="blocked_128x4")
        got = run(a, b, config, own)
        testing.assert_same_bytes(got.data, want.data, "data")
        testing.assert_same_bytes(got.sf, want.sf, "sf with its padding")


def test_nvfp4_output_of_infinities_and_nan() -> None:
    a, b = operands(9, 128, 320, alpha_a=float("inf"))
    a.data[3] = 0
    whole = run(a, b, Config(), "fp32")
    assert whole.isnan().any()
    assert whole.isinf().any()
    alpha = torch.tensor(0.5)
    want = reference.quantize_nvfp4(whole, alpha=alpha, sf_layout="blocked_128x4")
    got = run(a, b, Config(), alpha)
    testing.assert_same_bytes(got.data, want.data, "data")
    testing.assert_same_bytes(got.sf, want.sf, "sf")


@pytest.mark.parametrize("config", [Config(tile_n=64), SUMMED], ids=str)
def test_bf16_is_within_one_unit_of_the_rounded_product(config: Config) -> None:
    """Where the FP32 error of the sum is less than half a unit of BF16, which is nearly everywhere."""
    for alpha_a, alpha_b in ((2.0**40, 2.0**-40), (2.0**40, 1.0), (2.0**-40, 2.0**-40)):
        a, b = operands(13, 136, 64 * 13, alpha_a, alpha_b)
        got = run(a, b, config, "bf16")
        a64, b64 = scaled_codes(a).double() * a.alpha.double(), scaled_codes(b).double() * b.alpha.double()
        testing.assert_gemm_close(got, a64, b64, torch.ones((), dtype=torch.float64))
        want = a64 @ b64.T
        error = (a64.abs() @ b64.abs().T) * (a.shape[1] / 16 + 16) * 2.0**-23
        sure = error < want.abs() * 2.0**-9
        assert sure.double().mean() > 0.97
        units = (_ordered(got) - _ordered(want.bfloat16())).abs()
        assert units[sure].max() <= 1
        assert (units[sure] == 0).double().mean() > 0.99


def _ordered(x: Tensor) -> Tensor:
    """BF16 numbers as integers in their order, neighbours one apart."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def test_parts_of_k_are_added_in_one_order() -> None:
    """Whatever CTA is first: the same bits."""
    a, b = operands(13, 136, 64 * 17)
    first, *others = (run(a, b, SUMMED, "fp32", schedule) for schedule in SCHEDULES)
    for other in others:
        assert torch.equal(first.view(torch.int32), other.view(torch.int32))


def test_op_writes_nvfp4_in_the_kernel() -> None:
    a, b = operands(20, 128, 320)
    alpha = torch.tensor(0.25)
    with emulate("sm_100a") as device, dispatch.recording() as choices:
        got = ops.gemm_nvfp4(a, b, out_alpha=alpha, out_sf_layout="blocked_128x4")
    (choice,) = choices
    assert (choice.kernel, choice.problem.out) == ("cute_gemm_nvfp4_sm100", "nvfp4")
    assert len(device.launches) == 1
    testing.assert_gemm_quantized(
        got, scaled_codes(a).double() * a.alpha.double(), scaled_codes(b).double(), b.alpha.double()
    )


def test_op_quantizes_the_fp32_output_where_no_kernel_does() -> None:
    """n = 80 is no k that the kernel could read."""
    a, b = operands(20, 80, 320)
    alpha = torch.tensor(0.25)
    assert kernel.supports(GemmProblem(m=20, n=80, k=320, act="nvfp4", out="nvfp4"), Config())
    with emulate("sm_100a") as device:
        got = ops.gemm_nvfp4(a, b, out_alpha=alpha)
        want = reference.quantize_nvfp4(ops.gemm_nvfp4(a, b, out_dtype=torch.float32), alpha=alpha)
    assert len(device.launches) == 2
    testing.assert_same_bytes(got.data, want.data, "data")
    testing.assert_same_bytes(got.sf, want.sf, "sf")


REG = r"%r\d+"
WAIT = rf"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[{REG}\], {REG}, 10000000;"
NO_WAIT = "setp.eq.u32 P1, 0, 0;"
RING = Config(tile_n=256)

# name: (config, pattern, replacement): of what only parts of K, or accumulators that overlap, need
FAULTS = {
    "sums read before they are there": (
        SUMMED,
        rf"{WAIT}([^;]*;[^;]*;[^;]*\}}\s*//[^;]*fence\.acq_rel\.cluster;\s*@%p)",
        rf"{NO_WAIT}\1",
    ),
    "sums of a part told before all have written": (
        SUMMED,
        r"bar\.sync \t1, 128;(\s*@%p\d+ bra[^;]*;\s*mov[^;]*;\s*mov[^;]*;\s*mbarrier\.arrive\.release\.cluster)",
        r"\1",
    ),
    "sums overwritten while others read": (SUMMED, rf"(xor\.b32 \t{REG}, {REG}, 1;[^@]*?){WAIT}", rf"\1{NO_WAIT}"),
    "end while others read": (
        SUMMED,
        rf"{WAIT}([^;]*;[^;]*;[^;]*\}}[^;]*;[^;]*;\s*tcgen05\.relinquish)",
        rf"{NO_WAIT}\1",
    ),
    "one part told only": (SUMMED, r"mbarrier\.arrive\.release\.cluster\.shared::cluster\.b64 _, [^;]*;", ""),
    "accumulator given back before what is shared was read": (
        RING,
        rf"setp\.eq(\.b32 \t%p\d+, {REG}, 0;\n\tadd\.s32 \t{REG}, {REG}, 4;)",
        r"setp.ne\1",
    ),
    "second accumulator not where it is read": (RING, rf"(mad\.lo\.s32 \t{REG}, {REG}), 208,", r"\1, 0,"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_deliberate_faults_are_caught(name: str) -> None:
    """By a refusal or wrong numbers, under one of the schedules."""
    config, pattern, replacement = FAULTS[name]

    def rewrite(ptx: str) -> str:
        mutated, count = re.subn(pattern, replacement, ptx, count=1)
        assert count == 1, "the kernel no longer has this line"
        return mutated

    if config is SUMMED:
        problem = GemmProblem(m=13, n=136, k=64 * 13, act="nvfp4")
    else:
        problem = GemmProblem(m=100, n=1200, k=64 * 9, act="nvfp4")
    case = testing.case(problem, "cpu", 3)
    for schedule in ("late", "round", "eager"):
        try:
            with emulate("sm_100a", schedule=schedule, rewrite=rewrite):
                case.run(kernel, config)
            case.check()
        except Fault:
            return
        except AssertionError as e:
            if "out of bound" not in str(e):
                raise
            return
    pytest.fail("right results under every schedule")
