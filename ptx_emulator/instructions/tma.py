"""Tensor copies: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, their prefetch, and the tensor map's own
instructions (PTX ISA, "Tensor copy", "tensormap.replace", "tensormap.cp_fenceproxy").

A multicast load writes the same offset of every CTA in the mask and signals the mbarrier at the same offset there;
with .cta_group::2 the one of that CTA's pair whose rank has the parity of the given mbarrier's CTA.
"""

import numpy as np

from .. import tensormap
from ..errors import Fault
from ..hazards import TENSORMAP
from ..machine import Warp
from ..memory import UINT, WINDOW_SHIFT, GlobalMemory
from ..numbers import Array
from ..parser import Address, Instruction, Vec
from ..program import Mask, Program, Read, Run, constant, decoder, only, unknown
from ..tensormap import TensorMap
from .bulk import destinations, each_lane, fresh_queue, shared_place, submit_grouped
from .data import ATOMIC, bytes_at, combine, space_of

_ALL = np.ones(32, bool)
_DIMENSIONS = ("1d", "2d", "3d", "4d", "5d")
_GATHERS = ("tile:gather4", "tile:scatter4")
_COMMON = f"cp async bulk tensor {' '.join(_DIMENSIONS)} global shared:cta tile L2:cache_hint"


def decode(i: Instruction, p: Program) -> Run:
    if "prefetch" in i.op:
        return _prefetch(i, p)
    if i.op[1] == "reduce" or "bulk_group" in i.op:
        return _store(i, p)
    return _load(i, p)


class _Place:
    """The operand [map, {coordinates}] of an instruction: which map and which box of it.

    What a map must be for the instruction is checked when it is read. Raises Fault.
    """

    def __init__(self, i: Instruction, p: Program, operand: object, offsets: object = None):
        assert isinstance(operand, Address)
        (coordinates,) = operand.rest
        assert isinstance(coordinates, Vec)
        self.address = p.address(Address(operand.base, operand.offset))
        self.coordinates = [p.source(x, "s32") for x in coordinates.items]
        self.rank = next(int(x[0]) for x in i.op if x in _DIMENSIONS)
        self.four = any(x in _GATHERS for x in i.op)
        self.im2col = any(x.startswith("im2col") for x in i.op)
        self.offsets: list[Read] = []
        if isinstance(offsets, Vec):
            self.offsets = [p.source(x, "u16") for x in offsets.items]
        if len(self.coordinates) != (5 if self.four else self.rank) or (self.four and self.rank != 2):
            raise unknown(i, f"{len(self.coordinates)} coordinates")
        if self.offsets and len(self.offsets) != self.rank - 2:
            raise unknown(i, f"{len(self.offsets)} im2col offsets")

    def map(self, w: Warp, lane: int) -> TensorMap:
        """Decoded once a cluster as long as it does not change."""
        raw = bytes_at(w, int(self.address(w)[lane]), tensormap.BYTES, TENSORMAP)
        known = w.cta.cluster.state.setdefault("tensor maps", {})
        key = raw.tobytes()
        if key not in known:
            known[key] = tensormap.decode(raw)
        t: TensorMap = known[key]
        if t.rank != self.rank:
            raise Fault(f"{self.rank} coordinates for a tensor map of rank {t.rank}")
        if self.im2col != (t.im2col is not None):
            raise Fault(f"{'a tiled' if self.im2col else 'an im2col'} tensor map in the other mode")
        if self.four and (t.box[1] != 1 or t.interleave):
            raise Fault(f"four rows by a tensor map with boxes of {t.box}: one row and no interleave are required")
        return t

    def at(self, w: Warp, lane: int) -> tuple[int, ...]:
        return tuple(int(c(w)[lane]) for c in (*self.coordinates, *self.offsets))

    def box(self, t: TensorMap, at: tuple[int, ...]) -> tensormap.Box:
        if self.four:
            return tensormap.place(t, (at[0], 0), at[1:])
        return tensormap.place(t, at[: self.rank], offsets=at[self.rank :] or (0,) * (self.rank - 2))

    def rows(self, t: TensorMap) -> int:
        return 4 if self.four else t.rows


def _load(i: Instruction, p: Program) -> Run:
    only(i, f"{_COMMON} shared:cluster tile:gather4 im2col mbarrier:complete_tx:bytes multicast:cluster cta_group:1 "
            "cta_group:2")  # fmt: skip
    operands = list(i.operands)
    target, barrier = p.address(operands[0]), p.address(operands[2])
    place = _Place(i, p, operands[1], operands.pop(3) if "im2col" in i.op else None)
    near = next(x for x in i.op if x.startswith("shared")) == "shared:cta"
    pair = "cta_group:2" in i.op
    mask = p.source(operands[3], "u16") if "multicast:cluster" in i.op else None
    if near and mask:
        raise unknown(i)

    def issue(w: Warp, lane: int) -> None:
        cluster = w.cta.cluster
        t, at = place.map(w, lane), place.at(w, lane)
        d, b = int(target(w)[lane]), int(barrier(w)[lane])
        to = destinations(w, d, b, int(mask(w)[lane]) if mask else None, pair)
        count = place.rows(t)
        index = tensormap.shared_index(t, shared_place(w, d, own=near)[1], count)
        total = count * t.row_bytes
        low, high = int(index.min()), int(index.max())
        for cta, _ in to:
            cta.shared.check(low, high + 1 - low)

        def work() -> None:
            values = tensormap.read(t, place.box(t, at), cluster.launch.memory)
            for cta, signal in to:
                cta.shared.scatter(index, values)
                signal.complete(total)

        cluster.launch.statistics.count_copy("TMA load", total * len(to))
        if mask:
            cluster.launch.statistics.count_copy("TMA multicast", total * len(to))
        cluster.submit(fresh_queue(w), work)

    return each_lane(issue)


