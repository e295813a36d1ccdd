"""What a kernel's source hash depends on."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4suite import registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of two kernels, one of which has a part, and a file that both share."""
    folder = tmp_path / "hashed_kernels"
    folder.mkdir()
    for name in ("__init__", "one", "one_part", "two", "helper"):
        (folder / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [registry.Kernel("route", name, f"hashed_kernels.{name}", ("sm_90a",)) for name in ("one", "two")]
    monkeypatch.setattr(registry, "KERNELS", rows)
    registry.source_hash.cache_clear()
    yield folder
    registry.source_hash.cache_clear()
    sys.modules.pop("hashed_kernels")


@pytest.mark.parametrize(
    ("changed", "seen"),
    [("one", {"one"}), ("two", {"two"}), ("one_part", {"one"}), ("helper", {"one", "two"})],
)
def test_a_kernel_is_its_file_its_parts_and_what_is_shared(package: Path, changed: str, seen: set[str]) -> None:
    before = {name: registry.source_hash(name) for name in ("one", "two")}
    assert before["one"] != before["two"]
    (package / f"{changed}.py").write_text("x = 2\n")
    registry.source_hash.cache_clear()
    assert {name for name, value in before.items() if registry.source_hash(name) != value} == seen
