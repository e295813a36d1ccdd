"""DeepGEMM's indexer scores and mHC projections, and FlashInfer's mHC kernels, which compile while running."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import E4M3_MAX, IndexCache
from fp4suite.problem import (
    HyperConnectionPostPreProblem,
    HyperConnectionPostProblem,
    HyperConnectionPreProblem,
    IndexLogitsProblem,
    Problem,
)
from fp4suite.testing import Case, index_logits_within

from .fusion_peer import BF16_STEP, Call, FusionPeer, relative_rms, spread, within
from .peers import vllm_ops

PAGE = 64  # entries, of the paged kernel on sm_90
CHECKED_QUERIES = 8
STREAMS, MOST_SPLITS, ROWS_OF_A_BLOCK = 4, 16, 64  # of the mHC kernels
TF32_LIMIT = 2.0**-6  # of coefficients and outputs whose logits were multiplied in TF32


def logits(case: Case) -> Call:
    """A sequence a query: pages, and a schedule made beforehand for all layers. One sequence: keys gathered beforehand.

    Queries are E4M3 with a scale a head, which its weight takes over.
    """
    deep_gemm = importlib.import_module("deep_gemm")
    q, weights, cache, block_table, positions, sequence_ids, ratio, scale = case.operands
    p = case.problem
    assert isinstance(p, IndexLogitsProblem)
    codes, heads = quantized_queries(q, weights, scale)
    limits = (positions + 1) // ratio
    if p.sequence_count == p.m:
        paged = cache.data.view(len(cache.data), PAGE, 1, p.head_dim + 4)
        lengths = limits[:, None].contiguous()
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, deep_gemm.get_num_sms())
        single = codes[:, None]

        def launch() -> Tensor:
            found: Tensor = deep_gemm.fp8_fp4_paged_mqa_logits(
                (single, None), paged, heads, lengths, block_table, schedule, p.entries
            )
            return found
    else:
        slots = entry_slots(block_table[0], cache)[: p.entries]
        keys, key_scales = stored_keys(cache, slots)
        first = torch.zeros_like(limits)

        def launch() -> Tensor:
            found: Tensor = deep_gemm.fp8_fp4_mqa_logits(
                (codes, None), (keys, key_scales), heads, first, limits, p.entries
            )
            return found

    rows = spread(p.m, q.device, CHECKED_QUERIES)

    def check(got: Tensor) -> float:
        """Each score that can be seen, against FP64 on the kernel's own operands."""
        worst = 0.0
        for row in rows.tolist():
            end = int(limits[row])
            own = entry_slots(block_table[int(sequence_ids[row])], cache)[:end]
            decoded = reference.read_rows(cache, own)
            want, room = index_logits_within(codes[row][None], heads[row][None], decoded, 1.0)
            worst = max(worst, within(got[row, :end], want[0], room[0], "scores"))
        return worst

    return Call(launch, check)


def quantized_queries(q: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """E4M3 codes of q [tokens, heads, d]; FP32 weights [tokens, heads] that hold the codes' scale and `scale` too."""
    step = q.float().abs().amax(-1).clamp_min(1e-20) / E4M3_MAX  # [tokens, heads]
    codes = (q.float() / step[..., None]).to(torch.float8_e4m3fn)
    return codes, (weights.float() * step * scale).contiguous()


def entry_slots(pages: Tensor, cache: IndexCache) -> Tensor:
    """Slots of a sequence's entries, from its row of the block table."""
    within_page = torch.arange(cache.page_size, device=pages.device)
    return (pages.long()[:, None] * cache.page_size + within_page).flatten()


def stored_keys(cache: IndexCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 [entries, d] and FP32 [entries] of an "fp8" cache: a page's rows, then their scales."""
    page, place = slots // cache.page_size, slots % cache.page_size
    codes, scales = cache.data.split([cache.page_size * cache.head_dim, cache.page_size * 4], dim=1)
    rows = codes.reshape(-1, cache.page_size, cache.head_dim)[page, place]
    return rows.view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32)[page, place]


def _logits_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, IndexLogitsProblem)
    if problem.format != "fp8":
        return f"no {problem.format} keys below sm_100"
    if problem.page_size != PAGE or problem.sequence_count not in (1, problem.m):
        return f"takes one sequence, or a sequence a query in pages of {PAGE}"
    return None


