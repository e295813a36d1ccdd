"""Sentences about a machine that is too old, in place of tracebacks."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fp4suite import UnsupportedError, arch, support
from fp4suite.__main__ import main


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose software, driver and GPU a test sets."""
    fake = SimpleNamespace(
        versions={"torch": "2.13.0+cu130", "triton": "3.7.1", "nvidia-cutlass-dsl": "4.8.1"},
        driver=None,
        cuda="13.0",
        capability=None,
    )
    monkeypatch.setattr(support, "_version", lambda name: fake.versions.get(name, "-"))
    monkeypatch.setattr(support, "driver", lambda: fake.driver)
    monkeypatch.setattr(torch.version, "cuda", fake.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: fake.capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: fake.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA Something")
    for cached in (support.gpu, arch._of_cuda, arch._cuda_name):
        cached.cache_clear()
    yield fake
    for cached in (support.gpu, arch._of_cuda, arch._cuda_name):
        cached.cache_clear()


def test_a_machine_without_a_gpu_has_no_problem(machine: SimpleNamespace) -> None:
    assert support.problems() == []
    assert support.gpu() is None


def test_a_supported_gpu(machine: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    machine.capability, machine.driver = (9, 0), "580.95"
    assert support.problems() == []
    assert support.gpu() == torch.device("cuda", 0)
    assert not caplog.records


def test_an_old_gpu_is_named_and_left_alone(machine: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    machine.capability = (8, 0)
    with caplog.at_level(logging.WARNING):
        assert support.gpu() is None
        assert support.gpu() is None
    assert [r.getMessage() for r in caplog.records] == [
        "NVIDIA Something has compute capability 8.0; fp4suite has kernels for 9.0 (H100, H200) and 10.0 (B200). "
        "Going on with the CPU."
    ]
    with pytest.raises(UnsupportedError, match=r"compute capability 8\.0"):
        arch.current()


def test_an_old_driver(machine: SimpleNamespace) -> None:
    machine.driver = "535.54.03"
    (sentence,) = support.problems()
    assert sentence.startswith("NVIDIA driver 535.54.03 does not run CUDA 13.0")


@pytest.mark.parametrize(
    ("name", "version", "sentence"),
    [
        ("torch", "2.9.1+cu128", "torch 2.9.1+cu128 is too old; fp4suite needs 2.11 or newer (`make setup`)."),
        ("triton", "3.5.0", "triton 3.5.0 is too old; fp4suite needs 3.6 or newer (`make setup`)."),
        ("nvidia-cutlass-dsl", "-", "nvidia-cutlass-dsl is not installed; fp4suite needs 4.8 or newer (`make setup`)."),
    ],
)
def test_old_software(
    machine: SimpleNamespace, capsys: pytest.CaptureFixture[str], name: str, version: str, sentence: str
) -> None:
    machine.versions[name] = version
    assert support.problems() == [sentence]
    assert main(["info"]) == 1
    assert sentence in capsys.readouterr().err
