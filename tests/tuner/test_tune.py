"""Tuning from the command line to the table, with a fake kernel: predicted, measured, resumed, merged, refused."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import msgspec
import pytest

from fp4suite import dispatch, registry, shapes, table
from fp4suite.built import Resources
from fp4suite.problem import GemmProblem
from tuner import builds, evaluate, space, targets, tune
from tuner.__main__ import main
from tuner.targets import Target

from . import fake_bench, fake_kernel

TINY = {
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 256,
    "q_lora_rank": 512,
    "o_lora_rank": 256,
    "o_groups": 2,
    "index_n_heads": 1,
    "index_head_dim": 128,
    "qk_rope_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 0,
    "vocab_size": 256,
    "index_topk": 16,
    "compress_ratios": [0, 0],
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path.parent


@pytest.fixture
def compiled(fake, monkeypatch):
    """Compiling the fake: some raise, some spill, some take too much shared memory. Counts what was compiled."""
    seen = []

    def compile_one(kernel, op, dims, knobs, arch):
        seen.append(knobs)
        if knobs["fault"] == "raise":
            raise ValueError("no")
        shared = 40_000 * knobs["num_stages"] * knobs["tile_n"] // 128
        return dataclasses.asdict(
            Resources(registers=64, spill_bytes=8 * (knobs["fault"] == "spill"), shared_bytes=shared, tmem_columns=0)
        )

    monkeypatch.setattr(builds, "compile_one", compile_one)
    monkeypatch.setattr(builds, "compile_all", lambda wanted, jobs, **more: compile_all(wanted, 0, **more))
    return seen


compile_all = builds.compile_all


def run(capsys, *arguments):
    """Exit code, and the document of --json."""
    code = main(["tune", *map(str, arguments), "--json", "--quiet"])
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]) if out else None


def test_without_a_gpu_every_entry_is_predicted_and_fits(compiled, config, tmp_path, capsys):
    out = tmp_path / "tables"
    code, document = run(
        capsys,
        "--layers-of",
        config,
        "--arch",
        "sm_90a",
        "--op",
        "gemm_nvfp4",
        "--m",
        "1,64",
        "--trials",
        60,
        "--out",
        out,
    )
    assert code == 0
    assert document["tables"] == [str(out / "sm_90a.json")]
    assert not document["measured"]
    read = table.read(out / "sm_90a.json")
    assert len(read.entries) == document["problems"] > 4
    for entry in read.entries:
        assert not entry.measured
        assert entry.median_us is None
        assert entry.predicted_us <= entry.default_us
        assert entry.source_hash == registry.source_hash("fake_gemm")
        assert entry.config["fault"] not in ("raise", "spill")
        assert 40_000 * entry.config["num_stages"] * entry.config["tile_n"] // 128 <= 232_448
    assert any(row["rejected"].get("compile") and row["rejected"].get("fit") for row in document["rows"])
    assert any(row["changed"] for row in document["rows"])


def test_batch_invariant_entries_share_one_arithmetic(compiled, config, tmp_path, capsys, monkeypatch):
    """Beside the others: in the order that is in force, or as a config with the given knobs sums, for every m alike."""
    monkeypatch.setattr(fake_kernel, "INVARIANT", "64 at a time", raising=False)
    monkeypatch.setattr(fake_kernel, "arithmetic", lambda p, c: f"{c.tile_k} at a time", raising=False)
    out = tmp_path / "sm_90a.json"

    def tuned(*more):
        common = ("--layers-of", config, "--op", "gemm_nvfp4", "--arch", "sm_90a", "--trials", 12, "--out", out)
        code, _ = run(capsys, *common, *more)
        assert code == 0
        entries = table.read(out).entries
        return [e for e in entries if not e.invariant], [e for e in entries if e.invariant]

    usual, none = tuned("--m", "1,64")
    assert usual
    assert not none
    still, invariant = tuned("--m", "1,64", "--batch-invariant")
    assert still == usual
    assert [e.problem for e in invariant] == [e.problem for e in usual]
    assert {e.config["tile_k"] for e in invariant} == {64}
    still, invariant = tuned("--m", "64", "--batch-invariant", "tile_k=128")  # the entries for 1 sum otherwise, and go
    assert still == usual
    assert [e.problem for e in invariant] == [e.problem for e in usual if e.problem["m"] == 64]
    assert {e.config["tile_k"] for e in invariant} == {128}
    still, invariant = tuned("--m", "1", "--batch-invariant")  # in force now
    assert still == usual
    assert {e.config["tile_k"] for e in invariant} == {128}
    assert len(invariant) == len(usual)
    with dispatch.batch_invariant():
        dispatch.use_table(out)
        n, k = usual[0].problem["n"], usual[0].problem["k"]
        for m in (1, 40, 9000):
            problem = dataclasses.replace(GemmProblem(**usual[0].problem), m=m, n=n, k=k)
            assert dispatch.choose_for("gemm_nvfp4", problem, dispatch.Target("sm_90a", "sm_90a")).config.tile_k == 128
    dispatch.use_table(None)


@pytest.mark.parametrize("knob", ["split", "2", "split=two", "=2"])
def test_knobs_that_are_none(knob, fake, config, capsys):
    assert main(["tune", "--layers-of", str(config), "--arch", "sm_90a", "--batch-invariant", knob]) == 1
    assert f'takes "best", or knobs and numbers such as split=2, got {knob!r}' in capsys.readouterr().err


def test_the_table_changes_what_dispatch_chooses(compiled, config, tmp_path, capsys):
    run(
        capsys,
        "--layers-of",
        config,
        "--op",
        "gemm_nvfp4",
        "--arch",
        "sm_90a",
        "--m",
        "64",
        "--out",
        tmp_path / "t.json",
    )
    target = dispatch.Target("sm_90a", "sm_90a")
    entry = next(
        e for e in table.read(tmp_path / "t.json").entries if e.config != dataclasses.asdict(fake_kernel.Config())
    )
    problem = GemmProblem(**entry.problem)
    before = dispatch.choose_for("gemm_nvfp4", problem, target)
    try:
        dispatch.use_table(tmp_path / "t.json")
        after = dispatch.choose_for("gemm_nvfp4", problem, target)
    finally:
        dispatch.use_table(None)
    assert before.config == fake_kernel.Config()
    assert dataclasses.asdict(after.config) == entry.config
    assert "predicted" in after.reason


def test_a_second_run_compiles_nothing_and_leaves_the_table_alone(compiled, config, tmp_path, capsys):
    arguments = (
        "--layers-of",
        config,
        "--op",
        "gemm_nvfp4",
        "--arch",
        "sm_90a",
        "--m",
        "1",
        "--out",
        tmp_path / "t.json",
    )
    run(capsys, *arguments)
    first, count = (tmp_path / "t.json").read_bytes(), len(compiled)
    run(capsys, *arguments)
    assert len(compiled) == count > 0
    assert (tmp_path / "t.json").read_bytes() == first


def test_entries_of_other_problems_stay(compiled, config, tmp_path, capsys):
    for m in ("1", "64"):
        run(
            capsys,
            "--layers-of",
            config,
            "--op",
            "gemm_nvfp4",
            "--arch",
            "sm_90a",
            "--m",
            m,
            "--out",
            tmp_path / "t.json",
        )
    assert {e.problem["m"] for e in table.read(tmp_path / "t.json").entries} == {1, 64}


def test_stale_entries_alone_are_tuned_again(compiled, config, tmp_path, capsys, monkeypatch):
    """Those of kernels that have changed since or are no more, of the ops and numbers of tokens that are asked for."""
    path = tmp_path / "t.json"
    command = ("--arch", "sm_90a", "--op", "gemm_nvfp4", "--trials", 3, "--out", path)
    run(capsys, "--layers-of", config, "--m", "1,64", *command)
    first = table.read(path).entries

    assert run(capsys, "--stale", *command)[0] == 0  # nothing is
    assert table.read(path).entries == first

    shapes_at_64 = [e for e in first if e.problem["m"] == 64]
    spoiled = {
        shapes_at_64[0].key(): {"source_hash": "of before"},
        shapes_at_64[1].key(): {"kernel": "gone"},
        next(e for e in first if e.problem["m"] == 1).key(): {"source_hash": "of before"},
    }
    for e in first:
        if e.key() in spoiled:
            table.merge(path, "sm_90a", "sm_90a", [msgspec.structs.replace(e, commit="old", **spoiled[e.key()])])
    code, document = run(capsys, "--stale", "--m", "64", *command)
    assert (code, document["problems"]) == (0, 2)
    assert [e.commit == "old" for e in table.read(path).entries] == [
        e.key() in spoiled and e.problem["m"] == 1 for e in first
    ]
    assert run(capsys, "--stale", *command)[1]["problems"] == 1
    assert [(e.key(), e.config, e.source_hash) for e in table.read(path).entries] == [
        (e.key(), e.config, e.source_hash) for e in first
    ]


def test_stale_says_which_tables_and_which_entries_it_looked_at(compiled, config, tmp_path, capsys):
    """Of a run that has nothing to do too: what a filter left out, another device's table, batch-invariant mode."""
    out = tmp_path / "tables"
    path, other = out / "sm_90a.json", out / "some-gpu.json"
    command = ("--arch", "sm_90a", "--op", "gemm_nvfp4", "--trials", 3, "--out", out)
    run(capsys, "--layers-of", config, "--m", "1,64", *command)
    first = table.read(path).entries
    count = sum(e.problem["m"] == 1 for e in first)
    old = [msgspec.structs.replace(e, source_hash="of before") for e in first if e.problem["m"] == 64]
    table.merge(other, "some-gpu", "sm_90a", old)
    table.merge(path, "sm_90a", "sm_90a", [msgspec.structs.replace(old[0], invariant=True)])

    assert main([str(a) for a in ("tune", "--stale", "--quiet", *command)]) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith(
        f"{path}: 0 stale of {len(first) + 1} entries with --op gemm_nvfp4, and 1 for batch-invariant mode, "
    )
    assert "tune --batch-invariant --layers-of MODEL times all m of a weight again" in one
    assert two == (
        f"{other}: {len(old)} stale of {len(old)} entries with --op gemm_nvfp4; left alone: it is of another device"
    )
    assert main([str(a) for a in ("tune", "--stale", "--quiet", "--m", "1", *command)]) == 0
    assert capsys.readouterr().out == f"{path}: 0 stale of {count} entries with --op gemm_nvfp4 --m 1\n"
    _, document = run(capsys, "--stale", "--m", "64", *command)
    assert [(s["table"], s["stale"], s["batch_invariant"]) for s in document["stale"]] == [
        (str(path), 0, 1),
        (str(other), len(old), 0),
    ]


