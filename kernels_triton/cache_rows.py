"""Storing rows in paged caches: FP32 numbers in registers to the bytes of `fp4suite.reference.cache`, any format.

    cache_rows.store(y, slots, cache_ptr, **cache_rows.constants(cache), E2M1_CVT=..., ROWS=..., PADDED=...)

y      FP32 [ROWS, PADDED] after norm and RoPE, PADDED a power of two >= head_dim; columns from head_dim on are ignored
slots  int [ROWS], row s % page_size of page s // page_size; a negative one stores nothing
cache  uint8 pages from cache_ptr on, one behind the other

`constants` gives the constexpr arguments that a PagedCache or IndexCache stands for, `refuse` what cannot be stored.
The formats' layouts are those of `formats.kv_layout` and `index_layout`, roundings those of `rounding` and `nvfp4`.
Each row must have a slot of its own. Infinities and NaN: as `reference.cache` says.
"""

from typing import Any

import triton
import triton.language as tl

from fp4suite.formats import BLOCK as _BLOCK, MX_BLOCK as _MX_BLOCK, IndexCache, PagedCache
from fp4suite.reference import cache as reference

from .normed_rows import widened
from .nvfp4 import AMAX_TO_ALPHA, BLOCK, absmax_scale, block_amax, magnitude_bits, pack_e2m1, quantize_blocks
from .rounding import CVT, bf16_bits, e4m3_bits, e8m0_of_6, e8m0_of_448, e8m0_reciprocal, largest, rounded

MX_BLOCK = tl.constexpr(_MX_BLOCK)
FP8_GROUP = tl.constexpr(reference.FP8_GROUP)
FP8_FLOOR = tl.constexpr(reference.FP8_FLOOR)
MX_FLOOR = tl.constexpr(reference.MX_FLOOR)


def constants(cache: PagedCache | IndexCache) -> dict[str, Any]:
    """The constexpr arguments of `store` that say where the parts of a row lie."""
    layout = cache.layout
    if cache.data.data_ptr() % 4:
        raise ValueError("a cache that is written in words of four bytes must begin at a multiple of four")
    return {
        "FORMAT": cache.format if isinstance(cache, PagedCache) else f"index_{cache.format}",
        "HEAD_DIM": cache.head_dim,
        "ROPE_DIM": cache.rope_dim if isinstance(cache, PagedCache) else 0,
        "PAGE_SIZE": cache.page_size,
        "ROW_BYTES": layout.row_bytes,
        "SCALE_BYTES": layout.scale_bytes,
        "PAGE_BYTES": layout.page_bytes,
    }


def refuse(format: str, head_dim: int, rope_dim: int) -> str | None:
    """Why rows of a format cannot be stored, or None. BF16 dims have to lie at even addresses."""
    if format == "nvfp4" and (head_dim - rope_dim) % (2 * _BLOCK):
        return f"nvfp4 rows are stored with a multiple of {2 * _BLOCK} dims beside RoPE, got {head_dim - rope_dim}"
    return None


def refuse_blocks(format: str, head_dim: int, rope_dim: int) -> str | None:
    """Why `store_nvfp4_blocks` cannot store rows of a format, or None."""
    if format != "nvfp4":
        return f"by blocks rows are stored in nvfp4, got {format}"
    if (head_dim - rope_dim) % 64 or rope_dim % _BLOCK:  # then all parts begin at multiples of four bytes
        return f"by blocks rows have 64 n dims without and 16 n with RoPE, got {head_dim - rope_dim} and {rope_dim}"
    return None


