"""Device functions of the kernels that norm rows of a head's dims and turn the last ones, as `reference.rope` does.

A tile is FP32 [ROWS, PADDED]: HEAD_DIM columns and what fills them up to a power of two, of which nothing is kept. Each
operation is rounded on its own, so that a row has the reference's bits: compile with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from .nvfp4 import row_sum


@triton.jit
def rms_normed(x, eps, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) of rows whose padding is zero, in the order of `reference.norm.rms_norm_wide`."""
    mean = tl.div_rn(row_sum(x * x, ROWS, PADDED), tl.full([ROWS], HEAD_DIM, tl.float32))
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def load_angles(table_ptr, positions, live, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Cosines and sines of the pairs at positions [N] where live [N]: two of [N, PADDED / 2], the last ROPE_DIM / 2 of
    HEAD_DIM / 2 pairs in their place."""
    j = tl.arange(0, PADDED // 2) - (HEAD_DIM - ROPE_DIM) // 2
    at = table_ptr + positions.to(tl.int64)[:, None] * ROPE_DIM + j[None, :]
    turned = live[:, None] & ((j >= 0) & (j < ROPE_DIM // 2))[None, :]
    return tl.load(at, mask=turned, other=0.0), tl.load(at + ROPE_DIM // 2, mask=turned, other=0.0)


@triton.jit
def turn(
    x, cos, sin, INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """x [ROWS, PADDED] with its last ROPE_DIM of HEAD_DIM columns turned; cos and sin [ROWS or 1, PADDED / 2]."""
    a, b = tl.split(x.reshape(ROWS, PADDED // 2, 2))
    if INVERSE:
        c = a * cos + b * sin
        d = b * cos - a * sin
    else:
        c = a * cos - b * sin
        d = b * cos + a * sin
    still = (tl.arange(0, PADDED // 2) < (HEAD_DIM - ROPE_DIM) // 2)[None, :]
    return tl.join(tl.where(still, a, c), tl.where(still, b, d)).reshape(ROWS, PADDED)
