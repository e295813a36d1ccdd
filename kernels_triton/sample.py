"""Next tokens, greedy or by nucleus sampling, without sorting: exactly the reference's, as masses are integers.

    most     the largest logit of each chunk of a row, and its first index
    weigh    the mass of each token, added to one of 2048 bins by how far its logit lies below the row's largest
    gather   the bins tell where top_p ends and which bins `uniform` can point into: the tokens of those are listed
    finish   bisection of the listed tokens' logits, once for the end of the nucleus and once for the token

Bound by issue: 30 operations a mass, and an atomic addition each, against 4 bytes read. Four launches, as each needs
what all chunks of a row gave the one before and a row is read by many programs; the temperature, which could say that
one is enough, is not known on the host. Where more tokens than LISTED share those bins, as in a row of equal logits,
`finish` bisects the row itself: right, but slower.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import SampleProblem
from fp4suite.reference.sample import MASS_BITS, UNDERFLOW as _UNDERFLOW

from . import host
from .nvfp4 import exp_neg, widen

BINS = 2048
LISTED = 4096  # tokens of a row that finish need not look for
FINISH_WARPS, BISECTED = 8, 1024  # and how many of them finish looks at together
MOST_CHUNKS = 1024
MOST_VOCAB = 1 << (62 - MASS_BITS)  # masses of all tokens fit into int64

BINS_A_UNIT = tl.constexpr(64.0)  # of (top - logit) / temperature, of which 32 are past every mass
MASS_OF_TOP = tl.constexpr(2.0**MASS_BITS)
UNDERFLOW = tl.constexpr(_UNDERFLOW)
COLDEST = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """chunk tokens a program."""

    chunk: int = 4096
    num_warps: int = 8


SPACE = {"chunk": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}


def supports(problem: SampleProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"logits in {problem.x}, not one of {', '.join(host.DTYPES)}"
    if problem.vocab > min(MOST_VOCAB, MOST_CHUNKS * config.chunk):
        return f"vocab={problem.vocab} is over {min(MOST_VOCAB, MOST_CHUNKS * config.chunk)}"
    held = config.chunk // (32 * config.num_warps)
    return None if 4 <= held <= 32 else f"{held} logits a thread, not 4 to 32"


# --- logits as integers, masses, bins ---------------------------------------------------------------------------------


@triton.jit
def _key(x):
    """FP32 -> int32 in the same order, -0 as 0, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & LARGEST), LARGEST)


@triton.jit
def _below_top(key, top, heat):
    """(top - logit) / temperature, 0 for what equals the top even where that is NaN or infinite."""
    logit = (key ^ ((key >> 31) & LARGEST)).to(tl.float32, bitcast=True)
    most = (top ^ ((top >> 31) & LARGEST)).to(tl.float32, bitcast=True)
    return tl.where(key == top, 0.0, tl.div_rn(most - logit, heat))


@triton.jit
def _mass(z):
    """Mass int64 of a token z below the top."""
    return (tl.where(z < UNDERFLOW, exp_neg(z), 0.0) * MASS_OF_TOP).to(tl.int64)


@triton.jit
def _bin(z, BINS: tl.constexpr):
    at = z * BINS_A_UNIT
    return tl.where(at < BINS, at, BINS - 1.0).to(tl.int32)


@triton.jit
def _top(most_ptr, where_ptr, chunks, row, CHUNKS: tl.constexpr):
    """The largest key of a row, and its first index."""
    nth = tl.arange(0, CHUNKS)
    keys = tl.load(most_ptr + row * chunks + nth, mask=nth < chunks, other=SMALLEST)
    at = tl.load(where_ptr + row * chunks + nth, mask=nth < chunks, other=LARGEST)
    top = tl.max(keys, axis=0)
    return top, tl.min(tl.where(keys == top, at, LARGEST), axis=0)


@triton.jit
def _logits(logits_ptr, stride_m, row, at, inside):
    """Keys of a row's logits; outside below all."""
    # int64 before the multiply: many rows of a vocabulary pass 2**31 elements
    x = widen(tl.load(logits_ptr + row * stride_m + at, mask=inside, other=0.0))
    return tl.where(inside, _key(x), SMALLEST)


# --- the nucleus and the token, as far as bins tell -------------------------------------------------------------------


@triton.jit
def _share(part, mass):
    """part (FP32) of mass (int64), in FP64."""
    return tl.minimum(tl.maximum(part, 0.0), 1.0).to(tl.float64) * mass.to(tl.float64)


