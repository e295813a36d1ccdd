"""The indexer's queries: RoPE, optionally Hadamard, then the rounding that keys of an index format get when stored.

Memory bound: reads and writes 2 bytes a dim (BF16). One program block_h heads of one token, `turns` times. What is
rounded comes out as numbers again, every format but fp32 exactly in BF16; or, in fp8, as E4M3 bytes, for `index_logits`
to multiply, while the power of two of a head goes into its weight.

A head is held in pieces of 32 columns, a block of mxfp4 each, by LANES threads of VECTOR adjacent columns: all stays
within a thread, but for as many levels of the Hadamard transform and maxima. Pieces without RoPE look up no angle.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import MX_BLOCK as _MX_BLOCK
from fp4suite.problem import IndexQueryProblem

from . import host
from .cache_rows import FP8_FLOOR, MX_FLOOR, at_least
from .nvfp4 import e2m1_round, e4m3_to_f32, magnitude_bits, most_of_eight, narrow, widen
from .overlap import begin
from .rope import head_strides, refuse_heads, turn_pairs
from .rounding import CVT, bf16_bits, e4m3_bits, e8m0_of_6, e8m0_of_448, e8m0_reciprocal, rounded

PROGRAMS, MOST_TURNS = 8192, 8  # programs of one warp, of which an H100 holds 4224
PIECE = tl.constexpr(_MX_BLOCK)
# two BF16 numbers over powers of two 2^e, e + 127 in $2 and $3, to E2M1 and back: beyond 64, 128 and 256 BF16 numbers
# lie 1/2, 1 and 2 apart, as E2M1's do up to 2, 4 and 6
ROUND_PAIR = tl.constexpr("""
{
.reg .b32 over, scale, a, p, six, one, far;
mov.b32 six, 0x40C040C0;
mov.b32 one, 0x3F803F80;
mov.b32 far, 0x42804280;
prmt.b32 scale, $2, $3, 0x5410;
sub.s32 over, 0x00FE00FE, scale;
shl.b32 over, over, 7;
shl.b32 scale, scale, 7;
mul.rn.bf16x2 over, $1, over;
and.b32 a, over, 0x7FFF7FFF;
min.bf16x2 a, a, six;
and.b32 p, a, 0x7F807F80;
max.bf16x2 p, p, one;
mul.rn.bf16x2 p, p, far;
add.rn.bf16x2 a, a, p;
sub.rn.bf16x2 a, a, p;
lop3.b32 a, a, over, 0x80008000, 0xF8;
mul.rn.bf16x2 $0, a, scale;
}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A head by `lanes` threads, as many heads of a token a program as fill its warps, the next ones after that."""

    num_warps: int = 4
    lanes: int = 4
    turns: int = 1

    @property
    def block_h(self) -> int:
        """Heads of a program at a time."""
        return 32 * self.num_warps // self.lanes


SPACE = {"num_warps": (1, 2, 4, 8), "lanes": (4, 8, 16), "turns": (1, 2, 4, 8, 16)}


def supports(problem: IndexQueryProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p = problem
    if p.codes and p.format != "fp8":
        return f"only fp8 has codes that can be multiplied, got format={p.format}"
    if p.hadamard and triton.next_power_of_2(p.head_dim) != p.head_dim:
        return f"a Hadamard transform needs a power of two, got head_dim={p.head_dim}"
    if p.hadamard and p.head_dim < _MX_BLOCK:
        return f"a Hadamard transform is of {_MX_BLOCK} dims or more here, got head_dim={p.head_dim}"
    if p.format == "mxfp4" and p.head_dim % _MX_BLOCK:
        return f"mxfp4 has blocks of {_MX_BLOCK} dims, got head_dim={p.head_dim}"
    if why := refuse_heads(p.head_dim, p.rope_dim, p.x):
        return why
    if config.block_h * (config.turns - 1) >= p.heads:
        return f"{p.heads} heads are too few for {config.turns} turns of {config.block_h}"
    held = triton.cdiv(p.head_dim, _MX_BLOCK) * _MX_BLOCK // config.lanes
    if held > host.MOST:
        return f"head_dim={p.head_dim} lanes={config.lanes}: {held} elements a thread, more than {host.MOST}"
    return None


def default(problem: IndexQueryProblem) -> Config:
    """One warp (four took twice as long): for many tokens four or eight heads at a time, for few as few columns a
    thread. What an H100 holds twice over need not be more programs: they take turns.
    """
    heads = problem.m * problem.heads if problem.head_dim <= 256 else 0
    lanes = 16
    if heads >= 1 << (13 if problem.hadamard else 12):
        lanes = 8 if problem.hadamard or heads <= 1 << 14 else 4
    config = Config(num_warps=1, lanes=lanes)
    blocks = triton.cdiv(problem.heads, config.block_h)
    turns = max(1, min(blocks, MOST_TURNS, problem.m * blocks // PROGRAMS))
    return replace(config, turns=1 << turns.bit_length() - 1)


@triton.jit
def _e4m3_round(t):
    """FP32 -> the nearest E4M3 number, saturating."""
    if CVT:
        return t.to(tl.float8e4nv).to(tl.float32)
    else:
        return e4m3_to_f32(e4m3_bits(t))


@triton.jit
def _e2m1_round(t):
    """FP32 -> the nearest E2M1 number, saturating, with the sign of -0; NaN gives 6."""
    t = tl.where(t < 6.0, t, 6.0)
    sign = t.to(tl.int32, bitcast=True) & -2147483648
    return (tl.abs(e2m1_round(t)).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _index_query(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, out_ptr, weights_ptr, stride_w, scaled_ptr, HEADS,
    FORMAT: tl.constexpr, HADAMARD: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, LANES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    begin()
    for turn in range(TURNS):
        round_heads(
            tl.program_id(0), tl.program_id(1) * TURNS + turn, q_ptr, stride_m, stride_h, positions_ptr, table_ptr,
            out_ptr, weights_ptr, stride_w, scaled_ptr, HEADS, FORMAT, HADAMARD, HEAD_DIM, ROPE_DIM, BLOCK_H, LANES,
        )  # fmt: skip


@triton.jit
def round_heads(
    token, block, q_ptr, stride_m, stride_h, positions_ptr, table_ptr, out_ptr, weights_ptr, stride_w, scaled_ptr,
    HEADS, FORMAT: tl.constexpr, HADAMARD: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Block of BLOCK_H heads of a token; to codes where there are weights."""
    VECTOR: tl.constexpr = PIECE // LANES
    # int64 before the multiply: a long batch passes 2**31 elements
    token = token.to(tl.int64)
    heads = (block.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
    position = tl.load(positions_ptr + token + tl.zeros([BLOCK_H, LANES, VECTOR // 2], tl.int32))
    if weights_ptr is not None:
        weights = widen(tl.load(weights_ptr + token * stride_w + heads, mask=heads < HEADS, other=0.0))
    PIECES: tl.constexpr = (HEAD_DIM + PIECE - 1) // PIECE
    at = q_ptr + token * stride_m + heads * stride_h
    loaded = _nothing()
    for i in tl.static_range(PIECES):
        loaded += (tl.load(at + _columns(i, LANES), mask=_inside(heads, HEADS, i, HEAD_DIM, LANES), other=0.0),)
    x = _nothing()
    for i in tl.static_range(PIECES):
        x += (_turn(widen(loaded[i]), position, table_ptr, i, HEAD_DIM, ROPE_DIM, LANES),)
    if HADAMARD:
        x = _hadamard(x, BLOCK_H, LANES)
    at = out_ptr + (token * HEADS + heads) * HEAD_DIM
    if FORMAT == "fp8":
        y = _nothing()
        for i in tl.static_range(PIECES):
            y += (rounded(x[i], tl.bfloat16),)
        most = magnitude_bits(y[0])
        for i in tl.static_range(1, PIECES):
            most = tl.maximum(most, magnitude_bits(y[i]))
        most = tl.max(tl.max(most, 2), 1)[:, None, None]
        byte = e8m0_of_448(at_least(most, FP8_FLOOR))
        scale = (byte << 23).to(tl.float32, bitcast=True)
        for i in tl.static_range(PIECES):
            t = y[i] * e8m0_reciprocal(byte)
            if weights_ptr is None:
                t = narrow(_e4m3_round(t) * scale, out_ptr.dtype.element_ty, CVT)
            else:
                t = e4m3_bits(t)
            tl.store(at + _columns(i, LANES), t, mask=_inside(heads, HEADS, i, HEAD_DIM, LANES))
        if weights_ptr is not None:
            tl.store(scaled_ptr + token * HEADS + heads, weights * scale, mask=heads < HEADS)
    else:
        for i in tl.static_range(PIECES):
            y = x[i]
            if FORMAT == "bf16":
                y = rounded(y, tl.bfloat16)
            elif FORMAT == "mxfp4":
                y = _mx_round(y)
            else:
                tl.static_assert(FORMAT == "fp32", "unknown index format")
            if y.dtype != out_ptr.dtype.element_ty:
                y = narrow(widen(y), out_ptr.dtype.element_ty, CVT)
            tl.store(at + _columns(i, LANES), y, mask=_inside(heads, HEADS, i, HEAD_DIM, LANES))


@triton.jit
def _nothing():
    return ()


@triton.jit
def _columns(i, LANES: tl.constexpr):
    """Columns of piece i: [1, LANES, VECTOR]."""
    VECTOR: tl.constexpr = PIECE // LANES
    return i * PIECE + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _inside(heads, HEADS, i, HEAD_DIM: tl.constexpr, LANES: tl.constexpr):
    """Where piece i has columns of heads that exist."""
    inside = heads < HEADS
    if (i + 1) * PIECE > HEAD_DIM:
        inside = inside & (_columns(i, LANES) < HEAD_DIM)
    return inside


@triton.jit
def _turn(x, position, table_ptr, i, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, LANES: tl.constexpr):
    """Piece i [H, LANES, VECTOR] with the pairs that have an angle turned."""
    VECTOR: tl.constexpr = PIECE // LANES
    NOPE: tl.constexpr = HEAD_DIM - ROPE_DIM
    if (i + 1) * PIECE <= NOPE:
        return x
    else:
        pairs = tl.arange(0, LANES)[None, :, None] * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, None, :]
        angles = (i * PIECE - NOPE) // 2 + pairs
        known = position >= 0
        if i * PIECE < NOPE or (i + 1) * PIECE > HEAD_DIM:
            known = known & (angles >= 0) & (angles < ROPE_DIM // 2)
        at = table_ptr + position.to(tl.int64) * ROPE_DIM + angles
        cos = tl.load(at, mask=known, other=0.0)
        sin = tl.load(at + ROPE_DIM // 2, mask=known, other=0.0)
        a, b = tl.split(x.reshape(x.shape[0], LANES, VECTOR // 2, 2))
        turned = (angles >= 0) & (angles < ROPE_DIM // 2)
        return tl.join(*turn_pairs(a, b, cos, sin, turned, False)).reshape(x.shape)


@triton.jit
def _hadamard(x, H: tl.constexpr, LANES: tl.constexpr):
    """As `hadamard` of rows in pieces: butterflies within a thread's vector, then between lanes, then pieces."""
    PIECES: tl.constexpr = len(x)
    VECTOR: tl.constexpr = PIECE // LANES
    y = _nothing()
    for i in tl.static_range(PIECES):
        z = x[i]
        for level in tl.static_range(3):
            if VECTOR >> (level + 1):
                pairs = z.reshape(H, LANES, VECTOR >> (level + 1), 2, 1 << level).permute(0, 1, 2, 4, 3)
                a, b = tl.split(pairs)
                z = tl.join(a + b, a - b).permute(0, 1, 2, 4, 3).reshape(H, LANES, VECTOR)
        for level in tl.static_range(4):
            if LANES >> (level + 1):
                z = _between_lanes(z, 1 << level, LANES)
        y += (z,)
    for level in tl.static_range(5):
        if PIECES >> (level + 1):
            z = _nothing()
            for i in tl.static_range(PIECES):
                if i & (1 << level):
                    z += (y[i - (1 << level)] - y[i],)
                else:
                    z += (y[i] + y[i + (1 << level)],)
            y = z
    z = _nothing()
    for i in tl.static_range(PIECES):
        z += (y[i] * (PIECES * PIECE) ** -0.5,)
    return z


@triton.jit
def _between_lanes(x, STEP: tl.constexpr, LANES: tl.constexpr):
    """Sums of lanes and the lanes STEP on, differences there: a shuffle and an FMA an element, its product exact."""
    lane = tl.arange(0, LANES)[None, :, None]
    sign = tl.broadcast_to(tl.where(lane & STEP != 0, -1.0, 1.0), x.shape)
    return tl.fma(x, sign, tl.gather(x, tl.broadcast_to(lane ^ STEP, x.shape), 1))


@triton.jit
def _mx_round(y):
    """A piece, which is a block [H, LANES, VECTOR], as it would come back from a cache of mxfp4: FP32 or BF16."""
    most = y
    if y.shape[2] == 8:
        most = most_of_eight(y, y.shape[0], y.shape[1])[:, :, None]
    most = tl.max(tl.max(magnitude_bits(rounded(most, tl.bfloat16)), 2), 1)
    byte = e8m0_of_6(at_least(most, MX_FLOOR))[:, None, None]
    if CVT:
        bits = tl.inline_asm_elementwise(
            ROUND_PAIR,
            "=r,r,r,r",
            [bf16_bits(y), tl.broadcast_to(byte, y.shape)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.bfloat16, bitcast=True)
    else:
        y = _e2m1_round(rounded(y, tl.bfloat16) * e8m0_reciprocal(byte))
        return y * (byte << 23).to(tl.float32, bitcast=True)


def launch(
    q: Tensor,
    positions: Tensor,
    table: Tensor,
    format: str,
    hadamard: bool,
    out: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    config: Config,
) -> None:
    """q [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    weights: if given, out are E4M3 bytes (uint8; format fp8), and weights [m, heads] times their scales go to the
    second of them, FP32 and contiguous.
    """
    m, heads, head_dim = q.shape
    if m == 0:
        return
    scaled = (None, 0, None) if weights is None else (weights[0], host.row_stride(weights[0]), weights[1])
    operands = (q, *head_strides(q), positions, table, out, *scaled, heads)
    constants = _constants(format, hadamard, head_dim, table.shape[1], config) | {"TURNS": config.turns}
    grid = (m, triton.cdiv(heads, config.block_h * config.turns))
    _index_query[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: IndexQueryProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    q = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out, weights = torch.empty_like(q), None
    if problem.codes:
        ones = torch.ones(1, problem.heads, device="cuda")
        out, weights = out.to(torch.uint8), (ones, ones.clone())
    launch(q, first, table, problem.format, bool(problem.hadamard), out, weights, config)


def build_key(problem: IndexQueryProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    return problem.x, problem.format, problem.codes, problem.hadamard, problem.head_dim, problem.rope_dim


def build(problem: IndexQueryProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"q_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "out_ptr": "*u8" if problem.codes else f"*{problem.x}", "HEADS": "i32"}
    constants = _constants(problem.format, bool(problem.hadamard), problem.head_dim, problem.rope_dim, config)
    constants["TURNS"] = config.turns
    if problem.codes:
        types |= {"weights_ptr": "*fp32", "stride_w": "i32", "scaled_ptr": "*fp32"}
    else:
        constants |= {"weights_ptr": None, "stride_w": 0, "scaled_ptr": None}
    return host.build(_index_query, types, constants, arch, config.num_warps)


def _constants(format: str, hadamard: bool, head_dim: int, rope_dim: int, config: Config) -> dict[str, Any]:
    return {
        "FORMAT": format,
        "HADAMARD": hadamard,
        "HEAD_DIM": head_dim,
        "ROPE_DIM": rope_dim,
        "BLOCK_H": config.block_h,
        "LANES": config.lanes,
    }
