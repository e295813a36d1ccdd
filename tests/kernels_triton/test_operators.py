"""Ops through their Triton kernels, with the arguments of `tests/fp4suite`: the reference's bits where promised.

On a GPU as dispatch has it; without one the same launches, on CPU tensors in the interpreter.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.runtime.interpreter import GridExecutor

from fp4suite import ops, registry
from fp4suite.dispatch import on_target, override, recording
from fp4suite.reference import CompressorStep

from ..fp4suite.op_arguments import arguments, assert_same, moved

EXACT = {k.op: k.name for k in registry.KERNELS if k.exact and k.module.startswith("kernels_triton.")}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_ops(name: str, device: torch.device) -> None:
    """Results, and what is changed in place."""
    args, kwargs = arguments(name)
    want = getattr(ops, name)(*args, **kwargs)
    given, more = moved(arguments(name), device)
    target = contextlib.nullcontext() if device.type == "cuda" else on_target("sm_90a")
    with target, override(op=name, kernel=EXACT[name]), recording() as choices:
        got = getattr(ops, name)(*given, **more)
    assert choices
    assert not any(c.is_reference for c in choices)
    assert_same(moved((got, given, more), torch.device("cpu")), (want, args, kwargs))


CONTIGUOUS = {"table", "state"}  # what has to be


def scattered(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, two places from each to the next along the last axis, others between."""
    wide = torch.full((*x.shape, 2), -7, dtype=torch.float32, device=x.device).to(x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def scattered_operands(name: str, device: torch.device) -> dict[str, Any]:
    """Arguments of an op by name: tensors, and those of compressors' steps, with strides where they may have any."""
    args, kwargs = moved(arguments(name), device)
    given = dict(inspect.signature(getattr(ops, name)).bind(*args, **kwargs).arguments)
    in_place = {"o"} if name == "rope_inverse_" else {"weight"} if name == "embed" else set()

    def spread(key: str, x: Any) -> Any:
        if isinstance(x, CompressorStep):
            return CompressorStep(*(spread(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)))
        return scattered(x) if isinstance(x, torch.Tensor) and key not in CONTIGUOUS | in_place else x

    return {key: spread(key, x) for key, x in given.items()}


@pytest.mark.parametrize("name", sorted(EXACT.keys() - {"dequant_nvfp4"}))
def test_operands_of_any_stride(name: str, device: torch.device) -> None:
    """Weights and integers, too: a kernel that takes them contiguous gets copies."""
    args, kwargs = arguments(name)
    want = getattr(ops, name)(*args, **kwargs)
    given = scattered_operands(name, device)
    target = contextlib.nullcontext() if device.type == "cuda" else on_target("sm_90a")
    with target, override(op=name, kernel=EXACT[name]):
        got = getattr(ops, name)(**given)
    changed = dict(inspect.signature(getattr(ops, name)).bind(*args, **kwargs).arguments)
    assert_same(moved((got, given), torch.device("cpu")), (want, changed))


# Triton launches of a call; a global scale that is not given takes two
LAUNCHES = {
    "rms_norm": 1,
    "qkv_norm_rope_insert": 1,
    "qnorm_rope": 1,
    "qnorm_rope_quantize": 1,
    "kv_norm_rope_insert": 1,
    "rope_inverse": 1,
    "rope_inverse_": 1,
    "rope_inverse_quantize": 1 + 2,
    "swiglu": 1,
    "embed": 1,
    "compress_kv": 1,
    "compress_kv_pair": 1,
    "csa_queries": 1,
    "csa_queries_fp8": 1,
}


@contextlib.contextmanager
def counted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Grows with every launch of a Triton kernel within the block."""
    launches: list[object] = []
    if device.type == "cuda":
        triton.knobs.runtime.launch_enter_hook.add(launches.append)
        yield launches
        triton.knobs.runtime.launch_enter_hook.remove(launches.append)
        return
    run = GridExecutor.__call__
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", lambda *a, **k: (launches.append(a), run(*a, **k))[1])
        yield launches


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    target = contextlib.nullcontext() if device.type == "cuda" else on_target("sm_90a")
    args, kwargs = moved(arguments(name), device)
    with target, counted(device, monkeypatch) as launches:
        getattr(ops, name)(*args, **kwargs)
        assert len(launches) == LAUNCHES[name]
        if name == "rope_inverse_quantize":
            getattr(ops, name)(*args, **kwargs, alpha=torch.ones((), device=device))
            assert len(launches) == LAUNCHES[name] + 1
