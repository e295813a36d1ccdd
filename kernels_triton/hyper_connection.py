"""What the hyper-connection kernels share: a product of all streams with a narrow matrix, and the fold that follows.

Two launches. `_sums` multiplies vec(h) [tokens, 4 d] by fn [outputs, 4 d] and sums squares, a [block_m, 4, d / splits]
part of h a program; with POST it first makes h, the streams that a site leaves, and writes them. `_fold` adds the parts
and folds the streams into y, one program a token; its first programs make post and comb of several tokens each, beside
the others, for Sinkhorn's 39 normalisations wait for each other. One launch cannot do both: a token's fold depends on
all parts of its product, and a program that had all of them would read the whole of fn for a few tokens.

Tensor cores and FP32: an FP32 number is three BF16 numbers, exactly (8 bits each, cut off, not rounded). BF16 streams
times each of the three are exact products; the sum of a block of columns goes to an FP32 sum outside of the tensor
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

from fp4suite.built import Built
from fp4suite.problem import ELEMENT_BYTES

from . import host
from .nvfp4 import narrow, widen
from .rounding import CVT

STREAMS = 4
N = tl.constexpr(STREAMS)
SINKHORN_TOKENS = tl.constexpr(16)  # a program's: 256 entries of comb, one a thread of eight warps
UPPER_HALF = tl.constexpr(-65536)
SHARED_BYTES = 227 * 1024
WAVE = 256  # programs that fill a GPU of 132 to 148 SMs


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens by block_d columns of each stream a step; the columns in `splits` parts, a program each.

    num_warps and num_stages are those of the product, fold_warps those of the fold. chunk: tokens of a pair of
    launches, so that the fold finds their streams in L2; 0 is all of them at once.
    """

    block_m: int = 128
    block_d: int = 32
    splits: int = 16
    num_warps: int = 8
    num_stages: int = 3
    fold_warps: int = 8
    chunk: int = 0


