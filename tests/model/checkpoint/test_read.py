"""Loading: what the files say reaches the model bit by bit, in every family, and within a bounded amount of memory."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import FP8BlockTensor, NVFP4Tensor
from model.checkpoint.inventory import FAMILIES, Family, TensorSpec, inventory, params
from model.checkpoint.read import Checkpoint, Weight
from model.checkpoint.weights import random_weight
from model.checkpoint.write import make_checkpoint
from model.config import ModelConfig

from .conftest import SEED, Copy

Copies = Callable[[Family], Copy]


def load_all(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(safetensors.torch.load_file(file))
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_weight(a: Weight, b: Weight) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and same_bits(a, b)
    parts = ("data", "sf", "alpha") if isinstance(a, NVFP4Tensor) else ("data", "sf")
    return type(a) is type(b) and all(same_bits(getattr(a, part), getattr(b, part)) for part in parts)


def dense(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.float()
    if isinstance(weight, FP8BlockTensor):
        return reference.dequant_fp8_block(weight, torch.float32)
    n = weight.shape[-2]
    lead = weight.data.ndim - 2
    segments = None if weight.alpha.ndim == lead else (n // 2, n // 2)
    return reference.dequant_nvfp4(weight, torch.float32, segments=segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_recognised(family: Family, made: dict[Family, Path], config: ModelConfig) -> None:
    checkpoint = Checkpoint(made[family])
    assert checkpoint.family == family
    drafts = 0 if family == "modelopt" else 1
    assert checkpoint.config == replace(config, num_nextn_predict_layers=drafts)
    assert checkpoint.bytes == sum(t.nbytes for t in load_all(made[family]).values())


@pytest.mark.parametrize("family", ["nvfp4-experts", "modelopt"])
def test_nvfp4_codes_and_scales_keep_every_bit(family: Family, made: dict[Family, Path], config: ModelConfig) -> None:
    files, weights = load_all(made[family]), dict(Checkpoint(made[family]).weights())
    names = ("w1", "w3", "w2") if family == "nvfp4-experts" else ("gate_proj", "up_proj", "down_proj")
    mlp = "layers.{}.ffn" if family == "nvfp4-experts" else "model.layers.{}.mlp"
    inner = config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        w13, w2 = weights[f"layers.{layer}.ffn.w13"], weights[f"layers.{layer}.ffn.w2"]
        assert isinstance(w13, NVFP4Tensor)
        assert isinstance(w2, NVFP4Tensor)
        assert w13.shape == (config.n_routed_experts, 2 * inner, config.hidden_size)
        assert w2.shape == (config.n_routed_experts, config.hidden_size, inner)
        assert w13.alpha.shape == (config.n_routed_experts, 2)
        assert w2.alpha.shape == (config.n_routed_experts,)
        for expert in range(config.n_routed_experts):
            for i, (name, rows) in enumerate(
                zip(names, (slice(0, inner), slice(inner, None), slice(None)), strict=True)
            ):
                stacked = w2 if i == 2 else w13
                stored = f"{mlp.format(layer)}.experts.{expert}.{name}"
                assert same_bits(stacked.data[expert, rows], files[f"{stored}.weight"])
                assert same_bits(stacked.sf[expert, rows], files[f"{stored}.weight_scale"])
                alpha = stacked.alpha[expert] if i == 2 else stacked.alpha[expert, i]
                assert same_bits(alpha, files[f"{stored}.weight_scale_2"])
    if family == "modelopt":  # linears and the shared expert as well
        wq_a = weights["layers.2.attn.wq_a"]
        assert isinstance(wq_a, NVFP4Tensor)
        assert same_bits(wq_a.data, files["model.layers.2.self_attn.q_a_proj.weight"])
        assert same_bits(wq_a.alpha, files["model.layers.2.self_attn.q_a_proj.weight_scale_2"])
        shared = weights["layers.2.ffn.shared.w13"]
        assert isinstance(shared, NVFP4Tensor)
        parts = [f"model.layers.2.mlp.shared_experts.{name}_proj" for name in ("gate", "up")]
        assert same_bits(shared.data, torch.cat([files[f"{part}.weight"] for part in parts]))
        assert same_bits(shared.alpha, torch.stack([files[f"{part}.weight_scale_2"] for part in parts]))
        assert shared.alpha[0] != shared.alpha[1]


def test_native_formats_keep_every_bit(made: dict[Family, Path]) -> None:
    files, weights = load_all(made["native"]), dict(Checkpoint(made["native"]).weights())
    wkv = weights["layers.1.attn.wkv"]  # [80, 128]: a ragged block
    assert isinstance(wkv, FP8BlockTensor)
    assert same_bits(wkv.data, files["layers.1.attn.wkv.weight"])
    assert same_bits(wkv.sf, files["layers.1.attn.wkv.scale"].view(torch.uint8))
    shared = weights["layers.1.ffn.shared.w13"]
    assert isinstance(shared, FP8BlockTensor)
    parts = [f"layers.1.ffn.shared_experts.{name}" for name in ("w1", "w3")]
    assert same_bits(shared.data, torch.cat([files[f"{part}.weight"] for part in parts]))
    assert same_bits(shared.sf, torch.cat([files[f"{part}.scale"].view(torch.uint8) for part in parts]))
    for name in ("embed", "layers.0.attn_norm", "mtp.0.norm", "layers.1.attn.compressor.wkv", "layers.0.ffn.gate"):
        loaded = weights[name]
        assert isinstance(loaded, Tensor)
        assert same_bits(loaded, files[f"{name}.weight"])
    table = weights["layers.0.ffn.gate.tid2eid"]
    assert isinstance(table, Tensor)
    assert table.dtype == torch.int32
    assert torch.equal(table.long(), files["layers.0.ffn.gate.tid2eid"])


def test_native_experts_keep_their_values(made: dict[Family, Path], config: ModelConfig) -> None:
    """MXFP4 -> NVFP4 loses nothing, draft block included, and the codes are the file's own."""
    checkpoint = Checkpoint(made["native"])
    files, weights, exact = (
        load_all(made["native"]),
        dict(checkpoint.weights()),
        dict(checkpoint.weights(weights="fp32")),
    )
    for prefix in ("layers.0", "layers.3", "mtp.0"):
        for name in ("w13", "w2"):
            cast, true = weights[f"{prefix}.ffn.{name}"], exact[f"{prefix}.ffn.{name}"]
            assert isinstance(cast, NVFP4Tensor)
            assert isinstance(true, Tensor)
            assert torch.equal(dense(cast), true)
        w2 = weights[f"{prefix}.ffn.w2"]
        assert isinstance(w2, NVFP4Tensor)
        assert same_bits(w2.data[3], files[f"{prefix}.ffn.experts.3.w2.weight"].view(torch.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_is_the_stored_weights_dequantised(family: Family, made: dict[Family, Path]) -> None:
    checkpoint = Checkpoint(made[family])
    stored, wide = dict(checkpoint.weights()), dict(checkpoint.weights(weights="fp32"))
    assert stored.keys() == wide.keys()
    for name, weight in wide.items():
        assert isinstance(weight, Tensor)
        assert weight.dtype == (torch.int32 if name.endswith("tid2eid") else torch.float32)
        assert torch.equal(weight.float(), dense(stored[name])), name


def test_fp32_family_is_what_was_drawn(made: dict[Family, Path], config: ModelConfig) -> None:
    weights = dict(Checkpoint(made["fp32"]).weights())
    for param in params(config):
        if param.name in weights:
            loaded = weights[param.name]
            assert isinstance(loaded, Tensor)
            assert torch.equal(loaded.float(), random_weight(param, config, SEED).float()), param.name
    w13 = weights["layers.2.ffn.w13"]
    assert isinstance(w13, Tensor)
    (up,) = (p for p in params(config) if p.name == "layers.2.ffn.experts.1.w3")
    assert torch.equal(w13[1, config.moe_intermediate_size :], random_weight(up, config, SEED))


@pytest.mark.parametrize("family", FAMILIES)
def test_formats_announce_what_comes(family: Family, made: dict[Family, Path]) -> None:
    checkpoint = Checkpoint(made[family])
    kinds = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "int32"}
    found = {}
    for name, weight in checkpoint.weights():
        if isinstance(weight, Tensor):
            found[name] = kinds[weight.dtype]
        else:
            found[name] = "nvfp4" if isinstance(weight, NVFP4Tensor) else "fp8"
    assert found == checkpoint.formats()


def test_a_scale_in_another_shard_than_its_weight(copy: Copies, made: dict[Family, Path]) -> None:
    moved = copy("modelopt")
    for suffix in ("weight_scale", "weight_scale_2"):
        name = f"model.layers.0.mlp.experts.0.gate_proj.{suffix}"
        taken: dict[str, Tensor] = {}
        moved.edit(name, lambda tensors, name=name, taken=taken: taken.update({name: tensors.pop(name)}))  # type: ignore[misc]
        moved.edit("lm_head.weight", lambda tensors, taken=taken: tensors.update(taken))  # type: ignore[misc]
    assert moved.file(name) != moved.file(name.removesuffix("_scale_2"))
    before, after = dict(Checkpoint(made["modelopt"]).weights()), dict(Checkpoint(moved.directory).weights())
    assert all(same_weight(before[key], after[key]) for key in before)


def test_one_file_without_an_index(made: dict[Family, Path], config: ModelConfig, tmp_path: Path) -> None:
    safetensors.torch.save_file(load_all(made["native"]), tmp_path / "model.safetensors")
    shutil.copy(made["native"] / "config.json", tmp_path)
    before, after = dict(Checkpoint(made["native"]).weights()), dict(Checkpoint(tmp_path).weights())
    assert before.keys() == after.keys()
    assert all(same_weight(before[key], after[key]) for key in before)


def test_spellings_of_the_same_checkpoint(copy: Copies, made: dict[Family, Path]) -> None:
    """Scalars as [1], no input_scale, weights_proj without `.scorer`, int32 tables, an FP8 KV cache's scales."""
    other = copy("modelopt")

    def respell(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"model.layers.0.self_attn.kv_proj.k_scale": torch.ones(())}
        for name, value in tensors.items():
            if name.endswith(".weight_scale_2"):
                value = value.view(1)
            elif name.endswith("tid2eid"):
                value = value.int()
            if not name.endswith(".input_scale"):
                found[name.replace(".scorer.", ".")] = value
        return found

    other.rewrite(respell)
    assert not any("scorer" in name or "input_scale" in name for name in other.index)
    before, after = dict(Checkpoint(made["modelopt"]).weights()), dict(Checkpoint(other.directory).weights())
    assert before.keys() == after.keys()
    assert all(same_weight(before[key], after[key]) for key in before)


def test_hyper_connections_in_bf16_are_widened(copy: Copies) -> None:
    other = copy("native")
    other.set("layers.0.hc_attn_fn", lambda t: t.bfloat16())
    weights = dict(Checkpoint(other.directory).weights())
    loaded = weights["layers.0.hc_attn_fn"]
    assert isinstance(loaded, Tensor)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, load_all(other.directory)["layers.0.hc_attn_fn"].float())


