"""Rows of results, stored and drawn. Predicted and measured never share a file."""

import json

import pytest

from fp4suite.problem import PROBLEMS, GemmProblem, QuantizeProblem
from tuner import bench, report
from tuner.__main__ import main


def predicted(op, tmp_path, capsys):
    """What bench writes for a small model without a GPU."""
    arguments = ["bench", "--layers-of", "demo", "--arch", "sm_100a", "--m", "1,64", "--out", str(tmp_path / "bench")]
    assert main([*arguments, "--op", op, "--quiet", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def rows(tmp_path, capsys):
    """Of two ops."""
    found = [predicted(op, tmp_path, capsys) for op in ("gemm_nvfp4", "quantize_nvfp4")]
    return {key: [x for f in found for x in f[key]] for key in ("rows", "files")}


def test_without_a_gpu_every_row_is_marked_predicted(tmp_path, capsys):
    rows = predicted("all", tmp_path, capsys)
    assert {row["op"] for row in rows["rows"]} == set(PROBLEMS)
    for path in rows["files"]:
        assert "/predicted/sm_100a/" in path
    for row in rows["rows"]:
        assert row["measured"] is False
        assert row["p20_us"] == row["baseline_us"] == ""
        assert 0 < row["share_of_roof"] <= 1
    assert not list((tmp_path / "bench").glob("*.csv"))


def test_act_is_of_the_activations(tmp_path, capsys):
    arguments = ["bench", "--layers-of", "flash", "--arch", "sm_90a", "--m", "2048", "--act", "fp8"]
    assert main([*arguments, "--op", "gemm_nvfp4", "--out", str(tmp_path), "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {r["kernel"] for r in found} == {"cute_gemm_nvfp4_sm90_fp8"}
    assert all("act=fp8" in r["problem"] and "order=fragments_sm90_fp8" in r["problem"] for r in found)


def test_rows_stand_alone_and_come_back_from_the_file(rows, tmp_path):
    path = tmp_path / "bench" / "predicted" / "sm_100a" / "gemm_nvfp4.csv"
    loaded = bench.load(path)
    mine = [r for r in rows["rows"] if r["op"] == "gemm_nvfp4"]
    assert len(loaded) == len(mine)
    for row in loaded:
        assert set(row) == set(bench.COLUMNS)
        for column in ("op", "problem", "kernel", "config", "arch", "device", "median_us", "versions", "date", "roof"):
            assert row[column], column
        dims = dict(pair.split("=") for pair in row["problem"].split())
        flops = 2 * int(dims["m"]) * int(dims["n"]) * int(dims["k"])
        assert float(row["tflop_per_s"]) == pytest.approx(flops / float(row["median_us"]) / 1e6, rel=2e-3, abs=5e-4)


def test_a_new_row_replaces_the_old_one_of_its_problem_alone(rows, tmp_path):
    path = tmp_path / "bench" / "predicted" / "sm_100a" / "gemm_nvfp4.csv"
    before = bench.load(path)
    changed = dict(before[3]) | {"median_us": "77"}
    bench.store(path, [changed])
    after = bench.load(path)
    assert after[3]["median_us"] == "77"
    assert [r for i, r in enumerate(after) if i != 3] == [r for i, r in enumerate(before) if i != 3]


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("op,problem\n1,2\n")
    with pytest.raises(ValueError, match="benchmark again"):
        bench.load(tmp_path / "x.csv")


def test_screen_says_predicted(rows):
    text = bench.render(rows["rows"])
    assert text.count("(predicted)") == len(rows["rows"])


def test_roofs_are_the_longer_of_bytes_and_flops():
    roofs = bench.Roofs(read=2000.0, copy=1000.0, mma=100.0)
    decode, prefill = GemmProblem(m=1, n=4096, k=4096), GemmProblem(m=8192, n=4096, k=4096)
    assert roofs.of(decode) == ("read 2000 GB/s", pytest.approx(decode.bytes / 2e6))
    assert roofs.of(prefill) == ("mma 100 TFLOP/s", pytest.approx(prefill.flops / 1e8))
    quantise = QuantizeProblem(m=64, k=4096)
    assert roofs.of(quantise) == ("copy 1000 GB/s", pytest.approx(quantise.bytes / 1e6))


def test_report_draws_the_same_files_from_the_same_rows(rows, tmp_path):
    text, plots = report.write(tmp_path / "bench", tmp_path / "plots")
    assert "PREDICTED, not measured" in text
    assert {p.name for p in plots} >= {"sm_100a-predicted-gemm_nvfp4.svg", "sm_100a-predicted-quantize_nvfp4.svg"}
    first = {p: p.read_bytes() for p in plots}
    report.write(tmp_path / "bench", tmp_path / "plots")
    assert {p: p.read_bytes() for p in plots} == first


def test_measured_rows_show_their_baseline_in_the_report(rows, tmp_path):
    measured = [
        {**row, "device": "some-gpu", "measured": True, "baseline": "cublas_bf16", "baseline_us": row["median_us"] * 2}
        for row in rows["rows"]
        if row["op"] == "gemm_nvfp4"
    ]
    bench.store(tmp_path / "bench" / "some-gpu" / "gemm_nvfp4.csv", measured)
    text, plots = report.write(tmp_path / "bench", tmp_path / "plots")
    assert "some-gpu, measured" in text
    assert "2.00x" in text
    assert "some-gpu-gemm_nvfp4.svg" in {p.name for p in plots}


def test_the_report_says_what_its_figures_are_and_which_runs_its_rows_are_of(rows, tmp_path):
    gemm = [row for row in rows["rows"] if row["op"] == "gemm_nvfp4"]
    old, new = {"commit": "older", "date": "2026-01-02"}, {"commit": "newer", "date": "2026-03-04"}
    measured = [row | (old if i < 3 else new) | {"device": "some-gpu", "measured": True} for i, row in enumerate(gemm)]
    bench.store(tmp_path / "bench" / "some-gpu" / "gemm_nvfp4.csv", measured)
    text, _ = report.write(tmp_path / "bench", tmp_path / "plots")
    assert text.startswith("Rows of `tuner bench`, the newest of each problem")
    assert "speed-up: the time of what it is over, in the same run, over ours; below 1 ours is slower" in text
    assert f"2026-03-04 newer ({len(gemm) - 3}), 2026-01-02 older (3)" in text


def test_report_without_rows_is_one_sentence(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "run bench first" in capsys.readouterr().err
