"""What one launch did: instructions, bytes, TMA, MMAs, waits and shared-memory bank conflicts.

Shared memory has 32 banks of 4 bytes, and a wavefront takes one word from each ("CUDA C++ Programming Guide", shared
memory of compute capability 5.x and later). Lanes that touch the same word share it, except in an atomic operation.
Accesses of 8 and 16 bytes a lane are served in half and quarter warps, a matrix of ldmatrix or stmatrix in rows of 16
bytes as eight lanes would be. What a group of lanes takes beyond one wavefront is a conflict.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import RANK_SHIFT, SHARED_WINDOW, WINDOW_SHIFT
from .numbers import U64, Array

if TYPE_CHECKING:
    from .machine import Cta, Dim3, Warp
    from .program import Program

BANKS, BANK_BYTES = 32, 4
_PENDING = 256  # accesses of one instruction that are looked at together


@dataclass(slots=True)
class Waits:
    """Of one instruction that waits. count: times it was passed; rounds: times a warp found that it must wait."""

    line: int
    opcode: str
    count: int = 0
    rounds: int = 0

    def add(self, other: "Waits") -> None:
        self.count += other.count
        self.rounds += other.rounds

    @property
    def kind(self) -> str:
        """named, cluster, mbarrier, or the instruction's own first word."""
        parts = self.opcode.split(".")
        if parts[0] in ("bar", "barrier") and "warp" not in parts:
            return "cluster" if parts[1] == "cluster" else "named"
        return parts[0]


@dataclass(slots=True)
class Conflicts:
    """Shared-memory accesses of one instruction: how often, wavefronts, and those of them that conflicts cost."""

    line: int
    opcode: str
    count: int = 0
    wavefronts: int = 0
    extra: int = 0

    def add(self, other: "Conflicts") -> None:
        self.count += other.count
        self.wavefronts += other.wavefronts
        self.extra += other.extra


