"""What a library's kernel for a fusion is to the benchmark: operands of a case, prepared once, and a call to time.

call = peer.prepare(case)
result = call.launch()        # captured in a CUDA graph
error = call.check(result)    # against the reference, in units of the tolerance; AssertionError beyond it
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4suite.problem import Problem
from fp4suite.testing import Case

from .peers import Peer

CHECKED_ROWS = 64  # of a result, spread over all of it
BF16_STEP = 2.0**-7  # two neighbouring BF16 numbers, relative to the smaller


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """launch returns what it wrote. reset: brings back operands that a launch works on in place."""

    launch: Callable[[], Any]
    check: Callable[[Any], float]
    reset: Callable[[], object] | None = None


def takes_all(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionPeer(Peer[Callable[[Case], Call]]):
    """ops: what it is compared with. tolerance: what `check` allows, in words. refuses: why it cannot do a problem.

    on_request: timed only where it is named. part_of: ops of which it does a part only.
    """

    ops: tuple[str, ...]
    tolerance: str
    refuses: Callable[[Problem], str | None] = takes_all
    on_request: bool = False
    part_of: tuple[str, ...] = ()


def spread(rows: int, device: torch.device, most: int = CHECKED_ROWS) -> Tensor:
    """int64 row numbers from the first to the last, `most` at most."""
    return torch.linspace(0, rows - 1, min(rows, most), device=device, dtype=torch.float64).round().long()


def within(got: Tensor, want: Tensor, room: Tensor, what: str = "result") -> float:
    """The largest |got - want| in units of room, 0 where they are equal. Raises AssertionError beyond 1."""
    if got.shape != want.shape:
        raise AssertionError(f"{what} is {list(got.shape)}, want {list(want.shape)}")
    off = (got.double() - want.double()).abs()
    error = torch.where(off == 0, 0.0, off / room.double())
    worst = float(error.nan_to_num(nan=torch.inf).amax()) if error.numel() else 0.0
    if not worst <= 1:
        place = int(error.nan_to_num(nan=torch.inf).argmax())
        raise AssertionError(
            f"{what} differs from the reference by {worst:.3g} times the tolerance: "
            f"got {got.flatten()[place].item():.6g}, want {want.flatten()[place].item():.6g}"
        )
    return worst


def near(got: Tensor, want: Tensor, steps: float = 1, of_row: float = 2.0**-16) -> float:
    """BF16 results [..., k] of FP32 arithmetic in another order: `steps` BF16 steps, and a share of the row's largest.

    The share covers sums whose terms cancel.
    """
    room = steps * BF16_STEP * want.double().abs() + of_row * want.double().abs().amax(-1, keepdim=True)
    return within(got, want, room)


def relative_rms(got: Tensor, want: Tensor, limit: float, what: str) -> float:
    """Root mean square of a row's error over that of the row, the worst row's, in units of `limit`."""
    if got.shape != want.shape:
        raise AssertionError(f"{what} is {list(got.shape)}, want {list(want.shape)}")
    off = (got.double() - want.double()).square().mean(-1).sqrt()
    size = want.double().square().mean(-1).sqrt()
    error = torch.where(off == 0, 0.0, off / size)
    worst = float(error.nan_to_num(nan=torch.inf).amax())
    if not worst <= limit:
        raise AssertionError(f"{what} of a token differs from the reference: error {worst:.3g} (limit {limit:g})")
    return worst / limit
