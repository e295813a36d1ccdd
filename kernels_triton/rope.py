"""Device functions of the kernels that norm rows of a head's dims and turn the last ones, as `reference.rope` does.

A tile is FP32 [ROWS, PADDED]: HEAD_DIM columns and what fills them up to a power of two, of which nothing is kept. Each
operation is rounded on its own, so that a row has the reference's bits: compile with enable_fp_fusion=False.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import host
from .nvfp4 import row_sum


def refuse_heads(head_dim: int, rope_dim: int, dtype: str) -> str | None:
    """Why heads of numbers of a type cannot be turned, or None."""
    if dtype not in host.DTYPES:
        return f"kernels read {', '.join(host.DTYPES)}, got {dtype}"
    if head_dim % 2 or rope_dim % 2 or rope_dim > head_dim:
        return f"RoPE turns pairs of the last of a head's dims, got head_dim={head_dim} rope_dim={rope_dim}"
    return None


def head_strides(x: Tensor) -> tuple[int, int]:
    """Elements from token to token and from head to head of [m, heads, head_dim], whose dims must be adjacent."""
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"the dims of a head must be contiguous, got strides {x.stride()}")
    return x.stride(0), x.stride(1)


@triton.jit
def rms_normed(x, eps, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) of rows whose padding is zero, in the order of `reference.norm.rms_norm_wide`."""
    mean = tl.div_rn(row_sum(x * x, ROWS, PADDED), tl.full([ROWS], HEAD_DIM, tl.float32))
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def pair_angles(PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr):
    """Which angle turns each of a row's first PAIRS pairs of columns; outside of 0 .. ROPE_DIM / 2 - 1, none."""
    return tl.arange(0, PAIRS) - (HEAD_DIM - ROPE_DIM) // 2


@triton.jit
def load_angles(table_ptr, positions, live, angles, ROPE_DIM: tl.constexpr):
    """Cosines and sines, two of [N, PAIRS], of `angles` [PAIRS] at positions [N] where live [N]; 0 elsewhere."""
    at = table_ptr + positions.to(tl.int64)[:, None] * ROPE_DIM + angles[None, :]
    turned = live[:, None] & ((angles >= 0) & (angles < ROPE_DIM // 2))[None, :]
    return tl.load(at, mask=turned, other=0.0), tl.load(at + ROPE_DIM // 2, mask=turned, other=0.0)


@triton.jit
def turn(x, cos, sin, angles, INVERSE: tl.constexpr, ROPE_DIM: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """x [ROWS, 2 PAIRS] with the pairs that have an angle turned; cos and sin [ROWS or 1, PAIRS]."""
    a, b = tl.split(x.reshape(ROWS, PAIRS, 2))
    turned = ((angles >= 0) & (angles < ROPE_DIM // 2))[None, :]
    return tl.join(*turn_pairs(a, b, cos, sin, turned, INVERSE)).reshape(ROWS, 2 * PAIRS)


@triton.jit
def turn_pairs(a, b, cos, sin, turned, INVERSE: tl.constexpr):
    """The pairs (a, b), turned where `turned`."""
    if INVERSE:
        c = a * cos + b * sin
        d = b * cos - a * sin
    else:
        c = a * cos - b * sin
        d = b * cos + a * sin
    return tl.where(turned, c, a), tl.where(turned, d, b)


@triton.jit
def block_angles(table_ptr, position, live, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCKS: tl.constexpr):
    """Cosines and sines of the first and the second half of each block: four of [1, BLOCKS, 4], 0 where none turns."""
    NOPE: tl.constexpr = HEAD_DIM - ROPE_DIM
    blocks = tl.arange(0, BLOCKS)
    inside = ((blocks >= NOPE // 16) & (blocks < HEAD_DIM // 16) & live)[None, :, None]
    own = (blocks[:, None] * 8 + tl.arange(0, 4)[None, :])[None, :, :] - NOPE // 2
    at = table_ptr + position.to(tl.int64) * ROPE_DIM + own
    cos, sin = tl.load(at, mask=inside, other=0.0), tl.load(at + ROPE_DIM // 2, mask=inside, other=0.0)
    at += 4
    return cos, sin, tl.load(at, mask=inside, other=0.0), tl.load(at + ROPE_DIM // 2, mask=inside, other=0.0)


@triton.jit
def turn_blocks(y, cos, sin, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCKS: tl.constexpr):
    """Halves of blocks [1, BLOCKS, 8], the last ROPE_DIM columns turned."""
    a, b = tl.split(y.reshape(1, BLOCKS, 4, 2))
    turned = (tl.arange(0, BLOCKS) >= (HEAD_DIM - ROPE_DIM) // 16)[None, :, None]
    return tl.join(*turn_pairs(a, b, cos, sin, turned, False)).reshape(1, BLOCKS, 8)
