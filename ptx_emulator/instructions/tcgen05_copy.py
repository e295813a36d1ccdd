"""tcgen05.ld, .st, .cp and .shift: tensor memory from and to registers, from shared memory, and within itself."""

from dataclasses import dataclass

import numpy as np

from ..descriptors import blackwell, contained, k_major, unpacked
from ..errors import Fault
from ..machine import LANES, Cta, Warp
from ..numbers import Array
from ..parser import Imm, Instruction
from ..program import Mask, Program, Run, constant, uniform, unknown
from .tcgen05_memory import PARTITION, ROWS, at_once, group, pair_of, submit, tensor_memory, waited

_ALL = np.ones(LANES, bool)


# --- between registers and tensor memory ---


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where the registers of a warp lie (PTX ISA, "Matrix fragments for shape ...", "Packing and Unpacking").

    An access is of `height` lanes and `width` columns for each of the `starts`, one beside the other. rows and columns,
    [register, lane], are places in that block; `packed` registers hold the low halves of two columns.
    """

    rows: Array
    columns: Array
    starts: tuple[int, ...]
    width: int
    packed: bool

    @property
    def height(self) -> int:
        return int(self.rows.max()) + 1

    def gather(self, block: Array) -> Array:
        """[height, columns] -> [register, lane]"""
        if not self.packed:
            return block[self.rows, self.columns]
        low, high = block[self.rows, self.columns], block[self.rows, self.columns + 1]
        return low & np.uint32(0xFFFF) | high << np.uint32(16)

    def scatter(self, values: Array) -> Array:
        """[register, lane] -> [height, columns]; the upper halves of unpacked columns become zero."""
        block = np.zeros((self.height, self.width * len(self.starts)), np.uint32)
        if not self.packed:
            block[self.rows, self.columns] = values
        else:
            block[self.rows, self.columns] = values & np.uint32(0xFFFF)
            block[self.rows, self.columns + 1] = values >> np.uint32(16)
        return block


def fragment(shape: str, repeat: int, half: int, packed: bool) -> Fragment:
    """half: columns from the first to the second half of .16x32bx2."""
    lane, step = np.arange(LANES), 2 if packed else 1
    rows, columns, width = [], [], 0
    starts: tuple[int, ...] = (0,)
    for r in range(repeat):
        if shape == "32x32b":
            rows.append(lane)
            columns.append(np.full(LANES, r))
            width = repeat
        elif shape == "16x32bx2":
            rows.append(lane % 16)
            columns.append(lane // 16 * repeat + r)
            width, starts = repeat, (0, half)
        elif shape == "16x64b":
            rows.append(lane // 4 + 8 * (lane % 2))
            columns.append(lane // 2 % 2 + 2 * r)
            width = 2 * repeat
        elif shape == "16x128b":
            for j in range(2):
                rows.append(lane // 4 + 8 * j)
                columns.append(lane % 4 + 4 * r)
            width = 4 * repeat
        elif shape == "16x256b":
            for j in range(4):
                rows.append(lane // 4 + 8 * (j // 2))
                columns.append(2 * (lane % 4) + j % 2 + 8 * r)
            width = 8 * repeat
    return Fragment(np.array(rows), step * np.array(columns), starts, step * width, packed)


def _fragment(i: Instruction, half: int) -> Fragment:
    shape = next(x for x in i.op if x[0].isdigit())
    repeat = int(next(x for x in i.op if x[0] == "x" and x[1:].isdigit())[1:])
    most = {"16x128b": 64, "16x256b": 32}.get(shape, 128)
    if repeat & (repeat - 1) or repeat > most:
        raise unknown(i, f"x{repeat}")
    return fragment(shape, repeat, half, "pack:16b" in i.op or "unpack:16b" in i.op)


def _place(w: Warp, address: int, height: int) -> tuple[slice, int]:
    """Lanes and first column of an access; a warp reaches its own sub-partition only ("Access restrictions")."""
    lane, column = address >> 16, address & 0xFFFF
    own = PARTITION * (w.index % 4)
    if lane not in range(own, own + PARTITION, height):
        what = f"lanes {own}..{own + PARTITION - 1} only" + (" and there multiples of 16" if height == 16 else "")
        raise Fault(f"lane {lane} of tensor memory: warp {w.index} reaches {what}")
    return slice(lane, lane + height), column


def ld(i: Instruction, p: Program) -> Run:
    if "red" in i.op:
        raise unknown(i, f"tcgen05.ld.red needs sm_103f or sm_110f, {p.arch} has none")
    f = _fragment(i, constant(i.operands[2]) if len(i.operands) > 2 else 0)
    writes = [p.target(x, "b32") for x in p.vector(i.operands[0])]
    address = p.address(i.operands[1])
    if len(writes) != len(f.rows) or (len(f.starts) == 2) != (len(i.operands) == 3):
        raise unknown(i, f"{len(writes)} registers, {len(i.operands)} operands")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.ld is executed by a divergent warp"
        lanes, column = _place(w, uniform(address(w), m, "the address"), f.height)
        memory = tensor_memory(w.cta)

        def read() -> Array:
            return np.hstack([memory.read(lanes, column + s, f.width, "tcgen05.ld") for s in f.starts])

        values, w.state[run] = at_once(w, "ld", read)
        for write, value in zip(writes, f.gather(values), strict=True):
            write(w, value, m)
        return None

    def use(w: Warp) -> None:
        """A register that was loaded is named: its value is there (PTX ISA, "Register dependencies, same thread"), and
        so tensor memory was read. The ISA leaves open whether the latter follows; CuTe DSL relies on it.
        """
        operation = w.state.pop(run, None)
        if operation is not None and not w.cta.cluster.hazards.strict:
            waited(w, "ld", operation)

    p.before_use(p.vector(i.operands[0]), use)
    return run


def st(i: Instruction, p: Program) -> Run:
    halves = isinstance(i.operands[1], Imm)
    f = _fragment(i, constant(i.operands[1]) if halves else 0)
    address, reads = p.address(i.operands[0]), [p.source(x, "b32") for x in p.vector(i.operands[-1])]
    if len(reads) != len(f.rows) or (len(f.starts) == 2) != halves:
        raise unknown(i, f"{len(reads)} registers, {len(i.operands)} operands")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.st is executed by a divergent warp"
        lanes, column = _place(w, uniform(address(w), m, "the address"), f.height)
        memory, block = tensor_memory(w.cta), f.scatter(np.stack([r(w) for r in reads]))

        def write() -> None:
            for s, part in zip(f.starts, np.hsplit(block, len(f.starts)), strict=True):
                memory.write(lanes, column + s, part, "tcgen05.st")

        at_once(w, "st", write)
        return None

    return run


# --- from shared memory (PTX ISA, "tcgen05.cp", "Optional Decompression") ---

# shape and multicast -> lanes that the rows of the matrix go to, [copies, rows]
_LANES = np.arange(ROWS)
_TARGETS = {
    ("128x256b", ""): _LANES[None],
    ("128x128b", ""): _LANES[None],
    ("64x128b", "warpx2:02_13"): _LANES.reshape(2, 64),
    ("64x128b", "warpx2:01_23"): _LANES.reshape(2, 2, 32).transpose(1, 0, 2).reshape(2, 64),
    ("32x128b", "warpx4"): _LANES.reshape(4, 32),
    ("4x256b", ""): _LANES[None, ::PARTITION],
}
_PACKED = {"b4x16_p64": 4, "b6x16_p32": 6}


def cp(i: Instruction, p: Program) -> Run:
    ctas = pair_of(i)
    shape = next(x for x in i.op if x[0].isdigit())
    multicast = next((x for x in i.op if x.startswith("warpx")), "")
    source = next((x for x in i.op if x in _PACKED), "")
    if (shape, multicast) not in _TARGETS or bool(source) != ("b8x16" in i.op):
        raise unknown(i)
    bits = _PACKED.get(source, 8)
    targets, row_bytes = _TARGETS[shape, multicast], int(shape.split("x")[1].rstrip("b")) // 8
    room = PARTITION if shape == "4x256b" else 1
    address, descriptor = p.address(i.operands[0]), p.source(i.operands[1], "b64")

    def run(w: Warp, m: Mask) -> str | None:
        members = group(w, ctas, "tcgen05.cp")
        for lane in np.flatnonzero(_ALL if m is None else m):
            taddr, word = int(address(w)[lane]), int(descriptor(w)[lane])
            first = taddr >> 16
            if first >= room:
                raise Fault(f"tcgen05.cp.{shape} to lane {first} of tensor memory")
            index = k_major(blackwell(word), targets.shape[1], row_bytes)

            def work(column: int = taddr & 0xFFFF, first: int = first, index: Array = index) -> None:
                for cta in members:
                    rows = np.ascontiguousarray(_expanded(cta, index, bits)).view(np.uint32)
                    for lanes in targets:
                        tensor_memory(cta).write(lanes + first, column, rows, "tcgen05.cp")

            w.cta.cluster.launch.statistics.events["tcgen05.cp"] += 1
            submit(w, int(lane), members, work, ("cp",))
        return None

    return run


def _expanded(cta: Cta, index: Array, bits: int) -> Array:
    """Bytes [rows, row_bytes] at these offsets; sixteen elements of fewer than 8 bits become a byte each."""
    if bits == 8:
        return cta.shared.gather(index)
    return contained(unpacked(cta.shared, index.reshape(len(index), -1, 16), bits), bits).reshape(index.shape)


def shift(i: Instruction, p: Program) -> Run:
    """PTX ISA, "tcgen05.shift": rows of 32 bytes of one sub-partition go one lane down, that is towards lane 0 (which
    NVIDIA's examples of .ashift report of a B200), and the last row stays.
    """
    if "down" not in i.op:
        raise unknown(i)
    ctas, address = pair_of(i), p.address(i.operands[0])

    def run(w: Warp, m: Mask) -> str | None:
        members = group(w, ctas, "tcgen05.shift")
        for at in np.flatnonzero(_ALL if m is None else m):
            taddr = int(address(w)[at])
            lane, column = taddr >> 16, taddr & 0xFFFF
            if lane % PARTITION or lane >= ROWS:
                raise Fault(f"tcgen05.shift at lane {lane} of tensor memory, which is not a multiple of {PARTITION}")

            def work(lane: int = lane, column: int = column) -> None:
                for cta in members:
                    tensor_memory(cta).shift(lane, column, "tcgen05.shift")

            submit(w, int(at), members, work, ("shift",))
        return None

    return run