@triton.jit
def store(
    y, slots, cache_ptr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store row i of y at slots[i], see the module."""
    NOPE: tl.constexpr = HEAD_DIM - ROPE_DIM
    stored = slots >= 0
    slots = tl.where(stored, slots, 0).to(tl.int64)  # before the multiply: a cache passes 2**31 bytes
    page, row = slots // PAGE_SIZE, slots % PAGE_SIZE
    rows = page * PAGE_BYTES + row * ROW_BYTES
    scales = page * PAGE_BYTES + row * SCALE_BYTES + PAGE_SIZE * ROW_BYTES
    pairs = page * (PAGE_BYTES // 2) + row * (ROW_BYTES // 2)  # rows, in units of two bytes
    if FORMAT == "fp32" or FORMAT == "index_fp32":
        cols = tl.arange(0, PADDED)
        words = page * (PAGE_BYTES // 4) + row * (ROW_BYTES // 4)
        at = cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + words[:, None] + cols[None, :]
        tl.store(at, y, mask=stored[:, None] & (cols < HEAD_DIM)[None, :])
    elif FORMAT == "bf16" or FORMAT == "index_bf16":
        _store_bf16(y, pairs, stored, cache_ptr, 0, HEAD_DIM, PADDED)
    elif FORMAT == "fp8_ds_mla":
        _store_bf16(y, pairs - NOPE // 2, stored, cache_ptr, NOPE, HEAD_DIM, PADDED)
        _store_fp8_groups(rounded(y, tl.bfloat16), rows, scales, stored, cache_ptr, NOPE, SCALE_BYTES, ROWS, PADDED)
    elif FORMAT == "nvfp4":
        START: tl.constexpr = NOPE // 2 + NOPE // BLOCK + 4  # where the BF16 dims begin
        _store_bf16(y, pairs + (START // 2 - NOPE), stored, cache_ptr, NOPE, HEAD_DIM, PADDED)
        _store_nvfp4(rounded(y, tl.bfloat16), rows, stored, cache_ptr, NOPE, ROW_BYTES, E2M1_CVT, ROWS, PADDED)
    elif FORMAT == "index_fp8":
        _store_fp8_rows(rounded(y, tl.bfloat16), rows, scales, stored, cache_ptr, HEAD_DIM, PAGE_BYTES, ROWS, PADDED)
    else:
        tl.static_assert(FORMAT == "index_mxfp4", "unknown cache format")
        _store_mxfp4(
            rounded(y, tl.bfloat16), rows, scales, stored, cache_ptr, HEAD_DIM, PAGE_BYTES, E2M1_CVT, ROWS, PADDED
        )


@triton.jit
def store_nvfp4_blocks(
    lo, hi, slot, cache_ptr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """As `store` in nvfp4, of one row whose blocks are given as halves [1, BLOCKS, 8], to a scalar slot: where a thread
    has whole blocks, nothing but the row's maximum leaves it. See `refuse_blocks`."""
    NOPE: tl.constexpr = HEAD_DIM - ROPE_DIM
    CODED: tl.constexpr = NOPE // BLOCK
    START: tl.constexpr = NOPE // 2 + CODED + 4
    stored = slot >= 0
    slot = tl.where(stored, slot, 0).to(tl.int64)  # before the multiply: a cache passes 2**31 bytes
    page, row = slot // PAGE_SIZE, slot % PAGE_SIZE
    blocks = tl.arange(0, BLOCKS)
    turned = ((blocks >= CODED) & (blocks < HEAD_DIM // BLOCK) & stored)[None, :, None]
    at = cache_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + page * (PAGE_BYTES // 4) + row * (ROW_BYTES // 4)
    lo, hi = _bf16_pairs(lo), _bf16_pairs(hi)
    pairs = at + (START // 4 - NOPE // 2) + (blocks[:, None] * (BLOCK // 2) + tl.arange(0, 4)[None, :])[None, :, :]
    tl.store(pairs, lo, mask=turned)
    tl.store(pairs + 4, hi, mask=turned)
    lo, hi = widened(lo), widened(hi)
    most = tl.where((blocks < CODED)[None, :], magnitude_bits(block_amax(lo, hi, 1, BLOCKS)), 0)
    alpha = tl.div_rn(tl.max(most.reshape(BLOCKS), 0).to(tl.float32, bitcast=True), AMAX_TO_ALPHA)
    words, byte = quantize_blocks(lo, hi, alpha, "absmax", 1, BLOCKS, E2M1_CVT)
    coded = ((blocks < CODED) & stored)[None, :]
    places = at + (blocks[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, :]
    tl.store(places, words, mask=coded[:, :, None])
    bits = tl.where(alpha != alpha, float("nan"), alpha).to(tl.int32, bitcast=True)
    tl.store(at + (NOPE // 2 + CODED) // 4, bits, mask=stored)
    at = cache_ptr + page * PAGE_BYTES + row * ROW_BYTES + NOPE // 2
    tl.store(at + blocks[None, :], byte.to(tl.uint8), mask=coded)


@triton.jit
def _bf16_pairs(y):
    """FP32 [ROWS, BLOCKS, 8] -> BF16, to nearest even, as words of two [ROWS, BLOCKS, 4]."""
    even, odd = tl.split(y.reshape(y.shape[0], y.shape[1], 4, 2))
    if CVT:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (bf16_bits(odd).to(tl.int32) << 16) | (bf16_bits(even).to(tl.int32) & 0xFFFF)


@triton.jit
def _store_bf16(y, pairs, stored, cache_ptr, FIRST: tl.constexpr, LAST: tl.constexpr, PADDED: tl.constexpr):
    """Columns FIRST .. LAST as BF16, column c in the two bytes from 2 (pairs + c) on."""
    cols = tl.arange(0, PADDED)
    at = cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + pairs[:, None] + cols[None, :]
    tl.store(at, bf16_bits(y), mask=stored[:, None] & ((cols >= FIRST) & (cols < LAST))[None, :])


@triton.jit
def _store_words(words, at, mask, cache_ptr, BYTES: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 [ROWS, WORDS] at bytes `at` [ROWS] and behind, where mask [ROWS, WORDS]; BYTES divides every such place,
    of rows that are not stored too."""
    if BYTES % 4 == 0:
        places = at[:, None] // 4 + tl.arange(0, WORDS)[None, :]
        tl.store(cache_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + places, words, mask=mask)
    else:
        # One byte of each word after the other. As [ROWS, WORDS, 4], Triton (3.6, 3.7) gave a layout with copies in
        # between lanes of a row to the maxima that the words come from, which then left half of a block out.
        places = cache_ptr + at[:, None] + 4 * tl.arange(0, WORDS)[None, :]
        for byte in tl.static_range(4):
            tl.store(places + byte, (words >> (8 * byte)).to(tl.uint8), mask=mask)


@triton.jit
def at_least(bits, least: tl.constexpr):
    """Bits of non-negative FP32 numbers, or those of `least` where they are smaller."""
    return tl.maximum(bits, tl.full([1], least, tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def _store_fp8_groups(
    y, rows, scales, stored, cache_ptr, NOPE: tl.constexpr, SCALE_BYTES: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """E4M3 in groups of 64 columns, then a byte of E8M0 a group in the page's scales, zeros behind."""
    GROUPS: tl.constexpr = PADDED // FP8_GROUP
    groups = tl.arange(0, GROUPS)
    y = y.reshape(ROWS, GROUPS, FP8_GROUP)
    byte = e8m0_of_448(at_least(largest(y, 2), FP8_FLOOR))  # [ROWS, GROUPS]
    data = e4m3_bits(y * e8m0_reciprocal(byte)[:, :, None]).reshape(ROWS, PADDED)
    cols = tl.arange(0, PADDED)
    # The 8 says no more than that rows begin at multiples of 8: so a thread stores the eight columns that it loaded as
    # BF16, where 16 bytes at once would cost 28 shuffles a row (sm_90a: 664 -> 544 instructions).
    rows = tl.where(stored, rows, 8)
    tl.store(cache_ptr + rows[:, None] + cols[None, :], data, mask=stored[:, None] & (cols < NOPE)[None, :])
    byte = tl.where((groups < NOPE // FP8_GROUP)[None, :], byte, 0).to(tl.uint8)
    at = cache_ptr + scales[:, None] + groups[None, :]
    tl.store(at, byte, mask=stored[:, None] & (groups < SCALE_BYTES)[None, :])
    if GROUPS < SCALE_BYTES:
        behind = tl.arange(0, SCALE_BYTES)
        at = cache_ptr + scales[:, None] + behind[None, :]
        nothing = tl.zeros([ROWS, SCALE_BYTES], tl.uint8)
        tl.store(at, nothing, mask=stored[:, None] & (behind >= GROUPS)[None, :])


@triton.jit
def _store_fp8_rows(
    y, rows, scales, stored, cache_ptr, HEAD_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """E4M3 under one FP32 power of two a row, which goes to the page's scales."""
    cols = tl.arange(0, PADDED)
    inside = (cols < HEAD_DIM)[None, :]
    byte = e8m0_of_448(at_least(largest(tl.where(inside, y, 0.0), 1), FP8_FLOOR))  # [ROWS]
    data = e4m3_bits(y * e8m0_reciprocal(byte)[:, None])
    tl.store(cache_ptr + rows[:, None] + cols[None, :], data, mask=stored[:, None] & inside)
    _store_words((byte << 23)[:, None], scales, stored[:, None], cache_ptr, PAGE_BYTES, ROWS, 1)


@triton.jit
def _packed(y, ROWS: tl.constexpr, WORDS: tl.constexpr, E2M1_CVT: tl.constexpr):
    """`pack_e2m1` of rows of 8 WORDS columns, four at a time: so it takes no more than a shuffle where a thread has but
    four, as of FP32."""
    fours = y.reshape(ROWS, 2 * WORDS, 4)
    eights = tl.join(fours, tl.zeros_like(fours)).permute(0, 1, 3, 2).reshape(ROWS, 2 * WORDS, 8)
    halves = pack_e2m1(eights, ROWS, 2 * WORDS, E2M1_CVT).reshape(ROWS, WORDS, 2)
    return tl.sum(halves << (16 * tl.arange(0, 2)), axis=2)


@triton.jit
def _store_mxfp4(
    y, rows, scales, stored, cache_ptr, HEAD_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """E2M1 in blocks of 32 columns, then a byte of E8M0 a block in the page's scales."""
    BLOCKS: tl.constexpr = PADDED // MX_BLOCK
    y = y.reshape(ROWS, BLOCKS, MX_BLOCK)
    byte = e8m0_of_6(at_least(largest(y, 2), MX_FLOOR))  # [ROWS, BLOCKS]
    codes = _packed(y * e8m0_reciprocal(byte)[:, :, None], ROWS, PADDED // 8, E2M1_CVT)
    words, blocks = tl.arange(0, PADDED // 8), tl.arange(0, BLOCKS)
    mask = stored[:, None] & (words < HEAD_DIM // 8)[None, :]
    _store_words(codes, rows, mask, cache_ptr, PAGE_BYTES, ROWS, PADDED // 8)
    mask = stored[:, None] & (blocks < HEAD_DIM // MX_BLOCK)[None, :]
    tl.store(cache_ptr + scales[:, None] + blocks[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def _store_nvfp4(
    y, rows, stored, cache_ptr, NOPE: tl.constexpr, ROW_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Codes of the first NOPE columns, their block scales, and the row's alpha in FP32."""
    BLOCKS: tl.constexpr = PADDED // BLOCK
    cols, words, blocks = tl.arange(0, PADDED), tl.arange(0, PADDED // 8), tl.arange(0, BLOCKS)
    y = tl.where((cols < NOPE)[None, :], y, 0.0).reshape(ROWS, BLOCKS, BLOCK)
    amax = largest(y, 2)
    # by way of the blocks' maxima: so alpha lies where the blocks' scales are computed, each in one thread
    alpha = tl.div_rn(tl.max(amax, axis=1).to(tl.float32, bitcast=True), AMAX_TO_ALPHA)  # [ROWS]
    byte, factor = absmax_scale(amax.to(tl.float32, bitcast=True), alpha[:, None])
    codes = _packed(y * factor[:, :, None], ROWS, PADDED // 8, E2M1_CVT)
    mask = stored[:, None] & (words < NOPE // 8)[None, :]
    _store_words(codes, rows, mask, cache_ptr, ROW_BYTES, ROWS, PADDED // 8)
    mask = stored[:, None] & (blocks < NOPE // BLOCK)[None, :]
    tl.store(cache_ptr + rows[:, None] + NOPE // 2 + blocks[None, :], byte.to(tl.uint8), mask=mask)
    bits = tl.where(alpha != alpha, float("nan"), alpha).to(tl.int32, bitcast=True)
    at = rows + NOPE // 2 + NOPE // BLOCK
    _store_words(bits[:, None], at, stored[:, None], cache_ptr, ROW_BYTES if NOPE % 64 == 0 else 2, ROWS, 1)
