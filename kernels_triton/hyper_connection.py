"""What the hyper-connection kernels share: a product of all streams with a narrow matrix, and the fold that follows.

Two launches. `_sums` multiplies vec(h) [tokens, 4 d] by fn [outputs, 4 d] and sums squares. A program has block_d
columns of each stream for good: it holds what fn has there, in shared memory, and takes block after block of tokens.
With POST it first makes h, the streams that a site leaves, and writes them. `_fold` adds the parts of a token and folds
its streams into y; Sinkhorn's 39 normalisations, which wait for each other, have programs of their own.

The second launch is a programmatic dependent of the first, so that it may start as soon as all programs of the first
run. It waits for the end of the first or, with `overlap`, for no more than the parts of its own tokens, whose streams
L2 still holds. This cannot deadlock, whatever the GPU: a program of the fold waits for programs of the product only,
which run or have run when it starts, and which wait for nobody.

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
from .rounding import CVT

FoldProblem = HyperConnectionPreProblem | HyperConnectionHeadProblem | HyperConnectionPostPreProblem

STREAMS = 4
N = tl.constexpr(STREAMS)
SINKHORN_TOKENS = tl.constexpr(8)  # a program's
PARTS_A_STEP = tl.constexpr(8)
UPPER_HALF = tl.constexpr(-65536)
SHARED_BYTES = 227 * 1024
SMS = 132  # of an H100; a larger GPU has room for more of the fold
TOKENS_A_PAIR = 16384  # of launches: their parts take 235 MB (d = 7168, block_d = 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens by block_d columns of each stream a step of the product. Programs that differ in tokens share
    columns as long as there are no more than `programs` of them.

    num_warps and num_stages are those of the product, fold_warps those of the fold. overlap: the fold of a block of
    tokens starts with the last of its parts, while the product goes on.
    """

    block_m: int = 64
    block_d: int = 32
    programs: int = 2 * SMS
    num_warps: int = 4
    num_stages: int = 3
    fold_warps: int = 8
    overlap: bool = True


SPACE = {
    "block_m": (16, 32, 64, 128),
    "block_d": (32, 64, 128),
    "programs": (SMS, 2 * SMS),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
    "fold_warps": (4, 8, 16),
    "overlap": (False, True),
}


def default(problem: FoldProblem) -> Config:
    """One step and whole rows in registers for few tokens; for many, what leaves room for folds beside the product."""
    few = problem.m <= 256
    # tcgen05 (sm_100a) takes copies of its operands, for which larger steps, and more of them, leave no room
    copies = archs.current() == "sm_100a"
    if copies or problem.x != "bf16" or isinstance(problem, HyperConnectionPostPreProblem):
        return Config(num_stages=2 if copies else 3, fold_warps=8 if few else 4, overlap=not few)
    if few:
        return Config(block_m=16 if problem.m <= 16 else 64, block_d=64, programs=SMS, overlap=False)
    return Config(block_m=128, block_d=64, programs=SMS, num_warps=8, fold_warps=4)


def arithmetic(problem: FoldProblem, config: Config) -> str:
    """In which order a config sums: how numbers lie over parts, steps and threads."""
    return _arithmetic(config)


def _arithmetic(config: Config) -> str:
    return (
        f"parts of {config.block_d} columns for {config.block_m} rows by {config.num_warps} warps, "
        f"folded by {config.fold_warps}"
    )


INVARIANT = _arithmetic(Config())


def in_arithmetic(problem: FoldProblem, wanted: str) -> Config | None:
    """The config that sums so, in the way of the default for the rest; None if there is none."""
    own = default(problem)
    return _in_arithmetic(wanted, own.programs, own.overlap)


@functools.cache
def _in_arithmetic(wanted: str, programs: int, overlap: bool) -> Config | None:
    steps = itertools.product(*(SPACE[name] for name in ("block_m", "block_d", "num_warps", "fold_warps")))
    configs = (
        Config(block_m=m, block_d=d, programs=programs, num_warps=w, num_stages=2, fold_warps=f, overlap=overlap)
        for m, d, w, f in steps
    )
    return next((c for c in configs if _arithmetic(c) == wanted), None)


