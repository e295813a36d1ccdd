"""The demo's chain, shortened, and its model's shapes: all have kernels, and all are among those that get tuned."""

import functools
import json
from pathlib import Path

import pytest
import torch

from fp4suite import dispatch, shapes
from fp4suite.problem import GemmProblem, Problem
from model.__main__ import main
from model.checkpoint import load, make_checkpoint
from model.config import ModelConfig
from model.demo import _logits
from model.linear import ActFormat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "modelopt"
    make_checkpoint(directory, ModelConfig.named("demo"), "modelopt", seed=0, progress=False)
    return directory


@functools.cache
def asked_of(checkpoint: Path, act: ActFormat, tokens: int) -> set[Problem]:
    model = load(None, checkpoint, act_format=act, progress=False)
    with dispatch.recording() as choices:
        _logits(model, list(range(tokens + 1)), torch.device("cpu"), "bf16")
    return {choice.problem for choice in choices if choice.problem is not None}


@pytest.mark.parametrize(("arch", "act"), [("sm_90a", "float"), ("sm_90a", "nvfp4"), ("sm_100a", "nvfp4")])
@pytest.mark.parametrize("tokens", [150, 1])
def test_every_problem_of_the_model_has_a_kernel_and_is_tuned(
    arch: str, act: ActFormat, tokens: int, checkpoint: Path
) -> None:
    """What the model asks on a CPU, at lengths where every kind of layer works, put to the registry for GPUs."""
    asked = asked_of(checkpoint, act, tokens)
    assert len({(p.n, p.k, p.out) for p in asked if isinstance(p, GemmProblem)}) >= 6
    for problem in asked:
        choice = dispatch.choose_for(problem.op, problem, dispatch.Target(arch, arch))
        assert not choice.is_reference
    if act == ("nvfp4" if arch == "sm_100a" else "float"):
        config = ModelConfig.named("demo").to_json()
        tuned: set[Problem] = {p.problem for p in shapes.problems(config, "gemm_nvfp4", arch=arch, m=(tokens,))}
        assert {p for p in asked if isinstance(p, GemmProblem)} <= tuned


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU: the tuning that it starts sees none either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--max-new-tokens", "3", "--prompt", "Once", "--tune-seconds", "5", "--dir", str(tmp_path)]
    code = main(["demo", *options, "--device", "cpu", "--quiet", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert len(found["tokens"]) == 3
    assert found["prompt_tokens"] == 5
    assert found["measured"] is False
    assert {Path(path).name for path in found["tables"]} == {"sm_90a.json", "sm_100a.json"}
    used = {row["op"]: row for row in found["used"]}
    assert {"gemm_nvfp4", "moe_nvfp4", "sparse_attention", "compress_kv", "hyper_connection_pre"} <= used.keys()
    assert all((row["kernel"], row["why"]) == ("reference", "cpu: the reference") for row in used.values())
    planned = found["planned"]
    assert {row["arch"] for row in planned} == {"sm_90a", "sm_100a"}
    assert all(row["kernel"] != "reference" for row in planned)
    exact, rounded, quantised = (row["relative_error"] for row in found["errors"])
    assert 0.05 < exact < 0.6
    assert abs(rounded - exact) < 0.1
    assert exact < quantised < 0.8
    assert 0 <= found["draft_acceptance"] <= 1
    assert found["seconds"].keys() >= {"make checkpoints", "tune", "load", "prefill", "decode", "compare with FP32"}
    for text in ("what ran on cpu", "predicted: nothing was timed here", "logits at every position"):
        assert text in out


def test_demo_says_why_tuning_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    code = main(["demo", "--config", "tiny", "--dir", str(tmp_path), "--device", "cpu", "--quiet"])
    assert code == 1
    assert "tuning failed (/bin/false -m tuner tune" in capsys.readouterr().err
