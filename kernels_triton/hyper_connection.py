"""What the hyper-connection kernels share: a product of all streams with a narrow matrix, and the fold that follows.

`_sums` multiplies vec(h) [tokens, 4 d] by fn [outputs, 4 d] and sums squares. A program has block_d columns of each
stream for good: it holds what fn has there, in shared memory, and takes block after block of tokens; or, with `ahead`,
one block, which it asks for before fn. With POST it first makes h, the streams that a site leaves, and writes them.
`_fold` adds the parts of a token and folds its streams into y. It is a programmatic dependent of the first launch: it
asks for streams and weights before it waits for the end of the product. Sinkhorn's 39 normalisations wait for each
other: of few tokens they have programs of their own beside the fold, of many tokens a launch behind it.

Tensor cores and FP32: an FP32 number is three BF16 numbers, exactly (8 bits each, cut off, not rounded). BF16 streams
times each of the three are exact products; the sum of a program's columns goes to an FP32 sum outside of the tensor
cores, which truncate. Other streams are multiplied in FP32 throughout.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import arch as archs
from fp4suite.built import Built
from fp4suite.problem import (
    ELEMENT_BYTES,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPreProblem,
)

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin
from .rounding import CVT

FoldProblem = HyperConnectionPreProblem | HyperConnectionHeadProblem | HyperConnectionPostPreProblem

STREAMS = 4
N = tl.constexpr(STREAMS)
SINKHORN_TOKENS = tl.constexpr(16)  # a program's, as many as four warps have threads for
UPPER_HALF = tl.constexpr(-65536)
SHARED_BYTES = 227 * 1024
SMS = 132  # of an H100; a larger GPU has room for more of the fold
FEW = 256  # tokens, whose Sinkhorn runs beside their fold; sm_90a has a kernel in CuTe DSL for as many and more
TOKENS_A_PAIR = 16384  # of launches: their parts take 235 MB (d = 7168, block_d = 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens by block_d columns of each stream a step of the product. Programs that differ in tokens share
    columns as long as there are no more than `programs` of them. ahead: a program has one step, whose streams it asks
    for before fn.

    num_warps and num_stages are those of the product, fold_warps those of the fold.
    """

    block_m: int = 64
    block_d: int = 32
    programs: int = 2 * SMS
    num_warps: int = 4
    num_stages: int = 3
    fold_warps: int = 8
    ahead: bool = False


SPACE = {
    "block_m": (16, 64),
    "block_d": (32, 64, 128),
    "programs": (SMS, 2 * SMS),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
    "fold_warps": (8, 16),
    "ahead": (False, True),
}


def default(problem: FoldProblem) -> Config:
    """Few tokens: one step, whose loads are all under way at once; else block after block, the next on their way."""
    post, sm_100a = isinstance(problem, HyperConnectionPostPreProblem), archs.current() == "sm_100a"
    if problem.x == "bf16" and problem.m <= 16:
        return Config(block_m=16, block_d=64 if post else 32, num_stages=2, ahead=True)
    if sm_100a:  # tcgen05 takes copies of its operands, for which larger steps, and more of them, leave no room
        return Config(num_stages=2)
    return Config() if post or problem.x != "bf16" else Config(block_d=64, programs=SMS)


def alike(config: Config, m: int, other: int) -> bool:
    """Whether what was tuned for `other` tokens serves m: few say nothing about many."""
    return (m < FEW) == (other < FEW)


def arithmetic(problem: FoldProblem, config: Config) -> str:
    """In which order a config sums: how numbers lie over parts, steps and threads."""
    return _arithmetic(config)


def _arithmetic(config: Config) -> str:
    ahead = ", ahead" if config.ahead else ""  # streams lie otherwise over threads, which sum their squares
    return (
        f"parts of {config.block_d} columns for {config.block_m} rows by {config.num_warps} warps{ahead}, "
        f"folded by {config.fold_warps}"
    )


INVARIANT = _arithmetic(Config())


def in_arithmetic(problem: FoldProblem, wanted: str) -> Config | None:
    """The config that sums so, in the way of the default for the rest; None if there is none."""
    config = _in_arithmetic(wanted, default(problem).programs)
    return None if config is None or (config.ahead and _steps(problem.m, problem.k, config) > 1) else config