SPACE = {
    "block_m": (16, 64, 128),
    "block_d": (32, 64),
    "splits": (1, 2, 4, 8, 16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "fold_warps": (4, 8, 16),
    "chunk": (0, 256, 512, 1024),
}


def default(m: int, x: str, *, post: bool = False) -> Config:
    """As many parts as make a wave, and the stages that shared memory holds; post as in `refuse`."""
    few = m <= 16
    tiles = triton.cdiv(max(m, 1), 16 if few else 128)
    splits = max(1, min(64, 1 << (max(1, WAVE // tiles).bit_length() - 1)))
    stages = 3 if ELEMENT_BYTES[x] == 2 else 2
    if few and not post:
        return Config(block_m=16, block_d=64, splits=splits, num_warps=4, num_stages=stages)
    return Config(block_m=64 if few else 128, splits=splits, num_stages=stages)


def arithmetic(config: Config) -> str:
    """In which order a config sums: all but stages and chunk changes how numbers lie over parts, steps and threads."""
    return (
        f"{config.splits} parts in steps of {config.block_d} for {config.block_m} rows by {config.num_warps} warps, "
        f"folded by {config.fold_warps}"
    )


INVARIANT = arithmetic(Config())


@functools.cache
def in_arithmetic(wanted: str) -> Config | None:
    """The config that sums so, with the fewest stages; None if there is none."""
    free = SPACE | {name: SPACE[name][:1] for name in ("num_stages", "chunk")}
    configs = (Config(**dict(zip(free, values, strict=True))) for values in itertools.product(*free.values()))
    return next((c for c in configs if arithmetic(c) == wanted), None)


def refuse(n: int, k: int, x: str, config: Config, *, post: bool = False) -> str | None:
    """Why n streams of k columns of type x cannot run with this config, or None.

    post: the streams are made first, as `_sums` does with POST.
    """
    if n != STREAMS:
        return f"n={n}: the kernels are written for {STREAMS} streams"
    size = ELEMENT_BYTES[x]
    row = k / (32 * config.fold_warps) * size / 4  # registers a thread for a row of the result
    if row > 64:
        return f"rows of {k} columns spill: fold_warps={config.fold_warps}"
    tile, threads = config.block_m * config.block_d, 32 * config.num_warps
    if tile < (8 if post else 4) * threads:
        return f"a [{config.block_m}, {config.block_d}] step leaves threads of {config.num_warps} warps idle"
    if tile > (16 if post else 32) * threads:
        return f"a [{config.block_m}, {config.block_d}] step spills: num_warps={config.num_warps}"
    if post and (config.block_m < 64 or config.num_stages > 3):
        return f"block_m={config.block_m} num_stages={config.num_stages} spills where streams are made"
    step = STREAMS * (tile * size + 128 * config.block_d) + (tile * size if post else 0)
    shared = (config.num_stages - 1) * step + tile * size  # a stage is in registers; a tile changes its layout
    if shared > SHARED_BYTES:
        return f"{config.num_stages} stages take {shared} bytes of shared memory, more than {SHARED_BYTES}"
    return None


@triton.jit
def closed(y, x0, x1, x2, x3, post, c0, c1, c2, c3):
    """One stream after a site: post y + sum of c_j x_j, in FP32."""
    return post * y + (((c0 * x0 + c1 * x1) + c2 * x2) + c3 * x3)


@triton.jit
def _as_laid_out(x):
    """x itself. Triton moves the layout that a tensor core wants through arithmetic to the loads, where it takes narrow
    loads and many registers; it does not move it through what may have effects.
    """
    if CVT and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def _times_fn(x, fn, total):
    """total + x [rows, columns] @ fn [outputs, columns].T, fn in FP32."""
    if CVT and x.dtype == tl.bfloat16:
        high = (fn.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
        rest = fn - high
        middle = (rest.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
        total = tl.dot(x, tl.trans((rest - middle).to(tl.bfloat16)), total)
        total = tl.dot(x, tl.trans(middle.to(tl.bfloat16)), total)
        return tl.dot(x, tl.trans(high.to(tl.bfloat16)), total)
    else:
        return tl.dot(widen(x), tl.trans(fn), total, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
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
    POST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < M
    outputs = tl.arange(0, PADDED)
    blocks = (D + BLOCK_D - 1) // BLOCK_D
    total = tl.zeros([BLOCK_M, PADDED], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for block in range(tl.program_id(1) * blocks // SPLITS, (tl.program_id(1) + 1) * blocks // SPLITS):
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (cols < D)[None, :]
        h_at = h_ptr + rows[:, None] * stride_m + cols[None, :]
        fn_at = fn_ptr + outputs[:, None] * (N * D) + cols[None, :]
        fn_inside = (outputs < OUTPUTS)[:, None] & (cols < D)[None, :]
        if POST:
            y = widen(tl.load(y_ptr + rows[:, None] * stride_y + cols[None, :], mask=inside, other=0.0))
            x0 = widen(tl.load(h_at, mask=inside, other=0.0))
            x1 = widen(tl.load(h_at + stride_n, mask=inside, other=0.0))
            x2 = widen(tl.load(h_at + 2 * stride_n, mask=inside, other=0.0))
            x3 = widen(tl.load(h_at + 3 * stride_n, mask=inside, other=0.0))
        part = tl.zeros([BLOCK_M, PADDED], tl.float32)
        squared = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for k in tl.static_range(N):
            if POST:
                c = comb_ptr + rows * (N * N) + k
                post = tl.load(post_ptr + rows * N + k, mask=live, other=0.0)[:, None]
                c0 = tl.load(c, mask=live, other=0.0)[:, None]
                c1 = tl.load(c + N, mask=live, other=0.0)[:, None]
                c2 = tl.load(c + 2 * N, mask=live, other=0.0)[:, None]
                c3 = tl.load(c + 3 * N, mask=live, other=0.0)[:, None]
                x = narrow(closed(y, x0, x1, x2, x3, post, c0, c1, c2, c3), h_ptr.dtype.element_ty, CVT)
                tl.store(out_ptr + (rows[:, None] * N + k) * D + cols[None, :], x, mask=inside)
                x = _as_laid_out(x)
            else:
                x = tl.load(h_at + k * stride_n, mask=inside, other=0.0)
            fn = widen(tl.load(fn_at + k * D, mask=fn_inside, other=0.0))
            part = _times_fn(x, fn, part)
            squared = tl.fma(widen(x), widen(x), squared)
        total += part
        squares += tl.sum(squared, axis=1)

    parts = parts_ptr + (tl.program_id(1) * M + rows) * WIDTH
    stored = live[:, None] & (outputs < OUTPUTS)[None, :]
    tl.store(parts[:, None] + outputs[None, :], total, mask=stored)
    tl.store(parts + OUTPUTS, squares, mask=live)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _norm_of(squares, COUNT, eps):
    """1 / sqrt(mean + eps)."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, COUNT.to(tl.float32)) + eps))


@triton.jit
def _added(
    parts_ptr, rows, live, M, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """Columns FIRST to FIRST + COUNT of all parts, added: [rows, COUNT]."""
    at = (tl.arange(0, SPLITS)[:, None] * M + rows[None, :]) * WIDTH + FIRST  # [splits, rows]
    columns = tl.arange(0, COUNT)
    return tl.sum(
        tl.load(parts_ptr + at[:, :, None] + columns[None, None, :], mask=live[None, :, None], other=0.0), axis=0
    )


@triton.jit
def _post_and_comb(
    parts_ptr,
    base_ptr,
    scale_ptr,
    post_ptr,
    comb_ptr,
    first,
    M,
    D,
    norm_eps,
    eps,
    iterations,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """post and comb of SINKHORN_TOKENS tokens from `first` on."""
    TOKENS: tl.constexpr = SINKHORN_TOKENS
    OUTPUTS: tl.constexpr = N * (N + 2)
    rows = first + tl.arange(0, TOKENS)
    live = rows < M
    norm = _norm_of(_added(parts_ptr, rows, live, M, OUTPUTS, 1, WIDTH, SPLITS), D * N, norm_eps)  # [tokens, 1]
    streams = tl.arange(0, N)
    m = _added(parts_ptr, rows, live, M, N, N, WIDTH, SPLITS) * norm
    post = 2.0 * _sigmoid(m * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + streams)[None, :])
    tl.store(post_ptr + rows[:, None] * N + streams[None, :], post, mask=live[:, None])

    entries = tl.arange(0, N * N)
    m = _added(parts_ptr, rows, live, M, 2 * N, N * N, WIDTH, SPLITS) * norm
    m = m * tl.load(scale_ptr + 2) + tl.load(base_ptr + 2 * N + entries)[None, :]
    comb = m.reshape(TOKENS, N, N)
    comb = tl.exp(comb - tl.max(comb, axis=2)[:, :, None])
    comb = comb / tl.sum(comb, axis=2)[:, :, None] + eps
    comb = comb / (tl.sum(comb, axis=1)[:, None, :] + eps)
    for _ in range(iterations - 1):
        comb = comb / (tl.sum(comb, axis=2)[:, :, None] + eps)
        comb = comb / (tl.sum(comb, axis=1)[:, None, :] + eps)
    at = comb_ptr + rows[:, None] * (N * N) + entries[None, :]
    tl.store(at, comb.reshape(TOKENS, N * N), mask=live[:, None])


@triton.jit
def _pre(parts, norm, base_ptr, scale, eps, STREAM: tl.constexpr):
    """A stream's share of y; parts point to a token's row of each part."""
    m = tl.sum(tl.load(parts + STREAM), axis=0) * norm
    return _sigmoid(m * scale + tl.load(base_ptr + STREAM)) + eps


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
    M,
    D,
    norm_eps,
    eps,
    iterations,
    SINKHORN: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if SINKHORN:
        first = token * SINKHORN_TOKENS
        token -= (M + SINKHORN_TOKENS - 1) // SINKHORN_TOKENS
        if token < 0:
            _post_and_comb(
                parts_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, first, M, D, norm_eps, eps, iterations, WIDTH,
                SPLITS,
            )  # fmt: skip
    if token >= 0:
        # the last tokens first: the product read them last, so that L2 may still hold them
        token = M - 1 - token
        h_at = h_ptr + token * stride_m
        parts = parts_ptr + (tl.arange(0, SPLITS) * M + token) * WIDTH
        norm = _norm_of(tl.sum(tl.load(parts + (N * (N + 2) if SINKHORN else N)), axis=0), D * N, norm_eps)
        scale = tl.load(scale_ptr)
        p0 = _pre(parts, norm, base_ptr, scale, eps, 0)
        p1 = _pre(parts, norm, base_ptr, scale, eps, 1)
        p2 = _pre(parts, norm, base_ptr, scale, eps, 2)
        p3 = _pre(parts, norm, base_ptr, scale, eps, 3)
        row = ()  # in chunks, which are rounded as they come: fewer registers than a row of FP32
        squares = tl.zeros([CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = cols < D
            x0 = widen(tl.load(h_at + cols, mask=inside, other=0.0))
            x1 = widen(tl.load(h_at + stride_n + cols, mask=inside, other=0.0))
            x2 = widen(tl.load(h_at + 2 * stride_n + cols, mask=inside, other=0.0))
            x3 = widen(tl.load(h_at + 3 * stride_n + cols, mask=inside, other=0.0))
            y = narrow(((p0 * x0 + p1 * x1) + p2 * x2) + p3 * x3, y_ptr.dtype.element_ty, CVT)
            squares = tl.fma(widen(y), widen(y), squares)
            row = row + (y,)  # type: ignore[assignment]  # noqa: RUF005
        norm = _norm_of(tl.sum(squares, axis=0), D, norm_eps) if weight_ptr is not None else 1.0
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * CHUNK + tl.arange(0, CHUNK)
            y = row[chunk]
            if weight_ptr is not None:
                weight = widen(tl.load(weight_ptr + cols, mask=cols < D, other=0.0))
                y = narrow(widen(y) * norm * weight, y_ptr.dtype.element_ty, CVT)
            tl.store(y_ptr + token * D + cols, y, mask=cols < D)


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
    step = config.chunk or max(1, tokens)
    for first in range(0, tokens, step):

        def cut(t: Tensor, rows: slice = slice(first, first + step)) -> Tensor:
            return t if step >= tokens else t[rows]

        ended = None if site is None else tuple(cut(t) for t in site)
        parts = launch_sums(cut(h), fn, config, ended)
        streams = cut(h) if ended is None else ended[3]
        results = tuple(cut(t) for t in out)
        launch_fold(streams, parts, base, scale, weight, norm_eps, eps, iterations, results, config)


def strides(h: Tensor) -> tuple[int, int]:
    """Elements from token to token and from stream to stream; of a single token the same whatever the tensor says."""
    return (h.stride(0) if h.shape[0] > 1 else STREAMS * h.shape[2]), h.stride(1)


def launch_sums(h: Tensor, fn: Tensor, config: Config, site: tuple[Tensor, ...] | None = None) -> Tensor:
    """Parts FP32 [splits, tokens, width] of the product of h [tokens, 4, d] with fn, and of its sum of squares."""
    tokens, _, d = h.shape
    outputs = fn.shape[0]
    parts = torch.empty(config.splits, tokens, _width(outputs), dtype=torch.float32, device=h.device)
    y, post, comb, out = site or (None, None, None, None)
    stride_y = host.row_stride(y) if y is not None else d
    operands = (h, *strides(h), y, stride_y, post, comb, out, fn, parts, tokens, d)
    grid = (triton.cdiv(tokens, config.block_m), config.splits)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **host.OPTIONS}
    _sums[grid](*operands, **_sums_constants(outputs, site is not None, config), **options)
    return parts


def launch_fold(
    h: Tensor,
    parts: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
    out: tuple[Tensor, ...],
    config: Config,
) -> None:
    """y [tokens, d], and post and comb if out has room for them, of h [tokens, 4, d] and the parts of its product."""
    tokens, _, d = h.shape
    sinkhorn = len(out) == 3
    y, post, comb = out if sinkhorn else (*out, None, None)
    programs = tokens + (triton.cdiv(tokens, SINKHORN_TOKENS.value) if sinkhorn else 0)
    operands = (h, *strides(h), parts, base, scale, weight, y, post, comb)
    numbers = (tokens, d, norm_eps, eps, iterations)
    constants = _fold_constants(sinkhorn, d, config)
    _fold[(programs,)](*operands, *numbers, **constants, num_warps=config.fold_warps, **host.OPTIONS)


def build_sums(x: str, config: Config, arch: str, *, outputs: int, post: bool = False) -> Built:
    """`_sums` compiled for `arch` without a GPU."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "stride_y": "i32", "fn_ptr": "*fp32"}
    types |= {"parts_ptr": "*fp32", "M": "i32", "D": "i32"}
    site = {"y_ptr": f"*{x}", "post_ptr": "*fp32", "comb_ptr": "*fp32", "out_ptr": f"*{x}"}
    types |= site if post else {}
    constants = _sums_constants(outputs, post, config) | ({} if post else dict.fromkeys(site))
    return host.build(_sums, types, constants, arch, config.num_warps, unaligned=("M",), num_stages=config.num_stages)


def build_fold(x: str, k: int, config: Config, arch: str, *, sinkhorn: bool) -> Built:
    """`_fold` compiled for `arch` without a GPU."""
    types = {"h_ptr": f"*{x}", "stride_m": "i32", "stride_n": "i32", "parts_ptr": "*fp32", "base_ptr": "*fp32"}
    types |= {"scale_ptr": "*fp32", "weight_ptr": f"*{x}", "y_ptr": f"*{x}", "M": "i32", "D": "i32"}
    types |= {"norm_eps": "fp32", "eps": "fp32", "iterations": "i32"}
    coefficients = {"post_ptr": "*fp32", "comb_ptr": "*fp32"}
    types |= coefficients if sinkhorn else {}
    constants = _fold_constants(sinkhorn, k, config) | ({} if sinkhorn else dict.fromkeys(coefficients))
    return host.build(_fold, types, constants, arch, config.fold_warps, unaligned=("M", "iterations"))


def _sums_constants(outputs: int, post: bool, config: Config) -> dict[str, Any]:
    return {
        "POST": post,
        "OUTPUTS": outputs,
        "PADDED": max(16, triton.next_power_of_2(outputs)),  # what tl.dot takes at least
        "WIDTH": _width(outputs),
        "SPLITS": config.splits,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
    }


def _fold_constants(sinkhorn: bool, d: int, config: Config) -> dict[str, Any]:
    chunk = 8 * 32 * config.fold_warps  # eight columns of a stream a thread: loads of 16 bytes
    return {
        "SINKHORN": sinkhorn,
        "WIDTH": _width(STREAMS * (STREAMS + 2) if sinkhorn else STREAMS),
        "SPLITS": config.splits,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(d, chunk),
    }


def _width(outputs: int) -> int:
    """Numbers of a token in a part: its products, the sum of squares, and what fills up sectors of 32 bytes."""
    return triton.cdiv(outputs + 1, 8) * 8
