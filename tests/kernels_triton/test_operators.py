"""Ops through their Triton kernels, with the arguments of `tests/fp4suite`: the reference's bits where promised.

On a GPU as dispatch has it; without one the same launches, on CPU tensors in the interpreter.
"""

import contextlib

import pytest
import torch

from fp4suite import ops, registry
from fp4suite.dispatch import on_target, recording

from ..fp4suite.op_arguments import arguments, assert_same, moved

EXACT = sorted({k.op for k in registry.KERNELS if k.exact and k.module.startswith("kernels_triton.")})


@pytest.mark.parametrize("name", EXACT)
def test_exact_ops(name: str, device: torch.device) -> None:
    """Results, and what is changed in place."""
    args, kwargs = arguments(name)
    want = getattr(ops, name)(*args, **kwargs)
    given, more = moved(arguments(name), device)
    target = contextlib.nullcontext() if device.type == "cuda" else on_target("sm_90a")
    with target, recording() as choices:
        got = getattr(ops, name)(*given, **more)
    assert choices
    assert not any(c.is_reference for c in choices)
    assert_same(moved((got, given, more), torch.device("cpu")), (want, args, kwargs))
