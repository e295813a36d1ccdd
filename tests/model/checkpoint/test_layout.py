"""Weights laid out as they are loaded: the same numbers, the right ones only, and no second copy of any."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp4suite import dispatch, layouts, reference
from fp4suite.formats import NVFP4Tensor, WeightLayout
from model.checkpoint import codec
from model.checkpoint.inventory import Family
from model.checkpoint.load import load
from model.checkpoint.write import make_checkpoint
from model.config import ModelConfig
from model.linear import Linear
from model.transformer import Transformer
from tests.model.oracle import cache_for, relative_error, run

FRAGMENTS = WeightLayout(order="fragments_sm90")
BLOCKED = WeightLayout(sf_layout="blocked_128x4")
IDS = list(range(2, 60))


def logits(model: Transformer) -> torch.Tensor:
    cache = cache_for(model.config, kv_format="bf16", index_format="bf16")
    return run(model, cache, [[(cache.open(), IDS)]])[0]


def packed(model: Transformer) -> dict[str, tuple[NVFP4Tensor, bool]]:
    """NVFP4 weights by name, and whether `gemm_nvfp4` reads them."""
    dense = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: (w, name in dense) for name, w in model.weights() if isinstance(w, NVFP4Tensor)}


@pytest.mark.parametrize("act", ["float", "nvfp4"])
@pytest.mark.parametrize("layout", [FRAGMENTS, BLOCKED])
@pytest.mark.parametrize("family", ["modelopt", "native"])
def test_logits_are_the_same(family: Family, layout: WeightLayout, act: str, made: dict[Family, Path]) -> None:
    plain = load(None, made[family], act_format=act, progress=False)  # type: ignore[arg-type]
    model = load(None, made[family], act_format=act, layout=layout, progress=False)  # type: ignore[arg-type]
    seen = set()
    for name, (weight, dense) in packed(model).items():
        fits = dense and layout.refuses(*weight.shape[-2:]) is None
        assert weight.layout == (layout if fits else WeightLayout()), name
        seen.add((dense, weight.layout == layout))
        ours, theirs = weight.lay_out_(WeightLayout()), packed(plain)[name][0]
        assert torch.equal(ours.data, theirs.data)
        assert torch.equal(ours.sf.view(torch.uint8), theirs.sf.view(torch.uint8))
        ours.lay_out_(weight.layout)  # back, in the memory of the model
    assert (False, False) in seen  # experts, which another op reads
    assert family == "native" or (True, True) in seen
    assert family == "native" or layout == BLOCKED or (True, False) in seen  # 80 rows are not tiles of 64
    assert torch.equal(logits(model), logits(plain))


QUANTISERS = ("quantize_nvfp4", "rmsnorm_quantize", "swiglu_quantize", "rope_inverse_quantize")


def test_by_default_a_device_gets_what_its_kernels_read(made: dict[Family, Path]) -> None:
    """No GPU needed to ask: sm_100a reads blocked scales of weights and, so, of activations."""
    cpu = load(None, made["modelopt"], act_format="nvfp4", progress=False)
    assert {w.layout for w, _ in packed(cpu).values()} == {WeightLayout()}
    with dispatch.on_target("sm_100a"):
        model = load(None, made["modelopt"], act_format="nvfp4", progress=False)
    wanted = {}
    for name, (weight, dense) in packed(model).items():
        blocked = dense and weight.shape[0] % 8 == 0 and weight.shape[1] % 64 == 0  # what the kernel takes
        wanted[name] = BLOCKED if blocked else WeightLayout()
    assert {name: w.layout for name, (w, _) in packed(model).items()} == wanted
    assert BLOCKED in wanted.values()
    with dispatch.recording() as choices:
        laid_out = logits(model)
    with dispatch.recording() as plain:
        assert relative_error(laid_out, logits(cpu)) < 1e-5  # where linears are joined, FP32 sums have other orders
    takes = {w.shape for w, _ in packed(model).values() if w.layout == BLOCKED}
    layouts: dict[int, set[str]] = {}  # by k: those of the activations that have been quantised
    read = set()
    for choice in choices:
        p = choice.problem
        if choice.op == "gemm_nvfp4" and (p.n, p.k) in takes:
            assert "blocked_128x4" in layouts[p.k]
            read.add((p.n, p.k))
        elif choice.op in QUANTISERS:
            layouts.setdefault(p.k, set()).add(p.sf_layout)
    assert read == takes
    assert {c.problem.sf_layout for c in plain if c.op in QUANTISERS} == {"linear"}


def test_a_state_dict_knows_no_order(made: dict[Family, Path]) -> None:
    model = load(None, made["modelopt"], layout=FRAGMENTS, progress=False)
    with pytest.raises(ValueError, match=r'"fragments_sm90" is not written to a state dict: first put .* by rows'):
        model.state_dict()
    state = load(None, made["modelopt"], progress=False).state_dict()
    with pytest.raises(ValueError, match="is not read from a state dict"):
        model.load_state_dict(state)
    for name, (weight, _) in packed(model).items():
        model.set_weight(name, weight.with_order("rows"))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items() if t.dtype == torch.uint8)


def test_files_hold_rows_and_linear_scales() -> None:
    t = reference.quantize_nvfp4(torch.randn(128, 192))
    want = codec.nvfp4_tensors(t)
    for layout in (FRAGMENTS, BLOCKED):
        other = t.with_order(layout.order).with_sf_layout(layout.sf_layout)
        for suffix, stored in codec.nvfp4_tensors(other).items():
            assert torch.equal(stored.reshape(-1).view(torch.uint8), want[suffix].reshape(-1).view(torch.uint8))


def test_lay_out_of_other_weights_is_nothing() -> None:
    layer = Linear(64, 64)
    layer.weight = torch.randn(64, 64)
    layer.lay_out(FRAGMENTS, "cpu")
    assert layer.weight.shape == (64, 64)
    assert layer.order == "rows"


MEASURE = """
import json, re, sys
import torch
torch.set_num_threads(1)
from fp4suite import layouts
from fp4suite.formats import WeightLayout
from model.checkpoint.load import load

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

layouts.SCRATCH_BYTES = 1 << 17
layout = WeightLayout(order="fragments_sm90")
small = load(None, sys.argv[2], layout=layout)  # every code path once, so that what libraries keep is counted before
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
model = load(None, sys.argv[1], layout=layout)
peak = status("VmHWM") - before
orders = {name: module.order for name, module in model.named_modules() if hasattr(module, "order")}
held = sum(t.nbytes for t in model.buffers())
print(json.dumps({"peak": peak, "held": held, "orders": orders}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the peak of memory")
def test_peak_memory(made: dict[Family, Path], tmp_path: Path) -> None:
    """Reordering takes no second copy: the peak is the model and less than half of its largest weight (8 MB)."""
    tiny = ModelConfig.named("tiny")
    config = replace(tiny, num_hidden_layers=2, compress_ratios=(4, 8), num_nextn_predict_layers=0, n_routed_experts=4)
    config = replace(config, num_attention_heads=96, q_lora_rank=2048)
    make_checkpoint(tmp_path / "c", config, "modelopt", seed=0, shard_bytes=8 << 20, progress=False)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "c"), str(made["modelopt"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["orders"]["layers.1.attn.wq_b"] == layouts.FRAGMENTS_SM90
    assert found["held"] > 16 << 20
    assert found["peak"] < found["held"] + (4 << 20), found
