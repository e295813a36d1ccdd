"""Whether this machine's software and GPU are new enough, said in sentences a user can act on."""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import torch

from . import arch
from .errors import UnsupportedError

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
    if torch.cuda.is_available():
        try:
            arch.of("cuda")
        except UnsupportedError as e:
            said.append(f"{e}.")
    elif (loaded := driver()) is not None:
        if torch.version.cuda is None:
            said.append("This PyTorch was built without CUDA, so the GPU here stays idle: install a CUDA build of it.")
        else:
            said.append(
                f"NVIDIA driver {loaded} does not run CUDA {torch.version.cuda}, which this PyTorch was built for, so "
                f"the GPU here stays idle: update the driver or install a PyTorch for an older CUDA."
            )
    return said


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
