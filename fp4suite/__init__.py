"""NVFP4 inference kernels for DeepSeek-V4: formats, references, tuned ops.

    import fp4suite
    from fp4suite import ops

    w = ops.quantize_nvfp4(weight)          # [n, k] -> NVFP4Tensor
    y = ops.gemm_nvfp4(x, w)                # [m, k] -> [m, n], by the kernel and config that the tuned table names

Importing touches no GPU, compiles nothing and reads no table.
"""

from . import arch as arch
from . import ops as ops
from . import reference as reference
from .dispatch import override as override
from .dispatch import recording as recording
from .dispatch import use_table as use_table
from .errors import TableError as TableError
from .errors import UnsupportedError as UnsupportedError
from .formats import (
    FP8BlockTensor as FP8BlockTensor,
)
from .formats import (
    IndexCache as IndexCache,
)
from .formats import (
    MXFP4Tensor as MXFP4Tensor,
)
from .formats import (
    NVFP4Tensor as NVFP4Tensor,
)
from .formats import (
    PagedCache as PagedCache,
)
from .warmup import warmup as warmup

__version__ = "0.1.0"
