"""swiglu gives the reference's bits: every config and type, every gate, odd sizes and strides; its machine code too."""

import math
import re

import pytest
import torch

from fp4suite import built, reference, testing
from fp4suite.problem import SwigluProblem
from kernels_triton import swiglu as kernel

from .checks import DTYPES, assert_same_numbers, configs, covering, every_bf16
from .test_rope_emulated import ARCHS, emulate


def check(
    x: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, limit: float = 10.0, config: kernel.Config | None = None
) -> None:
    out = torch.full((len(x), x.shape[1] // 2), torch.nan, dtype=out_dtype, device=x.device)
    out[::2] = 7.0  # where NaN is right, nothing that was there before may stand for it
    kernel.launch(x, limit, out, config or kernel.Config())
    for device in {x.device, torch.device("cpu")}:
        assert_same_numbers(out, reference.swiglu(x.to(device), limit, out_dtype))


@pytest.mark.parametrize("config", configs(kernel, SwigluProblem(m=1, k=16), most=48), ids=str)
def test_every_config(config, device, hard_rows):
    """Ragged in rows and columns."""
    check(hard_rows(5, 1184, torch.float32, device), config=config)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype, out_dtype, device, hard_rows):
    check(hard_rows(7, 416, dtype, device), out_dtype)


@pytest.mark.parametrize("limit", [10.0, 0.3, 3e38])
def test_every_gate_and_up(limit, device):
    """Each BF16 number as a gate beside another as an up; infinities and NaN too."""
    gates = every_bf16(device).view(32, 2048)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0)).to(device)
    ups = gates.view(-1)[order].view(32, 2048)
    config = kernel.Config(block_m=4, num_warps=8)
    for u in (torch.ones_like(ups), ups):
        check(torch.cat((gates, u), dim=1), torch.float32, limit, config)


@pytest.mark.parametrize("k", [1, 3, 33, 1025])
def test_odd_widths(k, device):
    """Up begins anywhere, and so does a row of the output."""
    x = torch.randn(6, 2 * k, generator=torch.Generator().manual_seed(k)).to(device) * 4
    check(x)
    check(x.bfloat16(), torch.float32)


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 512, torch.bfloat16, device)
    for x in (wide[::3], wide[:, 16:208], wide[1::2, 5:389], wide[:1].expand(5, -1)):
        check(x)


def test_columns_apart_are_refused(device):
    x = torch.zeros(64, 3, device=device).T
    with pytest.raises(ValueError, match=r"the elements of a row must be contiguous, got strides \(1, 3\)"):
        kernel.launch(x, 10.0, torch.empty(3, 32, device=device), kernel.Config())


def test_nothing(device):
    check(torch.empty(0, 128, device=device))
    check(torch.empty(3, 0, device=device))


def test_cases_of_the_tuner(device):
    for p in (SwigluProblem(m=3, k=448), SwigluProblem(m=2, k=40, x="bf16", out="fp32")):
        c = testing.case(p, device)
        c.run(kernel, kernel.default(p))
        c.check()
        c.out[1, 7] += 1
        with pytest.raises(AssertionError, match=r"bytes differ; first at \[1, "):
            c.check()


def test_few_rows_spread():
    assert kernel.default(SwigluProblem(m=4, k=3072)) == kernel.Config(block_k=256, num_warps=2)
    assert kernel.default(SwigluProblem(m=4096, k=3072)) == kernel.Config()
    wide = kernel.Config(block_m=4, num_warps=1)
    assert kernel.supports(SwigluProblem(m=4, k=3072), wide) == "128 columns a thread, not 4 to 32"


