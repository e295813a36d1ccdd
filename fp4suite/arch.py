"""Architectures as strings: "sm_100a" (B200), "sm_90a" (H100, H200) and "cpu"."""

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .errors import UnsupportedError

ARCHS = ("sm_90a", "sm_100a", "cpu")
GPU_ARCHS = ("sm_90a", "sm_100a")
SM_COUNT = {"sm_90a": 132, "sm_100a": 148}  # of an H100 and a B200: what is assumed where there is none
_BY_CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a"}


def of(device: torch.device | str) -> str:
    """The architecture of a torch device.

    Raises UnsupportedError for a GPU that fp4suite has no kernels for, and for any device other than CUDA and CPU
    ("meta" counts as CPU: it runs nothing).
    """
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return "cpu"
    if device.type != "cuda":
        raise UnsupportedError(f"device {device.type!r}: fp4suite runs on CUDA (sm_90a, sm_100a) and on the CPU")
    return _of_cuda(device.index if device.index is not None else torch.cuda.current_device())


_assumed: ContextVar[str | None] = ContextVar("fp4suite_assumed_arch", default=None)


@contextlib.contextmanager
def assume(arch: str) -> Iterator[None]:
    """Within the block, `arch` is the current one."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


def current() -> str:
    """The architecture that is assumed, or of the current CUDA device, or "cpu" where there is none."""
    return _assumed.get() or (of("cuda") if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device | str) -> str:
    """The device's name as tables and result folders spell it: "nvidia-h100-80gb-hbm3", or "cpu"."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    return _cuda_name(device.index if device.index is not None else torch.cuda.current_device())


def slug(name: str) -> str:
    """A device's marketing name in lower case with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _of_cuda(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    arch = _BY_CAPABILITY.get(capability)
    if arch is None:
        name = torch.cuda.get_device_name(index)
        raise UnsupportedError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; "
            "fp4suite has kernels for 9.0 (H100, H200) and 10.0 (B200)"
        )
    return arch


@functools.cache
def _cuda_name(index: int) -> str:
    return slug(torch.cuda.get_device_name(index))
