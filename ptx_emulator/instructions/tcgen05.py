"""tcgen05: tensor memory and the tensor cores of sm_100 (PTX ISA, "TensorCore 5th Generation Family Instructions").

Tensor memory has 128 lanes of 512 columns of 32 bits; an address holds the lane in its upper and the column in its
lower half. mma, cp, shift and commit of a CTA pair are carried out in the order of issue, some time after it.

Accumulators ("Data path layout organization"): with one CTA and M = 128 row i of D is lane i; with two CTAs and
M = 256 rows 0-127 are the lanes of the even CTA and 128-255 those of the odd one. Column j of D is column j of tensor
memory. B's rows are spread alike: the even CTA holds the first half.

Scale factors ("Scale factor A/B layout in tensor memory"): the four rows r, r + 32, r + 64, r + 96 of a block of 128
are in lane r % 32, one column each; a column's four bytes are scales along K. All four sub-partitions of 32 lanes hold
the same: tcgen05.cp with .warpx4 puts them there.

Products of elements and scales are exact, a sum over the K of one instruction is taken in FP64 and added to D with one
rounding to FP32. The hardware keeps fewer bits while it adds (the ISA leaves it open).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..descriptors import blackwell, read_k_major, read_mn_major
from ..errors import Fault
from ..hazards import CAUSAL, Shadow
from ..machine import LANES, Cta, Warp
from ..memory import RANK_SHIFT
from ..numbers import SMALL, U32, Array, from_bf16, to_tf32
from ..parser import Address, Instruction, Vec
from ..program import FINISHERS, Mask, Program, Run, decoder, uniform, unknown
from .data import shared_of
from .sync import mbarrier_of

ROWS, COLUMNS = 128, 512
_UNDER_WAY = "tensor core work"
_ALL = np.ones(LANES, bool)
_OFFSET = (1 << RANK_SHIFT) - 1


class TensorMemory:
    """words[lane, column], which of them were written, and the allocations (first column -> columns)."""

    def __init__(self, cta: Cta) -> None:
        self.shadow: Shadow | None = None
        if cta.cluster.launch.races:
            self.shadow = Shadow(
                cta.cluster.hazards,
                (ROWS, COLUMNS),
                CAUSAL,
                lambda at: f"lane {at[0]}, column {at[1]} of tensor memory (rank {cta.rank})",
            )
        self.words = np.full((ROWS, COLUMNS), 0xDEADBEEF, np.uint32)
        self.written = np.zeros((ROWS, COLUMNS), bool)
        self.allocated: dict[int, int] = {}
        self.relinquished = False
        self.most = 0
        self.loaded = self.stored = 0  # bytes

    def allocate(self, columns: int) -> int | None:
        """First column of a free run, or None."""
        first = 0
        for start in sorted(self.allocated):
            if start - first >= columns:
                break
            first = start + self.allocated[start]
        if first + columns > COLUMNS:
            return None
        self.allocated[first] = columns
        self.most = max(self.most, sum(self.allocated.values()))
        self.written[:, first : first + columns] = False
        return first

    def check(self, column: int, count: int, what: str) -> None:
        for first, columns in self.allocated.items():
            if first <= column and column + count <= first + columns:
                return
        raise Fault(f"{what}: columns {column}..{column + count - 1} of tensor memory are not allocated")

    def read(self, lanes: slice | Array, column: int, count: int, what: str) -> Array:
        """[lanes, count] words, all of them written before."""
        self.check(column, count, what)
        known = self.written[lanes, column : column + count]
        if not known.all():
            lane, at = (int(x[0]) for x in np.nonzero(~known))
            raise Fault(f"{what}: column {column + at} of tensor memory, lane {lane} of those read, was never written")
        if self.shadow is not None:
            self.shadow.read((lanes, slice(column, column + count)))
        self.loaded += 4 * known.size
        return self.words[lanes, column : column + count]

    def write(self, lanes: slice | Array, column: int, values: Array, what: str) -> None:
        self.check(column, values.shape[-1], what)
        self.overwrite(lanes, column, values.shape[-1])
        self.stored += 4 * values.size
        self.words[lanes, column : column + values.shape[-1]] = values
        self.written[lanes, column : column + values.shape[-1]] = True

    def overwrite(self, lanes: slice | Array, column: int, count: int) -> None:
        if self.shadow is not None:
            self.shadow.write((lanes, slice(column, column + count)))


def tensor_memory(cta: Cta) -> TensorMemory:
    if cta.tensor_memory is None:
        cta.tensor_memory = TensorMemory(cta)
    found: TensorMemory = cta.tensor_memory
    return found


def _finish(cta: Cta) -> None:
    if cta.tensor_memory is not None:
        if cta.tensor_memory.allocated:
            raise Fault(f"CTA {cta.index} ended without giving back tensor memory: {cta.tensor_memory.allocated}")
        stats = cta.cluster.launch.statistics
        stats.tensor_columns = max(stats.tensor_columns, cta.tensor_memory.most)
        stats.bytes["tensor load"] += cta.tensor_memory.loaded
        stats.bytes["tensor store"] += cta.tensor_memory.stored


FINISHERS.append(_finish)


@decoder("tcgen05")
def _tcgen05(i: Instruction, p: Program) -> Run:
    if not p.arch.startswith("sm_10"):
        raise unknown(i, f"{p.arch} has no tensor memory")
    handlers: dict[str, Callable[[Instruction, Program], Run]] = {
        "alloc": _alloc,
        "dealloc": _dealloc,
        "relinquish_alloc_permit": _relinquish,
        "ld": _ld,
        "st": _st,
        "cp": _cp,
        "mma": _mma,
        "commit": _commit,
        "fence:before_thread_sync": _nothing,
        "fence:after_thread_sync": _nothing,
        "wait:ld": _wait,
        "wait:st": _wait,
    }
    if i.op[1] not in handlers:
        raise unknown(i)
    return handlers[i.op[1]](i, p)


def _nothing(i: Instruction, p: Program) -> Run:
    return lambda w, m: None


def _wait(i: Instruction, p: Program) -> Run:
    """Loads and stores are carried out when issued, but only from here on is it sure."""
    kind = i.op[1].partition(":")[2]

    def run(w: Warp, m: Mask) -> str | None:
        last = w.cta.cluster.hazards.last((kind, w.cta.rank, w.index))
        if last is not None:
            w.actor.acquire(last.clock)
        return None

    return run


def _at_once(w: Warp, kind: str, work: Callable[[], Any]) -> Any:
    """A tcgen05.ld or .st of this warp."""
    hazards = w.cta.cluster.hazards
    operation = hazards.operation(f"tcgen05.{kind}", chain=(kind, w.cta.rank, w.index), asynchronous=False)
    return hazards.perform(operation, work)


def _pair(i: Instruction) -> int:
    """CTAs of the group."""
    return 2 if "cta_group:2" in i.op else 1


def group(w: Warp, ctas: int, what: str) -> list[Cta]:
    """The CTAs that take part, the even one first."""
    if ctas == 1:
        return [w.cta]
    if w.cta.rank & 1:
        raise Fault(f"{what} with cta_group::2 is issued by the odd CTA of the pair")
    if w.cta.rank + 1 >= len(w.cta.cluster.ctas):
        raise Fault(f"{what} with cta_group::2: CTA rank {w.cta.rank} has no peer in its cluster")
    return w.cta.cluster.ctas[w.cta.rank : w.cta.rank + 2]


def _submit(w: Warp, members: list[Cta], work: Callable[[], None], touches: bool = True) -> None:
    """Work of these CTAs' tensor cores; `touches` unless it leaves tensor memory alone."""
    queue = ("tcgen05", len(members), w.cta.rank)
    operation = w.cta.cluster.hazards.operation(queue[0], chain=(*queue, w.index))
    if not touches:
        w.cta.cluster.submit(queue, work, operation)
        return
    for cta in members:
        cta.state[_UNDER_WAY] = cta.state.get(_UNDER_WAY, 0) + 1

    def run() -> None:
        work()
        for cta in members:
            cta.state[_UNDER_WAY] -= 1

    w.cta.cluster.submit(queue, run, operation)


