"""Tensor maps that the driver encoded, tensormap.replace and tensor copies of an H100, see golden/record_tensormaps."""

import base64
import ctypes
import gzip
import json
from typing import Any

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import Fault, tensormap
from ptx_emulator.memory import Block, GlobalMemory
from ptx_emulator.runtime import Runtime

from .golden import record_tensormaps as recorder

GOLDEN = json.loads(gzip.decompress(recorder.FILE.read_bytes()))
U32, U64 = ctypes.c_uint32, ctypes.c_uint64
MISALIGNED = "CUDA driver answers 715"


def bits(raw: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(raw), np.uint8)


def name(case: dict[str, Any]) -> str:
    m = case.get("map", case)
    keys = ("kind", "element_type", "sizes", "box", "steps", "interleave", "swizzle", "fill")
    return " ".join(str(x) for x in (*(m.get(k) for k in keys), case.get("op", ""), case.get("at", "")))


def test_every_map_decodes_to_its_arguments():
    count = 0
    for m in GOLDEN["maps"]:
        if m["code"]:
            continue
        count += 1
        t = tensormap.decode(bits(m["raw"]))
        assert (t.address, t.element.name) == (m["address"], tensormap.DRIVER_ELEMENTS[m["element_type"]])
        assert (list(t.sizes), list(t.strides), list(t.steps)) == (m["sizes"], m["strides"], m["steps"])
        assert (t.swizzle.span, t.interleave, t.nan) == (
            (0, 32, 64, 128)[m["swizzle"]], 16 * m["interleave"], bool(m["fill"]),
        )  # fmt: skip
        if m["kind"] == "im2col":
            assert t.im2col is not None
            assert (list(t.im2col.lower), list(t.im2col.upper)) == (m["lower"], m["upper"])
            assert (t.box, t.im2col.pixels) == ((m["channels"], m["pixels"]), m["pixels"])
        else:
            assert list(t.box) == m["box"]
    assert count > 300


def test_encode_gives_the_driver_s_maps():
    """But for the L2 promotion and for words 8 and 9, which nothing needs."""
    for m in GOLDEN["maps"]:
        if m["code"]:
            continue
        im2col = m["kind"] == "im2col"
        raw = tensormap.encode(
            m["address"], tensormap.DRIVER_ELEMENTS[m["element_type"]], m["sizes"], m["strides"],
            (m["channels"],) if im2col else m["box"], (0, 32, 64, 128)[m["swizzle"]], steps=m["steps"],
            interleave=16 * m["interleave"], nan=bool(m["fill"]),
            im2col=tensormap.Im2col(tuple(m["lower"]), tuple(m["upper"]), m["pixels"]) if im2col else None,
        )  # fmt: skip
        want = tensormap.words_of(bits(m["raw"]))
        want[8:10] = 0, 0
        tensormap.PROMOTION.put(want, 0)
        assert tensormap.words_of(np.frombuffer(raw, np.uint8)) == want


def driver_call(m: dict[str, Any]) -> bytes:
    """The map that host code gets for the arguments of a tiled one."""
    lists = [
        (kind * max(len(m[key]), 1))(*m[key])
        for kind, key in ((U64, "sizes"), (U64, "strides"), (U32, "box"), (U32, "steps"))
    ]
    raw = ctypes.create_string_buffer(tensormap.BYTES)
    arguments = [
        ctypes.addressof(raw), m["element_type"], len(m["sizes"]), m["address"], *map(ctypes.addressof, lists),
        m["interleave"], m["swizzle"], m["promotion"], m["fill"],
    ]  # fmt: skip
    Runtime("sm_90a", lambda *_: 0).answer("_cuTensorMapEncodeTiled", arguments)
    return raw.raw


def test_host_code_encodes_what_the_driver_does():
    count = 0
    for m in GOLDEN["maps"]:
        if m["kind"] == "tiled" and not m["code"]:
            assert tensormap.decode(np.frombuffer(driver_call(m), np.uint8)) == tensormap.decode(bits(m["raw"]))
            count += 1
    assert count > 200


