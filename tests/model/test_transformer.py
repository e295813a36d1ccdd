"""The whole model against transformers' DeepseekV4ForCausalLM, FP32 on the CPU: every way of splitting the same tokens.

The limit is 1e-5 relative Frobenius error of the logits; both sides sum FP32 in their own order (about 7e-7).
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import ops
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.transformer import Transformer
from tests.model.oracle import REAL_RATIOS, SMALL, cache_for, greedy, logits_of, oracle, ours, relative_error, run

LIMIT = 1e-5

# every epsilon and limit large enough to be seen: at their own sizes, an error in their place would hide under LIMIT
LOUD = replace(
    SMALL,
    hc_eps=0.02,
    hc_sinkhorn_iters=3,
    rms_norm_eps=0.05,
    swiglu_limit=0.3,
    routed_scaling_factor=2.5,
    num_hash_layers=2,
)


def tokens(config: ModelConfig, count: int, seed: int = 1) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def small() -> tuple[Transformer, list[int], Tensor]:
    theirs = oracle(SMALL)
    ids = tokens(SMALL, 61)
    return ours(SMALL, theirs), ids, logits_of(theirs, ids)


@pytest.mark.parametrize("config", [SMALL, LOUD, REAL_RATIOS], ids=["small", "loud", "real ratios"])
def test_full_prefill(config: ModelConfig) -> None:
    theirs = oracle(config, seed=3)
    ids = tokens(config, 400 if config is REAL_RATIOS else 61)
    cache = cache_for(config)
    got = run(ours(config, theirs), cache, [[(cache.open(), ids)]])[0]
    want = logits_of(theirs, ids)
    assert relative_error(got, want) < LIMIT
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_every_split_into_prefill_and_decode(small: tuple[Transformer, list[int], Tensor]) -> None:
    """Sixty sequences side by side; sequence p reads p tokens at once and the others one by one."""
    model, ids, want = small
    cache = cache_for(SMALL, slots=60, max_tokens=61)
    slots = {cache.open(): p for p in range(1, 61)}
    steps = [[(slot, ids[:p]) for slot, p in slots.items()]]
    for i in range(60):
        steps.append([(slot, [ids[p + i]]) for slot, p in slots.items() if p + i < 61])
    for slot, got in run(model, cache, steps).items():
        assert relative_error(got, want) < LIMIT, f"prefill of {slots[slot]}"
        assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("chunks", [(5, 9, 17, 30), (4, 4, 8, 45), (1, 2, 3, 55), (61,), (1,) * 61, (7,) * 8 + (5,)])
def test_chunked_prefill(small: tuple[Transformer, list[int], Tensor], chunks: tuple[int, ...]) -> None:
    model, ids, want = small
    cache = cache_for(SMALL)
    slot, at, steps = cache.open(), 0, []
    for size in chunks:
        steps.append([(slot, ids[at : at + size])])
        at += size
    assert relative_error(run(model, cache, steps)[slot], want) < LIMIT


def test_real_ratios_in_chunks_and_decode() -> None:
    """Across boundaries of 128: a full window, CSA choosing 16 of up to 97 entries, HCA emitting at 127, 255, 383."""
    theirs = oracle(REAL_RATIOS)
    model, ids = ours(REAL_RATIOS, theirs), tokens(REAL_RATIOS, 390)
    want = logits_of(theirs, ids)
    cache = cache_for(REAL_RATIOS, slots=2, page_tokens=128, window_page=16)
    a, b = cache.open(), cache.open()
    steps = [[(a, ids[:120]), (b, ids[:250])], [(a, ids[120:129]), (b, ids[250:382])]]
    steps += [[(a, [ids[129 + i]]), (b, [ids[382 + i]])] for i in range(8)]
    steps += [[(a, ids[137:255])]] + [[(a, [i])] for i in ids[255:259]]
    got = run(model, cache, steps)
    assert relative_error(got[b], want) < LIMIT
    assert relative_error(got[a], want[:259]) < LIMIT


def test_any_mix_of_sequences_and_steps() -> None:
    """Sequences of different lengths join, pause, bring chunks of any size, end, and leave their slot to another."""
    theirs = oracle(SMALL)
    model, dice = ours(SMALL, theirs), random.Random(5)
    cache = cache_for(SMALL, slots=4, max_tokens=80, page_tokens=16, window_page=4)
    waiting = [tokens(SMALL, length, seed=length) for length in (1, 3, 4, 8, 13, 37, 61, 80, 24)]
    running: dict[int, tuple[list[int], list[Tensor]]] = {}
    while waiting or running:
        while waiting and len(running) < 4:
            running[cache.open()] = (waiting.pop(), [])
        step = []
        for slot, (ids, _) in running.items():
            at = cache.length(slot)
            if dice.random() < 0.7:
                step.append((slot, ids[at : at + dice.choice((1, 1, 2, 5, 11))]))
        if not step:
            continue
        for slot, logits in run(model, cache, [step]).items():
            ids, parts = running[slot]
            parts.append(logits)
            if cache.length(slot) == len(ids):
                assert relative_error(torch.cat(parts), logits_of(theirs, ids)) < LIMIT, f"{len(ids)} tokens"
                del running[slot]
                cache.close(slot)


def test_greedy_generation_of_many_prompts() -> None:
    theirs = oracle(SMALL)
    prompts = [tokens(SMALL, length, seed=length) for length in (2, 31, 7, 12, 1)]
    cache = cache_for(SMALL, slots=3, max_tokens=64, page_tokens=16, window_page=4)
    got = generate(ours(SMALL, theirs), cache, prompts, Sampling(max_new_tokens=24), chunk=10)
    assert got == [greedy(theirs, prompt, 24) for prompt in prompts]


def test_nothing_stale_is_read(small: tuple[Transformer, list[int], Tensor]) -> None:
    """Pages and rings start as NaN in every byte, and are so again when a slot is reused."""
    model, ids, want = small
    cache = cache_for(SMALL, slots=2)
    for _ in range(2):
        for layer in cache.layers:
            for pages in (layer.window, layer.compressed, layer.index):
                if pages is not None:
                    pages.data.fill_(0xFF)
            for state in (layer.state, layer.index_state):
                if state is not None:
                    state.fill_(float("nan"))
        slot = cache.open()
        got = run(model, cache, [[(slot, ids[:30])], [(slot, ids[30:31])], [(slot, ids[31:])]])[slot]
        assert relative_error(got, want) < LIMIT
        cache.close(slot)


MUTANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "window one row short": lambda c: replace(c, sliding_window=c.sliding_window - 1),
    "window one row long": lambda c: replace(c, sliding_window=c.sliding_window + 1),
    "compressed layers with the plain RoPE base": lambda c: replace(c, compress_rope_theta=c.rope_theta),
    "window layers with the compressed RoPE base": lambda c: replace(c, rope_theta=c.compress_rope_theta),
    "no YaRN": lambda c: replace(c, rope_scaling=replace(c.rope_scaling, factor=1.0)),
    "no SwiGLU clamp": lambda c: replace(c, swiglu_limit=1e9),
    "routed scale lost": lambda c: replace(c, routed_scaling_factor=1.0),
    "one Sinkhorn step less": lambda c: replace(c, hc_sinkhorn_iters=c.hc_sinkhorn_iters - 1),
    "no mHC epsilon": lambda c: replace(c, hc_eps=1e-9),
    "one entry more": lambda c: replace(c, index_topk=c.index_topk + 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_oracle_catches_a_wrong_number(name: str) -> None:
    theirs = oracle(LOUD)
    ids, wrong = tokens(LOUD, 61), MUTANTS[name](LOUD)
    assert _error(wrong, theirs, ids) > 10 * LIMIT


def _patched(name: str) -> tuple[str, Callable[..., object]]:
    real = {n: getattr(ops, n) for n in dir(ops) if not n.startswith("_")}

    def pre_with_pre_and_post_swapped(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *rest: object, **how: object):
        n = h.shape[1]
        order = [*range(n, 2 * n), *range(n), *range(2 * n, len(base))]
        return real["hyper_connection_pre"](h, fn[order], base[order], scale, *rest, **how)

    def closed_by(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[str, Callable[..., object]]:
        def post_pre(y: Tensor, h: Tensor, post: Tensor, comb: Tensor, *rest: object, **how: object) -> object:
            return real["hyper_connection_post_pre"](y, h, *change(post, comb), *rest, **how)

        return "hyper_connection_post_pre", post_pre

    def weights_from_bias(logits: Tensor, **how):
        ids, weights = real["route"](logits, **how)
        if how["bias"] is not None:
            weights = weights + how["bias"][ids.long()]
        return ids, weights

    def shifted(at: int):
        def compress(*operands: object, positions: Tensor, ratio: int, **how: object):
            table = operands[4][at * ratio :] if at > 0 else operands[4]
            return real["compress_kv"](*operands[:4], table, *operands[5:], positions=positions, ratio=ratio, **how)

        return compress

    def no_overlap(*operands, ratio: int, **how: object):
        kv, gate = operands[0].clone(), operands[1].clone()
        if ratio == 4:
            gate[:, : gate.shape[1] // 2] = -1e30
        return real["compress_kv"](kv, gate, *operands[2:], ratio=ratio, **how)

    def ape_on_values(kv, gate, ape, *operands, positions: Tensor, ratio: int, **how):
        kv = kv + ape[positions.long() % ratio]
        return real["compress_kv"](kv, gate, 0 * ape, *operands, positions=positions, ratio=ratio, **how)

    return {
        "no inverse RoPE": ("rope_inverse_", lambda o, positions, table: o),
        "no sink": (
            "sparse_attention",
            lambda q, c, i, sink, s: real["sparse_attention"](q, c, i, 0 * sink - 1e30, s),
        ),
        "wrong scale": ("sparse_attention", lambda q, c, i, k, s: real["sparse_attention"](q, c, i, k, 1.01 * s)),
        "window only": ("sparse_attention", lambda q, c, i, k, s: real["sparse_attention"](q, c[:1], i[:1], k, s)),
        "q not normed": ("qnorm_rope", lambda q, p, t, eps: real["qnorm_rope"](q, p, t, eps) * q.std()),
        "q turned at the next position": ("qnorm_rope", lambda q, p, t, eps: real["qnorm_rope"](q, p + 1, t, eps)),
        "comb not transposed": closed_by(lambda post, comb: (post, comb.transpose(1, 2))),
        "post without its factor 2": closed_by(lambda post, comb: (post / 2, comb)),
        "post with epsilon": closed_by(lambda post, comb: (post + 0.02, comb)),
        "pre and post swapped": ("hyper_connection_pre", pre_with_pre_and_post_swapped),
        "weights from biased scores": ("route", weights_from_bias),
        "bias unused": ("route", lambda logits, **how: real["route"](logits, **(how | {"bias": None}))),
        "table unused": (
            "route",
            lambda logits, **how: real["route"](logits, **(how | {"token_ids": None, "table": None})),
        ),
        "entries turned one window late": ("compress_kv", shifted(1)),
        "no overlap": ("compress_kv", no_overlap),
        "ape on the values": ("compress_kv", ape_on_values),
        "shared expert not clamped": ("swiglu", lambda x, limit, dtype: real["swiglu"](x, 1e9, dtype)),
        "index weights clamped": (
            "index_logits",
            lambda q, w, *rest, **how: real["index_logits"](q, w.relu(), *rest, **how),
        ),
        "index query not turned": ("index_query", lambda q, p, t, **how: q),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "no inverse RoPE",
        "no sink",
        "wrong scale",
        "window only",
        "q not normed",
        "q turned at the next position",
        "comb not transposed",
        "post without its factor 2",
        "post with epsilon",
        "pre and post swapped",
        "weights from biased scores",
        "bias unused",
        "table unused",
        "entries turned one window late",
        "no overlap",
        "ape on the values",
        "shared expert not clamped",
        "index weights clamped",
        "index query not turned",
    ],
)
def test_the_oracle_catches_a_wrong_equation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ids = oracle(LOUD), tokens(LOUD, 61)
    _take_pairs_apart(monkeypatch)
    monkeypatch.setattr(ops, *_patched(name))
    assert _error(LOUD, theirs, ids) > 10 * LIMIT


def _take_pairs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that do two things of a CSA layer in one launch call the two ops, either of which may be wrong."""

    def compress_kv_pair(entries: Any, keys: Any, table: Any, eps: float, **step: Any) -> None:
        for x in (entries, keys):
            own = (x.kv, x.gate, x.ape, x.weight, table, eps, x.state, x.cache)
            ops.compress_kv(*own, **step, hadamard=x.hadamard)

    def csa_queries(q: Any, index_q: Any, p: Any, t: Any, eps: float, **how: Any) -> Any:
        return ops.qnorm_rope(q, p, t, eps), ops.index_query(index_q, p, t, **how)

    monkeypatch.setattr(ops, "compress_kv_pair", compress_kv_pair)
    monkeypatch.setattr(ops, "csa_queries", csa_queries)


def _error(config: ModelConfig, theirs: object, ids: list[int]) -> float:
    cache = cache_for(config)
    return relative_error(run(ours(config, theirs), cache, [[(cache.open(), ids)]])[0], logits_of(theirs, ids))