def test_the_table_is_read_once_whatever_the_number_of_problems(compiled, config, tmp_path, capsys, monkeypatch):
    path = tmp_path / "t.json"
    command = ("--layers-of", config, "--arch", "sm_90a", "--op", "gemm_nvfp4", "--trials", 3, "--out", path)
    run(capsys, *command, "--m", "1")
    reads = []
    monkeypatch.setattr(tune.table, "read", lambda p, read=table.read: reads.append(p) or read(p))
    _, document = run(capsys, *command, "--m", "1")
    assert document["problems"] > 4
    assert len(reads) == 2  # before the search, and before what changed is stored


def test_an_interrupted_run_stores_what_it_has_compiled(compiled, config, tmp_path, capsys, monkeypatch):
    path, whole = tmp_path / "t.json", builds.compile_one
    command = ("tune", "--layers-of", config, "--arch", "sm_90a", "--op", "gemm_nvfp4", "--m", "1,64", "--out", path)
    monkeypatch.setattr(fake_kernel, "build_key", lambda problem, config: problem)

    def compile_one(*arguments):
        if len(compiled) == 5:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(builds, "compile_one", compile_one)
    assert main([str(a) for a in (*command, "--quiet")]) == 130
    kept = table.read(path).entries
    assert [e.trials for e in kept] == [1] * 5  # defaults come first
    monkeypatch.setattr(builds, "compile_one", whole)
    assert main([str(a) for a in (*command, "--quiet")]) == 0
    assert {e.key() for e in table.read(path).entries} > {e.key() for e in kept}


