"""Ops inside of `emulate`: the emulated architecture's kernel where there is one, the reference elsewhere."""

import pytest
import torch

from fp4suite import UnsupportedError, dispatch, ops, reference
from ptx_emulator import emulate


@pytest.fixture(scope="module")
def operands():
    torch.manual_seed(0)
    a, b = torch.randn(70, 256), torch.randn(136, 256)
    return a, reference.quantize_nvfp4(a), reference.quantize_nvfp4(b)


@pytest.mark.parametrize(("arch", "kernel"), [("sm_100a", "cute_gemm_nvfp4_sm100"), ("sm_90a", "cute_gemm_nvfp4_sm90")])
def test_gemm_runs_the_kernel_of_the_emulated_architecture(arch, kernel, operands):
    _, a, b = operands
    with emulate(arch) as device, dispatch.recording() as choices:
        out = ops.gemm_nvfp4(a, b)
    (choice,) = choices
    assert choice.kernel == kernel
    assert choice.reason.startswith(f"emulated {arch}: ")
    assert len(device.launches) == 1
    assert device.launches[0].mmas
    expected = ops.gemm_nvfp4(a, b)
    assert dispatch.choose("gemm_nvfp4", choice.problem, "cpu").is_reference
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-3)


def test_ops_that_have_triton_kernels_only_go_on_with_the_reference(operands):
    x, a, _ = operands
    with emulate("sm_100a") as device, dispatch.recording() as choices:
        again = ops.quantize_nvfp4(x)
    assert {c.reason for c in choices} == {"emulated sm_100a: no kernel that can be emulated, the reference"}
    assert all(c.is_reference for c in choices)
    assert not device.launches
    assert torch.equal(again.data, a.data)


def test_what_the_kernel_cannot_do_is_refused_as_on_the_architecture(operands):
    a, _, b = operands
    with emulate("sm_100a"), pytest.raises(UnsupportedError, match=r"on sm_100a: .*quantise the activations first"):
        ops.gemm_nvfp4(a.bfloat16(), b)


def test_an_explicit_target_beats_the_emulator(operands):
    _, a, b = operands
    with emulate("sm_90a") as device, dispatch.on_target("cpu"):
        ops.gemm_nvfp4(a, b)
    assert not device.launches


def test_an_override_holds_inside(operands):
    _, a, b = operands
    from kernels_cute import gemm_nvfp4_sm100 as sm100

    config = sm100.Config(tile_n=64)
    with emulate("sm_100a") as device, dispatch.override(op="gemm_nvfp4", config=config), dispatch.recording() as seen:
        ops.gemm_nvfp4(a, b)
    assert (seen[0].kernel, seen[0].config, seen[0].reason) == ("cute_gemm_nvfp4_sm100", config, "override")
    assert set(device.launches[0].mmas) == {"tcgen05 mxf4nvf4 128x64x64"}