# PTX ISA, "cp.reduce.async.bulk.tensor": operations by element type
_BITWISE = ("and", "or", "xor")
_REDUCTIONS = {
    "u32": ("add", "min", "max", "inc", "dec", *_BITWISE),
    "s32": ("add", "min", "max", *_BITWISE),
    "u64": ("add", "min", "max", *_BITWISE),
    "s64": ("min", "max"),
    "f16": ("add", "min", "max"),
    "bf16": ("add", "min", "max"),
    "f32": ("add",),
    "f32.ftz": ("add",),
    "f64": ("add",),  # not in the ISA's table; an H100 does it
}


def _store(i: Instruction, p: Program) -> Run:
    name = next((x for x in i.op if x in ATOMIC), "") if i.op[1] == "reduce" else ""
    only(i, f"{_COMMON} reduce bulk_group im2col_no_offs {name or 'tile:scatter4'}")
    place, source = _Place(i, p, i.operands[0]), p.address(i.operands[1])

    def run(w: Warp, m: Mask) -> str | None:
        memory = w.cta.cluster.launch.memory
        # threads that store the same box do it once; a reduction counts each of them
        same: dict[tuple[int, ...], list[int]] = {}
        for lane in map(int, np.flatnonzero(_ALL if m is None else m)):
            key = (int(place.address(w)[lane]), int(source(w)[lane]), *place.at(w, lane))
            same.setdefault((*key, lane) if name else key, []).append(lane)

        def issue(lanes: list[int]) -> None:
            t, at = place.map(w, lanes[0]), place.at(w, lanes[0])
            _check_store(t, at, name)
            offset = shared_place(w, int(source(w)[lanes[0]]), own=True)[1]
            index = tensormap.shared_index(t, offset, place.rows(t), storing=True)

            def read() -> Array:
                return w.cta.shared.gather(index)

            def write(values: Array) -> None:
                box = tensormap.whole(t, place.box(t, at))
                if name:
                    values = _reduced(t, box, memory, values, name)
                tensormap.write(t, box, memory, tensormap.packed(t, values))

            w.cta.cluster.launch.statistics.count_copy("TMA reduction" if name else "TMA store", index.size)
            submit_grouped(w, np.array(lanes), "TMA store", read, write, atomic=bool(name))

        for lanes in same.values():
            issue(lanes)
        return None

    return run


def _check_store(t: TensorMap, at: tuple[int, ...], name: str) -> None:
    """PTX ISA, "Restriction on Tensor Copy instructions", the .global.shared::cta direction."""
    if min(at) < 0:
        raise Fault(f"a tensor store at coordinates {at}: none may be negative")
    if t.element.name == "b4x16_p64" or t.swizzle.flip:
        raise Fault(f"a tensor store of {t.element.name} with a swizzle of {t.swizzle}")
    if t.im2col and (min(t.im2col.lower) < 0 or max(t.im2col.upper) > 0):
        raise Fault("a tensor store by an im2col map whose bounding box leaves the tensor")
    if name and name not in _REDUCTIONS.get(t.element.name, ()):
        raise Fault(f"a reduction {name} of a tensor of {t.element.name}")