@functools.cache
def _in_arithmetic(wanted: str, programs: int) -> Config | None:
    steps = itertools.product(*(SPACE[name] for name in ("block_m", "block_d", "num_warps", "fold_warps")))
    configs = (
        Config(block_m=m, block_d=d, programs=programs, num_warps=w, num_stages=2, fold_warps=f, ahead=ahead)
        for (m, d, w, f), ahead in itertools.product(steps, (False, True))
    )
    return next((c for c in configs if _arithmetic(c) == wanted), None)


def _groups(tokens: int, d: int, config: Config) -> int:
    """Programs that share columns."""
    return max(1, min(triton.cdiv(tokens, config.block_m), config.programs // triton.cdiv(d, config.block_d)))


def _steps(tokens: int, d: int, config: Config) -> int:
    """The most blocks of tokens that a program takes."""
    return triton.cdiv(triton.cdiv(tokens, config.block_m), _groups(tokens, d, config))


def supports(problem: FoldProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.n != STREAMS:
        return f"n={problem.n}: the kernels are written for {STREAMS} streams"
    post = isinstance(problem, HyperConnectionPostPreProblem)
    size = ELEMENT_BYTES[problem.x]
    row = problem.k / (32 * config.fold_warps) * size / 4  # registers a thread for a row of the result
    if 4 * row > 128:
        return f"rows of {problem.k} columns spill: fold_warps={config.fold_warps}"
    step = f"a [{config.block_m}, {config.block_d}] step"
    tile, threads = config.block_m * config.block_d, 32 * config.num_warps
    held = tile / threads * (1 if post else STREAMS)  # numbers a thread has of a product
    if held < 8:
        return f"{step} leaves threads of {config.num_warps} warps idle"
    if held > ((16 if config.block_m in (16, 64) else 8) if post else 128):
        return f"{step} spills: num_warps={config.num_warps}"
    if config.ahead:
        steps = _steps(problem.m, problem.k, config)
        if steps > 1:
            return f"ahead is for one step a program, not {steps}"
        if config.num_stages > 2:
            return f"one step has no num_stages={config.num_stages}"
        if config.block_m != 16 or config.block_d > 64:  # block_m=64: 64 tokens of pre in 14.5 us, not in 10.6 (H100)
            return f"{step} is too large for ahead"
    buffers = STREAMS * tile * size + (tile * size + 80 * config.block_m if post else 0)
    factors = 128 * config.block_d * (2 * _columns_an_output(post, config) if problem.x == "bf16" else 4)
    scratch = 128 * config.block_m + (tile * size if post else 0)
    shared = (config.num_stages - 1) * buffers + factors + scratch
    if shared > SHARED_BYTES:
        return f"{config.num_stages} stages take {shared} bytes of shared memory, more than {SHARED_BYTES}"
    return None


def _columns_an_output(post: bool, config: Config) -> int:
    """Three terms of BF16; wgmma takes them at once, with as many columns of nothing, where its sums have room."""
    return 4 if config.block_m >= 64 and (not post or config.num_warps == 8) else 3


def build_key(problem: FoldProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return problem.x, triton.cdiv(problem.k, config.block_d), problem.k % config.block_d == 0


@triton.jit
def _nothing():
    """A tuple to add to, of a type that type checkers leave open."""
    return ()


@triton.jit
def _wide(x):
    """`widen` in an instruction a number, wherever a pair of BF16 numbers comes from."""
    if CVT and x.dtype == tl.bfloat16:
        halves: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(halves, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return widen(x)


@triton.jit
def closed(y, x0, x1, x2, x3, post, c0, c1, c2, c3):
    """One stream after a site: post y + sum of c_j x_j, in FP32."""
    return post * y + (((c0 * x0 + c1 * x1) + c2 * x2) + c3 * x3)


@triton.jit
def _opaque(x):
    """x itself. Triton moves the layout that a tensor core wants through arithmetic to the loads, where it takes narrow
    loads and many registers; it does not move it through what may have effects.
    """
    if CVT and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def _terms(fn):
    """FP32 numbers as sums of three BF16 numbers, the smallest first."""
    high = (fn.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
    rest = fn - high
    middle = (rest.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
    return rest - middle, middle, high


@triton.jit
def _factors(fn, TERMS: tl.constexpr):
    """fn [outputs, columns] as what streams are multiplied by: itself, its terms, or its terms next to each other."""
    if TERMS == 1:
        return (tl.trans(fn),)
    elif TERMS == 3:
        lowest, middle, high = _terms(fn)
        return tl.trans(lowest.to(tl.bfloat16)), tl.trans(middle.to(tl.bfloat16)), tl.trans(high.to(tl.bfloat16))
    else:
        term = tl.arange(0, fn.shape[0])[:, None] // (fn.shape[0] // 4)
        lowest, middle, high = _terms(fn)
        chosen = tl.where(term == 0, lowest, tl.where(term == 1, middle, tl.where(term == 2, high, 0.0)))
        return (tl.trans(chosen.to(tl.bfloat16)),)


@triton.jit
def _times(x, factors, TERMS: tl.constexpr):
    """x [rows, columns] times the sum of factors [columns, outputs]."""
    if TERMS == 1:
        return tl.dot(_wide(x), factors[0], input_precision="ieee")
    elif TERMS == 3 and x.shape[0] == 16:
        # three chains that do not wait for each other; a plain addition would be made the dot's
        lowest, middle, high = tl.dot(x, factors[0]), tl.dot(x, factors[1]), tl.dot(x, factors[2])
        return tl.fma(high, 1.0, tl.fma(middle, 1.0, lowest))
    elif TERMS == 3:
        return tl.dot(x, factors[2], tl.dot(x, factors[1], tl.dot(x, factors[0])))
    else:
        return tl.dot(x, factors[0])


@triton.jit
def _output(place):
    """Which output of fn is at a place of a row of parts, and whether one is."""
    output = tl.where(place < 8, place - 1, tl.where(place < 16, place - N, place - 2 * N))
    return output, ((place >= 1) & (place <= N)) | ((place >= 8) & (place < 8 + N)) | (place >= 16)


@triton.jit
def _fn_of_part(fn_ptr, part, D, TERMS: tl.constexpr, JOINED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """What fn has in the columns of a part: of all streams, next to each other, or of each."""
    PADDED: tl.constexpr = 16 if HEAD else 32  # what tl.dot takes at least
    column = tl.arange(0, 4 * PADDED if TERMS == 4 else PADDED)
    output, is_output = _output(column % PADDED)
    is_output &= column % PADDED < (8 if HEAD else 32)
    FLAT: tl.constexpr = N * BLOCK_D if JOINED else BLOCK_D  # columns of a product
    cols = part * BLOCK_D + tl.arange(0, FLAT) % BLOCK_D
    at = fn_ptr + output[:, None] * (N * D) + (tl.arange(0, FLAT) // BLOCK_D * D + cols)[None, :]
    inside = is_output[:, None] & (cols < D)[None, :]
    fn = _nothing()
    for k in tl.static_range(1 if JOINED else N):
        fn += (tl.load(at + k * D, mask=inside, other=0.0),)
    return fn


@triton.jit
def _all_factors(fn, TERMS: tl.constexpr):
    factors = _nothing()
    for k in tl.static_range(len(fn)):
        factors += (_factors(_wide(fn[k]), TERMS),)
    return factors


@triton.jit
def _four(at):
    """Four FP32 numbers each from at [rows] on, [rows, 1], now: what Triton asks for a step ahead goes through shared
    memory in copies of four bytes, each with a wait of its own.
    """
    if CVT:
        load: tl.constexpr = "ld.global.f32 $0, [$1];"
        a = tl.inline_asm_elementwise(load, "=f,l", [at], dtype=tl.float32, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise(load, "=f,l", [at + 1], dtype=tl.float32, is_pure=True, pack=1)
        c = tl.inline_asm_elementwise(load, "=f,l", [at + 2], dtype=tl.float32, is_pure=True, pack=1)
        d = tl.inline_asm_elementwise(load, "=f,l", [at + 3], dtype=tl.float32, is_pure=True, pack=1)
    else:
        a, b, c, d = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit
def _columns(part, D, JOINED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stream and column of each column of a product."""
    place = tl.arange(0, N * BLOCK_D if JOINED else BLOCK_D)
    return place // BLOCK_D, part * BLOCK_D + place % BLOCK_D


@triton.jit
def _read(
    part,
    start,
    h_ptr,
    stride_m,
    stride_n,
    y_ptr,
    stride_y,
    post_ptr,
    comb_ptr,
    M,
    D,
    POST: tl.constexpr,
    JOINED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the tokens from start (int64) on have in the columns of a part: streams, and with POST a site's output and
    coefficients.
    """
    row = tl.arange(0, BLOCK_M)
    live = row < M - start
    stream, cols = _columns(part, D, JOINED, BLOCK_D)
    inside = live[:, None] if WHOLE else live[:, None] & (cols < D)[None, :]
    # one number of 64 bits a column, and of 32 a row: a block's rows are never so far apart
    h_at = h_ptr + start * stride_m + (stream.to(tl.int64) * stride_n + cols)[None, :] + (row * stride_m)[:, None]
    streams, site = _nothing(), _nothing()
    if POST:
        token = tl.minimum(start + row, tl.maximum(M - 1, 0))
        site += (_four(post_ptr + token * N),)
        for j in tl.static_range(N):
            site += (_four(comb_ptr + token * (N * N) + j * N),)
        y_at = y_ptr + start * stride_y + (row * stride_y)[:, None] + cols[None, :]
        site += (tl.load(y_at, mask=inside, other=0.0),)
    for k in tl.static_range(1 if JOINED else N):
        streams += (tl.load(h_at + k * stride_n, mask=inside, other=0.0),)
    return streams, site


@triton.jit
def _part_of(
    factors,
    streams,
    site,
    part,
    start,
    out_ptr,
    M,
    D,
    TERMS: tl.constexpr,
    POST: tl.constexpr,
    JOINED: tl.constexpr,
    HEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A part of the sums of tokens that have been `_read`: [tokens, 16 or 32], see `_output`. With POST of the streams
    that a site leaves, which it writes.
    """
    row = tl.arange(0, BLOCK_M)
    live = row < M - start
    PADDED: tl.constexpr = 16 if HEAD else 32
    _, cols = _columns(part, D, JOINED, BLOCK_D)
    inside = live[:, None] if WHOLE else live[:, None] & (cols < D)[None, :]
    total, squares = tl.zeros([1, 1], tl.float32), tl.zeros([BLOCK_M, cols.numel], tl.float32)
    for k in tl.static_range(1 if JOINED else N):
        if POST:
            posts, c0, c1, c2, c3, y = site
            x0, x1, x2, x3 = streams
            x = closed(_wide(y), _wide(x0), _wide(x1), _wide(x2), _wide(x3), posts[k], c0[k], c1[k], c2[k], c3[k])
            x = narrow(x, out_ptr.dtype.element_ty, CVT)
            out_at = out_ptr + start * (N * D) + k * D + (row * (N * D))[:, None] + cols[None, :]
            tl.store(out_at, x, mask=inside)
            x = _opaque(x)
        else:
            x = streams[k]
        # not a plain addition, which Triton makes the dot do: dots that feed dots have another layout than the last one
        product = _times(x, factors[k], TERMS)
        total = product if k == 0 else tl.fma(product, 1.0, total)
        squares = tl.fma(_wide(x), _wide(x), squares)
    if TERMS == 4:
        total = tl.sum(total.reshape(BLOCK_M, 4, PADDED), axis=1)
    return tl.where(tl.arange(0, PADDED)[None, :] == 0, tl.sum(squares, axis=1)[:, None], total)


@triton.jit(do_not_specialize=["M", "GROUPS"])
def _sums(
    h_ptr,
    stride_m,
    stride_n,
    y_ptr,
    stride_y,
    post_ptr,
    comb_ptr,
    out_ptr,
    fn_ptr,
    parts_ptr,
    M,
    D,
    GROUPS,
    TERMS: tl.constexpr,
    POST: tl.constexpr,
    JOINED: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A row of parts is WIDTH numbers: the sum of squares, pre from 1 on, post from 8 and comb from 16. JOINED: one
    product of all streams, next to each other. fn, a weight, comes while the kernel before runs.
    """
    WIDTH: tl.constexpr = 8 if HEAD else 32
    part = tl.program_id(0) % PARTS
    place, row = tl.arange(0, 16 if HEAD else 32), tl.arange(0, BLOCK_M)
    # int64 before the multiply: a long batch passes 2**31 elements
    first = tl.program_id(0) // PARTS * tl.full([], BLOCK_M, tl.int64)
    fn = _fn_of_part(fn_ptr, part, D, TERMS, JOINED, HEAD, BLOCK_D)
    begin(FOLLOWED=True)
    if AHEAD:
        streams, site = _read(
            part, first, h_ptr, stride_m, stride_n, y_ptr, stride_y, post_ptr, comb_ptr, M, D, POST, JOINED, WHOLE,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
        factors = _all_factors(fn, TERMS)
        total = _part_of(
            factors, streams, site, part, first, out_ptr, M, D, TERMS, POST, JOINED, HEAD, WHOLE, BLOCK_M, BLOCK_D
        )  # fmt: skip
        at = parts_ptr + (first * PARTS + part) * WIDTH + (row * (PARTS * WIDTH))[:, None] + place[None, :]
        tl.store(at, total, mask=(row < M - first)[:, None] & (place < WIDTH)[None, :])
    else:
        factors = _all_factors(fn, TERMS)
        for block in range(tl.program_id(0) // PARTS, (M + BLOCK_M - 1) // BLOCK_M, GROUPS):
            start = block * tl.full([], BLOCK_M, tl.int64)
            streams, site = _read(
                part, start, h_ptr, stride_m, stride_n, y_ptr, stride_y, post_ptr, comb_ptr, M, D, POST, JOINED, WHOLE,
                BLOCK_M, BLOCK_D,
            )  # fmt: skip
            total = _part_of(
                factors, streams, site, part, start, out_ptr, M, D, TERMS, POST, JOINED, HEAD, WHOLE, BLOCK_M, BLOCK_D
            )  # fmt: skip
            at = parts_ptr + (start * PARTS + part) * WIDTH + (row * (PARTS * WIDTH))[:, None] + place[None, :]
            tl.store(at, total, mask=(row < M - start)[:, None] & (place < WIDTH)[None, :])


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _norm_of(squares, COUNT, eps):
    """1 / sqrt(mean + eps)."""
    return tl.rsqrt(squares / COUNT.to(tl.float32) + eps)


@triton.jit
def _pick(x, place: tl.constexpr):
    """The numbers of x at one place of its last axis."""
    AXIS: tl.constexpr = len(x.shape) - 1
    return tl.sum(tl.where(tl.arange(0, x.shape[AXIS]) == place, x, 0.0), axis=AXIS)


@triton.jit
def _base_and_scale(base_ptr, scale_ptr, WIDTH: tl.constexpr):
    """Those of each place."""
    place = tl.arange(0, WIDTH)
    output, is_output = _output(place)
    base = tl.load(base_ptr + output, mask=is_output, other=0.0)
    return base, tl.load(scale_ptr + tl.minimum(place // 8, 2), mask=is_output, other=0.0)


@triton.jit
def _reciprocal(x):
    """1 / x of a normal number, within a unit in the last place: what Sinkhorn waits for most."""
    if CVT:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _over(c, sums):
    """Each of four tensors over sums."""
    share = _reciprocal(sums)
    return c[0] * share, c[1] * share, c[2] * share, c[3] * share


@triton.jit
def _rows_normed(c, eps):
    """Entries over the sum of their row: c[j] has what column j has of each row."""
    return _over(c, ((c[0] + c[1]) + (c[2] + c[3])) + eps)


@triton.jit
def _columns_normed(c, eps):
    """Entries over the sum of their column: rows are along the last axis, a thread each."""
    normed = _nothing()
    for j in tl.static_range(N):
        share = _reciprocal(tl.sum(c[j], axis=2) + eps)
        normed += (c[j] * share[:, :, None],)
    return normed


@triton.jit
def _post_and_comb(sums, base_ptr, scale_ptr, post_ptr, comb_ptr, tokens, live, D, norm_eps, eps, iterations):
    """post and comb of tokens whose sums [tokens, 32] are given."""
    base, scale = _base_and_scale(base_ptr, scale_ptr, 32)
    norm = _norm_of(_pick(sums, 0), D * N, norm_eps)
    logits = sums * norm[:, None] * scale[None, :] + base[None, :]
    # [tokens, 2, 4]: what each column has of the rows of four, of which one is post's and the last four are comb's
    even, odd = tl.split(logits.reshape(sums.shape[0], 2, N, 2, 2))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)

    place = tl.arange(0, 2)[None, :, None] * (N * N) + tl.arange(0, N)[None, None, :] * N  # of what c0 has
    at = post_ptr + tokens[:, None, None] * N + (place - 8)
    is_post = live[:, None, None] & (place == 8)
    tl.store(at, 2.0 * _sigmoid(c0), mask=is_post)
    tl.store(at + 1, 2.0 * _sigmoid(c1), mask=is_post)
    tl.store(at + 2, 2.0 * _sigmoid(c2), mask=is_post)
    tl.store(at + 3, 2.0 * _sigmoid(c3), mask=is_post)

    top = tl.maximum(tl.maximum(c0, c1), tl.maximum(c2, c3))
    comb = _rows_normed((tl.exp(c0 - top), tl.exp(c1 - top), tl.exp(c2 - top), tl.exp(c3 - top)), 0.0)
    comb = _columns_normed((comb[0] + eps, comb[1] + eps, comb[2] + eps, comb[3] + eps), eps)
    for _ in range(iterations - 1):
        comb = _columns_normed(_rows_normed(comb, eps), eps)
    at = comb_ptr + tokens[:, None, None] * (N * N) + (place - 16)
    is_comb = live[:, None, None] & (place >= 16)
    for j in tl.static_range(N):
        tl.store(at + j, comb[j], mask=is_comb)


@triton.jit
def _sums_of(parts_at, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The sums [WIDTH] of all parts of a token."""
    SOME: tl.constexpr = 1024 // WIDTH
    some = tl.arange(0, SOME)
    at = parts_at + some[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([SOME, WIDTH], tl.float32)
    for part in tl.static_range(0, PARTS, SOME):
        total += tl.load(at + part * WIDTH, mask=(part + some < PARTS)[:, None], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _streams_at(h_at, stride_n, inside, MANY: tl.constexpr):
    """A chunk of each of a token's streams. MANY tokens' do not stay in L2."""
    HINT: tl.constexpr = "evict_first" if MANY else ""
    return (
        tl.load(h_at, mask=inside, other=0.0, eviction_policy=HINT),
        tl.load(h_at + stride_n, mask=inside, other=0.0, eviction_policy=HINT),
        tl.load(h_at + 2 * stride_n, mask=inside, other=0.0, eviction_policy=HINT),
        tl.load(h_at + 3 * stride_n, mask=inside, other=0.0, eviction_policy=HINT),
    )


@triton.jit
def _y(
    h_at,
    stride_n,
    parts_at,
    base_ptr,
    scale_ptr,
    weight_ptr,
    y_at,
    sums_at,
    D,
    norm_eps,
    eps,
    MADE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MANY: tl.constexpr,
):
    """The folded streams of a token, normed. Its parts, and with MADE its streams, are read once the launch before has
    ended.
    """
    held, weights = _nothing(), _nothing()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        if not MADE:
            held += (_streams_at(h_at + cols, stride_n, cols < D, MANY),)
        if weight_ptr is not None:
            weights += (tl.load(weight_ptr + cols, mask=cols < D, other=0.0),)
    base, scale = _base_and_scale(base_ptr, scale_ptr, WIDTH)
    begin(FOLLOWS=True)
    for chunk in tl.static_range(CHUNKS if MADE else 0):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        held += (_streams_at(h_at + cols, stride_n, cols < D, MANY),)
    sums = _sums_of(parts_at, PARTS, WIDTH)
    if sums_at is not None:
        tl.store(sums_at + tl.arange(0, WIDTH), sums)
    norm = _norm_of(_pick(sums, 0), D * N, norm_eps)
    pre = _sigmoid(sums * norm * scale + base) + eps
    p0, p1, p2, p3 = _pick(pre, 1), _pick(pre, 2), _pick(pre, 3), _pick(pre, 4)
    row = _nothing()  # in chunks, which are rounded as they come: fewer registers than a row of FP32
    squares = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        x0, x1, x2, x3 = held[chunk]
        y = tl.fma(p3, _wide(x3), tl.fma(p2, _wide(x2), tl.fma(p1, _wide(x1), p0 * _wide(x0))))
        y = narrow(y, y_at.dtype.element_ty, CVT)
        squares = tl.fma(_wide(y), _wide(y), squares)
        row += (y,)
    norm = _norm_of(tl.sum(squares, axis=0), D, norm_eps) if weight_ptr is not None else 1.0
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        y = row[chunk]
        if weight_ptr is not None:
            y = narrow(_wide(y) * norm * _wide(weights[chunk]), y_at.dtype.element_ty, CVT)
        tl.store(y_at + cols, y, mask=cols < D, eviction_policy="evict_first" if MANY else "")


@triton.jit(do_not_specialize=["M", "iterations"])
def _fold(
    h_ptr,
    stride_m,
    stride_n,
    parts_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    y_ptr,
    post_ptr,
    comb_ptr,
    sums_ptr,
    M,
    D,
    norm_eps,
    eps,
    iterations,
    MADE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MANY: tl.constexpr,
):
    """A program a token. MADE: the streams are the product's results, too. Without `sums`, which have room for what
    Sinkhorn needs later, programs of Sinkhorn, which take longest, come first.
    """
    # the last tokens first: the product read them last, so that L2 may still hold them
    token = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    if token < M:
        sums_at = None if sums_ptr is None else sums_ptr + token * WIDTH
        _y(
            h_ptr + token * stride_m, stride_n, parts_ptr + token * (PARTS * WIDTH), base_ptr, scale_ptr, weight_ptr,
            y_ptr + token * D, sums_at, D, norm_eps, eps, MADE, PARTS, WIDTH, CHUNK, CHUNKS, MANY,
        )  # fmt: skip
    elif post_ptr is not None:
        begin(FOLLOWS=True)
        token -= M
        sums = _sums_of(parts_ptr + token * (PARTS * WIDTH), PARTS, WIDTH)
        tokens = token + tl.arange(0, 1)
        _post_and_comb(
            sums[None, :], base_ptr, scale_ptr, post_ptr, comb_ptr, tokens, tokens < M, D, norm_eps, eps, iterations
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "iterations"])
def _sinkhorn(sums_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, M, D, norm_eps, eps, iterations):
    """post and comb of many tokens, whose sums folds have left."""
    begin()
    tokens = tl.program_id(0) * SINKHORN_TOKENS + tl.arange(0, SINKHORN_TOKENS).to(tl.int64)
    at = sums_ptr + tokens[:, None] * 32 + tl.arange(0, 32)[None, :]
    sums = tl.load(at, mask=(tokens < M)[:, None], other=0.0)
    _post_and_comb(sums, base_ptr, scale_ptr, post_ptr, comb_ptr, tokens, tokens < M, D, norm_eps, eps, iterations)


def launch(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
    out: tuple[Tensor, ...],
    config: Config,
    site: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """y [tokens, d], and post and comb if out has room for them, of h [tokens, 4, d].

    site: a site's output y, post and comb, and room for the streams that it leaves of h: these are then folded.
    fn may be read before earlier work on the stream has ended (`overlap`).
    """
    tokens, weights, numbers, made = h.shape[0], (base, scale, weight), (norm_eps, eps, iterations), site is not None
    few = tokens <= FEW
    sums = None if few or len(out) == 1 else torch.empty(tokens, 32, dtype=torch.float32, device=h.device)
    for first in range(0, tokens, TOKENS_A_PAIR):

        def cut(t: Tensor, rows: slice = slice(first, first + TOKENS_A_PAIR)) -> Tensor:
            return t if tokens <= TOKENS_A_PAIR else t[rows]

        ended = None if site is None else tuple(cut(t) for t in site)
        parts = launch_sums(cut(h), fn, config, ended)
        streams = cut(h) if ended is None else ended[3]
        folded = tuple(cut(t) for t in (out if few else out[:1]))
        launch_fold(
            streams, parts, weights, numbers, folded, config, made=made, sums=None if sums is None else cut(sums)
        )
    if sums is not None:
        grid = (triton.cdiv(tokens, SINKHORN_TOKENS.value),)
        _sinkhorn[grid](sums, base, scale, *out[1:], tokens, h.shape[2], *numbers, num_warps=4, **host.OPTIONS)


def strides(h: Tensor) -> tuple[int, int]:
    """Elements from token to token and from stream to stream; of a single token the same whatever the tensor says."""
    return (h.stride(0) if h.shape[0] > 1 else STREAMS * h.shape[2]), h.stride(1)


def launch_sums(h: Tensor, fn: Tensor, config: Config, site: tuple[Tensor, ...] | None = None) -> Tensor:
    """Parts FP32 [tokens, parts, width] of the product of h [tokens, 4, d] with fn, and of its sum of squares: see
    `_sums`.
    """
    tokens, _, d = h.shape
    constants = _sums_constants(fn.shape[0], d, site is not None, h.dtype, config)
    count, groups = constants["PARTS"], _groups(tokens, d, config)
    parts = torch.empty(tokens, count, _width(fn.shape[0]), dtype=torch.float32, device=h.device)
    y, post, comb, out = site or (None, None, None, None)
    stride_y = host.row_stride(y) if y is not None else d
    operands = (h, *strides(h), y, stride_y, post, comb, out, fn, parts, tokens, d, groups)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **host.OPTIONS}
    _sums[(count * groups,)](*operands, **constants, **options)
    return parts


def launch_fold(
    h: Tensor,
    parts: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    numbers: tuple[float, float, int],
    out: tuple[Tensor, ...],
    config: Config,
    *,
    made: bool,
    sums: Tensor | None = None,
) -> None:
    """y [tokens, d], and post and comb if out has room for them, of h [tokens, 4, d] and what `launch_sums` left.

    weights: base, scale and the norm's; numbers: norm_eps, eps, iterations; made: h comes from `launch_sums`, too;
    sums: room for those of parts, which `_sinkhorn` takes.
    """
    tokens, _, d = h.shape
    sinkhorn = len(out) == 3
    y, post, comb = out if sinkhorn else (*out, None, None)
    operands = (h, *strides(h), parts, *weights, y, post, comb, sums, tokens, d, *numbers)
    options = {"num_warps": config.fold_warps, **host.FOLLOWING}
    constants = {"MADE": made, **_fold_constants(parts.shape[2], d, config), "MANY": tokens > FEW}
    _fold[(fold_programs(tokens, sinkhorn=sinkhorn),)](*operands, **constants, **options)


def fold_programs(tokens: int, *, sinkhorn: bool) -> int:
    return 2 * tokens if sinkhorn else tokens


def build(problem: FoldProblem, config: Config, arch: str) -> Built:
    """The launch that multiplies, compiled for `arch` without a GPU."""
    head, post = (isinstance(problem, kind) for kind in (HyperConnectionHeadProblem, HyperConnectionPostPreProblem))
    outputs = STREAMS if head else STREAMS * (STREAMS + 2)
    return build_sums(problem.x, problem.k, config, arch, outputs=outputs, post=post)


def build_sums(x: str, k: int, config: Config, arch: str, *, outputs: int, post: bool = False) -> Built:
    """`_sums` compiled for `arch` without a GPU."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "stride_y": "i32", "fn_ptr": "*fp32"}
    types |= {"parts_ptr": "*fp32", "M": "i32", "D": "i32", "GROUPS": "i32"}
    constants = _sums_constants(outputs, k, post, host.DTYPES[x], config)
    of_site = {"y_ptr": f"*{x}", "post_ptr": "*fp32", "comb_ptr": "*fp32", "out_ptr": f"*{x}"}
    types |= of_site if post else {}
    constants |= {} if post else dict.fromkeys(of_site)
    stages = config.num_stages
    return host.build(_sums, types, constants, arch, config.num_warps, unaligned=("M", "GROUPS"), num_stages=stages)


def build_fold(
    x: str, k: int, config: Config, arch: str, *, sinkhorn: bool, made: bool = False, many: bool = False
) -> Built:
    """`_fold` compiled for `arch` without a GPU; many: with `_sinkhorn` behind it."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "parts_ptr": "*fp32"}
    types |= {"weight_ptr": f"*{x}", "y_ptr": f"*{x}", "M": "i32", "D": "i32", **_COEFFICIENTS}
    constants = {"MADE": made, **_fold_constants(32 if sinkhorn else 8, k, config), "MANY": many}
    beside, later = sinkhorn and not many, sinkhorn and many
    for name, there in {"post_ptr": beside, "comb_ptr": beside, "sums_ptr": later}.items():
        types |= {name: "*fp32"} if there else {}
        constants |= {} if there else {name: None}
    unaligned = ("M", "iterations")
    return host.build(_fold, types, constants, arch, config.fold_warps, unaligned=unaligned, launch_pdl=True)


def build_sinkhorn(arch: str) -> Built:
    """`_sinkhorn` compiled for `arch` without a GPU."""
    types = {"sums_ptr": "*fp32", "post_ptr": "*fp32", "comb_ptr": "*fp32", "M": "i32", "D": "i32", **_COEFFICIENTS}
    return host.build(_sinkhorn, types, {}, arch, 4, unaligned=("M", "iterations"))


_COEFFICIENTS = {"base_ptr": "*fp32", "scale_ptr": "*fp32", "norm_eps": "fp32", "eps": "fp32", "iterations": "i32"}


def _sums_constants(outputs: int, d: int, post: bool, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    return {
        "TERMS": _columns_an_output(post, config) if CVT and dtype == torch.bfloat16 else 1,
        "POST": post,
        "JOINED": not post and dtype == torch.bfloat16,  # others' products would be of too many instructions
        "HEAD": outputs == STREAMS,
        "PARTS": triton.cdiv(d, config.block_d),
        "WHOLE": d % config.block_d == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "AHEAD": config.ahead,
    }


def _fold_constants(width: int, d: int, config: Config) -> dict[str, Any]:
    chunk = 8 * 32 * config.fold_warps  # eight columns of a stream a thread: loads of 16 bytes
    return {
        "WIDTH": width,
        "PARTS": triton.cdiv(d, config.block_d),
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(d, chunk),
    }


def _width(outputs: int) -> int:
    """Numbers of a token in a part."""
    return 8 if outputs == STREAMS else 32
