"""Compressed entries of a CSA layer and its indexer's keys in one launch: `compress_kv` of both.

Bound as `compress_kv` is: where tokens are few, as in decoding, by a chain of loads that both go through side by side,
so that the pair takes as long as the longer one and the second launch is saved.

Each program is one of `compress_kv` with whole entries. The grid's second axis says of which of the two: those of the
entries, which are longer, begin first. Threads are as many as entries want; a key has fewer channels for each.

Where tokens are many, programs with the threads and registers of an entry have too few keys at a time: `apart`, keys
have a launch of their own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import arch as archs
from fp4suite.built import Built
from fp4suite.problem import CompressKvPairProblem, CompressKvProblem
from fp4suite.reference import CompressorStep, compressor

from . import compress_kv, host
from .compress_kv import COUNTS, entry_constants, page_of, pool_constants, programs_of, take_in
from .overlap import begin

# Of a thread. By itself ptxas stops at 168, so that three programs fit on an SM, and spills (sm_100a, `fp8_ds_mla`)
MAX_REGISTERS = {"sm_100a": 192}
INTEGERS = ("positions", "sequence_ids", "cu_seqlens", "state_slots", "slots")
KEYS = "KEY_"  # before the names of what keys have in place of entries
OWN = (
    "RING", "HADAMARD", "FORMAT", "HEAD_DIM", "ROPE_DIM", "ROW_BYTES", "SCALE_BYTES", "PAGE_BYTES", "PADDED",
    "KEPT_ROWS",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Warps of a program, which has a whole entry or key. Apart, keys have a launch of their own, by half as many."""

    num_warps: int = 4
    apart: bool = False

    @property
    def key_warps(self) -> int:
        return max(1, self.num_warps // 2) if self.apart else self.num_warps


SPACE = {"num_warps": (1, 2, 4), "apart": (False, True)}


def supports(problem: CompressKvPairProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    pooled = problem.ratio * problem.overlaps
    if pooled > 2 * compressor.LANES:
        return f"pools of {pooled} rows take a second launch: call compress_kv for each"
    for part, own in zip(problem.parts, _configs(problem.head_dim, problem.key_dim, config), strict=True):
        if why := compress_kv.supports(part, own):
            return why
    return None


def default(problem: CompressKvPairProblem) -> Config:
    """As many warps as the wider of the two has alone; apart where there are many (H100: 4096 tokens together, 16384
    apart)."""
    warps = max(compress_kv.default(part).num_warps for part in problem.parts)
    return Config(num_warps=warps, apart=problem.m > 8192)


def _configs(head_dim: int, key_dim: int, config: Config) -> tuple[compress_kv.Config, compress_kv.Config]:
    """Of entries and of keys."""
    return (
        compress_kv.Config(block_c=triton.next_power_of_2(head_dim), num_warps=config.num_warps),
        compress_kv.Config(block_c=triton.next_power_of_2(key_dim), num_warps=config.key_warps),
    )


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "EACH", "POSITIONS"])
def _compress_kv_pair(
    kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr, state_ptr, cache_ptr,
    key_kv_ptr, stride_key_kv, key_gate_ptr, stride_key_gate, key_ape_ptr, key_weight_ptr, key_state_ptr, key_cache_ptr,
    table_ptr, eps, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr, slots_ptr,
    TOKENS, SEQUENCES, EACH, POSITIONS, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, TURNED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, E2M1_CVT: tl.constexpr,
    RING: tl.constexpr, HADAMARD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, PADDED: tl.constexpr,
    KEPT_ROWS: tl.constexpr,
    KEY_RING: tl.constexpr, KEY_HADAMARD: tl.constexpr, KEY_FORMAT: tl.constexpr, KEY_HEAD_DIM: tl.constexpr,
    KEY_ROPE_DIM: tl.constexpr, KEY_ROW_BYTES: tl.constexpr, KEY_SCALE_BYTES: tl.constexpr,
    KEY_PAGE_BYTES: tl.constexpr, KEY_PADDED: tl.constexpr, KEY_KEPT_ROWS: tl.constexpr,
):  # fmt: skip
    begin()
    if tl.program_id(1) == 0:
        take_in(
            tl.program_id(0), tl.arange(0, PADDED), kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr,
            table_ptr, eps, state_ptr, cache_ptr, None, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr,
            state_slots_ptr, slots_ptr, TOKENS, SEQUENCES, EACH, POSITIONS, RATIO, OVERLAPS, RING, TURNED, HADAMARD,
            FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED, PADDED,
            KEPT_ROWS,
        )  # fmt: skip
    else:
        take_in(
            tl.program_id(0), tl.arange(0, KEY_PADDED), key_kv_ptr, stride_key_kv, key_gate_ptr, stride_key_gate,
            key_ape_ptr, key_weight_ptr, table_ptr, eps, key_state_ptr, key_cache_ptr, None, positions_ptr,
            sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr, slots_ptr, TOKENS, SEQUENCES, EACH, POSITIONS, RATIO,
            OVERLAPS, KEY_RING, TURNED, KEY_HADAMARD, KEY_FORMAT, KEY_HEAD_DIM, KEY_ROPE_DIM, PAGE_SIZE, KEY_ROW_BYTES,
            KEY_SCALE_BYTES, KEY_PAGE_BYTES, E2M1_CVT, KEY_PADDED, KEY_PADDED, KEY_KEPT_ROWS,
        )  # fmt: skip


