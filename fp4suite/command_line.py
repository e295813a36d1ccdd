"""What command lines share."""

import argparse
import math
import os
import select
import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], int]) -> int:
    """`main()`; where nobody reads its output to the end (`| head`), the exit code of a program that SIGPIPE ended."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        return 128 + signal.SIGPIPE
    return code


def seconds(text: str) -> float:
    """An argument's type."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return found


def output_is_closed() -> bool:
    """Whether nobody reads standard output any more: where a BrokenPipeError came from, if not from a worker."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    return bool(poll.poll(0))
