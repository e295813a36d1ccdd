"""What the small models ask for has a kernel on every architecture, wherever the op has any."""

import pytest
import torch

import fp4suite
from fp4suite import registry
from fp4suite.dispatch import Target, choose_for
from model.config import ModelConfig
from tests.model.oracle import cache_for, random_model, run
from tests.model.test_linear import modelopt


@pytest.mark.parametrize(("name", "dtype"), [("tiny", "fp32"), ("demo", "bf16")])
def test_every_problem_has_a_kernel(name: str, dtype: str) -> None:
    """A long prompt, two sequences side by side, then a token of each; everything in one type, and in packed ones."""
    config = ModelConfig.named(name)
    packed = {} if dtype == "fp32" else {"weight_format": modelopt, "act_dtype": torch.bfloat16, "act_format": "nvfp4"}
    model = random_model(config, seed=1, **packed)
    asked = {}
    for index_format in (dtype, "fp8", "mxfp4"):
        cache = cache_for(config, slots=2, kv_format=dtype, index_format=index_format, max_tokens=1024)
        a, b = cache.open(), cache.open()
        with fp4suite.recording() as choices:
            long = list(range(4 * config.index_topk + 8))  # two entries more than are chosen
            run(model, cache, [[(a, long), (b, list(range(7)))], [(a, [5]), (b, [6])]])
        asked |= {(c.op, c.problem): None for c in choices if c.problem is not None}
    assert {"csa_queries", "compress_kv_pair", "index_logits", "index_topk"} <= {op for op, _ in asked}
    for arch in ("sm_90a", "sm_100a"):
        target = Target(arch, arch)
        found = [choose_for(op, problem, target) for op, problem in asked if registry.kernels(op, arch)]
        assert all(choice.kernel != registry.REFERENCE for choice in found)
