"""Whether this machine's software and GPU are new enough, said in sentences a user can act on."""

import functools
import importlib.metadata
import logging
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from . import arch
from .errors import UnsupportedError

log = logging.getLogger(__name__)

MINIMUM = {"torch": (2, 11), "triton": (3, 6), "nvidia-cutlass-dsl": (4, 8)}  # pyproject.toml says the same


def versions() -> dict[str, str]:
    """Versions of what results depend on; "-" for what is not here."""
    found = {name: _version(name) for name in MINIMUM}
    return {
        "torch": found["torch"],
        "triton": found["triton"],
        "cutlass": found["nvidia-cutlass-dsl"],
        "cuda": torch.version.cuda or "-",
        "driver": driver() or "-",
    }


def driver() -> str | None:
    """Version of the NVIDIA driver that is loaded, or None."""
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text())
        if match:
            return match[1]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else None


@functools.cache
def gpu() -> torch.device | None:
    """The current CUDA device if PyTorch and fp4suite can use it, else None. Says once, as a warning, what is amiss.

    For programs that take a GPU where there is one; who names a device is told by an error instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's paragraph about an old driver: the sentence below says it
        available = torch.cuda.is_available()
    sentence = _gpu_problem(available)
    if sentence:
        log.warning("%s Going on with the CPU.", sentence)
    return torch.device("cuda", torch.cuda.current_device()) if available and not sentence else None


def _gpu_problem(available: bool) -> str | None:
    """Why the GPU that is here cannot be used, or None (also where there is none)."""
    if available:
        try:
            arch.of("cuda")
        except UnsupportedError as e:
            return f"{e}."
        return None
    loaded = driver()
    if loaded is None:
        return None
    if torch.version.cuda is None:
        return "This PyTorch was built without CUDA, so the GPU here stays idle: install a CUDA build of it."
    return (
        f"NVIDIA driver {loaded} does not run CUDA {torch.version.cuda}, which this PyTorch was built for, so "
        f"the GPU here stays idle: update the driver or install a PyTorch for an older CUDA."
    )


def problems() -> list[str]:
    """One sentence for each thing that keeps fp4suite, or this machine's GPU, from working. Empty where all is well.

    A machine without an NVIDIA driver has no problem: it runs on the CPU.
    """
    said = []
    for name, minimum in MINIMUM.items():
        found = _version(name)
        wanted = ".".join(map(str, minimum))
        if found == "-":
            said.append(f"{name} is not installed; fp4suite needs {wanted} or newer (`make setup`).")
        elif _numbers(found) < minimum:
            said.append(f"{name} {found} is too old; fp4suite needs {wanted} or newer (`make setup`).")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence = _gpu_problem(torch.cuda.is_available())
    return [*said, sentence] if sentence else said


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
