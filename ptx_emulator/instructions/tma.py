"""Tensor copies: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor (PTX ISA, "cp.async.bulk.tensor").

A multicast load writes the same offset of every CTA in the mask and signals the mbarrier at the same offset there;
with .cta_group::2 the one of that CTA's pair whose rank has the parity of the given mbarrier's CTA.
"""

import numpy as np

from .. import tensormap
from ..errors import Fault
from ..hazards import TENSORMAP
from ..machine import Warp
from ..memory import RANK_SHIFT, UINT
from ..numbers import Array
from ..parser import Address, Instruction, Vec
from ..program import Mask, Program, Read, Run, unknown
from .asynchronous import fresh_queue, submit_grouped
from .data import _ATOMIC, bytes_at, combine, shared_of
from .sync import mbarrier_of

_ALL = np.ones(32, bool)
_OFFSET = (1 << RANK_SHIFT) - 1
_KINDS = {0: "u8", 1: "u16", 2: "u32", 3: "s32", 4: "u64", 5: "s64", 6: "f16", 7: "f32", 8: "f32", 9: "f64", 10: "bf16"}


def decode(i: Instruction, p: Program) -> Run:
    if "prefetch" in i.op:
        return lambda w, m: None
    if any(part.startswith("im2col") for part in i.op):
        raise unknown(i, "im2col")
    if i.op[1] == "reduce" or i.op[5] == "global":
        return _store(i, p)
    return _load(i, p)


def _map_operand(i: Instruction, p: Program, operand: object) -> tuple[Read, list[Read]]:
    assert isinstance(operand, Address)
    (coordinates,) = operand.rest
    assert isinstance(coordinates, Vec)
    address = p.address(Address(operand.base, operand.offset))
    return address, [p.source(x, "s32") for x in coordinates.items]


def _at(t: tensormap.TensorMap, coordinates: tuple[int, ...], rows: bool) -> tensormap.Box:
    if rows:
        return tensormap.place(t, (coordinates[0], 0), coordinates[1:])
    if len(coordinates) != t.rank:
        raise Fault(f"{len(coordinates)} coordinates for a tensor map of rank {t.rank}")
    return tensormap.place(t, coordinates)


def _read_map(w: Warp, address: int) -> tensormap.TensorMap:
    """Decoded once a launch for parameters, which do not change."""
    raw = bytes_at(w, address, tensormap.BYTES, TENSORMAP)
    key = raw.tobytes()
    known = w.cta.cluster.state.setdefault("tensor maps", {})
    if key not in known:
        known[key] = tensormap.decode(raw)
    found: tensormap.TensorMap = known[key]
    return found


def _load(i: Instruction, p: Program) -> Run:
    target, barrier = p.address(i.operands[0]), p.address(i.operands[2])
    source, coordinates = _map_operand(i, p, i.operands[1])
    multicast, pair = "multicast:cluster" in i.op, "cta_group:2" in i.op
    gather = "tile:gather4" in i.op
    mask = p.source(i.operands[3], "u16") if multicast else None

    def run(w: Warp, m: Mask) -> str | None:
        cluster = w.cta.cluster
        for lane in np.flatnonzero(_ALL if m is None else m):
            t = _read_map(w, int(source(w)[lane]))
            at = tuple(int(c(w)[lane]) for c in coordinates)
            d, b = int(target(w)[lane]), int(barrier(w)[lane])
            ranks = [r for r in range(16) if int(mask(w)[lane]) >> r & 1] if mask else [d >> RANK_SHIFT]
            signals = []
            for rank in ranks:
                owner = rank if multicast else b >> RANK_SHIFT
                if multicast and pair:
                    owner = rank & ~1 | (b >> RANK_SHIFT) & 1
                if not multicast and owner != rank and not (pair and owner >> 1 == rank >> 1):
                    raise Fault(f"TMA load to CTA rank {rank} that signals an mbarrier of rank {owner}")
                signals.append(mbarrier_of(shared_of(w, owner), b & _OFFSET))
            count = 4 if gather else int(np.prod(t.box[1:]))
            index = tensormap.shared_index(t, d & _OFFSET, count)
            total = count * t.row_bytes
            for rank in ranks:
                shared_of(w, rank).shared.check(int(index.min()), int(index.max()) + 1 - int(index.min()))

            def work(t=t, at=at, ranks=ranks, signals=signals, index=index, total=total) -> None:  # type: ignore[no-untyped-def]
                values = tensormap.read(t, _at(t, at, gather), cluster.launch.memory)
                for rank, signal in zip(ranks, signals, strict=True):
                    shared_of(w, rank).shared.scatter(index, values)
                    signal.complete(total)

            cluster.launch.statistics.count_copy("TMA load", total * len(ranks))
            if multicast:
                cluster.launch.statistics.count_copy("TMA multicast", total * len(ranks))
            cluster.submit(fresh_queue(w), work)
        return None

    return run


def _store(i: Instruction, p: Program) -> Run:
    target, coordinates = _map_operand(i, p, i.operands[0])
    source = p.address(i.operands[1])
    scatter = "tile:scatter4" in i.op
    reduce = next((x for x in i.op if x in _ATOMIC), "") if i.op[1] == "reduce" else ""

    def run(w: Warp, m: Mask) -> str | None:
        cluster = w.cta.cluster
        # threads that store the same box do it once; a reduction counts each of them
        same: dict[tuple[int, ...], list[int]] = {}
        for lane in np.flatnonzero(_ALL if m is None else m):
            key = (int(target(w)[lane]), int(source(w)[lane]), *(int(c(w)[lane]) for c in coordinates))
            same.setdefault((*key, int(lane)) if reduce else key, []).append(int(lane))
        for key, lanes in same.items():
            d, s, *rest = key[:-1] if reduce else key
            t, at = _read_map(w, d), tuple(rest)
            if s >> RANK_SHIFT != w.cta.rank:
                raise Fault(f"TMA store from the shared memory of CTA rank {s >> RANK_SHIFT}")
            index = tensormap.shared_index(t, s & _OFFSET, 4 if scatter else int(np.prod(t.box[1:])))

            def read(index=index) -> Array:  # type: ignore[no-untyped-def]
                return w.cta.shared.gather(index)

            def write(values, t=t, at=at) -> None:  # type: ignore[no-untyped-def]
                box = _at(t, at, scatter)
                if reduce:
                    values = _reduced(t, box, cluster.launch.memory, values, reduce)
                tensormap.write(t, box, cluster.launch.memory, values)

            cluster.launch.statistics.count_copy("TMA reduction" if reduce else "TMA store", index.size)
            submit_grouped(w, np.array(lanes), "TMA store", read, write)
        return None

    return run


def _reduced(t: tensormap.TensorMap, box: tensormap.Box, memory: object, values: Array, name: str) -> Array:
    from ..memory import GlobalMemory

    assert isinstance(memory, GlobalMemory)
    kind, size = _KINDS[t.element_type], t.bits // 8
    old = tensormap.read(t, box, memory).reshape(-1).view(UINT[size])
    new = np.ascontiguousarray(values).reshape(-1).view(UINT[size])
    pieces = [combine(name, kind, old[j : j + 1], new[j : j + 1]) for j in range(len(old))]
    return np.concatenate(pieces).view(np.uint8).reshape(values.shape)
