"""Functions of `cute.compile` in `emulate`: what is not a kernel, and launches of several devices."""

import cutlass
import numpy as np
import pytest
import torch
from cutlass import cute, utils
from cutlass.cute.runtime import from_dlpack

from ptx_emulator import Fault, emulate


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


@cute.kernel
def _share(own, every, total, flag, flags, ranks: cutlass.Constexpr):
    """Write a number, tell all ranks, wait for all of them, and add theirs up, the bits of the sum."""
    n = cute.arch.thread_idx()[0]
    own[n] = own[n] + cutlass.Float32(n)
    cute.arch.sync_threads()
    if n == 0:
        utils.distributed.multimem_red_add1(flags.iterator, order="release", scope="sys")
        utils.distributed.spin_lock_atom_cas_acquire_wait(
            lock_ptr=flag.iterator, expected_val=ranks, reset_val=0, scope="sys"
        )
    cute.arch.sync_threads()
    total[n] = cutlass.Int32(utils.distributed.multimem_ld_reduce_1xf32(every.iterator + n)[0])


@cute.jit
def _sum(own, every, total, flag, flags, ranks: cutlass.Constexpr, times: cutlass.Constexpr):
    for _ in cutlass.range_constexpr(times):
        _share(own, every, total, flag, flags, ranks).launch(grid=(1, 1, 1), block=(64, 1, 1))


def shared_sum(device, ranks: int = 3, times: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    numbers = [torch.full((64,), float(10**rank)) for rank in range(ranks)]
    totals = [torch.zeros(64, dtype=torch.int32) for _ in numbers]
    flags = [torch.zeros(1, dtype=torch.int32) for _ in numbers]
    every, all_flags = (
        torch.from_numpy(device.multicast([p.numpy() for p in parts])).view(parts[0].dtype)
        for parts in (numbers, flags)
    )

    def arguments(rank: int):
        return [from_dlpack(x) for x in (numbers[rank], every, totals[rank], flags[rank], all_flags)]

    compiled = cute.compile(_sum, *arguments(0), ranks, times)
    with device.together():
        for rank in range(ranks):
            compiled(*arguments(rank))
    return sum(torch.full((64,), float(10**rank)) + torch.arange(64) for rank in range(ranks)), totals


@pytest.mark.parametrize("schedule", ["round", "late"])
def test_ranks_add_up_what_the_others_have_written(schedule):
    with emulate("sm_100a", schedule=schedule) as device:
        want, totals = shared_sum(device)
    for total in totals:
        assert torch.equal(total.view(torch.float32), want)
    assert len(device.launches) == 3


def test_what_runs_together_is_one_launch_a_call():
    with emulate("sm_100a") as device, pytest.raises(Fault, match="the second launch of a call"):
        shared_sum(device, times=2)
    with emulate("sm_100a") as device, device.together(), pytest.raises(ValueError, match="inside of together"):
        shared_sum(device)
    with emulate("sm_100a") as device, pytest.raises(ValueError, match="of one size"):
        device.multicast([np.zeros(4), np.zeros(5)])