def supports(problem: FoldProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.n != STREAMS:
        return f"n={problem.n}: the kernels are written for {STREAMS} streams"
    post = isinstance(problem, HyperConnectionPostPreProblem)
    size = ELEMENT_BYTES[problem.x]
    row = problem.k / (32 * config.fold_warps) * size / 4  # registers a thread for a row of the result
    if row > 64 or (4 * row > 128 and not config.overlap):
        return f"rows of {problem.k} columns spill: fold_warps={config.fold_warps}"
    step = f"a [{config.block_m}, {config.block_d}] step"
    tile, threads = config.block_m * config.block_d, 32 * config.num_warps
    held = tile / threads * (1 if post else STREAMS)  # numbers a thread has of a product
    if held < 8:
        return f"{step} leaves threads of {config.num_warps} warps idle"
    if held > (16 if post else 128):
        return f"{step} spills: num_warps={config.num_warps}"
    buffers = STREAMS * tile * size + (tile * size + 80 * config.block_m if post else 0)
    factors = 128 * config.block_d * (6 if problem.x == "bf16" else 4)
    scratch = 128 * config.block_m + (tile * size if post else 0)
    shared = (config.num_stages - 1) * buffers + factors + scratch
    if shared > SHARED_BYTES:
        return f"{config.num_stages} stages take {shared} bytes of shared memory, more than {SHARED_BYTES}"
    return None


def build_key(problem: FoldProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return problem.x, triton.cdiv(problem.k, config.block_d), problem.k % config.block_d == 0


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
def _factors(fn, dtype: tl.constexpr):
    """fn [outputs, columns], FP32, as factors of numbers of dtype: a sum of three, the smallest first, or one."""
    if CVT and dtype == tl.bfloat16:
        high = (fn.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
        rest = fn - high
        middle = (rest.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
        lowest = (rest - middle).to(tl.bfloat16)
        return tl.trans(lowest), tl.trans(middle.to(tl.bfloat16)), tl.trans(high.to(tl.bfloat16))
    else:
        return (tl.trans(fn),)


@triton.jit
def _times(x, factors, total):
    """total + x [rows, columns] times the sum of factors [columns, outputs]."""
    if CVT and x.dtype == tl.bfloat16:
        for i in tl.static_range(3):
            total = tl.dot(x, factors[i], total)
        return total
    else:
        return tl.dot(_wide(x), factors[0], total, input_precision="ieee")


@triton.jit
def _output(place):
    """Which output of fn is at a place of a row of parts, and whether one is."""
    output = tl.where(place < 8, place - 1, tl.where(place < 16, place - N, place - 2 * N))
    return output, ((place >= 1) & (place <= N)) | ((place >= 8) & (place < 8 + N)) | (place >= 16)


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
    done_ptr,
    M,
    D,
    GROUPS,
    POST: tl.constexpr,
    JOINT: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row of parts is WIDTH numbers: the sum of squares, pre from 1 on, post from 8 and comb from 16. JOINT: one
    product of all streams, next to each other.
    """
    WIDTH: tl.constexpr = 8 if HEAD else 32
    PADDED: tl.constexpr = 16 if HEAD else 32  # what tl.dot takes at least
    if CVT:
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0) % PARTS
    place = tl.arange(0, PADDED)
    output, is_output = _output(place)
    is_output &= place < WIDTH
    FLAT: tl.constexpr = N * BLOCK_D if JOINT else BLOCK_D  # columns of a product
    stream = tl.arange(0, FLAT) // BLOCK_D
    cols = part * BLOCK_D + tl.arange(0, FLAT) % BLOCK_D
    fn_at = fn_ptr + output[:, None] * (N * D) + (stream * D + cols)[None, :]
    fn_inside = is_output[:, None] & (cols < D)[None, :]
    factors = ()
    for k in tl.static_range(1 if JOINT else N):
        fn = _wide(tl.load(fn_at + k * D, mask=fn_inside, other=0.0))
        factors = factors + (_factors(fn, h_ptr.dtype.element_ty),)  # type: ignore[assignment]  # noqa: RUF005
    for block in range(tl.program_id(0) // PARTS, (M + BLOCK_M - 1) // BLOCK_M, GROUPS):
        # int64 before the multiply: a long batch passes 2**31 elements
        rows = block * tl.full([], BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)
        live = rows < M
        inside = live[:, None] if WHOLE else live[:, None] & (cols < D)[None, :]
        h_at = h_ptr + rows[:, None] * stride_m + (stream * stride_n + cols)[None, :]
        total = tl.zeros([BLOCK_M, PADDED], tl.float32)
        if POST:
            y = tl.load(y_ptr + rows[:, None] * stride_y + cols[None, :], mask=inside, other=0.0)
            x0 = tl.load(h_at, mask=inside, other=0.0)
            x1 = tl.load(h_at + stride_n, mask=inside, other=0.0)
            x2 = tl.load(h_at + 2 * stride_n, mask=inside, other=0.0)
            x3 = tl.load(h_at + 3 * stride_n, mask=inside, other=0.0)
        squares = tl.zeros([BLOCK_M, FLAT], tl.float32)
        for k in tl.static_range(1 if JOINT else N):
            if POST:
                c = comb_ptr + rows * (N * N) + k
                post = tl.load(post_ptr + rows * N + k, mask=live, other=0.0)[:, None]
                c0 = tl.load(c, mask=live, other=0.0)[:, None]
                c1 = tl.load(c + N, mask=live, other=0.0)[:, None]
                c2 = tl.load(c + 2 * N, mask=live, other=0.0)[:, None]
                c3 = tl.load(c + 3 * N, mask=live, other=0.0)[:, None]
                x = closed(_wide(y), _wide(x0), _wide(x1), _wide(x2), _wide(x3), post, c0, c1, c2, c3)
                x = narrow(x, h_ptr.dtype.element_ty, CVT)
                tl.store(out_ptr + (rows[:, None] * N + k) * D + cols[None, :], x, mask=inside)
                x = _opaque(x)
            else:
                x = tl.load(h_at + k * stride_n, mask=inside, other=0.0)
            total = _times(x, factors[k], total)
            squares = tl.fma(_wide(x), _wide(x), squares)
        total = tl.where(place[None, :] == 0, tl.sum(squares, axis=1)[:, None], total)
        at = parts_ptr + (rows * PARTS + part)[:, None] * WIDTH + place[None, :]
        tl.store(at, total, mask=live[:, None] & (place < WIDTH)[None, :])
        if done_ptr is not None:
            if CVT:  # all threads have stored; tl.debug_barrier would keep loads from being asked for a step ahead
                tl.inline_asm_elementwise("bar.sync 0; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            tl.atomic_add(done_ptr + block, 1, sem="release", scope="gpu")


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
def _await(done_ptr, block, COUNT: tl.constexpr):
    """Wait for all parts of a block of tokens, so that they may be read; without `done` for the end of the product."""
    if done_ptr is not None:
        done = tl.atomic_add(done_ptr + block, 0, sem="acquire", scope="gpu")
        while done < COUNT:
            done = tl.atomic_add(done_ptr + block, 0, sem="acquire", scope="gpu")
    elif CVT:
        tl.extra.cuda.gdc_wait()


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
def _rows_normed(c, eps):
    """Entries c[4 i + j] over their sum along j."""
    normed = ()
    for i in tl.static_range(N):
        share = _reciprocal(((c[N * i] + c[N * i + 1]) + (c[N * i + 2] + c[N * i + 3])) + eps)
        normed = normed + (c[N * i] * share, c[N * i + 1] * share, c[N * i + 2] * share, c[N * i + 3] * share)  # type: ignore[assignment]  # noqa: RUF005
    return normed


@triton.jit
def _transposed(c):
    """Entry c[4 i + j] at 4 j + i."""
    moved = ()
    for j in tl.static_range(N):
        moved = moved + (c[j], c[N + j], c[2 * N + j], c[3 * N + j])  # type: ignore[assignment]  # noqa: RUF005
    return moved


@triton.jit
def _softmax_rows(c, eps):
    """exp of entries c[4 i + j] over their sum along j, + eps."""
    shares = ()
    for i in tl.static_range(N):
        top = tl.maximum(tl.maximum(c[N * i], c[N * i + 1]), tl.maximum(c[N * i + 2], c[N * i + 3]))
        for j in tl.static_range(N):
            shares = shares + (tl.exp(c[N * i + j] - top),)  # type: ignore[assignment]  # noqa: RUF005
    shares = _rows_normed(shares, 0.0)
    entries = ()
    for i in tl.static_range(N * N):
        entries = entries + (shares[i] + eps,)  # type: ignore[assignment]  # noqa: RUF005
    return entries


@triton.jit
def _joined(c):
    """Four tensors [tokens, ...] as one of [tokens, n]: the numbers of the last one next to each other."""
    joined = tl.join(tl.join(c[0], c[2]), tl.join(c[1], c[3]))
    return joined.reshape(joined.shape[0], joined.numel // joined.shape[0])


@triton.jit
def _post_and_comb(
    parts_ptr,
    done_ptr,
    base_ptr,
    scale_ptr,
    post_ptr,
    comb_ptr,
    block,
    first,
    M,
    D,
    norm_eps,
    eps,
    iterations,
    PARTS: tl.constexpr,
):
    """post and comb of SINKHORN_TOKENS tokens from `first` on, each token's in a thread."""
    base, scale = _base_and_scale(base_ptr, scale_ptr, 32)
    _await(done_ptr, block, PARTS)
    rows = first + tl.arange(0, SINKHORN_TOKENS)
    live = rows < M
    some = tl.arange(0, PARTS_A_STEP)
    place = tl.arange(0, 32)
    at = parts_ptr + ((rows * PARTS)[None, :, None] + some[:, None, None]) * 32 + place[None, None, :]
    total = tl.zeros([PARTS_A_STEP, SINKHORN_TOKENS, 32], tl.float32)
    for part in tl.static_range(0, PARTS, PARTS_A_STEP):
        there = live[None, :, None] & (part + some < PARTS)[:, None, None]
        total += tl.load(at + part * 32, mask=there, other=0.0)
    sums = tl.sum(total, axis=0)  # [tokens, 32]
    norm = _norm_of(_pick(sums, 0), D * N, norm_eps)
    logits = sums * norm[:, None] * scale[None, :] + base[None, :]

    post = ()
    for k in tl.static_range(N):
        post = post + (2.0 * _sigmoid(_pick(logits, 8 + k)),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(post_ptr + rows[:, None] * N + tl.arange(0, N)[None, :], _joined(post), mask=live[:, None])

    comb = ()
    for i in tl.static_range(N * N):
        comb = comb + (_pick(logits, 16 + i),)  # type: ignore[assignment]  # noqa: RUF005
    comb = _rows_normed(_transposed(_softmax_rows(comb, eps)), eps)
    for _ in range(iterations - 1):
        comb = _rows_normed(_transposed(_rows_normed(_transposed(comb), eps)), eps)
    columns = ()
    for j in tl.static_range(N):  # what the last normalisation left are columns
        columns = columns + (_joined((comb[N * j], comb[N * j + 1], comb[N * j + 2], comb[N * j + 3])),)  # type: ignore[assignment]  # noqa: RUF005
    at = comb_ptr + rows[:, None] * (N * N) + tl.arange(0, N * N)[None, :]
    tl.store(at, _joined(columns), mask=live[:, None])


@triton.jit
def _streams_at(h_at, stride_n, inside):
    """A chunk of each of a token's streams."""
    return (
        tl.load(h_at, mask=inside, other=0.0),
        tl.load(h_at + stride_n, mask=inside, other=0.0),
        tl.load(h_at + 2 * stride_n, mask=inside, other=0.0),
        tl.load(h_at + 3 * stride_n, mask=inside, other=0.0),
    )


@triton.jit
def _y(
    h_at,
    stride_n,
    parts_at,
    done_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    y_at,
    block,
    D,
    norm_eps,
    eps,
    MADE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The folded streams of a token, normed."""
    HELD: tl.constexpr = done_ptr is None  # rows in registers, asked for at once; else less, and room for more programs
    held, weights = (), ()
    for chunk in tl.static_range(CHUNKS if HELD else 0):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        if not MADE:
            held = held + (_streams_at(h_at + cols, stride_n, cols < D),)  # type: ignore[assignment]  # noqa: RUF005
        if weight_ptr is not None:
            weights = weights + (tl.load(weight_ptr + cols, mask=cols < D, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    base, scale = _base_and_scale(base_ptr, scale_ptr, 8)
    _await(done_ptr, block, PARTS)
    for chunk in tl.static_range(CHUNKS if HELD and MADE else 0):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        held = held + (_streams_at(h_at + cols, stride_n, cols < D),)  # type: ignore[assignment]  # noqa: RUF005
    part = tl.arange(0, PADDED_PARTS)
    at = parts_at + part[:, None] * WIDTH + tl.arange(0, 8)[None, :]
    sums = tl.sum(tl.load(at, mask=(part < PARTS)[:, None], other=0.0), axis=0)  # [8]
    norm = _norm_of(_pick(sums, 0), D * N, norm_eps)
    pre = _sigmoid(sums * norm * scale + base) + eps
    p0, p1, p2, p3 = _pick(pre, 1), _pick(pre, 2), _pick(pre, 3), _pick(pre, 4)
    row = ()  # in chunks, which are rounded as they come: fewer registers than a row of FP32
    squares = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        if HELD:
            x0, x1, x2, x3 = held[chunk]  # type: ignore[var-annotated]
        else:
            x0, x1, x2, x3 = _streams_at(h_at + cols, stride_n, cols < D)
        y = ((p0 * _wide(x0) + p1 * _wide(x1)) + p2 * _wide(x2)) + p3 * _wide(x3)
        y = narrow(y, y_at.dtype.element_ty, CVT)
        squares = tl.fma(_wide(y), _wide(y), squares)
        row = row + (y,)  # type: ignore[assignment]  # noqa: RUF005
    norm = _norm_of(tl.sum(squares, axis=0), D, norm_eps) if weight_ptr is not None else 1.0
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        y = row[chunk]
        if weight_ptr is not None:
            weight = weights[chunk] if HELD else tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
            y = narrow(_wide(y) * norm * _wide(weight), y_at.dtype.element_ty, CVT)
        tl.store(y_at + cols, y, mask=cols < D)


@triton.jit(do_not_specialize=["M", "iterations"])
def _fold(
    h_ptr,
    stride_m,
    stride_n,
    parts_ptr,
    done_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    y_ptr,
    post_ptr,
    comb_ptr,
    M,
    D,
    norm_eps,
    eps,
    iterations,
    MADE: tl.constexpr,
    SINKHORN: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """MADE: the streams are the product's results, too. Programs of a block of BLOCK_M tokens lie together: those of
    Sinkhorn, then one a token.
    """
    MIXING: tl.constexpr = BLOCK_M // SINKHORN_TOKENS if SINKHORN else 0
    WIDTH: tl.constexpr = 32 if SINKHORN else 8
    block = tl.program_id(0) // (MIXING + BLOCK_M)
    within = tl.program_id(0) % (MIXING + BLOCK_M)
    if done_ptr is None:
        # the last tokens first: the product read them last, so that L2 may still hold them
        block = (M + BLOCK_M - 1) // BLOCK_M - 1 - block
    start = block.to(tl.int64) * BLOCK_M  # int64 before the multiply: a long batch passes 2**31 elements
    if SINKHORN:
        first = start + within * SINKHORN_TOKENS
        if (within < MIXING) & (first < M):
            _post_and_comb(
                parts_ptr, done_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, block, first, M, D, norm_eps, eps,
                iterations, PARTS,
            )  # fmt: skip
    token = start + within - MIXING
    if (within >= MIXING) & (token < M):
        _y(
            h_ptr + token * stride_m, stride_n, parts_ptr + token * (PARTS * WIDTH), done_ptr, base_ptr, scale_ptr,
            weight_ptr, y_ptr + token * D, block, D, norm_eps, eps, MADE, PARTS, PADDED_PARTS, WIDTH, CHUNK, CHUNKS,
        )  # fmt: skip
    if CVT and done_ptr is not None:  # noqa: SIM102  # known when compiling
        if tl.program_id(0) == tl.num_programs(0) - 1:
            tl.extra.cuda.gdc_wait()  # what follows this launch then follows the product's, too


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
    """
    tokens = h.shape[0]
    for first in range(0, tokens, TOKENS_A_PAIR):

        def cut(t: Tensor, rows: slice = slice(first, first + TOKENS_A_PAIR)) -> Tensor:
            return t if tokens <= TOKENS_A_PAIR else t[rows]

        ended = None if site is None else tuple(cut(t) for t in site)
        parts, done = launch_sums(cut(h), fn, config, ended)
        streams = cut(h) if ended is None else ended[3]
        folded = tuple(cut(t) for t in out)
        weights = (base, scale, weight)
        launch_fold(streams, parts, done, weights, (norm_eps, eps, iterations), folded, config, made=site is not None)


def strides(h: Tensor) -> tuple[int, int]:
    """Elements from token to token and from stream to stream; of a single token the same whatever the tensor says."""
    return (h.stride(0) if h.shape[0] > 1 else STREAMS * h.shape[2]), h.stride(1)


def launch_sums(
    h: Tensor, fn: Tensor, config: Config, site: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Parts FP32 [tokens, parts, width] of the product of h [tokens, 4, d] with fn, and of its sum of squares: see
    `_sums`. With config.overlap also how many parts of each block of tokens are there, int32.
    """
    tokens, _, d = h.shape
    constants = _sums_constants(fn.shape[0], d, site is not None, h.dtype, config)
    count = constants["PARTS"]
    parts = torch.empty(tokens, count, _width(fn.shape[0]), dtype=torch.float32, device=h.device)
    blocks = triton.cdiv(tokens, config.block_m)
    done = torch.zeros(blocks, dtype=torch.int32, device=h.device) if config.overlap else None
    groups = max(1, min(blocks, config.programs // count))
    y, post, comb, out = site or (None, None, None, None)
    stride_y = host.row_stride(y) if y is not None else d
    operands = (h, *strides(h), y, stride_y, post, comb, out, fn, parts, done, tokens, d, groups)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **host.OPTIONS}
    _sums[(count * groups,)](*operands, **constants, **options)
    return parts, done


def launch_fold(
    h: Tensor,
    parts: Tensor,
    done: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None],
    numbers: tuple[float, float, int],
    out: tuple[Tensor, ...],
    config: Config,
    *,
    made: bool,
) -> None:
    """y [tokens, d], and post and comb if out has room for them, of h [tokens, 4, d] and what `launch_sums` left.

    weights: base, scale and the norm's; numbers: norm_eps, eps, iterations; made: h comes from `launch_sums`, too.
    """
    tokens, _, d = h.shape
    sinkhorn = len(out) == 3
    y, post, comb = out if sinkhorn else (*out, None, None)
    constants = _fold_constants(sinkhorn, d, made, config)
    programs = config.block_m + (config.block_m // SINKHORN_TOKENS.value if sinkhorn else 0)
    operands = (h, *strides(h), parts, done, *weights, y, post, comb, tokens, d, *numbers)
    options = {"num_warps": config.fold_warps, **host.OPTIONS, **({"launch_pdl": True} if CVT else {})}
    _fold[(triton.cdiv(tokens, config.block_m) * programs,)](*operands, **constants, **options)


def build_sums(x: str, k: int, config: Config, arch: str, *, outputs: int, post: bool = False) -> Built:
    """`_sums` compiled for `arch` without a GPU."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "stride_y": "i32", "fn_ptr": "*fp32"}
    types |= {"parts_ptr": "*fp32", "M": "i32", "D": "i32", "GROUPS": "i32"}
    constants = _sums_constants(outputs, k, post, host.DTYPES[x], config)
    for wanted, more in (
        (post, {"y_ptr": f"*{x}", "post_ptr": "*fp32", "comb_ptr": "*fp32", "out_ptr": f"*{x}"}),
        (config.overlap, {"done_ptr": "*i32"}),
    ):
        types |= more if wanted else {}
        constants |= {} if wanted else dict.fromkeys(more)
    stages = config.num_stages
    return host.build(_sums, types, constants, arch, config.num_warps, unaligned=("M", "GROUPS"), num_stages=stages)


def build_fold(x: str, k: int, config: Config, arch: str, *, sinkhorn: bool, made: bool = False) -> Built:
    """`_fold` compiled for `arch` without a GPU."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "parts_ptr": "*fp32", "base_ptr": "*fp32"}
    types |= {"scale_ptr": "*fp32", "weight_ptr": f"*{x}", "y_ptr": f"*{x}", "M": "i32", "D": "i32"}
    types |= {"norm_eps": "fp32", "eps": "fp32", "iterations": "i32"}
    constants = _fold_constants(sinkhorn, k, made, config)
    for wanted, more in (
        (sinkhorn, {"post_ptr": "*fp32", "comb_ptr": "*fp32"}),
        (config.overlap, {"done_ptr": "*i32"}),
    ):
        types |= more if wanted else {}
        constants |= {} if wanted else dict.fromkeys(more)
    unaligned = ("M", "iterations")
    return host.build(_fold, types, constants, arch, config.fold_warps, unaligned=unaligned, launch_pdl=True)


def _sums_constants(outputs: int, d: int, post: bool, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    return {
        "POST": post,
        "JOINT": not post and dtype == torch.bfloat16,  # others' products would be of too many instructions
        "HEAD": outputs == STREAMS,
        "PARTS": triton.cdiv(d, config.block_d),
        "WHOLE": d % config.block_d == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
    }


def _fold_constants(sinkhorn: bool, d: int, made: bool, config: Config) -> dict[str, Any]:
    chunk = 8 * 32 * config.fold_warps  # eight columns of a stream a thread: loads of 16 bytes
    parts = triton.cdiv(d, config.block_d)
    return {
        "MADE": made,
        "SINKHORN": sinkhorn,
        "PARTS": parts,
        "PADDED_PARTS": triton.next_power_of_2(parts),
        "BLOCK_M": config.block_m,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(d, chunk),
    }


def _width(outputs: int) -> int:
    """Numbers of a token in a part."""
    return 8 if outputs == STREAMS else 32
