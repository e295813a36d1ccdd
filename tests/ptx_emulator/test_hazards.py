"""Races and missing fences. Each kernel is right as it stands; [[what keeps it so|what stands there instead]] is then
taken away, and must be missed under every schedule: the order in which things happened to run proves nothing.
"""

import re

import numpy as np
import pytest

from ptx_emulator import Fault
from ptx_emulator.hazards import Checks
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
the same matrix written twice: RACE
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r[[4|0]]};
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
named barrier, come to twice: come to again
    @%p1 bar.arrive 3, 64; @%p2 bar.sync 3, 64; [[SYNC]] @%p1 bar.arrive 3, 64; @%p2 bar.sync 3, 64;
ring of two named barriers: come to again
    mov.b32 %r8, 0; ROUND: @%p1 bar.arrive 3, 64; @%p2 bar.sync 3, 64; [[@%p2 bar.arrive 4, 64; @%p1 bar.sync 4, 64;]]
    add.s32 %r8, %r8, 1; setp.lt.u32 %p8, %r8, 3; @%p8 bra ROUND;
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


def spelt(text: str, words: dict[str, str]) -> str:
    return re.sub(r"\b[A-Z_0-9]+\b", lambda m: words.get(m[0], m[0]), text)


def cases(kernels: str, words: dict[str, str]) -> dict[str, tuple[str, str]]:
    parts = re.findall(r"^(\S[^:]*): (.*)\n((?: .*\n)+)", spelt(kernels, words), re.M)
    return {name: (body, why) for name, why, body in parts}


CASES = cases(KERNELS, WORDS)


def with_and_without(body: str) -> tuple[str, str]:
    pieces = r"\[\[([^|]*?)(?:\|(.*?))?\]\](?!\])"
    both = (r"\1", lambda m: m[2] or "")
    return tuple(re.sub(pieces, x, body, flags=re.S) for x in both)  # type: ignore[return-value]


def launch(body: str, schedule: str, races: Checks = True) -> None:
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_bulk_load_over_what_is_read_wants_a_fence_by_the_letter_of_the_isa(schedule):
    """A load may still be on its way where its warp arrives at a barrier."""
    body = spelt("@%p2 st.shared.b32 [%r3], %r4; FENCE MBARRIER READ [[FENCE]] SYNC BULK_LOAD WAITED", WORDS)
    right, wrong = with_and_without(body)
    launch(right, schedule, "strict")
    launch(wrong, schedule)
    with pytest.raises(Fault, match=r"(?s)no proxy fence.*is written by the async proxy.*its reading by.*ld\.shared"):
        launch(wrong, schedule, "strict")


def test_both_places_are_named():
    _, wrong = with_and_without(CASES["read after write"][0])
    with pytest.raises(Fault, match=r"(?s)st\.shared\.b32.*warp 1.*ld\.shared\.b32"):
        launch(wrong, "round")


def test_the_checks_can_be_switched_off():
    _, wrong = with_and_without(CASES["bulk store, fenced by the writer"][0])
    launch(wrong, "round", races=False)


# --- tensor memory: two warps and MMAs of 64 x 8 x 16, whose rows lie in lanes 0-15, 32-47, .. ---
# %p1, %p2: warp 0, warp 1; %p3, %p4: their first threads; %p11: the second thread of all

