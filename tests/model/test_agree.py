"""`python -m model agree`: layers of a device beside the CPU's, each given the CPU's input."""

import json
from pathlib import Path

import pytest
import torch

from model.__main__ import main
from model.agree import DECODED, PARTS, compare, in_steps, prompt, side
from model.checkpoint import load, make_checkpoint
from model.config import ModelConfig

TINY = ModelConfig.named("tiny")
TOKENS = 80


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agree") / "tiny"
    make_checkpoint(path, TINY, "modelopt", seed=5, progress=False)
    return path


def test_steps_cover_all_tokens_in_order():
    ids = prompt(TINY, 600)
    steps = in_steps(ids)
    assert [token for step in steps for token in step] == ids
    assert [len(step) for step in steps] == [256, 256, 72] + [1] * DECODED


def test_a_fault_is_seen_where_it_is_and_nowhere_else(checkpoint: Path):
    """One weight of a CSA layer's attention is off in the device's model: other kinds get the CPU's input, not its."""
    device, cpu, exact = (load(None, checkpoint, weights=w, progress=False) for w in ("stored", "stored", "fp32"))
    layer = next(i for i in range(TINY.num_hidden_layers) if TINY.kind(i) == "csa")
    device.layers[layer].attn.kv_norm.mul_(1.25)
    ids = prompt(TINY, TOKENS)
    sides = [side(m, len(ids), (f, f), "cpu") for m, f in ((device, "bf16"), (cpu, "bf16"), (exact, "fp32"))]
    found = compare(*sides, in_steps(ids))
    assert found.keys() == {"swa", "csa", "hca"}
    for kind, parts in found.items():
        assert parts.keys() == set(PARTS)
        for part, share in parts.items():
            r = share.relative()
            assert 1e-4 < r["cpu_exact"] < 0.3, (kind, part)  # experts and entries chosen otherwise count too
            if kind == "csa":
                assert r["device_cpu"] > 1e-3, part
            else:
                assert r["device_cpu"] == 0, (kind, part)
                assert r["device_exact"] == r["cpu_exact"], (kind, part)
    assert found["csa"]["attention"].relative()["device_cpu"] > 0.05


def test_the_command_tells_kinds_and_tokens(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    command = ["agree", str(checkpoint), "--device", "cpu", "--tokens", "24", "--new-tokens", "3", "--quiet", "--json"]
    assert main(command) == 0
    *text, document = capsys.readouterr().out.splitlines()
    found = json.loads(document)
    assert found["same_tokens"] == found["new_tokens"] == 3
    assert {part["device_cpu"] for kind in found["kinds"].values() for part in kind.values()} == {0.0}
    assert "greedy tokens: 3 of 3 the same" in text
    assert main(["agree", str(checkpoint), "--device", "cpu", "--tokens", "16"]) == 1
    assert "must be more than the 16 that are decoded, got 16" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("act_format", ["float", "nvfp4"])
@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("fp8_ds_mla", "fp8"), ("nvfp4", "mxfp4")])
def test_a_gpu_is_as_near_to_fp32_as_the_cpu_is(
    formats: tuple[str, str], act_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: torch.device
):
    make_checkpoint(tmp_path / "demo", ModelConfig.named("demo"), "modelopt", seed=5, progress=False)
    command = ["agree", str(tmp_path / "demo"), "--kv-format", formats[0], "--index-format", formats[1]]
    assert main([*command, "--act-format", act_format, "--tokens", "300", "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any(r["device_cpu"] > 0 for parts in found["kinds"].values() for r in parts.values())  # kernels have run
    for kind, parts in found["kinds"].items():
        for part, r in parts.items():
            assert r["device_exact"] < 1.5 * r["cpu_exact"], (kind, part, r)
