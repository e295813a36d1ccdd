"""A kernel decoded once: every instruction a Python closure over its operands, called with a warp and a lane mask.

Decoders register themselves by the first part of the opcode. A decoder gets the instruction and the `Program`, whose
`source` and `target` turn operands into readers and writers of the register file, and returns a function that carries
the instruction out and returns None, or says in words why it has to wait. What no decoder knows becomes an instruction
that faults when it is reached.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .errors import Fault, UnknownInstructionError
from .machine import BRANCH, EXIT, LANE, LANES, PLAIN, Cta, Warp
from .memory import PARAM_WINDOW, RESERVED_SHARED, UINT
from .numbers import U32, U64, Array, every
from .parser import Address, Imm, Instruction, Kernel, Operand, Pair, Reg, Sink, Special, Sym, Variable, Vec

Mask = Array | None
Run = Callable[[Warp, Mask], str | None]
Read = Callable[[Warp], Array]
Write = Callable[[Warp, Array, Mask], None]
Decoder = Callable[[Instruction, "Program"], Run]
Step = tuple[int, Any, int, bool, int]
Use = Callable[[Warp], None]

DECODERS: dict[str, Decoder] = {}
FINISHERS: list[Callable[[Cta], None]] = []  # checks of a CTA whose warps have all ended

DTYPES: dict[str, Any] = {
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    "b128": UINT[16],
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32": np.dtype(np.float32),
    "f32x2": np.dtype(np.uint64),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}


def decoder(*names: str) -> Callable[[Decoder], Decoder]:
    def register(function: Decoder) -> Decoder:
        for name in names:
            assert name not in DECODERS, name
            DECODERS[name] = function
        return function

    return register


def unknown(i: Instruction, why: str = "") -> UnknownInstructionError:
    return UnknownInstructionError(f"the emulator does not know {i.name}{': ' + why if why else ''}")


def only(i: Instruction, parts: str) -> None:
    """Raises UnknownInstructionError if there are others than these among the opcode's parts."""
    if strange := [x for x in i.op if x not in parts.split()]:
        raise unknown(i, f".{strange[0]}".replace(":", "::"))


