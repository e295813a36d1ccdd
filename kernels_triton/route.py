"""Expert choice of each token: scores, top-k with ties to the lowest expert, weights renormalised; one launch.

Bound by issue where experts are chosen by score: every round of the choice takes six instructions an expert and token
beside the 50 of a score, against 4 bytes read. Where a table of token ids chooses, only the chosen logits are read.
One program block_m tokens, with their scores in registers as order-preserving integers, CHUNK experts a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import RouteProblem
from fp4suite.reference import router

from . import host
from .nvfp4 import exp_neg, pair_sum, widen

MOST_EXPERTS = 1024
MOST_TOPK = 32
CHUNK = 128
REGISTERS = 128  # of a thread that may hold keys

UNDERFLOW = tl.constexpr(router.UNDERFLOW)
LOG1P_0, LOG1P_1, LOG1P_2, LOG1P_3, LOG1P_4, LOG1P_5, LOG1P_6, LOG1P_7 = (
    tl.constexpr(c) for c in router.LOG1P_COEFFICIENTS
)
LARGEST = tl.constexpr(0x7FFFFFFF)
TAKEN = tl.constexpr(-0x80000000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens a program."""

    block_m: int = 1
    num_warps: int = 1


SPACE = {"block_m": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)}


def default(problem: RouteProblem) -> Config:
    """A warp a token where tokens are few; more of both where they are many."""
    return Config() if problem.m <= 256 else Config(block_m=4, num_warps=4)


