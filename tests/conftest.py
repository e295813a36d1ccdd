"""Where tests run: on the GPU if there is one, else Triton in its interpreter and CuTe DSL compiled only."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from fp4suite import support

GPU = support.gpu() is not None
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if not GPU:
    from . import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a test starts hears SIGINT, also where a shell in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _shipped_tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the tester's environment."""
    monkeypatch.delenv("FP4SUITE_TABLE", raising=False)
    monkeypatch.delenv("FP4SUITE_BATCH_INVARIANT", raising=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked gpu that was selected without a GPU fails, saying so: it is never skipped in silence."""
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.usefixtures("_needs_gpu"))


def pytest_collection_finish() -> None:
    """Modules and tests stay: nothing looks through them for garbage, nor the emulator, at each launch, for tensors."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def _needs_gpu() -> None:
    pytest.fail('this test needs a GPU; deselect it with -m "not gpu"')