def test_a_prediction_does_not_give_way_before_it_was_compiled_again(compiled, config, tmp_path, capsys, monkeypatch):
    """An interrupted run has tried the defaults alone: entries that are better stay."""
    path, whole = tmp_path / "t.json", builds.compile_one
    command = ("--layers-of", config, "--arch", "sm_90a", "--op", "gemm_nvfp4", "--m", "64", "--out", path)
    _, document = run(capsys, *command)
    assert all(row["changed"] for row in document["rows"])
    first = path.read_bytes()

    def compile_one(kernel, op, dims, knobs, arch):
        if knobs != dataclasses.asdict(fake_kernel.Config()):
            raise KeyboardInterrupt
        return whole(kernel, op, dims, knobs, arch)

    monkeypatch.setattr(builds, "compile_one", compile_one)
    monkeypatch.setenv("FP4SUITE_CACHE_DIR", str(tmp_path / "another"))
    assert main([str(a) for a in ("tune", *command, "--quiet")]) == 130
    assert path.read_bytes() == first


def test_a_run_that_predicts_keeps_to_its_seconds(compiled, config, tmp_path, capsys, monkeypatch):
    """A kernel that takes the compiler for ever costs no more than what is left; what was compiled before it counts."""
    monkeypatch.setattr(fake_kernel, "build_key", lambda problem, config: problem)

    def compile_some(wanted, jobs, patience):
        yield from compile_all(wanted[:3], 0, patience=patience)
        while patience() > 0:
            time.sleep(0.05)

    monkeypatch.setattr(builds, "compile_all", compile_some)
    command = ("--layers-of", config, "--arch", "sm_90a", "--op", "gemm_nvfp4", "--m", "1,64", "--out", tmp_path)
    code, document = run(capsys, *command, "--seconds", 1.5)
    assert 1.4 < document["seconds"] < 10
    assert (code, document["problems"]) == (0, 3)
    assert document["left"] > 0
    assert len(table.read(tmp_path / "sm_90a.json").entries) == 3