@dataclass(slots=True)
class Statistics:
    """Of one launch.

    warps: warp instructions by the warp's place in its CTA and by opcode; what the guard turns off in every lane does
    not count. bytes: by memory space and direction; distributed shared ones, of another CTA, are part of shared ones.
    mmas and flops: by kind. waits and banks: by place in the kernel's code. registers: of a thread, as the cubin says,
    None without one; virtual_registers: those that the PTX declares, of which ptxas needs only some.
    """

    kernel: str
    grid: "Dim3"
    block: "Dim3"
    cluster: "Dim3"
    static_shared: int = 0
    dynamic_shared: int = 0
    virtual_registers: int = 0
    registers: int | None = None
    tensor_columns: int = 0
    warps: dict[int, Counter[str]] = field(default_factory=dict)
    bytes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    mmas: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    waits: dict[int, Waits] = field(default_factory=dict)
    banks: dict[int, Conflicts] = field(default_factory=dict)

    @property
    def instructions(self) -> Counter[str]:
        """Warp instructions by opcode."""
        return sum(self.warps.values(), Counter())

    @property
    def total(self) -> int:
        return sum(sum(c.values()) for c in self.warps.values())

    @property
    def shared_bytes(self) -> int:
        return self.static_shared + self.dynamic_shared

    @property
    def barriers(self) -> dict[str, Waits]:
        """Waits by kind of barrier."""
        found: dict[str, Waits] = {}
        for w in self.waits.values():
            found.setdefault(w.kind, Waits(0, w.kind)).add(w)
        return found

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts beyond those that the same accesses without conflicts would take."""
        return sum(c.extra for c in self.banks.values())

    def count_mma(self, kind: str, flops: int, count: int = 1) -> None:
        self.mmas[kind] += count
        self.flops[kind] += flops
        self.events["MMAs"] += count
        self.events["MMA flops"] += flops

    def count_copy(self, what: str, size: int) -> None:
        self.events[f"{what}s"] += 1
        self.events[f"{what} bytes"] += size

    def add(self, other: "Statistics") -> None:
        """Add what other clusters of the same launch did."""
        for warp, counts in other.warps.items():
            self.warps.setdefault(warp, Counter()).update(counts)
        for name in ("bytes", "events", "mmas", "flops"):
            getattr(self, name).update(getattr(other, name))
        for mine, theirs in ((self.waits, other.waits), (self.banks, other.banks)):
            _add_places(mine, theirs)
        self.tensor_columns = max(self.tensor_columns, other.tensor_columns)

    def to_json(self) -> str:
        """Everything, with totals, as one JSON document."""
        return json.dumps(
            {
                "kernel": self.kernel,
                "grid": self.grid,
                "block": self.block,
                "cluster": self.cluster,
                "static_shared_bytes": self.static_shared,
                "dynamic_shared_bytes": self.dynamic_shared,
                "virtual_registers": self.virtual_registers,
                "registers": self.registers,
                "tensor_columns": self.tensor_columns,
                "warp_instructions": self.total,
                "instructions": dict(self.instructions.most_common()),
                "warps": {w: dict(c.most_common()) for w, c in sorted(self.warps.items())},
                "bytes": dict(sorted(self.bytes.items())),
                "events": dict(sorted(self.events.items())),
                "mmas": {k: {"count": n, "flops": self.flops[k]} for k, n in sorted(self.mmas.items())},
                "barriers": {k: {"count": w.count, "rounds": w.rounds} for k, w in sorted(self.barriers.items())},
                "waits": [
                    {"line": w.line, "opcode": w.opcode, "count": w.count, "rounds": w.rounds}
                    for _, w in sorted(self.waits.items())
                ],
                "bank_conflicts": self.bank_conflicts,
                "shared_accesses": [
                    {
                        "line": c.line,
                        "opcode": c.opcode,
                        "count": c.count,
                        "wavefronts": c.wavefronts,
                        "extra": c.extra,
                    }
                    for _, c in sorted(self.banks.items())
                ],
            }
        )

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _add_places(mine: dict[int, Any], theirs: Mapping[int, Any]) -> None:
    for pc, more in theirs.items():
        if pc in mine:
            mine[pc].add(more)
        else:
            mine[pc] = more


def _table(s: Statistics) -> list[str]:
    registers = f"{s.registers} registers" if s.registers else f"{s.virtual_registers} virtual registers"
    lines = [
        f"{s.kernel}",
        f"  grid {_dims(s.grid)} of {_dims(s.block)} threads in clusters of {_dims(s.cluster)}",
        f"  {registers} a thread, shared {s.static_shared:,} + {s.dynamic_shared:,} bytes (static + dynamic), "
        f"{s.tensor_columns} columns of tensor memory",
        f"  {s.total:,} warp instructions",
    ]
    lines += _rows("bytes", s.bytes)
    lines += _rows("events", s.events)
    lines += [f"  {'MMA ' + kind:<40} {n:>14,} {s.flops[kind]:>18,} flops" for kind, n in sorted(s.mmas.items())]
    lines += [
        f"  {'waits: ' + kind:<40} {w.count:>14,} {w.rounds:>18,} rounds" for kind, w in sorted(s.barriers.items())
    ]
    lines.append(f"  {'bank conflicts':<40} {s.bank_conflicts:>14,} extra wavefronts")
    lines += [
        f"    PTX line {c.line:<6} {c.opcode:<30} {c.count:>8,} times, {c.wavefronts:,} wavefronts, {c.extra:,} extra"
        for c in sorted(s.banks.values(), key=lambda c: -c.extra)
        if c.extra
    ]
    for warps, counts in _roles(s.warps):
        lines.append(f"  instructions of {warps} (each): {sum(counts.values()):,}")
        lines += [f"    {opcode:<60} {n:>12,}" for opcode, n in counts.most_common()]
    return lines


def _rows(what: str, counts: Counter[str]) -> list[str]:
    return [f"  {name + (' bytes' if what == 'bytes' else ''):<40} {n:>14,}" for name, n in sorted(counts.items()) if n]


def _roles(warps: dict[int, Counter[str]]) -> list[tuple[str, Counter[str]]]:
    """Warps that executed the same instructions, put together."""
    roles: list[tuple[list[int], Counter[str]]] = []
    for warp, counts in sorted(warps.items()):
        for members, known in roles:
            if known == counts:
                members.append(warp)
                break
        else:
            roles.append(([warp], counts))
    return [(f"warp{'s' * (len(m) > 1)} {', '.join(map(str, m))}", counts) for m, counts in roles]


def _dims(x: Sequence[int]) -> str:
    return " x ".join(map(str, x))


# --- collecting ---


class Tally:
    """What clusters did, counted by place in the code while they run."""

    def __init__(self, program: "Program"):
        self.program = program
        self.counts: dict[int, Array] = {}
        self.rounds: Counter[int] = Counter()

    def add(self, cta: "Cta") -> None:
        """A CTA that has ended."""
        for warp in cta.warps:
            if warp.index not in self.counts:
                self.counts[warp.index] = np.zeros(len(self.program.steps), np.int64)
            self.counts[warp.index] += warp.counts
            self.rounds.update(warp.rounds)

    def into(self, stats: Statistics) -> None:
        code = self.program.kernel.code
        total = np.zeros(len(self.program.steps), np.int64)
        for index, counts in self.counts.items():
            total += counts
            by_opcode = stats.warps.setdefault(index, Counter())
            for pc in map(int, np.flatnonzero(counts[: len(code)])):
                by_opcode[code[pc].name] += int(counts[pc])
        for pc, i in enumerate(code):
            if self.rounds[pc] or (total[pc] and _is_barrier_wait(i.op)):
                _add_places(stats.waits, {pc: Waits(i.line, i.name, int(total[pc]), self.rounds[pc])})


def _is_barrier_wait(op: tuple[str, ...]) -> bool:
    if op[0] == "mbarrier":
        return op[1] in ("try_wait", "test_wait")
    return op[0] in ("bar", "barrier") and "arrive" not in op and "warp" not in op


class BankCounter:
    """Shared-memory accesses, kept until there are enough to look at many at once."""

    def __init__(self, program: "Program", statistics: Statistics):
        self.program, self.statistics = program, statistics
        self._pending: dict[int, _Accesses] = {}

    def access(self, warp: "Warp", address: Array, mask: Array | None, size: int, how: str = "shared") -> None:
        """The instruction that `warp` is at touches `size` bytes at each of these addresses ([lanes], uint64).

        how: "shared" for addresses of the shared window, "generic", or "atomic", whose lanes never share a word.
        Lanes that reach another CTA, or other memory, are left out.
        """
        pc = warp.actor.pc
        pending = self._pending.get(pc)
        if pending is None:
            pending = self._pending[pc] = _Accesses(size, how)
        pending.rows.append((address, mask, warp.cta.rank))
        if len(pending.rows) >= _PENDING:
            self._look_at(pc, pending)

    def finish(self) -> None:
        for pc, pending in self._pending.items():
            if pending.rows:
                self._look_at(pc, pending)

    def _look_at(self, pc: int, pending: "_Accesses") -> None:
        address = np.stack([a for a, _, _ in pending.rows])
        valid = np.stack([np.ones(a.shape, bool) if m is None else m for a, m, _ in pending.rows])
        rank = np.array([r for _, _, r in pending.rows], np.uint64)
        valid &= (address >> U64(RANK_SHIFT)) & U64(0xFF) == rank[:, None]
        if pending.how == "generic":
            valid &= address >> U64(WINDOW_SHIFT) == U64(SHARED_WINDOW >> WINDOW_SHIFT)
        pending.rows.clear()
        count = int(valid.any(1).sum())
        if count:
            total, least = wavefronts(address, valid, pending.size, pending.how == "atomic")
            i = self.program.kernel.code[pc]
            _add_places(self.statistics.banks, {pc: Conflicts(i.line, i.name, count, total, total - least)})


@dataclass(slots=True)
class _Accesses:
    size: int
    how: str
    rows: list[tuple[Array, Array | None, int]] = field(default_factory=list)


def wavefronts(address: Array, valid: Array, size: int, atomic: bool = False) -> tuple[int, int]:
    """Wavefronts of accesses ([n, lanes], `size` bytes a lane), and how many would do if no two lanes conflicted."""
    together = min(address.shape[1], BANKS * BANK_BYTES // max(size, BANK_BYTES))
    words = max(1, size // BANK_BYTES)
    first = (address // U64(BANK_BYTES)).astype(np.int64).reshape(-1, together)
    word = (first[:, :, None] + np.arange(words)).reshape(len(first), -1)
    counts = np.repeat(valid.reshape(-1, together), words, axis=1)
    if not atomic:
        word = np.where(counts, word, -1)
        word.sort(axis=1)
        counts = word >= 0
        counts[:, 1:] &= word[:, 1:] != word[:, :-1]
    place = np.arange(len(word))[:, None] * BANKS + word % BANKS
    deepest = np.bincount(place[counts], minlength=len(word) * BANKS).reshape(-1, BANKS).max(1)
    return int(deepest.sum()), int((deepest > 0).sum())