def launch(
    table: Tensor,
    eps: float,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
    steps: tuple[CompressorStep, CompressorStep],
    config: Config,
) -> None:
    """The op, with states and caches of `steps`, entries and keys, changed.

    Rows of kv and gate may have any stride, everything else is contiguous.
    """
    entries, keys = steps
    tokens, sequences = len(entries.kv), len(cu_seqlens) - 1
    if tokens == 0:
        return
    if config.apart:
        configs = _configs(entries.cache.head_dim, keys.cache.head_dim, config)
        for step, own in zip(steps, configs, strict=True):
            compress_kv.launch(
                step.kv, step.gate, step.ape, step.weight, table, eps, step.state, positions, sequence_ids, cu_seqlens,
                state_slots, slots, ratio, step.hadamard, step.cache, own,
            )  # fmt: skip
        return
    overlaps = entries.kv.shape[1] // entries.cache.head_dim
    constants = _constants(steps, ratio, overlaps, table.shape[1], host.has_e2m1_cvt(table.device), config)
    counts = (tokens, sequences, tokens // max(1, sequences), len(table))
    grid, registers = (programs_of(tokens, sequences, ratio, overlaps), 2), MAX_REGISTERS.get(archs.of(table.device))
    _compress_kv_pair[grid](
        *_operands(entries), *_operands(keys), table, eps, positions, sequence_ids, cu_seqlens, state_slots, slots,
        *counts, **constants, num_warps=config.num_warps, maxnreg=registers, **host.OPTIONS,
    )  # fmt: skip


def warm(problem: CompressKvPairProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    integers = nothing, nothing - 1, torch.zeros(2, dtype=torch.int32, device="cuda"), nothing, nothing - 1
    entries, keys = (_one_token(part, "cuda") for part in problem.parts)
    table = torch.zeros(1, problem.rope_dim, device="cuda")
    launch(table, 1.0, *integers, problem.ratio, (entries, keys), config)


def build_key(problem: CompressKvPairProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: how many tokens and sequences there are is read at launch."""
    configs = _configs(problem.head_dim, problem.key_dim, config)
    return tuple(compress_kv.build_key(*own) for own in zip(problem.parts, configs, strict=True))


def build(problem: CompressKvPairProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU; apart, the entries' launch."""
    p = problem
    if config.apart:
        return compress_kv.build(p.parts[0], _configs(p.head_dim, p.key_dim, config)[0], arch)
    types = {"table_ptr": "*fp32", "eps": "fp32"}
    types |= {f"{name}_ptr": "*i32" for name in INTEGERS} | dict.fromkeys(COUNTS, "i32")
    for own in ("", KEYS.lower()):
        types |= {f"{own}kv_ptr": f"*{p.x}", f"stride_{own}kv": "i32"}
        types |= {f"{own}gate_ptr": f"*{p.x}", f"stride_{own}gate": "i32"}
        types |= {f"{own}ape_ptr": "*fp32", f"{own}weight_ptr": f"*{p.weight}"}
        types |= {f"{own}state_ptr": "*fp32", f"{own}cache_ptr": "*u8"}
    entries, keys = (_one_token(part, "cpu") for part in p.parts)
    constants = _constants((entries, keys), p.ratio, p.overlaps, p.rope_dim, arch == "sm_100a", config)
    return host.build(
        _compress_kv_pair, types, constants, arch, config.num_warps, unaligned=COUNTS, maxnreg=MAX_REGISTERS.get(arch)
    )


def _operands(step: CompressorStep) -> tuple[Any, ...]:
    rows = step.kv, host.row_stride(step.kv), step.gate, host.row_stride(step.gate)
    return (*rows, step.ape, step.weight, step.state, step.cache.data)


def _one_token(p: CompressKvProblem, device: str) -> CompressorStep:
    width = p.overlaps * p.head_dim
    kv = torch.zeros(1, width, dtype=host.DTYPES[p.x], device=device)
    ape = torch.zeros(p.ratio, width, device=device)
    weight = torch.zeros(p.head_dim, dtype=host.DTYPES[p.weight], device=device)
    state = torch.zeros(1, p.overlaps * p.ratio, 2, width, device=device)
    return CompressorStep(kv, kv, ape, weight, state, page_of(p, device), bool(p.hadamard))


def _constants(
    steps: tuple[CompressorStep, CompressorStep], ratio: int, overlaps: int, turned: int, e2m1_cvt: bool, config: Config
) -> dict[str, Any]:
    """What both have in common, and what each has for itself."""
    entries, keys = (
        entry_constants(step.cache, ratio, overlaps, turned, step.hadamard, e2m1_cvt)
        | pool_constants(step.state.shape[1], triton.next_power_of_2(step.cache.head_dim), config.num_warps)
        for step in steps
    )
    del entries["BLOCK_C"]  # whole entries: PADDED
    return entries | {KEYS + name: keys[name] for name in OWN}
