"""Cross compiling: PTX and cubin of the architecture asked for, and the resources that the launch asks for."""

import cuda.bindings.driver as cuda
import cutlass
import pytest
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fp4suite.built import resources
from kernels_cute import build

FLOATS = 4096  # of dynamic shared memory in the test kernel


@cute.kernel
def _reverse_kernel(mX: cute.Tensor, mY: cute.Tensor):
    """Reverses runs of 128 floats by way of shared memory."""
    t, _, _ = cute.arch.thread_idx()
    smem = cutlass.memory.SmemAllocator()
    sX = smem.allocate_tensor(cutlass.Float32, cute.make_layout(FLOATS), byte_alignment=128)
    sX[t] = mX[t]
    cute.arch.sync_threads()
    mY[t] = sX[127 - t]


@cute.jit
def _reverse(mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
    _reverse_kernel(mX, mY).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)


@cute.jit
def _reverse_twice(mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
    _reverse_kernel(mX, mY).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)
    _reverse_kernel(mY, mX).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)


def _operands():
    floats = make_fake_tensor(cutlass.Float32, (cute.sym_int32(divisibility=4),), stride=(1,), assumed_align=16)
    return floats, floats, make_fake_stream()


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_builds_for_the_architecture_asked_for(arch):
    built = build.build(_reverse, *_operands(), arch=arch)
    assert built.arch == arch
    assert f".target {arch}" in built.ptx
    assert built.cubin.startswith(b"\x7fELF")
    assert built.shared_bytes == 4 * FLOATS
    assert built.tmem_columns == 0
    found = resources(built)
    assert 0 < found.registers <= 255
    assert found.spill_bytes == 0
    assert found.shared_bytes == built.shared_bytes  # without the KiB a CTA that the system reserves


def test_refuses_other_architectures():
    with pytest.raises(ValueError, match="sm_90a, sm_100a, got 'sm_80'"):
        build.options("sm_80")


def test_refuses_more_than_one_launch():
    with pytest.raises(ValueError, match="one kernel launch in the compiled function, found 2"):
        build.build(_reverse_twice, *_operands(), arch="sm_90a")


@pytest.mark.parametrize(
    ("ptx", "columns"),
    [
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r7], 512;", 512),
        ("mov.b32 %r9, 128;\ntcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r1], %r9;", 128),
        ("ld.shared.b32 %r1, [%r2];", 0),
    ],
)
def test_tensor_memory_is_read_from_the_ptx(ptx, columns):
    assert build._tmem_columns(ptx) == columns
