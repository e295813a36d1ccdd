"""Token generation for many prompts at once: sequences join as slots and pages come free, and leave when they end.

Each step is one batch: a chunk of the prompts that are not read yet, one token for each of the others. What a sequence
samples depends on its own seed and its own logits alone, not on its neighbours.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4suite import ops

from .cache import KVCache, OutOfPages
from .transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 takes the most probable token. eos None never ends early. seed: of prompt i, seed + i."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass(slots=True)
class Request:
    """One prompt and what came of it."""

    index: int
    prompt: list[int]
    random: torch.Generator
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    read: int = 0  # tokens of the prompt that are in the cache


def generate(
    model: Transformer,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    chunk: int = 512,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, the end token included if it came.

    cache: empty; as many sequences run at a time as it has slots and pages for. chunk: prompt tokens in one step, over
    all sequences. on_token(prompt index, token id) is called as tokens come.
    Raises ValueError for an empty prompt or one that cannot fit, OutOfPages if a single sequence is too much for the
    cache.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    waiting = deque(_sequences(prompts, sampling, cache))
    running: list[Request] = []
    results = [s.tokens for s in waiting]
    try:
        while waiting or running:
            while waiting:
                first = waiting[0]
                try:
                    first.slot = cache.open(len(first.prompt) + sampling.max_new_tokens - 1)
                except OutOfPages:
                    if not running:
                        raise
                    break
                running.append(waiting.popleft())
            step = list(_next_tokens(running, min(chunk, cache.step_tokens)))
            batch = cache.prepare([(s.slot, ids) for s, ids in step])
            with torch.inference_mode():
                logits = model(batch, cache)  # [sequences, vocab]
            for s, ids in step:
                if s.read < len(s.prompt):
                    s.read += len(ids)
            ready = [(row, s) for row, (s, _) in enumerate(step) if s.read == len(s.prompt)]
            for (_, s), token in zip(ready, _sample(logits, ready, sampling), strict=True):
                s.tokens.append(token)
                if on_token is not None:
                    on_token(s.index, token)
                if token == sampling.eos or len(s.tokens) == sampling.max_new_tokens:
                    cache.close(s.slot)
                    running.remove(s)
    finally:
        for s in running:
            cache.close(s.slot)
    return results


def _sequences(prompts: Sequence[Sequence[int]], sampling: Sampling, cache: KVCache) -> Iterator[Request]:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty")
        total = len(prompt) + sampling.max_new_tokens - 1  # the last token is never fed back
        if total > cache.max_tokens:
            raise ValueError(
                f"prompt {index} needs {total} tokens of context, the cache is made for {cache.max_tokens}"
            )
        yield Request(index, list(prompt), torch.Generator().manual_seed(sampling.seed + index))


def _next_tokens(running: list[Request], budget: int) -> Iterator[tuple[Request, list[int]]]:
    """One token of every sequence that generates, and prompt chunks up to `budget` tokens in all."""
    for s in running:
        if s.read == len(s.prompt):
            yield s, s.tokens[-1:]
        elif budget:
            ids = s.prompt[s.read : s.read + budget]
            budget -= len(ids)
            yield s, ids


def _sample(logits: Tensor, ready: list[tuple[int, Request]], sampling: Sampling) -> list[int]:
    if not ready:
        return []
    logits = logits[[row for row, _ in ready]]
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    uniform = torch.tensor([torch.rand((), generator=s.random).item() for _, s in ready], device=logits.device)
    ones = torch.ones_like(uniform)
    return ops.sample(logits, sampling.temperature * ones, sampling.top_p * ones, uniform).tolist()
