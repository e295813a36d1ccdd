"""State spaces (PTX ISA, "State Spaces"): global memory of the host, shared memory of a CTA, windows of addresses.

A generic address is a global address unless it lies in one of the windows below. In the shared window bits 24 and up
hold the rank of the CTA in its cluster, and a CTA's own addresses carry its rank: shared::cta lies in shared::cluster.
Accesses are whole vectors of lanes. Every one is checked for alignment and bounds, reads of shared memory also for
having been written.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Fault
from .hazards import GLOBAL, SHARED, Hazards, Shadow
from .numbers import U64, Array, every

if TYPE_CHECKING:
    from .machine import Cta
    from .processes import Marks

_B128 = np.dtype([("low", "<u8"), ("high", "<u8")])
UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: _B128}
RANK_SHIFT = 24
NO_RANK = 255  # of no CTA: the largest that an address has room for
MAX_SHARED_BYTES = 232_448  # that a CTA may have (CUDA C++ Programming Guide, "Compute Capabilities")
RESERVED_SHARED = 1024  # the system's own, at the start of every CTA's shared memory
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 2 << 56
PARAM_WINDOW = 3 << 56
WINDOW_SHIFT = 56
_OFFSET = (1 << RANK_SHIFT) - 1


class Block:
    """Bytes that start at `base`; numpy views of them by element size."""

    def __init__(self, base: int, data: Array, name: str, writable: bool = True):
        self.base, self.data, self.name, self.writable = base, data, name, writable
        self.size = len(data)
        self.views = {n: data[: self.size // n * n].view(t) for n, t in UINT.items()}
        self._shadow: Shadow | None = None

    def shadow(self, hazards: Hazards) -> Shadow:
        if self._shadow is None or self._shadow.hazards is not hazards:
            self._shadow = Shadow(
                hazards, self.size, GLOBAL, lambda at: f"byte {at} of {self.name} ({self.base + at:#x})"
            )
        return self._shadow

    def forget(self) -> None:
        self._shadow = None


class GlobalMemory:
    """Blocks of host memory by their real addresses. `discover` may find more when an address is in none."""

    def __init__(self, discover: Callable[[], Sequence[tuple[int, int, str]]] | None = None):
        self.blocks: list[Block] = []
        self.bases: list[int] = []
        self.discover = discover
        self.hazards: Hazards | None = None
        self.marks: Marks | None = None  # of a process among several
        self.loaded = self.stored = 0
        self.multicasts: list[tuple[int, int, tuple[int, ...]]] = []

    def multicast(self, address: int, size: int, parts: Sequence[int]) -> None:
        """Let `size` bytes at an address stand for those at each of `parts`, which are of several devices."""
        self.multicasts.append((address, size, tuple(parts)))

    def shifts(self, address: int, size: int) -> tuple[int, ...]:
        """From a multicast address to those that it stands for; none for another address. Raises Fault."""
        for base, length, parts in self.multicasts:
            if base <= address < base + length:
                if address + size > base + length:
                    raise Fault(f"multicast address {address:#x}, {size} bytes: ends behind its {length} bytes")
                return tuple(part - base for part in parts)
        return ()

    def watch(self, hazards: Hazards) -> None:
        """Check accesses from now on against those of the same cluster."""
        self.hazards = hazards

    def unwatch(self) -> None:
        self.hazards = None
        for block in self.blocks:
            block.forget()

    def add(self, data: Array, name: str = "array", writable: bool = True) -> int:
        """Make a contiguous array's bytes known; returns its address."""
        flat = data.reshape(-1).view(np.uint8)
        base = flat.__array_interface__["data"][0]
        self.insert(Block(base, flat, name, writable))
        return int(base)

    def insert(self, block: Block) -> None:
        at = bisect.bisect_right(self.bases, block.base)
        self.blocks.insert(at, block)
        self.bases.insert(at, block.base)

    def find(self, address: int, size: int, write: bool = False) -> Block:
        """The block that holds all of it. Raises Fault."""
        block = self._find(address, size)
        if block is None and self.discover is not None:
            self.survey()
            block = self._find(address, size)
        if block is None and self.shifts(address, 1):
            raise Fault(f"global address {address:#x} is a multicast address, for multimem instructions only")
        if block is None:
            raise Fault(f"global address {address:#x}, {size} bytes: in no array that is known{self._near(address)}")
        if write and not block.writable:
            raise Fault(f"global address {address:#x}: {block.name} is read-only")
        return block

    def survey(self) -> None:
        """Make everything known that `discover` finds."""
        if self.discover is not None:
            for base, length, name in self.discover():
                self.insert(Block(base, host_bytes(base, length), name))

    def _find(self, address: int, size: int) -> Block | None:
        at = bisect.bisect_right(self.bases, address) - 1
        # views of one storage may nest, so look a few blocks back
        for block in reversed(self.blocks[max(0, at - 8) : at + 1]):
            if block.base <= address and address + size <= block.base + block.size:
                return block
        return None

    def _near(self, address: int) -> str:
        at = bisect.bisect_right(self.bases, address) - 1
        if at < 0:
            return ""
        block = self.blocks[at]
        return f"; {block.name} of {block.size} bytes starts {address - block.base} bytes before"

    def bytes(self, address: int, size: int, write: bool = False, fence: int | None = None) -> Array:
        """A view of `size` bytes, which the current actor reads (or writes) by way of the proxy of that fence."""
        block = self.find(address, size, write)
        place = slice(address - block.base, address - block.base + size)
        self.note(block, place, write, fence)
        return block.data[place]

    def note(
        self,
        block: Block,
        index: Any,
        write: bool = False,
        fence: int | None = None,
        unchanged: Callable[[], Array] | None = None,
    ) -> None:
        """The current actor reads or writes these bytes of a block, see `Shadow`. Raises Fault for a race."""
        if self.marks is not None:
            self.marks.note(block, index, write)
        if self.hazards is not None:
            shadow = block.shadow(self.hazards)
            if write:
                shadow.write(index, unchanged)
            else:
                shadow.read(index, fence)

    def load(self, address: Array, size: int, count: int) -> list[Array]:
        """[lanes] addresses -> `count` arrays of `size`-byte unsigned integers."""
        self.loaded += len(address) * size * count
        block, index = self._locate(address, size, count)
        if block is not None:
            view = block.views[size]
            return [view[index + j] for j in range(count)]
        rows = np.stack([self.bytes(int(a), size * count) for a in address]).view(UINT[size])
        return [np.ascontiguousarray(rows[:, j]) for j in range(count)]

    def store(self, address: Array, size: int, values: Sequence[Array]) -> None:
        self.stored += len(address) * size * len(values)
        block, index = self._locate(address, size, len(values), values)
        if block is not None:
            view = block.views[size]
            for j, value in enumerate(values):
                view[index + j] = value
            return
        for lane, a in enumerate(address):
            row = np.array([v[lane] for v in values], UINT[size]).view(np.uint8)
            self.bytes(int(a), len(row), True)[:] = row

    def _locate(
        self, address: Array, size: int, count: int, values: Sequence[Array] | None = None
    ) -> tuple[Block | None, Any]:
        """values: what is written."""
        write, total = values is not None, size * count
        check_aligned(address, total, "global")
        low, high, run = _extent(address.view(np.int64), total)
        block = self._find(low, high + total - low)
        if block is None or block.base % size:
            # lanes in several arrays, each looked up for itself
            for a in address:
                self.find(int(a), total, write)
            return None, None
        if write and not block.writable:
            raise Fault(f"global address {low:#x}: {block.name} is read-only")
        offset = (address - U64(block.base)).astype(np.int64)
        if self.hazards is not None or self.marks is not None:
            index = slice(low - block.base, high + total - block.base) if run else _spread(offset, total)
            self.note(block, index, write, unchanged=lambda: _holds(block.data[index], values, size))
        return block, offset // size