@triton.jit
def _target(uniform, kept):
    return tl.minimum(_share(uniform, kept).to(tl.int64), kept - 1)


@triton.jit
def _bounds(mass_ptr, row, top_p, uniform, BINS: tl.constexpr):
    """(mass that the nucleus has to reach, its last bin, mass before that; first and last bin `uniform` can point into,
    mass before the first).
    """
    bins = tl.arange(0, BINS)
    masses = tl.load(mass_ptr + row * BINS + bins)
    reached = tl.cumsum(masses, axis=0)
    share = _share(top_p, tl.sum(masses, axis=0))
    floor = share.to(tl.int64)
    limit = tl.maximum(floor + (floor.to(tl.float64) < share).to(tl.int64), 1)
    limit = tl.minimum(limit, tl.sum(masses, axis=0))  # where FP64 rounded the mass of all up
    last = tl.sum((reached < limit).to(tl.int32), axis=0)
    low = _target(uniform, limit)
    high = _target(uniform, tl.sum(tl.where(bins == last, reached, 0), axis=0))
    first_pick = tl.sum((reached <= low).to(tl.int32), axis=0)
    last_pick = tl.sum((reached <= high).to(tl.int32), axis=0)
    before_last = tl.sum(tl.where(bins < last, masses, 0), axis=0)
    before_pick = tl.sum(tl.where(bins < first_pick, masses, 0), axis=0)
    return limit, last, before_last, first_pick, last_pick, before_pick


# --- the launches -----------------------------------------------------------------------------------------------------


@triton.jit
def _most(
    logits_ptr, stride_m, most_ptr, where_ptr, mass_ptr, listed_ptr, V,
    CHUNK: tl.constexpr, BINS: tl.constexpr, CLEARED: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = _logits(logits_ptr, stride_m, row, at, at < V)
    most = tl.max(keys, axis=0)
    here = row * tl.num_programs(1) + chunk
    tl.store(most_ptr + here, most)
    tl.store(where_ptr + here, tl.min(tl.where((keys == most) & (at < V), at, LARGEST), axis=0))
    # what the next launches add to
    bins = chunk * CLEARED + tl.arange(0, CLEARED)
    tl.store(mass_ptr + row * BINS + bins, tl.zeros((CLEARED,), tl.int64), mask=bins < BINS)
    tl.store(listed_ptr + row, 0, mask=chunk == 0)


@triton.jit
def _weigh(
    logits_ptr, stride_m, heat_ptr, most_ptr, where_ptr, mass_ptr, V,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_ptr + row)
    if heat != 0.0:
        top, _ = _top(most_ptr, where_ptr, tl.num_programs(1), row, CHUNKS)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        z = _below_top(_logits(logits_ptr, stride_m, row, at, at < V), top, tl.maximum(heat, COLDEST))
        mass = _mass(z)
        tl.atomic_add(mass_ptr + row * BINS + _bin(z, BINS), mass, mask=(at < V) & (mass > 0), sem="relaxed")


@triton.jit
def _gather(
    logits_ptr, stride_m, heat_ptr, top_p_ptr, uniform_ptr, most_ptr, where_ptr, mass_ptr, listed_ptr, list_ptr, V,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_ptr + row)
    if heat != 0.0:
        top, _ = _top(most_ptr, where_ptr, tl.num_programs(1), row, CHUNKS)
        _, last, _, first_pick, last_pick, _ = _bounds(
            mass_ptr, row, tl.load(top_p_ptr + row), tl.load(uniform_ptr + row), BINS
        )
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        z = _below_top(_logits(logits_ptr, stride_m, row, at, at < V), top, tl.maximum(heat, COLDEST))
        bin = _bin(z, BINS)
        wanted = (at < V) & ((bin == last) | ((bin >= first_pick) & (bin <= last_pick)))
        number = tl.sum(wanted.to(tl.int32), axis=0)
        # in no certain order, which nothing that follows depends on
        begin = tl.atomic_add(listed_ptr + row, number, mask=number > 0, sem="relaxed")
        place = begin + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + row * LISTED + place, at, mask=wanted & (place < LISTED))


