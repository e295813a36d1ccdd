"""The model on a GPU against itself on the CPU: ops with a kernel use it, the others run their references there."""

import pytest
import torch
from torch import Tensor

import fp4suite
from fp4suite import registry
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.runtime import reference_where_no_kernel
from model.transformer import Transformer
from tests.model.oracle import cache_for, random_model, relative_error, run
from tests.model.test_linear import modelopt, native

pytestmark = pytest.mark.gpu

TINY = ModelConfig.named("tiny")
DEMO = ModelConfig.named("demo")


def logits(model: Transformer, device: torch.device | str, kv_format: str, index_format: str) -> Tensor:
    """Logits of a prefill in chunks and some decoding, two sequences side by side."""
    cache = cache_for(model.config, slots=2, kv_format=kv_format, index_format=index_format, device=device)
    a, b = cache.open(), cache.open()
    ids = torch.randint(288, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    steps = [[(a, ids[:50]), (b, ids[:7])], [(a, ids[50:80]), (b, ids[7:8])]]
    steps += [[(a, [ids[80 + i]]), (b, [ids[8 + i]])] for i in range(10)]
    got = run(model, cache, steps)
    return torch.cat((got[a], got[b])).cpu()


def test_fp32_model(device: torch.device) -> None:
    """FP32 throughout, NVFP4 experts not included: the order of sums is all that differs."""
    model = random_model(TINY, seed=1)
    want = logits(model, "cpu", "fp32", "fp32")
    with reference_where_no_kernel(device):
        got = logits(model.to(device), device, "fp32", "fp32")
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("formats", [native, modelopt])
@pytest.mark.parametrize("act_format", ["float", "nvfp4"])
def test_packed_model(formats, act_format: str, device: torch.device) -> None:
    """Flipped roundings grow in random nets: other chunks alone cost 0.005 to 0.02, or 0.29 (W4A4), on a CPU."""
    model = random_model(DEMO, seed=1, weight_format=formats, act_dtype=torch.bfloat16, act_format=act_format)
    want = logits(model, "cpu", "bf16", "bf16")
    with reference_where_no_kernel(device), fp4suite.recording() as choices:
        got = logits(model.to(device), device, "bf16", "bf16")
    if formats is modelopt:
        assert any(c.op == "gemm_nvfp4" and c.kernel != registry.REFERENCE for c in choices)
    assert relative_error(got, want) < {"float": 0.06, "nvfp4": 0.4}[act_format]


def test_generation(device: torch.device) -> None:
    model = random_model(TINY, seed=2)
    prompts, sampling = [[5, 6, 7], list(range(2, 40))], Sampling(max_new_tokens=8)
    want = generate(model, cache_for(TINY, slots=2), prompts, sampling)
    with reference_where_no_kernel(device):
        assert generate(model.to(device), cache_for(TINY, slots=2, device=device), prompts, sampling) == want