def prenorm(case: Case) -> Call:
    """The projections and sums of squares of `hyper_connection_pre` alone."""
    h, fn = case.operands[0], case.operands[1]
    project, dots, squares = _projection(h.flatten(1), fn)
    rows = spread(len(h), h.device)

    def launch() -> tuple[Tensor, Tensor]:
        project()
        return dots, squares

    def check(got: tuple[Tensor, Tensor]) -> float:
        u = h[rows].flatten(1).double()
        # FP32 weights become TF32, 2^-11 of each at most, and products are summed in FP32
        room = 2.0**-10 * (u.square() @ fn.double().T.square()).sqrt() * 4
        worst = within(_total(got[0], 2)[rows], u @ fn.double().T, room, "projections")
        want = u.square().sum(1)
        return max(worst, within(_total(got[1], 1)[rows], want, 2.0**-14 * want, "sums of squares"))

    return Call(launch, check)


def mhc_pre(case: Case) -> Call:
    """Three launches: DeepGEMM's projections, FlashInfer's coefficients and fold, vLLM's RMSNorm."""
    h, fn, base, scale, weight, norm_eps, eps, iterations = case.operands
    launch = _pre(h, fn, base, scale, weight, norm_eps, eps, iterations)
    return Call(launch, lambda got: _check_pre(got, h, case.operands[1:]))


def mhc_post(case: Case) -> Call:
    mhc = importlib.import_module("flashinfer.mhc")
    y, h, post, comb = case.operands
    return Call(lambda: mhc.mhc_post(y, h, post, comb), lambda got: _check_post(got, *case.operands))


def mhc_post_pre(case: Case) -> Call:
    """Four launches: the streams are written, read by the projections and read again by the fold."""
    mhc = importlib.import_module("flashinfer.mhc")
    site, rest = case.operands[:4], case.operands[4:]
    streams = torch.empty_like(site[1])
    fold = _pre(streams, *rest)

    def launch() -> tuple[Tensor, ...]:
        mhc._mhc_post_impl(streams, *site)
        return streams, *fold()

    def check(got: tuple[Tensor, ...]) -> float:
        return max(_check_post(got[0], *site), _check_pre(got[1:], got[0], rest))

    return Call(launch, check)