def test_configs_compile_without_spills(pool):
    """Every value of a knob, for the architectures in turn, the default for both: exact, by 16 bytes at a time."""
    problem = SwigluProblem(m=64, k=3072)
    default, *others = covering(kernel, problem)
    jobs = [(default, arch) for arch in ARCHS] + [(c, ARCHS[i % 2]) for i, c in enumerate(others)]
    assert len(jobs) >= 4
    for (config, arch), future in zip(jobs, [pool.submit(kernel.build, problem, *job) for job in jobs], strict=True):
        b = future.result()
        assert built.resources(b).refusal(arch) is None, (config, arch)
        approximate = re.findall(r"\b(?:fma|ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx)
        fused = sum(1 + bool(pair) for pair in re.findall(r"fma\.rn\.f32(x2)?", b.ptx))  # sm_100a: two at a time
        # of a quotient: one reciprocal, made exact, by five multiply-adds
        assert set(approximate) == {"rcp.approx.ftz.f32"}, (config, arch)
        assert fused == 5 * len(approximate), (config, arch)
        held = config.block_m * config.block_k // (32 * config.num_warps)
        assert len(re.findall(r"ld\.global\.v4\.b32", b.ptx)) == 2 * held // 4, (config, arch)
        if held >= 8:
            assert len(re.findall(r"st\.global\.v4\.b32", b.ptx)) == held // 8, (config, arch)
        assert "cvt.rn.bf16" in b.ptx, (config, arch)
        assert "bar.sync" not in b.ptx, (config, arch)


@pytest.mark.parametrize(("x", "out"), [("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")])
def test_other_types_compile(x, out, pool):
    for arch in ARCHS:
        b = pool.submit(kernel.build, SwigluProblem(m=1, k=1104, x=x, out=out), kernel.Config(), arch).result()
        assert built.resources(b).refusal(arch) is None


@pytest.mark.parametrize(("arch", "out"), [("sm_90a", "fp32"), ("sm_100a", "fp32"), ("sm_90a", "bf16")])
def test_every_bit_of_the_machine_code(arch, out, pool):
    """Quotients near the ends of FP32 and around tiny gates, of either sign, zeros included."""
    near_zero = [s * n * 2.0**e for s in (1, -1) for n in (0, 1, 3) for e in (-149, -126, -103, -24, -23, -22)]
    far = [-86.9, -87.5, -88.0, -88.37, -88.38, -88.4, -88.7, -89.0, -1e30, -3e38, -math.inf, math.nan, math.inf]
    gen = torch.Generator().manual_seed(0)
    randoms = [torch.randn(300, generator=gen) * s for s in (4.0, 40.0, 2.0**-23)]
    gates = torch.cat((torch.tensor([*near_zero, *far, 10.0, 11.0, -0.0]), *randoms))
    ups = torch.tensor([-7.3, 1.0, -0.0, 2.0**-130, math.inf, math.nan, -12.0])[torch.arange(len(gates)) % 7]
    k, m = 16, -(-len(gates) // 16)
    padded = torch.zeros(2, m * k)
    padded[0, : len(gates)], padded[1, : len(gates)] = gates, ups
    x = padded.view(2, m, k).transpose(0, 1).reshape(m, 2 * k).contiguous()
    dtype = testing.TORCH_DTYPES[out]
    got = torch.full((m, k), 7.0, dtype=dtype)
    problem, config = SwigluProblem(m=m, k=k, out=out), kernel.Config(block_m=4, block_k=256, num_warps=2)
    emulate(pool, kernel, problem, config, arch, (-(-m // 4), 1), (x, 2 * k, got, m, k, 10.0))
    assert_same_numbers(got, reference.swiglu(x, 10.0, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 1024, 4096, 16384])
def test_real_sizes(m, device):
    for k in (2048, 3072):
        for x in ("fp32", "bf16"):
            p = SwigluProblem(m=m, k=k, x=x)
            c = testing.case(p, device)
            c.run(kernel, kernel.default(p))
            c.check()


@pytest.mark.gpu
def test_more_than_31_bits_of_elements(device):
    """The last rows of an output of 2^31 elements and a row."""
    k = 4096
    x = torch.randn(1, 2 * k, device=device).bfloat16().expand((1 << 19) + 1, -1)
    out = torch.full((len(x), k), torch.nan, dtype=torch.bfloat16, device=device)
    kernel.launch(x, 10.0, out, kernel.Config())
    want = reference.swiglu(x[:1], 10.0)
    for rows in (out[:2], out[-2:]):
        assert_same_numbers(rows, want.expand(2, -1))