class SharedMemory:
    """One CTA's shared memory, from RESERVED_SHARED on. Addresses here are offsets, without the rank."""

    def __init__(self, size: int, rank: int):
        self.rank = rank
        self.size = RESERVED_SHARED + size
        padded = (self.size + 15) // 16 * 16
        self.data = np.full(padded, 0xCD, np.uint8)
        self.views = {n: self.data.view(t) for n, t in UINT.items()}
        self.written = np.zeros(padded, bool)
        self.loaded = self.stored = 0
        self._cta: Cta | None = None

    def watch(self, cta: "Cta") -> None:
        """Check accesses from now on against those of the same cluster."""
        self._cta = cta
        self._shadow = Shadow(
            cta.cluster.hazards, len(self.data), SHARED, lambda at: f"shared address {at:#x} (rank {self.rank})"
        )

    def check(self, offset: int, size: int, what: str = "shared") -> None:
        if offset < RESERVED_SHARED or offset + size > self.size:
            raise Fault(
                f"{what} address {offset:#x}, {size} bytes: outside of the CTA's "
                f"{RESERVED_SHARED:#x}..{self.size:#x} (rank {self.rank})"
            )

    def read(self, offset: int, size: int) -> Array:
        """A view of bytes that must all have been written."""
        self.check(offset, size)
        place = slice(offset, offset + size)
        self._reading(place)
        self.loaded += size
        return self.data[place]

    def write(self, offset: int, values: Array) -> None:
        self.check(offset, len(values))
        place = slice(offset, offset + len(values))
        self._writing(place)
        self.stored += len(values)
        self.data[place] = values

    def gather(self, index: Array) -> Array:
        """Bytes at these offsets, of any shape; bounds and writes checked."""
        low, high = int(index.min()), int(index.max())
        self.check(low, high + 1 - low)
        self._reading(index)
        self.loaded += index.size
        return self.data[index]

    def scatter(self, index: Array, values: Array) -> None:
        low, high = int(index.min()), int(index.max())
        self.check(low, high + 1 - low)
        self._writing(index)
        self.stored += index.size
        self.data[index] = values

    def load(self, offset: Array, size: int, count: int) -> list[Array]:
        self._reading(self._places(offset, size * count))
        first = offset // size
        self.loaded += len(offset) * size * count
        return [self.views[size][first + j] for j in range(count)]

    def store(self, offset: Array, size: int, values: Sequence[Array]) -> None:
        index = self._places(offset, size * len(values))
        self._writing(index, lambda: _holds(self.data[index], values, size))
        self.stored += len(offset) * size * len(values)
        first = offset // size
        for j, value in enumerate(values):
            self.views[size][first + j] = value

    def _reading(self, index: Any) -> None:
        known = self.written[index]
        if not every(known):
            first = index.start + int(np.argmin(known)) if isinstance(index, slice) else int(index[~known].min())
            raise Fault(f"shared address {first:#x} is read but was never written (rank {self.rank})")
        if self._cta is not None:
            self._visited(self._cta, self._shadow.read(index))

    def _writing(self, index: Any, unchanged: Callable[[], Array] | None = None) -> None:
        self.written[index] = True
        if self._cta is not None:
            self._visited(self._cta, self._shadow.write(index, unchanged))

    def _visited(self, cta: "Cta", event: int) -> None:
        """What is not a warp of this CTA must be known to be over when the CTA ends."""
        hazards = cta.cluster.hazards
        actor = hazards.current
        assert actor is not None
        if actor.what or actor.warp.cta is not cta:
            hazards.foreign(cta, event)

    def _places(self, offset: Array, total: int) -> Any:
        """Index of all bytes of accesses of `total` bytes, which are checked."""
        check_aligned(offset, total, "shared")
        low, high, run = _extent(offset, total)
        self.check(low, high + total - low)
        return slice(low, high + total) if run else _spread(offset, total)


