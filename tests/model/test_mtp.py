"""The draft (MTP) block, which transformers does not have: against its equations in FP64, and cases that isolate each.

The FP64 write-up below shares no code with the model or the references: one token at a time, loops and complex numbers.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp4suite import ops
from model.cache import KVCache
from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.oracle import SMALL, cache_for, random_model, relative_error

CONFIG = replace(
    SMALL,
    num_nextn_predict_layers=1,
    compress_ratios=(0, 4, 0),
    num_hidden_layers=2,
    num_hash_layers=1,
    hc_eps=0.02,
    hc_sinkhorn_iters=3,
    rms_norm_eps=0.05,
    swiglu_limit=0.3,
    sliding_window=5,
)
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]


@torch.inference_mode()
def draft(model: Transformer, sizes: tuple[int, ...] = (12,)) -> tuple[Tensor, Tensor, Tensor]:
    """Streams of the trunk, logits and streams of the draft block: twelve tokens in steps of these sizes."""
    cache: KVCache = cache_for(model.config)
    slot, at, parts = cache.open(), 0, []
    for size in sizes:
        batch = cache.prepare([(slot, IDS[at : at + size])])
        h = model.streams(batch, cache)
        parts.append((h, *model.draft(h, torch.tensor(IDS[at + 1 : at + size + 1]), batch, cache)))
        at += size
    h, logits, streams = (torch.cat(part) for part in zip(*parts, strict=True))
    return h, logits, streams


def in_fp64(model: Transformer, h: Tensor, next_ids: list[int]) -> Tensor:
    """Logits [tokens, vocab] of the block for one whole sequence."""
    c: ModelConfig = model.config
    w = {name: value.double() for name, value in model.weights() if isinstance(value, Tensor)}
    d, n, heads, head_dim, half = c.hidden_size, c.hc_mult, c.num_attention_heads, c.head_dim, c.qk_rope_head_dim // 2
    window: list[Tensor] = []
    out = []

    def p(name: str) -> Tensor:
        return w[f"mtp.0.{name}"]

    def norm(x: Tensor, weight: Tensor | float) -> Tensor:
        return x / torch.sqrt((x * x).sum() / x.numel() + c.rms_norm_eps) * weight

    def turn(x: Tensor, position: int, sign: int) -> Tensor:
        x = x.clone()
        for j in range(half):
            angle = sign * position * 10000.0 ** (-j / half)
            i = head_dim - 2 * half + 2 * j
            z = torch.complex(x[i], x[i + 1]) * torch.polar(torch.ones(()).double(), torch.tensor(angle).double())
            x[i], x[i + 1] = z.real, z.imag
        return x

    def site(streams: list[Tensor], which: str, block: Callable[[Tensor], Tensor]) -> list[Tensor]:
        u = torch.cat(streams)
        m = p(f"hc_{which}_fn") @ u / torch.sqrt((u * u).mean() + c.rms_norm_eps)
        base, scale = p(f"hc_{which}_base"), p(f"hc_{which}_scale")
        pre = [1 / (1 + torch.exp(-(m[i] * scale[0] + base[i]))) + c.hc_eps for i in range(n)]
        post = [2 / (1 + torch.exp(-(m[n + i] * scale[1] + base[n + i]))) for i in range(n)]
        mix = [[float(m[2 * n + n * j + k] * scale[2] + base[2 * n + n * j + k]) for k in range(n)] for j in range(n)]
        comb = torch.tensor(mix).double().exp()
        for j in range(n):
            comb[j] = comb[j] / comb[j].sum() + c.hc_eps
        for step in range(2 * c.hc_sinkhorn_iters - 1):
            for i in range(n):
                line = comb[:, i] if step % 2 == 0 else comb[i]
                line /= line.sum() + c.hc_eps
        x = norm(sum(a * s for a, s in zip(pre, streams, strict=True)), p(f"{which}_norm"))
        y = block(x)
        return [post[k] * y + sum(comb[j, k] * streams[j] for j in range(n)) for k in range(n)]

    def attend(x: Tensor) -> Tensor:
        position = len(window)
        c_q = norm(p("attn.wq_a") @ x, p("attn.q_norm"))
        q = (p("attn.wq_b") @ c_q).view(heads, head_dim)
        window.append(turn(norm(p("attn.wkv") @ x, p("attn.kv_norm")), position, 1))
        seen, o = window[-c.sliding_window :], []
        for i in range(heads):
            query = turn(norm(q[i], 1.0), position, 1)
            e = [torch.exp(query @ k / head_dim**0.5) for k in seen]
            total = sum(e) + torch.exp(p("attn.attn_sink")[i])
            o.append(turn(sum(a * k for a, k in zip(e, seen, strict=True)) / total, position, -1))
        per = heads // c.o_groups
        z = [
            p("attn.wo_a")[g * c.o_lora_rank : (g + 1) * c.o_lora_rank] @ torch.cat(o[g * per : (g + 1) * per])
            for g in range(c.o_groups)
        ]
        return p("attn.wo_b") @ torch.cat(z)

    def expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        g, u = (w13 @ x).chunk(2)
        g, u = g.clamp(max=c.swiglu_limit), u.clamp(-c.swiglu_limit, c.swiglu_limit)
        return w2 @ (g / (1 + torch.exp(-g)) * u)

    def experts(x: Tensor) -> Tensor:
        s = torch.sqrt(torch.log(1 + torch.exp(p("ffn.gate") @ x)))
        best = sorted(range(c.n_routed_experts), key=lambda e: -float(s[e] + p("ffn.gate.bias")[e]))
        best = best[: c.num_experts_per_tok]
        total = sum(s[e] for e in best)
        routed = sum(s[e] / total * expert(x, p("ffn.w13")[e], p("ffn.w2")[e]) for e in best)
        return c.routed_scaling_factor * routed + expert(x, p("ffn.shared.w13"), p("ffn.shared.w2"))

    for h_t, token in zip(h.double(), next_ids, strict=True):
        e = p("e_proj") @ norm(w["embed"][token], p("enorm"))
        streams = [e + p("h_proj") @ norm(h_t[i], p("hnorm")) for i in range(n)]
        streams = site(site(streams, "attn", attend), "ffn", experts)
        u = torch.cat(streams)
        m = p("hc_head_fn") @ u / torch.sqrt((u * u).mean() + c.rms_norm_eps) * p("hc_head_scale") + p("hc_head_base")
        y = sum((1 / (1 + torch.exp(-m[i])) + c.hc_eps) * streams[i] for i in range(n))
        assert y.shape == (d,)
        out.append(w["head"] @ norm(y, p("norm")))
    return torch.stack(out)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG, seed=4)


def test_equations_in_fp64(model: Transformer) -> None:
    h, logits, _ = draft(model)
    assert relative_error(logits, in_fp64(model, h, IDS[1:])) < 1e-6


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (3, 1, 1, 7)])
def test_drafting_in_steps(model: Transformer, sizes: tuple[int, ...]) -> None:
    _, want, streams = draft(model)
    _, got, again = draft(model, sizes)
    assert relative_error(got, want) < 1e-5
    assert relative_error(again, streams) < 1e-5


def test_a_second_block_takes_the_streams_of_the_first() -> None:
    """Two draft blocks with the same weights: the second's logits are the first's, had the trunk made those streams."""
    config = replace(CONFIG, num_nextn_predict_layers=2)
    model = random_model(config, seed=4)
    for name, value in list(model.weights()):
        if name.startswith("mtp.0."):
            model.set_weight(name.replace("mtp.0.", "mtp.1."), value)
    cache = cache_for(config)
    with torch.inference_mode():
        batch = cache.prepare([(cache.open(), IDS[:11])])
        _, streams = model.draft(model.streams(batch, cache), torch.tensor(IDS[1:12]), batch, cache)
        logits, _ = model.draft(streams, torch.tensor(IDS[2:13]), batch, cache, block=1)
    assert relative_error(logits, in_fp64(model, streams, IDS[2:13])) < 1e-6


def test_each_input_enters_by_its_own_projection(model: Transformer) -> None:
    """With e_proj zero the next token cannot matter, with h_proj zero the trunk cannot; hnorm takes streams singly."""
    other = random_model(CONFIG, seed=4)
    other.mtp[0].e_proj.weight = torch.zeros(64, 64)
    cache, batch, h = _step(other)
    with torch.inference_mode():
        a, _ = other.draft(h, torch.tensor([1, 2, 3]), batch, cache)
        b, _ = other.draft(h, torch.tensor([7, 8, 9]), batch, cache)
        assert torch.equal(a, b)
        other = random_model(CONFIG, seed=4)
        other.mtp[0].h_proj.weight = torch.zeros(64, 64)
        a, _ = other.draft(h, torch.tensor([1, 2, 3]), batch, cache)
        b, _ = other.draft(h.flip(0), torch.tensor([1, 2, 3]), batch, cache)
        assert torch.equal(a, b)
        scaled = h * torch.tensor([1.0, 100.0, 1.0, 1.0])[None, :, None]
        eps_free = random_model(replace(CONFIG, rms_norm_eps=1e-12), seed=4)
        a, _ = eps_free.draft(h, torch.tensor([1, 2, 3]), batch, cache)
        b, _ = eps_free.draft(scaled, torch.tensor([1, 2, 3]), batch, cache)
    assert relative_error(b, a) < 1e-4


def _step(model: Transformer):
    cache = cache_for(model.config)
    batch = cache.prepare([(cache.open(), IDS[:3])])
    with torch.inference_mode():
        return cache, batch, model.streams(batch, cache)


MUTANTS: dict[str, Callable[[Transformer], None]] = {
    "enorm and hnorm swapped": lambda m: _swap(m, "enorm", "hnorm"),
    "e_proj and h_proj swapped": lambda m: _swap(m, "e_proj", "h_proj"),
    "the trunk's final norm": lambda m: m.set_weight("mtp.0.norm", m.norm),
    "the trunk's fold": lambda m: m.set_weight("mtp.0.hc_head_fn", m.hc_head_fn),
    "the trunk's fold base": lambda m: m.set_weight("mtp.0.hc_head_base", m.hc_head_base),
    "the trunk's fold scale": lambda m: m.set_weight("mtp.0.hc_head_scale", m.hc_head_scale),
}


def _swap(model: Transformer, a: str, b: str) -> None:
    weights = dict(model.weights())
    a, b = f"mtp.0.{a}", f"mtp.0.{b}"
    model.set_weight(a, weights[b])
    model.set_weight(b, weights[a])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_weight_is_caught(name: str, model: Transformer) -> None:
    wrong = random_model(CONFIG, seed=4)
    MUTANTS[name](wrong)
    h, logits, _ = draft(wrong)
    assert relative_error(logits, in_fp64(model, h, IDS[1:])) > 1e-3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rope_inverse_", lambda o, positions, table: o),
        ("hyper_connection_head", lambda h, *rest, **how: h.mean(1)),
        ("hyper_connection_post", lambda y, h, post, comb: post[:, :, None] * y[:, None] + h),
    ],
)
def test_a_wrong_equation_is_caught(
    name: str, wrong: Callable[..., Tensor], model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    want_h, _, _ = draft(model)
    cache = cache_for(model.config)
    batch = cache.prepare([(cache.open(), IDS[:12])])
    monkeypatch.setattr(ops, name, wrong)
    with torch.inference_mode():
        logits, _ = model.draft(want_h, torch.tensor(IDS[1:]), batch, cache)
    assert relative_error(logits, in_fp64(model, want_h, IDS[1:])) > 1e-3
