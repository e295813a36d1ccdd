"""tcgen05.mma (PTX ISA, "TensorCore 5th Generation of MMA Instructions").

Accumulators ("Data Path Layout Organization"): the rows of A that a CTA holds, all of them or half with a pair, are
lanes of its tensor memory, and column j of D is column j. Fewer than 128 rows either leave lanes idle (M = 64 with one
CTA: 16 rows in each sub-partition, from lane 0 or 16 of it on) or are there two or four times, in runs of lanes that
each have their share of N (M = 128 of a pair, .ws). A of tensor memory lies in the same lanes, once for each share.
B's rows are spread over a pair: the even CTA holds the first half.

Scale factors ("Scale Factor A ID", "Scale Factor B ID"): row r of A or B is in lane r % 32 of column r / 32; a column's
four bytes are scales along K. Every sub-partition holds them all, but of B only those of its own share of N (which the
ISA does not say; NVIDIA's example of a pair with M = 128 places them so). tcgen05.cp with .warpx4 puts them there.

Metadata of a sparse A (the figures of "Sparsity selector", as CUTLASS has them) are 4 bits for four elements of a row,
or for two in kind::tf32. Kinds of 8 bits have those of row r in two columns of lane r, the others in one column: of 16
rows, r and r + 8 share the word of lane r, which is of the first half of K, and of lane r + 8.

Products of elements and scales are exact, a sum over the K of one instruction is taken in FP64 and added to D with one
rounding to FP32 or FP16. The hardware keeps fewer bits while it adds (the ISA leaves it open). Integers are exact.
Collector buffers are hints: operands are read again every time.
"""

from dataclasses import dataclass

import numpy as np

from ..descriptors import (
    KINDS,
    Kind,
    blackwell,
    instruction_descriptor,
    k_major,
    mn_major,
    uncontained,
    unpacked,
    zero_columns,
)
from ..errors import Fault, UnknownInstructionError
from ..hazards import Pipe
from ..machine import LANES, Cta, Warp
from ..numbers import SMALL, U32, Array, from_bf16, to_tf32
from ..parser import Address, Instruction, Vec
from ..program import Mask, Program, Run, constant, unknown
from ..sparsity import ORDERED, expanded, nibbles
from .tcgen05_memory import PARTITION, ROWS, TensorMemory, contiguous, group, pair_of, submit, tensor_memory

_ALL = np.ones(LANES, bool)
K_BYTES = 32  # of every operand's row in one instruction, of B twice as much where A is sparse
_INDICES = (*ORDERED, 0b0110)  # of "Sparse Matrices" that mean something


@dataclass(frozen=True, slots=True)
class Form:
    """What the opcode says. vector: elements of a scale, or 0; shifts: .ashift; scale_d: of `scale-input-d`."""

    kind: Kind
    ctas: int
    vector: int
    stationary: bool
    sparse: bool
    from_tensor: bool
    shifts: bool
    scale_d: int

    @property
    def k(self) -> int:
        return 2 * self.kind.k if self.sparse else self.kind.k

    @property
    def what(self) -> str:
        return f"{self.kind.name}.sp" if self.sparse else self.kind.name


def mma(i: Instruction, p: Program) -> Run:
    name = next(x for x in i.op if x.startswith("kind:")).removeprefix("kind:")
    if name not in KINDS:
        raise unknown(i)
    kind, ctas, stationary = KINDS[name], pair_of(i), "ws" in i.op
    if kind.scaled != ("block_scale" in i.op) or (stationary and (kind.scaled or ctas == 2)):
        raise unknown(i)
    sparse = "sp" in i.op
    if sparse and (stationary or kind.scaled or "ashift" in i.op):
        raise unknown(i, "sparse A with .ws, .ashift or scales")
    d, a, b, *rest = i.operands
    metadata, idesc = rest.pop(0) if sparse else None, rest.pop(0)
    from_tensor, shifts = isinstance(a, Address), "ashift" in i.op
    if shifts and (not from_tensor or kind.scaled or {"collector:a:use", "collector:a:fill"} & set(i.op)):
        raise unknown(i, ".ashift")
    words = [p.address(d), p.address(a) if from_tensor else p.source(a, "b64"), p.source(b, "b64")]
    words += [p.source(idesc, "u32"), *(p.address(rest.pop(0)) for _ in range(2 if kind.scaled else 0))]
    disabled = [p.source(x, "b32") for x in p.vector(rest.pop(0))] if isinstance(rest[0], Vec) else []
    if len(disabled) not in (0, 4 * ctas) or (disabled and (kind.scaled or stationary)):
        raise unknown(i, f"{len(disabled)} words of disabled lanes")
    enable = p.source(rest.pop(0), "pred")
    mask = p.source(rest.pop(0), "b64") if stationary and rest else None
    scale_d = constant(rest.pop(0)) if rest else 0
    if rest or scale_d not in range(16) or (scale_d and name not in ("f16", "tf32")):
        raise unknown(i, "operands after enable-input-d")
    words += [p.address(metadata)] if metadata is not None else []
    vector = _vector(i, kind) if kind.scaled else 0
    form = Form(kind, ctas, vector, stationary, sparse, from_tensor, shifts, scale_d)

    def run(w: Warp, m: Mask) -> str | None:
        members = group(w, ctas, "tcgen05.mma")
        for lane in np.flatnonzero(_ALL if m is None else m):
            off = np.array([x(w)[lane] for x in disabled] or [0] * 4 * ctas, U32)
            columns = int(mask(w)[lane]) if mask is not None else 0
            job = Mma(form, members, [int(x(w)[lane]) for x in words], bool(enable(w)[lane]), off, columns)
            what = f"tcgen05 {form.what} {job.idesc.m}x{job.idesc.n}x{form.k}"
            w.cta.cluster.launch.statistics.count_mma(what, 2 * job.idesc.m * job.idesc.n * form.k)
            submit(w, int(lane), members, job, job.pipe)
        return None

    return run


