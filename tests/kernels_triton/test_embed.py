"""embed gives the reference's bits: configs, types, strides, streams; ids of no row read nothing and give NaN."""

import re

import pytest
import torch

from fp4suite import built, reference, testing
from fp4suite.problem import EmbedProblem
from kernels_triton import embed as kernel

from .checks import DTYPES, assert_same_numbers, configs, every_bf16
from .test_rope_emulated import ARCHS, emulate

OUTSIDE = [-1, 37, 38, 2**31 + 3, 2**40, -(2**63), 2**63 - 1]  # of a table of 37


def table(k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(37, k, generator=torch.Generator().manual_seed(k)).to(dtype).to(device)


def tokens(device: torch.device, kind: torch.dtype = torch.int64) -> torch.Tensor:
    outside = OUTSIDE if kind == torch.int64 else [-1, 37, 2**31 - 1, -(2**31)]
    return torch.tensor([0, 36, *outside, 5, 5], dtype=kind, device=device)


def check(
    ids: torch.Tensor,
    weight: torch.Tensor,
    streams: int = 4,
    out_dtype: torch.dtype | None = None,
    config: kernel.Config | None = None,
) -> None:
    out_dtype = out_dtype or weight.dtype
    out = torch.full((len(ids), streams, weight.shape[1]), 7.0, dtype=out_dtype, device=weight.device)
    kernel.launch(ids, weight, out, config or kernel.Config())
    want = reference.embed(ids.cpu(), weight.cpu(), streams=streams, out_dtype=out_dtype)
    assert_same_numbers(out, want)
    if weight.is_cuda:
        assert_same_numbers(reference.embed(ids, weight, streams=streams, out_dtype=out_dtype), want)


@pytest.mark.parametrize("config", configs(kernel, EmbedProblem(m=1, vocab=1, k=1)), ids=str)
def test_every_config(config, device):
    check(tokens(device), table(1096, torch.bfloat16, device), config=config)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype, out_dtype, device):
    weight = table(200, dtype, device)
    weight[5, 3:6] = torch.tensor([float("inf"), float("nan"), -0.0])
    check(tokens(device), weight, out_dtype=out_dtype)
    check(tokens(device, torch.int32), weight, out_dtype=out_dtype)


def test_numbers_are_copied_bit_for_bit(device):
    """Every BF16 number, each NaN with its own bits."""
    weight = every_bf16(device)
    ids = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.zeros(16, 2, 4096, dtype=torch.bfloat16, device=device)
    kernel.launch(ids, weight, out, kernel.Config())
    for stream in range(2):
        testing.assert_same_bytes(out[:, stream], weight[ids], "out")


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_streams(streams, device):
    check(tokens(device), table(72, torch.bfloat16, device), streams)


@pytest.mark.parametrize("k", [1, 7, 513])
def test_odd_widths(k, device):
    check(tokens(device), table(k, torch.bfloat16, device), 3)
    check(tokens(device), table(k, torch.float32, device), 3, torch.bfloat16)


def test_any_stride(device):
    ids = torch.stack((tokens(device), tokens(device) + 1), dim=1)
    wide = table(512, torch.bfloat16, device)
    for own in (ids[:, 0], ids[::3, 1], ids[:1, 0], ids[:1, 0].expand(4)):
        check(own, wide[:, 5:133])
        check(own, wide[::2, 16:144])


def test_nothing(device):
    check(tokens(device)[:0], table(64, torch.bfloat16, device))
    check(tokens(device), table(64, torch.bfloat16, device)[:, :0])


def test_cases_of_the_tuner(device):
    for p in (EmbedProblem(m=3, vocab=50, k=448, n=4), EmbedProblem(m=5, vocab=9, k=40, x="fp32")):
        c = testing.case(p, device)
        c.run(kernel, kernel.Config())
        c.check()
        c.out[1, 0, 7] += 1
        with pytest.raises(AssertionError, match=r"bytes differ; first at \[1, 0, "):
            c.check()


def test_every_config_compiles_without_spills(pool):
    """For the architectures in turn; 16 bytes at a time, the row once."""
    problem = EmbedProblem(m=4, vocab=129280, k=7168, n=4)
    every = [c for c in testing.configs(kernel, 16) if kernel.supports(problem, c) is None]
    assert len(every) >= 12
    jobs = [(c, ARCHS[i % 2]) for i, c in enumerate(every)]
    for (config, arch), future in zip(jobs, [pool.submit(kernel.build, problem, *job) for job in jobs], strict=True):
        b = future.result()
        assert built.resources(b).refusal(arch) is None, (config, arch)
        assert len(re.findall(r"ld\.global\S*", b.ptx)) * 4 - 4 == len(re.findall(r"st\.global\S*", b.ptx)), config
        if config.block_k // (32 * config.num_warps) >= 8:
            assert set(re.findall(r"st\.global\S*", b.ptx)) == {"st.global.v4.b32"}, (config, arch)
    refused = kernel.Config(block_k=256, num_warps=4)
    assert kernel.supports(problem, refused) == "block_k=256 num_warps=4: 2 columns a thread, not 4 to 32"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("x", "out"), [("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_machine_code_reads_nothing_outside(x, out, arch, pool):
    """The emulator knows where the table ends."""
    weight, ids = table(208, testing.TORCH_DTYPES[x], torch.device("cpu")), tokens(torch.device("cpu"))
    got = torch.full((len(ids), 2, 208), 7.0, dtype=testing.TORCH_DTYPES[out])
    problem = EmbedProblem(m=len(ids), vocab=37, k=208, n=2, x=x, out=out)
    own = kernel.Config(block_k=256, num_warps=2)
    emulate(pool, kernel, problem, own, arch, (len(ids), 1), (ids, weight, 208, got, 37, 208))
    assert_same_numbers(got, reference.embed(ids, weight, streams=2, out_dtype=got.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 4096, 16384])
def test_real_sizes(m, device):
    for k in (4096, 7168):
        p = EmbedProblem(m=m, vocab=129280, k=k, n=4)
        c = testing.case(p, device)
        c.run(kernel, kernel.Config())
        c.check()


@pytest.mark.gpu
def test_more_than_31_bits_of_elements(device):
    """Of the output; of the table, whose rows lie 2^20 elements apart."""
    k, m = 4096, (1 << 17) + 1
    apart = torch.empty(2100, 1 << 20, dtype=torch.bfloat16, device=device)[:, :k]
    apart.copy_(torch.randn(2100, k, device=device))
    ids = torch.randint(2100, (m,), device=device)
    ids[-1], ids[-2] = 2099, 2100
    out = torch.zeros(m, 4, k, dtype=torch.bfloat16, device=device)
    kernel.launch(ids, apart, out, kernel.Config())
    for some in (slice(0, 2), slice(m - 3, m)):
        assert_same_numbers(out[some], reference.embed(ids[some], apart, streams=4))
