"""`bench --peers` of a fusion on the CPU: peers installed in a folder of the test, real checks, made-up times."""

import csv
import sys

import pytest

from tuner import bench_fusions, fusion_cells, fusion_rows, peers_fusions, report, side_by_side, worker
from tuner.__main__ import main

from . import cpu_fusion, fake_fusion_cells
from .test_bench_peers import CONFIG, TARGET, Inline

PEER = '''
"""A peer that norms in FP32 and forgets FACTOR."""


def norm(x, weight, eps):
    y = x.float()
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float() * FACTOR).to(x.dtype)
'''


@pytest.fixture(autouse=True)
def _installed(monkeypatch, fake, tmp_path):
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "fake_peer", raising=False)
    monkeypatch.setattr(cpu_fusion, "FAULT_M", set())
    fake_fusion_cells.install(monkeypatch)
    yield
    fusion_cells._cell = None


@pytest.fixture
def install(tmp_path):
    def put(factor=1.0):
        (tmp_path / "site" / "fake_peer.py").write_text(f"FACTOR = {factor}\n{PEER}")

    return put


def bench(tmp_path, said=None, start=Inline, **options):
    given = {
        "ops": ("rmsnorm_quantize",),
        "m": (1, 16, 4096),
        "peers": peers_fusions.check_names([]),
        "layers": ("q_norm",),
        "quiet": True,
    } | options
    say = said.append if said is not None else lambda text: None
    return bench_fusions.run(
        TARGET, {"mini": CONFIG}, tmp_path / "bench", bench_fusions.Options(**given), fake_fusion_cells, start, say
    )


def test_a_row_has_each_contender_and_ratios_of_the_medians(install, tmp_path):
    install()
    outcome = bench(tmp_path)
    assert [r["m"] for r in outcome.rows] == [1, 16, 4096]
    for row in outcome.rows:
        scale = row["m"] ** 0.5
        few = row["m"] <= 64
        assert row["fp4suite_us"] == pytest.approx(10 * scale, abs=1e-3)
        assert row["fake_norm_p20_us"] < row["fake_norm_us"] < row["fake_norm_p80_us"]
        assert row["best_peer"] == ("fake_in_place" if few else "fake_norm")
        assert row["ratio"] == (0.8 if few else 1.25)
        assert row["times_empty"] == 1.25
        assert row["share_of_same_copy"] == 0.9
        assert row["share_of_copy"] == pytest.approx(row["bytes"] / 0.1 / 1e3 / (10 * scale), rel=1e-3)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / (10 * scale) / 1e3, abs=0.06)
        assert row["kernel"] == "cpu_rmsnorm"
        assert 0 < row["fake_norm_error"] <= 1
        assert row["rounds"] >= side_by_side.LEAST_ROUNDS
        assert row["copy_gb_per_s"] == 0.1


def test_rows_are_stored_and_come_back(install, tmp_path):
    install()
    outcome = bench(tmp_path)
    (path,) = outcome.paths
    assert path == tmp_path / "bench" / "some-gpu" / "rmsnorm_quantize-peers.csv"
    loaded = fusion_rows.load(path, "rmsnorm_quantize")
    assert loaded == [{k: "" if v is None and k == "best_peer" else v for k, v in r.items()} for r in outcome.rows]
    with path.open() as f:
        assert tuple(next(csv.reader(f))) == fusion_rows.columns("rmsnorm_quantize")
    text, plots = report.write(tmp_path / "bench", tmp_path / "plots")
    assert plots == []
    assert "some-gpu, rmsnorm_quantize beside its peers, timed " in text


def test_what_a_peer_is_not_made_for_is_said_and_not_tried(install, tmp_path):
    install()
    row = bench(tmp_path, m=(4096,)).rows[0]
    assert row["fake_in_place_us"] is None
    assert "fake_in_place: not for this: takes 64 tokens at most" in row["notes"]


