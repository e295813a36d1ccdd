"""NVFP4 inference kernels for DeepSeek-V4: formats, references, tuned ops.

    import fp4suite
    from fp4suite import ops

    w = ops.quantize_nvfp4(weight)          # [n, k] -> NVFP4Tensor
    y = ops.gemm_nvfp4(x, w)                # [m, k] -> [m, n], by the kernel and config that the tuned table names

Importing touches no GPU, compiles nothing and reads no table.
"""

from . import arch as arch, ops as ops, reference as reference
from .dispatch import (
    batch_invariant as batch_invariant,
    override as override,
    recording as recording,
    set_batch_invariant as set_batch_invariant,
    use_table as use_table,
    weight_layout as weight_layout,
)
from .errors import TableError as TableError, UnsupportedError as UnsupportedError
from .formats import (
    FP8BlockTensor as FP8BlockTensor,
    FP8RowTensor as FP8RowTensor,
    IndexCache as IndexCache,
    MXFP4Tensor as MXFP4Tensor,
    NVFP4Tensor as NVFP4Tensor,
    PagedCache as PagedCache,
    WeightLayout as WeightLayout,
)
from .warmup import warmup as warmup

__version__ = "0.1.0"
