"""RoPE undone on attention's output (values carry it, for K = V), at the query's position.

Memory bound: reads and writes 2 bytes a dim (BF16), most of which is a copy. The kernel is `heads`. Where the output
projection takes NVFP4, `rope_inverse_quantize` writes 9/16 byte instead.
"""

from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import RopeInverseProblem

from . import heads
from .heads import SPACE as SPACE, Config as Config, build_key as build_key, default as default, supports as supports


def launch(o: Tensor, positions: Tensor, table: Tensor, out: Tensor, config: Config) -> None:
    """o [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    heads.launch(o, positions, table, None, out, config, inverse=True)


def warm(problem: RopeInverseProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    heads.warm(problem, None, config, inverse=True)


def build(problem: RopeInverseProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    return heads.build(problem, config, arch, norm=False, inverse=True)