def test_problems_beyond_the_time_are_left(compiled, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune.space, "of", lambda *a, of=space.of: time.sleep(0.5) or of(*a))
    command = ("--layers-of", config, "--op", "gemm_nvfp4", "--m", "1,2,4,8,16", "--arch", "sm_90a", "--out", tmp_path)
    code, document = run(capsys, *command, "--seconds", 1)
    assert (code, document["seconds"] < 5) == (0, True)
    assert document["problems"] >= 1
    assert document["left"] > 20


def test_a_promise_below_the_margin_keeps_the_default(compiled, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "PREDICTED_MARGIN", 0.99)
    _, document = run(
        capsys,
        "--layers-of",
        config,
        "--op",
        "gemm_nvfp4",
        "--arch",
        "sm_90a",
        "--m",
        "1",
        "--out",
        tmp_path / "t.json",
    )
    assert not any(row["changed"] for row in document["rows"])
    assert all(row["gain"] == 0 for row in document["rows"])


def test_a_default_that_does_not_compile_fails_the_run_but_not_the_rest(
    compiled, config, tmp_path, capsys, monkeypatch
):
    whole = builds.compile_one

    def compile_one(kernel, op, dims, knobs, arch):
        if dims["segments"] == 2 and knobs == dataclasses.asdict(fake_kernel.Config()):
            raise RuntimeError("ptxas died")
        return whole(kernel, op, dims, knobs, arch)

    monkeypatch.setattr(builds, "compile_one", compile_one)
    monkeypatch.setattr(fake_kernel, "build_key", lambda problem, config: problem.segments)
    code, document = run(
        capsys,
        "--layers-of",
        config,
        "--op",
        "gemm_nvfp4",
        "--arch",
        "sm_90a",
        "--m",
        "1",
        "--out",
        tmp_path / "t.json",
    )
    assert code == 1
    assert len(document["failed"]) == 3  # q_a and kv; gate and up with an FP32 result, and the same in BF16
    assert all("RuntimeError: ptxas died" in line for line in document["failed"])
    assert document["problems"] == len(table.read(tmp_path / "t.json").entries) > 2


# --- measured, with the fake bench in the child ---


@pytest.fixture
def gpu(fake, monkeypatch):
    """A device that is the fake bench."""
    monkeypatch.setattr(evaluate, "measure", fake_bench)
    monkeypatch.setattr(targets, "targets", lambda arch, device: [Target("sm_90a", "some-gpu", "cuda:0")])
    monkeypatch.setitem(fake_kernel.SPACE, "fault", ("none", "wrong"))


def measured(capsys, config, tmp_path, *more):
    arguments = ("--layers-of", config, "--op", "gemm_nvfp4", "--storage", tmp_path / "journal.log", "--out", tmp_path)
    return run(capsys, *arguments, "--jobs", 1, *more)


