"""What follows the GEMM of q_a and kv, in one launch: the norm of q's rows, and `kv_norm_rope_insert` of kv's.

Memory bound: reads and writes 2 bytes an element of q (BF16), reads 2 a dim of kv and writes a row of the cache. The
programs of kv come first, since their chain of loads is longer; then those of q, a row or a part of one each. Device
code of both kinds is that of `rms_norm` and `kv_norm_rope_insert`. Few tokens take as long as the slower kind.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import PagedCache
from fp4suite.problem import QkvNormRopeInsertProblem

from . import host, kv_norm_rope_insert, normed_rows, rms_norm
from .kv_norm_rope_insert import constants_of, empty_cache, insert_rows
from .overlap import begin
from .rms_norm import norm_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_kv rows of kv, or one of `parts` of a row of q, a program. parts and held: as for `rms_norm`.

    One warp, and a row of kv for each: no sum of either kind leaves its warp, and no program has a barrier.
    """

    block_kv: int = 1
    num_warps: int = 1
    parts: int = 1
    held: bool = False

    @property
    def norm(self) -> rms_norm.Config:
        """Of q's rows alone."""
        return rms_norm.Config(num_warps=self.num_warps, parts=self.parts, held=self.held)

    @property
    def insert(self) -> kv_norm_rope_insert.Config:
        """Of kv's rows alone."""
        return kv_norm_rope_insert.Config(block_m=self.block_kv, num_warps=self.num_warps)


SPACE = {"block_kv": (1, 2, 4), "num_warps": (1, 2), "parts": (1, 2, 3), "held": (False, True)}


def supports(problem: QkvNormRopeInsertProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return rms_norm.supports(problem.norm, config.norm) or kv_norm_rope_insert.supports(problem.insert, config.insert)


def default(problem: QkvNormRopeInsertProblem) -> Config:
    """Programs of one warp. Few tokens: q's rows in parts of 16 columns a thread. Many: a warp holds a row of q."""
    if problem.m <= rms_norm.FEW_ROWS:
        return Config(parts=triton.cdiv(problem.k, Config().norm.tile_k))
    held = Config(held=True)
    return held if supports(problem, held) is None else Config()


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _qkv_norm_rope_insert(
    q_ptr, stride_q, q_weight_ptr, kv_ptr, stride_kv, kv_weight_ptr, positions_ptr, table_ptr, eps, slots_ptr,
    out_ptr, cache_ptr, M, PARTS: tl.constexpr, K: tl.constexpr, SUM_K: tl.constexpr, TILE_K: tl.constexpr,
    TILES: tl.constexpr, HELD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    begin()
    program = tl.program_id(0)
    inserting = tl.cdiv(M, BLOCK_M)
    if program < inserting:
        insert_rows(
            program, kv_ptr, stride_kv, kv_weight_ptr, positions_ptr, table_ptr, eps, slots_ptr, cache_ptr, M,
            FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, BLOCK_M, PADDED,
        )  # fmt: skip
    else:
        norming = program - inserting
        norm_row(
            norming // PARTS, norming % PARTS, q_ptr, stride_q, q_weight_ptr, eps, out_ptr, M, K, SUM_K, TILE_K,
            TILES, HELD,
        )  # fmt: skip


def launch(
    q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, positions: Tensor, table: Tensor, eps: float,
    slots: Tensor, out: tuple[Tensor, PagedCache], config: Config,
) -> None:  # fmt: skip
    """q [m, k] and kv [m, head_dim], rows of any stride -> (normed q, contiguous, and the cache, whose data change).

    The rest as for `kv_norm_rope_insert`.
    """
    m, k = q.shape
    if m == 0:
        return
    normed, cache = out
    constants = _constants(k, cache, host.has_e2m1_cvt(q.device), config)
    operands = (q, host.row_stride(q), q_weight, kv, host.row_stride(kv), kv_weight, positions, table, eps, slots)
    grid = (triton.cdiv(m, config.block_kv) + m * config.parts,)
    _qkv_norm_rope_insert[grid](
        *operands, normed, cache.data, m, **constants, num_warps=config.num_warps, **host.OPTIONS
    )


def warm(problem: QkvNormRopeInsertProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    q, kv = (torch.zeros(1, n, dtype=host.DTYPES[problem.x], device="cuda") for n in (problem.k, problem.head_dim))
    table = torch.zeros(1, problem.rope_dim, device="cuda")
    nowhere = torch.full((1,), -1, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q), empty_cache(problem.insert, "cuda")
    launch(q, q[0], kv, kv[0], nowhere, table, 1.0, nowhere, out, config)


def build_key(problem: QkvNormRopeInsertProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return rms_norm.build_key(problem.norm, config.norm) + kv_norm_rope_insert.build_key(problem.insert, config.insert)


def build(problem: QkvNormRopeInsertProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"q_ptr": f"*{problem.x}", "stride_q": "i32", "q_weight_ptr": f"*{problem.x}", "kv_ptr": f"*{problem.x}"}
    types |= {"stride_kv": "i32", "kv_weight_ptr": f"*{problem.x}", "positions_ptr": "*i32", "table_ptr": "*fp32"}
    types |= {"eps": "fp32", "slots_ptr": "*i32", "out_ptr": f"*{problem.x}", "cache_ptr": "*u8", "M": "i32"}
    constants = _constants(problem.k, empty_cache(problem.insert, "cpu"), arch == "sm_100a", config)
    unaligned = ("positions_ptr", "slots_ptr", "M")
    return host.build(_qkv_norm_rope_insert, types, constants, arch, config.num_warps, unaligned=unaligned)


def _constants(k: int, cache: PagedCache, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    norm = normed_rows.constants(k, config.norm.tile_k, config.parts, config.held)
    return {"PARTS": config.parts} | norm | constants_of(cache, e2m1_cvt, config.insert)
