"""Races and missing fences. Each kernel is right as it stands; [[what keeps it so|what stands there instead]] is then
taken away, and must be missed under every schedule: the order in which things happened to run proves nothing.
"""

import re

import numpy as np
import pytest

from ptx_emulator import Fault
from ptx_emulator.machine import SCHEDULES

from . import test_tcgen05
from .ptx import run

# %p1, %p2: warp 0, warp 1; %p3, %p4: their first threads; [%r3]: 16 bytes of each lane in buf, [%rd3] in out
SETUP = """
mov.u32 %r0, %tid.x; and.b32 %r5, %r0, 31; setp.lt.u32 %p1, %r0, 32; not.pred %p2, %p1;
setp.eq.u32 %p3, %r0, 0; setp.eq.u32 %p4, %r0, 32;
shl.b32 %r1, %r5, 4; mov.b32 %r2, buf; add.s32 %r3, %r2, %r1; cvt.u64.u32 %rd1, %r1; add.s64 %rd3, %rd63, %rd1;
mov.b32 %r4, 7; mov.u32 %r6, %cluster_ctarank; setp.eq.u32 %p5, %r6, 0; mov.b32 %r7, 1;
selp.b32 %r20, 0, 768, %p5; cvt.u64.u32 %rd20, %r20; add.s64 %rd63, %rd63, %rd20; add.s64 %rd3, %rd3, %rd20;
"""
SHARED = ".shared .align 1024 .b8 buf[512]; .shared .align 8 .b8 bar[8];"
RACE, UNFENCED, GONE = "data race", "no proxy fence", "its shared memory gone"
WORDS = {
    "WRITE": "@%p1 st.shared.b32 [%r3], %r4;",
    "WRITE16": "st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4};",
    "READ": "@%p2 ld.shared.b32 %r8, [%r3];",
    "SYNC": "bar.sync 0;",
    "FENCE": "fence.proxy.async.shared::cta;",
    "MBARRIER": "@%p3 mbarrier.init.shared.b64 [bar], %r7; bar.sync 0;",
    "WAITED": "@%p2 mbarrier.try_wait.parity.shared.b64 %p7, [bar], 0;",
    "BULK_STORE": "@%p3 cp.async.bulk.global.shared::cta.bulk_group [%rd63], [%r2], 512; "
    "@%p3 cp.async.bulk.commit_group;",
    "DONE": "@%p3 cp.async.bulk.wait_group 0;",
    "BULK_LOAD": "@%p3 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 512; "
    "@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd63], 512, [bar];",
    "MEET": "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
    "OTHER": "xor.b32 %r10, %r6, 1; mapa.shared::cluster.u32 %r11, %r3, %r10;",  # %r3 of the other CTA
    "RACE": RACE,
    "UNFENCED": UNFENCED,
    "GONE": GONE,
}