# --- allocation ---


def _alloc(i: Instruction, p: Program) -> Run:
    target, count = p.address(i.operands[0]), p.source(i.operands[1], "u32")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.alloc is executed by a divergent warp"
        columns = uniform(count(w), m, "the number of columns")
        if columns < 32 or columns > COLUMNS or columns & (columns - 1):
            raise Fault(f"tcgen05.alloc of {columns} columns: a power of two from 32 to {COLUMNS} is required")
        memory = tensor_memory(w.cta)
        if memory.relinquished:
            raise Fault("tcgen05.alloc after relinquish_alloc_permit")
        first = memory.allocate(columns)
        if first is None:
            return f"waits for {columns} free columns of tensor memory"
        address = uniform(target(w), m, "the address of the result")
        shared_of(w, address >> RANK_SHIFT).shared.write(address & _OFFSET, np.array([first], U32).view(np.uint8))
        return None

    return run


def _dealloc(i: Instruction, p: Program) -> Run:
    address, count = p.source(i.operands[0], "u32"), p.source(i.operands[1], "u32")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.dealloc is executed by a divergent warp"
        first, columns = uniform(address(w), m, "the address"), uniform(count(w), m, "the number of columns")
        memory = tensor_memory(w.cta)
        if memory.allocated.get(first) != columns:
            raise Fault(f"tcgen05.dealloc of {columns} columns from {first:#x}; allocated are {memory.allocated}")
        if w.cta.state.get(_UNDER_WAY):
            raise Fault("tcgen05.dealloc while tensor core work is under way")
        memory.overwrite(slice(0, ROWS), first, columns)
        del memory.allocated[first]
        return None

    return run


