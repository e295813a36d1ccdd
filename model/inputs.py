"""What linears read: a tensor, or what one is made from. However many weights read it, it is quantised once for all.

A norm or SwiGLU before linears that take NVFP4 is one launch with the quantising, and never rounded in between.
"""

from functools import cached_property

import torch
from torch import Tensor

from fp4suite import dispatch, ops
from fp4suite.formats import FP8RowTensor, NVFP4Tensor, SfLayout

# Global scale of activations in batch-invariant mode: block maxima from 0.006 to 168 get a scale with all its bits.
# Norms and the clamp of SwiGLU keep inputs of linears below; larger numbers saturate.
FIXED_ALPHA = 2.0**-4


class Input:
    """x [..., k] as it is. dtype: of what linears make of it, unless asked for another; lead: its shape but for k."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.lead = x.dtype, x.shape[:-1]
        self._rows = x.flatten(0, -2)
        self._packed: dict[SfLayout, NVFP4Tensor] = {}

    @cached_property
    def plain(self) -> Tensor:
        """[tokens, k] in dtype."""
        return self._rows

    @cached_property
    def fp8(self) -> FP8RowTensor:
        """[tokens, k] in E4M3."""
        return ops.quantize_fp8(self.plain)

    def nvfp4(self, sf_layout: SfLayout = "linear") -> NVFP4Tensor:
        """[tokens, k] in NVFP4, under a global scale of the maximum; in batch-invariant mode under FIXED_ALPHA."""
        if sf_layout not in self._packed:
            alpha = next((x.alpha for x in self._packed.values()), None)
            if alpha is None and dispatch.is_batch_invariant():
                alpha = self._rows.new_full((), FIXED_ALPHA, dtype=torch.float32)
            self._packed[sf_layout] = self._quantize(alpha, sf_layout)
        return self._packed[sf_layout]

    def _quantize(self, alpha: Tensor | None, sf_layout: SfLayout) -> NVFP4Tensor:
        return ops.quantize_nvfp4(self.plain, alpha=alpha, sf_layout=sf_layout)


class Normed(Input):
    """RMSNorm of x [..., k]."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        super().__init__(x)
        self._weight, self._eps = weight, eps

    @cached_property
    def plain(self) -> Tensor:
        """[tokens, k] in dtype."""
        return ops.rms_norm(self._rows, self._weight, self._eps)

    def _quantize(self, alpha: Tensor | None, sf_layout: SfLayout) -> NVFP4Tensor:
        return ops.rmsnorm_quantize(self._rows, self._weight, self._eps, alpha=alpha, sf_layout=sf_layout)


class Gated(Input):
    """Clamped SwiGLU of x [tokens, 2 k], gate columns first; of FP32 that becomes `dtype`."""

    def __init__(self, x: Tensor, limit: float, dtype: torch.dtype) -> None:
        super().__init__(x)
        self._limit, self.dtype = limit, dtype

    @cached_property
    def plain(self) -> Tensor:
        """[tokens, k] in dtype."""
        return ops.swiglu(self._rows, self._limit, self.dtype)

    def _quantize(self, alpha: Tensor | None, sf_layout: SfLayout) -> NVFP4Tensor:
        return ops.swiglu_quantize(self._rows, limit=self._limit, alpha=alpha, sf_layout=sf_layout)