# name: what the fault says, then the kernel
KERNELS = r"""
read after write: RACE
    WRITE [[SYNC]] READ
write after write: RACE
    WRITE [[SYNC]] @%p2 st.shared.b32 [%r3], %r0;
the same value written twice: RACE
    WRITE @%p2 st.shared.b32 [%r3], %r[[4|0]];
global, the same value written twice: RACE
    @%p1 st.global.b32 [%rd3], %r4; @%p2 st.global.b32 [%rd3], %r[[4|0]];
another value after both of its writers: RACE
    WRITE @%p1 st.shared.b32 [%r3], %r4; @%p2 st.shared.b32 [%r3], %r4; [[SYNC]] @%p2 st.shared.b32 [%r3], %r0;
write after read: RACE
    WRITE SYNC @%p1 ld.shared.b32 %r8, [%r3]; [[SYNC]] @%p2 st.shared.b32 [%r3], %r0;
of a byte among others: RACE
    @%p1 st.shared.u8 [%r3+3], %r4; SYNC @%p2 st.shared.u8 [%r3+[[2|3]] ], %r0;@%p1 st.shared.u8 [%r3+3], %r4;
named barrier: RACE
    WRITE @%p1 bar.arrive 3, 64; [[@%p2 bar.sync 3, 64;|@%p2 bar.arrive 3, 64;]] READ
mbarrier not waited for: RACE|never written
    MBARRIER WRITE @%p3 mbarrier.arrive.shared.b64 _, [bar]; [[WAITED]] READ
mbarrier made: an mbarrier is used
    @%p3 mbarrier.init.shared.b64 [bar], %r7; [[SYNC]] @%p4 mbarrier.arrive.shared.b64 _, [bar];
relaxed arrival: RACE
    MBARRIER WRITE [[fence.acq_rel.cta;]] @%p3 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [bar]; WAITED READ
global, flag released: RACE
    @%p1 st.global.b32 [%rd3], %r4; @%p3 st.[[release|relaxed]].gpu.global.b32 [%rd63+512], %r7; SPIN: @%p1 bra
    SEEN; ld.acquire.gpu.global.b32 %r9, [%rd63+512]; setp.eq.u32 %p8, %r9, 1; @!%p8 bra SPIN; ld.global.b32 %r8,
    [%rd3]; SEEN:
global, flag acquired: RACE
    @%p1 st.global.b32 [%rd3], %r4; @%p3 st.release.gpu.global.b32 [%rd63+512], %r7; SPIN: @%p1 bra SEEN;
    ld.[[acquire|relaxed]].gpu.global.b32 %r9, [%rd63+512]; setp.eq.u32 %p8, %r9, 1; @!%p8 bra SPIN; ld.global.b32
    %r8, [%rd3]; SEEN:
fence before a relaxed flag: RACE
    @%p1 st.global.b32 [%rd3], %r4; [[fence.acq_rel.gpu;]] @%p3 st.relaxed.gpu.global.b32 [%rd63+512], %r7; SPIN:
    @%p1 bra SEEN; ld.acquire.gpu.global.b32 %r9, [%rd63+512]; setp.eq.u32 %p8, %r9, 1; @!%p8 bra SPIN;
    ld.global.b32 %r8, [%rd3]; SEEN:
fence after a volatile flag: RACE
    @%p1 st.global.b32 [%rd3], %r4; membar.gl; @%p3 st.volatile.global.b32 [%rd63+512], %r7; SPIN: @%p1 bra SEEN;
    ld.volatile.global.b32 %r9, [%rd63+512]; setp.eq.u32 %p8, %r9, 1; @!%p8 bra SPIN; [[membar.gl;]] ld.global.b32
    %r8, [%rd3]; SEEN:
atomics among themselves: RACE
    [[atom.global.add.u32 %r8, [%rd63], 1;|@%p1 st.global.b32 [%rd63], %r7; @%p2 atom.global.add.u32 %r8, [%rd63],
    1;]]
bulk store, fenced by the writer: UNFENCED
    WRITE @%p1 WRITE16 [[FENCE]] SYNC BULK_STORE DONE
bulk store, fenced by its issuer: UNFENCED
    @%p2 WRITE16 SYNC [[FENCE]] BULK_STORE DONE
fence of the wrong space: UNFENCED
    @%p2 WRITE16 fence.proxy.async.[[shared::cta|global]]; SYNC BULK_STORE DONE
fence before the write: UNFENCED
    [[|FENCE]] @%p2 WRITE16 [[FENCE]] SYNC BULK_STORE DONE
source of a bulk store: RACE
    @%p1 WRITE16 FENCE SYNC BULK_STORE [[@%p3 cp.async.bulk.wait_group.read 0;]] SYNC @%p2 st.shared.b32 [%r3], %r0;
target of a bulk store: RACE
    @%p1 WRITE16 FENCE SYNC BULK_STORE @%p3 cp.async.bulk.wait_group[[|.read]] 0; SYNC @%p2 ld.global.b32 %r8, [%rd3];
newer group not waited for: RACE
    @%p1 WRITE16 FENCE SYNC BULK_STORE @%p3 cp.async.bulk.wait_group [[0|1]]; SYNC @%p2 st.shared.b32 [%r3], %r0;
global memory that a bulk load reads: UNFENCED
    MBARRIER @%p1 st.global.b32 [%rd3], %r4; [[fence.proxy.async.global;]] bar.warp.sync -1; BULK_LOAD WAITED READ
bulk load: RACE|never written
    MBARRIER BULK_LOAD [[WAITED]] READ
bulk load over what is read: RACE
    @%p2 st.shared.b32 [%r3], %r4; FENCE MBARRIER READ [[SYNC]] BULK_LOAD WAITED
cp.async: RACE|never written
    @%p1 cp.async.ca.shared.global [%r3], [%rd3], 16; [[cp.async.wait_all;]] SYNC READ
cp.async over what is read: RACE
    @%p2 st.shared.b32 [%r3], %r4; READ [[SYNC]] @%p1 cp.async.ca.shared.global [%r3], [%rd3], 16;
    cp.async.wait_all;
cp.async and a bulk store: UNFENCED
    @%p1 cp.async.ca.shared.global [%r3], [%rd3], 16; cp.async.wait_all; [[FENCE]] SYNC BULK_STORE @%p3
    cp.async.bulk.wait_group 0;
end before a bulk store has read: GONE
    @%p1 WRITE16 FENCE SYNC BULK_STORE [[@%p3 cp.async.bulk.wait_group.read 0;]]
distributed shared memory: RACE|never written
    OTHER @%p1 st.shared::cluster.b32 [%r11], %r4; [[MEET]] READ MEET
end before the peer's store: GONE
    OTHER MEET @%p1 st.shared::cluster.b32 [%r11], %r4; [[MEET]]
end before the peer's arrival: GONE
    @%p3 mbarrier.init.shared.b64 [bar], %r7; MEET mov.b32 %r12, bar; xor.b32 %r10, %r6, 1; mapa.shared::cluster.u32
    %r12, %r12, %r10; @%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12]; [[MEET]]
end after a relaxed cluster barrier: GONE
    @%p3 mbarrier.init.shared.b64 [bar], %r7; MEET mov.b32 %r12, bar; xor.b32 %r10, %r6, 1; mapa.shared::cluster.u32
    %r12, %r12, %r10; @%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];
    [[barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;]]
relaxed cluster barrier: RACE
    OTHER @%p1 st.shared::cluster.b32 [%r11], %r4; barrier.cluster.arrive[[|.relaxed]].aligned;
    barrier.cluster.wait.aligned; READ MEET
mbarrier.init for a relaxed cluster barrier: an mbarrier is used
    @%p3 mbarrier.init.shared.b64 [bar], %r7; [[@%p3 fence.mbarrier_init.release.cluster;]]
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; mov.b32 %r12, bar; xor.b32 %r10, %r6, 1;
    mapa.shared::cluster.u32 %r12, %r12, %r10; @%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];
    MEET
"""