@triton.jit
def _some(
    logits_ptr,
    stride_m,
    list_ptr,
    listed,
    row,
    start,
    V,
    top,
    heat,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    BINS: tl.constexpr,
):
    """BLOCK of the listed tokens, or of all if the list is too short for them: index, key, mass, bin (-1 outside)."""
    nth = start + tl.arange(0, BLOCK)
    inside = nth < tl.where(listed <= LISTED, listed, V)
    at = nth
    if listed <= LISTED:
        at = tl.load(list_ptr + row * LISTED + nth, mask=inside, other=0)
    key = _logits(logits_ptr, stride_m, row, at, inside)
    z = _below_top(key, top, heat)
    return at, key, tl.where(inside, _mass(z), 0), tl.where(inside, _bin(z, BINS), -1)


@triton.jit
def _bisect(
    need, first, last, logits_ptr, stride_m, list_ptr, listed, row, V, top, heat,
    BLOCK: tl.constexpr, LISTED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The largest key such that the tokens of bins first .. last with it or above have the mass `need`, and the mass of
    those above it.
    """
    number = tl.where(listed <= LISTED, listed, V)
    low = tl.full((), LARGEST, tl.int32).to(tl.int64)
    high = tl.full((), SMALLEST, tl.int32).to(tl.int64)
    for start in range(0, number, BLOCK):
        _, key, _, bin = _some(logits_ptr, stride_m, list_ptr, listed, row, start, V, top, heat, BLOCK, LISTED, BINS)
        wanted = (bin >= first) & (bin <= last)
        low = tl.minimum(low, tl.min(tl.where(wanted, key, LARGEST), axis=0).to(tl.int64))
        high = tl.maximum(high, tl.max(tl.where(wanted, key, SMALLEST), axis=0).to(tl.int64))
    above = tl.full((), 0, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        mass = tl.full((), 0, tl.int64)
        for start in range(0, number, BLOCK):
            _, key, masses, bin = _some(
                logits_ptr, stride_m, list_ptr, listed, row, start, V, top, heat, BLOCK, LISTED, BINS
            )
            wanted = (bin >= first) & (bin <= last) & (key.to(tl.int64) >= middle)
            mass += tl.sum(tl.where(wanted, masses, 0), axis=0)
        enough = mass >= need
        low = tl.where(enough, middle, low)
        above = tl.where(enough, above, mass)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32), above


@triton.jit
def _nth_index(
    nth_equal, wanted_key, logits_ptr, stride_m, list_ptr, listed, row, V, top, heat,
    BLOCK: tl.constexpr, LISTED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The index of the token with this key that nth_equal others with it come before."""
    number = tl.where(listed <= LISTED, listed, V)
    low = tl.full((), LARGEST, tl.int32)
    high = tl.full((), -1, tl.int32)
    for start in range(0, number, BLOCK):
        at, key, _, bin = _some(logits_ptr, stride_m, list_ptr, listed, row, start, V, top, heat, BLOCK, LISTED, BINS)
        equal = (key == wanted_key) & (bin >= 0)
        low = tl.minimum(low, tl.min(tl.where(equal, at, LARGEST), axis=0))
        high = tl.maximum(high, tl.max(tl.where(equal, at, -1), axis=0))
    while low < high:
        middle = low + ((high - low) >> 1)
        count = tl.full((), 0, tl.int64)
        for start in range(0, number, BLOCK):
            at, key, _, bin = _some(
                logits_ptr, stride_m, list_ptr, listed, row, start, V, top, heat, BLOCK, LISTED, BINS
            )
            equal = (key == wanted_key) & (bin >= 0) & (at <= middle)
            count += tl.sum(equal.to(tl.int64), axis=0)
        enough = count > nth_equal
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _finish(
    logits_ptr, stride_m, heat_ptr, top_p_ptr, uniform_ptr, most_ptr, where_ptr, mass_ptr, listed_ptr, list_ptr,
    out_ptr, chunks, V,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, token = _top(most_ptr, where_ptr, chunks, row, CHUNKS)
    heat = tl.load(heat_ptr + row)
    if heat != 0.0:
        heat = tl.maximum(heat, COLDEST)
        uniform = tl.load(uniform_ptr + row)
        listed = tl.load(listed_ptr + row)
        limit, last, before_last, first_pick, last_pick, before_pick = _bounds(
            mass_ptr, row, tl.load(top_p_ptr + row), uniform, BINS
        )
        key, above = _bisect(
            limit - before_last, last, last,
            logits_ptr, stride_m, list_ptr, listed, row, V, top, heat, BLOCK, LISTED, BINS,
        )  # fmt: skip
        mass = _mass(_below_top(key, top, heat))  # of each token with this logit
        equals = (limit - before_last - above + mass - 1) // mass  # of them that the nucleus takes
        target = _target(uniform, before_last + above + equals * mass) - before_pick
        key, above = _bisect(
            target + 1, first_pick, last_pick,
            logits_ptr, stride_m, list_ptr, listed, row, V, top, heat, BLOCK, LISTED, BINS,
        )  # fmt: skip
        nth_equal = (target - above) // _mass(_below_top(key, top, heat))
        token = _nth_index(
            nth_equal, key, logits_ptr, stride_m, list_ptr, listed, row, V, top, heat, BLOCK, LISTED, BINS
        )
    tl.store(out_ptr + row, token.to(tl.int64))


def launch(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, out: Tensor, config: Config) -> None:
    """logits [m, vocab], rows of any stride; temperature, top_p, uniform float32 [m], contiguous -> out int64 [m]."""
    m, vocab = logits.shape
    if m == 0:
        return
    chunks, device = triton.cdiv(vocab, config.chunk), logits.device
    most = torch.empty(m, chunks, dtype=torch.int32, device=device)
    where = torch.empty_like(most)
    mass = torch.empty(m, BINS, dtype=torch.int64, device=device)
    listed = torch.empty(m, dtype=torch.int32, device=device)
    places = torch.empty(m, LISTED, dtype=torch.int32, device=device)
    own = _constants(vocab, config)
    options: dict[str, Any] = {"num_warps": config.num_warps, **host.OPTIONS}
    rows, grid = (logits, host.row_stride(logits)), (m, chunks)
    asked = (temperature, top_p, uniform, most, where, mass, listed, places)

    def sizes(*names: str) -> dict[str, int]:
        return {name: own[name] for name in names}

    _most[grid](*rows, most, where, mass, listed, vocab, **sizes("CHUNK", "BINS", "CLEARED"), **options)
    _weigh[grid](*rows, temperature, most, where, mass, vocab, **sizes("CHUNK", "CHUNKS", "BINS"), **options)
    _gather[grid](*rows, *asked, vocab, **sizes("CHUNK", "CHUNKS", "BINS", "LISTED"), **options)
    options["num_warps"] = FINISH_WARPS
    _finish[(m,)](*rows, *asked, out, chunks, vocab, **sizes("CHUNKS", "BINS", "LISTED", "BLOCK"), **options)


def warm(problem: SampleProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    logits = torch.zeros(1, problem.vocab, dtype=host.DTYPES[problem.x], device="cuda")
    ones = torch.ones(1, device="cuda")
    launch(logits, ones, ones, ones, torch.empty(1, dtype=torch.int64, device="cuda"), config)


def build_key(problem: SampleProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch, the vocabulary within its chunks."""
    return problem.x, triton.next_power_of_2(triton.cdiv(problem.vocab, config.chunk))


def build(problem: SampleProblem, config: Config, arch: str) -> Built:
    """The weighing kernel, which takes longest, compiled for `arch` without a GPU."""
    return build_part(_weigh, problem, config, arch)


def build_part(kernel: Any, problem: SampleProblem, config: Config, arch: str) -> Built:
    """One of the kernels of a launch compiled for `arch` without a GPU."""
    types = {"logits_ptr": f"*{problem.x}", "mass_ptr": "*i64", "out_ptr": "*i64", "V": "i32", "chunks": "i32"}
    types |= {"stride_m": "i32"} | dict.fromkeys(("heat_ptr", "top_p_ptr", "uniform_ptr"), "*fp32")
    types |= dict.fromkeys(("most_ptr", "where_ptr", "listed_ptr", "list_ptr"), "*i32")
    names = kernel.arg_names
    constants = {n: c for n, c in _constants(problem.vocab, config).items() if n in names}
    warps = FINISH_WARPS if kernel is _finish else config.num_warps
    return host.build(kernel, {n: t for n, t in types.items() if n in names}, constants, arch, warps)


def _constants(vocab: int, config: Config) -> dict[str, int]:
    return {
        "CHUNK": config.chunk,
        "CHUNKS": triton.next_power_of_2(triton.cdiv(vocab, config.chunk)),
        "BINS": BINS,
        "CLEARED": triton.next_power_of_2(triton.cdiv(BINS, triton.cdiv(vocab, config.chunk))),
        "LISTED": LISTED,
        "BLOCK": BISECTED,
    }
