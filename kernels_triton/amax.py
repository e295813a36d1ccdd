"""The end of a global scale: the maximum over the maxima of tiles, divided by 2688.

The quantising kernels, told to, write the largest magnitude of each tile instead of its codes; this is the one program
after them. Nothing is read on the host, and the order of programs cannot matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nvfp4 import AMAX_TO_ALPHA
from .overlap import wait

BLOCK = 2048


@triton.jit(do_not_specialize=["COUNT"])
def _alpha_of_tiles(bits_ptr, alpha_ptr, COUNT, BLOCK: tl.constexpr):
    wait()
    most = tl.zeros([BLOCK], tl.int32)
    for start in range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(bits_ptr + at, mask=at < COUNT, other=0))
    amax = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    tl.store(alpha_ptr, tl.div_rn(amax, AMAX_TO_ALPHA))


def tile_maxima(programs: int, device: torch.device) -> Tensor:
    """Where each of `programs` tiles writes the bits of its largest magnitude: int32 [programs]."""
    return torch.empty(programs, dtype=torch.int32, device=device)


def finish(bits: Tensor, alpha: Tensor) -> None:
    """alpha float32 [] <- largest of bits / 2688."""
    _alpha_of_tiles[(1,)](bits, alpha, bits.numel(), BLOCK=BLOCK, num_warps=8)