def test_measured_winners_beat_the_default_and_state_their_regret(gpu, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q_a", n=512, k=512, count=1)])
    code, document = measured(capsys, config, tmp_path, "--m", "1,64", "--trials", 60)
    assert code == 0
    assert document["measured"]
    read = table.read(tmp_path / "some-gpu.json")
    assert (read.device, read.arch, len(read.entries)) == ("some-gpu", "sm_90a", 2)
    for entry in read.entries:
        assert entry.measured
        assert fake_kernel.true_us(fake_kernel.Config(**entry.config)) <= 10.0 * 1.132
        assert entry.p20_us <= entry.median_us <= entry.p80_us
        assert entry.median_us < entry.default_us / 1.3
        assert entry.baseline == "cublas_bf16"
        assert 0.9 < entry.default_us / entry.baseline_us / (16.4 / 20) < 1.1
        assert 1.0 <= entry.regret < 1.2
        assert entry.trials == 60
        assert 0 < entry.rejected < 60

    again, document = measured(capsys, config, tmp_path, "--m", "1,64", "--trials", 60)
    assert again == 0
    assert table.read(tmp_path / "some-gpu.json") == read  # nothing was measured again


@pytest.mark.parametrize("fastest", [64, 128])
def test_the_best_arithmetic_loses_least_over_all_m(fastest, gpu, config, tmp_path, capsys, monkeypatch):
    """Of those that ordinary winners and defaults have: 64 at a time of the default, 128 of a winner."""
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q_a", n=512, k=512, count=1)])
    monkeypatch.setattr(fake_kernel, "INVARIANT", "64 at a time", raising=False)
    monkeypatch.setattr(fake_kernel, "arithmetic", lambda p, c: f"{c.tile_k} at a time", raising=False)
    slow = {"tile_k": 64, "tile_m": 16 if fastest == 128 else 32, "tile_n": 256}
    quick = {"tile_k": 128, "tile_m": 32 if fastest == 128 else 16, "tile_n": 256 if fastest == 128 else 32}
    configs = {f"{c['tile_k']} at a time": fake_kernel.Config(**c) for c in (slow, quick)}
    monkeypatch.setattr(fake_kernel, "in_arithmetic", lambda p, wanted: configs[wanted], raising=False)
    path = tmp_path / "some-gpu.json"
    problem = GemmProblem(m=64, n=512, k=512)
    winner = table.Entry(
        op="gemm_nvfp4", problem=problem.dims(), kernel="fake_gemm", config={"tile_k": 128}, measured=True,
        source_hash="now", median_us=1.0,
    )  # fmt: skip
    table.merge(path, "some-gpu", "sm_90a", [winner])
    code, _ = measured(capsys, config, tmp_path, "--m", "1,64", "--trials", 4, "--batch-invariant", "best")
    assert code == 0
    entries = [e for e in table.read(path).entries if e.invariant]
    assert [e.problem["m"] for e in entries] == [1, 64]
    assert {e.config["tile_k"] for e in entries} == {fastest}


def test_where_nothing_is_faster_the_default_stays(gpu, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q_a", n=512, k=512, count=1)])
    monkeypatch.setattr(
        fake_kernel,
        "SPACE",
        {k: (getattr(fake_kernel.Config(), k),) for k in fake_kernel.SPACE} | {"fault": ("none", "wrong")},
    )
    code, _ = measured(capsys, config, tmp_path, "--m", "1")
    assert code == 0
    (entry,) = table.read(tmp_path / "some-gpu.json").entries
    assert registry.make_config(fake_kernel, entry.config) == fake_kernel.Config()
    assert (entry.trials, entry.rejected) == (2, 1)


def test_a_compiler_that_crashes_costs_its_candidate_alone(gpu, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q_a", n=512, k=512, count=1)])
    monkeypatch.setitem(fake_kernel.SPACE, "fault", ("none", "crash", "raise"))
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 40)
    assert (code, document["failed"]) == (0, [])
    (entry,) = table.read(tmp_path / "some-gpu.json").entries
    assert entry.trials == 40
    assert entry.config["fault"] == "none"
    assert entry.median_us < entry.default_us / 1.3
    rejected = document["rows"][0]["rejected"]
    assert rejected["crash"] > 0
    assert rejected["compile"] > 0
    assert sum(rejected.values()) == entry.rejected


def test_time_is_shared_among_problems_however_long_compiling_takes(gpu, config, tmp_path, capsys, monkeypatch):
    """A kernel that never compiles, of the first problem alone: the second gets its share, and the run its deadline."""
    linears = [shapes.Linear(name=name, n=n, k=512, count=1) for name, n in (("q_a", 512), ("q_b", 1024))]
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: linears)
    monkeypatch.setattr(tune, "STARTUP_S", 0.0)
    stuck = Future()

    def begin(ahead, turn, task, candidate):
        return stuck if task.problem.n == 512 else builds.prepared()

    monkeypatch.setattr(tune, "_begin", begin)
    began = time.monotonic()
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 6, "--seconds", 10)
    assert time.monotonic() - began < 30
    assert (code, document["left"]) == (0, 1)
    (entry,) = table.read(tmp_path / "some-gpu.json").entries
    assert (entry.problem["n"], entry.trials) == (1024, 6)

    stuck.set_result(None)
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 6)
    assert (code, document["left"]) == (0, 0)
    assert {e.problem["n"]: e.trials for e in table.read(tmp_path / "some-gpu.json").entries} == {512: 6, 1024: 6}


