"""A token's expert rows, weighted and summed in the order of its choices, plus the shared expert's row.

Memory bound: reads topk + 1 rows a token and writes one. One program a [block_m, block_k] tile of the output.

`order` says which slot lies at a place; a token needs the places of its slots. Where slots are few, each program holds
all of `order` and looks for its own (`search`), and one launch does; else a launch before turns `order` around, as a
search by every program would read more than the rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import CombineProblem

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin

LEAST_SEARCHED, MOST_SEARCHED = 32, 1024  # slots, all compared at once
MOST_TOPK = 32
TURN = 1024  # places a program turns around


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens by block_k columns a program; search: in one launch."""

    block_m: int = 1
    block_k: int = 1024
    num_warps: int = 4
    search: bool = False


SPACE = {
    "block_m": (1, 2, 4),
    "block_k": (256, 512, 1024),
    "num_warps": (1, 2, 4, 8),
    "search": (False, True),
}


def default(problem: CombineProblem) -> Config:
    """One launch up to 128 tokens of six slots; a warp a tile, which waits for no other, while a search is short."""
    slots = problem.m * problem.topk
    return Config(block_k=256, num_warps=1, search=True) if slots <= 128 else Config(search=slots <= 768)


def supports(problem: CombineProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"rows in {problem.x}, not one of {', '.join(host.DTYPES)}"
    if not 1 <= problem.topk <= MOST_TOPK:
        return f"topk={problem.topk} is not in 1 .. {MOST_TOPK}"
    slots = problem.m * problem.topk
    if slots >= 2**31:
        return f"{slots} slots do not fit into int32"
    if config.search and slots > MOST_SEARCHED:
        return f"search=True is for {MOST_SEARCHED} slots at most, got {slots}"
    held = config.block_m * config.block_k / (32 * config.num_warps)
    if not 8 <= held <= 32:
        return f"{held:g} columns a thread, not 8 to 32"
    held = config.block_m * _searched(slots) // (32 * config.num_warps)
    if config.search and held > 32:
        return f"block_m={config.block_m} num_warps={config.num_warps}: {held} slots a thread, more than 32"
    return None


@triton.jit(do_not_specialize=["slots"])
def _turn_around(order_ptr, place_ptr, slots, TURN: tl.constexpr):
    begin()
    places = tl.program_id(0) * TURN + tl.arange(0, TURN)
    slot = tl.load(order_ptr + places, mask=places < slots, other=-1)
    tl.store(place_ptr + slot, places, mask=(slot >= 0) & (slot < slots))


@triton.jit(do_not_specialize=["M"])
def _combine(
    y_ptr,
    stride_y,
    place_ptr,
    ids_ptr,
    weights_ptr,
    shared_ptr,
    stride_shared,
    out_ptr,
    M,
    K,
    SHARED: tl.constexpr,
    SEARCHED: tl.constexpr,
    TOPK: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = in_rows[:, None] & (cols < K)[None, :]
    at = rows.to(tl.int64)[:, None]  # the rows of a long batch pass 2**31 elements
    # all that needs no place is asked for before places are looked for
    ids: tl.tuple = ()
    weights: tl.tuple = ()
    for j in tl.static_range(TOPK):
        ids += (tl.load(ids_ptr + rows * TOPK + j, mask=in_rows, other=-1),)
        weights += (tl.load(weights_ptr + rows * TOPK + j, mask=in_rows, other=0.0),)
    if SHARED:
        shared = tl.load(shared_ptr + at * stride_shared + cols[None, :], mask=inside, other=0.0)
    if SEARCHED > 0:
        nth = tl.arange(0, SEARCHED)
        slot = tl.load(place_ptr + nth, mask=nth < M * TOPK, other=-1)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for j in tl.static_range(TOPK):
        if SEARCHED > 0:
            own = slot[None, :] == (rows * TOPK + j)[:, None]
            place = tl.max(tl.where(own, nth[None, :], 0), axis=1)
        else:
            place = tl.load(place_ptr + rows * TOPK + j, mask=in_rows, other=0)
        live = (ids[j] >= 0)[:, None]
        y = tl.load(y_ptr + place.to(tl.int64)[:, None] * stride_y + cols[None, :], mask=inside & live, other=0.0)
        acc += widen(y) * tl.where(live, weights[j][:, None], 0.0)
    if SHARED:
        acc += widen(shared)
    tl.store(out_ptr + at * K + cols[None, :], narrow(acc, out_ptr.dtype.element_ty, COMPILED), mask=inside)


def launch(
    y: Tensor,
    order: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    shared: Tensor | None,
    out: Tensor,
    config: Config,
) -> None:
    """y [m * topk, k] at the places of order int32 [m * topk], ids int32 and weights float32 [m, topk] -> out [m, k].

    y and shared [m, k] have rows of any stride, all else is contiguous. Raises ValueError for types that differ.
    """
    m, topk = topk_ids.shape
    k = y.shape[1]
    if shared is not None and shared.dtype != y.dtype:
        raise ValueError(f"shared must have the rows' type {y.dtype}, got {shared.dtype}")
    if m == 0:
        return
    places = order
    if not config.search:
        places = torch.empty_like(order)
        _turn_around[(triton.cdiv(m * topk, TURN),)](order, places, m * topk, TURN=TURN, num_warps=4)
    stride_shared = host.row_stride(shared) if shared is not None else 0
    constants = _constants(m, topk, shared is not None, y.is_cuda, config)
    operands = (y, host.row_stride(y), places, topk_ids, topk_weights, shared, stride_shared, out, m, k)
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k))
    _combine[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: CombineProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need, a search of as many slots."""
    m = max(1, problem.m) if config.search else 1
    slots = m * problem.topk
    y = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda").expand(slots, -1)
    order = torch.arange(slots, dtype=torch.int32, device="cuda")
    ids, weights = order.view(m, -1), torch.zeros(m, problem.topk, device="cuda")
    launch(y, order, ids, weights, y[:m] if problem.shared else None, torch.empty_like(y[:m].contiguous()), config)


def build_key(problem: CombineProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch, but for how many slots are searched."""
    return problem.x, problem.topk, problem.shared, _searched(problem.m * problem.topk) if config.search else 0


def build(problem: CombineProblem, config: Config, arch: str) -> Built:
    """The summing kernel compiled for `arch` without a GPU."""
    types = {"y_ptr": f"*{problem.x}", "stride_y": "i32", "place_ptr": "*i32", "ids_ptr": "*i32"}
    types |= {"weights_ptr": "*fp32", "stride_shared": "i32", "out_ptr": f"*{problem.x}", "M": "i32", "K": "i32"}
    constants = _constants(problem.m, problem.topk, bool(problem.shared), True, config)
    if problem.shared:
        types["shared_ptr"] = f"*{problem.x}"
    else:
        constants["shared_ptr"] = None
    return host.build(_combine, types, constants, arch, config.num_warps, unaligned=("M",))


def _searched(slots: int) -> int:
    return max(LEAST_SEARCHED, triton.next_power_of_2(slots))


def _constants(m: int, topk: int, shared: bool, compiled: bool, config: Config) -> dict[str, Any]:
    return {
        "SHARED": shared,
        "SEARCHED": _searched(m * topk) if config.search else 0,
        "TOPK": topk,
        "COMPILED": compiled,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
