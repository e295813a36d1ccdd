"""Checkpoints against transformers: it loads ours by its own name map and gives the logits that we give."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from model.cache import KVCache
from model.checkpoint import Checkpoint, Family, convert, load, make_checkpoint
from model.config import ModelConfig


@pytest.mark.parametrize("family", ["fp32", "native", "nvfp4-experts", "modelopt"])
def test_same_logits(family: Family, tmp_path: Path) -> None:
    """FP32 weights as drawn, and each family's dequantised: its names, stacks and scales all come out right."""
    config = replace(ModelConfig.named("tiny"), compress_ratios=(0, 4, 128, 4, 0), n_routed_experts=4)
    make_checkpoint(tmp_path / "made", config, family, seed=4, shard_bytes=400_000, progress=False)
    plain = tmp_path / "made"
    if family != "fp32":
        plain = tmp_path / "plain"
        convert(Checkpoint(tmp_path / "made"), plain, "fp32", progress=False)
    theirs, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = torch.randint(config.vocab_size, (200,), generator=torch.Generator().manual_seed(0))

    ours = load(None, tmp_path / "made", weights="fp32", progress=False)
    cache = KVCache(ours.config, max_tokens=200, kv_format="fp32", index_format="fp32")
    with torch.inference_mode():
        want = theirs(tokens[None]).logits[0]
        batch = cache.prepare([(cache.open(), tokens.tolist())])
        got = ours.logits(ours.streams(batch, cache))
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert torch.equal(got.argmax(1), want.argmax(1))
