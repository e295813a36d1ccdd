"""RMSNorm with a weight, then NVFP4, without the normed row in memory.

Memory bound: reads 2 bytes (BF16) and writes 9/16 an element. One program block_m rows, or a part of each of few rows;
rows stay in registers between the sum of squares and the quantiser, or are read again from L1 or L2.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RmsnormQuantizeProblem, Rule
from fp4suite.reference.quant import SUM_CHUNK as _SUM_CHUNK

from . import amax, host
from .nvfp4 import CVT, SUM_CHUNK, load_half, magnitude_bits, pair_sum, store_quantized

MOST_HELD = 128  # elements of a row in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by one of `parts` of their columns a program; every part sums its rows as a whole.

    Quantised are 16 columns a thread at a time: a tile is 512 num_warps / block_m columns wide. `held` rows stay in
    registers from the sum to the quantiser; others are read again, from L1 or L2.
    """

    block_m: int = 1
    num_warps: int = 2
    parts: int = 1
    held: bool = False

    @property
    def tile_k(self) -> int:
        """Columns that are quantised at a time."""
        return 512 * self.num_warps // self.block_m


SPACE = {"block_m": (1, 2, 4), "num_warps": (1, 2, 4, 8), "parts": (1, 2, 4, 8), "held": (False, True)}