@pytest.mark.parametrize("family", ["native", "nvfp4-experts"])
def test_without_draft_block(family: Family, copy: Copies) -> None:
    bare = copy(family)
    bare.rewrite(lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("mtp.")})
    checkpoint = Checkpoint(bare.directory)
    assert checkpoint.config.num_nextn_predict_layers == 0
    assert not any(name.startswith("mtp.") for name, _ in checkpoint.weights())


def test_longer_schedules(copy: Copies) -> None:
    longer = copy("native")
    longer.set_config(compress_ratios=[0, 4, 8, 4, 0, 4, 4])
    assert Checkpoint(longer.directory).config.kind(3) == "csa"
    assert len(dict(Checkpoint(longer.directory).weights())) > 100


def test_mxfp4_blocks_out_of_range_are_counted(copy: Copies, caplog: pytest.LogCaptureFixture) -> None:
    """One block far below the rest: its values are rounded, the warning says where, everything else stays exact."""
    wide = copy("native")
    name = "layers.1.ffn.experts.2.w2"

    def shrink(scale: Tensor) -> Tensor:
        scale = scale.clone()
        scale.view(torch.uint8)[5, 1] = int(scale.view(torch.uint8).max()) - 19
        return scale

    wide.set(f"{name}.scale", shrink)
    checkpoint = Checkpoint(wide.directory)
    cast = dict(checkpoint.weights())["layers.1.ffn.w2"]
    assert "1 MXFP4 weights have blocks too small" in caplog.text
    assert f"{name} (1)" in caplog.text
    true = dict(checkpoint.weights(weights="fp32"))["layers.1.ffn.w2"]
    assert isinstance(true, Tensor)
    wrong = (dense(cast) != true).nonzero()
    assert len(wrong) > 0
    assert {(int(e), int(row), int(column) // 32) for e, row, column in wrong} == {(2, 5, 1)}


def test_a_released_size(tmp_path: Path) -> None:
    """All 69,187 tensors of Flash in 160 GB of holes: every header checked in seconds, nothing read or allocated."""
    config = ModelConfig.named("flash")
    shards: list[dict[str, TensorSpec]] = [{} for _ in range(46)]
    for number, (name, spec) in enumerate(inventory(config, "native").items()):
        shards[number * len(shards) // 69_187][name] = spec
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file, end, header = f"model-{number:05d}-of-00046.safetensors", 0, {}
        for name, spec in shard.items():
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.bytes]}
            end += spec.bytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (tmp_path / file).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.family == "native"
    assert checkpoint.bytes == 159_609_485_896
    assert checkpoint.formats()["layers.42.ffn.w13"] == "nvfp4"


MEASURE = """
import json, re, sys, threading, time
import torch
torch.set_num_threads(1)
from model.checkpoint.read import Checkpoint
from fp4suite.formats import NVFP4Tensor

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

checkpoint = Checkpoint(sys.argv[1])
small = dict(Checkpoint(sys.argv[2]).weights())  # every code path once, so that what libraries keep is counted before
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
kept = dict(checkpoint.weights())
peak = status("VmHWM") - before
tensors = []
for weight in kept.values():
    parts = ("data", "sf", "alpha") if isinstance(weight, NVFP4Tensor) else ("data", "sf")
    tensors += [weight] if isinstance(weight, torch.Tensor) else [getattr(weight, part) for part in parts]
print(json.dumps({"peak": peak, "held": sum(t.nbytes for t in tensors)}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the peak of memory")
@pytest.mark.parametrize("family", ["nvfp4-experts", "modelopt"])
def test_peak_memory(family: Family, made: dict[Family, Path], tmp_path: Path) -> None:
    """Loading takes the memory of the model and next to nothing more: no second copy of anything."""
    tiny = ModelConfig.named("tiny")
    small = replace(tiny, num_hidden_layers=2, compress_ratios=(4, 8), num_nextn_predict_layers=0)
    config = replace(small, hidden_size=512, moe_intermediate_size=512, n_routed_experts=32)
    make_checkpoint(tmp_path / "c", config, family, seed=0, shard_bytes=8 << 20, progress=False)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "c"), str(made[family])],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held"] > 26 << 20
    # 3 MiB for the allocator; the smaller of the stacks has 4.7 MB, the largest tensor of the files 0.3 MB
    assert found["peak"] < found["held"] + (3 << 20), found
