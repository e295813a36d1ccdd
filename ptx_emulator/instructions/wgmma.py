"""wgmma: the tensor cores of sm_90 (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").

D[64, n] += A[64, k] B[k, n]. Warp w of the group owns rows 16 w .. 16 w + 15 of D and A. With g = lane / 4 and
q = lane % 4 register r of D is row g + 8 (r / 2 % 2), column 8 (r / 4) + 2 q + r % 2.

The sums are those of the hardware, see `tensorcore`.

Operands are read when one of the four warps waits for the group, and added to the registers of a warp when it waits
itself ("eager": both at issue), so that registers or shared memory touched too early give wrong results.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import tensorcore
from ..descriptors import hopper, k_major, mn_major
from ..errors import Fault
from ..hazards import Actor, Hazards
from ..machine import LANES, Cta, Warp
from ..numbers import U32, Array
from ..parser import Instruction, Reg, Vec
from ..program import FINISHERS, Mask, Program, Run, constant, decoder, uniform, unknown
from ..sparsity import chosen, of_warp, per_row, places, selectors
from .matrix import GROUP, QUAD, element_values

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_Operands = tuple[Array, Array]  # FP64 as `tensorcore.step` takes them: A [16, k] and B [n, k], if A is not sparse


class _Part:
    """A warp's part of one wgmma: `fetch` reads the operands, `accumulate` adds their product to registers."""

    def __init__(self, operation: Actor, fetch: Callable[[], _Operands], accumulate: Callable[[Array, Array], None]):
        self.operation, self._fetch, self._accumulate = operation, fetch, accumulate
        self._operands: _Operands | None = None
        self._over = False

    def read(self, hazards: Hazards) -> None:
        if self._operands is None:
            self._operands = hazards.perform(self.operation, self._fetch)

    def finish(self, hazards: Hazards) -> None:
        self.read(hazards)
        if not self._over:
            assert self._operands is not None
            self._accumulate(*self._operands)
            self._over = True


@dataclass(slots=True)
class _Group:
    """A warp's share of a wgmma-group. operations: of all four warps, once their operands were read."""

    parts: list[_Part]
    operations: list[Actor] | None = None


class _Groups:
    """over: how many of this warp's groups it has waited for."""

    def __init__(self) -> None:
        self.open: list[_Part] = []
        self.committed: list[_Group] = []
        self.over = 0


def _groups(w: Warp) -> _Groups:
    if "wgmma" not in w.state:
        w.state["wgmma"] = _Groups()
    found: _Groups = w.state["wgmma"]
    return found


@decoder("wgmma")
def _wgmma(i: Instruction, p: Program) -> Run:
    if i.op[1] == "fence":
        return _converged(i, lambda w: None)
    if i.op[1] == "commit_group":
        return _converged(i, _commit)
    if i.op[1] == "wait_group":
        count = constant(i.operands[0])
        return _converged(i, lambda w: _wait(w, count))
    if i.op[1] == "mma_async":
        return _mma(i, p)
    raise unknown(i)


def _converged(i: Instruction, action: Callable[[Warp], str | None]) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return f"{i.op[0]}.{i.op[1]} is executed by a divergent warp"
        return action(w)

    return run


def _commit(w: Warp) -> None:
    groups = _groups(w)
    groups.committed.append(_Group(groups.open))
    groups.open = []


def _wait(w: Warp, count: int) -> str | None:
    """PTX ISA, "wgmma.commit_group": a group belongs to the warpgroup. It is over when all four warps' parts are, so
    that operands in shared memory may be overwritten by whoever has waited.
    """
    groups, hazards = _groups(w), w.cta.cluster.hazards
    while len(groups.committed) > count:
        group = groups.committed[0]
        if group.operations is None:
            first = w.index // 4 * 4
            together = []
            for warp in w.cta.warps[first : first + 4]:
                other = _groups(warp)
                if other.over + len(other.committed) <= groups.over:
                    return f"waits for warp {warp.index} to commit wgmma-group {groups.over} of its warpgroup"
                together.append(other.committed[groups.over - other.over])
            for part in (part for share in together for part in share.parts):
                part.read(hazards)
            operations = [part.operation for share in together for part in share.parts]
            for share in together:
                share.operations = operations
        for part in group.parts:
            part.finish(hazards)
        for operation in group.operations or ():
            w.actor.acquire(operation.clock)
        groups.committed.pop(0)
        groups.over += 1
    return None