@functools.cache
def _run(count: int, step: int) -> bytes:
    return (np.arange(count, dtype=np.int64) * step).tobytes()


def _extent(offset: Array, total: int) -> tuple[int, int, bool]:
    """The least and the largest of these int64, and whether accesses of `total` bytes there are one run of bytes."""
    first, last, count = offset.item(0), offset.item(-1), len(offset)
    if last - first == (count - 1) * total and (offset - first).tobytes() == _run(count, total):
        return first, last, True
    return int(offset.min()), int(offset.max()), False


def _spread(offset: Array, total: int) -> Array:
    """Offsets of all bytes of accesses of `total` bytes, [lanes, total]."""
    return offset[:, None] + np.arange(total)


def _holds(data: Array, values: Sequence[Array] | None, size: int) -> Array:
    """Which bytes are those of vectors of elements already, one vector a lane; [lanes, bytes], or as a run of bytes."""
    assert values is not None
    same: Array = data == np.stack([np.asarray(v, UINT[size]) for v in values], 1).view(np.uint8).reshape(data.shape)
    return same


def check_aligned(address: Array, total: int, space: str) -> None:
    """Raises Fault unless every address is a multiple of the whole access."""
    bad = address & address.dtype.type(total - 1) != 0  # an access has a power of two of bytes
    if b"\1" in bad.tobytes():
        raise Fault(f"{space} address {int(address[bad][0]):#x} is not a multiple of the access's {total} bytes")


def host_bytes(address: int, size: int) -> Array:
    """The host memory there, as a writable array of bytes. The caller vouches that it is mapped."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def split_shared(address: Array) -> tuple[Array, Array]:
    """Shared window addresses -> (rank, offset)."""
    a = address.astype(np.int64)
    return a >> RANK_SHIFT, a & _OFFSET
