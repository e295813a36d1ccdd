"""What a loader must refuse: each error names the file, the tensor, what was wanted and what came."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointError, Family, load
from model.checkpoint.files import ShardWriter
from model.checkpoint.inventory import TensorSpec
from model.config import ModelConfig
from model.transformer import Transformer

from .conftest import Copy

Copies = Callable[[Family], Copy]


def refused(directory: Path, *, tensor: str | None, wanted: str, got: str, opens: bool = False) -> CheckpointError:
    """Loading fails with an error of these parts (regular expressions), on opening unless `opens`."""
    if opens:
        Checkpoint(directory)
    with pytest.raises(CheckpointError) as caught:
        load(None, directory, progress=False) if opens else Checkpoint(directory)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.tensor == tensor
    assert re.search(wanted, error.wanted), error
    assert re.search(got, error.got), error
    assert str(error.file) in str(error)
    assert tensor is None or tensor in str(error)
    return error


# --- names, dtypes, shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tensor", "wanted"),
    [
        ("native", "layers.1.attn.wq_a.weight", r"fp8 of shape \[64, 128\]"),
        ("native", "layers.0.ffn.experts.3.w2.scale", r"BF16 or F32, or a scale beside it"),
        ("native", "mtp.0.e_proj.scale", r"a scale beside it"),
        ("native", "layers.0.ffn.gate.tid2eid", r"i64 of shape \[288, 2\]"),
        ("native", "layers.2.attn.attn_sink", r"fp32 of shape \[4\]"),
        ("nvfp4-experts", "layers.0.ffn.experts.3.w2.weight_scale_2", r"F32 \[\]"),
        ("modelopt", "model.layers.3.self_attn.o_b_proj.weight_scale_2", r"F32 \[\]"),
        ("modelopt", "lm_head.weight", r"bf16 of shape \[288, 128\]"),
        ("modelopt", "model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight", r"\[32, 128\]"),
    ],
)
def test_missing_tensor(family: Family, tensor: str, wanted: str, copy: Copies) -> None:
    broken = copy(family)
    broken.remove(tensor)
    got = "no such tensor"
    if tensor.endswith(".scale"):  # what is left is a weight that cannot be read
        tensor, got = tensor.removesuffix("scale") + "weight", r"I8 \[128, 64\]|F8_E4M3 \[128, 128\]"
    refused(broken.directory, tensor=tensor, wanted=wanted, got=got)


def test_many_missing_tensors_are_counted(copy: Copies) -> None:
    broken = copy("native")
    broken.rewrite(lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("layers.2.attn.w")})
    error = refused(broken.directory, tensor="layers.2.attn.wq_a.weight", wanted="fp8", got=r"no such tensor \(nor 4 ")
    assert error.file.name == "model.safetensors.index.json"


def test_part_of_a_draft_block(copy: Copies) -> None:
    broken = copy("native")
    broken.remove("mtp.0.hnorm.weight")
    refused(broken.directory, tensor="mtp.0.hnorm.weight", wanted=r"\[128\]", got="no such tensor")


@pytest.mark.parametrize("extra", ["layers.4.attn_norm.weight", "layers.0.ffn.gate.bias", "mtp.1.norm.weight", "norm"])
def test_surplus_tensor(extra: str, copy: Copies) -> None:
    broken = copy("native")
    broken.edit("norm.weight", lambda tensors: tensors.update({extra: torch.zeros(3)}))
    error = refused(broken.directory, tensor=extra, wanted=r"tensors that config\.json calls for", got=r"F32 \[3\]")
    assert error.file == broken.file("norm.weight")


def test_names_of_neither_kind(copy: Copies) -> None:
    broken = copy("native")
    broken.rewrite(lambda tensors: {f"transformer.{name}": tensor for name, tensor in tensors.items()})
    refused(broken.directory, tensor="embed.weight", wanted="bf16", got=r"no such tensor \(nor \d+ others\)")


@pytest.mark.parametrize(
    ("family", "tensor", "change", "wanted", "got"),
    [
        ("native", "layers.1.attn.wq_a.weight", lambda t: t[:32], r"F8_E4M3 \[64, 128\]", r"F8_E4M3 \[32, 128\]"),
        ("native", "layers.1.attn.wq_a.weight", lambda t: t.float(), r"F8_E4M3 \[64, 128\]", r"F32 \[64, 128\]"),
        ("native", "layers.1.attn.wkv.scale", lambda t: t.float(), r"F8_E8M0 \[1, 1\]", r"F32 \[1, 1\]"),
        ("native", "layers.3.attn.wo_b.scale", lambda t: t.repeat(2, 1), r"F8_E8M0 \[1, 1\]", r"F8_E8M0 \[2, 1\]"),
        ("native", "layers.0.ffn.experts.1.w1.weight", lambda t: t.T, r"I8 \[128, 64\]", r"I8 \[64, 128\]"),
        ("native", "layers.0.attn_norm.weight", lambda t: t.half(), "BF16 or F32", r"F16 \[128\]"),
        ("native", "layers.0.attn_norm.weight", lambda t: t[None], r"BF16 \[128\]", r"BF16 \[1, 128\]"),
        ("native", "layers.0.ffn.gate.tid2eid", lambda t: t.float(), r"I64 \[288, 2\]", r"F32 \[288, 2\]"),
        ("native", "embed.weight", lambda t: t.byte(), r"BF16 or F32 \[288, 128\]", "U8"),
        (
            "modelopt",
            "model.layers.1.self_attn.q_a_proj.weight_scale",
            lambda t: t.float(),
            r"F8_E4M3 \[64, 8\]",
            r"F32 \[64, 8\]",
        ),
        (
            "modelopt",
            "model.layers.1.self_attn.q_a_proj.weight_scale_2",
            lambda t: t.repeat(2),
            r"F32 \[\]",
            r"F32 \[2\]",
        ),
        (
            "nvfp4-experts",
            "layers.1.ffn.experts.0.w3.weight",
            lambda t: t[:, :32],
            r"U8 \[128, 64\]",
            r"U8 \[128, 32\]",
        ),
    ],
)
def test_wrong_dtype_or_shape(
    family: Family, tensor: str, change: Callable[[Tensor], Tensor], wanted: str, got: str, copy: Copies
) -> None:
    broken = copy(family)
    broken.set(tensor, lambda t: change(t).contiguous())
    error = refused(broken.directory, tensor=tensor, wanted=wanted, got=got)
    assert error.file == broken.file(tensor)


def test_experts_in_different_formats(copy: Copies, made: dict[Family, Path]) -> None:
    """A stack cannot hold one expert in BF16 among NVFP4 ones: refused before anything is allocated."""
    broken = copy("modelopt")
    name = "model.layers.2.mlp.experts.1.up_proj"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{name}.{suffix}"]
        return {**tensors, f"{name}.weight": torch.zeros(128, 128, dtype=torch.bfloat16)}

    broken.rewrite(spoil)
    wanted = r"nvfp4 as in layers\.2\.ffn\.experts\.0\.w1, which it is stacked with"
    refused(broken.directory, tensor=f"{name}.weight", wanted=wanted, got="bf16", opens=True)


# --- values ----------------------------------------------------------------------------------------------------------


def with_byte(value: int) -> Callable[[Tensor], Tensor]:
    """The tensor with one byte in the middle changed."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        flat = t.view(torch.uint8).view(-1)
        flat[flat.numel() // 2] = value
        return t

    return change


@pytest.mark.parametrize("weights", ["stored", "fp32"])
@pytest.mark.parametrize(
    ("family", "tensor", "change", "wanted", "got"),
    [
        (
            "modelopt",
            "model.layers.0.mlp.experts.2.down_proj.weight_scale",
            with_byte(0x7F),
            "not negative",
            "1 of 1024 ",
        ),
        ("modelopt", "model.layers.0.mlp.experts.2.down_proj.weight_scale", with_byte(0xFF), "not negative", "0xFF"),
        ("modelopt", "model.layers.0.self_attn.kv_proj.weight_scale", with_byte(0x81), "not negative", "0x81"),
        ("modelopt", "model.layers.0.self_attn.kv_proj.weight_scale", with_byte(0x80), "not negative", "0x80"),
        ("modelopt", "model.layers.0.self_attn.kv_proj.weight_scale_2", lambda t: -t, "not negative", "^-"),
        ("modelopt", "model.layers.0.self_attn.kv_proj.weight_scale_2", lambda t: t * torch.nan, "finite", "nan"),
        ("modelopt", "model.layers.0.self_attn.kv_proj.weight_scale_2", lambda t: t * torch.inf, "finite", "inf"),
        ("native", "layers.0.attn.wq_a.scale", with_byte(0xFF), "E8M0 scales that are numbers", "1 of 1 NaN"),
        ("native", "layers.0.ffn.experts.0.w1.scale", with_byte(0xFF), "E8M0", "1 of 512 NaN"),
        ("native", "layers.0.attn_norm.weight", lambda t: t * torch.nan, "numbers", "128 NaN among 128"),
        ("native", "layers.2.ffn.gate.bias", lambda t: t * torch.nan, "numbers", "4 NaN among 4"),
        ("native", "layers.0.ffn.gate.tid2eid", lambda t: t + 1, r"0\.\.3", r"1\.\.4"),
        ("native", "layers.0.ffn.gate.tid2eid", lambda t: t - 1, r"0\.\.3", r"-1\.\.2"),
    ],
)
def test_wrong_values(
    family: Family, tensor: str, change: Callable[[Tensor], Tensor], wanted: str, got: str, weights: str, copy: Copies
) -> None:
    broken = copy(family)
    broken.set(tensor, change)
    checkpoint = Checkpoint(broken.directory)
    with pytest.raises(CheckpointError) as caught:
        load(None, checkpoint, weights=weights, progress=False)  # type: ignore[arg-type]
    error = caught.value
    assert (error.tensor, error.file) == (tensor, broken.file(tensor))
    assert re.search(wanted, error.wanted), error
    assert re.search(got, error.got), error


def test_infinite_sinks_are_allowed(copy: Copies) -> None:
    """A head without a sink has one of minus infinity."""
    other = copy("native")
    other.set("layers.0.attn.attn_sink", lambda t: torch.full_like(t, -torch.inf))
    assert bool((dict(load(None, other.directory).weights())["layers.0.attn.attn_sink"] == -torch.inf).all())  # type: ignore[operator]


# --- files -----------------------------------------------------------------------------------------------------------


def test_truncated_shard(copy: Copies) -> None:
    broken = copy("native")
    path = broken.file("head.weight")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated") as caught:
        Checkpoint(broken.directory)
    assert caught.value.file == path
    assert caught.value.tensor is not None


def test_shard_cut_short_after_opening(copy: Copies) -> None:
    """Between the headers and the read a file can shrink: an error with the tensor's name, no bus error."""
    broken = copy("native")
    checkpoint = Checkpoint(broken.directory)
    stored = max(
        (t for e in checkpoint.entries.values() for t in e.tensors.values()), key=lambda t: (str(t.file), t.offset)
    )
    with stored.file.open("r+b") as f:
        f.truncate(stored.offset + stored.spec.bytes // 2)
    with pytest.raises(CheckpointError, match="the end of the file after") as caught:
        load(None, checkpoint, progress=False)
    assert caught.value.file == stored.file


def test_surplus_bytes(copy: Copies) -> None:
    broken = copy("native")
    path = broken.file("head.weight")
    path.write_bytes(path.read_bytes() + b"\0")
    refused(broken.directory, tensor=None, wanted=r"\d+ bytes, where the last tensor ends", got=r"\d+ bytes")


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("content", "tensor", "wanted", "got"),
    [
        (b"", None, "a safetensors header", "0 bytes"),
        (b"\1\2\3", None, "a safetensors header", "3 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", None, "header", "length 1152921504606846976"),
        (header(b"{}", length=0), None, "header", "length 0"),
        (header(b"\xff\xfe{}"), None, "JSON", "codec|utf"),
        (header(b'{"a": '), None, "JSON", "Expecting"),
        (header([1]), None, "a JSON object", "list"),
        (header(b'{"a": 1, "a": 2}'), None, "JSON", "'a' occurs twice"),
        (header({"a": 3}), "a", "dtype, shape and data_offsets", "3"),
        (header({"a": {**F32}}), "a", "data_offsets", "F32"),
        (header({"a": {**F32, "data_offsets": [0, 8, 9]}}), "a", "data_offsets", r"\[0, 8, 9\]"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "a", "shape", "-2"),
        (header({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}), "a", "shape", r"2\.0"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}), "a", "a dtype of", "F4"),
        (header({"a": {**F32, "data_offsets": [0, 4]}}, b"\0" * 4), "a", r"8 bytes for F32 \[2\]", r"\[0, 4\]"),
        (header({"a": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12), "a", "data at byte", "gap"),
        (
            header({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
            "b",
            "data at byte",
            "overlaps",
        ),
    ],
)
def test_corrupt_header(content: bytes, tensor: str | None, wanted: str, got: str, copy: Copies) -> None:
    broken = copy("native")
    path = broken.file("head.weight")
    path.write_bytes(content)
    error = refused(broken.directory, tensor=tensor, wanted=wanted, got=got)
    assert error.file == path


def test_missing_shard(copy: Copies) -> None:
    broken = copy("native")
    path = broken.file("head.weight")
    path.unlink()
    first = min(name for name, file in broken.index.items() if file == path.name)
    refused(broken.directory, tensor=first, wanted=rf"the shard {path.name} .* for \d+ tensors", got="no such file")


@pytest.mark.parametrize(("tensor", "other"), [("head.weight", "embed.weight"), ("embed.weight", "head.weight")])
def test_tensor_in_two_shards(tensor: str, other: str, copy: Copies) -> None:
    broken = copy("native")
    right, wrong = broken.file(tensor), broken.file(other)
    assert right != wrong
    broken.edit(other, lambda tensors: tensors.update({tensor: torch.zeros(2)}), index=False)
    error = refused(broken.directory, tensor=tensor, wanted="each tensor in one shard", got=f"{right.name} holds too")
    assert error.file == wrong


def test_shard_with_a_tensor_that_the_index_lacks(copy: Copies) -> None:
    broken = copy("native")
    broken.edit("norm.weight", lambda tensors: tensors.update({"stowaway": torch.zeros(2)}), index=False)
    refused(broken.directory, tensor="stowaway", wanted="the index names for this shard", got="does not")


def test_index_with_a_tensor_that_the_shard_lacks(copy: Copies) -> None:
    broken = copy("native")
    broken.edit("norm.weight", lambda tensors: tensors.pop("norm.weight"), index=False)
    error = refused(broken.directory, tensor="norm.weight", wanted="names here", got="no such tensor")
    assert error.file == broken.file("norm.weight")


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", 3, ".."])
def test_index_that_leaves_the_directory(file: object, copy: Copies) -> None:
    broken = copy("native")
    broken.write_index({**broken.index, "norm.weight": file})  # type: ignore[dict-item]
    refused(broken.directory, tensor="norm.weight", wanted="a file name without directories", got=re.escape(repr(file)))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{", '{"a": 1, "a": 1}'])
def test_corrupt_index(text: str, copy: Copies) -> None:
    broken = copy("native")
    path = broken.directory / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(broken.directory)
    assert caught.value.file == path


def test_no_checkpoint_at_all(tmp_path: Path, config: ModelConfig) -> None:
    refused(tmp_path / "nowhere", tensor=None, wanted="a checkpoint directory", got="none there")
    refused(tmp_path, tensor=None, wanted="a file", got="none there")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    refused(tmp_path, tensor=None, wanted=r"model\.safetensors\.index\.json or model\.safetensors", got="neither")


def test_config_of_another_model(copy: Copies, config: ModelConfig) -> None:
    broken = copy("native")
    broken.set_config(model_type="llama")
    refused(broken.directory, tensor=None, wanted="DeepSeek-V4", got="model_type must be 'deepseek_v4', got 'llama'")
    other = copy.__call__("modelopt")
    with pytest.raises(CheckpointError, match="hidden_size=256, got hidden_size=128"):
        load(replace(config, hidden_size=256), other.directory, progress=False)


def test_schedule_of_another_model(copy: Copies) -> None:
    """A CSA layer taken for an HCA layer lacks nothing but has too much; the shapes tell."""
    broken = copy("native")
    broken.set_config(compress_ratios=[0, 8, 8, 4, 0])
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.compressor"):
        Checkpoint(broken.directory)


# --- models ----------------------------------------------------------------------------------------------------------


def test_model_built_for_other_weights(made: dict[Family, Path], config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"mtp\.0\..*wanted a weight for the model's"):
        load(Transformer(config, device="meta"), made["modelopt"], progress=False)
    bare = replace(config, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"wanted weights that the model has a place for"):
        load(Transformer(bare, device="meta"), made["native"], progress=False)


def test_draft_blocks_from_another_checkpoint(made: dict[Family, Path], copy: Copies) -> None:
    model = load(None, made["modelopt"], drafts=made["native"], progress=False)
    own, native = dict(load(None, made["modelopt"]).weights()), dict(load(None, made["native"]).weights())
    got = dict(model.weights())
    assert got.keys() == native.keys()
    assert model.config.num_nextn_predict_layers == 1
    assert torch.equal(got["mtp.0.ffn.w13"].data, native["mtp.0.ffn.w13"].data)  # type: ignore[union-attr]
    assert torch.equal(got["layers.1.ffn.w13"].data, own["layers.1.ffn.w13"].data)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="its own"):
        load(None, made["native"], drafts=made["native"], progress=False)
    with pytest.raises(CheckpointError, match="wanted draft blocks, got none"):
        load(None, made["modelopt"], drafts=made["modelopt"], progress=False)
    other = copy("native")
    other.set_config(swiglu_limit=7.0)
    with pytest.raises(CheckpointError, match=r"swiglu_limit=10\.0, got swiglu_limit=7\.0"):
        load(None, made["modelopt"], drafts=other.directory, progress=False)


def test_shared_expert_rows_that_do_not_align(config: ModelConfig, tmp_path: Path) -> None:
    """FP8 gate and up are stacked by blocks of 128 rows."""
    from model.checkpoint import make_checkpoint

    odd = replace(
        config, moe_intermediate_size=96, num_hidden_layers=1, compress_ratios=(0,), num_nextn_predict_layers=0
    )
    make_checkpoint(tmp_path / "odd", odd, "native", seed=0, progress=False)
    with pytest.raises(CheckpointError, match=r"wanted rows in blocks of 128 \(gate and up are stacked\), got 96 rows"):
        load(None, tmp_path / "odd", progress=False)


# --- the writer ------------------------------------------------------------------------------------------------------


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.safetensors", {"x": TensorSpec("F32", (2, 3)), "y": TensorSpec("U8", ())})
    with pytest.raises(ValueError, match=r"x: announced F32 \[2, 3\], got torch\.float32 \[3, 2\]"):
        writer.write("x", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x: announced F32 \[2, 3\], got torch\.float64"):
        writer.write("x", torch.zeros(2, 3, dtype=torch.float64))
    writer.write("x", torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match="x was written before"):
        writer.write("x", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 tensors were not written, such as y"):
        writer.close()
    writer.write("y", torch.tensor(7, dtype=torch.uint8))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["x"], torch.arange(6.0).view(2, 3))
    assert int(found["y"]) == 7