def test_absent_peers_are_named(install, tmp_path):
    install()
    said = []
    outcome = bench(tmp_path, said=said, m=(1,))
    assert outcome.absent == {"vllm_rms_norm": "not installed (pip install vllm)", "torch_compile": "not asked for"}
    assert "peer vllm_rms_norm of rmsnorm_quantize, rms_norm: not installed (pip install vllm)" in said
    assert "vllm_rms_norm: not installed (pip install vllm)" in outcome.rows[0]["notes"]
    text = fusion_rows.render(outcome.rows, outcome.absent)
    assert "no time of vllm_rms_norm: not installed (pip install vllm)" in text
    assert "fake_norm: BF16 out; right within one BF16 step" in text


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_wrong_peer_is_refused(install, tmp_path, factor):
    install(factor if factor == factor else "float('nan')")
    outcome = bench(tmp_path, m=(16,))
    row = outcome.rows[0]
    assert row["fake_norm_us"] is row["fake_in_place_us"] is row["ratio"] is None
    assert "fake_norm: wrong: result differs from the reference by" in row["notes"]
    assert row["best_peer"] == ""
    assert "failed" in fusion_rows.render(outcome.rows, outcome.absent)


def test_a_peer_that_raises_states_its_error(install, tmp_path):
    install("undefined_name")
    assert "fake_norm: NameError: name 'undefined_name' is not defined" in bench(tmp_path, m=(16,)).rows[0]["notes"]


def test_one_wrong_code_of_ours_is_refused(install, tmp_path, monkeypatch):
    install()
    monkeypatch.setattr(cpu_fusion, "FAULT_M", {16})
    rows = {r["m"]: r for r in bench(tmp_path).rows}
    assert rows[16]["fp4suite_us"] is rows[16]["ratio"] is rows[16]["share_of_copy"] is None
    assert "fp4suite: wrong: data: 1 of" in rows[16]["notes"]
    assert rows[16]["fake_norm_us"] == 50.0
    assert rows[1]["ratio"] == 0.8


def test_a_peer_that_ends_the_process_loses_its_shape_then_all(install, tmp_path):
    install()
    died = []

    class Dying(Inline):
        def call(self, function, *args, timeout):
            if function is fake_fusion_cells.record and args == ("fake_norm",):
                died.append(fusion_cells._cell.problem)
                raise worker.WorkerDied("crash", "the process ended with exit code 7")
            return super().call(function, *args, timeout=timeout)

    outcome = bench(tmp_path, start=Dying, layers=())
    assert [p.k for p in died] == [128, 64]
    assert all("fake_norm: crash: the process ended with exit code 7" in r["notes"] for r in outcome.rows)
    assert all(r["fp4suite_us"] is not None for r in outcome.rows)


def test_a_run_that_was_cut_goes_on(install, tmp_path):
    install()
    outcome = bench(tmp_path, seconds=0.0)
    assert (len(outcome.rows), outcome.left) == (1, 2)
    resumed = bench(tmp_path, resume=True)
    assert (len(resumed.rows), resumed.left) == (3, 0)
    assert {r["run"] for r in resumed.rows if r["m"] == 1} == {outcome.rows[0]["run"]}


def test_an_unknown_layer_or_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--layers must be of attn_norm, .*mini\.q_norm.*, got 'q_b'"):
        bench(tmp_path, layers=("q_b",))
    with pytest.raises(ValueError, match=r"--peers must be of deep_gemm, .*vllm_rms_norm.*, got 'vlm'"):
        peers_fusions.check_names(["vlm"])


def test_peers_are_chosen_by_name_or_module():
    assert peers_fusions.check_names(["vllm_route", "deep_gemm"]) == {
        "vllm_route",
        "deep_gemm_logits",
        "deep_gemm_prenorm",
    }
    assert "torch_compile" not in peers_fusions.check_names([])
    assert peers_fusions.check_names(["torch"]) == {"torch_topk", "torch_embedding"}
    assert peers_fusions.check_names(["torch_compile"]) == {"torch_compile"}


