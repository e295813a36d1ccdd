"""Device functions of the kernels that norm whole rows with a weight, and what they ask of a config.

    at, weight_at = pointers(...)
    x, w, own = load_rows(...)           # whatever needs no sum is on its way before it
    factor = factors(x, ...)             # 1 / sqrt(mean(x^2) + eps), in the order of `reference.quant`
    lo, hi = normed_tile(i, x, w, own, factor, ...)

A program takes ROWS rows and TILES tiles of TILE_K of their columns; it sums its rows as a whole, SUM_K columns at a
time. A thread has 16 columns of a tile, as two halves [ROWS, TILE_K / 16, 8]. HELD rows stay in registers from the sum
on; others are read again, from L1 or L2. Compile with enable_fp_fusion=False: each operation is rounded on its own.

Programs that take rows in turn hold them as words of two BF16 numbers, the present ones and the next:

    words = load_words(x_ptr, stride_m, rows, ...)
    factor = word_factors(words, ...)
    lo, hi = widened_late(words[2 * i], ...), widened_late(words[2 * i + 1], ...)     # of tile i
"""

from typing import Any

import triton
import triton.language as tl

from fp4suite.reference.quant import SUM_CHUNK as _SUM_CHUNK

from .nvfp4 import CVT, SUM_CHUNK, load_half, one_over, pair_sum

MOST_HELD = 128  # elements of a row in a thread


def refuse(k: int, tile_k: int, parts: int, held: bool) -> str | None:
    """Why rows of k columns cannot be cut so, or None if they can."""
    tiles = triton.cdiv(k, tile_k)
    if (parts - 1) * triton.cdiv(tiles, parts) >= tiles:  # the last would have none
        return f"k={k} has {tiles} tiles of {tile_k} columns, too few for {parts} parts"
    if held and (parts > 1 or tile_k > _SUM_CHUNK):
        return f"held rows have one part and tiles of up to {_SUM_CHUNK} columns, got {parts} of {tile_k}"
    if held and tiles * 16 > MOST_HELD:
        return f"k={k} tile_k={tile_k}: {tiles * 16} elements a thread, held up to {MOST_HELD}"
    return None


def constants(k: int, tile_k: int, parts: int, held: bool) -> dict[str, Any]:
    """The constexpr arguments that say how rows are cut."""
    return {
        "K": k,
        "SUM_K": min(tile_k, _SUM_CHUNK),
        "TILE_K": tile_k,
        "TILES": triton.cdiv(triton.cdiv(k, tile_k), parts),
        "HELD": held,
    }


@triton.jit
def pointers(x_ptr, stride_m, weight_ptr, rows, M, ROWS: tl.constexpr):
    """Where rows (int64 [ROWS]) of x begin, and for each the weight: [ROWS, 1, 1]."""
    at = x_ptr + (tl.minimum(rows, M - 1) * stride_m)[:, None, None]  # of what lies beyond, nothing is kept
    return at, weight_ptr + tl.zeros([ROWS, 1, 1], tl.int32)


