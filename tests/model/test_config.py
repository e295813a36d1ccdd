"""ModelConfig: the shipped numbers, config.json in and out, transformers' own spelling, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.config import SHIPPED, ModelConfig


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_survive_a_round_trip(name: str) -> None:
    config = ModelConfig.named(name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_released_schedules() -> None:
    pro, flash = ModelConfig.named("pro"), ModelConfig.named("flash")
    assert Counter(pro.kind(layer) for layer in range(61)) == {"hca": 31, "csa": 30}
    assert Counter(flash.kind(layer) for layer in range(43)) == {"hca": 20, "csa": 21, "swa": 2}
    assert pro.kind(60) == "csa"
    assert flash.kind(42) == "csa"
    assert pro.kind(61) == "swa"  # the draft block
    assert [pro.is_hash(layer) for layer in (0, 2, 3, 61)] == [True, True, False, False]


def test_small_configs_have_every_kind_of_layer() -> None:
    for name in ("demo", "tiny"):
        config = ModelConfig.named(name)
        layers = range(config.num_hidden_layers)
        assert {config.kind(layer) for layer in layers} == {"swa", "csa", "hca"}
        assert {config.is_hash(layer) for layer in layers} == {True, False}
        assert config.num_nextn_predict_layers == 1


@pytest.mark.parametrize(("name", "entries"), [("flash", 46), ("pro", 64)])
def test_surplus_schedule_entries_belong_to_draft_blocks(name: str, entries: int) -> None:
    raw = ModelConfig.named(name).to_json()
    raw["compress_ratios"] += [4] * (entries - len(raw["compress_ratios"]))
    config = ModelConfig.from_json(raw)
    assert config.ratio(config.num_hidden_layers + 1) == 0
    assert config.kind(config.num_hidden_layers - 1) == "csa"


def test_transformers_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    ours = ModelConfig.named("flash")
    (tmp_path / "config.json").write_text(json.dumps(ours.to_json()))
    theirs = transformers.DeepseekV4Config.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "compress_ratios" not in written
    back = ModelConfig.from_json({**written, "num_nextn_predict_layers": 1})
    # it keeps no entry for draft blocks
    assert back == ModelConfig.from_json({**ours.to_json(), "compress_ratios": ours.to_json()["compress_ratios"][:43]})


def test_directory_or_file(tmp_path: Path) -> None:
    config = ModelConfig.named("tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert ModelConfig.named(str(tmp_path)) == ModelConfig.named(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be an integer"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer, got 64.0"),
        ({"swiglu_limit": "10"}, "swiglu_limit must be a number"),
        ({"compress_ratios": [0, 4]}, "an entry for each of 4 layers, got 2"),
        ({"compress_ratios": [0, 4, -1, 4]}, "compress_ratios must be 0 or more"),
        ({"compress_ratios": [0, 4, 8, "4"]}, "compress_ratios must hold integers"),
        ({"o_groups": 3}, "o_groups=3 does not divide"),
        ({"qk_rope_head_dim": 80}, "qk_rope_head_dim must be even and below head_dim=80"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds n_routed_experts=8"),
        ({"num_hash_layers": 5}, "num_hash_layers must lie in 0..4"),
        ({"n_shared_experts": 2}, "n_shared_experts must be 1"),
        ({"expert_dtype": "fp8"}, "expert_dtype must be 'fp4'"),
        ({"model_type": "deepseek_v3"}, "model_type must be 'deepseek_v4', got 'deepseek_v3'"),
        ({"scoring_func": "sigmoid"}, "scoring_func must be 'sqrtsoftplus'"),
        ({"rope_scaling": None}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'yarn', got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling lacks beta_fast, beta_slow, original"),
        ({"eos_token_id": [1, 2]}, r"one eos_token_id is supported, got \[1, 2\]"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json({**ModelConfig.named("tiny").to_json(), **change})


def test_a_missing_field_is_named() -> None:
    raw = ModelConfig.named("tiny").to_json()
    del raw["q_lora_rank"], raw["head_dim"]
    with pytest.raises(ValueError, match="config lacks head_dim, q_lora_rank"):
        ModelConfig.from_json(raw)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config 'huge': it is neither one of pro"):
        ModelConfig.named("huge")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.named(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ModelConfig.named(str(tmp_path))
