"""System calls: vprintf and __assertfail (PTX Writer's Guide to Interoperability, "System Calls").

The parser turns a call of one into an instruction of that name. Formats are those of the CUDA C++ Programming Guide,
"Formatted Output"; what a launch has printed is written to stdout when it is over, as on a GPU.
"""

import math
import re
import struct
from typing import Any

import numpy as np

from ..errors import Fault, UnknownInstructionError
from ..machine import LANES, Warp
from ..numbers import Array
from ..parser import Instruction
from ..program import Mask, Program, Run, decoder
from .data import thread_bytes

_SPECIFIER = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?(?P<size>hh|h|ll|l|j|z|t)?(?P<type>.)", re.S
)
_MOST_ARGUMENTS = 32  # what comes after them is printed as it stands in the format
_INTEGERS = {(1, True): "b", (1, False): "B", (2, True): "h", (2, False): "H"} | {
    (4, True): "i",
    (4, False): "I",
    (8, True): "q",
    (8, False): "Q",
}


@decoder("vprintf")
def _vprintf(i: Instruction, p: Program) -> Run:
    write = p.target(i.operands[0], "b32")
    format_of, arguments_of = (p.source(x, "b64") for x in i.operands[1:])

    def run(w: Warp, m: Mask) -> str | None:
        formats, arguments = format_of(w), arguments_of(w)
        status = np.zeros(LANES, np.int32)
        for lane in _lanes(m):
            if not formats[lane]:
                status[lane] = -1
                continue
            values = _Arguments(w, lane, int(arguments[lane]))
            text = _SPECIFIER.sub(values.convert, _string(w, lane, int(formats[lane])))
            w.cta.cluster.launch.printed.append(text)
            status[lane] = values.count
        write(w, status, m)
        return None

    return run


class _Arguments:
    """What a thread has stored behind each other, every argument at a multiple of its size."""

    def __init__(self, warp: Warp, lane: int, address: int):
        self.warp, self.lane, self.address, self.count = warp, lane, address, 0

    def next(self, code: str) -> Any:
        """code: of `struct`; integers of less than four bytes fill four."""
        size = max(struct.calcsize(code), 4)
        self.address = -(-self.address // size) * size
        data = thread_bytes(self.warp, self.lane, self.address, size)
        self.address += size
        self.count += 1
        return struct.unpack_from("<" + code, data)[0]

    def convert(self, m: re.Match[str]) -> str:
        kind, size = m["type"], {"hh": 1, "h": 2, None: 4}.get(m["size"], 8)
        if kind == "%":
            return "%"
        if self.count >= _MOST_ARGUMENTS:
            return m[0]
        width, precision = (str(self.next("i")) if x == "*" else x for x in m.group("width", "precision"))
        rest = f"{width or ''}{'' if precision is None else '.' + precision}{kind}"
        spec = f"%{m['flags']}{rest}"
        if kind in "diuxX" or (kind == "o" and "#" not in m["flags"]):
            return spec % self.next(_INTEGERS[size, kind in "di"])
        if kind in "eEfFgG":
            value = self.next("d")
            # C does not pad infinity and NaN with zeros
            return (spec if math.isfinite(value) else f"%{m['flags'].replace('0', '')}{rest}") % value
        if kind == "c":
            return spec % chr(self.next("i") & 0xFF)
        if kind == "s":
            return spec % _string(self.warp, self.lane, self.next("Q"))
        if kind == "p":
            return f"%{m['flags']}{width or ''}s" % f"{self.next('Q'):#x}"
        raise UnknownInstructionError(f"the emulator does not know the conversion {m[0]!r} of vprintf")


@decoder("assertfail")
def _assertfail(i: Instruction, p: Program) -> Run:
    kinds = "b64", "b64", "b32", "b64"
    message, file, line, function = (p.source(x, kind) for x, kind in zip(i.operands, kinds, strict=True))

    def run(w: Warp, m: Mask) -> str | None:
        lane = _lanes(m)[0]
        what, where, caller = (
            _string(w, lane, int(x(w)[lane])) if x(w)[lane] else "?" for x in (message, file, function)
        )
        raise Fault(f"assertion failed: {what}, {where}:{int(line(w)[lane])}, {caller}")

    return run


def _lanes(m: Mask) -> list[int]:
    active: Array = np.arange(LANES) if m is None else np.flatnonzero(m)
    return [int(x) for x in active]


def _string(w: Warp, lane: int, address: int) -> str:
    found = bytearray()
    while byte := thread_bytes(w, lane, address + len(found), 1)[0]:
        found.append(byte)
    return found.decode("utf-8", "replace")
