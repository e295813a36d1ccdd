"""One line a case: name, configuration, schedule, warp instructions, seconds, and ok or the first mismatch."""

import argparse
import sys
import time
from pathlib import Path

from . import (
    ampere,
    attention,
    blockwise,
    cute_ext,
    distributed,
    elementwise,
    epilogues,
    gemm,
    grouped,
    hopper,
    mamba,
    norms,
    primitives,
    task_scheduling,
    tutorials,
)
from .harness import SCHEDULES, Outcome, peak_mib, run_case

_FAMILIES = (
    *(gemm, grouped, blockwise, epilogues, attention, mamba, hopper, ampere, norms, elementwise, tutorials),
    *(cute_ext, primitives, task_scheduling, distributed),
)
CASES = tuple(case for family in _FAMILIES for case in family.CASES)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx_emulator.examples", description=__doc__)
    parser.add_argument("--cutlass", type=Path, required=True, help="a checkout of CUTLASS")
    parser.add_argument("--schedule", choices=(*SCHEDULES, "all"), default="round")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("names", nargs="*", help="run the cases whose line has all of a name's words, '+' between them")
    args = parser.parse_args()
    cases = [c for c in CASES if not args.names or any(all(w in str(c) for w in n.split("+")) for n in args.names)]
    if args.list:
        print(*cases, sep="\n")
        return 0
    if not cases:
        parser.error("no case has such a name")
    schedules = tuple(SCHEDULES) if args.schedule == "all" else (args.schedule,)
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(outcome, flush=True)

    start = time.perf_counter()
    for case in cases:
        run_case(args.cutlass, case, schedules, report)
    wrong = sum(o.problem is not None for o in outcomes)
    executed, spent = sum(o.instructions for o in outcomes), sum(o.seconds for o in outcomes)
    print(
        f"{len(outcomes) - wrong} of {len(outcomes)} runs of {len(cases)} cases are right; {executed} warp "
        f"instructions in {spent:.0f} s ({executed / max(spent, 1e-9):.0f} a second), "
        f"{time.perf_counter() - start:.0f} s with compilation, peak memory {peak_mib():.0f} MiB"
    )
    return int(wrong > 0)


sys.exit(main())
