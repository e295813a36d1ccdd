"""`check` on tables that are right, and on each way to be wrong."""

import dataclasses
import json

import pytest

from fp4suite import registry, table
from tuner import check
from tuner.__main__ import main

from . import fake_kernel


def entry(**change):
    base = {
        "op": "gemm_nvfp4",
        "problem": {"m": 16, "n": 512, "k": 512, "act": "bf16", "out": "bf16", "segments": 1},
        "kernel": "fake_gemm",
        "source_hash": registry.source_hash("fake_gemm"),
        "config": dataclasses.asdict(fake_kernel.Config()),
        "measured": False,
        "predicted_us": 5.0,
        "default_us": 6.0,
    }
    return table.Entry(**(base | change))


def checked(tmp_path, *entries, device="sm_90a", arch="sm_90a", **kwargs):
    path = tmp_path / f"{device}.json"
    table.write(path, table.Table(schema=table.SCHEMA, device=device, arch=arch, entries=list(entries)))
    return check.run(tmp_path, **kwargs)


def test_a_right_table_passes(fake, tmp_path):
    found = checked(tmp_path, entry())
    assert (found.tables, found.entries, found.problems, found.notes) == (1, 1, [], [])


MEASURED = {"measured": True, "median_us": 5.0, "p20_us": 4.9, "p80_us": 5.2, "predicted_us": None}


@pytest.mark.parametrize(
    ("change", "table_of", "message"),
    [
        ({"kernel": "gone"}, {}, "no kernel is called 'gone'"),
        ({"op": "dequant_nvfp4", "problem": {"m": 1, "k": 64}}, {}, "fake_gemm is a kernel of gemm_nvfp4"),
        ({"op": "nothing"}, {}, "op must be one of"),
        ({"problem": {"m": 16, "q": 1}}, {}, "dimensions of gemm_nvfp4 are"),
        ({"config": {"tile_q": 1}}, {}, "Config has no tile_q"),
        ({"config": {"tile_m": 48}}, {}, "{'tile_m': 48} is not in the SPACE of fake_gemm"),
        ({"problem": {"m": 16, "n": 40, "k": 512}}, {}, "its config does not support it: n=40"),
        ({}, {"device": "sm_100a", "arch": "sm_100a"}, "fake_gemm does not run on sm_100a"),
        (MEASURED, {}, "measured is true, but this is the table of sm_90a"),
        ({}, {"device": "nvidia-h100"}, "measured is false, but this is the table of nvidia-h100"),
        ({"predicted_us": None}, {}, "a predicted entry has predicted_us"),
        ({"predicted_us": 6.5}, {}, "it is slower (6.5 us) than the default (6.0 us)"),
        ({"source_hash": "old"}, {}, "has changed since it was tuned"),
    ],
)
def test_each_way_to_be_wrong_is_named(fake, tmp_path, change, table_of, message):
    found = checked(tmp_path, entry(**change), **table_of)
    assert len(found.problems) == 1
    assert message in found.problems[0]


def test_stale_entries_may_be_allowed_but_are_told(fake, tmp_path):
    found = checked(
        tmp_path,
        entry(source_hash="old"),
        entry(source_hash="old", problem=entry().problem | {"m": 32}),
        entry(source_hash="old", invariant=True),
        entry(problem=entry().problem | {"m": 64}),
        stale_is_wrong=False,
    )
    assert not found.problems
    assert found.notes == [
        "3 entries of sm_90a.json are stale: their kernels changed since they were tuned; "
        "tune again with `tuner tune --stale` and `tuner tune --batch-invariant`",
        "     3 fake_gemm",
    ]
    assert len(found.stale) == 3
    assert "m=32" in found.stale[1]


def test_stale_entries_are_counted_and_listed_on_request(fake, tmp_path, capsys):
    checked(tmp_path, entry(source_hash="old"))
    arguments = ["check", "--tables", str(tmp_path), "--allow-stale"]
    assert main(arguments) == 0
    short = capsys.readouterr().out.splitlines()
    assert short[0] == (
        "1 entries of sm_90a.json are stale: their kernels changed since they were tuned; "
        "tune again with `tuner tune --stale`"
    )
    assert main([*arguments, "--verbose"]) == 0
    long = capsys.readouterr().out.splitlines()
    assert [line for line in long if line not in short] == [
        "sm_90a.json: gemm_nvfp4 m=16 n=512 k=512 act=bf16 out=bf16 segments=1 order=rows: "
        "fake_gemm has changed since it was tuned (old): tune --stale"
    ]


def test_a_table_that_cannot_be_read_is_wrong_and_does_not_hide_the_next(fake, tmp_path):
    (tmp_path / "a.json").write_text('{"schema":1')
    found = checked(tmp_path, entry())
    assert found.tables == 2
    assert found.entries == 1
    assert len(found.problems) == 1
    assert "a.json: not a tuned table" in found.problems[0]


def test_command_line(fake, tmp_path, capsys):
    checked(tmp_path, entry(config={"tile_m": 48}))
    assert main(["check", "--tables", str(tmp_path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["entries"] == 1
    assert len(document["problems"]) == 1
    checked(tmp_path, entry())
    assert main(["check", "--tables", str(tmp_path)]) == 0
    assert "1 tables, 1 entries, 0 run on the GPU, 0 wrong" in capsys.readouterr().out
    assert main(["check", "--tables", str(tmp_path / "nowhere")]) == 1
    assert "no tables in" in capsys.readouterr().err


def test_shipped_tables_are_right():
    """Those in results/tables: they parse, fit the kernels' spaces and were made from today's sources."""
    found = check.run(table.shipped_dir(), stale_is_wrong=False)
    assert not found.problems, found.problems
    assert found.entries > 0
