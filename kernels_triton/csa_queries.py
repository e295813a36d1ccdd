"""Both queries of a CSA layer in one launch: `qnorm_rope` of the layer's and `index_query` of its indexer's.

Memory bound, and where tokens are few by the chain of loads of one program, which both go through side by side, so that
a launch is saved. Each program is one of the two kernels, block_h heads of a token or as many of the indexer's as fill
its warps; the grid's second axis has the blocks of the layer's queries, then those of the indexer's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import CsaQueriesProblem

from . import heads, host, index_query
from .heads import turn_heads
from .index_query import round_heads
from .overlap import begin
from .rope import head_strides


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a program of the layer's queries; one of the indexer's by `lanes` threads."""

    block_h: int = 1
    lanes: int = 16
    num_warps: int = 1

    @property
    def of_queries(self) -> heads.Config:
        """The config of `qnorm_rope` that its programs have."""
        return heads.Config(block_h=self.block_h, num_warps=self.num_warps)

    @property
    def of_indexer(self) -> index_query.Config:
        """The config of `index_query` that its programs have."""
        return index_query.Config(lanes=self.lanes, num_warps=self.num_warps)


SPACE = {"block_h": (1, 2, 4, 8), "lanes": (4, 8, 16), "num_warps": (1, 2, 4)}


def supports(problem: CsaQueriesProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    queries, indexer = problem.parts
    return heads.supports(queries, config.of_queries) or index_query.supports(indexer, config.of_indexer)


def default(problem: CsaQueriesProblem) -> Config:
    """As many heads and lanes as either has alone, by programs of one warp."""
    queries, indexer = problem.parts
    return Config(block_h=heads.default(queries).block_h, lanes=index_query.default(indexer).lanes)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _csa_queries(
    q_ptr, stride_m, stride_h, out_ptr, HEADS, index_q_ptr, stride_index_m, stride_index_h, index_out_ptr, INDEX_HEADS,
    weights_ptr, stride_w, scaled_ptr, positions_ptr, table_ptr, eps, FORMAT: tl.constexpr, HADAMARD: tl.constexpr,
    HEAD_DIM: tl.constexpr, INDEX_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr, INDEX_BLOCK_H: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    begin()
    token, block, blocks = tl.program_id(0), tl.program_id(1), (HEADS + BLOCK_H - 1) // BLOCK_H
    if block < blocks:
        turn_heads(
            token, block, q_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, False, HEAD_DIM,
            ROPE_DIM, BLOCK_H, PADDED,
        )  # fmt: skip
    else:
        round_heads(
            token, block - blocks, index_q_ptr, stride_index_m, stride_index_h, positions_ptr, table_ptr,
            index_out_ptr, weights_ptr, stride_w, scaled_ptr, INDEX_HEADS, FORMAT, HADAMARD, INDEX_DIM, ROPE_DIM,
            INDEX_BLOCK_H, LANES,
        )  # fmt: skip


def launch(
    q: Tensor,
    index_q: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
    format: str,
    hadamard: bool,
    out: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    config: Config,
) -> None:
    """q [m, heads, head_dim] and index_q [m, index heads, index dim], tokens and heads of any stride -> `out`, their
    likes, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    weights: if given, the second of `out` are E4M3 bytes, as of `index_query.launch`.
    """
    m, heads, head_dim = q.shape
    if m == 0:
        return
    scaled = (None, 0, None) if weights is None else (weights[0], host.row_stride(weights[0]), weights[1])
    operands = (q, *head_strides(q), out[0], heads, index_q, *head_strides(index_q), out[1], index_q.shape[1])
    constants = _constants(format, hadamard, head_dim, index_q.shape[2], table.shape[1], config)
    blocks = triton.cdiv(heads, config.block_h) + triton.cdiv(index_q.shape[1], config.of_indexer.block_h)
    _csa_queries[m, blocks](
        *operands, *scaled, positions, table, eps, **constants, num_warps=config.num_warps, **host.OPTIONS
    )


def warm(problem: CsaQueriesProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    p, dtype = problem, host.DTYPES[problem.x]
    q = torch.zeros(1, p.heads, p.head_dim, dtype=dtype, device="cuda")
    index_q = torch.zeros(1, p.index_heads, p.index_dim, dtype=dtype, device="cuda")
    table, first = torch.zeros(1, p.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out, weights = torch.empty_like(index_q), None
    if p.codes:
        ones = torch.ones(1, p.index_heads, device="cuda")
        out, weights = out.to(torch.uint8), (ones, ones.clone())
    outs = torch.empty_like(q), out
    launch(q, index_q, first, table, 1.0, p.format, bool(p.hadamard), outs, weights, config)


def build_key(problem: CsaQueriesProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    p = problem
    return p.x, p.format, p.codes, p.hadamard, p.head_dim, p.index_dim, p.rope_dim


def build(problem: CsaQueriesProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    p = problem
    types = {"q_ptr": f"*{p.x}", "stride_m": "i32", "stride_h": "i32", "out_ptr": f"*{p.x}", "HEADS": "i32"}
    types |= {"index_q_ptr": f"*{p.x}", "stride_index_m": "i32", "stride_index_h": "i32", "INDEX_HEADS": "i32"}
    types |= {"index_out_ptr": "*u8" if p.codes else f"*{p.x}"}
    types |= {"positions_ptr": "*i32", "table_ptr": "*fp32", "eps": "fp32"}
    constants = _constants(p.format, bool(p.hadamard), p.head_dim, p.index_dim, p.rope_dim, config)
    if p.codes:
        types |= {"weights_ptr": "*fp32", "stride_w": "i32", "scaled_ptr": "*fp32"}
    else:
        constants |= {"weights_ptr": None, "stride_w": 0, "scaled_ptr": None}
    return host.build(_csa_queries, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(
    format: str, hadamard: bool, head_dim: int, index_dim: int, rope_dim: int, config: Config
) -> dict[str, Any]:
    return {
        "FORMAT": format,
        "HADAMARD": hadamard,
        "HEAD_DIM": head_dim,
        "INDEX_DIM": index_dim,
        "ROPE_DIM": rope_dim,
        "BLOCK_H": config.block_h,
        "PADDED": triton.next_power_of_2(head_dim),
        "INDEX_BLOCK_H": config.of_indexer.block_h,
        "LANES": config.lanes,
    }
