"""The orthonormal Hadamard transform of rows in registers, by the butterflies of `reference.compressor`."""

import triton
import triton.language as tl


@triton.jit
def hadamard(x, ROWS: tl.constexpr, N: tl.constexpr):
    """FP32 x [ROWS, N] times the Sylvester matrix of order N (a power of two, at most 1024) over sqrt(N)."""
    for level in tl.static_range(10):
        if N >> (level + 1):
            pairs = x.reshape(ROWS, N >> (level + 1), 2, 1 << level).permute(0, 1, 3, 2)
            a, b = tl.split(pairs)
            x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, N)
    return x * N**-0.5
