"""What cache formats cost: logits of the same FP32 weights over coarser rows and index keys, against FP32 rows.

Random weights amplify every error (transformers' own BF16 run of such a net is 20 % off), so these bounds are for
regressions: about one and a half times what was measured over three seeds. `tests/fp4suite/reference/test_cache.py`
has the errors of the rows themselves.
"""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.oracle import cache_for, random_model, relative_error, run

TINY = ModelConfig.named("tiny")


def logits(model: Transformer, kv_format: str, index_format: str, chunks: tuple[int, ...] = (130, 40)) -> Tensor:
    ids = torch.randint(288, (sum(chunks),), generator=torch.Generator().manual_seed(7)).tolist()
    cache = cache_for(model.config, kv_format=kv_format, index_format=index_format)
    slot, at, steps = cache.open(), 0, []
    for size in chunks:
        steps.append([(slot, ids[at : at + size])])
        at += size
    return run(model, cache, steps)[slot]


@functools.cache
def exact(config: ModelConfig, seed: int) -> tuple[Transformer, Tensor]:
    """A model, and its logits over rows of FP32."""
    model = random_model(config, seed)
    return model, logits(model, "fp32", "fp32")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kv_format", "limit"), [("bf16", 0.08), ("fp8_ds_mla", 0.2), ("nvfp4", 0.4)])
def test_rows_of_a_tiny_model(kv_format: str, limit: float, seed: int) -> None:
    """Every entry is chosen, so that the indexer's choices stay out of it. Measured: 0.03, 0.13, 0.28."""
    model, want = exact(replace(TINY, index_topk=64), seed)
    error = relative_error(logits(model, kv_format, "fp32"), want)
    assert limit / 100 < error < limit


@pytest.mark.parametrize(("index_format", "limit"), [("bf16", 0.04), ("fp8", 0.2), ("mxfp4", 0.4)])
def test_index_keys_of_a_tiny_model(index_format: str, limit: float) -> None:
    """Other scores choose other entries: top-3 of up to 42. Measured: 0.01, 0.13, 0.24."""
    model, want = exact(TINY, 0)
    error = relative_error(logits(model, "fp32", index_format), want)
    assert limit / 100 < error < limit


@pytest.mark.parametrize(
    ("kv_format", "index_format", "limit"),
    [("bf16", "bf16", 0.015), ("fp8_ds_mla", "fp8", 0.09), ("nvfp4", "mxfp4", 0.18)],
)
def test_rows_of_the_released_width(kv_format: str, index_format: str, limit: float) -> None:
    """512-wide heads of the demo model. Measured: 0.003 to 0.009, 0.055, 0.12."""
    model, want = exact(ModelConfig.named("demo"), 0)
    error = relative_error(logits(model, kv_format, index_format), want)
    assert error < limit


@pytest.mark.parametrize(("kv_format", "index_format"), [("fp8_ds_mla", "fp8"), ("nvfp4", "mxfp4")])
def test_prefill_and_decode_see_the_same_rounded_rows(kv_format: str, index_format: str) -> None:
    """Queries read what was stored, in prefill too: chunks change only the order of sums (rarely a rounding)."""
    model = random_model(TINY, seed=1)
    whole = logits(model, kv_format, index_format, (48,))
    assert relative_error(logits(model, kv_format, index_format, (20,) + (1,) * 28), whole) < 1e-2
