"""Instructions of a whole warp: shfl, vote, match, activemask, redux, elect (PTX ISA, "Parallel Synchronization and
Communication Instructions", and "Data Movement: shfl.sync").

The lanes of the member mask must arrive together: a fragment without all of them waits until it meets the others.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Fault
from ..machine import LANE, LANES, Warp
from ..numbers import U32, Array
from ..parser import Imm, Instruction, Operand, Pair
from ..program import DTYPES, Mask, Program, Run, decoder, kind_of, uniform, unknown

_BITS = U32(1) << LANE


def members(p: Program, operand: Operand) -> Callable[[Warp, Mask], str | None]:
    """Check of a member mask: None if all its living lanes are here, else what is missing."""
    if isinstance(operand, Imm) and operand.value in (-1, 0xFFFFFFFF):

        def check_all(w: Warp, m: Mask) -> str | None:
            return None if w.everyone(m) else "waits for the other lanes of the warp"

        return check_all
    read = p.source(operand, "u32")

    def check(w: Warp, m: Mask) -> str | None:
        mask = uniform(read(w), m, "the member mask")
        wanted = (_BITS & U32(mask) != 0) & w.alive
        here = w.alive if m is None else m
        if (here & ~wanted).any():
            raise Fault(f"a lane outside of the member mask {mask:#x} executes the instruction")
        return None if (wanted & ~here).sum() == 0 else f"waits for the lanes of the member mask {mask:#x}"

    return check


@decoder("shfl")
def _shfl(i: Instruction, p: Program) -> Run:
    mode = i.op[2]
    target = i.operands[0]
    value, flag = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, put_flag = p.target(value, "b32"), p.target(flag, "pred") if flag else None
    a, b, c = (p.source(x, "u32") for x in i.operands[1:4])
    wait = members(p, i.operands[4])
    lane = LANE.astype(np.int64)

    def run(w: Warp, m: Mask) -> str | None:
        if reason := wait(w, m):
            return reason
        by, control = b(w).astype(np.int64) & 31, c(w).astype(np.int64)
        clamp, segment = control & 31, control >> 8 & 31
        top, low = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "up":
            j = lane - by
            ok = j >= top
        elif mode == "down":
            j = lane + by
            ok = j <= top
        elif mode == "bfly":
            j = lane ^ by
            ok = j <= top
        else:
            j = low | (by & ~segment)
            ok = j <= top
        j = np.where(ok, j, lane)
        here = w.alive if m is None else m
        needed = j if m is None else j[m]
        if not here[needed].all():
            raise Fault(f"shfl reads lane {int(needed[~here[needed]][0])}, which does not take part")
        write(w, a(w)[j], m)
        if put_flag:
            put_flag(w, ok, m)
        return None

    return run


@decoder("vote")
def _vote(i: Instruction, p: Program) -> Run:
    if i.op[1] != "sync":
        raise unknown(i, "vote without .sync")
    mode, read, wait = i.op[2], p.source(i.operands[1], "pred"), members(p, i.operands[2])
    write = p.target(i.operands[0], "b32" if mode == "ballot" else "pred")

    def run(w: Warp, m: Mask) -> str | None:
        if reason := wait(w, m):
            return reason
        here = w.alive if m is None else m
        value = read(w) & here
        if mode == "ballot":
            write(w, np.full(LANES, np.bitwise_or.reduce(np.where(value, _BITS, U32(0)))), m)
            return None
        count, total = int(value.sum()), int(here.sum())
        result = {"all": count == total, "any": count > 0, "uni": count in (0, total)}[mode]
        write(w, np.full(LANES, result), m)
        return None

    return run


@decoder("activemask")
def _activemask(i: Instruction, p: Program) -> Run:
    write = p.target(i.operands[0], "b32")

    def run(w: Warp, m: Mask) -> str | None:
        here = w.alive if m is None else m
        write(w, np.full(LANES, np.bitwise_or.reduce(np.where(here, _BITS, U32(0)))), m)
        return None

    return run


@decoder("match")
def _match(i: Instruction, p: Program) -> Run:
    kind, everything = kind_of(i), i.op[1] == "all"
    target = i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, put_flag = p.target(first, "b32"), p.target(second, "pred") if second else None
    read, wait = p.source(i.operands[1], kind), members(p, i.operands[2])

    def run(w: Warp, m: Mask) -> str | None:
        if reason := wait(w, m):
            return reason
        here, value = w.alive if m is None else m, read(w)
        same = (value[:, None] == value[None, :]) & here[None, :]
        masks = np.bitwise_or.reduce(np.where(same, _BITS[None, :], U32(0)), axis=1)
        if everything:
            equal = bool((value[here] == value[here][0]).all())
            masks = masks if equal else np.zeros(LANES, U32)
            if put_flag:
                put_flag(w, np.full(LANES, equal), m)
        write(w, masks, m)
        return None

    return run


_REDUX: dict[str, Callable[[Array], Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@decoder("redux")
def _redux(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    read, wait, write = p.source(i.operands[1], kind), members(p, i.operands[2]), p.target(i.operands[0], kind)
    name, dtype = i.op[2], DTYPES[kind]
    floats = dtype.kind == "f"
    if floats and (name not in ("min", "max") or p.arch.startswith("sm_9")):
        raise unknown(i, f"on {p.arch}")
    if not floats and {"abs", "NaN"} & set(i.op):
        raise unknown(i)

    def run(w: Warp, m: Mask) -> str | None:
        if reason := wait(w, m):
            return reason
        value = read(w)[w.alive if m is None else m]
        result = _redux_f32(name, value, i) if floats else _REDUX[name](value)
        write(w, np.full(LANES, result).astype(dtype), m)
        return None

    return run


def _redux_f32(name: str, value: Array, i: Instruction) -> Any:
    """NaN are left out unless .NaN says otherwise; +0 is greater than -0."""
    value = np.abs(value) if "abs" in i.op else value
    numbers = value[~np.isnan(value)]
    if not len(numbers) or ("NaN" in i.op and len(numbers) < len(value)):
        return U32(0x7FFFFFFF).view(np.float32)
    found = _REDUX[name](numbers)
    if found == 0:
        signs = np.signbit(numbers[numbers == 0])
        return np.float32(-0.0 if (signs.any() if name == "min" else signs.all()) else 0.0)
    return found


@decoder("elect")
def _elect(i: Instruction, p: Program) -> Run:
    """The lowest lane of the member mask leads."""
    target = i.operands[0]
    assert isinstance(target, Pair)
    write, put_flag, wait = p.target(target.first, "b32"), p.target(target.second, "pred"), members(p, i.operands[1])

    def run(w: Warp, m: Mask) -> str | None:
        if reason := wait(w, m):
            return reason
        leader = int(np.argmax(w.alive if m is None else m))
        write(w, np.full(LANES, leader, U32), m)
        put_flag(w, np.asarray(leader == LANE), m)
        return None

    return run
