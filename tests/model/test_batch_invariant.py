"""Batch-invariant mode of the model: logits to the bit, whatever else is in the step and however it is cut."""

import pytest
import torch
from torch import Tensor

import fp4suite
from model.config import ModelConfig
from model.linear import ActFormat, Linear
from model.runtime import reference_where_no_kernel
from model.transformer import Transformer
from tests.model.oracle import cache_for, random_model, relative_error, run
from tests.model.test_linear import modelopt, native

TINY = ModelConfig.named("tiny")
IDS = torch.randint(2, 288, (30,), generator=torch.Generator().manual_seed(4)).tolist()
OTHERS = torch.randint(2, 288, (42,), generator=torch.Generator().manual_seed(5)).tolist()

# of IDS and OTHERS: how many tokens each step takes; all decode IDS from token 24 on
ALONE = [(24, 0), *[(1, 0)] * 6]
BESIDE = [(11, 3), (0, 14), (13, 1), *[(1, 1), (1, 7)] * 3]


def logits(
    model: Transformer, steps: list[tuple[int, int]], device: torch.device | str, kv_format: str = "bf16"
) -> Tensor:
    """Of IDS, all of them."""
    cache = cache_for(model.config, slots=2, kv_format=kv_format, index_format=kv_format, device=device)
    slots, at, batches = (cache.open(), cache.open()), [0, 0], []
    for counts in steps:
        batch = []
        for i, (ids, count) in enumerate(zip((IDS, OTHERS), counts, strict=True)):
            if count:
                batch.append((slots[i], ids[at[i] : at[i] + count]))
                at[i] += count
        batches.append(batch[::-1])  # the others first
    return run(model, cache, batches)[slots[0]].cpu()


@pytest.mark.parametrize(
    ("formats", "act"), [(lambda name: "bf16", "float"), (modelopt, "float"), (modelopt, "nvfp4"), (native, "float")]
)
def test_logits_do_not_depend_on_the_step(formats, act: ActFormat) -> None:
    """Prefill in one step or in two, decoding beside another sequence's prefill."""
    model = random_model(TINY, weight_format=formats, act_dtype=torch.bfloat16, act_format=act)
    with fp4suite.batch_invariant():
        want = logits(model, ALONE, "cpu")
        assert torch.equal(logits(model, BESIDE, "cpu"), want)
    assert want.isfinite().all()
    assert not torch.equal(logits(model, BESIDE, "cpu"), logits(model, ALONE, "cpu"))  # without the mode


@pytest.mark.parametrize("formats", [modelopt, native])
def test_w4a16_has_the_usual_numbers(formats) -> None:
    """FP32 activations, so that no rounding flips: the order of sums is all that differs."""
    model = random_model(TINY, weight_format=formats)
    usual = logits(model, ALONE, "cpu", "fp32")
    with fp4suite.batch_invariant():
        assert relative_error(logits(model, BESIDE, "cpu", "fp32"), usual) < 1e-5


def test_fixed_alpha_loses_no_more_than_one_of_the_data() -> None:
    """Where block maxima lie within its range; beyond it numbers saturate."""
    layer = Linear(96, 256, "nvfp4", act="nvfp4")
    layer.weight = fp4suite.reference.quantize_nvfp4(torch.randn(96, 256, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    exact = x @ fp4suite.reference.dequant_nvfp4(layer.weight, torch.float32).T
    for scale in (0.01, 1.0, 40.0):
        usual = relative_error(layer(scale * x), scale * exact)
        with fp4suite.batch_invariant():
            fixed = relative_error(layer(scale * x), scale * exact)
        assert fixed < 1.05 * usual


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["float", "nvfp4"])
def test_logits_on_a_gpu(act: ActFormat, device: torch.device) -> None:
    """Kernels keep to one order; ops that have none run token by token."""
    demo = ModelConfig.named("demo")
    if fp4suite.arch.current() == "sm_100a":
        act = "nvfp4"  # its tensor cores take nothing else beside packed weights
    model = random_model(demo, weight_format=modelopt, act_dtype=torch.bfloat16, act_format=act).to(device)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.lay_out(None, device)
    with reference_where_no_kernel(device), fp4suite.batch_invariant(), fp4suite.recording() as choices:
        want = logits(model, ALONE, device)
        assert torch.equal(logits(model, BESIDE, device), want)
    kernels: dict[object, set[str]] = {}
    for choice in choices:
        if choice.op == "gemm_nvfp4":
            p = choice.problem
            kernels.setdefault((p.n, p.k, p.out), set()).add(choice.kernel)
    assert kernels
    assert all(len(names) == 1 for names in kernels.values())
