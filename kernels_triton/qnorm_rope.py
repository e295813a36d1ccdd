"""RMSNorm of each query head, then RoPE on its last dims: what lies between q_b's GEMM and attention.

Memory bound: reads and writes 2 bytes a dim (BF16). The kernel is `heads`.
"""

from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import QnormRopeProblem

from . import heads
from .heads import SPACE as SPACE, Config as Config, build_key as build_key, default as default, supports as supports


def launch(q: Tensor, positions: Tensor, table: Tensor, eps: float, out: Tensor, config: Config) -> None:
    """q [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    heads.launch(q, positions, table, eps, out, config, inverse=False)


def warm(problem: QnormRopeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    heads.warm(problem, 1.0, config, inverse=False)


def build(problem: QnormRopeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    return heads.build(problem, config, arch, norm=True, inverse=False)