def test_host_code_is_told_what_is_wrong_with_a_map():
    m = next(m for m in GOLDEN["maps"] if m["kind"] == "tiled" and not m["code"])
    with pytest.raises(Fault, match="the address must be a multiple of"):
        driver_call(m | {"address": m["address"] + 8})
    for change in ({"element_type": 16}, {"swizzle": 7}, {"sizes": [], "strides": [], "box": [], "steps": []}):
        with pytest.raises(Fault, match="cuTensorMapEncodeTiled"):
            driver_call(m | change)


def test_tensormap_replace():
    for case in GOLDEN["replacements"]:
        data = np.zeros(256, np.uint8)
        data = data[-data.__array_interface__["data"][0] % 128 :][:128]
        data[:] = bits(case["raw"])
        kernel = ptx_emulator.load(recorder.replacing_kernel(case))
        if case["field"] == "global_stride" and case["ord"] == 4:
            # an H100 writes where strides keep their upper bits
            with pytest.raises(Fault, match="four strides"):
                kernel.launch("k", grid=(1,), block=(32,), args=[data])
            continue
        kernel.launch("k", grid=(1,), block=(32,), args=[data])
        want = bits(case["after"])
        assert tensormap.words_of(data) == tensormap.words_of(want), (case["field"], case["ord"], case["value"])


def changed(before: bytes, changes: list[tuple[int, str]]) -> np.ndarray:
    out = np.frombuffer(before, np.uint8).copy()
    for at, text in changes:
        new = np.frombuffer(base64.b64decode(text), np.uint8)
        out[at : at + len(new)] = new
    return out


def replay(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The tensor with what lies around it, and shared memory, after the copy."""
    t = case["map"]
    size, total = recorder.tensor_bytes(t) + 4096, recorder.shared_bytes(t)
    tensor = np.frombuffer(recorder.noise(case["seed"], size), np.uint8).copy()
    memory = GlobalMemory()
    memory.insert(Block(t["address"] - 1024, tensor, "tensor"))
    before = np.frombuffer(recorder.noise(case["seed"] + 1, total), np.uint8)
    after = np.zeros(total + 8, np.uint8)
    args = [bytes.fromhex(case["raw"]), before, after, total, recorder.transactions(t), *case["at"]]
    ptx_emulator.load(recorder.kernel(case)).launch("k", grid=(1,), block=(32,), args=args, shared=total, memory=memory)
    return tensor, after[:total]


COPIES = [c for c in GOLDEN["copies"] if c["code"] == 0]


@pytest.mark.parametrize("case", COPIES, ids=name)
def test_copies(case):
    tensor, shared = replay(case)
    t, load = case["map"], case["op"] == "load"
    before = recorder.noise(case["seed"], recorder.tensor_bytes(t) + 4096)
    np.testing.assert_array_equal(tensor, changed(before, [] if load else case["changes"]))
    if load and case["transactions"] != recorder.transactions(t):
        # the GPU waited for another number of bytes, and shared memory was read before all of them had come
        for at, text in case["changes"]:
            new = np.frombuffer(base64.b64decode(text), np.uint8)
            np.testing.assert_array_equal(shared[at : at + len(new)], new)
        return
    before = recorder.noise(case["seed"] + 1, recorder.shared_bytes(t))
    np.testing.assert_array_equal(shared, changed(before, case["changes"] if load else []))


REFUSALS = [c for c in GOLDEN["copies"] if MISALIGNED in c.get("reason", "")]


@pytest.mark.parametrize("case", REFUSALS, ids=name)
def test_copies_that_a_gpu_refuses(case):
    """Boxes that do not start at a multiple of 16 bytes, reductions that their element type lacks."""
    t = case["map"] | {"address": 1 << 40}
    raw = tensormap.encode(
        t["address"],
        tensormap.DRIVER_ELEMENTS[t["element_type"]],
        t["sizes"],
        t["strides"],
        t["box"],
        steps=t["steps"],
        nan=t["fill"],
    )
    with pytest.raises(Fault, match=r"multiples of 16 are required|a reduction .* of a tensor of s64"):
        replay(case | {"map": t, "raw": raw.hex()})