def _vector(i: Instruction, kind: Kind) -> int:
    """Elements of a scale (PTX ISA, "Valid combinations of scale_vectorsize with types and MMA-Kind")."""
    sizes = {
        "mxf8f6f4": {"": 32, "block32": 32, "scale_vec:1X": 32},
        "mxf4": {"": 32, "block32": 32, "scale_vec:2X": 32},
        "mxf4nvf4": {"block32": 32, "scale_vec:2X": 32, "block16": 16, "scale_vec:4X": 16},
    }[kind.name]
    found = next((x for x in i.op if x.startswith(("block", "scale_vec")) and x != "block_scale"), "")
    if found not in sizes:
        raise unknown(i, f"scale vector size {found or 'missing'}")
    return sizes[found]


def data_path(m: int, ctas: int, stationary: bool, first: int) -> Array:
    """Lanes of the rows of A that a CTA holds, [shares of N, rows]. first: lane of D's address."""
    if m == 64 and ctas == 1 and not stationary:  # layout F
        if first not in (0, 16):
            raise Fault(f"tcgen05.mma: accumulator at lane {first} of tensor memory, with M = 64 it must be 0 or 16")
        row = np.arange(64)
        return (row % 16 + PARTITION * (row // 16) + first)[None]
    if first:
        raise Fault(f"tcgen05.mma: accumulator at lane {first} of tensor memory, with M = {m} it must be 0")
    return np.arange(ROWS).reshape(-1, m // ctas)


class Mma:
    """One MMA with its operands as they were at issue: addresses or descriptors of D, A and B, the instruction
    descriptor, addresses of the scales or of the metadata. disabled: words of lanes of D that stay as they are, of all
    CTAs. columns: a zero-column mask descriptor.
    """

    def __init__(self, form: Form, ctas: list[Cta], words: list[int], keep: bool, disabled: Array, columns: int):
        self.form, self.ctas, self.keep = form, ctas, keep
        self.d, self.a, self.b, idesc, *rest = words
        self.scales = [] if form.sparse else rest
        self.idesc = instruction_descriptor(form.kind, idesc, form.ctas, form.stationary, form.vector, form.sparse)
        first = self.d >> 16
        self.lanes = data_path(self.idesc.m, form.ctas, form.stationary, first)
        if form.sparse:
            self.metadata = self.metadata_column(*rest)
        self.zeroed, self.shift = zero_columns(columns, self.idesc.n, len(self.lanes))
        # bit 0 of the first word is lane 0 of the first CTA
        bits = np.unpackbits(disabled.view(np.uint8), bitorder="little")
        self.enabled = bits.reshape(len(ctas), ROWS) == 0
        if form.from_tensor:
            if self.idesc.a_major:
                raise Fault("tcgen05.mma: A of tensor memory must be K-major")
            if self.a >> 16 != first:
                raise Fault(f"tcgen05.mma: A at lane {self.a >> 16} of tensor memory, D at lane {first}")
            if form.stationary and len(self.lanes) > 1:
                raise UnknownInstructionError("the emulator does not know A of tensor memory with .ws and M < 128")
        if form.shifts and self.idesc.m == 64:
            raise Fault("tcgen05.mma: .ashift with M = 64")

    @property
    def pipe(self) -> Pipe:
        """What MMAs have in common that are carried out in order (PTX ISA, "Pipelined tcgen05 Instructions")."""
        return "mma", self.form.what, f"{self.idesc.m}x{self.idesc.n}", f"{self.d:#x}"

    def __call__(self) -> None:
        b = np.concatenate([self.operand_b(cta) for cta in self.ctas])  # [n, k]
        b[self.zeroed] = 0
        share = self.idesc.n // len(self.lanes)
        for cta, enabled in zip(self.ctas, self.enabled, strict=True):
            memory = tensor_memory(cta)
            a = None if self.form.from_tensor else self.shared_a(cta)
            for part, lanes in enumerate(self.lanes):
                left = self.tensor_a(memory, lanes) if a is None else a  # [rows, k], half of it where sparse
                if self.form.sparse:
                    left = expanded(left, self.indices(memory), self.form.kind.bits == 32, _INDICES)
                right = b[part * share : (part + 1) * share]
                if self.scales:
                    everywhere = np.arange(ROWS)
                    left = left * self.factors(memory, 0, len(lanes), everywhere)
                    right = right * self.factors(memory, 1, share, everywhere if len(self.lanes) == 1 else lanes)
                on = enabled[lanes]
                if on.any():
                    self.accumulate(memory, contiguous(lanes[on]), left[on] @ right.T)
            if self.form.shifts:
                for lane in range(0, ROWS, PARTITION):
                    memory.shift(lane, self.a & 0xFFFF, "tcgen05.mma with .ashift")

    def accumulate(self, memory: TensorMemory, lanes: slice | Array, product: Array) -> None:
        """product: [lanes, columns], exact or in FP64."""
        column, columns = self.d & 0xFFFF, product.shape[1]
        old = memory.read(lanes, column, columns, "tcgen05.mma") if self.keep else None
        scale = 0.5**self.form.scale_d
        if self.idesc.d == "f32":
            if old is not None:
                product = product + old.view(np.float32) * np.float64(scale)
            new = product.astype(np.float32).view(U32)
        elif self.idesc.d == "f16":
            if old is not None:
                product = product + old.astype(np.uint16).view(np.float16) * np.float64(scale)
            new = product.astype(np.float16).view(np.uint16).astype(U32)
        else:
            total = product.astype(np.int64)
            if old is not None:
                total = total + old.view(np.int32)
            if self.idesc.saturates:
                total = np.clip(total, -(1 << 31), (1 << 31) - 1)
            new = (total & 0xFFFFFFFF).astype(U32)
        memory.write(lanes, column, new, "tcgen05.mma")

    # --- operands ---

    def tensor_a(self, memory: TensorMemory, lanes: Array) -> Array:
        """Elements are packed into words, narrow ones a byte each."""
        words = memory.read(contiguous(lanes), self.a & 0xFFFF, K_BYTES // 4, "operand A of tcgen05.mma")
        raw = np.ascontiguousarray(words).view(np.uint8)
        if self.form.kind.bits == 8 and (bits := _bits(self.idesc.a)) < 8:
            raw = uncontained(raw, bits)
        values = _values(self.form.kind, self.idesc.a, raw)
        return -values if self.idesc.a_negated else values

    def shared_a(self, cta: Cta) -> Array:
        values = self.fetch(cta, self.a, self.lanes.shape[1], self.idesc.a_major, self.idesc.a, self.form.kind.k)
        return -values if self.idesc.a_negated else values

    def operand_b(self, cta: Cta) -> Array:
        rows = self.shift + self.idesc.n // len(self.ctas)
        values = self.fetch(cta, self.b, rows, self.idesc.b_major, self.idesc.b, self.form.k)[self.shift :]
        return -values if self.idesc.b_negated else values

    def fetch(self, cta: Cta, word: int, rows: int, mn: bool, element: str, k: int) -> Array:
        """[rows, k] of shared memory."""
        descriptor, kind = blackwell(word), self.form.kind
        if mn and (descriptor.atom == 32) != (kind.bits == 32):
            raise Fault(
                f"shared memory descriptor {word:#x}: 128-byte swizzle with 32-byte atomicity is for "
                f"transposed operands of 32 bits, and the only one for them"
            )
        narrow = kind.bits == 8 and _bits(element) < 8
        if not mn:
            index = k_major(descriptor, rows, K_BYTES * k // kind.k)
            if narrow:
                raw = unpacked(cta.shared, index.reshape(rows, -1, 16), _bits(element)).reshape(rows, -1)
            else:
                raw = cta.shared.gather(index)
        else:
            index = mn_major(descriptor, rows, k, kind.bits // 8)
            if narrow and rows % 16:
                raise UnknownInstructionError("the emulator does not know narrow MN-major operands with a shift")
            if narrow:  # sixteen rows of a k in a chunk
                chunks = index.reshape(rows // 16, 16, k).transpose(0, 2, 1)
                codes = unpacked(cta.shared, chunks, _bits(element))
                raw = codes.transpose(0, 2, 1).reshape(rows, k)
            else:
                raw = cta.shared.gather(index).reshape(rows, -1)
        return _values(kind, element, np.ascontiguousarray(raw))

    # --- sparse A ---

    def metadata_column(self, address: int) -> int:
        """The sparsity selector takes the even or the odd column of two."""
        lane, column, selector = address >> 16, address & 0xFFFF, self.idesc.selector
        if lane or self.lanes.shape != (1, ROWS):
            raise UnknownInstructionError(
                f"the emulator does not know sparse A of {self.lanes.shape[1]} rows in a CTA, metadata in lane {lane}"
            )
        if self.form.kind.bits == 8:
            if selector:
                raise Fault(f"tcgen05.mma.sp: sparsity selector {selector} with kind::{self.form.kind.name}")
            return column
        if selector > 1 or column % 2:
            raise UnknownInstructionError(
                f"the emulator does not know sparse A with selector {selector} of metadata in column {column}"
            )
        return column + selector

    def indices(self, memory: TensorMemory) -> Array:
        """Indices of 4 bits, [rows, k / 4], or k / 2 where pairs are sparse."""
        count = 2 if self.form.kind.bits == 8 else 1
        words = memory.read(slice(0, ROWS), self.metadata, count, "metadata of tcgen05.mma.sp")
        codes = nibbles(words)  # [lanes, columns, 8]
        if count == 2:
            return codes.reshape(ROWS, -1)
        # of 16 rows, lanes 0-7 hold the first half of K and lanes 8-15 the second: rows 0-7 in their lower half
        groups = codes.reshape(ROWS // 16, 2, 8, 2, 4)  # group, half of K, lane, half of the rows, index
        return groups.transpose(0, 3, 2, 1, 4).reshape(ROWS, -1)

    def factors(self, memory: TensorMemory, which: int, rows: int, lanes: Array) -> Array:
        """Scales of A (0) or B (1) for every k, [rows, k]. lanes: of the sub-partitions that hold them."""
        first = (self.idesc.a_scale, self.idesc.b_scale)[which]
        what = f"scale factors of {'AB'[which]}"
        words = _scale_words(memory, self.scales[which], rows, lanes, what)
        count = self.form.kind.k // self.form.vector
        codes = np.stack([words >> U32(8 * n) & U32(255) for n in range(first, first + count)], 1)
        if not self.idesc.ue8m0 and (codes & 0x80).any():
            raise Fault(f"{what}: a scale has its top bit set, but UE4M3 has no sign")
        values = SMALL["ue8m0" if self.idesc.ue8m0 else "e4m3"].decode(codes).astype(np.float64)
        return np.repeat(values, self.form.vector, axis=1)


def _scale_words(memory: TensorMemory, address: int, rows: int, lanes: Array, what: str) -> Array:
    """[rows] words: row r from lane r % 32 of column r / 32, the same in each of the sub-partitions."""
    if address >> 16 & 0x3FFF:
        raise Fault(f"{what} from lane {address >> 16 & 0x3FFF} of tensor memory")
    partitions, full, rest = len(lanes) // PARTITION, rows // PARTITION, rows % PARTITION
    found = []
    for column, count, here in ((0, full, PARTITION), (full, 1, rest)):
        if count and here:
            block = memory.read(contiguous(lanes[lanes % PARTITION < here]), (address & 0xFFFF) + column, count, what)
            found.append(block.reshape(partitions, here, count).transpose(0, 2, 1).reshape(partitions, -1))
    words = np.concatenate(found, 1)
    if not (words == words[0]).all():
        raise Fault(f"{what}: the sub-partitions of the lanes do not hold the same")
    return words[0]


def _bits(element: str) -> int:
    return SMALL[element].bits if element in SMALL else 8


def _values(kind: Kind, element: str, raw: Array) -> Array:
    """Bytes [rows, bytes] -> values [rows, k] in FP64."""
    if kind.bits == 4:
        nibbles = np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1)
        return SMALL[element].decode(nibbles).astype(np.float64)
    if element in SMALL:
        return SMALL[element].decode(raw).astype(np.float64)
    if element == "bf16":
        return from_bf16(raw.view(np.uint16)).astype(np.float64)
    if element == "tf32":
        return to_tf32(raw.view(np.float32)).astype(np.float64)
    return raw.view({"f16": np.float16, "u8": np.uint8, "s8": np.int8}[element]).astype(np.float64)
