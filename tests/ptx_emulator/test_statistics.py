"""Statistics of a launch against counts made by hand."""

import json

import numpy as np
import pytest

from fp4suite import testing
from fp4suite.built import resources
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90 as sm90, gemm_nvfp4_sm100 as sm100
from ptx_emulator import emulate
from ptx_emulator.cubin import registers
from ptx_emulator.statistics import Statistics

from .ptx import run

SHARED = ".shared .align 1024 .b8 buf[8192];"


def access(text: str, address: str, shared: str = SHARED, **kw) -> Statistics:
    """`text` with %r5 = buf + `address` of the lane (%r0), after all of buf was filled by one bulk copy."""
    source = np.zeros(8192, np.uint8)
    body = f"""
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, buf;
        mov.u32 %r2, bar;
        ld.param.b64 %rd1, [source];
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra FILLED;
        mbarrier.init.shared.b64 [%r2], 1;
        fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 8192;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 8192, [%r2];
    FILLED:
        bar.sync 0;
    WAIT:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
        @!%p2 bra WAIT;
        {address}
        add.u32 %r5, %r5, %r1;
        {text}
    """
    out = np.zeros(64, np.uint32)
    both = f"{shared}\n.shared .align 8 .b64 bar;"
    return run(body, out, source, params=".param .u64 source", shared=both, **kw)


def conflicts(stats: Statistics, opcode: str) -> tuple[int, int, int]:
    """count, wavefronts, extra of the one instruction of this opcode."""
    (found,) = [c for c in stats.banks.values() if c.opcode == opcode]
    return found.count, found.wavefronts, found.extra


