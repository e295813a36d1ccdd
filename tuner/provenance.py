"""Where a figure comes from: versions, commit, date."""

import datetime
import functools
import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import torch

from fp4suite import env

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or site-packages/fp4suite in a wheel


@functools.cache
def compilers() -> dict[str, str]:
    """Versions of what turns a kernel's source into a binary."""
    found = {"torch": str(torch.__version__)}
    for name, package in (("triton", "triton"), ("cutlass", "nvidia-cutlass-dsl")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Compilers, plus toolkit and driver where there is a GPU."""
    found = dict(compilers())
    if torch.version.cuda is not None:
        found["toolkit"] = str(torch.version.cuda)
    driver = _driver()
    if driver is not None:
        found["driver"] = driver
    return found


@functools.cache
def commit() -> str:
    """Short hash of the checkout's commit, with "+" if files differ from it; where git has none, FP4SUITE_COMMIT."""
    here = (ROOT / ".git").exists() and shutil.which("git") is not None
    head = _git("rev-parse", "--short=12", "HEAD") if here else ""
    if not head:
        return env.commit()
    code = ("fp4suite", "kernels_triton", "kernels_cute", "tuner")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return head + ("+" if changed else "")


def today() -> str:
    """The date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def results_dir() -> Path:
    """results/ of the checkout, else of the working directory."""
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "results"


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str | None:
    """Version of the NVIDIA driver, without a CUDA context; None where there is none."""
    try:
        import pynvml
    except ModuleNotFoundError:  # the [tune] extra brings it; bench works without
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
