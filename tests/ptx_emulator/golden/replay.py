"""Runs a case in the emulator on the record's buffers, and compares with what the GPU left in them."""

import struct

import numpy as np

import ptx_emulator

from .catalogue import Array, Case, Map
from .store import Record


def _aligned(data: Array) -> Array:
    """A copy whose address is a multiple of 256, as the driver's are."""
    room = np.zeros(data.nbytes + 256, np.uint8)
    start = -room.__array_interface__["data"][0] % 256
    copy = room[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    copy[...] = data
    return copy


def run(case: Case, record: Record, schedule: str = "round") -> dict[int, Array]:
    """Outputs by argument."""
    stored, maps = iter(record.before(case.name)), record.maps(case.name)
    args: list[Array | np.generic | bytes | None] = []
    for a in case.args:
        if isinstance(a, int):
            args.append(np.uint32(a & 0xFFFFFFFF))
        else:
            args.append(None if isinstance(a, Map) else _aligned(next(stored)))
    buffers = {n: x for n, x in enumerate(args) if isinstance(x, np.ndarray)}
    for n, a in enumerate(case.args):
        if isinstance(a, Map):
            base, raw = maps[n]
            (address,) = struct.unpack_from("<Q", raw)
            here = buffers[a.buffer].__array_interface__["data"][0] + address - base
            args[n] = struct.pack("<Q", here) + raw[8:]
    ptx_emulator.load(case.ptx).launch(
        "k",
        grid=(case.grid, 1, 1),
        block=(case.block, 1, 1),
        cluster=(case.cluster, 1, 1),
        args=[a for a in args if a is not None],
        shared=case.shared,
        schedule=schedule,
    )
    return {n: buffers[n] for n in record.after(case.name)}


def values(bits: Array, kind: str) -> Array:
    """FP64 values of elements of a floating point kind."""
    bits = np.ascontiguousarray(bits).reshape(-1)
    if kind == "bf16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(np.float64)


def beyond(got: Array, want: Array, kind: str, bound: tuple[float, float]) -> Array:
    """Which elements differ by more than relative * |want| + absolute; NaN and infinities must be the same."""
    x, y = values(got, kind), values(want, kind)
    relative, absolute = bound
    with np.errstate(all="ignore"):
        far = ~(np.abs(x - y) <= relative * np.abs(y) + absolute)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    return far & ~same
