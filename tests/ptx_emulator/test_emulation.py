"""Functions of `cute.compile` in `emulate`: what is not a kernel."""

import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

from ptx_emulator import emulate


@cute.jit
def _doubled(x: cute.Tensor, y: cute.Tensor):
    for n in range(cute.size(x)):
        y[n] = x[n] + x[n]


def test_a_function_without_kernels_runs_on_the_host():
    x, y = torch.arange(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    tensors = from_dlpack(x), from_dlpack(y)
    with emulate("sm_100a") as device:
        _doubled(*tensors)
        assert y.tolist() == [0, 2, 4, 6, 8]
        y.zero_()
        cute.compile(_doubled, *tensors)(*tensors)
        assert y.tolist() == [0, 2, 4, 6, 8]
    assert not device.launches