def supports(problem: RouteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"logits in {problem.x}, not one of {', '.join(host.DTYPES)}"
    if not 1 <= problem.topk <= min(problem.experts, MOST_TOPK):
        return f"topk={problem.topk} is not in 1 .. min(experts={problem.experts}, {MOST_TOPK})"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    wide = 1 if problem.choice == "table" else CHUNK * _chunks(problem.experts)
    held = config.block_m * wide / (32 * config.num_warps)
    return None if held <= REGISTERS else f"{held:g} keys a thread spill: {REGISTERS} are held"


@triton.jit
def _affinity(x):
    """sqrt(softplus(x)) by the operations of `reference.router`."""
    magnitude = tl.abs(x)
    e = tl.where(magnitude < UNDERFLOW, exp_neg(magnitude), 0.0)
    p = (((((LOG1P_7 * e + LOG1P_6) * e + LOG1P_5) * e + LOG1P_4) * e + LOG1P_3) * e + LOG1P_2) * e
    p = (p + LOG1P_1) * e + LOG1P_0
    return tl.sqrt_rn(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + p * e)


@triton.jit
def _keys(logits_ptr, stride_m, bias_ptr, rows, cols, inside, E, BIASED: tl.constexpr):
    """What rows and columns rank by, as integers in the same order: NaN above all, what lies outside below all."""
    s = _affinity(widen(tl.load(logits_ptr + rows[:, None] * stride_m + cols[None, :], mask=inside, other=0.0)))
    if BIASED:
        s += tl.load(bias_ptr + cols, mask=cols < E, other=0.0)[None, :]
    bits = s.to(tl.int32, bitcast=True)
    key = tl.where(s == s, bits ^ ((bits >> 31) & LARGEST), LARGEST)
    return tl.where(inside, key, TAKEN)


@triton.jit
def _choose(
    logits_ptr, stride_m, bias_ptr, rows, in_rows, E,
    BIASED: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The experts of each row by falling key, the lowest first among equals: int32 [ROWS, CHOICES]."""
    cols = tl.arange(0, CHUNK)
    keys = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + cols
        inside = in_rows[:, None] & (at < E)[None, :]
        keys += (_keys(logits_ptr, stride_m, bias_ptr, rows, at, inside, E, BIASED),)  # type: ignore[assignment]
    choice = tl.arange(0, CHOICES)
    ids = tl.full((ROWS, CHOICES), 0, tl.int32)
    for j in tl.static_range(TOPK):
        most = keys[0]  # type: ignore[misc]
        for c in tl.static_range(1, CHUNKS):
            most = tl.maximum(most, keys[c])
        best = tl.max(most, axis=1)[:, None]
        where = tl.where(keys[0] == best, cols[None, :], LARGEST)  # type: ignore[misc]
        for c in tl.static_range(1, CHUNKS):
            where = tl.minimum(where, tl.where(keys[c] == best, c * CHUNK + cols[None, :], LARGEST))
        expert = tl.min(where, axis=1)[:, None]
        ids = tl.where(choice[None, :] == j, expert, ids)
        left = ()
        for c in tl.static_range(CHUNKS):
            left += (tl.where(c * CHUNK + cols[None, :] == expert, TAKEN, keys[c]),)  # type: ignore[assignment]
        keys = left
    return ids


@triton.jit(do_not_specialize=["M", "V"])
def _route(
    logits_ptr,
    stride_m,
    bias_ptr,
    token_ptr,
    table_ptr,
    ids_ptr,
    weights_ptr,
    M,
    V,
    E,
    scale,
    CHOICE: tl.constexpr,
    TOPK: tl.constexpr,
    CHOICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # int64 before the multiply: a long batch of logits and a large table pass 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    choice = tl.arange(0, CHOICES)
    inside = in_rows[:, None] & (choice < TOPK)[None, :]
    if CHOICE == "table":
        token = tl.load(token_ptr + rows, mask=in_rows, other=-1).to(tl.int64)[:, None]
        known = inside & (token >= 0) & (token < V)
        ids = tl.load(table_ptr + token * TOPK + choice[None, :], mask=known, other=-1).to(tl.int32)
    else:
        ids = _choose(
            logits_ptr, stride_m, bias_ptr, rows, in_rows, E,
            CHOICE == "bias", TOPK, CHOICES, BLOCK_M, CHUNKS, CHUNK,
        )  # fmt: skip
    chosen = inside & (ids >= 0) & (ids < E)
    s = _affinity(widen(tl.load(logits_ptr + rows[:, None] * stride_m + ids, mask=chosen, other=0.0)))
    s = tl.where(chosen, s, 0.0)
    total = pair_sum(s.reshape(BLOCK_M, 1, CHOICES), BLOCK_M, 1, CHOICES)
    at = rows[:, None] * TOPK + choice[None, :]
    tl.store(ids_ptr + at, ids, mask=inside)
    tl.store(weights_ptr + at, tl.div_rn(s, total + 1e-20) * scale, mask=inside)


def launch(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    table: Tensor | None,
    scale: float,
    out: tuple[Tensor, Tensor],
    config: Config,
) -> None:
    """logits [m, experts], rows of any stride, bias float32 [experts] -> ids int32 and weights float32 [m, topk].

    With token_ids int [m] and table int [vocab, topk], both contiguous, the table chooses; a token id outside of it
    gets the expert -1, and an expert that does not exist the weight 0.
    """
    ids, weights = out
    (m, experts), topk = logits.shape, ids.shape[1]
    if m == 0:
        return
    choice = "table" if table is not None else "bias" if bias is not None else "score"
    vocab = len(table) if table is not None else 0
    operands = (logits, host.row_stride(logits), bias, token_ids, table, ids, weights, m, vocab, experts, scale)
    constants = _constants(choice, experts, topk, config)
    _route[(triton.cdiv(m, config.block_m),)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: RouteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    logits = torch.zeros(1, problem.experts, dtype=host.DTYPES[problem.x], device="cuda")
    bias = logits[0].float() if problem.choice == "bias" else None
    table = logits.new_zeros(1, problem.topk, dtype=torch.int32) if problem.choice == "table" else None
    tokens = logits.new_zeros(1, dtype=torch.int64) if problem.choice == "table" else None
    out = logits.new_empty(1, problem.topk, dtype=torch.int32), logits.new_empty(1, problem.topk, dtype=torch.float32)
    launch(logits, bias, tokens, table, 1.0, out, config)


def build_key(problem: RouteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch, experts within their chunks."""
    return problem.x, problem.choice, problem.topk, _chunks(problem.experts)


def build(problem: RouteProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"logits_ptr": f"*{problem.x}", "stride_m": "i32", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    types |= {"M": "i32", "V": "i32", "E": "i32", "scale": "fp32"}
    constants: dict[str, Any] = _constants(problem.choice, problem.experts, problem.topk, config)
    absent = {"bias_ptr": "*fp32", "token_ptr": "*i64", "table_ptr": "*i32"}
    present = {"score": (), "bias": ("bias_ptr",), "table": ("token_ptr", "table_ptr")}[problem.choice]
    types |= {name: absent.pop(name) for name in present}
    return host.build(_route, types, constants | dict.fromkeys(absent), arch, config.num_warps, unaligned=("M", "V"))


def _constants(choice: str, experts: int, topk: int, config: Config) -> dict[str, Any]:
    return {
        "CHOICE": choice,
        "TOPK": topk,
        "CHOICES": triton.next_power_of_2(topk),
        "CHUNKS": _chunks(experts),
        "CHUNK": CHUNK,
        "BLOCK_M": config.block_m,
    }


def _chunks(experts: int) -> int:
    return triton.cdiv(experts, CHUNK)
