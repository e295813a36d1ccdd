"""Every point of gemm_nvfp4_sm100's SPACE compiled, a covering set of it executed in `ptx_emulator`: takes minutes.

    python -m tests.kernels_cute.sweep_sm100 [--jobs N] [--only compile|run] [--limit N]

compile: all configs, for every output, with one alpha and with three: no spills, the shared and tensor memory that
`budget` says. run: `sm100_cases.covering()` on ragged problems, random codes and scales, padding poisoned, each under
another schedule, against the FP64 product. Exit code 1 if anything failed.
"""

import argparse
import itertools
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from fp4suite.built import MAX_SHARED_BYTES, TMEM_COLUMNS, resources
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm100 as kernel
from kernels_cute.gemm_nvfp4_sm100 import Config
from ptx_emulator import emulate
from ptx_emulator.machine import SCHEDULES

from . import sm100_cases as cases


def compile_point(config: Config, out: str, segments: int) -> tuple[str | None, int]:
    """What is wrong with the cubin, and its registers."""
    problem = GemmProblem(m=1, n=64 * segments, k=cases.LARGE_K, act="nvfp4", out=out, segments=segments)
    made, want = kernel.build(problem, config), kernel.budget(config)
    found = resources(made)
    said = []
    if found.spill_bytes:
        said.append(f"spills {found.spill_bytes} bytes")
    if not made.shared_bytes == want.shared_bytes <= MAX_SHARED_BYTES[kernel.ARCH]:
        said.append(f"{made.shared_bytes} bytes of shared memory, budget {want.shared_bytes}")
    if not made.tmem_columns == want.tmem_columns <= TMEM_COLUMNS:
        said.append(f"{made.tmem_columns} columns of tensor memory, budget {want.tmem_columns}")
    return ", ".join(said) or None, found.registers


def run_point(config: Config, number: int) -> tuple[str | None, int]:
    """What is wrong with the numbers, and the MMAs that were executed."""
    case = cases.case(cases.awkward(config, number), seed=number)
    kernel._sm_count = lambda device: 2 * config.cluster_m * config.cluster_n * config.split_k  # two clusters
    with emulate(kernel.ARCH, schedule=SCHEDULES[number % len(SCHEDULES)], races="strict") as device:
        case.run(kernel, config)
    try:
        case.check()
    except AssertionError as e:
        return str(e), 0
    return None, device.launches[-1].events["MMAs"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=("compile", "run"))
    parser.add_argument("--limit", type=int, help="points of each kind, for a try")
    args = parser.parse_args()
    failed = 0
    with ProcessPoolExecutor(
        args.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        if args.only != "run":
            points = [(c, *rest) for c in cases.every() for rest in itertools.product(cases.OUTS, (1, 3))]
            failed += report(pool, "compiled", "registers", compile_point, points[: args.limit])
        if args.only != "compile":
            points = [(c, i) for i, c in enumerate(cases.covering())]
            failed += report(pool, "executed", "MMAs", run_point, points[: args.limit])
    return int(failed > 0)


def report(pool: Executor, done: str, what: str, check, points) -> int:
    """Runs `check` on all points, prints those that fail and one line for all, returns how many failed."""
    start, failed, most = time.perf_counter(), 0, 0
    futures = [pool.submit(check, *point) for point in points]
    for point, future in zip(points, futures, strict=True):
        try:
            wrong, figure = future.result()
        except Exception as e:  # a point that cannot even be tried is a failure like any other, and the rest go on
            wrong, figure = f"{type(e).__name__}: {e}", 0
        most = max(most, figure)
        if wrong:
            failed += 1
            print(f"FAILED {point}: {wrong}", flush=True)
    print(f"{len(points)} points {done}, {failed} failed, at most {most} {what}, {time.perf_counter() - start:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
