"""What a kernel's source hash depends on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fp4suite import registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two kernels: one imports a part of its own, both a helper, which imports another."""
    folder = tmp_path / "hashed_kernels"
    folder.mkdir()
    files = {
        "__init__": "",
        "one": "import torch\nfrom . import one_part as part\nfrom .helper import x\n",
        "two": "def late():\n    from .helper import x\n",
        "one_part": "from . import one\n",
        "helper": "from .deep import x\n",
        "deep": "x = 1\n",
        "stranger": "x = 1\n",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [registry.Kernel("route", name, f"hashed_kernels.{name}", ("sm_90a",)) for name in ("one", "two")]
    monkeypatch.setattr(registry, "KERNELS", rows)
    registry.source_hash.cache_clear()
    yield folder
    registry.source_hash.cache_clear()
    sys.modules.pop("hashed_kernels")


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        ("one", {"one"}),
        ("two", {"two"}),
        ("one_part", {"one"}),
        ("helper", {"one", "two"}),
        ("deep", {"one", "two"}),
        ("stranger", set()),
    ],
)
def test_a_kernel_is_its_file_and_what_it_imports(package: Path, changed: str, seen: set[str]) -> None:
    before = {name: registry.source_hash(name) for name in ("one", "two")}
    assert before["one"] != before["two"]
    path = package / f"{changed}.py"
    path.write_text(path.read_text() + "y = 2\n")
    registry.source_hash.cache_clear()
    assert {name for name, value in before.items() if registry.source_hash(name) != value} == seen


DOCUMENTED = '''"""A module
of two lines."""


def f(x):  # of x
    """What it is."""

    asm = "# no comment"  # one
    """no docstring, but nobody minds it"""
    return asm, x


class C:
    """One."""

    x: int = 1  # of these
'''
BARE = '''def f(x):
    asm = "# no comment"
    """no docstring, but nobody minds it"""
    return asm, x
class C:
    x: int = 1'''


def test_what_is_hashed_is_code() -> None:
    assert registry.code(DOCUMENTED) == BARE
    assert registry.code(DOCUMENTED.replace("# no comment", "# another")) != BARE
    assert registry.code(DOCUMENTED.replace("return asm", "return  asm")) != BARE


def test_a_comment_changes_no_hash(package: Path) -> None:
    before = registry.source_hash("one")
    path = package / "helper.py"
    path.write_text('"""Of x."""\n\n' + path.read_text() + "# the end\n")
    registry.source_hash.cache_clear()
    assert registry.source_hash("one") == before


def test_a_module_may_have_a_default_of_its_own_for_each_problem() -> None:
    plain = SimpleNamespace(Config=lambda: "plain")
    choosy = SimpleNamespace(Config=lambda: "plain", default=lambda problem: f"for {problem}")
    assert registry.default_config(plain, "p") == "plain"  # type: ignore[arg-type]
    assert registry.default_config(choosy, "p") == "for p"  # type: ignore[arg-type]
