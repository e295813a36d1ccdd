"""A kernel module with a known landscape, for the search: no device code, every kind of bad candidate."""

import os
import signal
import time
from dataclasses import dataclass

from fp4suite.built import Built
from fp4suite.problem import GemmProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    tile_m: int = 64
    tile_n: int = 128
    tile_k: int = 64
    num_stages: int = 2
    fault: str = "none"


SF_LAYOUT = "linear"
SPACE = {
    "tile_m": (16, 32, 64, 128),
    "tile_n": (32, 64, 128, 256),
    "tile_k": (64, 128),
    "num_stages": (2, 3, 4),
    "fault": ("none", "raise", "wrong", "spill"),  # tests that want more kinds put them in
}


def supports(problem: GemmProblem, config: Config) -> str | None:
    if problem.n % config.tile_n:
        return f"n={problem.n} is not a multiple of tile_n={config.tile_n}"
    return None


def launch(a, b, segments, out, config):
    raise AssertionError("a fake is never launched")


def precompile(problem: GemmProblem, config: Config) -> None:
    if config.fault == "raise":
        raise ValueError("tile too strange\nfor words")
    if config.fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if config.fault == "hang":
        time.sleep(600)


def build_key(problem: GemmProblem, config: Config) -> str:
    return problem.out


def build(problem: GemmProblem, config: Config, arch: str) -> Built:
    if config.fault == "raise":
        raise ValueError("tile too strange\nfor words")
    if config.num_stages == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if config.num_stages == 4:
        time.sleep(600)
    raise NotImplementedError("no device code")


def true_us(config: Config) -> float:
    """Fastest at tile_m=32, tile_n=256, tile_k=128, num_stages=3: 10 us. The default takes 16.4 us."""
    best = {"tile_m": 32, "tile_n": 256, "tile_k": 128, "num_stages": 3}
    steps = sum(abs(SPACE[k].index(getattr(config, k)) - SPACE[k].index(v)) for k, v in best.items())
    return 10.0 * 1.132**steps
