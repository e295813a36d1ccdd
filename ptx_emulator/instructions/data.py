"""mov, ld, st, cvta, isspacep, mapa, atom, red (PTX ISA, "Data Movement and Conversion Instructions")."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import Fault
from ..machine import LANES, Cta, Warp
from ..memory import (
    LOCAL_WINDOW,
    NO_RANK,
    PARAM_WINDOW,
    RANK_SHIFT,
    SHARED_WINDOW,
    UINT,
    WINDOW_SHIFT,
    Block,
    check_aligned,
    split_shared,
)
from ..numbers import U32, U64, Array, from_bf16, to_bf16, to_f16
from ..parser import Address, Instruction, Operand, Reg, Sink, Special, Sym, Vec
from ..program import DTYPES, Mask, Program, Read, Run, decoder, kind_of, side_by_side, simple, unknown
from .arithmetic import flush

_SPACES = ("param", "param:entry", "shared", "shared:cta", "shared:cluster", "global", "local", "const")
_ALL = np.ones(LANES, bool)


def space_of(i: Instruction) -> str:
    for part in i.op[1:]:
        if part in _SPACES:
            return part.split(":")[0]
    return "generic"


# --- access to any space ---


def count_bytes(w: Warp, what: str, number: int) -> None:
    w.cta.cluster.launch.statistics.bytes[what] += number


def shared_of(w: Warp, rank: int) -> Cta:
    ctas = w.cta.cluster.ctas
    if rank >= len(ctas):
        raise Fault(f"shared address of CTA rank {rank} in a cluster of {len(ctas)}")
    return ctas[rank]


def one_rank(ranks: Array) -> int | None:
    """The rank, if all lanes have the same one."""
    data = ranks.tobytes()
    return ranks.item(0) if data == data[: ranks.itemsize] * len(ranks) else None


def load(w: Warp, space: str, address: Array, size: int, count: int) -> list[Array]:
    """[lanes] addresses (already only the active ones) -> `count` unsigned arrays."""
    if space == "shared":
        rank, offset = split_shared(address)
        if (first := one_rank(rank)) is not None:
            cta = shared_of(w, first)
            if cta is not w.cta:
                count_bytes(w, "distributed shared load", len(offset) * size * count)
            return cta.shared.load(offset, size, count)
        return _by_lane(w, space, address, size, count)
    if space in ("global", "const"):
        return w.cta.cluster.launch.memory.load(address, size, count)
    if space == "param":
        count_bytes(w, "param load", len(address) * size * count)
        return _load_block(w.cta.cluster.launch.params, address, size, count)
    if space == "generic":
        window = address >> U64(WINDOW_SHIFT)
        if not (window == window[0]).all():
            return _by_lane(w, space, address, size, count)
        space, base = _window(int(window[0]))
        return load(w, space, address - U64(base), size, count)
    raise Fault(f"load from {space}")


def store(w: Warp, space: str, address: Array, size: int, values: Sequence[Array]) -> None:
    if space == "shared":
        rank, offset = split_shared(address)
        if (first := one_rank(rank)) is not None:
            cta = shared_of(w, first)
            if cta is not w.cta:
                count_bytes(w, "distributed shared store", len(offset) * size * len(values))
            cta.shared.store(offset, size, values)
            return
    elif space == "global":
        w.cta.cluster.launch.memory.store(address, size, values)
        return
    elif space == "generic":
        window = address >> U64(WINDOW_SHIFT)
        if (window == window[0]).all():
            space, base = _window(int(window[0]))
            store(w, space, address - U64(base), size, values)
            return
    else:
        raise Fault(f"store to {space}")
    for lane in range(len(address)):
        store(w, space, address[lane : lane + 1], size, [v[lane : lane + 1] for v in values])


def _window(number: int) -> tuple[str, int]:
    """Space of a generic address and what to subtract from it."""
    if number == 0:
        return "global", 0
    if number == SHARED_WINDOW >> WINDOW_SHIFT:
        return "shared", SHARED_WINDOW
    if number == PARAM_WINDOW >> WINDOW_SHIFT:
        return "param", 0
    raise Fault(f"generic address in window {number:#x}, which is no memory")


def _by_lane(w: Warp, space: str, address: Array, size: int, count: int) -> list[Array]:
    rows = [load(w, space, address[n : n + 1], size, count) for n in range(len(address))]
    return [np.concatenate([row[j] for row in rows]) for j in range(count)]


def _load_block(block: Block, address: Array, size: int, count: int) -> list[Array]:
    check_aligned(address, size * count, "param")
    offset = (address - U64(block.base)).astype(np.int64)
    if offset.min() < 0 or offset.max() + size * count > block.size:
        raise Fault(f"param address {int(offset.max()):#x} is outside of the {block.size} bytes of {block.name}")
    return [block.views[size][offset // size + j] for j in range(count)]


def _local(w: Warp) -> Array:
    if "local" not in w.state:
        w.state["local"] = np.zeros((LANES, -(-w.program.local_bytes // 16) * 16), np.uint8)
    return w.state["local"]


def _local_offsets(w: Warp, address: Array, total: int) -> Array:
    check_aligned(address, total, "local")
    offset = (address & U64(LOCAL_WINDOW - 1)).astype(np.int64)
    if offset.max() + total > w.program.local_bytes:
        raise Fault(f"local address {int(offset.max()):#x} is outside of {w.program.local_bytes} bytes")
    return offset


def bytes_at(w: Warp, address: int, size: int, fence: int | None = None) -> Array:
    """A view of bytes at a generic address in global or parameter memory (tensor maps)."""
    if address >> WINDOW_SHIFT == PARAM_WINDOW >> WINDOW_SHIFT:
        block = w.cta.cluster.launch.params
        at = address - block.base
        if at + size > block.size:
            raise Fault(f"param address {at:#x} is outside of the {block.size} bytes of parameters")
        return block.data[at : at + size]
    return w.cta.cluster.launch.memory.bytes(address, size, fence=fence)


def thread_bytes(w: Warp, lane: int, address: int, size: int) -> bytes:
    """What one thread reads at a generic address, byte by byte."""
    if address >> WINDOW_SHIFT == LOCAL_WINDOW >> WINDOW_SHIFT:
        start = int(_local_offsets(w, np.array([address + size - 1], U64), 1)[0]) + 1 - size
        return bytes(_local(w)[lane, start : start + size])
    (found,) = load(w, "generic", np.arange(address, address + size, dtype=U64), 1, 1)
    return bytes(found)


def expand(values: Array, mask: Mask) -> Array:
    """Values of the active lanes -> [32]."""
    if mask is None:
        return values
    out = np.zeros(LANES, values.dtype)
    out[mask] = values
    return out


# --- mov ---


@decoder("mov")
def _mov(i: Instruction, p: Program) -> Run:
    kind, (d, s) = i.op[1], i.operands
    if isinstance(d, Vec):
        return _unpack(d, s, kind, p)
    if isinstance(s, Vec):
        return _pack(d, s, kind, p)
    if isinstance(s, Special):
        kind = "b64" if isinstance(d, Reg) and d.size == 8 else "b32"
    return simple([p.source(s, kind)], p.target(d, kind), lambda x: x)


def _unpack(d: Vec, s: Operand, kind: str, p: Program) -> Run:
    total = DTYPES[kind].itemsize
    part = total // len(d.items)
    writes = [(j, p.target(x, f"b{8 * part}")) for j, x in enumerate(d.items) if not isinstance(x, Sink)]
    read, dtype = p.source(s, kind), UINT[part]
    parts = len(d.items)

    def run(w: Warp, m: Mask) -> str | None:
        pieces = np.ascontiguousarray(read(w)).view(dtype).reshape(LANES, parts)
        for j, write in writes:
            write(w, pieces[:, j].copy(), m)
        return None

    return run


def _pack(d: Operand, s: Vec, kind: str, p: Program) -> Run:
    total = DTYPES[kind].itemsize
    part = f"b{8 * total // len(s.items)}"
    reads, write, dtype = [p.source(x, part) for x in s.items], p.target(d, kind), UINT[total]
    small = DTYPES[part]

    def run(w: Warp, m: Mask) -> str | None:
        write(w, side_by_side(small, *(r(w) for r in reads)).view(dtype).reshape(LANES), m)
        return None

    return run


# --- ld, st ---

_ACQUIRE, _RELEASE = {"acquire", "acq_rel"}, {"release", "acq_rel"}
_STRONG = {"relaxed", "volatile", "mmio"} | _ACQUIRE | _RELEASE


def strongly(i: Instruction, access: Run, address: Read, reads: bool, writes: bool) -> Run:
    """A strong access (PTX ISA, "Strong operations"): no race with its like, and it may hand on what was seen.

    A release orders by itself, a relaxed one what lies before the last fence; acquires likewise.
    """
    space, parts = space_of(i), set(i.op)

    def run(w: Warp, m: Mask) -> str | None:
        actor, hazards = w.actor, w.cta.cluster.hazards
        w.polls += reads
        places = {int(x) for x in address(w)[_ALL if m is None else m]}
        actor.strong = True
        try:
            access(w, m)
        finally:
            actor.strong = False
        for a in places:
            where = hazards.location(*_location(space, a))
            if reads:
                actor.acquire(where, relaxed=not parts & _ACQUIRE)
            if writes:
                actor.release(where, relaxed=not parts & _RELEASE)
        return None

    return run


def _location(space: str, address: int) -> tuple[str, int]:
    if space == "generic":
        space, base = _window(address >> WINDOW_SHIFT)
        address -= base
    return space, address


@decoder("ld", "ldu")
def _ld(i: Instruction, p: Program) -> Run:
    kind, space = kind_of(i), space_of(i)
    targets = p.vector(i.operands[0])
    writes = [p.target(x, kind) for x in targets]
    address, size, count, dtype = p.address(i.operands[1]), DTYPES[kind].itemsize, len(targets), DTYPES[kind]
    _check_width(i, p, space, size * count)
    if space == "local" or _of_call(i.operands[1], p):
        return _ld_local(address, size, writes, dtype)
    banked = space in ("shared", "generic")

    def run(w: Warp, m: Mask) -> str | None:
        a = address(w)
        if banked:
            w.cta.cluster.launch.banks.access(w, a, m, size * count, space)
        values = load(w, space, a if m is None else a[m], size, count)
        for write, value in zip(writes, values, strict=True):
            write(w, expand(value, m).view(dtype), m)
        return None

    access = run if space != "generic" else _or_local(address, run, _ld_local(_in_window(address), size, writes, dtype))
    return strongly(i, access, address, True, False) if _STRONG & set(i.op) else access


def _in_window(address: Read) -> Read:
    return lambda w: address(w) - U64(LOCAL_WINDOW)


def _or_local(address: Read, run: Run, local: Run) -> Run:
    """A generic access: each thread has a local memory of its own, so that lanes must agree on the window."""

    def either(w: Warp, m: Mask) -> str | None:
        first = int(address(w)[0 if m is None else int(np.argmax(m))])
        return (local if first >> WINDOW_SHIFT == LOCAL_WINDOW >> WINDOW_SHIFT else run)(w, m)

    return either


def _of_call(operand: Operand, p: Program) -> bool:
    """Whether a .param variable is one that a call passes, which lies in local memory."""
    return isinstance(operand, Address) and isinstance(operand.base, Sym) and p.spaces[operand.base.name] == "local"


def _check_width(i: Instruction, p: Program, space: str, total: int) -> None:
    """PTX ISA, "ld": 256 bits at once for .global on sm_100 and later."""
    if total > 32 or (total > 16 and (space != "global" or p.arch.startswith("sm_9"))):
        raise unknown(i, f"{total} bytes at once from {space} memory on {p.arch}")


def _ld_local(address: Callable[[Warp], Array], size: int, writes: Any, dtype: Any) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        lanes = np.flatnonzero(_ALL if m is None else m)
        offset = _local_offsets(w, address(w)[lanes], size * len(writes))
        count_bytes(w, "local load", len(lanes) * size * len(writes))
        view = _local(w).view(UINT[size])
        for j, write in enumerate(writes):
            write(w, expand(view[lanes, offset // size + j], m).view(dtype), m)
        return None

    return run


@decoder("st")
def _st(i: Instruction, p: Program) -> Run:
    if i.op[1] in ("async", "bulk"):
        from . import bulk

        return bulk.store_async(i, p) if i.op[1] == "async" else bulk.store_bulk(i, p)
    kind, space = kind_of(i), space_of(i)
    size = DTYPES[kind].itemsize
    reads = [p.source(x, f"b{8 * size}") for x in p.vector(i.operands[1])]
    address = p.address(i.operands[0])
    _check_width(i, p, space, size * len(reads))
    if space == "local" or _of_call(i.operands[0], p):
        return _st_local(address, size, reads)
    banked = space in ("shared", "generic")

    def run(w: Warp, m: Mask) -> str | None:
        a = address(w)
        if banked:
            w.cta.cluster.launch.banks.access(w, a, m, size * len(reads), space)
        if m is None:
            store(w, space, a, size, [r(w) for r in reads])
        else:
            store(w, space, a[m], size, [r(w)[m] for r in reads])
        return None

    access = run if space != "generic" else _or_local(address, run, _st_local(_in_window(address), size, reads))
    return strongly(i, access, address, False, True) if _STRONG & set(i.op) else access


def _st_local(address: Read, size: int, reads: Sequence[Read]) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        lanes = np.flatnonzero(_ALL if m is None else m)
        offset = _local_offsets(w, address(w)[lanes], size * len(reads))
        count_bytes(w, "local store", len(lanes) * size * len(reads))
        view = _local(w).view(UINT[size])
        for j, read in enumerate(reads):
            view[lanes, offset // size + j] = read(w)[lanes]
        return None

    return run


# --- addresses ---

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0}


@decoder("cvta")
def _cvta(i: Instruction, p: Program) -> Run:
    window, kind = U64(_WINDOWS[space_of(i)]), kind_of(i)
    read, write = p.source(i.operands[1], kind), p.target(i.operands[0], kind)
    if "to" in i.op:
        return simple([read], write, lambda a: a - window)
    return simple([read], write, lambda a: a + window)


@decoder("isspacep")
def _isspacep(i: Instruction, p: Program) -> Run:
    number = U64(_WINDOWS[space_of(i)] >> WINDOW_SHIFT)
    own = "shared:cta" in i.op or "shared" in i.op
    read, write = p.source(i.operands[1], "u64"), p.target(i.operands[0], "pred")

    def run(w: Warp, m: Mask) -> str | None:
        a = read(w)
        inside = a >> U64(WINDOW_SHIFT) == number
        if own:
            inside &= (a & U64(0xFFFFFFFF)) >> U64(RANK_SHIFT) == w.cta.rank
        write(w, inside, m)
        return None

    return run


@decoder("mapa")
def _mapa(i: Instruction, p: Program) -> Run:
    """PTX ISA, "mapa": the same offset in the shared memory of another CTA of the cluster.

    A rank that the cluster does not have gives an address of no CTA, which faults where it is used: CuTe DSL lets every
    lane of a warp map its own number, and then only those that are ranks use the address.
    """
    kind = kind_of(i)
    read, rank, write = p.source(i.operands[1], kind), p.source(i.operands[2], "u32"), p.target(i.operands[0], kind)
    dtype = DTYPES[kind].type
    keep = dtype(((1 << 8 * DTYPES[kind].itemsize) - 1) & ~(0xFF << RANK_SHIFT))

    def run(w: Warp, m: Mask) -> str | None:
        r = np.minimum(rank(w), NO_RANK)
        write(w, (read(w) & keep) | r.astype(dtype) << dtype(RANK_SHIFT), m)
        return None

    return run


@decoder("getctarank")
def _getctarank(i: Instruction, p: Program) -> Run:
    read = p.source(i.operands[1], kind_of(i))
    return simple(
        [read], p.target(i.operands[0], "u32"), lambda a: (a >> a.dtype.type(RANK_SHIFT)).astype(U32) & U32(255)
    )


@decoder("prefetch", "prefetchu", "applypriority", "discard", "createpolicy")
def _prefetch(i: Instruction, p: Program) -> Run:
    """Hints. createpolicy gives a value that only cache hints read."""
    if i.op[0] != "createpolicy":
        return lambda w, m: None
    write, policy = p.target(i.operands[0], "b64"), np.zeros(LANES, U64)

    def run(w: Warp, m: Mask) -> str | None:
        write(w, policy, m)
        return None

    return run


# --- atom, red: one lane after the other ---

ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda a, b: b,
    "inc": lambda a, b: np.where(a >= b, 0, a + a.dtype.type(1)),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - a.dtype.type(1)),
}


def combine(name: str, kind: str, old: Array, new: Array, ftz: bool = False) -> Array:
    """Element by element: bits of `old` and `new` as `kind` (arrays of unsigned) -> bits.

    min and max give the number where the other is NaN; what is NaN otherwise is the canonical one, in FP64 an operand.
    ftz: FP32 sums flush subnormal numbers; atom and red do so in global memory, bulk reductions and shared memory not.
    """
    bits = old.dtype
    if kind in ("f16x2", "bf16x2"):
        return combine(name, kind[:-2], old.view(np.uint16), new.view(np.uint16)).view(bits)
    if kind in ("f16", "bf16"):
        x, y = ((v.view(np.float16) if kind == "f16" else from_bf16(v)).astype(np.float64) for v in (old, new))
        exact = _extremum(name, x, y) if name in ("min", "max") else ATOMIC[name](x, y)
        out = to_f16(exact) if kind == "f16" else to_bf16(exact)
        return np.where(np.isnan(exact), np.uint16(0x7FFF), out)
    dtype = DTYPES[kind]
    if kind == "f32" and name == "add":
        x, y = (flush(v.view(dtype)) if ftz else v.view(dtype) for v in (old, new))
        total = flush(x + y) if ftz else x + y
        return np.where(np.isnan(total), U32(0x7FFFFFFF), total.view(bits))
    return ATOMIC[name](old.view(dtype), new.view(dtype)).astype(dtype).view(bits)


def _extremum(name: str, x: Array, y: Array) -> Array:
    """-0 is less than +0."""
    out = np.minimum(x, y) if name == "min" else np.maximum(x, y)
    out = np.where(np.isnan(x), y, np.where(np.isnan(y), x, out))  # fmin and fmax keep a signalling NaN
    either = np.logical_or if name == "min" else np.logical_and
    zero = np.where(either(np.signbit(x), np.signbit(y)), -0.0, 0.0)
    return np.where((x == 0) & (y == 0), zero, out)


@decoder("atom", "red")
def _atom(i: Instruction, p: Program) -> Run:
    if i.op[1] == "async":
        from . import bulk

        return bulk.store_async(i, p)
    kind, space = kind_of(i), space_of(i)
    name = next((x for x in i.op if x in ATOMIC or x == "cas"), "")
    if not name:
        raise unknown(i)
    returns = i.op[0] == "atom"
    operands = list(i.operands)
    writes = [p.target(x, kind) for x in p.vector(operands.pop(0))] if returns else []
    address, size = p.address(operands[0]), DTYPES[kind].itemsize
    bits = f"b{8 * size}"
    sources = [p.source(x, bits) for x in p.vector(operands[1])]
    new = p.source(operands[2], bits) if name == "cas" else None
    count, banked = len(sources), space == "shared"

    def run(w: Warp, m: Mask) -> str | None:
        a, values = address(w), [s(w) for s in sources]
        if banked:
            w.cta.cluster.launch.banks.access(w, a, m, size * count, "atomic")
        replacement = new(w) if new else None
        out = [np.zeros(LANES, UINT[size]) for _ in sources]
        for lane in np.flatnonzero(_ALL if m is None else m):
            at = a[lane : lane + 1]
            old = load(w, space, at, size, count)
            result = []
            for j in range(count):
                out[j][lane] = old[j][0]
                if replacement is not None:
                    result.append(replacement[lane : lane + 1] if old[j][0] == values[j][lane] else old[j])
                else:
                    ftz = _location(space, int(at[0]))[0] == "global"
                    result.append(combine(name, kind, old[j].copy(), values[j][lane : lane + 1], ftz))
            store(w, space, at, size, result)
        for write, value in zip(writes, out, strict=False):
            write(w, value.view(DTYPES[kind]), m)
        return None

    return strongly(i, run, address, returns, True)