def test_a_problem_that_had_to_wait_gets_the_time_that_others_left(gpu, config, tmp_path, capsys, monkeypatch):
    linears = [shapes.Linear(name=name, n=n, k=512, count=1) for name, n in (("q_a", 512), ("q_b", 1024))]
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: linears)
    monkeypatch.setattr(tune, "STARTUP_S", 0.0)
    late = Future()

    def begin(ahead, turn, task, candidate):
        if turn is builds.NOW and task.problem.n == 1024 and not late.done():
            late.set_result(None)
        return late if task.problem.n == 512 else builds.prepared()

    monkeypatch.setattr(tune, "_begin", begin)
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 6, "--seconds", 12)
    assert (code, document["left"]) == (0, 0)
    found = {e.problem["n"]: e.trials for e in table.read(tmp_path / "some-gpu.json").entries}
    assert found[1024] == 6
    assert found[512] >= 1


def test_no_entry_gives_way_before_it_was_tried_itself(gpu, config, tmp_path, capsys, monkeypatch):
    """What the table says does not compile in time: it stays, however much faster than the default others are."""
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q_a", n=512, k=512, count=1)])
    monkeypatch.setattr(tune, "STARTUP_S", 0.0)
    before = table.Entry(
        op="gemm_nvfp4", problem=GemmProblem(m=1, n=512, k=512).dims(), kernel="fake_gemm", config={"tile_k": 128},
        measured=True, source_hash="of before", median_us=1.0, default_us=1.0,
    )  # fmt: skip
    table.merge(tmp_path / "some-gpu.json", "some-gpu", "sm_90a", [before])
    stuck = Future()
    alike = space.candidate("fake_gemm", fake_kernel.Config(tile_k=128))
    monkeypatch.setattr(tune, "_begin", lambda ahead, turn, task, c: stuck if c == alike else builds.prepared())
    arguments = ("--stale", "--op", "gemm_nvfp4", "--storage", tmp_path / "j.log", "--out", tmp_path, "--jobs", 1)
    code = main(["tune", *map(str, arguments), "--trials", "6", "--seconds", "6", "--quiet"])
    assert code == 1  # nothing was tuned
    assert table.read(tmp_path / "some-gpu.json").entries == [before]

    stuck.set_result(None)
    code, document = run(capsys, *arguments, "--trials", 6)
    assert (code, document["left"]) == (0, 0)
    (entry,) = table.read(tmp_path / "some-gpu.json").entries
    assert (entry.trials, entry.source_hash) == (6, registry.source_hash("fake_gemm"))


def test_a_wrong_default_is_a_failure_and_no_entry(gpu, config, tmp_path, capsys, monkeypatch):
    class Broken(evaluate.Measured):
        def _ready(self):
            raise evaluate.DefaultFailed("the default is wrong")

    monkeypatch.setattr(tune, "Measured", Broken)
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 4)
    assert code == 1
    assert set(document["failed"]) == {"some-gpu: the default is wrong"}
    assert not (tmp_path / "some-gpu.json").exists()


