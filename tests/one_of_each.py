"""Each op's kernel once on small problems of a model, compared with the reference, on a GPU: for compute-sanitizer.

    compute-sanitizer --report-api-errors no --error-exitcode 1 \
        python -m tests.one_of_each [--layers-of flash] [--m 3,300] [--op NAME ...]

Operands and outputs are allocations of their own, so that an access beyond one is seen. API errors are calls that CuTe
DSL tries and does without. A problem of more than LARGEST operations, whose reference would take too much memory, is
left out and named. Exit code 1 if anything is wrong.
"""

import argparse
import os
import sys
import time

import torch

from fp4suite import dispatch, registry, testing
from fp4suite.problem import PROBLEMS
from tuner import measure, targets

LARGEST = 5e9  # of a problem's flops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers-of", default="flash", metavar="MODEL")
    parser.add_argument("--m", default="3,300", help="numbers of tokens")
    parser.add_argument("--op", action="append", choices=tuple(PROBLEMS), help="may be repeated (default: all)")
    args = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    found = measure.describe("cuda:0")
    target = targets.Target(found["arch"], found["device"], "cuda:0")
    configs = targets.load_configs([args.layers_of])
    wrong = 0
    for op in args.op or PROBLEMS:
        start, count = time.perf_counter(), 0
        for problem in targets.problems(configs, op, target, [int(m) for m in args.m.split(",")], 1):
            if problem.flops > LARGEST:
                print(f"left out: {op} {problem}")
                continue
            choice = dispatch.choose(op, problem, "cuda:0")
            case = testing.case(problem, "cuda:0")
            case.run(registry.load(choice.kernel), choice.config)
            torch.cuda.synchronize()
            try:
                case.check()
            except AssertionError as e:
                print(f"{op} {problem}: {choice.kernel} {choice.config}: {e}")
                wrong += 1
            count += 1
        print(f"{op}: {count} problems, {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