TENSOR_SHARED = ".shared .align 1024 .b8 buf[4096]; .shared .align 8 .b8 bar[8]; .shared .align 4 .b8 slot[4];"
TENSOR_SETUP = """
mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 32; not.pred %p2, %p1; setp.eq.u32 %p3, %r0, 0; setp.eq.u32 %p4, %r0, 32;
mov.b32 %r2, buf; mov.b32 %r4, 0; mov.b32 %r5, 7; mov.b32 %r6, 32; mov.b32 %r7, 1; mov.b32 %r8, 0; mov.pred %p9, 0;
FILL: shl.b32 %r9, %r0, 4; add.s32 %r9, %r9, %r8; add.s32 %r9, %r9, %r2; st.shared.v4.b32 [%r9], {%r4, %r4, %r4, %r4};
add.s32 %r8, %r8, 1024; setp.lt.u32 %p7, %r8, 4096; @%p7 bra FILL;
fence.proxy.async.shared::cta; @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], %r6;
@%p3 mbarrier.init.shared.b64 [bar], %r7; bar.sync 0; ld.shared.b32 %r10, [slot];
and.b32 %r11, %r0, 32; shl.b32 %r11, %r11, 16; add.s32 %r11, %r11, %r10; and.b32 %r12, %r2, 16777215;
shr.u32 %r12, %r12, 4; cvt.u64.u32 %rd10, %r12; add.s64 %rd11, %rd10, OPERAND; mov.pred %p10, -1;
mov.b32 %r14, NARROW; mov.b32 %r15, WIDE; add.s32 %r16, %r10, 1;
mov.u32 %r17, %laneid; setp.eq.u32 %p11, %r17, 1; and.pred %p11, %p11, %p1;
"""
TENSOR_WORDS = {
    **WORDS,
    # D = A B, and D += A B, of 8 columns from %r10 or %r16 on; of 16 columns
    "MMA": "tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd11, %rd11, %r14, %p9;",
    "MORE": "tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd11, %rd11, %r14, %p10;",
    "WIDER": "tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd11, %rd11, %r15, %p9;",
    "BESIDE": "tcgen05.mma.cta_group::1.kind::f16 [%r16], %rd11, %rd11, %r14, %p9;",
    "NARROW": str(1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | 64 // 16 << 24),
    "WIDE": str(1 << 4 | 1 << 7 | 1 << 10 | 16 // 8 << 17 | 64 // 16 << 24),
    "OPERAND": str(128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46),
    "CP": "tcgen05.cp.cta_group::1.128x256b [%r10], %rd11;",
    "COMMIT": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];",
    "WAIT": "mbarrier.try_wait.parity.shared.b64 %p7, [bar], 0;",
    "AGAIN": "mbarrier.try_wait.parity.shared.b64 %p7, [bar], 1;",
    "RELAXED": "mbarrier.try_wait.parity.relaxed.cta.shared.b64 %p7, [bar], 0;",
    "ARRIVE": "mbarrier.arrive.relaxed.cta.shared.b64 _, [bar];",
    "LD": "tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r13}, [%r11];",
    "ST": "tcgen05.st.sync.aligned.16x64b.x1.b32 [%r11], {%r5};",
    "LD_OVER": "tcgen05.wait::ld.sync.aligned;",
    "ST_OVER": "tcgen05.wait::st.sync.aligned;",
    "BEFORE": "tcgen05.fence::before_thread_sync;",
    "AFTER": "tcgen05.fence::after_thread_sync;",
    "NAMED": "add.s32 %r18, %r13, 1;",
}
TENSOR_END = """
SYNC @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, %r6;
"""
NO_FENCE = "no tcgen05.fence"
TENSOR_KERNELS = r"""
a commit that is waited for: RACE|never written
    @%p3 MMA @%p3 COMMIT [[WAIT]] LD LD_OVER WAIT
a commit of the thread that issued: RACE
    @%p3 MMA @%p[[3|11]] COMMIT WAIT LD LD_OVER
a relaxed wait for a commit, with a fence: RACE
    @%p3 MMA @%p3 COMMIT RELAXED [[AFTER]] LD LD_OVER WAIT
a store before a load: RACE
    ST [[ST_OVER]] LD LD_OVER ST_OVER
a store before an mma of another warp: RACE
    ST [[ST_OVER]] SYNC @%p3 MMA @%p3 COMMIT WAIT ST_OVER
a wait for the other kind: RACE
    ST tcgen05.wait::[[st|ld]].sync.aligned; SYNC @%p3 MMA @%p3 COMMIT WAIT ST_OVER
two stores: RACE
    ST [[ST_OVER]] ST ST_OVER
a load before an mma of another warp: RACE
    ST ST_OVER LD [[LD_OVER]] SYNC @%p3 MMA @%p3 COMMIT WAIT LD_OVER
a load before a store: RACE
    ST ST_OVER LD [[LD_OVER]] ST LD_OVER ST_OVER
a load before a store, its register named: RACE
    ST ST_OVER LD [[NAMED]] ST LD_OVER ST_OVER
a load of another warp before dealloc: RACE
    ST ST_OVER LD [[LD_OVER]] SYNC
an mma before a store: RACE
    @%p3 MMA @%p3 COMMIT [[WAIT]] ST ST_OVER WAIT
mmas of one accumulator, of two threads: RACE
    @%p3 MMA BEFORE SYNC [[AFTER]] @%p4 MORE @%p4 COMMIT WAIT SYNC @%p3 COMMIT AGAIN
cp, then an mma of one thread: RACE
    @%p3 CP @%p[[3|4]] MMA @%p3 COMMIT WAIT
cp, then an mma of another thread, announced: RACE
    @%p3 CP [[BEFORE]] SYNC AFTER @%p4 MMA @%p4 COMMIT WAIT SYNC @%p3 COMMIT AGAIN
cp, then an mma of another thread, heard of: RACE
    @%p3 CP BEFORE SYNC [[AFTER]] @%p4 MMA @%p4 COMMIT WAIT SYNC @%p3 COMMIT AGAIN
cp, then an mma of another thread, relaxed: RACE
    @%p3 CP BEFORE @%p3 ARRIVE RELAXED [[AFTER]] @%p4 MMA @%p4 COMMIT AGAIN SYNC @%p3 COMMIT WAIT
mmas of two accumulators, of two threads: RACE
    @%p3 MMA BEFORE SYNC AFTER @%p4 [[MORE|BESIDE]] @%p4 COMMIT WAIT SYNC @%p3 COMMIT AGAIN
cp before a load: RACE|never written
    @%p3 CP [[@%p3 COMMIT WAIT]] SYNC LD LD_OVER [[|@%p3 COMMIT WAIT]]
a store, announced to a relaxed wait: RACE
    @%p1 ST @%p1 ST_OVER [[@%p1 BEFORE]] @%p3 ARRIVE RELAXED AFTER @%p4 MMA @%p4 COMMIT AGAIN
a store, heard of by a relaxed wait: RACE
    @%p1 ST @%p1 ST_OVER @%p1 BEFORE @%p3 ARRIVE RELAXED [[AFTER]] @%p4 MMA @%p4 COMMIT AGAIN
"""
# refused by the letter of the ISA alone
STRICT_KERNELS = r"""
mmas of one accumulator: RACE
    @%p3 MMA @%p3 [[MORE|WIDER]] @%p3 COMMIT WAIT
mmas of accumulators that overlap: RACE
    @%p3 MMA [[@%p3 COMMIT WAIT AFTER SYNC]] @%p3 BESIDE @%p3 COMMIT [[AGAIN|WAIT]]
a load is not over because its register was named: RACE
    ST ST_OVER LD NAMED [[LD_OVER]] BEFORE SYNC AFTER @%p3 MMA @%p3 COMMIT WAIT LD_OVER
a store, announced to another thread: NO_FENCE
    ST ST_OVER [[BEFORE]] SYNC AFTER @%p3 MMA @%p3 COMMIT WAIT
a store, heard of by another thread: NO_FENCE
    ST ST_OVER BEFORE SYNC [[AFTER]] @%p3 MMA @%p3 COMMIT WAIT
an accumulator, loaded by another thread: NO_FENCE
    @%p3 MMA @%p3 COMMIT WAIT [[AFTER]] LD LD_OVER
"""


TENSOR_WORDS |= {"RACE": RACE, "NO_FENCE": NO_FENCE}
TENSOR_CASES = cases(TENSOR_KERNELS, TENSOR_WORDS)
STRICT_CASES = cases(STRICT_KERNELS, TENSOR_WORDS)


def tensor_launch(body: str, schedule: str, races: Checks = True) -> None:
    text = spelt(TENSOR_SETUP, TENSOR_WORDS) + body + spelt(TENSOR_END, TENSOR_WORDS)
    run(text, np.zeros(16, np.uint32), shared=TENSOR_SHARED, block=64, schedule=schedule, races=races)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TENSOR_CASES)
def test_tensor_memory(name, schedule):
    body, why = TENSOR_CASES[name]
    right, wrong = with_and_without(body)
    tensor_launch(right, schedule)
    with pytest.raises(Fault, match=why) as caught:
        tensor_launch(wrong, schedule)
    assert "PTX line" in str(caught.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STRICT_CASES)
def test_what_only_the_letter_of_the_isa_refuses(name, schedule):
    body, why = STRICT_CASES[name]
    right, wrong = with_and_without(body)
    tensor_launch(right, schedule, "strict")
    tensor_launch(wrong, schedule)
    with pytest.raises(Fault, match=why):
        tensor_launch(wrong, schedule, "strict")


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
