"""RMSNorm, RoPE and the encoding of KV rows, stored in pages of a cache: what lies between wkv's GEMM and attention.

Memory bound: reads 2 bytes a dim (BF16) and writes a row of the cache, 584 bytes in fp8_ds_mla, 384 in nvfp4. One
program block_m rows, kept in registers from the load to the last store. Few tokens: a chain of two loads (position,
then angles) and two reductions.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import PagedCache, kv_layout
from fp4suite.problem import KvNormRopeInsertProblem

from . import cache_rows, host, normed_rows
from .normed_rows import load_tile, load_words, widened_late, word_factors
from .nvfp4 import widen
from .overlap import begin
from .rope import block_angles, load_angles, pair_angles, refuse_heads, rms_normed, turn, turn_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows a program. A warp a row: then no sum leaves its warp, and nothing goes through shared memory.

    by_blocks: a thread has whole blocks of 16 columns, of nvfp4.
    """

    block_m: int = 1
    num_warps: int = 1
    by_blocks: bool = False


SPACE = {"block_m": (1, 2, 4), "num_warps": (1, 2, 4), "by_blocks": (False, True)}


def supports(problem: KvNormRopeInsertProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return (
        refuse_heads(problem.head_dim, problem.rope_dim, problem.x)
        or cache_rows.refuse(problem.format, problem.head_dim, problem.rope_dim)
        or host.refuse_rows(config.block_m, problem.head_dim, config.num_warps, "absmax")
        or _refuse_blocks(problem, config)
    )


def default(problem: KvNormRopeInsertProblem) -> Config:
    """By blocks wherever rows can be."""
    return own if _refuse_blocks(problem, own := Config(by_blocks=True)) is None else Config()


def _refuse_blocks(problem: KvNormRopeInsertProblem, config: Config) -> str | None:
    """Why a program of this config cannot take rows by blocks, or None if it can or need not."""
    p = problem
    if not config.by_blocks:
        return None
    if config.block_m > 1 or config.num_warps > 1 or p.x != "bf16":
        return f"by blocks a warp takes a row of bf16, got {config.num_warps} for {config.block_m} of {p.x}"
    padded = triton.next_power_of_2(p.head_dim)
    return cache_rows.refuse_blocks(p.format, p.head_dim, p.rope_dim) or normed_rows.refuse(padded, padded, 1, True)


@triton.jit
def insert_rows(
    program, kv_ptr, stride_m, weight_ptr, positions_ptr, table_ptr, eps, slots_ptr, cache_ptr, M,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The BLOCK_M rows of a program."""
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # loads that do not wait for each other first: a few rows take as long as the chain of their loads
    slots = tl.load(slots_ptr + rows, mask=rows < M, other=-1)
    positions = tl.load(positions_ptr + rows, mask=rows < M, other=0)
    cols = tl.arange(0, PADDED)
    inside = (rows < M)[:, None] & (cols < HEAD_DIM)[None, :]
    x = widen(tl.load(kv_ptr + rows[:, None] * stride_m + cols[None, :], mask=inside, other=0.0))
    weight = widen(tl.load(weight_ptr + cols, mask=cols < HEAD_DIM, other=0.0))
    angles = pair_angles(PADDED // 2, HEAD_DIM, ROPE_DIM)
    cos, sin = load_angles(table_ptr, positions, slots >= 0, angles, ROPE_DIM)  # padding may have any position
    y = rms_normed(x, eps, HEAD_DIM, BLOCK_M, PADDED) * weight[None, :]
    y = turn(y, cos, sin, angles, False, ROPE_DIM, BLOCK_M, PADDED // 2)
    cache_rows.store(
        y, slots, cache_ptr, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES,
        E2M1_CVT, BLOCK_M, PADDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _kv_norm_rope_insert(
    kv_ptr, stride_m, weight_ptr, positions_ptr, table_ptr, eps, slots_ptr, cache_ptr, M, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    begin()
    insert_rows(
        tl.program_id(0), kv_ptr, stride_m, weight_ptr, positions_ptr, table_ptr, eps, slots_ptr, cache_ptr, M,
        FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, BLOCK_M, PADDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _by_blocks(
    kv_ptr, stride_m, weight_ptr, positions_ptr, table_ptr, eps, slots_ptr, cache_ptr, M, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """A row of BF16 to nvfp4."""
    begin()
    tl.static_assert(FORMAT == "nvfp4" and BLOCK_M == 1)
    BLOCKS: tl.constexpr = PADDED // 16
    first = tl.program_id(0)
    slot = tl.load(slots_ptr + first, mask=first < M, other=-1)
    position = tl.load(positions_ptr + first, mask=first < M, other=0)
    x = load_words(kv_ptr, stride_m, tl.arange(0, 1).to(tl.int64) + first, M, HEAD_DIM, 1, PADDED)
    w = load_tile(weight_ptr + tl.zeros([1, 1, 1], tl.int32), 0, M, HEAD_DIM, 1, PADDED, PADDED, True)
    angles = block_angles(table_ptr, position, slot >= 0, HEAD_DIM, ROPE_DIM, BLOCKS)
    # one pass of what compilers take for a loop: they would else move loads to where they are needed first
    for _ in range(first, M, tl.num_programs(0)):
        factor = word_factors(x, eps, HEAD_DIM, 1, PADDED)
        lo = turn_blocks(widened_late(x[0], M) * factor * w[0], angles[0], angles[1], HEAD_DIM, ROPE_DIM, BLOCKS)
        hi = turn_blocks(widened_late(x[1], M) * factor * w[1], angles[2], angles[3], HEAD_DIM, ROPE_DIM, BLOCKS)
        cache_rows.store_nvfp4_blocks(
            lo, hi, slot, cache_ptr, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, PAGE_BYTES, E2M1_CVT, BLOCKS
        )


def launch(
    kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, eps: float, slots: Tensor, cache: PagedCache,
    config: Config,
) -> None:  # fmt: skip
    """kv [m, head_dim], rows of any stride, under weight [head_dim] -> rows of cache.data at slots int [m].

    positions: int [m], in range of table float32 [positions, rope_dim]; both and slots contiguous, as the cache is.
    """
    m = len(kv)
    if m == 0:
        return
    constants = constants_of(cache, host.has_e2m1_cvt(kv.device), config)
    operands = (kv, host.row_stride(kv), weight, positions, table, eps, slots, cache.data, m)
    grid = (triton.cdiv(m, config.block_m),)
    kernel = _by_blocks if config.by_blocks else _kv_norm_rope_insert
    kernel[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: KvNormRopeInsertProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    kv = torch.zeros(1, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table = torch.zeros(1, problem.rope_dim, device="cuda")
    nowhere = torch.full((1,), -1, dtype=torch.int32, device="cuda")
    launch(kv, kv[0], nowhere, table, 1.0, nowhere, empty_cache(problem, "cuda"), config)


def build_key(problem: KvNormRopeInsertProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return problem.x, problem.format, problem.page_size, problem.head_dim, problem.rope_dim


def build(problem: KvNormRopeInsertProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"kv_ptr": f"*{problem.x}", "stride_m": "i32", "weight_ptr": f"*{problem.x}", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "eps": "fp32", "slots_ptr": "*i32", "cache_ptr": "*u8", "M": "i32"}
    constants = constants_of(empty_cache(problem, "cpu"), arch == "sm_100a", config)
    kernel = _by_blocks if config.by_blocks else _kv_norm_rope_insert
    return host.build(kernel, types, constants, arch, config.num_warps, unaligned=("positions_ptr", "slots_ptr", "M"))


def empty_cache(problem: KvNormRopeInsertProblem, device: str) -> PagedCache:
    """A page of the problem's format."""
    geometry = (problem.format, problem.page_size, problem.head_dim, problem.rope_dim)
    data = torch.empty(1, kv_layout(*geometry).page_bytes, dtype=torch.uint8, device=device)
    return PagedCache(data, *geometry)


def constants_of(cache: PagedCache, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    """The constexpr arguments of `insert_rows`."""
    own = {"E2M1_CVT": e2m1_cvt, "BLOCK_M": config.block_m, "PADDED": triton.next_power_of_2(cache.head_dim)}
    return cache_rows.constants(cache) | own
