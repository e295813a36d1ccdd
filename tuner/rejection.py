"""Why a candidate is out. Each word is a constraint of the study, so that the sampler learns to stay away."""

from dataclasses import dataclass

REASONS = {
    "unsupported": "the kernel's supports() refuses it",
    "compile": "does not compile or launch",
    "fit": "does not fit the SM, or spills",
    "wrong": "differs from the reference",
    "crash": "ended its process",
    "timeout": "did not return in time",
}


@dataclass(frozen=True, slots=True)
class Rejected:
    """reason: a key of REASONS; detail: one line; by: how far out (> 0), for the sampler."""

    reason: str
    detail: str
    by: float = 1.0

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason must be one of {', '.join(REASONS)}, got {self.reason!r}")
        if not self.by > 0:
            raise ValueError(f"by must be positive, got {self.by}")
