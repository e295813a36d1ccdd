"""Tokens a second of the whole model: prompts read in one step, and decode steps over a batch of sequences."""

import argparse
import time
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from .cache import KVCache
from .checkpoint import Checkpoint, load
from .runtime import expect_positions, pick_device, reference_where_no_kernel, synchronize, text_table
from .transformer import Transformer


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times prefill and decode, prints a table, returns the rows."""
    for name in ("context", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    device = pick_device(args.device)
    checkpoint = Checkpoint(args.checkpoint)
    progress = False if args.quiet else None
    model = load(None, checkpoint, device, weights=args.weights, act_format=args.act_format, progress=progress)
    formats = {"kv_format": args.kv_format, "index_format": args.index_format}
    rows = []
    for tokens in (*args.prefill, args.context + args.repeats + 1):
        expect_positions(model, tokens)
    cases = [("prefill", 1, n) for n in args.prefill] + [("decode", n, args.context) for n in args.batch]
    with reference_where_no_kernel(device) as references:
        for phase, sequences, tokens in tqdm(cases, desc="bench", disable=True if args.quiet else None):
            timed = _prefill if phase == "prefill" else _decode
            times = sorted(timed(model, sequences, tokens, args.repeats, device, formats))
            new = tokens if phase == "prefill" else sequences
            rows.append(
                {
                    "phase": phase,
                    "sequences": sequences,
                    "context": tokens,
                    "median_ms": 1e3 * median(times),
                    "p20_ms": 1e3 * times[int(0.2 * (len(times) - 1))],
                    "p80_ms": 1e3 * times[round(0.8 * (len(times) - 1))],
                    "tokens_per_s": new / median(times),
                }
            )
    print(text_table(list(rows[0]), [list(row.values()) for row in rows]))
    if references:
        print(f"on the reference, for want of a kernel: {', '.join(references)}")
    return {
        "checkpoint": str(checkpoint.directory),
        "family": checkpoint.family,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "weights": args.weights,
        "act_format": args.act_format,
        **formats,
        "ops_on_reference": references,
        "rows": rows,
    }


def _prefill(
    model: Transformer, sequences: int, tokens: int, repeats: int, device: torch.device, formats: dict[str, Any]
) -> list[float]:
    """Seconds to read prompts of `tokens` tokens in one step, from an empty cache; the first is not counted."""
    cache = KVCache(model.config, slots=sequences, max_tokens=tokens, device=device, **formats)
    times = []
    for _ in range(repeats + 1):
        slots = [cache.open() for _ in range(sequences)]
        times.append(_step(model, cache, [(slot, _prompt(model, tokens, slot)) for slot in slots], device))
        for slot in slots:
            cache.close(slot)
    return times[1:]


def _decode(
    model: Transformer, sequences: int, context: int, repeats: int, device: torch.device, formats: dict[str, Any]
) -> list[float]:
    """Seconds a step in which every sequence brings one token, from `context` tokens on; the first is not counted."""
    cache = KVCache(model.config, slots=sequences, max_tokens=context + repeats + 1, device=device, **formats)
    slots = [cache.open() for _ in range(sequences)]
    _step(model, cache, [(slot, _prompt(model, context, slot)) for slot in slots], device)
    times = [_step(model, cache, [(slot, [2]) for slot in slots], device) for _ in range(repeats + 1)]
    return times[1:]


def _step(model: Transformer, cache: KVCache, requests: list[tuple[int, list[int]]], device: torch.device) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        model(cache.prepare(requests), cache)
    synchronize(device)
    return time.perf_counter() - began


def _prompt(model: Transformer, tokens: int, slot: int) -> list[int]:
    generator = torch.Generator().manual_seed(slot)
    found: list[int] = torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()
    return found