def test_several_gpus_get_a_worker_each_and_a_last_run_to_finish(gpu, config, tmp_path, capsys, monkeypatch):
    started = []

    class Child:
        def __init__(self, command):
            started.append(command[1:])

        def wait(self):
            return 0

    monkeypatch.setattr(tune, "Popen", Child)
    monkeypatch.setattr(shapes, "linears", lambda c, tp=1: [shapes.Linear(name="q", n=512, k=512, count=1)])
    code, document = measured(capsys, config, tmp_path, "--m", "1", "--trials", 4, "--devices", "0,1")
    assert code == 0
    assert document["problems"] == 1
    same = [a for a in started[0] if not a.startswith("cuda:")]
    assert [a for a in started[1] if not a.startswith("cuda:")] == same
    assert [c[-2:] for c in started] == [["--device", "cuda:0"], ["--device", "cuda:1"]]
    assert same[:3] == ["-m", "tuner", "tune"]
    assert same[-3:-1] == ["--jobs", "1"]
    assert not {"--devices", "0,1", "--json"} & set(same)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers-of", "nowhere"), "neither a shipped config"),
        (("--op", "nothing"), "--op must be one of"),
        (("--out", "x.json"), "there are 2 targets"),
        (("--device", "cuda:0"), "sees no GPU"),
        (("--layers-of", "demo", "--tp", "7"), "tp must divide"),
        (("--stale", "--layers-of", "demo"), "takes no --layers-of"),
        (("--stale", "--tp", "2"), "takes no --tp"),
        (("--stale", "--arch", "sm_90a", "--out", "nowhere.json"), "there is no table nowhere.json"),
    ],
)
def test_wrong_arguments_get_one_sentence_and_exit_code_1(arguments, message, capsys):
    assert main(["tune", "--json", "--quiet", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in json.loads(captured.out.splitlines()[-1])["error"]
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--m=1,x", "wanted integers separated by commas"),
        ("--m=0", "must be positive"),
        ("--trials=0", "must be a positive integer, got '0'"),
        ("--trials=-3", "must be a positive integer, got '-3'"),
        ("--jobs=0", "must be a positive integer"),
        ("--tp=0", "must be a positive integer"),
        ("--seconds=-1", "must be a positive number of seconds, got '-1'"),
        ("--seconds=0", "must be a positive number of seconds"),
        ("--seconds=nan", "must be a positive number of seconds"),
        ("--seconds=soon", "must be a positive number of seconds, got 'soon'"),
        ("--seed=-1", "must be an integer from 0 to 4294967295, got '-1'"),
        ("--budget=vast", "invalid choice"),
    ],
)
def test_malformed_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        main(["tune", arguments])
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_a_benchmark_takes_positive_seconds(capsys):
    with pytest.raises(SystemExit) as e:
        main(["bench", "--op", "gemm_nvfp4", "--peers", "--seconds=-1"])
    assert e.value.code == 2
    assert "must be a positive number of seconds" in capsys.readouterr().err


def test_a_config_that_is_not_json_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main(["tune", "--layers-of", str(tmp_path)]) == 1
    assert "not a config.json" in capsys.readouterr().err


# --- tables among processes ---


def add_entries(path, worker, count):
    for i in range(count):
        entry = table.Entry(
            op="gemm_nvfp4",
            problem={"m": 1 + i, "n": 8 * (worker + 1), "k": 64},
            kernel="k",
            source_hash="s",
            config={},
            measured=False,
            predicted_us=1.0,
        )
        table.merge(path, "d", "sm_90a", [entry])


def test_no_entry_is_lost_when_many_processes_merge(tmp_path):
    path = tmp_path / "t.json"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=add_entries, args=(path, w, 25)) for w in range(6)]
    for c in children:
        c.start()
    while any(c.is_alive() for c in children):
        if path.exists():
            table.read(path)  # whole at every moment
    for c in children:
        c.join()
        assert c.exitcode == 0
    assert len(table.read(path).entries) == 6 * 25


INTERRUPTED = """
import sys
from fp4suite import table
from tests.tuner.test_tune import add_entries
print("go", flush=True)
add_entries(sys.argv[1], 1, 100000)
"""


def test_a_kill_leaves_a_whole_table(tmp_path):
    path = tmp_path / "t.json"
    add_entries(path, 0, 3)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert {e.problem["m"] for e in table.read(path).entries if e.problem["n"] == 8} == {1, 2, 3}
    add_entries(path, 2, 1)  # a lock of the killed one does not stay
    assert any(e.problem["n"] == 24 for e in table.read(path).entries)
    assert msgspec.json.decode(path.read_bytes())
    assert os.path.exists(path)