def supports(problem: RmsnormQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    tiles = triton.cdiv(problem.k, config.tile_k)
    if config.num_warps < config.block_m:
        return f"block_m={config.block_m} num_warps={config.num_warps}: a row takes a warp or more"
    if config.parts > tiles:
        return f"k={problem.k} has {tiles} tiles of {config.tile_k} columns, too few for {config.parts} parts"
    if config.held and (config.parts > 1 or config.tile_k > _SUM_CHUNK):
        return f"held rows have one part and tiles of up to {_SUM_CHUNK} columns, got {config.parts} of {config.tile_k}"
    if config.held and tiles * 16 > MOST_HELD:
        return f"k={problem.k} tile_k={config.tile_k}: {tiles * 16} elements a thread, held up to {MOST_HELD}"
    if problem.rule == "mse" and triton.cdiv(tiles, config.parts) > 2:
        return f"rule mse takes ten times the code: up to two tiles a program, got {triton.cdiv(tiles, config.parts)}"
    return None


def default(problem: RmsnormQuantizeProblem) -> Config:
    """Few rows: each by several programs, 16 columns a thread. Many: a warp holds a row, or two do. Four rows a program
    start and wait together: 11.8 us where single ones took 10.2 (H100, 4096 x 1536)."""
    if problem.m <= 128 or problem.rule == "mse":
        num_warps = 4 if problem.k > 2048 else 2
        return Config(num_warps=num_warps, parts=triton.cdiv(problem.k, 512 * num_warps))
    wanted = (Config(num_warps=warps, held=True) for warps in (1, 2))
    return next((c for c in wanted if supports(problem, c) is None), Config(num_warps=4))


@triton.jit(do_not_specialize=["M"])
def _rmsnorm_quantize(
    x_ptr, stride_m, weight_ptr, alpha_ptr, data_ptr, sf_ptr, amax_ptr, M, eps, K: tl.constexpr, RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr, SUM_K: tl.constexpr, TILE_K: tl.constexpr,
    TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = x_ptr + (tl.minimum(rows, M - 1) * stride_m)[:, None, None]  # of what lies beyond, nothing is kept
    weight_at = weight_ptr + tl.zeros([BLOCK_M, 1, 1], tl.int32)
    BF16: tl.constexpr = CVT and x_ptr.dtype.element_ty == tl.bfloat16
    FEW: tl.constexpr = TILES == 1 and BF16  # rows, and so registers
    start = tl.program_id(1) * TILES
    x = _nothing()
    for i in tl.static_range((K + SUM_K - 1) // SUM_K):
        x += _load_tile(at, i, M, K, BLOCK_M, SUM_K, FEW)
    w = _nothing()
    own = _nothing()
    if TILES == 1:  # whatever needs no sum is on its way before it
        w = _load_tile(weight_at, start, M, K, BLOCK_M, TILE_K, FEW)
        if not HELD:
            own = _load_tile(at, start, M, K, BLOCK_M, TILE_K, FEW)
    if RULE != "amax":
        alpha = tl.load(alpha_ptr)
    if FEW:
        # a pass that compilers take for a loop: ptxas would else ask for weights after the sum, and wait twice
        total = tl.zeros([BLOCK_M], tl.float32)
        for zero in range(tl.minimum(M, 1)):
            late = _nothing()
            for i in tl.static_range(len(x)):
                late += (_widen_late(_upper(x[i]), M + zero),)
            total += _row_sum(late, BLOCK_M, SUM_K)
    else:
        total = _row_sum(x, BLOCK_M, SUM_K)
    if RULE == "amax":
        most = tl.zeros([BLOCK_M, TILE_K // 16, 8], tl.int32)
    mean = tl.div_rn(total, tl.full([BLOCK_M], K, tl.float32))
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None, None]
    for i in tl.static_range(TILES):
        if TILES > 1:
            w = _load_tile(weight_at, start + i, M, K, BLOCK_M, TILE_K, FEW)
            if not HELD:
                own = _load_tile(at, start + i, M, K, BLOCK_M, TILE_K, FEW)
        if HELD:
            own = (x[2 * i], x[2 * i + 1])
            if BF16:
                own = (_widen_late(_upper(x[2 * i]), M), _widen_late(_upper(x[2 * i + 1]), M))
        lo = own[0] * factor * w[0]
        hi = own[1] * factor * w[1]
        blocks = (start + i) * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
        if RULE == "amax":
            # eps = 0 makes rows of zeros NaN, the padding too
            larger = tl.maximum(magnitude_bits(lo), magnitude_bits(hi))
            most = tl.maximum(most, tl.where((blocks < K // 16)[None, :, None], larger, 0))
        else:
            store_quantized(
                lo, hi, rows, blocks, alpha, data_ptr, sf_ptr, M, K, RULE, SF_BLOCKED, E2M1_CVT, BLOCK_M, TILE_K // 16
            )
    if RULE == "amax":
        tl.store(amax_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(most))


@triton.jit
def _upper(x):
    """Upper halves of FP32 numbers: of widened BF16 what was loaded, so that it takes no instruction."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _widen_late(x, M):
    """BF16's bits (int16) -> FP32, by a PRMT whose selector no compiler knows (M is not negative): else this would be
    the widening before the sum, kept from there in twice the registers."""
    low = 0x1044 + (M >> 31)
    high = 0x3244 + (M >> 31)
    bits = tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, $3; prmt.b32 $1, $2, 0, $5;",
        "=r,=r,r,r,r,r,r",
        [x, low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=2,
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nothing():
    return ()


@triton.jit
def _load_tile(at, tile, M, K: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, FEW: tl.constexpr):
    """The two halves of the blocks in columns from tile * TILE_K on."""
    blocks = tile * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
    inside = None
    if FEW:
        inside = (blocks < K // 16)[None, :, None] & (M > 0)  # which always is, but keeps ptxas from moving the load
    elif K % TILE_K != 0:
        inside = (blocks < K // 16)[None, :, None]
    lo = load_half(at, blocks, inside, 0, ROWS, TILE_K // 16)
    hi = load_half(at, blocks, inside, 1, ROWS, TILE_K // 16)
    return lo, hi


@triton.jit
def _row_sum(x, ROWS: tl.constexpr, SUM_K: tl.constexpr):
    """Sum of the squares of each row, whose tiles of SUM_K columns are given as the first and second halves of their
    blocks in turn, in the order of `reference.quant`: [ROWS]."""
    first = _nothing()
    second = _nothing()
    for i in tl.static_range(len(x) // 2):
        first += (x[2 * i] * x[2 * i],)
        second += (x[2 * i + 1] * x[2 * i + 1],)
    Q: tl.constexpr = SUM_CHUNK // SUM_K  # tiles under one tree of pairs
    for level in tl.static_range(8, -1, -1):
        if Q << level < len(first):
            first = _fold(first, Q << level)
            second = _fold(second, Q << level)
    sums = _nothing()
    for i in tl.static_range(len(first)):
        blocks = pair_sum(first[i], ROWS, SUM_K // 16, 8) + pair_sum(second[i], ROWS, SUM_K // 16, 8)
        sums += (pair_sum(blocks.reshape(ROWS, 1, SUM_K // 16), ROWS, 1, SUM_K // 16).reshape(ROWS),)
    return _fold(sums, 1)[0]


@triton.jit
def _fold(parts, HALF: tl.constexpr):
    """The second half added to the first, which has HALF parts; what it lacks is zero."""
    folded = _nothing()
    for i in tl.static_range(HALF):
        if i + HALF < len(parts):
            folded += (parts[i] + parts[i + HALF],)
        else:
            folded += (parts[i],)
    return folded


def launch(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, k], rows of any stride, with weight [k], under alpha float32 [] -> out's codes and scales."""
    m, k = x.shape
    if m == 0:
        return
    (programs, _) = host.grid(m, k, config.block_m, k, out.sf_layout)
    constants = _constants(k, rule, out.sf_layout, host.has_e2m1_cvt(x.device), config)
    operands = (x, host.row_stride(x), weight, alpha, out.data, out.sf.view(torch.uint8), None, m, eps)
    _rmsnorm_quantize[(programs, config.parts)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of the normed rows of x [m, k], in two launches, nothing read on the host."""
    m, k = x.shape
    if m == 0:
        alpha.zero_()
        return
    (programs, _) = host.grid(m, k, config.block_m, k, "linear")
    bits = amax.tile_maxima(programs * config.parts, x.device)
    constants = _constants(k, "amax", "linear", False, config)
    operands = (x, host.row_stride(x), weight, None, None, None, bits, m, eps)
    _rmsnorm_quantize[(programs, config.parts)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: RmsnormQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(x, x[0], 1.0, alpha, config)
    launch(x, x[0], 1.0, alpha, NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout), problem.rule, config)


def build_key(problem: RmsnormQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return problem.x, problem.rule, problem.sf_layout, problem.k


def build(problem: RmsnormQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "weight_ptr": f"*{problem.x}", "alpha_ptr": "*fp32"}
    types |= {"data_ptr": "*u8", "sf_ptr": "*u8", "M": "i32", "eps": "fp32"}
    constants = _constants(problem.k, problem.rule, problem.sf_layout, arch == "sm_100a", config)
    constants["amax_ptr"] = None
    return host.build(_rmsnorm_quantize, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(k: int, rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    return {
        "K": k,
        "RULE": rule,
        "SF_BLOCKED": sf_layout == "blocked_128x4",
        "E2M1_CVT": e2m1_cvt,
        "BLOCK_M": config.block_m,
        "SUM_K": min(config.tile_k, _SUM_CHUNK),
        "TILE_K": config.tile_k,
        "TILES": triton.cdiv(triton.cdiv(k, config.tile_k), config.parts),
        "HELD": config.held,
    }
