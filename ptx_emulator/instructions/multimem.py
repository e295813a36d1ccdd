"""multimem.ld_reduce, multimem.st, multimem.red (PTX ISA, "Data Movement and Conversion Instructions").

A multicast address stands for one place in the memory of each of several devices: what is stored there or reduced into
it goes to all of them, and a load gives all of their values reduced to one. The order in which the fabric adds is not
defined: here sums are those of FP64, rounded once to the type of the accumulator and then to the element's.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from ..errors import Fault
from ..machine import LANES, Warp
from ..numbers import SMALL, U64, Array, from_bf16, to_bf16, to_f16, to_f32
from ..parser import Instruction
from ..program import DTYPES, Mask, Program, Run, decoder, only, unknown
from .data import ATOMIC, combine, expand

_ALL = np.ones(LANES, bool)
_FP8 = {f"{name}x{n}": n for name in ("e4m3", "e5m2") for n in (2, 4)}  # elements in a register
_TYPES = ("b32", "b64", "u32", "u64", "s32", "s64", "f16", "f16x2", "bf16", "bf16x2", "f32", "f64", *_FP8)
_ORDERS = "weak relaxed acquire release"
_QUALIFIERS = f"global cta cluster gpu sys v2 v4 v8 {' '.join(_TYPES)}"
_OPERATIONS = "add min max and or xor"


@decoder("multimem")
def _multimem(i: Instruction, p: Program) -> Run:
    action = i.op[1]
    known = {
        "ld_reduce": f"{_ORDERS} {_OPERATIONS} acc:f32 acc:f16",
        "st": _ORDERS,
        "red": f"{_ORDERS} {_OPERATIONS}",
    }
    if action not in known:
        raise unknown(i)
    only(i, f"multimem {action} {known[action]} {_QUALIFIERS}")
    kind = next((x for x in i.op if x in _TYPES), "")
    name = next((x for x in i.op if x in _OPERATIONS.split()), "")
    if not kind or (action != "st" and not name) or (kind in _FP8 and action == "red"):
        raise unknown(i)
    size = _FP8.get(kind) or DTYPES[kind].itemsize
    loads = action == "ld_reduce"
    address = p.address(i.operands[1 if loads else 0])
    registers = p.vector(i.operands[0 if loads else 1])
    writes = [p.target(x, f"b{8 * size}") for x in registers] if loads else []
    reads = [] if loads else [p.source(x, f"b{8 * size}") for x in registers]
    count, strong = len(registers), action == "red" or bool({"relaxed", "acquire", "release"} & set(i.op))

    def run(w: Warp, m: Mask) -> str | None:
        memory, hazards, actor = w.cta.cluster.launch.memory, w.cta.cluster.hazards, w.actor
        lanes = _ALL if m is None else m
        a = address(w)[lanes]
        low, high = int(a.min()), int(a.max())
        shifts = memory.shifts(low, high + size * count - low)
        if not shifts:
            raise Fault(f"global address {low:#x} is no multicast address")
        places = [a + U64(shift % (1 << 64)) for shift in shifts]
        actor.strong = strong
        try:
            if loads:
                found = [memory.load(place, size, count) for place in places]
                for write, each in zip(writes, zip(*found, strict=True), strict=True):
                    write(w, expand(_together(name, kind, i, each), m), m)
            for place in places if not loads else ():
                values = [read(w)[lanes] for read in reads]
                if action == "st":
                    memory.store(place, size, values)
                    continue
                for lane in range(len(place)):  # two lanes may reduce into one place
                    at = place[lane : lane + 1]
                    old = memory.load(at, size, count)
                    new = [combine(name, kind, x.copy(), v[lane : lane + 1]) for x, v in zip(old, values, strict=True)]
                    memory.store(at, size, new)
        finally:
            actor.strong = False
        if strong:
            for number in {int(x) for place in places for x in place}:
                where = hazards.location("global", number)
                if loads:
                    actor.acquire(where, relaxed="acquire" not in i.op)
                else:
                    actor.release(where, relaxed="release" not in i.op)
        return None

    return run


def _together(name: str, kind: str, i: Instruction, values: Sequence[Array]) -> Array:
    """Registers of every device -> what they are together."""
    if kind[0] in "bsu" and not kind.startswith("bf"):
        return reduce(lambda x, y: ATOMIC[name](x, y), (v.view(DTYPES[kind]) for v in values)).view(values[0].dtype)
    if name != "add":
        if kind in _FP8:
            raise unknown(i, f"{name} of {kind}")
        return reduce(lambda x, y: combine(name, kind, x, y), values)
    element = kind.partition("x")[0]
    total: Array = np.sum([_numbers(element, v) for v in values], 0)
    if "acc:f16" in i.op:
        total = to_f16(total).view(np.float16).astype(np.float64)
    elif "acc:f32" in i.op:
        total = to_f32(total).astype(np.float64)
    return np.ascontiguousarray(_bits(element, total)).view(values[0].dtype).reshape(values[0].shape)


def _numbers(element: str, registers: Array) -> Array:
    """[lanes] -> FP64 [lanes, elements of a register]"""
    rows = np.ascontiguousarray(registers).reshape(-1, 1)
    if element in SMALL:
        return SMALL[element].decode(rows.view(np.uint8)).astype(np.float64)
    if element == "bf16":
        return from_bf16(rows.view(np.uint16)).astype(np.float64)
    return rows.view(DTYPES[element]).astype(np.float64)


def _bits(element: str, x: Array) -> Array:
    if element in SMALL:
        return SMALL[element].encode(x)
    if element in ("f16", "bf16"):
        return to_f16(x) if element == "f16" else to_bf16(x)
    return to_f32(x) if element == "f32" else x
