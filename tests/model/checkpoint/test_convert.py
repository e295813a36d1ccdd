"""Conversions: exact where formats allow it, same bytes where nothing changes, refused where it would round twice."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointError, Family, convert, inventory
from model.config import ModelConfig


def load_all(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(safetensors.torch.load_file(file))
    return found


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def test_native_to_nvfp4_experts_keeps_every_value(
    made: dict[Family, Path], config: ModelConfig, tmp_path: Path
) -> None:
    written = convert(Checkpoint(made["native"]), tmp_path, "nvfp4-experts", shard_bytes=200_000, progress=False)
    new = Checkpoint(tmp_path)
    assert new.family == "nvfp4-experts"
    assert written == new.bytes == sum(spec.bytes for spec in inventory(config, "nvfp4-experts").values())
    before, after = load_all(made["native"]), load_all(tmp_path)
    assert {name: tuple(t.shape) for name, t in after.items()} == {
        name: spec.shape for name, spec in inventory(config, "nvfp4-experts").items()
    }
    for name in before.keys() & after.keys():
        if ".experts." not in name or name.startswith("mtp."):
            assert torch.equal(bits(before[name]), bits(after[name])), name
    for expert in range(config.n_routed_experts):
        stem = f"layers.2.ffn.experts.{expert}"
        for part in ("w1", "w2", "w3"):
            assert torch.equal(bits(before[f"{stem}.{part}.weight"]), bits(after[f"{stem}.{part}.weight"]))
        shared = [after[f"{stem}.{part}.weight_scale_2"] for part in ("w1", "w3")]
        assert shared[0] == shared[1]
        assert float(torch.frexp(shared[0])[0]) == 0.5  # a power of two
    true = dict(Checkpoint(made["native"]).weights(weights="fp32"))
    got = dict(new.weights(weights="fp32"))
    assert true.keys() == got.keys()
    for name, weight in true.items():
        assert isinstance(weight, Tensor)
        assert torch.equal(weight, got[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["native", "nvfp4-experts", "fp32"])
def test_to_modelopt(source: Family, made: dict[Family, Path], config: ModelConfig, tmp_path: Path) -> None:
    convert(Checkpoint(made[source]), tmp_path, "modelopt", progress=False)
    new = Checkpoint(tmp_path)
    assert new.family == "modelopt"
    assert new.config.num_nextn_predict_layers == 0
    assert load_all(tmp_path).keys() == inventory(config, "modelopt").keys()
    true, got = dict(Checkpoint(made[source]).weights(weights="fp32")), dict(new.weights(weights="fp32"))
    for name, weight in got.items():
        assert isinstance(weight, Tensor)
        original = true[name]
        assert isinstance(original, Tensor)
        error = float((weight.float() - original.float()).norm() / original.float().norm())
        assert error < 0.13, (name, error)
    if source == "fp32":  # the same as made directly
        direct, converted = load_all(made["modelopt"]), load_all(tmp_path)
        assert all(torch.equal(bits(direct[name]), bits(converted[name])) for name in direct)


@pytest.mark.parametrize("source", ["native", "nvfp4-experts", "modelopt"])
def test_to_fp32_is_what_was_stored(source: Family, made: dict[Family, Path], tmp_path: Path) -> None:
    convert(Checkpoint(made[source]), tmp_path, "fp32", progress=False)
    true, got = dict(Checkpoint(made[source]).weights(weights="fp32")), dict(Checkpoint(tmp_path).weights())
    assert true.keys() == got.keys()
    for name, weight in true.items():
        assert torch.equal(weight.float(), got[name].float()), name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "family"),
    [("modelopt", "native"), ("modelopt", "nvfp4-experts"), ("nvfp4-experts", "native"), ("native", "native")],
)
def test_refused(source: Family, family: Family, made: dict[Family, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a {source} checkpoint converts to .*, not to {family}"):
        convert(Checkpoint(made[source]), tmp_path / "new", family, progress=False)
    assert not (tmp_path / "new").exists()


def test_onto_itself_or_onto_something(made: dict[Family, Path], tmp_path: Path) -> None:
    source = Checkpoint(made["native"])
    with pytest.raises(ValueError, match="is the source"):
        convert(source, made["native"] / ".." / "native", "modelopt", force=True, progress=False)
    assert Checkpoint(made["native"]).bytes == source.bytes
    (tmp_path / "something").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        convert(source, tmp_path, "modelopt", progress=False)


def test_a_broken_source_is_named(made: dict[Family, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made["native"], tmp_path / "broken")
    source = Checkpoint(tmp_path / "broken")
    scale = source.entries["layers.3.ffn.experts.2.w3"].tensors[".scale"]
    with scale.file.open("r+b") as f:
        f.seek(scale.offset + 7)
        f.write(b"\xff")
    with pytest.raises(
        CheckpointError, match=r"layers\.3\.ffn\.experts\.2\.w3\.scale: wanted E8M0 .* got 1 of 512 NaN"
    ):
        convert(source, tmp_path / "new", "nvfp4-experts", progress=False)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path / "new")


def test_config_json_is_carried_over(made: dict[Family, Path], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(made["native"], tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "4.57.1", "note": [1]}))
    convert(Checkpoint(tmp_path / "source"), tmp_path / "new", "modelopt", progress=False)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["note"] == [1]
    assert written["transformers_version"] == "4.57.1"
    assert written["quantization_config"]["quant_method"] == "modelopt"
    assert Checkpoint(tmp_path / "new").config.num_nextn_predict_layers == 0  # whatever config.json says
