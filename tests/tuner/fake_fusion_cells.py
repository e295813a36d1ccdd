"""`tuner.fusion_cells` where there is no GPU: everything is computed and checked for real, only times are made up."""

import numpy as np
import torch

from fp4suite import registry
from fp4suite.reference.quant import rmsnorm_fp32
from tuner import fusion_cells, measure, peers_fusions
from tuner.fusion_cells import open_cell, record_own, sound, times  # noqa: F401
from tuner.fusion_peer import Call, FusionPeer, near

OWN_KERNEL = registry.Kernel("rmsnorm_quantize", "cpu_rmsnorm", "tests.tuner.cpu_fusion", ("sm_90a",))
US = {"cpu_rmsnorm": 10.0, "fake_norm": 12.5, "fake_in_place": 8.0, "copy": 9.0, "empty": 8.0}
COPY_GB_PER_S = 0.1


def begin(self, items, device, seed=0):
    self.device, self.items = torch.device("cpu"), items


def capture(self, label, launch):
    def replay():
        for item in self.items:
            launch(item)

    replay()
    return measure.Timed(label, replay, len(self.items))


def rounds(self, timed, count):
    """A contender's median is US[contender] times the cell's m ** 0.5; rounds differ by up to 10 %."""
    noise = np.linspace(-0.1, 0.1, count if count % 2 else count + 1)[:count]
    scale = self.problem.m**0.5
    return np.array([[US[t.label.split()[0]] * scale * (1 + x) for t in timed] for x in noise])


def norm(case):
    import fake_peer

    x, weight, eps, _ = case.operands
    return Call(lambda: fake_peer.norm(x, weight, eps), lambda got: near(got, rmsnorm_fp32(x, weight, eps)))


def norm_in_place(case):
    import fake_peer

    x, weight, eps, _ = case.operands
    y = x.clone()

    def launch():
        y.copy_(fake_peer.norm(y, weight, eps))
        return y

    check = lambda got: near(got, rmsnorm_fp32(x, weight, eps))  # noqa: E731
    return Call(launch, check, lambda: y.copy_(x))


def only_few(problem):
    return "takes 64 tokens at most" if problem.m > 64 else None


COMMON = {"module": "fake_peer", "package": "fake-peer", "ops": ("rmsnorm_quantize",), "tolerance": "one BF16 step"}
FAKES = (
    FusionPeer(name="fake_norm", prepare=norm, note="BF16 out", **COMMON),
    FusionPeer(name="fake_in_place", prepare=norm_in_place, refuses=only_few, **COMMON),
)


def install(monkeypatch):
    for name, function in (("__init__", begin), ("capture", capture), ("rounds", rounds)):
        monkeypatch.setattr(measure.Timer, name, function)
    monkeypatch.setattr(measure, "cuda_device", torch.device)
    monkeypatch.setattr(measure, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    for peer in FAKES:
        monkeypatch.setitem(peers_fusions.PEERS, peer.name, peer)
    registry.KERNELS[:] = [OWN_KERNEL]


def record(name):
    if name == "empty":  # Triton's interpreter would do, but not in a time worth spending in every test
        cell = fusion_cells._cell
        cell.timed[name] = cell.capture(name, lambda case: None)
        return 0.0
    return fusion_cells.record(name)


def long_copy(device):
    return COPY_GB_PER_S