@triton.jit
def load_rows(
    at, weight_at, start, M, K: tl.constexpr, ROWS: tl.constexpr, SUM_K: tl.constexpr, TILE_K: tl.constexpr,
    TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """All of the rows, in halves of tiles of SUM_K columns; weight and rows of the tile `start` where it is the only
    one, else () each."""
    FEW: tl.constexpr = TILES == 1 and CVT and at.dtype.element_ty == tl.bfloat16
    x = nothing()
    for i in tl.static_range((K + SUM_K - 1) // SUM_K):
        x += load_tile(at, i, M, K, ROWS, SUM_K, SUM_K, FEW)
    w = nothing()
    own = nothing()
    if TILES == 1:
        w = load_tile(weight_at, start, M, K, ROWS, TILE_K, TILE_K, FEW)
        if not HELD:
            own = load_tile(at, start, M, K, ROWS, TILE_K, TILE_K, FEW)
    return x, w, own


@triton.jit
def factors(x, at, eps, M, K: tl.constexpr, ROWS: tl.constexpr, SUM_K: tl.constexpr, TILES: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row: FP32 [ROWS, 1, 1]."""
    FEW: tl.constexpr = TILES == 1 and CVT and at.dtype.element_ty == tl.bfloat16  # rows, and so registers
    if FEW:
        # a pass that compilers take for a loop: ptxas would else ask for weights after the sum, and wait twice
        total = tl.zeros([ROWS], tl.float32)
        for zero in range(tl.minimum(M, 1)):
            late = nothing()
            for i in tl.static_range(len(x)):
                late += (_widen_late(_upper(x[i]), M + zero),)
            total += _row_sum(late, ROWS, SUM_K)
    else:
        total = _row_sum(x, ROWS, SUM_K)
    mean = tl.div_rn(total, tl.full([ROWS], K, tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None, None]


@triton.jit
def normed_tile(
    i: tl.constexpr, x, w, own, factor, at, weight_at, start, M, K: tl.constexpr, ROWS: tl.constexpr,
    TILE_K: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Tile `start` + i of the rows, normed: FP32 halves of its blocks, two of [ROWS, TILE_K / 16, 8]."""
    BF16: tl.constexpr = CVT and at.dtype.element_ty == tl.bfloat16
    if TILES > 1:
        w = load_tile(weight_at, start + i, M, K, ROWS, TILE_K, TILE_K * TILES, False)
        if not HELD:
            own = load_tile(at, start + i, M, K, ROWS, TILE_K, TILE_K * TILES, False)
    if HELD:
        own = (x[2 * i], x[2 * i + 1])
        if BF16:
            own = (_widen_late(_upper(x[2 * i]), M), _widen_late(_upper(x[2 * i + 1]), M))
    return own[0] * factor * w[0], own[1] * factor * w[1]


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
def load_words(x_ptr, stride_m, rows, M, K: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr):
    """Rows (int64 [ROWS]) of BF16, as halves of tiles of TILE_K columns in turn, int32 [ROWS, TILE_K / 16, 4], zeros
    beyond M and K. What a loop takes to its next pass: there each BF16 would have a register of its own.
    """
    at = x_ptr + (rows * stride_m)[:, None, None]
    live = (rows < M)[:, None, None]
    words = nothing()
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        blocks = i * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
        inside = live & (blocks < K // 16)[None, :, None]  # no load that a condition guards is moved to its first use
        words += (_in_words(load_half(at, blocks, inside, 0, ROWS, TILE_K // 16)),)
        words += (_in_words(load_half(at, blocks, inside, 1, ROWS, TILE_K // 16)),)
    return words


@triton.jit
def _in_words(x):
    """Widened BF16 [ROWS, BLOCKS, 8] -> int32 [ROWS, BLOCKS, 4], even columns in lower halves: takes no instruction."""
    even, odd = tl.split(x.to(tl.uint32, bitcast=True).reshape(x.shape[0], x.shape[1], 4, 2))
    return ((even >> 16) | odd).to(tl.int32, bitcast=True)


@triton.jit
def widened(words):
    """Words of two BF16 numbers, even columns in lower halves: FP32 [ROWS, BLOCKS, 8]."""
    x = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
    return x.reshape(words.shape[0], words.shape[1], 8)


@triton.jit
def widened_late(words, M):
    """As `widened`, by PRMT, see `_widen_late`."""
    if CVT:
        even, odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, $3; prmt.b32 $1, $2, 0, $4;",
            "=r,=r,r,r,r",
            [words, 0x1044 + (M >> 31), 0x3244 + (M >> 31)],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        x = tl.join(even, odd).to(tl.float32, bitcast=True)
        return x.reshape(words.shape[0], words.shape[1], 8)
    else:
        return widened(words)


@triton.jit
def word_factors(words, eps, K: tl.constexpr, ROWS: tl.constexpr, SUM_K: tl.constexpr):
    """`factors` of rows that `load_words` gave."""
    x = nothing()
    for i in tl.static_range(len(words)):
        x += (widened(words[i]),)
    total = _row_sum(x, ROWS, SUM_K)
    if K & (K - 1) == 0:
        mean = total * (1.0 / K)  # the quotient, rounded once as it is
    else:
        mean = tl.div_rn(total, tl.full([ROWS], K, tl.float32))
    return one_over(tl.sqrt_rn(mean + eps))[:, None, None]


@triton.jit
def nothing():
    return ()


@triton.jit
def load_tile(
    at, tile, M, K: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, PART: tl.constexpr, FEW: tl.constexpr
):
    """The two halves of the blocks in columns from tile * TILE_K on, zeros beyond K; a part of K is PART columns."""
    blocks = tile * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
    inside = None
    if FEW:
        inside = (blocks < K // 16)[None, :, None] & (M > 0)  # which always is, but keeps ptxas from moving the load
    elif K % PART != 0:
        inside = (blocks < K // 16)[None, :, None]
    lo = load_half(at, blocks, inside, 0, ROWS, TILE_K // 16)
    hi = load_half(at, blocks, inside, 1, ROWS, TILE_K // 16)
    return lo, hi


@triton.jit
def _row_sum(x, ROWS: tl.constexpr, SUM_K: tl.constexpr):
    """Sum of the squares of each row, whose tiles of SUM_K columns are given as the first and second halves of their
    blocks in turn, in the order of `reference.quant`: [ROWS]."""
    first = nothing()
    second = nothing()
    for i in tl.static_range(len(x) // 2):
        first += (x[2 * i] * x[2 * i],)
        second += (x[2 * i + 1] * x[2 * i + 1],)
    Q: tl.constexpr = SUM_CHUNK // SUM_K  # tiles under one tree of pairs
    for level in tl.static_range(8, -1, -1):
        if Q << level < len(first):
            first = _fold(first, Q << level)
            second = _fold(second, Q << level)
    sums = nothing()
    for i in tl.static_range(len(first)):
        blocks = pair_sum(first[i], ROWS, SUM_K // 16, 8) + pair_sum(second[i], ROWS, SUM_K // 16, 8)
        sums += (pair_sum(blocks.reshape(ROWS, 1, SUM_K // 16), ROWS, 1, SUM_K // 16).reshape(ROWS),)
    return _fold(sums, 1)[0]


@triton.jit
def _fold(parts, HALF: tl.constexpr):
    """The second half added to the first, which has HALF parts; what it lacks is zero."""
    folded = nothing()
    for i in tl.static_range(HALF):
        if i + HALF < len(parts):
            folded += (parts[i] + parts[i + HALF],)
        else:
            folded += (parts[i],)
    return folded