def cases() -> dict[str, tuple[str, str]]:
    text = re.sub(r"\b[A-Z_0-9]+\b", lambda m: WORDS.get(m[0], m[0]), KERNELS)
    parts = re.findall(r"^(\S[^:]*): (.*)\n((?: .*\n)+)", text, re.M)
    return {name: (body, why) for name, why, body in parts}


CASES = cases()


def with_and_without(body: str) -> tuple[str, str]:
    pieces = r"\[\[([^|]*?)(?:\|(.*?))?\]\](?!\])"
    both = (r"\1", lambda m: m[2] or "")
    return tuple(re.sub(pieces, x, body, flags=re.S) for x in both)  # type: ignore[return-value]


def launch(body: str, schedule: str, races: bool = True) -> None:
    """Two CTAs, each with global memory of its own."""
    run(
        SETUP + body,
        np.zeros(512, np.uint32),
        shared=SHARED,
        block=64,
        grid=2,
        cluster=2,
        schedule=schedule,
        races=races,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_hazard(name, schedule):
    body, why = CASES[name]
    right, wrong = with_and_without(body)
    launch(right, schedule)
    with pytest.raises(Fault, match=why) as caught:
        launch(wrong, schedule)
    assert "PTX line" in str(caught.value)


def test_both_places_are_named():
    _, wrong = with_and_without(CASES["read after write"][0])
    with pytest.raises(Fault, match=r"(?s)st\.shared\.b32.*warp 1.*ld\.shared\.b32"):
        launch(wrong, "round")


def test_the_checks_can_be_switched_off():
    _, wrong = with_and_without(CASES["bulk store, fenced by the writer"][0])
    launch(wrong, "round", races=False)


# --- tensor cores: the kernel of test_tcgen05, with one line less ---

KIND = "kind::mxf4.block_scale.scale_vec::2X"
IDESC = 1 << 7 | 1 << 10 | 64 // 8 << 17 | 1 << 27 | 1 << 23


def multiply(*replace: tuple[str, str]) -> None:
    codes = np.random.default_rng(1).integers(0, 256, (128, 32)).astype(np.uint8)
    scales = np.full((128, 4), 127, np.uint8)
    test_tcgen05.multiply(KIND, IDESC, codes, codes[:64], swizzle=32, sfa=scales, sfb=scales[:64], replace=replace)


def test_operands_written_by_threads_need_a_fence():
    multiply()
    with pytest.raises(Fault, match=UNFENCED):
        multiply(("fence.proxy.async.shared::cta;", ""))


def test_tensor_memory_given_back_before_its_load_is_known_to_be_over():
    with pytest.raises(Fault, match=r"data race: .* of tensor memory .*tcgen05\.ld"):
        multiply(("tcgen05.wait::ld.sync.aligned;", ""), ("st.global.b32 [%rd2], %r16;", ""))