def splits(tokens: int, multiprocessors: int) -> int:
    """Parts of a row that blocks share, a power of two, so that there is a block for most multiprocessors."""
    blocks = -(-tokens // ROWS_OF_A_BLOCK)
    return max(1, min(MOST_SPLITS, 1 << max(0, (multiprocessors // blocks).bit_length() - 1)))


def _projection(u: Tensor, fn: Tensor) -> tuple[Any, Tensor, Tensor]:
    """A launch of u @ fn.T and of the sums of u's squares, and where they go: [parts, tokens, outputs] where parted."""
    deep_gemm = importlib.import_module("deep_gemm")
    parts = splits(len(u), torch.cuda.get_device_properties(u.device).multi_processor_count)
    lead = (parts,) if parts > 1 else ()
    dots = torch.empty(*lead, len(u), len(fn), device=u.device)
    squares = torch.empty(*lead, len(u), device=u.device)
    given = parts if parts > 1 else None
    return lambda: deep_gemm.tf32_hc_prenorm_gemm(u, fn, dots, squares, num_splits=given), dots, squares


def _total(x: Tensor, dims: int) -> Tensor:
    return x.double().sum(0) if x.ndim > dims else x.double()


def _pre(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, norm_eps: float, eps: float, iterations: int
) -> Any:
    mhc = importlib.import_module("flashinfer.mhc")
    op = vllm_ops("_C", "rms_norm")
    project, dots, squares = _projection(h.flatten(1), fn)
    parts, k = (len(dots) if dots.ndim == 3 else 1), h[0].numel()
    normed = torch.empty(len(h), h.shape[2], dtype=h.dtype, device=h.device)

    def launch() -> tuple[Tensor, Tensor, Tensor]:
        project()
        post, comb, folded = mhc.mhc_pre_big_fuse(
            dots, squares, h, scale, base, k, norm_eps, eps, eps, 2.0, iterations, parts
        )
        op.rms_norm(normed, folded, weight, norm_eps)
        return normed, post[..., 0], comb

    return launch


def _check_pre(got: tuple[Tensor, ...], h: Tensor, given: tuple[Any, ...]) -> float:
    fn, base, scale, weight, norm_eps, eps, iterations = given
    rows = spread(len(h), h.device)
    y, post, comb = reference.hyper_connection_pre(
        h[rows].double(), fn, base, scale, weight, norm_eps=norm_eps, eps=eps, iterations=iterations
    )
    worst = relative_rms(got[0][rows], y, TF32_LIMIT, "y")
    for name, a, b in (("post", got[1], post), ("comb", got[2], comb)):
        worst = max(worst, within(a[rows], b, torch.full_like(b, TF32_LIMIT), name))
    return worst


def _check_post(got: Tensor, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> float:
    rows = spread(len(h), h.device)
    y, h, post, comb = (x[rows].double() for x in (y, h, post, comb))
    want = reference.hyper_connection_post(y, h, post, comb)
    size = reference.hyper_connection_post(y.abs(), h.abs(), post, comb)
    return within(got[rows], want, BF16_STEP * size, "streams")


def _mhc_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, HyperConnectionPreProblem | HyperConnectionPostPreProblem | HyperConnectionPostProblem)
    if (problem.n, problem.x) != (STREAMS, "bf16"):
        return f"takes {STREAMS} streams in BF16"
    return None


DEEP_GEMM: dict[str, Any] = {"module": "deep_gemm", "package": "deep-gemm", "compiles": True}
FLASHINFER: dict[str, Any] = {"module": "flashinfer", "package": "flashinfer-python", "compiles": True}
BOTH = FLASHINFER | {"also": {"deep_gemm": "deep-gemm", "vllm": "vllm"}}

PEERS = (
    FusionPeer(
        name="deep_gemm_logits", ops=(IndexLogitsProblem.op,), prepare=logits, refuses=_logits_refuses,
        tolerance="what FP8 tensor cores cut off, on E4M3 queries", note="keys gathered, schedule made beforehand",
        **DEEP_GEMM,
    ),
    FusionPeer(
        name="deep_gemm_prenorm", ops=(HyperConnectionPreProblem.op,), prepare=prenorm, refuses=_mhc_refuses,
        tolerance="rounding to TF32", note="projections and sums of squares alone",
        part_of=(HyperConnectionPreProblem.op,), **DEEP_GEMM,
    ),
    FusionPeer(
        name="flashinfer_mhc_pre", ops=(HyperConnectionPreProblem.op,), prepare=mhc_pre, refuses=_mhc_refuses,
        tolerance="2^-6, of TF32 logits", note="three launches, one of DeepGEMM, one of vLLM", **BOTH,
    ),
    FusionPeer(
        name="flashinfer_mhc_post", ops=(HyperConnectionPostProblem.op,), prepare=mhc_post, refuses=_mhc_refuses,
        tolerance="one BF16 step of the terms' sizes", **FLASHINFER,
    ),
    FusionPeer(
        name="flashinfer_mhc_post_pre", ops=(HyperConnectionPostPreProblem.op,), prepare=mhc_post_pre,
        refuses=_mhc_refuses, tolerance="2^-6, of TF32 logits",
        note="four launches, one of DeepGEMM, one of vLLM", **BOTH,
    ),
)  # fmt: skip