def _relinquish(i: Instruction, p: Program) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.relinquish_alloc_permit is executed by a divergent warp"
        tensor_memory(w.cta).relinquished = True
        return None

    return run


# --- between registers and tensor memory ---


def _shape(i: Instruction) -> tuple[str, int]:
    shape = next(x for x in i.op if x[0].isdigit())
    repeat = int(next(x for x in i.op if x[0] == "x" and x[1:].isdigit())[1:])
    if shape not in ("32x32b", "16x256b", "16x128b") or any("pack" in x or x == "red" for x in i.op):
        raise unknown(i)
    return shape, repeat


def _places(shape: str, repeat: int) -> tuple[Array, Array]:
    """[register, lane] -> row of the sub-partition and column (PTX ISA, "Matrix fragments for shape ...")."""
    lane = np.arange(LANES)
    rows, columns = [], []
    for r in range(repeat):
        if shape == "32x32b":
            rows.append(lane)
            columns.append(np.full(LANES, r))
        elif shape == "16x128b":
            for half in range(2):
                rows.append(lane // 4 + 8 * half)
                columns.append(lane % 4 + 4 * r)
        else:
            for j in range(4):
                rows.append(lane // 4 + 8 * (j // 2))
                columns.append(2 * (lane % 4) + j % 2 + 8 * r)
    return np.array(rows), np.array(columns)


def _tmem_lanes(w: Warp, address: int, height: int) -> tuple[int, int]:
    """First lane and column of an access of `height` lanes; a warp reaches its own quarter of the lanes only."""
    lane, column = address >> 16, address & 0xFFFF
    own = 32 * (w.index % 4)
    if not own <= lane <= own + 32 - height or (height == 32 and lane != own):
        raise Fault(f"lane {lane} of tensor memory: warp {w.index} reaches lanes {own}..{own + 31} only")
    return lane, column


def _ld(i: Instruction, p: Program) -> Run:
    shape, repeat = _shape(i)
    rows, columns = _places(shape, repeat)
    writes = [p.target(x, "b32") for x in p.vector(i.operands[0])]
    operand = i.operands[1]
    assert isinstance(operand, Address)
    address = p.address(operand)
    width, height = int(columns.max()) + 1, int(rows.max()) + 1
    if len(writes) != len(rows):
        raise unknown(i, f"{len(writes)} registers")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.ld is executed by a divergent warp"
        lane, column = _tmem_lanes(w, uniform(address(w), m, "the address"), height)
        memory, rows_here = tensor_memory(w.cta), slice(lane, lane + height)
        block = _at_once(w, "ld", lambda: memory.read(rows_here, column, width, "tcgen05.ld"))
        values = block[rows, columns]
        for write, value in zip(writes, values, strict=True):
            write(w, value, m)
        return None

    return run


def _st(i: Instruction, p: Program) -> Run:
    shape, repeat = _shape(i)
    rows, columns = _places(shape, repeat)
    address, reads = p.address(i.operands[0]), [p.source(x, "b32") for x in p.vector(i.operands[1])]
    width, height = int(columns.max()) + 1, int(rows.max()) + 1
    if len(reads) != len(rows):
        raise unknown(i, f"{len(reads)} registers")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.st is executed by a divergent warp"
        lane, column = _tmem_lanes(w, uniform(address(w), m, "the address"), height)
        block = np.zeros((height, width), np.uint32)
        block[rows, columns] = np.stack([r(w) for r in reads])
        memory, rows_here = tensor_memory(w.cta), slice(lane, lane + height)
        _at_once(w, "st", lambda: memory.write(rows_here, column, block, "tcgen05.st"))
        return None

    return run


# --- shared to tensor memory ---


def _cp(i: Instruction, p: Program) -> Run:
    """PTX ISA, "tcgen05.cp": rows of the matrix that the descriptor gives, to lanes; .warpx4 repeats 32 rows."""
    ctas = _pair(i)
    shape = next(x for x in i.op if x[0].isdigit())
    if any(x.startswith(("b8x16", "b6x16", "b4x16")) for x in i.op):
        raise unknown(i, "decompression")
    rows, bits = (int(x.rstrip("b")) for x in shape.split("x"))
    if (shape, "warpx4" in i.op) not in {("32x128b", True), ("128x256b", False), ("128x128b", False)}:
        raise unknown(i)
    address, descriptor = p.address(i.operands[0]), p.source(i.operands[1], "b64")

    def run(w: Warp, m: Mask) -> str | None:
        for lane in np.flatnonzero(_ALL if m is None else m):
            taddr, word = int(address(w)[lane]), int(descriptor(w)[lane])
            members = group(w, ctas, "tcgen05.cp")
            if taddr >> 16:
                raise Fault(f"tcgen05.cp to lane {taddr >> 16} of tensor memory")

            def work(taddr: int = taddr, word: int = word, members: list[Cta] = members) -> None:
                for cta in members:
                    raw = read_k_major(cta.shared, blackwell(word), rows, bits // 8)
                    values = np.ascontiguousarray(raw).view(np.uint32)
                    if rows == 32:
                        values = np.tile(values, (4, 1))
                    tensor_memory(cta).write(slice(0, ROWS), taddr & 0xFFFF, values, "tcgen05.cp")

            w.cta.cluster.launch.statistics.events["tcgen05.cp"] += 1
            _submit(w, members, work)
        return None

    return run


# --- mma ---


class _Kind:
    """A kind of MMA: K of one instruction, bits of an element in shared memory."""

    def __init__(self, k: int, bits: int):
        self.k, self.bits = k, bits


_KINDS = {
    "kind:f16": _Kind(16, 16),
    "kind:tf32": _Kind(8, 32),
    "kind:f8f6f4": _Kind(32, 8),
    "kind:mxf8f6f4": _Kind(32, 8),
    "kind:mxf4": _Kind(64, 4),
    "kind:mxf4nvf4": _Kind(64, 4),
}
_F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}


def _decode(kind: str, code: int, raw: Array) -> Array:
    """Bytes [rows, bytes] -> values [rows, K] in FP64."""
    raw = np.ascontiguousarray(raw)
    if kind in ("kind:mxf4", "kind:mxf4nvf4"):
        if code != 1:
            raise Fault(f"instruction descriptor: {kind} with element type {code}; E2M1 is 1")
        table = SMALL["e2m1"].values.astype(np.float64)
        return np.stack([table[raw & 15], table[raw >> 4]], -1).reshape(raw.shape[0], -1)
    if kind == "kind:f16":
        if code > 1:
            raise Fault(f"instruction descriptor: {kind} with element type {code}")
        halves = raw.view(np.uint16)
        return from_bf16(halves).astype(np.float64) if code else halves.view(np.float16).astype(np.float64)
    if kind == "kind:tf32":
        if code != 2:
            raise Fault(f"instruction descriptor: {kind} with element type {code}; TF32 is 2")
        return to_tf32(raw.view(np.float32)).astype(np.float64)
    if code not in _F8F6F4:
        raise Fault(f"instruction descriptor: {kind} with element type {code}")
    small = SMALL[_F8F6F4[code]]
    # FP4 stands in the middle of its byte, FP6 in the lower six bits of it
    codes = raw >> 2 & 15 if small.bits == 4 else raw & ((1 << small.bits) - 1) if small.bits == 6 else raw
    return small.decode(codes).astype(np.float64)


def _scales(cta: Cta, address: int, rows: int, ids: list[int], ue8m0: bool, what: str) -> Array:
    """[rows, len(ids)] in FP64: rows r of a block of 32 in lane r, blocks in columns; the same in every quarter."""
    if address >> 16 & 0x3FFF:
        raise Fault(f"{what} from lane {address >> 16 & 0x3FFF} of tensor memory")
    columns = -(-rows // 32)
    words = tensor_memory(cta).read(slice(0, ROWS), address & 0xFFFF, columns, what)
    quarters = words.reshape(4, 32, columns)
    if not (quarters == quarters[0]).all():
        raise Fault(f"{what}: the four quarters of the lanes do not hold the same")
    codes = quarters[0].T.reshape(-1)[:rows]  # row = 32 column + lane
    picked = np.stack([codes >> U32(8 * n) & U32(255) for n in ids], 1)
    if ue8m0:
        return SMALL["ue8m0"].decode(picked).astype(np.float64)
    if (picked & 0x80).any():
        raise Fault(f"{what}: a scale has its top bit set, but UE4M3 has no sign")
    return SMALL["e4m3"].decode(picked).astype(np.float64)


def _mma(i: Instruction, p: Program) -> Run:
    if "ws" in i.op or "sp" in i.op or "i8" in i.name:
        raise unknown(i)
    kind = next(x for x in i.op if x.startswith("kind:"))
    if kind not in _KINDS:
        raise unknown(i)
    ctas, scaled = _pair(i), "block_scale" in i.op
    operands = list(i.operands)
    d = p.address(operands[0])
    a = operands[1]
    from_tensor = isinstance(a, Address)
    a_read = p.address(a) if isinstance(a, Address) else p.source(a, "b64")
    b_read, idesc = p.source(operands[2], "b64"), p.source(operands[3], "u32")
    rest = operands[4:]
    sfa = sfb = None
    if scaled:
        sfa, sfb = p.address(rest.pop(0)), p.address(rest.pop(0))
        vector = _vector(i, kind)
    else:
        vector = 0
    disabled = [p.source(x, "b32") for x in p.vector(rest.pop(0))] if isinstance(rest[0], Vec) else []
    if len(disabled) not in (0, 4 * ctas):
        raise unknown(i, f"{len(disabled)} words of disabled lanes")
    enable = p.source(rest.pop(0), "pred")
    if rest:
        raise unknown(i, "scale-input-d")

    def run(w: Warp, m: Mask) -> str | None:
        for lane in np.flatnonzero(_ALL if m is None else m):
            at, left, right, word = (int(x(w)[lane]) for x in (d, a_read, b_read, idesc))
            scales = [int(x(w)[lane]) for x in (sfa, sfb) if x is not None]
            keep = bool(enable(w)[lane])
            members = group(w, ctas, "tcgen05.mma")
            words = np.array([x(w)[lane] for x in disabled] or [0] * 4 * ctas, U32)
            job = Mma(kind, vector, members, at, left, right, word, scales, keep, from_tensor, words)
            what = f"tcgen05 {job.kind.removeprefix('kind:')} {job.m}x{job.n}x{job.k}"
            w.cta.cluster.launch.statistics.count_mma(what, 2 * job.m * job.n * job.k)
            _submit(w, members, job)
        return None

    return run


def _vector(i: Instruction, kind: str) -> int:
    """Elements of a scale."""
    if "block16" in i.op or "scale_vec:4X" in i.op:
        if kind != "kind:mxf4nvf4":
            raise unknown(i)
        return 16
    if "block32" in i.op or "scale_vec:2X" in i.op or "scale_vec:1X" in i.op:
        return 32
    defaults = {"kind:mxf8f6f4": 32, "kind:mxf4": 32}
    if kind not in defaults:
        raise unknown(i, "no scale vector size")
    return defaults[kind]


class Mma:
    """One MMA with its operands as they were at issue. Descriptor fields: PTX ISA, "Instruction descriptor"."""

    def __init__(
        self,
        kind: str,
        vector: int,
        ctas: list[Cta],
        d: int,
        a: int,
        b: int,
        idesc: int,
        scales: list[int],
        keep: bool,
        from_tensor: bool,
        disabled: Array,
    ):
        self.kind, self.vector, self.ctas = kind, vector, ctas
        # PTX ISA, "disable-output-lane": bit 0 of the first word is lane 0; lanes with a one keep what they hold
        off = np.unpackbits(disabled.view(np.uint8), bitorder="little").astype(bool).reshape(len(ctas), ROWS)
        self.lanes = [np.flatnonzero(~x) for x in off]
        self.d, self.a, self.b, self.idesc, self.scales, self.keep = d, a, b, idesc, scales, keep
        self.from_tensor = from_tensor
        self.k, self.bits = _KINDS[kind].k, _KINDS[kind].bits
        self.n = (idesc >> 17 & 63) << 3
        self.a_type, self.b_type = idesc >> 7 & 7, idesc >> 10 & (3 if self.bits == 4 else 7)
        self.a_major, self.b_major = idesc >> 15 & 1, idesc >> 16 & 1
        self.negate = (idesc >> 13 & 1, idesc >> 14 & 1)
        if scales:
            self.m = (idesc >> 27 & 3) << 7
            self.sfa_id, self.sfb_id = idesc >> 29 & 3, idesc >> 4 & 3
            self.ue8m0 = bool(idesc >> 23 & 1)
            reserved = idesc & 0b1011 | (idesc >> 24 & 7)
            if self.bits == 4 and idesc >> 31:
                raise Fault(f"instruction descriptor {idesc:#x}: K = 96 is not executed")
        else:
            self.m = (idesc >> 24 & 31) << 4
            self.d_type = idesc >> 4 & 3
            reserved = idesc & 0b1011
            if self.d_type != 1:
                raise Fault(f"instruction descriptor {idesc:#x}: accumulators other than FP32 are not executed")
        if idesc >> 2 & 1:
            raise Fault(f"instruction descriptor {idesc:#x}: sparse MMA is not executed")
        if reserved:
            raise Fault(f"instruction descriptor {idesc:#x}: reserved bits are set")
        if self.m != ROWS * len(ctas):
            raise Fault(f"instruction descriptor {idesc:#x}: M = {self.m} with {len(ctas)} CTAs is not executed")
        step = 16 * len(ctas)
        if not step <= self.n <= 256 or self.n % step:
            raise Fault(f"instruction descriptor {idesc:#x}: N = {self.n} with M = {self.m}")
        if self.bits == 4 and (self.a_major or self.b_major):
            raise Fault(f"instruction descriptor {idesc:#x}: FP4 operands must be K-major")
        if d >> 16:
            raise Fault(f"tcgen05.mma: accumulator at lane {d >> 16} of tensor memory")

    def __call__(self) -> None:
        b = np.concatenate([self.operand_b(cta) for cta in self.ctas])  # [n, k]
        for cta, lanes in zip(self.ctas, self.lanes, strict=True):
            a = self.operand_a(cta)[lanes]  # [lanes, k]
            right = b
            if self.scales:
                ids_a, ids_b = self.ids(self.sfa_id), self.ids(self.sfb_id)
                sfa = _scales(cta, self.scales[0], ROWS, ids_a, self.ue8m0, "scale factors of A")
                sfb = _scales(cta, self.scales[1], self.n, ids_b, self.ue8m0, "scale factors of B")
                a = a * np.repeat(sfa[lanes], self.vector, axis=1)
                right = b * np.repeat(sfb, self.vector, axis=1)
            memory, column = tensor_memory(cta), self.d & 0xFFFF
            total = a @ right.T
            if self.keep:
                total += memory.read(lanes, column, self.n, "tcgen05.mma").view(np.float32)
            memory.write(lanes, column, total.astype(np.float32).view(np.uint32), "tcgen05.mma")

    def ids(self, first: int) -> list[int]:
        """Bytes of a column that hold this instruction's scales."""
        count = self.k // self.vector
        if first % count:
            raise Fault(f"instruction descriptor {self.idesc:#x}: scale factor id {first} with {count} scales a row")
        return list(range(first, first + count))

    def operand_a(self, cta: Cta) -> Array:
        if self.from_tensor:
            words = self.k * self.bits // 32
            raw = tensor_memory(cta).read(slice(0, ROWS), self.a & 0xFFFF, words, "operand A of tcgen05.mma")
            raw = np.ascontiguousarray(raw).view(np.uint8)
        else:
            raw = self.fetch(cta, self.a, ROWS, self.a_major)
        values = _decode(self.kind, self.a_type, raw)
        return -values if self.negate[0] else values

    def operand_b(self, cta: Cta) -> Array:
        values = _decode(self.kind, self.b_type, self.fetch(cta, self.b, self.n // len(self.ctas), self.b_major))
        return -values if self.negate[1] else values

    def fetch(self, cta: Cta, word: int, rows: int, major: int) -> Array:
        descriptor = blackwell(word)
        if major:
            return read_mn_major(cta.shared, descriptor, rows, self.k, self.bits // 8)
        return read_k_major(cta.shared, descriptor, rows, self.k * self.bits // 8)


# --- commit ---


def _commit(i: Instruction, p: Program) -> Run:
    ctas, multicast = _pair(i), "multicast:cluster" in i.op
    address = p.address(i.operands[0])
    mask = p.source(i.operands[1], "u16") if multicast else None

    def run(w: Warp, m: Mask) -> str | None:
        for lane in np.flatnonzero(_ALL if m is None else m):
            at = int(address(w)[lane])
            members = group(w, ctas, "tcgen05.commit")
            ranks = [r for r in range(16) if int(mask(w)[lane]) >> r & 1] if mask else [at >> RANK_SHIFT]

            def work(at: int = at, ranks: list[int] = ranks) -> None:
                for rank in ranks:
                    mbarrier_of(shared_of(w, rank), at & _OFFSET).arrive(1)

            _submit(w, members, work, touches=False)
        return None

    return run