def _mma(i: Instruction, p: Program) -> Run:
    shape = next(x for x in i.op if x.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    saturate = "satfinite" in i.op
    d_kind, a_kind, b_kind = [x for x in i.op if x != "satfinite"][-3:]
    size, a_value = element_values(a_kind)
    _, b_value = element_values(b_kind)
    if d_kind not in ("f32", "f16", "s32") or (d_kind == "s32") != (a_kind in ("s8", "u8")):
        raise unknown(i)
    d, a, b, *rest = i.operands
    sparse = "sp" in i.op
    metadata, selector = (p.source(rest.pop(0), "b32"), constant(rest.pop(0))) if sparse else (None, 0)
    if sparse and selector not in range(selectors(per_row(k, size))):
        raise unknown(i, f"sparsity selector {selector}")
    scale_d = rest.pop(0)
    assert isinstance(d, Vec)
    registers = [x for x in d.items if isinstance(x, Reg)]
    signs = [constant(x) for x in rest[:2]] if d_kind != "s32" else [1, 1]
    major = [constant(x) for x in rest[2:]] if len(rest) > 2 else []
    in_registers = isinstance(a, Vec)
    a_major = 0 if in_registers or not major else major[0]
    b_major = major[-1] if major else 0
    if isinstance(scale_d, Reg):
        keep = p.source(scale_d, "pred" if scale_d.size == 0 else "b32")
    else:
        keep = p.source(scale_d, "b32")
    a_reads = [p.source(x, "b32") for x in a.items] if isinstance(a, Vec) else []
    a_desc, b_desc = None if in_registers else p.source(a, "b64"), p.source(b, "b64")
    unsigned, per = _UNSIGNED[size], 4 // size
    flops, what = 2 * 16 * n * k, f"wgmma{'.sp' if sparse else ''} {shape} {a_kind}"
    stored = k // 2 if sparse else k  # elements of a row of A

    number = np.arange(len(a_reads))[:, None, None]  # of a register; places of elements are [registers, 32, elements]
    columns = per * QUAD[:, None] + np.arange(per) + 4 * per * (number // 2)
    a_places = GROUP[:, None] + 8 * (number % 2), columns

    def fragment(w: Warp) -> Array:
        left = np.zeros((16, stored))
        left[a_places] = a_value(np.array([read(w) for read in a_reads]).view(unsigned)).reshape(columns.shape)
        return left

    def fetch(w: Warp, word: int, rows: slice, k: int, major: int) -> Array:
        index = _index(word, rows.stop, k, size, major)[rows]
        return np.ascontiguousarray(w.cta.shared.gather(index)).view(unsigned)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "wgmma.mma_async is executed by a divergent warp"
        fixed_b = uniform(b_desc(w), None, "the descriptor of B")
        accumulate = bool(uniform(keep(w), None, "scale-d"))
        # registers are read at issue: to overwrite a fragment that is in use is undefined, and not looked for
        held = fragment(w) if a_desc is None else None
        fixed_a = uniform(a_desc(w), None, "the descriptor of A") if a_desc is not None else 0
        met = None
        if metadata is not None:
            met = places(of_warp(metadata(w), per_row(k, size), selector, size), size == 4)

        def operands() -> _Operands:
            # of A a warp reads its own rows only
            first = 16 * (w.index % 4)
            left = a_value(fetch(w, fixed_a, slice(first, first + 16), stored, a_major)) if held is None else held
            right = b_value(fetch(w, fixed_b, slice(0, n), k, b_major))
            if met is not None:
                right = chosen(right, met)
            return signs[0] * left, signs[1] * right

        def add(left: Array, right: Array) -> None:
            old = _accumulator(w, registers, d_kind, n) if accumulate else np.zeros((16, n))
            if d_kind == "s32":
                total = tensorcore.integers(left, right, old, saturate)
            else:
                total = tensorcore.step(left, right, old, (a_kind, b_kind), d_kind, tensorcore.FRACTION[a_kind])
            _write(w, registers, total)

        w.cta.cluster.launch.statistics.count_mma(what, flops, count=int(w.index % 4 == 0))  # one of the warpgroup
        hazards = w.cta.cluster.hazards
        operation = hazards.operation("wgmma", chain=("wgmma", w.cta.rank, w.index))

        part = _Part(operation, operands, add)
        if w.cta.cluster.launch.schedule == "eager":
            part.finish(hazards)
        _groups(w).open.append(part)
        return None

    return run


@functools.lru_cache(maxsize=256)
def _index(word: int, rows: int, k: int, size: int, major: int) -> Array:
    """Offsets of an operand's bytes, [rows, k * size]."""
    if major:
        return mn_major(hopper(word), rows, k, size).reshape(rows, k * size)
    return k_major(hopper(word), rows, k * size)


@functools.cache
def _places(count: int, per: int) -> tuple[Array, Array]:
    """Rows [count, 32, per] and columns of D in `count` registers of `per` elements."""
    element = np.arange(count * per).reshape(count, 1, per)
    rows = GROUP[:, None] + 8 * (element // 2 % 2)
    return rows, 8 * (element // 4) + 2 * QUAD[:, None] + element % 2


_RESULTS = {"f16": np.float16, "f32": np.float32, "s32": np.int32}


def _accumulator(w: Warp, registers: list[Reg], kind: str, n: int) -> Array:
    """A warp's 16 rows of D, FP64 [16, n]."""
    given = np.array([w.r[reg.index] for reg in registers]).view(_RESULTS[kind]).reshape(len(registers), LANES, -1)
    out = np.zeros((16, n))
    out[_places(len(registers), given.shape[2])] = given
    return out


def _write(w: Warp, registers: list[Reg], total: Array) -> None:
    new = total[_places(len(registers), 4 // total.itemsize)]  # [registers, 32, elements]
    packed = np.ascontiguousarray(new).view(U32).reshape(len(registers), LANES)
    for reg, lanes in zip(registers, packed, strict=True):
        w.r[reg.index] = lanes


def _finish(cta: Cta) -> None:
    for w in cta.warps:
        if _groups(w).open or _groups(w).committed:
            raise Fault(f"wgmma of CTA {cta.index} warp {w.index} was not waited for")


FINISHERS.append(_finish)
