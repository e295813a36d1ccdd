"""Checkpoints as written: readable by the safetensors library, the same from the same seed, sane to compute with."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import FP8BlockTensor, MXFP4Tensor, NVFP4Tensor
from model.checkpoint.files import TORCH_DTYPES
from model.checkpoint.inventory import FAMILIES, Family, inventory, params, stored_name
from model.checkpoint.read import Checkpoint
from model.checkpoint.weights import random_weight
from model.checkpoint.write import make_checkpoint
from model.config import ModelConfig

SEED = 5


def load_all(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(safetensors.torch.load_file(file))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_reads_what_the_inventory_says(
    family: Family, made: dict[Family, Path], config: ModelConfig
) -> None:
    tensors = load_all(made[family])
    expected = {name: (TORCH_DTYPES[s.dtype], s.shape) for name, s in inventory(config, family).items()}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected
    index = json.loads((made[family] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(made[family] / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a mapping)
    assert len(set(index["weight_map"].values())) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_change_nothing(family: Family, made: dict[Family, Path], config: ModelConfig, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", config, family, seed=SEED, progress=False)
    one, many = load_all(tmp_path / "one"), load_all(made[family])
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), many[name].reshape(-1).view(torch.uint8)), name


def test_another_seed_changes_everything_random(made: dict[Family, Path], config: ModelConfig, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "other", config, "fp32", seed=SEED + 1, progress=False)
    ours, other = load_all(made["fp32"]), load_all(tmp_path / "other")
    for name, tensor in ours.items():
        assert not torch.equal(tensor, other[name]), name
        assert tensor.numel() == 1 or tensor.unique().numel() > 1, f"{name} is constant"


def test_every_family_quantises_the_same_weights(made: dict[Family, Path], config: ModelConfig) -> None:
    """Errors as the formats have them on Gaussian rows, and the very same numbers where nothing is quantised."""
    bounds = {
        "nvfp4": (0.05, 0.12),
        "mxfp4": (0.08, 0.16),
        "fp8": (0.01, 0.04),
        "bf16": (0.0, 0.003),
        "fp32": (0.0, 0.0),
    }
    for family in FAMILIES:
        checkpoint = Checkpoint(made[family])
        tensors = load_all(made[family])
        for param in params(config):
            if param.name not in checkpoint.entries:
                assert family == "modelopt"
                assert param.name.startswith("mtp.")
                continue
            true = random_weight(param, config, SEED)
            storage = param.storage(family)
            name = stored_name(param, family)
            main = tensors[name if param.bare else f"{name}.weight"]
            if storage == "i64":
                assert torch.equal(main, true)
                continue
            if storage == "nvfp4":
                t = NVFP4Tensor(main, tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_scale_2"])
                got = reference.dequant_nvfp4(t, torch.float32)
            elif storage == "mxfp4":
                scale = tensors[f"{name}.scale"].view(torch.uint8)
                got = reference.dequant_mxfp4(MXFP4Tensor(main.view(torch.uint8), scale), torch.float32)
            elif storage == "fp8":
                got = reference.dequant_fp8_block(
                    FP8BlockTensor(main, tensors[f"{name}.scale"].view(torch.uint8)), torch.float32
                )
            else:
                got = main.float()
            error = float((got - true).norm() / true.norm())
            low, high = bounds[storage]
            assert low <= error <= high, (family, param.name, storage, error)


def test_global_scales_of_gate_and_up(made: dict[Family, Path], config: ModelConfig) -> None:
    """One for both in `nvfp4-experts`, the larger of two; one each in `modelopt`. The down projection has its own."""
    experts, full = load_all(made["nvfp4-experts"]), load_all(made["modelopt"])
    for layer in range(config.num_hidden_layers):
        for expert in range(config.n_routed_experts):
            native = f"layers.{layer}.ffn.experts.{expert}"
            theirs = f"model.layers.{layer}.mlp.experts.{expert}"
            own = torch.stack([full[f"{theirs}.{part}_proj.weight_scale_2"] for part in ("gate", "up")])
            assert own[0] != own[1]
            for part in ("w1", "w3"):
                assert experts[f"{native}.{part}.weight_scale_2"] == own.max()
            assert experts[f"{native}.w2.weight_scale_2"] == full[f"{theirs}.down_proj.weight_scale_2"]


@pytest.mark.parametrize(
    ("family", "method"), [("native", "fp8"), ("nvfp4-experts", "fp8"), ("modelopt", "modelopt"), ("fp32", None)]
)
def test_config_files(family: Family, method: str | None, made: dict[Family, Path], config: ModelConfig) -> None:
    written = json.loads((made[family] / "config.json").read_text())
    assert ModelConfig.from_json(written) == config
    quantization = written.get("quantization_config")
    assert (quantization["quant_method"] if quantization else None) == method
    assert (made[family] / "hf_quant_config.json").exists() == (family in ("nvfp4-experts", "modelopt"))
    if family == "nvfp4-experts":
        layers = {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(4)}
        assert quantization["quantized_layers"] == layers
        assert "mtp.*" in quantization["ignore"]
        hf = json.loads((made[family] / "hf_quant_config.json").read_text())
        assert hf["quantization"]["quantized_layers"] == layers


def test_a_directory_in_use_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        make_checkpoint(tmp_path, config, "native", seed=0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_an_older_checkpoint_and_leaves_the_rest(
    config: ModelConfig, made: dict[Family, Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001-of-99999.safetensors.part").write_text("cut short")
    make_checkpoint(tmp_path, config, "modelopt", seed=0, shard_bytes=100_000, force=True, progress=False)
    make_checkpoint(tmp_path, config, "native", seed=SEED, force=True, progress=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert Checkpoint(tmp_path).family == "native"


def test_an_interrupted_write_is_no_checkpoint(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def interrupted(*args: object) -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn > 60:
            raise KeyboardInterrupt
        return random_weight(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("model.checkpoint.write.random_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path, config, "native", seed=0, shard_bytes=100_000, progress=False)
    assert not list(tmp_path.glob("*.part"))
    assert list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"config\.json: wanted a file, got none there"):
        Checkpoint(tmp_path)


def test_the_expert_table_names_different_experts(config: ModelConfig) -> None:
    (table,) = (p for p in params(config) if p.init == "table")
    values = random_weight(table, config, 3)
    assert values.shape == (config.vocab_size, config.num_experts_per_tok)
    assert values.min() == 0
    assert values.max() == config.n_routed_experts - 1
    assert (values.sort(dim=1).values.diff(dim=1) > 0).all()
