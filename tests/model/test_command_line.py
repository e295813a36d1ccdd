"""The command lines end to end: what they print, their JSON, and their one sentence on failure."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.__main__ import main


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        code = main([*map(str, arguments), "--json", "--quiet"])
        return Result(code, *self._capsys.readouterr())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "tiny"
    arguments = [
        "make-checkpoint",
        str(directory),
        "--config",
        "tiny",
        "--family",
        "modelopt",
        "--seed",
        "3",
        "--quiet",
    ]
    assert main(arguments) == 0
    return directory


@pytest.mark.parametrize(("name", "total"), [("pro", 864_704_792_696), ("flash", 159_609_485_896)])
def test_check_released_configs(name: str, total: int, run: Run) -> None:
    found = run("check", "--config", name)
    assert found.code == 0
    assert found.document["families"]["native"]["bytes"] == found.document["published_native_bytes"] == total
    assert f"{total:,}" in found.out
    assert found.document["parameters"] == {"pro": 1_598_837_347_742, "flash": 290_942_289_362}[name]


def test_check_compares_with_the_published_total(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.check.PUBLISHED", {"tiny": 12})
    found = run("check", "--config", "tiny")
    assert found.code == 1
    assert "tiny: the native release has" in found.err


def test_check_finds_a_model_that_lacks_a_weight(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.transformer import Transformer

    weights = Transformer.weights
    monkeypatch.setattr(Transformer, "weights", lambda self: (w for w in weights(self) if w[0] != "layers.2.attn.wo_b"))
    found = run("check", "--config", "tiny")
    assert found.code == 1
    assert "the model has no layers.2.attn.wo_b (1 such)" in found.err


def test_check_a_checkpoint(checkpoint: Path, run: Run) -> None:
    found = run("check", "--checkpoint", checkpoint, "--config", "tiny")
    assert found.code == 0
    assert found.document["checkpoint"]["family"] == "modelopt"
    assert found.document["checkpoint"]["bytes"] == found.document["families"]["modelopt"]["bytes"]
    other = run("check", "--checkpoint", checkpoint, "--config", "demo")
    assert other.code == 1
    assert "wanted vocab_size=512, got vocab_size=288" in other.err


def test_make_convert_generate(tmp_path: Path, run: Run) -> None:
    made = run("make-checkpoint", tmp_path / "a", "--config", "tiny", "--family", "native", "--shard-mib", 0.5)
    assert made.code == 0
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 4
    converted = run("convert", tmp_path / "a", tmp_path / "b", "--family", "nvfp4-experts")
    assert (converted.code, converted.document["from"]) == (0, "native")
    # the cast is exact and attention the same bytes, so the two make the same text
    native, cast = (
        run("generate", tmp_path / d, "--prompt", "two numbers", "--max-new-tokens", 6, "--device", "cpu") for d in "ab"
    )
    assert native.code == cast.code == 0
    assert native.document["tokens"] == cast.document["tokens"]
    assert native.document["prompt_tokens"] == 12
    assert native.document["tokenizer"] == "bytes"


def test_generate(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    common = ("generate", checkpoint, "--max-new-tokens", 5, "--ignore-eos", "--device", "cpu")
    greedy = run(*common, "--prompt", "hello")
    assert greedy.code == 0
    assert len(greedy.document["tokens"]) == 5
    assert greedy.document["text"] in greedy.out
    (tmp_path / "prompt.txt").write_text("hello")
    assert run(*common, "--prompt-file", tmp_path / "prompt.txt").document["tokens"] == greedy.document["tokens"]
    assert run(*common, "--prompt", "hello", "--chunk", 2).document["tokens"] == greedy.document["tokens"]
    hot = [run(*common, "--prompt", "hello", "--temperature", 2, "--seed", s).document["tokens"] for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    for option in (
        ("--weights", "fp32"),
        ("--kv-format", "nvfp4"),
        ("--act-format", "nvfp4"),
        ("--index-format", "fp8"),
    ):
        assert len(run(*common, "--prompt", "hello", *option).document["tokens"]) == 5


def test_bench(checkpoint: Path, run: Run) -> None:
    found = run(
        "bench", checkpoint, "--prefill", "8,20", "--batch", "1,3", "--context", 16, "--repeats", 2, "--device", "cpu"
    )
    assert found.code == 0
    rows = found.document["rows"]
    assert [(row["phase"], row["sequences"], row["context"]) for row in rows] == [
        ("prefill", 1, 8),
        ("prefill", 1, 20),
        ("decode", 1, 16),
        ("decode", 3, 16),
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        new = row["context"] if row["phase"] == "prefill" else row["sequences"]
        assert row["tokens_per_s"] == pytest.approx(new / row["median_ms"] * 1e3)
    assert found.document["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "check needs --config, --checkpoint or both"),
        (["check", "--config", "huge"], "no config 'huge'"),
        (["check", "--checkpoint", "{tmp}/none"], "wanted a checkpoint directory, got none there"),
        (["make-checkpoint", "{tmp}", "--config", "tiny", "--family", "native"], "is not empty (--force replaces"),
        (
            ["make-checkpoint", "{tmp}/x", "--config", "tiny", "--family", "native", "--shard-mib", "0"],
            "--shard-mib must be positive, got 0",
        ),
        (
            ["convert", "{checkpoint}", "{tmp}/x", "--family", "native"],
            "a modelopt checkpoint converts to fp32, not to",
        ),
        (
            ["generate", "{checkpoint}", "--prompt", "a", "--max-new-tokens", "0"],
            "max_new_tokens must be positive, got 0",
        ),
        (["generate", "{checkpoint}", "--prompt", "a", "--top-p", "0"], "top_p must lie in (0, 1], got 0.0"),
        (["generate", "{checkpoint}", "--prompt", "a", "--chunk", "0"], "chunk must be positive"),
        (["generate", "{checkpoint}", "--prompt-file", "{tmp}/none"], "No such file or directory"),
        (["generate", "{checkpoint}", "--prompt", "a", "--device", "abacus"], "--device must be cpu, cuda or cuda:N"),
        (
            ["generate", "{checkpoint}", "--prompt", "a", "--max-new-tokens", "5000"],
            "longer than the model's 4096 positions",
        ),
        (["bench", "{checkpoint}", "--prefill", "8,5000"], "a sequence of 5000 tokens is longer than"),
        (["bench", "{checkpoint}", "--context", "0"], "--context must be positive, got 0"),
    ],
)
def test_failures(arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "here").write_text("")
    found = run(*[a.format(tmp=tmp_path, checkpoint=checkpoint) for a in arguments])
    assert found.code == 1
    assert message in found.err
    assert found.err.count("\n") == 1
    assert "Traceback" not in found.err
    assert message in found.document["error"]


@pytest.mark.parametrize("command", ["check", "make-checkpoint", "convert", "generate", "bench", "demo"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--json" in capsys.readouterr().out


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "model", "check", "--config", "tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["config"] == "tiny"
    assert not done.stderr