def _reduced(t: TensorMap, box: tensormap.Box, memory: GlobalMemory, values: Array, name: str) -> Array:
    dtype = UINT[t.element.bits // 8]
    old = tensormap.read(t, box, memory).reshape(-1).view(dtype)
    new = np.ascontiguousarray(values).reshape(-1).view(dtype)
    result = combine(name, t.element.kind, old, new, t.element.name.endswith("ftz"))
    return result.view(np.uint8).reshape(values.shape)


def _prefetch(i: Instruction, p: Program) -> Run:
    """Moves nothing, but the map must be one, and fit."""
    only(i, f"{_COMMON} prefetch L2 tile:gather4 im2col")
    place = _Place(i, p, i.operands[0], i.operands[1] if "im2col" in i.op else None)

    def run(w: Warp, m: Mask) -> str | None:
        for lane in map(int, np.flatnonzero(_ALL if m is None else m)):
            place.box(place.map(w, lane), place.at(w, lane))
        return None

    return run


# --- tensor maps ---

_BY_DIMENSION = {"box_dim": tensormap.BOX, "global_dim": tensormap.SIZES, "element_stride": tensormap.STEPS}
_WHOLE = {
    "rank": (tensormap.RANK, 5),
    "interleave_layout": (tensormap.INTERLEAVE, 3),
    "swizzle_mode": (tensormap.SWIZZLE, 4),
    "swizzle_atomicity": (tensormap.ATOMICITY, 4),
    "fill_mode": (tensormap.FILL, 2),
}


@decoder("tensormap")
def _tensormap(i: Instruction, p: Program) -> Run:
    if i.op[1] == "replace":
        return _replace(i, p)
    if i.op[1] == "cp_fenceproxy":
        return _copy_and_fence(i, p)
    raise unknown(i)


def _replace(i: Instruction, p: Program) -> Run:
    """Fields are written as they come; whether the map makes sense is asked when it is used."""
    name = i.op[3]
    wide = name in ("global_address", "global_stride")
    only(i, f"tensormap replace tile {name} global shared:cta b1024 {'b64' if wide else 'b32'}")
    address, value = p.address(i.operands[0]), p.source(i.operands[-1], "u64" if wide else "u32")
    ordinal = constant(i.operands[1]) if len(i.operands) == 3 else -1
    if not 0 <= ordinal < 5 and (name in _BY_DIMENSION or name == "global_stride"):
        raise unknown(i, "an ordinal of 0 to 4 is required")
    if name not in ("elemtype", "global_address", "global_stride", *_WHOLE, *_BY_DIMENSION):
        raise unknown(i)
    if name == "elemtype" or (name in _WHOLE and name != "rank"):
        constant(i.operands[-1])
    if name == "swizzle_atomicity" and p.arch.startswith("sm_9"):
        raise unknown(i, f"on {p.arch}")

    def change(words: list[int], new: int) -> None:
        if name == "global_address":
            tensormap.ADDRESS.put(words, new)
        elif name == "global_stride":
            if ordinal == 4:
                raise Fault("a tensor map has four strides: ordinals 0 to 3")
            tensormap.put_stride(words, ordinal, new)
        elif name == "elemtype":
            if new >= len(tensormap.ELEMENTS) or tensormap.ELEMENTS[new].name not in tensormap.CODES:
                raise Fault(f"element type {new} is not known")
            code, tf32 = tensormap.CODES[tensormap.ELEMENTS[new].name]
            tensormap.TYPE.put(words, code)
            tensormap.TF32.put(words, tf32)
        elif name in _WHOLE:
            field, count = _WHOLE[name]
            if new >= count:
                raise Fault(f"{name} {new} is not known")
            field.put(words, new)
        else:
            _BY_DIMENSION[name][ordinal].put(words, new - 1)

    def run(w: Warp, m: Mask) -> str | None:
        for lane in map(int, np.flatnonzero(_ALL if m is None else m)):
            a = int(address(w)[lane])
            if a % tensormap.BYTES:
                raise Fault(f"tensor map at {a:#x}, which is not a multiple of {tensormap.BYTES}")
            shared = space_of(i) == "shared" or (space_of(i) == "generic" and a >> WINDOW_SHIFT)
            if shared:
                cta, offset = shared_place(w, a, own=True)
                raw = cta.shared.read(offset, tensormap.USED)
            else:
                raw = w.cta.cluster.launch.memory.bytes(a, tensormap.USED)
            words = tensormap.words_of(raw)
            change(words, int(value(w)[lane]))
            new_bytes = np.array(words, "<u8").view(np.uint8)
            if shared:
                cta.shared.write(offset, new_bytes)
            else:
                w.cta.cluster.launch.memory.bytes(a, tensormap.USED, write=True)[:] = new_bytes
        return None

    return run


def _copy_and_fence(i: Instruction, p: Program) -> Run:
    """tensormap.cp_fenceproxy: 128 bytes from shared to global memory, and a release to the tensor map's proxy."""
    only(i, "tensormap cp_fenceproxy global shared:cta tensormap:generic release cta cluster gpu sys sync aligned")
    target, source, size = p.address(i.operands[0]), p.address(i.operands[1]), constant(i.operands[2])
    if size != tensormap.BYTES:
        raise unknown(i, f"{size} bytes")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "an aligned instruction is executed by a divergent warp"
        lane = int(np.argmax(_ALL if m is None else m))
        d, (cta, offset) = int(target(w)[lane]), shared_place(w, int(source(w)[lane]), own=True)
        if d % tensormap.BYTES or offset % tensormap.BYTES:
            raise Fault(f"a tensor map from {offset:#x} to {d:#x}: both must be multiples of {tensormap.BYTES}")
        map_bytes = w.cta.cluster.launch.memory.bytes(d, size, write=True)
        map_bytes[: tensormap.USED] = cta.shared.read(offset, tensormap.USED)
        map_bytes[tensormap.USED :] = cta.shared.data[offset + tensormap.USED : offset + size]
        w.actor.fence()
        return None

    return run
