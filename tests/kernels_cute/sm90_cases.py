"""What every GEMM for Hopper must pass. b is given by rows, and laid out here as the kernel reads it."""

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, reference, testing
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import GemmProblem


def laid_out(kernel: ModuleType, b: NVFP4Tensor) -> NVFP4Tensor:
    return b.with_order(getattr(kernel, "WEIGHT_ORDER", "rows"))


def gemm(
    kernel: ModuleType, a: Tensor | NVFP4Tensor, b: NVFP4Tensor, config: Any, segments: tuple[int, ...] | None = None
) -> Tensor:
    """launch into NaN, FP32."""
    out = torch.full((a.shape[0], b.shape[0]), float("nan"), device=b.device)
    kernel.launch(a, laid_out(kernel, b), segments, out, config)
    return out


def one_hot(row: int, column: int, n: int, k: int, device: torch.device) -> NVFP4Tensor:
    """All zero but one number: 1 (even k) or -12 (odd k), under its own scale 2."""
    data = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
    data[row, column // 2] = 0xF0 if column % 2 else 0x01
    sf = torch.zeros(n, k // BLOCK, device=device)
    sf[row, column // BLOCK] = 2
    return NVFP4Tensor(data, sf.to(torch.float8_e4m3fn), torch.ones((), device=device))


def check_single_elements(
    kernel: ModuleType, config: Any, m: int, n: int, k: int, columns: list[int], rows: list[int], device: torch.device
) -> None:
    """Every token times one element of b lands in that element's column of d, and nowhere else."""
    for column in columns:
        for row in rows:
            a = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
            a[:, column] = torch.arange(m, device=device) % 250 + 1  # exact in BF16
            want = torch.zeros(m, n, device=device)
            want[:, row] = a[:, column].float() * (-12.0 if column % 2 else 1.0)
            got = gemm(kernel, a, one_hot(row, column, n, k, device), config)
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=f"b[{row}, {column}]")


def check_decodes(kernel: ModuleType, config: Any, device: torch.device, most: int = 512) -> None:
    """Every code under every scale. a, `most` rows at a time, picks single elements of b, so that d is b decoded: no
    sum, no rounding.
    """
    n, k = 128, 512  # row r has scale byte r (126 at most), and all codes in every position of a block
    data = torch.arange(256, device=device, dtype=torch.int32).to(torch.uint8).expand(n, k // 2).contiguous()
    scales = torch.arange(n, device=device, dtype=torch.uint8).clamp(max=126)
    sf = scales[:, None].expand(n, k // BLOCK).contiguous().view(torch.float8_e4m3fn)
    b = NVFP4Tensor(data, sf, torch.ones((), device=device))
    want = reference.dequant_nvfp4(b, torch.float32).T
    for at in range(0, k, most):
        got = gemm(kernel, torch.eye(k, dtype=torch.bfloat16, device=device)[at : at + most], b, config)
        torch.testing.assert_close(got, want[at : at + most], rtol=0, atol=0)


def check_runs_or_refuses(kernel: ModuleType, problem: GemmProblem, config: Any, device: torch.device) -> None:
    """What `supports` refuses, launch refuses in the same words; anything else is right."""
    if reason := kernel.supports(problem, config):
        with pytest.raises(ValueError, match=re.escape(reason)):
            testing.case(problem, device).run(kernel, config)
        return
    case = testing.case(problem, device, seed=1)
    case.run(kernel, config)
    case.check()


def check_alpha_acts_on_the_sum(
    kernel: ModuleType,
    config: Any,
    k: int,
    device: torch.device,
    act: str = "bf16",
    powers: tuple[int, int] = (40, -40),
) -> None:
    """2^40 and 2^-40 overflow or vanish if folded into scales; as powers of two they must leave all bits in place."""
    problem = GemmProblem(m=9, n=192, k=k, act=act, out="fp32")
    a, b, _ = testing.case(problem, device, seed=3).operands
    one = gemm(kernel, a, replace(b, alpha=torch.ones((), device=device)), config)
    alphas = torch.tensor([2.0 ** powers[0], 2.0 ** powers[1], -1.0], device=device)
    segments = (8, 72, 112)
    got = gemm(kernel, a, replace(b, alpha=alphas), config, segments)
    want = one * alphas.repeat_interleave(torch.tensor(segments, device=device))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def check_strided_rows(kernel: ModuleType, config: Any, k: int, device: torch.device) -> None:
    """Rows that lie apart are read and written in place, and nothing beside them."""
    gen = torch.Generator(device=device).manual_seed(6)
    b = testing.random_nvfp4(128, k, gen)
    wide = testing.random_activations((30, 2 * k), gen)
    frame = torch.full((30, 200), float("nan"), device=device)
    kernel.launch(wide[:, k:], laid_out(kernel, b), None, frame[:, 8:136], config)
    want = gemm(kernel, wide[:, k:].contiguous(), b, config)
    torch.testing.assert_close(frame[:, 8:136], want, rtol=0, atol=0)
    assert frame[:, :8].isnan().all()
    assert frame[:, 136:].isnan().all()


def check_repeats(kernel: ModuleType, problem: GemmProblem, config: Any, device: torch.device) -> None:
    """Repeated runs and replays of a CUDA graph agree to the bit."""
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


def check_the_op_runs_it(kernel: ModuleType, name: str, config: Any, device: torch.device) -> None:
    """By its name, with leading dimensions and two segments."""
    gen = torch.Generator(device=device).manual_seed(9)
    b = laid_out(kernel, testing.random_nvfp4(256, 1024, gen, alpha=torch.tensor([0.5, 2.0], device=device)))
    a = testing.random_activations((2, 5, 1024), gen)
    with dispatch.override(kernel=name, config=config), dispatch.recording() as choices:
        got = ops.gemm_nvfp4(a, b, segments=(96, 160), out_dtype=torch.float32)
    assert [c.kernel for c in choices] == [name]
    assert got.shape == (2, 5, 256)
    decoded = reference.dequant_nvfp4(replace(b, alpha=torch.ones((), device=device)), torch.float64)
    alpha = b.alpha.double().repeat_interleave(torch.tensor([96, 160], device=device))
    testing.assert_gemm_close(got.flatten(0, 1), a.flatten(0, 1).double(), decoded, alpha)


def check_refuses_misfits(kernel: ModuleType, config: Any, k: int) -> None:
    """What no kernel for BF16 activations could read or write."""
    gen = torch.Generator().manual_seed(0)
    a, out = torch.zeros(3, k, dtype=torch.bfloat16), torch.empty(3, 64)
    b = laid_out(kernel, testing.random_nvfp4(64, k, gen))
    unaligned = torch.zeros(3 * k + 1, dtype=torch.bfloat16)[1:].view(3, k)
    for operands, error, message in (
        ((a.float(), b, None, out), TypeError, "a must be bfloat16 or an NVFP4Tensor"),
        ((a, b, None, out.half()), TypeError, "out must be bfloat16 or float32"),
        ((a, b, None, out[:2]), ValueError, "do not make"),
        ((a, b, None, torch.empty(64, 3).T), ValueError, "columns of out must be adjacent"),
        ((unaligned, b, None, out), ValueError, "start at multiples of 16 bytes"),
    ):
        with pytest.raises(error, match=message):
            kernel.launch(*operands, config)


def check_empty(kernel: ModuleType, config: Any, k: int) -> None:
    """No token: nothing is launched, nothing raised."""
    b = laid_out(kernel, testing.random_nvfp4(64, k, torch.Generator().manual_seed(0)))
    kernel.launch(torch.empty(0, k, dtype=torch.bfloat16), b, None, torch.empty(0, 64), config)
