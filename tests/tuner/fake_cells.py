"""`tuner.bench_cells` where there is no GPU: everything is computed and checked for real, only times are made up.

A clock of known times takes the place of the CUDA timer, a kernel and a peer for the CPU are registered.
"""

import numpy as np
import torch

from fp4suite import registry
from tuner import bench_cells, measure, peers
from tuner.bench_cells import open_cell, record_own, sound, times, warm_own, warm_peer  # noqa: F401

OWN_KERNEL = registry.Kernel("gemm_nvfp4", "cpu_gemm", "tests.tuner.cpu_kernel", ("sm_90a",))
US = {"fp4suite": 10.0, "cublas_bf16": 20.0, "fake": 12.5, "read": 9.0, "empty": 1.0, "fp8": 5.0}


class Clock:
    """Contender's median is US[contender] times the cell's m ** 0.5; rounds differ by up to 10 %."""

    def __init__(self, items, device, seed=0):
        self.items = items
        self.m = 0

    def capture(self, label, launch):
        def replay():
            for item in self.items:
                launch(item)

        replay()
        return measure.Timed(label, replay, len(self.items))

    def rounds(self, timed, rounds):
        noise = np.linspace(-0.1, 0.1, rounds if rounds % 2 else rounds + 1)[:rounds]
        scale = bench_cells._cell.problem.m**0.5
        return np.array([[US[t.label] * scale * (1 + x) for t in timed] for x in noise])


def fake_prepare(weight, alpha):
    import fake_peer

    packed = fake_peer.pack(weight.data, weight.sf.float())
    return lambda x: lambda: fake_peer.matmul(x, packed, alpha)


FAKE = peers.GemmPeer(name="fake", module="fake_peer", package="fake-peer", prepare=fake_prepare, note="made up")


def record(name):
    if name == "read":  # Triton's interpreter would do, but not in a time worth spending in every test
        bench_cells._cell.timed[name] = bench_cells._cell.timer.capture(name, lambda i: None)
        return 0.0
    return bench_cells.record(name)


def roofs(device):
    install()
    return {"read": 3000.0, "mma": 800.0}


def open_shape(n, k, segments, device, seed):
    install()
    return bench_cells.open_shape(n, k, segments, device, seed)


def install():
    """In whatever process this runs; the fixture of the tests undoes it in theirs."""
    measure.Timer, measure.cuda_device, measure.l2_bytes = Clock, torch.device, lambda device: 1
    peers.PEERS["fake"] = FAKE
    registry.KERNELS[:] = [OWN_KERNEL]
