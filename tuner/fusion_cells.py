"""What `bench --peers` does on the device for a fusion, in one process: a problem's operands, checks and timings.

    open_cell(op, dims, device, seed)                   # several sets of operands, as `measure.Bench` has them
    record_own(kernel, knobs); record("vllm_rms_norm")  # prepared, checked, captured
    times(["fp4suite", "vllm_rms_norm"], ...)           # interleaved rounds

Every contender gets the same operands, in the form that it takes. Ours must give what `testing.Case` demands; a peer
what its own tolerance allows, on rows that are spread over the result.
"""

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp4suite import problem as problems, registry
from fp4suite.problem import Problem

from . import measure, peers_fusions
from .fusion_peer import Call, FusionPeer
from .measure import Timed
from .side_by_side import EMPTY, OWN, rounds_within

COPY = "copy"
ALIGNED = 256  # bytes, as an allocation begins
COPY_ROUNDS = 5  # that tell which copy is faster


class Cell(measure.Bench):
    """A problem with its contenders."""

    def __init__(self, problem: Problem, device: torch.device | str, seed: int) -> None:
        super().__init__(problem, device, seed)
        self.timed: dict[str, Timed] = {}
        self._kept: list[Any] = []  # what graphs read and write that was not allocated while they were captured

    def record_own(self, kernel: str, config: Any) -> float:
        self.timed[OWN] = self.record(kernel, config)
        return 0.0  # its check knows no degrees

    def record_peer(self, peer: FusionPeer) -> float:
        """Run, check, capture, and check what the graph writes; the larger error.

        What works in place is checked alone: a graph repeats it.
        """
        calls = {id(case): peer.prepare(case) for case in self.cases}
        self._kept.append(calls)
        some = [id(case) for case in self.cases[: measure.CHECKED_SETS]]
        errors = [self._checked(calls[i]) for i in some]
        results: dict[int, Any] = {}  # kept, so that every launch of a graph writes to memory of its own

        def launch(case: Any) -> None:
            results[id(case)] = calls[id(case)].launch()

        timed = self.capture(peer.name, launch)
        self._kept.append(results)
        if all(calls[i].reset is None for i in some):
            for i in some:
                _poison(results[i])
            self._wait()
            timed.replay()
            self._wait()
            errors += [calls[i].check(results[i]) for i in some]
        self.timed[peer.name] = timed
        return max(errors)

    def record_copy(self) -> None:
        """As many bytes as the problem needs, half of them read and half written, by the faster of two copies: the
        driver's takes up to a quarter longer where half is no multiple of 8 KiB (H100)."""
        words = -(-self.problem.bytes // 2 // ALIGNED) * ALIGNED // 4
        pairs = {id(case): torch.zeros(2, words, dtype=torch.int32, device=self.device) for case in self.cases}
        self._kept.append(pairs)
        copies = [
            self.capture(COPY, lambda case: pairs[id(case)][1].copy_(pairs[id(case)][0])),
            self.capture(COPY, lambda case: torch.neg(pairs[id(case)][0], out=pairs[id(case)][1])),
        ]
        self.timed[COPY] = copies[int(np.median(self.rounds(copies, COPY_ROUNDS), axis=0).argmin())]

    def record_empty(self) -> None:
        from . import bench_kernels

        bench_kernels.empty()
        self.timed[EMPTY] = self.capture(EMPTY, lambda case: bench_kernels.empty())

    def _checked(self, call: Call) -> float:
        if call.reset is not None:
            call.reset()
        result = call.launch()
        self._wait()
        return call.check(result)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _poison(result: Any) -> None:
    """No byte of a result is right before the graph writes it."""
    for t in (result,) if isinstance(result, Tensor) else result:
        t.view(torch.uint8).fill_(0xFF)


# --- what runs in the measuring child ---

_cell: Cell | None = None


def open_cell(op: str, dims: dict[str, int | str], device: str, seed: int) -> None:
    """Start on a problem; forgets the one before."""
    global _cell
    _cell = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _cell = Cell(problems.from_dims(op, dims), device, seed)


def record_own(kernel: str, knobs: dict[str, Any]) -> float:
    """Check and capture a kernel of ours. Raises what compiling, launching or checking raises."""
    assert _cell is not None, "open_cell comes first"
    return _cell.record_own(kernel, registry.make_config(registry.load(kernel), knobs))


def record(name: str) -> float:
    """Check and capture a peer or a roof; returns its error in units of its tolerance (0 for a roof)."""
    assert _cell is not None, "open_cell comes first"
    if name == COPY:
        _cell.record_copy()
        return 0.0
    if name == EMPTY:
        _cell.record_empty()
        return 0.0
    return _cell.record_peer(peers_fusions.PEERS[name])


def times(names: list[str], seconds: float, least: int, most: int) -> list[list[float]]:
    """`rounds_within` of contenders by name."""
    assert _cell is not None, "open_cell comes first"
    return rounds_within(_cell, [_cell.timed[name] for name in names], seconds, least, most)


def sound() -> None:
    """Raises if the device can no longer be used, as after an illegal access."""
    assert _cell is not None, "open_cell comes first"
    torch.ones(16, device=_cell.device).sum().item()


def long_copy(device: str) -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    return measure.copy_bandwidth(device)
