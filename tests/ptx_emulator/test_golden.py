"""The emulator against vectors recorded on an H100: every case of the catalogue leaves the same bits in memory.

The approximate functions alone may differ, within the error that the PTX ISA states for them.
"""

import re

import numpy as np
import pytest

from ptx_emulator import instructions, program

from .golden import replay, store
from .golden.catalogue import CASES, Case

# of sm_100 and later; system calls; tensor map replacement has a record of its own; multicast needs several GPUs
ELSEWHERE = {"tcgen05", "clusterlaunchcontrol", "tensormap", "vprintf", "assertfail", "multimem"}
GROUP = 40  # cases a test


@pytest.fixture(scope="module")
def record() -> store.Record:
    return store.Record()


def groups() -> list[list[Case]]:
    families: dict[str, list[Case]] = {}
    for case in CASES.values():
        families.setdefault(case.name.split(".")[0], []).append(case)
    return [cases[at : at + GROUP] for cases in families.values() for at in range(0, len(cases), GROUP)]


def difference(case: Case, record: store.Record) -> str | None:
    """What the emulator does otherwise, in words."""
    found = replay.run(case, record)
    for n, want in record.after(case.name).items():
        got = found[n]
        wrong = (got != want).reshape(-1)
        if case.bound:
            wrong = replay.beyond(got, want, case.values, case.bound)
        if case.free and n == 0:
            wrong.reshape(case.args[0].data.shape)[case.free] = False
        if wrong.any():
            at = int(np.argmax(wrong))
            flat = (got, want) if not case.bound else (replay.values(x, case.values) for x in (got, want))
            x, y = (v.reshape(-1)[at] for v in flat)
            return f"argument {n}: {int(wrong.sum())} of {wrong.size} differ, first [{at}]: {x!r} for {y!r}"
    return None


@pytest.mark.parametrize("cases", groups(), ids=lambda cases: f"{cases[0].name}+{len(cases) - 1}")
def test_the_same_bits_as_an_h100(cases, record):
    wrong = {case.name: difference(case, record) for case in cases}
    assert {name: why for name, why in wrong.items() if why} == {}


def test_the_record_is_of_these_kernels(record):
    assert "H100" in record.index["about"]["gpu"]
    assert record.index["refused"] == {}
    recorded = {name: entry["kernel"] for name, entry in record.cases.items() if name in CASES}
    assert recorded == {name: store.kernel_hash(case) for name, case in CASES.items()}


def test_a_case_is_kept_as_it_stands(record, tmp_path):
    names = ["tma.load.swizzle32.0", "mma.m16n8k16.f32.f16.f16.wide"]
    writer = store.Writer(gpu="H100")
    for name in names:
        writer.keep(record, name)
    writer.save(tmp_path / "some.npz.xz")
    kept = store.Record(tmp_path / "some.npz.xz")
    assert kept.cases == {name: record.cases[name] for name in names}
    assert all(kept.is_of(CASES[name]) for name in names)
    assert not kept.is_of(CASES["add.s32"])
    assert all(np.array_equal(x, record.arrays[name]) for name, x in kept.arrays.items())
    assert difference(CASES[names[1]], kept) is None


def test_every_decoder_is_covered():
    assert instructions
    used = {
        match.group(1)
        for case in CASES.values()
        for line in re.split(r"[;{}\n]", case.ptx)
        if (match := re.match(r"\s*(?:\w+:\s*)?(?:@!?%p\d+\s+)?([a-z]\w*)", line))
    }
    assert set(program.DECODERS) - used == ELSEWHERE


def test_a_wrong_bit_is_seen(record):
    case = CASES["add.s32"]
    record.arrays[record.cases[case.name]["after"]["0"]][7] ^= 1
    try:
        assert "1 of 512 differ, first [7]" in (difference(case, record) or "")
    finally:
        record.arrays[record.cases[case.name]["after"]["0"]][7] ^= 1