# address, access, wavefronts, of which extra
CASES = {
    "one word a lane": ("shl.b32 %r5, %r0, 2;", "ld.shared.b32 %r9, [%r5];", 1, 0),
    "all lanes one word": ("mov.u32 %r5, 64;", "ld.shared.b32 %r9, [%r5];", 1, 0),
    "bytes of the same words": ("mov.u32 %r5, %r0;", "ld.shared.u8 %rs1, [%r5];", 1, 0),
    "halves of the same words": ("shl.b32 %r5, %r0, 1;", "ld.shared.b16 %rs1, [%r5];", 1, 0),
    "every other word": ("shl.b32 %r5, %r0, 3;", "ld.shared.b32 %r9, [%r5];", 2, 1),
    "a row of 128 bytes a lane": ("shl.b32 %r5, %r0, 7;", "ld.shared.b32 %r9, [%r5];", 32, 31),
    "rows padded by a word": ("mul.lo.u32 %r5, %r0, 132;", "ld.shared.b32 %r9, [%r5];", 1, 0),
    "three words": ("rem.u32 %r5, %r0, 3;\nshl.b32 %r5, %r5, 7;", "ld.shared.b32 %r9, [%r5];", 3, 2),
    # 8 bytes: half warps of 128 bytes, 16 bytes: quarter warps
    "8 bytes in a row": ("shl.b32 %r5, %r0, 3;", "ld.shared.b64 %rd9, [%r5];", 2, 0),
    "8 bytes of every 16": ("shl.b32 %r5, %r0, 4;", "ld.shared.v2.b32 {%r9, %r10}, [%r5];", 4, 2),
    "16 bytes in a row": ("shl.b32 %r5, %r0, 4;", "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r5];", 4, 0),
    "16 bytes of every 128": ("shl.b32 %r5, %r0, 7;", "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r5];", 32, 28),
    "16 bytes to all lanes": ("mov.u32 %r5, 32;", "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r5];", 4, 0),
    "16 bytes of every 128, swizzled": (
        "shl.b32 %r5, %r0, 7;\nand.b32 %r6, %r0, 7;\nshl.b32 %r6, %r6, 4;\nxor.b32 %r5, %r5, %r6;",
        "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r5];", 4, 0,
    ),
    "a store like a load": ("shl.b32 %r5, %r0, 3;", "st.shared.b32 [%r5], %r0;", 2, 1),
    # a quarter of the lanes, 4 bytes each: one group
    "eight lanes": ("shl.b32 %r5, %r0, 7;\nsetp.lt.u32 %p3, %r0, 8;", "@%p3 ld.shared.b32 %r9, [%r5];", 8, 7),
    # lanes of an atomic operation do not share a word
    "atomics on one word": ("mov.u32 %r5, 0;", "atom.shared.add.u32 %r9, [%r5], 1;", 32, 31),
    "atomics on a word each": ("shl.b32 %r5, %r0, 2;", "red.shared.add.u32 [%r5], 1;", 1, 0),
    # each matrix is eight rows of 16 bytes
    "ldmatrix of rows of 16 bytes": (
        "shl.b32 %r5, %r0, 4;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r5];", 4, 0,
    ),
    "ldmatrix of rows of 128 bytes": (
        "shl.b32 %r5, %r0, 7;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r5];", 32, 28,
    ),
    "ldmatrix of rows of 128 bytes, swizzled": (
        "shl.b32 %r5, %r0, 7;\nand.b32 %r6, %r0, 7;\nshl.b32 %r6, %r6, 4;\nxor.b32 %r5, %r5, %r6;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r5];", 4, 0,
    ),
    "one matrix": (
        "and.b32 %r6, %r0, 7;\nshl.b32 %r5, %r6, 6;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r5];", 4, 3,
    ),
    "stmatrix of rows of 64 bytes": (
        "shl.b32 %r5, %r0, 6;", "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r5], {%r9, %r10};", 8, 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bank_conflicts(name):
    address, text, total, extra = CASES[name]
    opcode = text.removeprefix("@%p3 ").split()[0]
    stats = access(text, address, races=False)
    assert conflicts(stats, opcode) == (1, total, extra)
    assert stats.bank_conflicts == extra
    (line,) = [c.line for c in stats.banks.values() if c.opcode == opcode]
    assert f"PTX line {line} " in str(stats) or not extra


def test_generic_addresses_count_where_they_are_shared():
    generic = "cvt.u64.u32 %rd5, %r5;\ncvta.shared.u64 %rd5, %rd5;\n"
    stats = access(generic + "ld.b32 %r9, [%rd5];\nld.b32 %r10, [%rd63];", "shl.b32 %r5, %r0, 3;")
    assert [(c.count, c.wavefronts, c.extra) for c in stats.banks.values() if c.opcode == "ld.b32"] == [(1, 2, 1)]


def test_many_accesses_of_one_line_are_added_up():
    loop = "mov.u32 %r20, 0;\nLOOP:\nld.shared.b32 %r9, [%r5];\nadd.u32 %r20, %r20, 1;\n"
    stats = access(loop + "setp.lt.u32 %p3, %r20, 300;\n@%p3 bra LOOP;", "shl.b32 %r5, %r0, 3;", races=False)
    assert conflicts(stats, "ld.shared.b32") == (300, 600, 300)


def test_bytes_of_every_space():
    body = """
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, buf;
        shl.b32 %r2, %r0, 2;
        add.u32 %r3, %r1, %r2;
        st.shared.b32 [%r3], %r0;
        mov.u32 %r4, depot;
        st.local.b64 [%r4], %rd63;
        ld.local.b32 %r5, [%r4];
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mov.u32 %r6, %cluster_ctarank;
        xor.b32 %r6, %r6, 1;
        mapa.shared::cluster.u32 %r7, %r3, %r6;
        ld.shared::cluster.b32 %r8, [%r7];
        cvt.u64.u32 %rd2, %r2;
        add.u64 %rd2, %rd2, %rd63;
        st.global.b32 [%rd2], %r8;
        barrier.cluster.arrive;
        barrier.cluster.wait;
    """
    out = np.zeros(32, np.uint32)
    shared = SHARED + "\n.local .align 8 .b8 depot[16];"
    stats = run(body, out, shared=shared, grid=2, cluster=2, races=False)
    assert dict(+stats.bytes) == {
        "param load": 2 * 32 * 8,
        "shared store": 2 * 32 * 4,
        "shared load": 2 * 32 * 4,
        "distributed shared load": 2 * 32 * 4,
        "local store": 2 * 32 * 8,
        "local load": 2 * 32 * 4,
        "global store": 2 * 32 * 4,
    }
    assert stats.static_shared == 8192
    assert stats.dynamic_shared == 0
    assert stats.barriers["cluster"].count == 4


def test_instructions_by_warp_and_the_rounds_of_a_barrier():
    body = """
        mov.u32 %r0, %tid.x;
        shr.u32 %r1, %r0, 5;
        setp.eq.u32 %p1, %r1, 2;
        @!%p1 bra MEET;
        add.u32 %r2, %r2, 1;
        add.u32 %r2, %r2, 1;
    MEET:
        bar.sync 1, 96;
    """
    stats = run(body, np.zeros(1, np.uint32), block=96)
    assert stats.warps[2]["add.u32"] == 2
    assert "add.u32" not in stats.warps[0]
    assert stats.warps[0] == stats.warps[1]
    assert stats.instructions["bar.sync"] == 3
    assert stats.total == sum(stats.instructions.values())
    named = stats.barriers["named"]
    # two warps found the barrier incomplete when they came
    assert (named.count, named.rounds) == (3, 2)
    text = str(stats)
    assert "warps 0, 1" in text
    assert "warp 2" in text


def test_registers_are_virtual_without_a_cubin():
    stats = run("mov.u32 %r0, %tid.x;", np.zeros(1, np.uint32))
    assert stats.registers is None
    assert stats.virtual_registers == 16 + 16 + 256 + 64
    assert "352 virtual registers" in str(stats)


def test_mma_by_kind_and_json():
    body = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, {%r9, %r10}, "
    stats = run(2 * (body + "{%r11, %r12, %r13, %r14};\n"), np.zeros(1, np.uint32), arch="sm_90a")
    assert dict(stats.mmas) == {"mma.sync m16n8k16 f16": 2}
    assert stats.flops["mma.sync m16n8k16 f16"] == 2 * 2 * 16 * 8 * 16
    document = json.loads(stats.to_json())
    assert document["mmas"] == {"mma.sync m16n8k16 f16": {"count": 2, "flops": 8192}}
    assert document["warp_instructions"] == stats.total
    assert document["warps"]["0"] == document["instructions"]
    assert document["grid"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [(sm90, GemmProblem(m=9, n=72, k=128)), (sm100, GemmProblem(m=9, n=72, k=128, act="nvfp4"))],
    ids=["sm_90a", "sm_100a"],
)
def test_registers_of_a_compiled_function_are_the_cubins(kernel, problem):
    built = kernel.build(problem, kernel.Config(), kernel.ARCH)
    assert list(registers(built.cubin).values()) == [resources(built).registers]
    case = testing.case(problem, "cpu", 0)
    with emulate(kernel.ARCH) as device:
        case.run(kernel, kernel.Config())
    stats = device.launches[0]
    assert stats.registers == resources(built).registers
    assert stats.shared_bytes == built.shared_bytes
    assert stats.tensor_columns == built.tmem_columns
    assert f"{stats.registers} registers a thread" in str(stats)
    with emulate(kernel.ARCH, rewrite=lambda ptx: ptx) as device:
        testing.case(problem, "cpu", 0).run(kernel, kernel.Config())
    assert device.launches[0].registers is None


def test_what_is_no_cubin():
    with pytest.raises(ValueError, match="no 64-bit ELF"):
        registers(b"PTX")
