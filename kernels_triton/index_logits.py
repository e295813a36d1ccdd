"""Scores of the indexer: for every query and entry, the weighted sum over heads of relu(q · k), from paged keys.

    score(t, i) = scale · Σ_h w(t, h) · relu(q(t, h) · k(i))        for i < (position + 1) // ratio, else −inf

Many queries of one sequence: bound by the tensor cores, 2 · heads · head_dim operations a score. Few: memory bound,
keys read once (132 bytes in fp8) and 4 bytes written a score.

One program block_n entries and block_m consecutive queries. Keys are loaded and decoded once for each run of queries
of one sequence; q, weights and products pass query by query. Operands are BF16 where q is, which holds keys of every
format but fp32 exactly, under the power of two that fp8 has for a row, which is applied to the sum; E4M3 where q and
the keys are, at twice the rate; else FP32.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import arch as archs
from fp4suite.built import Built
from fp4suite.formats import IndexCache, index_layout
from fp4suite.problem import IndexLogitsProblem

from . import host
from .cache_rows import MX_BLOCK
from .nvfp4 import BLOCK, e4m3_to_f32, times_e2m1, widen
from .overlap import begin
from .rounding import CVT


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m queries by block_n entries a program."""

    block_m: int = 8
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3


SPACE = {"block_m": (1, 4, 8, 16, 32), "block_n": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
INVARIANT = "block_n=128 num_warps=4"
PLAIN = {"block_n": 32, "num_warps": 8, "num_stages": 2}  # without tensor cores, in FP32: other tiles spill


def supports(problem: IndexLogitsProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p = problem
    if p.x not in ("bf16", "fp32", "fp8"):
        return f"q in {p.x}: only fp8, bf16 and fp32 are multiplied"
    if p.x == "fp8" and p.format != "fp8":
        return f"q in fp8, keys in {p.format}: both have to be"
    if p.head_dim % 16 or (p.format == "mxfp4" and p.head_dim % 32):
        return f"head_dim={p.head_dim} is not a multiple of {32 if p.format == 'mxfp4' else 16}"
    if not 1 <= p.heads <= 128:
        return f"heads={p.heads}: a program holds up to 128"
    if in_fp32(p):
        return None
    # with fewer rows than 16 a warp the heads of an entry would be spread over warps
    if config.block_n < 16 * config.num_warps:
        return f"block_n={config.block_n} is less than 16 entries a warp: num_warps={config.num_warps}"
    held = config.block_n * triton.next_power_of_2(p.heads) / (32 * config.num_warps)
    if held > 64:
        return f"block_n={config.block_n} num_warps={config.num_warps}: {held:g} products a thread, more than 64"
    return None


def in_fp32(problem: IndexLogitsProblem) -> bool:
    """Whether the products are FP32's, which tensor cores do not have."""
    return "fp32" in (problem.format, problem.x)


def effective(config: Config, fp32: bool) -> Config:
    """The config that runs: products in FP32 have one tile."""
    return replace(config, block_m=8, **PLAIN) if fp32 else config


def default(problem: IndexLogitsProblem) -> Config:
    """Single queries where each has a sequence of its own; larger blocks of codes, so that q is read less often."""
    if problem.m <= problem.sequence_count:
        return Config(block_m=1)
    if problem.m >= 512 and (problem.x == "fp8" or problem.format == "mxfp4"):
        return Config(block_m=32, block_n=256, num_warps=8)
    # of BF16 two stages: three programs share an SM, so that one multiplies while others add up heads
    return Config(block_m=8 if problem.m < 512 else 16, num_stages=3 if problem.x == "fp8" else 2)


def arithmetic(problem: IndexLogitsProblem, config: Config) -> str:
    """How the heads of an entry are spread over threads, which add them up."""
    if in_fp32(problem):
        return INVARIANT  # all configs are one
    return f"block_n={config.block_n} num_warps={config.num_warps}"


def in_arithmetic(problem: IndexLogitsProblem, wanted: str) -> Config:
    """The default but for what `arithmetic` says."""
    block_n, num_warps = (int(part.partition("=")[2]) for part in wanted.split())
    return Config(block_m=default(problem).block_m, block_n=block_n, num_warps=num_warps)


# Of four bytes each as two codes of E2M1 in BF16, times a power of two of its own: the bits of a code, put where BF16
# has its sign and the lowest three of exponent and mantissa, are it times 2^-126, subnormal numbers included.
_DECODE = tl.constexpr(
    "{ .reg .b32 x, a, b;"
    + "".join(
        f"prmt.b32 x, $4, 0, 0x444{i}; mul.lo.u32 a, x, 0x40040; mul.lo.u32 b, x, 0x1001000;"
        "and.b32 a, a, 0x01C001C0; lop3.b32 a, a, b, 0x80008000, 0xF8;"
        f"mov.b32 b, 0x7E807E80; mul.rn.bf16x2 a, a, b; mul.rn.bf16x2 ${i}, a, ${5 + i};"
        for i in range(4)
    )
    + "}"
)


@triton.jit
def _e2m1_bf16(packed, scale, N: tl.constexpr, BLOCKS: tl.constexpr):
    """BF16 [N, 32 * BLOCKS] of the codes in packed [N, BLOCKS, 16] (uint8), times powers of two, E8M0 [N, BLOCKS]."""
    twice = (scale.to(tl.int32) * 0x800080)[:, :, None] + tl.zeros([1, 1, 16], tl.int32)
    pairs = tl.inline_asm_elementwise(_DECODE, "=r,=r,=r,=r,r,r,r,r,r", [packed, twice], tl.int32, True, 4)
    both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return both.to(tl.bfloat16, bitcast=True).reshape(N, 32 * BLOCKS)


@triton.jit
def _load_keys(
    cache_ptr, slots, FORMAT: tl.constexpr, FP32: tl.constexpr, FP8: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Keys [N, D] at slots [N] (zeros where negative), and what their products are to be multiplied by [N]."""
    there = slots >= 0
    slots = tl.where(there, slots, 0).to(tl.int64)  # before the multiply: a cache passes 2**31 bytes
    pages = slots // PAGE_SIZE * PAGE_BYTES
    rows = pages + slots % PAGE_SIZE * ROW_BYTES
    scales = pages + PAGE_SIZE * ROW_BYTES + slots % PAGE_SIZE * SCALE_BYTES
    cols = tl.arange(0, D)
    inside = there[:, None] & (cols < HEAD_DIM)[None, :]
    factor = tl.full([N], 1.0, tl.float32)
    if FORMAT == "fp32":
        at = cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + (rows // 4)[:, None] + cols[None, :]
        keys = tl.load(at, mask=inside, other=0.0)
    elif FORMAT == "bf16":
        at = cache_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (rows // 2)[:, None] + cols[None, :]
        keys = tl.load(at, mask=inside, other=0.0)
        if FP32 or not CVT:  # the interpreter multiplies in FP32
            keys = widen(keys)
    elif FORMAT == "fp8":
        at = cache_ptr + rows[:, None] + cols[None, :]
        if CVT and FP8:  # no bytes that become numbers: those would go to the tensor core through registers
            keys = tl.load(at.to(tl.pointer_type(tl.float8e4nv), bitcast=True), mask=inside, other=0.0)
        elif CVT:
            byte = tl.load(at, mask=inside, other=0)
            keys = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32 if FP32 else tl.bfloat16)
        else:
            keys = e4m3_to_f32(tl.load(at, mask=inside, other=0))
        if ROW_BYTES % 4 == 0 and PAGE_BYTES % 4 == 0:
            at = cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + scales // 4
            factor = tl.load(at, mask=there, other=0.0)
        else:
            word = tl.arange(0, 4)[None, :]
            parts = tl.load(cache_ptr + scales[:, None] + word, mask=there[:, None], other=0).to(tl.int32)
            factor = tl.sum(parts << (8 * word), axis=1).to(tl.float32, bitcast=True)
    elif FORMAT == "mxfp4" and CVT and not FP32:
        pairs, blocks = tl.arange(0, D // 2), tl.arange(0, D // MX_BLOCK)
        inside = there[:, None] & (pairs < HEAD_DIM // 2)[None, :]
        packed = tl.load(cache_ptr + rows[:, None] + pairs[None, :], mask=inside, other=0)
        packed = packed.reshape(N, D // MX_BLOCK, MX_BLOCK // 2)
        if SCALE_BYTES == 4 and ROW_BYTES % 4 == 0 and PAGE_BYTES % 4 == 0:
            at = cache_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + scales // 4
            scale = tl.load(at, mask=there, other=0)[:, None] >> (8 * blocks)[None, :] & 0xFF
        else:
            inside = there[:, None] & (blocks * MX_BLOCK < HEAD_DIM)[None, :]
            scale = tl.load(cache_ptr + scales[:, None] + blocks[None, :], mask=inside, other=127)
        keys = _e2m1_bf16(packed, scale, N, D // MX_BLOCK)
    else:
        tl.static_assert(FORMAT == "mxfp4", "unknown index format")
        blocks = tl.arange(0, D // BLOCK)
        pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        inside = there[:, None] & (blocks * BLOCK < HEAD_DIM)[None, :]
        packed = tl.load(cache_ptr + rows[:, None, None] + pairs[None, :, :], mask=inside[:, :, None], other=0)
        at = cache_ptr + scales[:, None] + (blocks * BLOCK // MX_BLOCK)[None, :]
        scale = (tl.load(at, mask=inside, other=127).to(tl.int32) << 23).to(tl.float32, bitcast=True)
        one = tl.full([N, D // BLOCK], 1.0, tl.float32)
        keys = (times_e2m1(one, packed, N, D // BLOCK) * scale[:, :, None]).reshape(N, D)
    return keys, factor


@triton.jit
def _load_run(
    first, end, group, sequences, visible, entries, cache_ptr, table_ptr, stride_table, ENTRIES, FORMAT: tl.constexpr,
    FP32: tl.constexpr, FP8: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The run of queries of one sequence that begins at `first`: its end, how many entries one of them sees, keys."""
    if BLOCK_M == 1:
        stop, sequence, last = end, tl.max(sequences), tl.max(visible)
    else:
        sequence = tl.max(tl.where(group == first, sequences, -1))
        stop = tl.min(tl.where((group > first) & (sequences != sequence), group, end))
        last = tl.max(tl.where((group >= first) & (group < stop), visible, 0))
    last = tl.where(sequence >= 0, last, 0)
    pages = table_ptr + tl.maximum(sequence, 0).to(tl.int64) * stride_table
    page = tl.load(pages + entries // PAGE_SIZE, mask=entries < tl.minimum(last, ENTRIES), other=-1)
    slots = tl.where(page >= 0, page * PAGE_SIZE + entries % PAGE_SIZE, -1)
    keys, factor = _load_keys(
        cache_ptr, slots, FORMAT, FP32, FP8, HEAD_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, N, D
    )
    return stop, last, keys, factor


@triton.jit
def _load_query(
    q_at, stride_m, w_at, stride_w, token, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """q [H, D] of a token and its weights [1, H] in FP32."""
    # int64 before the multiply: a long batch passes 2**31 elements
    row = token + tl.zeros([1, 1], tl.int64)
    if HEADS == H and HEAD_DIM == D:
        q = tl.load(q_at + row * stride_m)
        w = tl.load(w_at + row * stride_w)
    else:
        heads = tl.arange(0, H)
        inside = (heads < HEADS)[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :]
        q = tl.load(q_at + row * stride_m, mask=inside, other=0.0)
        w = tl.load(w_at + row * stride_w, mask=heads[None, :] < HEADS, other=0.0)
    return q, widen(w)


@triton.jit
def _multiply(q, keys, FP32: tl.constexpr, FP8: tl.constexpr):
    """Products [N, H]."""
    if FP8 and not CVT:
        dots = tl.dot(keys, tl.trans(e4m3_to_f32(q.to(tl.uint8, bitcast=True))), input_precision="ieee")
    elif FP32 or not CVT:
        dots = tl.dot(keys, tl.trans(widen(q)), input_precision="ieee")
    else:
        dots = tl.dot(keys, tl.trans(q))
    return dots


@triton.jit
def _store(dots, w, factor, entries, since, position, out_ptr, token, ENTRIES):
    """Scores of entries that can be seen since a position: to divide each query's would take twenty instructions."""
    score = tl.sum(tl.maximum(dots, 0.0) * w, axis=1) * factor
    score = tl.where(since <= position, score, float("-inf"))
    at = out_ptr + (token + tl.zeros([1], tl.int64)) * ENTRIES + entries
    tl.store(at, score, mask=entries < ENTRIES)


@triton.jit(do_not_specialize=["TOKENS"])
def _index_logits(
    q_ptr, stride_m, stride_h, weights_ptr, stride_w, cache_ptr, table_ptr, stride_table, positions_ptr,
    sequence_ids_ptr, ratio, scale, out_ptr, TOKENS, ENTRIES, FORMAT: tl.constexpr, FP32: tl.constexpr,
    FP8: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, TENSOR_MEMORY: tl.constexpr, BLOCK_M: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    begin()
    entries = tl.program_id(1) * N + tl.arange(0, N)
    cols = tl.arange(0, D)
    heads = tl.arange(0, H)
    first = tl.program_id(0) * BLOCK_M
    end = tl.minimum(first + BLOCK_M, TOKENS)
    group = first + tl.arange(0, BLOCK_M)
    sequences = tl.load(sequence_ids_ptr + group, mask=group < end, other=-1)
    visible = (tl.load(positions_ptr + group, mask=group < end, other=-1) + 1) // ratio
    q_at = q_ptr + heads.to(tl.int64)[:, None] * stride_h + cols[None, :]
    w_at = weights_ptr + heads[None, :]
    since = (entries + 1) * ratio - 1
    if BLOCK_M == 1:  # on their way before keys are
        position = tl.load(positions_ptr + first)
        q, w = _load_query(q_at, stride_m, w_at, stride_w, first, HEADS, HEAD_DIM, H, D)
    # Keys that are computed pass from one turn to the next, for such operands Triton keeps in shared memory: others in
    # registers, to which each query's product would take them again.
    PASSED: tl.constexpr = not FP32 and (FORMAT == "mxfp4" or (FORMAT == "fp8" and not FP8))
    if PASSED:
        stop, last, keys, factor = _load_run(
            first, end, group, sequences, visible, entries, cache_ptr, table_ptr, stride_table, ENTRIES, FORMAT, FP32,
            FP8, HEAD_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, BLOCK_M, N, D,
        )  # fmt: skip
    while first < end:
        if not PASSED:
            stop, last, keys, factor = _load_run(
                first, end, group, sequences, visible, entries, cache_ptr, table_ptr, stride_table, ENTRIES, FORMAT,
                FP32, FP8, HEAD_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, BLOCK_M, N, D,
            )  # fmt: skip
        if last > tl.program_id(1) * N:
            if BLOCK_M == 1:
                dots = _multiply(q, keys, FP32, FP8)
                _store(dots, w, factor * scale, entries, since, position, out_ptr, first, ENTRIES)
            else:
                for token in range(first, stop):
                    q, w = _load_query(q_at, stride_m, w_at, stride_w, token, HEADS, HEAD_DIM, H, D)
                    position = tl.load(positions_ptr + token)
                    dots = _multiply(q, keys, FP32, FP8)
                    if TENSOR_MEMORY:  # all warps have read the products before one begins those of the next query
                        tl.debug_barrier()
                    _store(dots, w, factor * scale, entries, since, position, out_ptr, token, ENTRIES)
        else:
            for token in range(first, stop):
                at = out_ptr + (token + tl.zeros([1], tl.int64)) * ENTRIES + entries
                tl.store(at, tl.full([N], float("-inf"), tl.float32), mask=entries < ENTRIES)
        first = stop
        if PASSED and BLOCK_M == 1:
            keys = tl.zeros_like(keys)
        elif PASSED:
            stop, last, keys, factor = _load_run(
                first, end, group, sequences, visible, entries, cache_ptr, table_ptr, stride_table, ENTRIES, FORMAT,
                FP32, FP8, HEAD_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, BLOCK_M, N, D,
            )  # fmt: skip


def launch(
    q: Tensor,
    weights: Tensor,
    cache: IndexCache,
    block_table: Tensor,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    scale: float,
    out: Tensor,
    config: Config,
) -> None:
    """q [m, heads, head_dim] and weights [m, heads], dims and heads contiguous -> out FP32 [m, entries], contiguous.

    q in float8_e4m3fn has no scale: that of a head belongs into its weight.
    """
    (m, heads, _), entries = q.shape, out.shape[1]
    if m == 0 or entries == 0:
        return
    fp32 = cache.format == "fp32" or q.dtype == torch.float32
    config = effective(config, fp32)
    constants = _constants(cache, heads, fp32, q.dtype == torch.float8_e4m3fn, archs.of(q.device), config)
    operands = (q, q.stride(0), q.stride(1), weights, host.row_stride(weights), cache.data, block_table)
    sizes = (host.row_stride(block_table), positions, sequence_ids, ratio, scale, out, m, entries)
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(entries, constants["N"]))
    _index_logits[grid](*operands, *sizes, **constants, **_options(constants, config))


def warm(problem: IndexLogitsProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    p = problem
    dtype = torch.float8_e4m3fn if p.x == "fp8" else host.DTYPES[p.x]
    q = torch.zeros(1, p.heads, p.head_dim, dtype=dtype, device="cuda")
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    pages = triton.cdiv(p.entries, p.page_size)
    table = nothing[None].expand(1, pages).contiguous()
    out, weights = torch.zeros(1, pages * p.page_size, device="cuda"), torch.zeros(1, p.heads, device="cuda")
    launch(q, weights, _cache(p, "cuda"), table, nothing, nothing - 1, 4, 1.0, out, config)


def build_key(problem: IndexLogitsProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and the entries are read at launch."""
    return problem.x, problem.format, problem.heads, problem.head_dim, problem.page_size


def build(problem: IndexLogitsProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    p = problem
    config = effective(config, in_fp32(p))
    types = {"q_ptr": "*fp8e4nv" if p.x == "fp8" else f"*{p.x}", "stride_m": "i32", "stride_h": "i32"}
    types |= {"weights_ptr": "*fp32", "stride_w": "i32"}
    types |= {"cache_ptr": "*u8", "table_ptr": "*i32", "stride_table": "i32", "positions_ptr": "*i32"}
    types |= {"sequence_ids_ptr": "*i32", "ratio": "i32", "scale": "fp32", "out_ptr": "*fp32"}
    types |= {"TOKENS": "i32", "ENTRIES": "i32"}
    constants = _constants(_cache(p, "cpu"), p.heads, in_fp32(p), p.x == "fp8", arch, config)
    unaligned = ("stride_table", "ratio", "TOKENS")
    return host.build(_index_logits, types, constants, arch, unaligned=unaligned, **_options(constants, config))


def _cache(p: IndexLogitsProblem, device: str) -> IndexCache:
    data = torch.zeros(1, index_layout(p.format, p.page_size, p.head_dim).page_bytes, dtype=torch.uint8)
    return IndexCache(data.to(device), p.format, p.page_size, p.head_dim)


def _constants(cache: IndexCache, heads: int, fp32: bool, fp8: bool, arch: str, config: Config) -> dict[str, Any]:
    layout = cache.layout
    return {
        "FORMAT": cache.format,
        "FP32": fp32,
        "FP8": fp8,
        "HEADS": heads,
        "HEAD_DIM": cache.head_dim,
        "PAGE_SIZE": cache.page_size,
        "ROW_BYTES": layout.row_bytes,
        "SCALE_BYTES": layout.scale_bytes,
        "PAGE_BYTES": layout.page_bytes,
        "TENSOR_MEMORY": arch == "sm_100a",
        "BLOCK_M": config.block_m,
        "N": config.block_n,
        "H": max(16, triton.next_power_of_2(heads)),
        "D": max(16, triton.next_power_of_2(cache.head_dim)),
    }


def _options(constants: dict[str, Any], config: Config) -> dict[str, Any]:
    # bits are not the reference's anyhow: a product with a weight and the sum over heads are one FFMA
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if constants["FP8"] and not constants["TENSOR_MEMORY"]:
        # left alone it takes 155: one program of eight warps an SM, whose tensor cores wait while it adds up heads
        options["maxnreg"] = 128 if config.num_warps >= 8 else 160
    return options