def gone(group, seconds=15.0):
    """Whether a process group comes to have no member, as soon as init has buried the last."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def entries_in(folder):
    return sum(len(table.read(path).entries) for path in folder.glob("sm_*.json"))


def test_ctrl_c_ends_everything_and_keeps_what_was_compiled(tmp_path, interruptible):
    """The real command with real kernels, interrupted as a terminal does it: the whole process group."""
    cache = tmp_path / "cache"
    environment = {**os.environ, "FP4SUITE_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")  # to be interrupted while it compiles
    command = [
        sys.executable,
        "-m",
        "tuner",
        "tune",
        "--layers-of",
        "demo",
        "--op",
        "quantize_nvfp4",
        "--m",
        "1,4096",
        "--trials",
        "3",
        "--quiet",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(cache.rglob("*.json"))) < 3:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in err
    kept = {p: p.stat().st_mtime_ns for p in cache.rglob("*.json")}
    assert len(kept) >= 3
    stored = entries_in(tmp_path)
    assert stored > 0
    assert gone(child.pid)

    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "measured: false" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # and not one of them was compiled again
    assert entries_in(tmp_path) > stored
    assert len(list(cache.rglob("*.json"))) > len(kept)


def test_without_the_extra_one_sentence_says_how_to_get_it():
    lame = "import sys; sys.modules['tabulate'] = None; from tuner.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", lame, "tune", "--layers-of", "demo"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tabulate is not installed; it comes with: pip install 'fp4suite[tune]'\n"


def test_a_prediction_does_not_overrule_a_default_that_was_measured():
    """Of 174 problems tuned on an H100, the winner had the default's tile in 112, that of the model's first in 41."""
    problem = GemmProblem(m=300, n=2624, k=7168, out="fp32", segments=5, order="fragments_sm90")
    whole, budget = space.of(problem, "sm_90a"), tune.BUDGETS["small"]
    assert not registry.find(whole.default.kernel).predicted
    assert tune._seeds(whole, budget, [], measured=False) == (whole.default,)
    assert len(tune._seeds(whole, budget, [], measured=True)) > 1
    rows = GemmProblem(m=300, n=2624, k=7168)
    assert len(tune._seeds(space.of(rows, "sm_90a"), budget, [], measured=False)) > 1


def test_winners_from_before_a_knob_and_of_no_kernel_any_more(tmp_path):
    """The first are tried again, with the knob's default; the others are passed over."""
    problem = GemmProblem(m=512, n=7168, k=3072, order="fragments_sm90")
    path, winner = (
        tmp_path / "t.json",
        space.default_of("cute_gemm_nvfp4_sm90_wgmma", dataclasses.replace(problem, m=1)),
    )
    old = {name: value for name, value in winner.knobs if name != "overlap"}
    for m, kernel in ((512, winner.kernel), (2048, "cute_gone")):
        entry = table.Entry(
            op=problem.op,
            problem={**problem.dims(), "m": m},
            kernel=kernel,
            source_hash="0",
            config=old,
            measured=True,
            median_us=1.0,
        )
        table.merge(path, "some-gpu", "sm_90a", [entry])
    assert tune._winners(problem, table.read(path).entries) == [winner]


def test_winners_of_the_nearest_shapes_come_after_those_of_other_m(tmp_path):
    kernel, path = "cute_gemm_nvfp4_sm90_wgmma", tmp_path / "t.json"
    problem = GemmProblem(m=64, n=73728, k=1536, segments=2, order="fragments_sm90")

    def store(tile_k, **changes):
        config = space.candidate(kernel, registry.load(kernel).Config(tile_m=64, groups_n=2, tile_k=tile_k)).knobs
        entry = table.Entry(
            op=problem.op,
            problem=dataclasses.replace(problem, **changes).dims(),
            kernel=kernel,
            source_hash="0",
            config=dict(config),
            measured=True,
            median_us=1.0,
        )
        table.merge(path, "some-gpu", "sm_90a", [entry])

    store(256, n=512, k=4096)  # far
    store(128, n=65536, segments=1)
    store(64, m=128)
    store(128, m=128, n=65536, segments=1)  # the same once more
    store(64, out="fp32")  # of another kind
    found = [dict(c.knobs)["tile_k"] for c in tune._winners(problem, table.read(path).entries)]
    assert found == [64, 128]