class Program:
    """A kernel for one architecture ("sm_90a", "sm_100a")."""

    def __init__(self, kernel: Kernel, arch: str):
        from . import instructions  # the decoders register themselves

        assert instructions
        self.kernel, self.arch = kernel, arch
        self.cleared = [np.zeros(LANES, UINT[r.size] if r.size else bool) for r in kernel.registers]
        self.addresses: dict[str, int] = {}
        self.spaces: dict[str, str] = {v.name: v.space for v in kernel.variables.values()}
        self.shared_data: list[tuple[int, bytes]] = []
        self.globals: list[Array] = []
        self.unknown: list[tuple[Instruction, str]] = []  # what faults when it is reached, and why
        self.local_bytes = 0
        self.param_bytes = 0
        self.static_shared = self._place(kernel.variables.values())
        self._uses: dict[int, list[Use]] = {}
        self.steps: list[Step] = [self._step(i) for i in kernel.code] + [(EXIT, None, -1, False, -1)]
        if self._uses:
            self.steps[:-1] = [self._with_uses(*x) for x in zip(kernel.code, self.steps, strict=False)]

    def _place(self, variables: Sequence[Variable] | Any) -> int:
        """Addresses of all variables; returns the bytes of static shared memory."""
        shared = RESERVED_SHARED
        ordered = sorted(variables, key=lambda v: v.size == 0)  # the dynamic array comes last
        for v in ordered:
            if v.space == "shared":
                shared = -(-shared // v.align) * v.align
                self.addresses[v.name] = shared
                if v.data:
                    self.shared_data.append((shared, v.data))
                shared += v.size
            elif v.space == "param":
                self.param_bytes = -(-self.param_bytes // v.align) * v.align
                self.addresses[v.name] = PARAM_WINDOW + self.param_bytes
                self.param_bytes += v.size
            elif v.space == "local":
                self.local_bytes = -(-self.local_bytes // v.align) * v.align
                self.addresses[v.name] = self.local_bytes
                self.local_bytes += v.size
            else:
                data = np.zeros(v.size + 256, np.uint8)
                start = -data.__array_interface__["data"][0] % 256
                block = data[start : start + v.size]
                block[: len(v.data)] = np.frombuffer(v.data, np.uint8)
                self.globals.append(block)
                self.addresses[v.name] = block.__array_interface__["data"][0]
        return shared - RESERVED_SHARED

    def pack(self, params: Sequence[bytes]) -> Array:
        """The parameter block. Raises ValueError for a parameter of the wrong size."""
        out = np.zeros(self.param_bytes, np.uint8)
        for v, data in zip(self.kernel.params, params, strict=True):
            if len(data) != v.size:
                raise ValueError(f"parameter {v.name} takes {v.size} bytes, got {len(data)}")
            at = self.addresses[v.name] - PARAM_WINDOW
            out[at : at + v.size] = np.frombuffer(data, np.uint8)
        return out

    def finish(self, cta: Cta) -> None:
        for check in FINISHERS:
            check(cta)

    def _step(self, i: Instruction) -> Step:
        guard, negated = (i.guard.index, i.guard.negated) if i.guard else (-1, False)
        if i.op[0] == "bra":
            return (BRANCH, None, guard, negated, i.target)
        if i.op[0] in ("ret", "exit"):
            return (EXIT, None, guard, negated, -1)
        try:
            if i.op[0] not in DECODERS:
                raise unknown(i)
            run = DECODERS[i.op[0]](i, self)
        except UnknownInstructionError as e:
            run = self._refuse(i, str(e))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
            # a form whose operands are not those the decoder expects
            run = self._refuse(i, f"the emulator does not know this form of {i.name} ({type(e).__name__}: {e})")
        return (PLAIN, run, guard, negated, -1)

    def _refuse(self, i: Instruction, why: str) -> Run:
        self.unknown.append((i, why))
        return _raises(why)

    def before_use(self, registers: Sequence[Operand], use: Use) -> None:
        """Have `use` called whenever an instruction that works with one of these registers is about to run. A move does
        not: the hardware may have none, and works with what was moved.
        """
        left, reached = list(_named(registers)), set()
        while left:
            index = left.pop()
            if index not in reached:
                reached.add(index)
                left += self._moves.get(index, ())
                self._uses.setdefault(index, []).append(use)

    @cached_property
    def _moves(self) -> dict[int, set[int]]:
        """Registers to which others are moved."""
        found: dict[int, set[int]] = {}
        for i in self.kernel.code:
            if i.op[0] == "mov":
                for source in _named(i.operands[1:]):
                    found.setdefault(source, set()).update(_named(i.operands[:1]))
        return found

    def _with_uses(self, i: Instruction, step: Step) -> Step:
        uses = tuple(dict.fromkeys(use for index in _named(i.operands) for use in self._uses.get(index, ())))
        kind, run, guard, negated, target = step
        if not uses or kind != PLAIN or i.op[0] == "mov":
            return step

        def used(w: Warp, m: Mask) -> str | None:
            for use in uses:
                use(w)
            waiting: str | None = run(w, m)
            return waiting

        return (kind, used, guard, negated, target)

    # --- operands ---

    def source(self, operand: Operand, kind: str) -> Read:
        """Reader of an operand as `kind`, [32]."""
        dtype = DTYPES[kind]
        if isinstance(operand, Reg):
            return _reader(operand, dtype)
        if isinstance(operand, Imm):
            return _constant(np.full(LANES, literal(operand, kind)))
        if isinstance(operand, Special):
            special = special_register(operand.name)
            return lambda w: _fit(special(w), dtype)
        if isinstance(operand, Sym):
            return self.address_of(operand, dtype)
        raise TypeError(f"cannot read {operand}")

    def address_of(self, operand: Sym, dtype: Any) -> Read:
        if operand.name not in self.addresses:
            raise KeyError(f"no variable {operand.name}")
        value = self.addresses[operand.name] + operand.offset
        space = self.spaces[operand.name]
        if space == "shared":
            return lambda w: np.full(LANES, value + w.cta.shared_window, UINT[dtype.itemsize])
        if space == "local":
            return _constant(np.full(LANES, value, UINT[dtype.itemsize]))
        return _constant(np.full(LANES, value, U64))

    def target(self, operand: Operand, kind: str) -> Write:
        """Writer of values of `kind` ([32]); narrower ones are extended by their sign, if they have one."""
        if isinstance(operand, Sink):
            return lambda w, v, m: None
        if not isinstance(operand, Reg):
            raise TypeError(f"cannot write {operand}")
        index, have = operand.index, DTYPES[kind]
        if operand.size == 0:

            def put_pred(w: Warp, v: Array, m: Mask) -> None:
                w.r[index] = v if m is None else np.where(m, v, w.r[index])

            return put_pred
        want = UINT[operand.size]
        same = np.dtype(want)
        if have.itemsize == operand.size:

            def put(w: Warp, v: Array, m: Mask) -> None:
                bits = v if v.dtype is same else v.view(want)
                w.r[index] = bits if m is None else np.where(m, bits, w.r[index])

            return put
        signed = np.dtype(f"i{operand.size}") if have.kind == "i" else np.dtype(want)
        raw = np.dtype(f"{have.kind if have.kind in 'iu' else 'u'}{have.itemsize}")

        def extend(w: Warp, v: Array, m: Mask) -> None:
            bits = v.view(raw).astype(signed).view(want)
            w.r[index] = bits if m is None else np.where(m, bits, w.r[index])

        return extend

    def address(self, operand: Operand) -> Read:
        """Reader of an address operand, uint64 [32]; shared addresses carry the rank of their CTA."""
        assert isinstance(operand, Address)
        base, offset = operand.base, operand.offset
        if isinstance(base, Reg):
            index, size, bits = base.index, base.size, 8 * base.size
            if offset == 0:
                return (lambda w: w.r[index]) if size == 8 else (lambda w: w.r[index].astype(U64))
            step = UINT[size](offset % (1 << bits))
            return lambda w: (w.r[index] + step).astype(U64)
        if isinstance(base, Imm):
            return _constant(np.full(LANES, base.value + offset, U64))
        assert isinstance(base, Sym)
        read = self.address_of(Sym(base.name, base.offset + offset), np.dtype(U64))
        return lambda w: read(w).astype(U64)

    def vector(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vec) else (operand,)


def _named(operands: Sequence[Operand]) -> Iterator[int]:
    """Registers in operands, wherever they stand."""
    for x in operands:
        if isinstance(x, Reg):
            yield x.index
        elif isinstance(x, Vec):
            yield from _named(x.items)
        elif isinstance(x, Pair):
            yield from _named((x.first, x.second))
        elif isinstance(x, Address):
            yield from _named((x.base, *x.rest))


def literal(operand: Imm, kind: str) -> Any:
    """An immediate as a numpy scalar of `kind`."""
    dtype = DTYPES[kind]
    if kind == "pred":
        return bool(operand.value)
    value = operand.value
    if operand.float_bytes == 8 and dtype.itemsize == 4 and kind.startswith("f"):
        return np.uint64(value).view(np.float64).astype(np.float32)
    if operand.float_bytes and operand.float_bytes != dtype.itemsize:
        raise TypeError(f"a literal of {operand.float_bytes} bytes as {kind}")
    bits: Any = UINT[dtype.itemsize](value % (1 << 8 * dtype.itemsize))
    return bits.view(dtype)


def constant(operand: Operand) -> int:
    """The value of an integer literal. Raises TypeError for anything else."""
    if not isinstance(operand, Imm) or operand.float_bytes:
        raise TypeError(f"{operand} is not an integer literal")
    return operand.value


def uniform(values: Array, mask: Mask, what: str) -> int:
    """The one value of the active lanes. Raises Fault if they differ."""
    active = values if mask is None else values[mask]
    first = active[0]
    if not every(active == first):
        raise Fault(f"{what} differs between the lanes of a warp")
    return int(first)


def kind_of(i: Instruction) -> str:
    """The last part of the opcode that is a type."""
    for part in reversed(i.op):
        if part in DTYPES:
            return part
    raise unknown(i, "no type in it")


def special_register(name: str) -> Callable[[Warp], Array]:
    """PTX ISA, "Special Registers": reader as uint32 or uint64 [32]."""
    base, _, axis = name[1:].partition(".")
    at = "xyzw".index(axis) if axis else 0
    if axis == "w":
        return _constant(np.full(LANES, int(base.startswith("n") or "_n" in base), np.uint32))
    if base == "tid":
        return lambda w: w.tid[at]
    scalars: dict[str, Callable[[Warp], int]] = {
        "ntid": lambda w: w.cta.cluster.launch.block[at],
        "ctaid": lambda w: w.cta.index[at],
        "nctaid": lambda w: w.cta.cluster.launch.grid[at],
        "cluster_ctaid": lambda w: w.cta.rank3[at],
        "cluster_nctaid": lambda w: w.cta.cluster.launch.cluster[at],
        "clusterid": lambda w: w.cta.cluster.index[at],
        "nclusterid": lambda w: w.cta.cluster.launch.grid[at] // w.cta.cluster.launch.cluster[at],
        "cluster_ctarank": lambda w: w.cta.rank,
        "cluster_nctarank": lambda w: len(w.cta.cluster.ctas),
        "warpid": lambda w: w.index,
        "nwarpid": lambda w: len(w.cta.warps),
        "smid": lambda w: w.cta.rank,
        "nsmid": lambda w: len(w.cta.cluster.ctas),
        "gridid": lambda w: 1,
        "is_explicit_cluster": lambda w: int(w.cta.cluster.launch.cluster != (1, 1, 1)),
        "dynamic_smem_size": lambda w: w.cta.cluster.launch.dynamic_shared,
        "total_smem_size": lambda w: w.cta.cluster.launch.shared_bytes + RESERVED_SHARED,
        "clock": _ticks,
        "clock_hi": lambda w: 0,
        "globaltimer_lo": _ticks,
        "globaltimer_hi": lambda w: 0,
    }
    if base in scalars:
        scalar = scalars[base]
        return lambda w: np.full(LANES, scalar(w), np.uint32)
    if base in ("clock64", "globaltimer"):
        return lambda w: np.full(LANES, _ticks(w), np.uint64)
    if base == "laneid":
        return lambda w: LANE
    bit = U32(1) << LANE
    masks = {
        "eq": bit,
        "lt": bit - U32(1),
        "le": bit - U32(1) | bit,
        "ge": ~(bit - U32(1)),
        "gt": ~(bit - U32(1) | bit),
    }
    if base.startswith("lanemask_"):
        return _constant(masks[base[9:]])
    raise KeyError(f"special register {name}")


def _ticks(w: Warp) -> int:
    return sum(w.counts) & 0xFFFFFFFF


def _constant(value: Array) -> Callable[[Warp], Array]:
    return lambda w: value


def _fit(v: Array, dtype: Any) -> Array:
    return v.view(dtype) if v.dtype.itemsize == dtype.itemsize else v.astype(UINT[dtype.itemsize]).view(dtype)


def _reader(operand: Reg, dtype: Any) -> Read:
    index = operand.index
    if operand.size == 0:
        return (lambda w: ~w.r[index]) if operand.negated else (lambda w: w.r[index])
    if operand.size == dtype.itemsize:
        return (lambda w: w.r[index]) if dtype.kind == "u" else (lambda w: w.r[index].view(dtype))
    raw = UINT[dtype.itemsize]
    return lambda w: w.r[index].astype(raw).view(dtype)


def _raises(message: str) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        raise UnknownInstructionError(message)

    return run


def side_by_side(dtype: Any, *columns: Array) -> Array:
    """[32] arrays as the columns of one, of this type."""
    out = np.empty((LANES, len(columns)), dtype)
    for j, column in enumerate(columns):
        out[:, j] = column
    return out


def simple(read: Sequence[Read], write: Write, compute: Callable[..., Array]) -> Run:
    """d = compute(sources...)."""
    if len(read) == 1:
        (a,) = read

        def run1(w: Warp, m: Mask) -> str | None:
            write(w, compute(a(w)), m)
            return None

        return run1
    if len(read) == 2:
        a, b = read

        def run2(w: Warp, m: Mask) -> str | None:
            write(w, compute(a(w), b(w)), m)
            return None

        return run2

    def run(w: Warp, m: Mask) -> str | None:
        write(w, compute(*(x(w) for x in read)), m)
        return None

    return run
