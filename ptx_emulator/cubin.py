"""Registers of compiled kernels, read from the ELF file that ptxas writes.

Section .nv.info (not documented by NVIDIA; checked against cuobjdump -res-usage) is a list of attributes: a byte of
format, a byte of kind, and for format 4 a 16-bit size before the value. Kind 0x2f holds the index of a function's
symbol and its registers a thread.
"""

import struct
from collections.abc import Iterator

_SECTION, _SYMBOL = "<IIQQQQIIQQ", "<IBBHQQ"
_SIZED, _REGISTER_COUNT = 4, 0x2F


def registers(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, by kernel. Raises ValueError for what is not a 64-bit ELF file."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: no 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from(_SECTION, cubin, start + n * size) for n in range(count)]

    def content(n: int) -> bytes:
        return cubin[sections[n][4] : sections[n][4] + sections[n][5]]

    names = content(names_at)
    found = {}
    for n, section in enumerate(sections):
        if _name(names, section[0]) == ".nv.info":
            symbols, strings = content(section[6]), content(sections[section[6]][6])
            for symbol, used in _register_counts(content(n)):
                name_at, *_ = struct.unpack_from(_SYMBOL, symbols, symbol * struct.calcsize(_SYMBOL))
                found[_name(strings, name_at)] = used
    return found


def _name(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _register_counts(info: bytes) -> Iterator[tuple[int, int]]:
    """(symbol, registers)"""
    at = 0
    while at + 4 <= len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if kind == _REGISTER_COUNT:
                symbol, used = struct.unpack_from("<II", info, at)
                yield symbol, used
            at += size
