"""`python -m fp4suite`: which table is in force, what is wrong with it, and output that nobody reads to the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fp4suite import dispatch, registry, support, table
from fp4suite.__main__ import main
from fp4suite.dispatch import Target


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "gpu", lambda: None)
    monkeypatch.setattr(support, "problems", list)
    dispatch.reread_tables()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A table with an entry of a kernel that is there and one of a kernel that is no more."""
    entries = [
        table.Entry(
            op="dequant_nvfp4",
            problem={"m": m, "k": 64},
            kernel=kernel,
            source_hash=registry.source_hash("triton_dequant_nvfp4"),
            config={},
            measured=False,
            predicted_us=1.0,
        )
        for m, kernel in ((1, "triton_dequant_nvfp4"), (2, "gone"))
    ]
    path = tmp_path / "mine.json"
    table.write(path, table.Table(schema=table.SCHEMA, device="some-gpu", arch="sm_90a", entries=entries))
    return path


def test_info_says_which_table_is_in_force_and_why(mine, monkeypatch, capsys) -> None:
    assert main(["info"]) == 0
    plain = capsys.readouterr().out
    assert "in_force   -\n" in plain
    assert "on the CPU the reference runs, whatever tables say" in plain
    monkeypatch.setenv("FP4SUITE_TABLE", str(mine))
    assert main(["info"]) == 0
    assert f"in_force   {mine} (table of FP4SUITE_TABLE)\n" in capsys.readouterr().out
    monkeypatch.setattr("fp4suite.__main__._target", lambda: Target("sm_90a", "a device without a table"))
    assert main(["info", "--json"]) == 0
    shipped = table.shipped_dir() / "sm_90a.json"
    assert json.loads(capsys.readouterr().out)["in_force"] == [
        f"{mine} (table of FP4SUITE_TABLE)",
        f"{shipped} (architecture table)",
    ]


def test_table_shows_the_one_in_force_and_says_why(mine, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FP4SUITE_TABLE", str(mine))
    assert main(["table"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{mine} (table of FP4SUITE_TABLE): some-gpu (sm_90a), 2 entries"
    assert [row.endswith("STALE") for row in rows] == [False, True]
    monkeypatch.delenv("FP4SUITE_TABLE")
    assert main(["table"]) == 0
    shipped = table.shipped_dir() / "sm_90a.json"
    assert capsys.readouterr().out.startswith(f"{shipped} (no GPU here): sm_90a (sm_90a), ")
    assert main(["table", str(mine)]) == 0
    assert capsys.readouterr().out.startswith(f"{mine}: some-gpu (sm_90a), 2 entries")
    monkeypatch.setattr("fp4suite.__main__._target", lambda: Target("sm_80", "an old device"))
    assert main(["table"]) == 1
    assert "no table of an old device or sm_80 in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "table"])
def test_a_variable_that_names_no_table_is_named(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FP4SUITE_TABLE", str(tmp_path / "none.json"))
    assert main([command]) == 1
    assert f"FP4SUITE_TABLE: {tmp_path / 'none.json'}: cannot be read (No such file" in capsys.readouterr().err
    (tmp_path / "notes.json").write_text("[]")
    monkeypatch.setenv("FP4SUITE_TABLE", str(tmp_path / "notes.json"))
    assert main([command]) == 1
    assert f"FP4SUITE_TABLE: {tmp_path / 'notes.json'}: not a tuned table" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("fp4suite", "table", "sm_90a"),  # more than a pipe holds
        ("fp4suite", "info"),
        ("model", "launches", "--config", "pro"),
        ("tuner", "check", "--allow-stale", "--tables", str(table.shipped_dir() / "sm_90a.json")),
    ],
    ids=" ".join,
)
def test_nobody_reads_to_the_end(command) -> None:
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 141  # as a program that SIGPIPE ended, in a shell