def test_every_fusion_has_peers_or_a_reason():
    for op in peers_fusions.OPS:
        libraries = [p for p in peers_fusions.of(op) if not p.on_request]
        assert bool(libraries) != (op in peers_fusions.WITHOUT), op


def test_a_gpu_is_needed(capsys):
    for op in ("rmsnorm_quantize", "fusions"):
        assert main(["bench", "--op", op, "--peers", "--quiet"]) == 1
        assert "measures on a GPU" in capsys.readouterr().err
    assert main(["bench", "--op", "route", "--op", "gemm_nvfp4", "--peers"]) == 1
    assert "--peers takes --op gemm_nvfp4 alone" in capsys.readouterr().err
    assert main(["bench", "--op", "route", "--peers", "--act", "fp8"]) == 1
    assert "--act is about gemm_nvfp4" in capsys.readouterr().err


def _row(op, problem, m, **more):
    row = dict.fromkeys(fusion_rows.columns(op))
    return row | {"op": op, "problem": problem, "m": m, "bytes": 1000, "copy_gb_per_s": 3000.0, "notes": ""} | more


def test_goals_are_judged_by_number_of_tokens():
    op, at = "rmsnorm_quantize", "m={} k=128 x=bf16"
    rows = [
        _row(op, at.format(m), m, share_of_copy=share, ratio=ratio, times_empty=empty, empty_us=1.0, bytes=nbytes)
        for m, share, ratio, empty, nbytes in (
            (1, 0.01, 1.5, 1.2, 3000),
            (64, 0.1, 0.9, 3.0, 3_000_000),  # a microsecond of copying: nothing small
            (256, 0.2, 0.5, 9.0, 3000),
            (4096, 0.8, 0.4, 9.0, 3000),
            (16384, 0.9, None, None, 3000),
        )
    ]
    lines = [line.split("  ") for line in fusion_rows.summary(rows).splitlines()[2:]]
    cells = [[part.strip() for part in line if part.strip()] for line in lines]
    assert cells[0] == ["rmsnorm_quantize: share of the copy, m >= 4096", "2", "0.800", "0.85", "m=4096 k=128", "1"]
    assert cells[1] == ["rmsnorm_quantize: ratio, m <= 64", "2", "0.900", "1.00", "m=64 k=128", "1"]
    assert cells[2] == ["rmsnorm_quantize: times empty, m <= 64, small", "1", "1.200", "1.30", "m=1 k=128", "0"]


def test_scores_and_topk_are_judged_together():
    scores = _row(
        "index_logits", "m=4 entries=8192 format=fp8", 4, fp4suite_us=10.0, deep_gemm_logits_us=12.0,
        best_peer="deep_gemm_logits", ratio=1.2,
    )  # fmt: skip
    topk = _row(
        "index_topk", "m=4 entries=8192 topk=512 page_size=64", 4, fp4suite_us=5.0, torch_topk_us=9.0,
        best_peer="torch_topk", ratio=1.8,
    )  # fmt: skip
    other = topk | {"problem": "m=4 entries=32768 topk=512 page_size=64"}
    lost = topk | {"problem": "m=4 entries=8192 topk=1024 page_size=64", "best_peer": ""}
    both = fusion_rows.together([scores, topk, other, lost])
    assert [r["ratio"] for r in both] == [1.4, None]
    text = fusion_rows.summary([scores, topk, lost])
    assert "index scores and top-k: ratio" in text
    assert "1.400" in text


def test_a_peer_that_does_a_part_counts_where_no_other_has_a_time():
    us = {"deep_gemm_prenorm": 80.0, "flashinfer_mhc_pre": 240.0}
    assert fusion_rows.best_peer("hyper_connection_pre", us) == "flashinfer_mhc_pre"
    assert fusion_rows.best_peer("hyper_connection_pre", us | {"flashinfer_mhc_pre": None}) == "deep_gemm_prenorm"
    assert fusion_rows.best_peer("hyper_connection_pre", {}) is None
