"""Compiling ahead of serving: whatever `dispatch` would choose for the problems to come is compiled and run once."""

from collections.abc import Iterable

import torch

from . import dispatch, support, testing
from .problem import DequantProblem, GemmProblem, Problem


def warmup(problems: Iterable[Problem], device: torch.device | str | None = None) -> list[dispatch.Choice]:
    """Compile and launch once what each problem would run, on random operands of its size; the choices, in order.

    device: the current CUDA device, or the CPU where there is none (where nothing is compiled). Afterwards the ops are
    safe to capture in a CUDA graph for these problems; another m may be given another config, which is then compiled
    when it is first met. Raises UnsupportedError for a problem that no kernel supports.
    """
    device = torch.device(device) if device is not None else support.gpu() or torch.device("cpu")
    choices = []
    for problem in problems:
        choice = dispatch.choose(problem.op, problem, device)
        choices.append(choice)
        if not choice.is_reference:
            asked, problem = problem, choice.problem or problem
            if isinstance(asked, GemmProblem) and problem != asked:  # activations are decoded first
                warmup([DequantProblem(m=asked.m, k=asked.k)], device)
            choice.module.warm(problem, choice.config)
            testing.case(problem, device).launch(choice.module, choice.config)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return choices
