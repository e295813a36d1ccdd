"""Inputs, outputs and checks of a problem: one set for tests, tuner and warm-up.

    case = testing.case(GemmProblem(m=7, n=256, k=512), "cuda", seed=0)
    case.run(module, config)      # outputs start as NaN or 0xFF
    case.check()                  # AssertionError with the worst element

Quantising kernels must give the reference's bytes. A GEMM is compared with the FP64 product of the decoded operands:
the tolerance covers the order of FP32 accumulation and the rounding of the output, not the loss of four bits.
"""

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from . import layouts, reference
from .formats import (
    BLOCK,
    E4M3_MAX,
    FP8RowTensor,
    IndexCache,
    IndexFormat,
    KVFormat,
    NVFP4Tensor,
    PagedCache,
    SfLayout,
    index_layout,
    kv_layout,
)
from .problem import (
    CombineProblem,
    CompressKvPairProblem,
    CompressKvProblem,
    CsaQueriesProblem,
    DequantProblem,
    EmbedProblem,
    GemmProblem,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPostProblem,
    HyperConnectionPreProblem,
    IndexLogitsProblem,
    IndexQueryProblem,
    IndexTopkProblem,
    KvNormRopeInsertProblem,
    PermuteProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    RouteProblem,
    SampleProblem,
    SwigluProblem,
    SwigluQuantizeProblem,
)
from .reference import CompressorStep, e2m1, fp8
from .reference.cache import FP8_FLOOR
from .reference.quant import global_scale, scaled_codes

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-6
LIMIT = 10.0
POSITIONS = 1 << 16  # of RoPE's table in cases
VERIFIED_TOKENS = 1024  # at a time, to bound what the reference needs
MOST_KEYS = 1 << 22  # in the cache of a case of `index_logits`
FP8_STEP = 32  # elements of K that an FP8 MMA of sm_90 adds at once
FP8_RUN = 128  # elements of K that an FP8 GEMM sums on the tensor cores alone, times its config's `promote`


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A problem with its operands. `operands` and `tail` go to launch around `out`; `poison` and `verify` act on it.

    eager: the reference on these operands, for a benchmark to compare with.
    """

    problem: Problem
    operands: tuple[Any, ...]
    out: Any
    tail: tuple[Any, ...]
    poison: Callable[[], Any]
    verify: Callable[[], None]
    eager: Callable[[], object] | None = None
    launched: list[Any] = field(default_factory=list, repr=False)  # the last launch's module and config
    _laid_out: dict[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def run(self, module: ModuleType, config: Any) -> None:
        """Poison the outputs, then launch."""
        self.poison()
        self.launch(module, config)

    def launch(self, module: ModuleType, config: Any) -> None:
        """Launch alone, for timing and graph capture."""
        self.launched[:] = [module, config]
        module.launch(*self.laid_out(module), self.out, *self.tail, config)

    def laid_out(self, module: ModuleType) -> tuple[Any, ...]:
        """The operands with their scales in the order that a GEMM's module reads; made once an order."""
        order = getattr(module, "SF_LAYOUT", None)
        if order is None:
            return self.operands
        if order not in self._laid_out:
            self._laid_out[order] = tuple(
                x.with_sf_layout(order) if isinstance(x, NVFP4Tensor) else x for x in self.operands
            )
        return self._laid_out[order]

    def check(self) -> None:
        """Compare the outputs of the last run with the reference. Raises AssertionError."""
        self.verify()


def case(problem: Problem, device: torch.device | str = "cpu", seed: int = 0) -> Case:
    """Random operands of `problem`, the same for the same seed on one device type. Raises TypeError if unknown."""
    gen = torch.Generator(device=device).manual_seed(seed)
    if isinstance(problem, GemmProblem):
        return _gemm_case(problem, gen)
    if isinstance(problem, DequantProblem):
        return _dequant_case(problem, gen)
    if isinstance(problem, QuantizeFp8Problem):
        return _quantize_fp8_case(problem, gen)
    if isinstance(problem, QuantizeProblem | RmsnormQuantizeProblem | SwigluQuantizeProblem):
        return _quantize_case(problem, gen)
    if isinstance(problem, SwigluProblem):
        return _swiglu_case(problem, gen)
    if isinstance(problem, EmbedProblem):
        return _embed_case(problem, gen)
    if isinstance(problem, RmsNormProblem):
        return _rms_norm_case(problem, gen)
    if isinstance(problem, CompressKvProblem):
        return _compress_kv_case(problem, gen)
    if isinstance(problem, CompressKvPairProblem):
        return _compress_kv_pair_case(problem, gen)
    if isinstance(problem, IndexLogitsProblem):
        return _index_logits_case(problem, gen)
    if isinstance(problem, IndexQueryProblem):
        return _index_query_case(problem, gen)
    if isinstance(problem, CsaQueriesProblem):
        return _csa_queries_case(problem, gen)
    if isinstance(problem, IndexTopkProblem):
        return _index_topk_case(problem, gen)
    if isinstance(problem, RouteProblem):
        return _route_case(problem, gen)
    if isinstance(problem, PermuteProblem):
        return _permute_case(problem, gen)
    if isinstance(problem, CombineProblem):
        return _combine_case(problem, gen)
    if isinstance(problem, SampleProblem):
        return _sample_case(problem, gen)
    if isinstance(problem, RopeInverseInPlaceProblem):
        return _rope_inverse_in_place_case(problem, gen)
    if isinstance(problem, QnormRopeProblem | RopeInverseProblem | RopeInverseQuantizeProblem):
        return _heads_case(problem, gen)
    if isinstance(problem, QnormRopeQuantizeProblem):
        return _qnorm_rope_quantize_case(problem, gen)
    if isinstance(problem, KvNormRopeInsertProblem):
        return _kv_norm_rope_insert_case(problem, gen)
    if isinstance(problem, QkvNormRopeInsertProblem):
        return _qkv_norm_rope_insert_case(problem, gen)
    if isinstance(problem, HyperConnectionPreProblem | HyperConnectionHeadProblem):
        return _fold_case(problem, gen)
    if isinstance(problem, HyperConnectionPostProblem | HyperConnectionPostPreProblem):
        return _site_case(problem, gen)
    raise TypeError(f"no case for {type(problem).__name__}")


def configs(module: ModuleType, most: int = 12, seed: int = 0) -> list[Any]:
    """All configs of SPACE if at most `most`, else the default, one for every value of every knob, and a sample."""
    names = list(module.SPACE)
    total = 1
    for values in module.SPACE.values():
        total *= len(values)
    if total <= most:
        return [module.Config(**dict(zip(names, v, strict=True))) for v in itertools.product(*module.SPACE.values())]
    rng = random.Random(seed)
    chosen = [module.Config()]
    for name, values in module.SPACE.items():
        for value in values:
            knobs = {n: rng.choice(vs) for n, vs in module.SPACE.items()} | {name: value}
            chosen.append(module.Config(**knobs))
    while len(set(chosen)) < most:
        chosen.append(module.Config(**{n: rng.choice(vs) for n, vs in module.SPACE.items()}))
    return list(dict.fromkeys(chosen))


def every(module: ModuleType, problem: Problem) -> list[Any]:
    """All configs of SPACE that run `problem`."""
    points = (dict(zip(module.SPACE, values, strict=True)) for values in itertools.product(*module.SPACE.values()))
    return [c for c in (module.Config(**point) for point in points) if module.supports(problem, c) is None]


def random_activations(shape: Sequence[int], gen: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian rows with amplitudes over 2^±6, some outliers, some zero blocks: [..., m, k]."""
    x = torch.randn(*shape, generator=gen, device=gen.device)
    rows = torch.randint(-6, 7, (*shape[:-1], 1), generator=gen, device=gen.device)
    x = x * torch.exp2(rows.float())
    spikes = torch.rand(*shape, generator=gen, device=gen.device) < 0.001
    x = torch.where(spikes, x * 64, x)
    if shape[-1] % BLOCK == 0:
        blocks = torch.rand(*shape[:-1], shape[-1] // BLOCK, 1, generator=gen, device=gen.device) < 0.02
        x = x.unflatten(-1, (-1, BLOCK)).masked_fill(blocks, 0).flatten(-2)
    return x.to(dtype)


def random_nvfp4(
    m: int,
    k: int,
    gen: torch.Generator,
    *,
    alpha: Tensor | None = None,
    adversarial: bool = False,
    sf_layout: SfLayout = "linear",
) -> NVFP4Tensor:
    """Random codes under random scales [m, k].

    The scales are log-uniform over 2^-3 .. 2^3; adversarial ones are any of the 127 finite non-negative E4M3 bytes,
    subnormal, zero and 448 included.
    """
    device = gen.device
    data = torch.randint(0, 256, (m, k // 2), generator=gen, device=device, dtype=torch.uint8)
    if adversarial:
        raw = torch.randint(0, 127, (m, k // BLOCK), generator=gen, device=device, dtype=torch.uint8)
        sf = raw.view(torch.float8_e4m3fn)
    else:
        sf = torch.exp2(torch.rand(m, k // BLOCK, generator=gen, device=device) * 6 - 3).to(torch.float8_e4m3fn)
    if alpha is None:
        alpha = torch.tensor(2.0**-6, device=device)
    if sf_layout == "blocked_128x4":
        sf = layouts.to_blocked_128x4(sf)
    return NVFP4Tensor(data, sf, alpha, sf_layout)


def split(n: int, segments: int) -> tuple[int, ...]:
    """Uneven column runs that sum to n, in multiples of 8: what a case of several segments uses."""
    if segments == 1:
        return (n,)
    step = max(8, n // (segments + 1) // 8 * 8)
    head = (step,) * (segments - 1)
    return (*head, n - sum(head))


def assert_gemm_close(got: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> None:
    """got [m, n] against the FP64 product a [m, k] @ b [n, k].T * alpha [n], operands decoded to FP64.

    Bound an element: (k / 16 + 16) * 2^-23 * sum |a b alpha| for a sum kept in FP32 that the tensor core truncates once
    an MMA step of 16, plus half a unit in the last place of the output type (one for the sum landing on a tie's
    other side).
    """
    _assert_within(got, *_product(a, b, alpha))


def _assert_within(got: Tensor, want: Tensor, room: Tensor) -> None:
    """Each element as far from `want` as `room` allows, and the output's rounding."""
    bits = {torch.bfloat16: 8, torch.float32: 24, torch.float16: 11}[got.dtype]
    tiny = torch.finfo(got.dtype).smallest_normal
    ulp = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(tiny)))) * 2.0 ** (1 - bits)
    overflow = want.abs() > torch.finfo(got.dtype).max
    excess = (got.double() - want).abs() - (room + ulp)
    excess = torch.where(overflow, torch.where(got.double() == want.sign() * torch.inf, -1.0, 1.0), excess)
    bad = ~(excess <= 0)
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are out of bound; first at {list(index)}: "
            f"got {got[index].item()}, want {want[index].item()}, room {(room + ulp)[index].item():.3g}"
        )


def fp8_run(config: Any = None) -> int:
    """Elements of K that an FP8 GEMM with this config sums on the tensor cores alone."""
    return FP8_RUN * getattr(config, "promote", 1)


def assert_fp8_gemm_close(got: Tensor, a: Tensor, b: Tensor, alpha: Tensor, run: int = FP8_RUN) -> None:
    """`assert_gemm_close` for FP8 tensor cores, whose sums over each `run` of K are added in FP32.

    An MMA of sm_90 aligns its 32 products and the old sum to the largest of them and cuts each at 13 bits below it. For
    terms of either sign most of that cancels, and errors of several such runs add as random ones do: the root of the
    sum of squares of what |a b alpha| sums to over each run. Of that, errors of up to 11.5 * 2^-13 were seen on an
    H100, in one of 8 million elements, and of 13.0 * 2^-13 in the emulator, for runs of 128. Those of a run's MMAs add
    alike: among 32 thousand elements in the emulator 6.3, 7.7 and 12.1 * 2^-13 for runs of 128, 256 and 512. The bound
    is 20 * 2^-13 for 128, and grows with the root of the run.
    """
    _assert_within(got, *_fp8_product(a, b, alpha, run))


def assert_gemm_quantized(got: NVFP4Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> None:
    """got [m, n] against the FP64 product as in `assert_gemm_close`, quantised by rule "absmax" under got.alpha.

    Every scale lies between those of the least and the largest maximum that the sums' error leaves room for, every code
    between those of the least and the largest number, under the scale that was found; padding of scales is zero.
    """
    want, room = _product(a, b, alpha)
    linear = got.with_sf_layout("linear")
    if got.sf_layout == "blocked_128x4":
        assert_same_bytes(got.sf, layouts.to_blocked_128x4(linear.sf), "padding of sf")

    least, most = (want.abs() - room).clamp(min=0).float(), (want.abs() + room).float()
    low, high = (reference.quantize_nvfp4(x, alpha=got.alpha).sf.view(torch.uint8) for x in (least, most))
    sf = linear.sf.view(torch.uint8)
    _assert_between(sf, low, high, "sf")

    scale = linear.sf.float() * got.alpha
    r = torch.where(scale == 0, 0.0, 1.0 / scale).repeat_interleave(BLOCK, dim=1)
    low, high = (e2m1.decode(e2m1.encode(x.float() * r)) for x in (want - room, want + room))
    _assert_between(e2m1.decode(e2m1.unpack(got.data)), low, high, "codes")


def _assert_between(got: Tensor, low: Tensor, high: Tensor, name: str) -> None:
    bad = ~((low <= got) & (got <= high))
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} are out of bound; first at {list(index)}: "
            f"got {got[index].item()}, want {low[index].item()} to {high[index].item()}"
        )


def _product(a: Tensor, b: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The FP64 product a [m, k] @ b [n, k].T * alpha [n] and the error of a sum that the tensor core keeps in FP32."""
    k = a.shape[-1]
    return (a @ b.T) * alpha, (a.abs() @ b.abs().T) * alpha.abs() * (k / 16 + 16) * 2.0**-23


def _fp8_product(a: Tensor, b: Tensor, alpha: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """The FP64 product and the error that `assert_fp8_gemm_close` allows."""
    want, room = _product(a, b, alpha)
    runs = zip(a.abs().split(run, -1), b.abs().split(run, -1), strict=True)
    squares = sum(((x @ y.T) ** 2 for x, y in runs), start=torch.zeros_like(want))
    return want, room + squares.sqrt() * alpha.abs() * 20 * (run / FP8_RUN) ** 0.5 * 2.0**-13


def assert_same_bytes(got: Tensor, want: Tensor, name: str) -> None:
    """Equal bytes; the error names the first place where they differ."""
    g, w = got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    if g.shape != w.shape:
        raise AssertionError(f"{name}: shape {list(g.shape)}, want {list(w.shape)}")
    bad = g != w
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} bytes differ; first at {list(index)}: "
            f"got {g[index].item():#04x}, want {w[index].item():#04x}"
        )


def _gemm_case(p: GemmProblem, gen: torch.Generator) -> Case:
    device = gen.device
    segments = split(p.n, p.segments)
    alpha = torch.exp2(torch.rand(p.segments, generator=gen, device=device) * 4 - 8)
    b = random_nvfp4(p.n, p.k, gen, alpha=alpha if p.segments > 1 else alpha[0], adversarial=True).with_order(p.order)
    a: Tensor | NVFP4Tensor | FP8RowTensor
    if p.act == "bf16":
        a = random_activations((p.m, p.k), gen)
    elif p.act == "fp8":
        a, b = fp8.quantize_fp8(random_activations((p.m, p.k), gen)), b.prepare_fp8()
    else:
        a = random_nvfp4(p.m, p.k, gen, adversarial=True)
    operands = (a, b, segments if p.segments > 1 else None)
    per_column = alpha.double().repeat_interleave(torch.tensor(segments, device=device))

    def product() -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(a, FP8RowTensor):
            return fp8.dequant_fp8(a, torch.float64), fp8.dequant_fp8_weight(b, torch.float64), per_column
        a64 = scaled_codes(a).double() * a.alpha.double() if isinstance(a, NVFP4Tensor) else a.double()
        return a64, scaled_codes(b).double(), per_column

    if p.out == "nvfp4":
        a64, b64, _ = product()
        own = global_scale(((a64 @ b64.T) * per_column).float())
        packed = NVFP4Tensor.empty((p.m, p.n), own, "blocked_128x4")
        return Case(p, operands, packed, (), lambda: _poison(packed), lambda: assert_gemm_quantized(packed, *product()))
    out = torch.empty(p.m, p.n, dtype=TORCH_DTYPES[p.out], device=device)

    @functools.cache  # one for all the kernels and configs that are compared with it
    def within(run: int) -> tuple[Tensor, Tensor]:
        return _fp8_product(*product(), run) if p.act == "fp8" else _product(*product())

    def verify() -> None:
        _assert_within(out, *within(fp8_run(made.launched[1]) if p.act == "fp8" else 0))

    made = Case(p, operands, out, (), partial(out.fill_, torch.nan), verify)
    return made


def _dequant_case(p: DequantProblem, gen: torch.Generator) -> Case:
    t = random_nvfp4(p.m, p.k, gen, adversarial=True, sf_layout=p.sf_layout)
    out = torch.empty(p.m, p.k, dtype=TORCH_DTYPES[p.out], device=gen.device)

    def verify() -> None:
        assert_same_bytes(out, reference.dequant_nvfp4(t, out.dtype), "out")

    return Case(p, (t,), out, (), partial(out.fill_, torch.nan), verify)


def _quantize_case(p: QuantizeProblem | RmsnormQuantizeProblem | SwigluQuantizeProblem, gen: torch.Generator) -> Case:
    device, dtype = gen.device, TORCH_DTYPES[p.x]
    wide = 2 * p.k if isinstance(p, SwigluQuantizeProblem) else p.k
    x = random_activations((p.m, wide), gen, dtype)
    alpha = torch.tensor(0.01, device=device)
    out = NVFP4Tensor.empty((p.m, p.k), alpha, p.sf_layout)
    common: dict[str, Any] = {"alpha": alpha, "sf_layout": p.sf_layout, "rule": p.rule}
    operands: tuple[Any, ...]
    want: Callable[[], NVFP4Tensor]
    if isinstance(p, RmsnormQuantizeProblem):
        weight = _norm_weight(p.k, gen, dtype)
        operands = (x, weight, EPS, alpha)
        want = partial(reference.rmsnorm_quantize, x, weight, EPS, **common)
    elif isinstance(p, SwigluQuantizeProblem):
        operands = (x, LIMIT, alpha)
        want = partial(reference.swiglu_quantize, x, limit=LIMIT, **common)
    else:
        operands = (x, alpha)
        want = partial(reference.quantize_nvfp4, x, **common)

    def verify() -> None:
        ref = want()
        assert_same_bytes(out.sf, ref.sf, "sf")
        assert_same_bytes(out.data, ref.data, "data")

    return Case(p, operands, out, (p.rule,), lambda: _poison(out), verify)


def _norm_weight(k: int, gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (1 + 0.2 * torch.randn(k, generator=gen, device=gen.device)).to(dtype)


def _rms_norm_case(p: RmsNormProblem, gen: torch.Generator) -> Case:
    x = random_activations((p.m, p.k), gen, TORCH_DTYPES[p.x])
    weight, out = _norm_weight(p.k, gen, x.dtype), torch.empty_like(x)
    eager = partial(reference.rms_norm, x, weight, EPS)

    def verify() -> None:
        assert_same_bytes(out, eager(), "out")

    return Case(p, (x, weight, EPS), out, (), partial(out.fill_, torch.nan), verify, eager)


def _quantize_fp8_case(p: QuantizeFp8Problem, gen: torch.Generator) -> Case:
    x = random_activations((p.m, p.k), gen, TORCH_DTYPES[p.x])
    data = torch.empty(p.m, p.k, dtype=torch.float8_e4m3fn, device=gen.device)
    out = FP8RowTensor(data, torch.empty(p.m, device=gen.device))

    def poison() -> None:
        out.data.view(torch.uint8).fill_(0xFF)
        out.scale.fill_(torch.nan)

    def verify() -> None:
        want = fp8.quantize_fp8(x)
        assert_same_bytes(out.scale, want.scale, "scale")
        assert_same_bytes(out.data, want.data, "data")

    return Case(p, (x,), out, (), poison, verify)


def _swiglu_case(p: SwigluProblem, gen: torch.Generator) -> Case:
    x = random_activations((p.m, 2 * p.k), gen, TORCH_DTYPES[p.x])
    out = torch.empty(p.m, p.k, dtype=TORCH_DTYPES[p.out], device=gen.device)
    eager = partial(reference.swiglu, x, LIMIT, out.dtype)

    def verify() -> None:
        assert_same_bytes(out, eager(), "out")

    return Case(p, (x, LIMIT), out, (), partial(out.fill_, torch.nan), verify, eager)


def _embed_case(p: EmbedProblem, gen: torch.Generator) -> Case:
    weight = _embedding(p.vocab, p.k, TORCH_DTYPES[p.x], gen.device)
    token_ids = torch.randint(p.vocab, (p.m,), generator=gen, device=gen.device)
    out = torch.empty(p.m, p.n, p.k, dtype=TORCH_DTYPES[p.out], device=gen.device)
    eager = partial(reference.embed, token_ids, weight, streams=p.n, out_dtype=out.dtype)

    def verify() -> None:
        assert_same_bytes(out, eager(), "out")

    return Case(p, (token_ids, weight), out, (), partial(out.fill_, torch.nan), verify, eager)


@functools.lru_cache(maxsize=1)
def _embedding(vocab: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Finite numbers; one table for all cases of a problem, as V4-Pro's has 1.9 GB."""
    gen = torch.Generator(device=device).manual_seed(0)
    return torch.randn(vocab, k, generator=gen, dtype=dtype, device=device)


def _compress_kv_case(p: CompressKvProblem, gen: torch.Generator) -> Case:
    """Rings full of older rows, slots in random order; gates far apart in some channels, windows of zeros in others."""
    table, integers = _compressed_tokens(p, gen)
    step = _compressor_step(p, gen)
    rows = (step.kv, step.gate, step.ape, step.weight, table, EPS)
    operands = (*rows, step.state, *integers.values(), p.ratio, step.hadamard)

    def reference_on(own: CompressorStep) -> None:
        args: Any = (*rows, own.state, own.cache)
        reference.compress_kv(*args, **integers, ratio=p.ratio, hadamard=own.hadamard)

    poison, verify = _compressing(reference_on, ("", step))
    return Case(p, operands, step.cache, (), poison, verify, lambda: reference_on(step))


def _compress_kv_pair_case(p: CompressKvPairProblem, gen: torch.Generator) -> Case:
    """As for `compress_kv`, twice; kv and gate of both side by side, as one GEMM gives them."""
    table, integers = _compressed_tokens(p.parts[0], gen)
    entries, keys = (_compressor_step(part, gen) for part in p.parts)
    rows = torch.cat((entries.kv, entries.gate, keys.kv, keys.gate), dim=1)
    width, own = entries.kv.shape[1], keys.kv.shape[1]
    kv, gate, key_kv, key_gate = rows.split((width, width, own, own), dim=1)
    steps = replace(entries, kv=kv, gate=gate), replace(keys, kv=key_kv, gate=key_gate)

    def reference_on(entries: CompressorStep, keys: CompressorStep) -> None:
        reference.compress_kv_pair(entries, keys, table, EPS, **integers, ratio=p.ratio)

    poison, verify = _compressing(reference_on, ("entries' ", steps[0]), ("keys' ", steps[1]))
    operands = (table, EPS, *integers.values(), p.ratio)
    return Case(p, operands, steps, (), poison, verify, lambda: reference_on(*steps))


def _compressed_tokens(p: CompressKvProblem, gen: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    """RoPE's table, and the integers that say where the tokens of a step and their entries belong."""
    device, each = gen.device, p.m // p.sequence_count
    sizes = torch.full((p.sequence_count,), each, device=device)
    sizes[: p.m % p.sequence_count] += 1
    far = 1000 * p.ratio
    # shares of one token at every place of a window, longer ones from its middle on
    places = torch.arange(p.sequence_count, device=device) % p.ratio
    starts = far + (p.ratio - 1 - places if each == 1 else 0 * places + p.ratio // 2)
    sequence = torch.arange(p.sequence_count, device=device).repeat_interleave(sizes, output_size=p.m)
    cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    positions = torch.arange(p.m, device=device) - cu_seqlens[sequence] + starts[sequence]
    completes = (positions + 1) % p.ratio == 0
    free = torch.randperm(_pages(p) * p.page_size, generator=gen, device=device)[: p.m]
    integers: dict[str, Any] = {
        "positions": positions,
        "sequence_ids": sequence,
        "cu_seqlens": cu_seqlens,
        "state_slots": torch.randperm(p.sequence_count, generator=gen, device=device),
        "slots": torch.where(completes, free, -1),
    }
    table = torch.rand(far + p.m + 2 * p.ratio, p.rope_dim, generator=gen, device=device) * 2 - 1
    return table, {key: t.int() for key, t in integers.items()}


def _pages(p: CompressKvProblem) -> int:
    return p.m // p.page_size + 2


def _compressor_step(p: CompressKvProblem, gen: torch.Generator) -> CompressorStep:
    """Tokens, weights, a ring and room for entries. kv and gate side by side, as one GEMM gives them."""
    device, width, name = gen.device, p.overlaps * p.head_dim, p.format.removeprefix("index_")
    both = torch.randn(p.m, 2 * width, generator=gen, device=device)
    both[:, width::3] *= 30
    both[:, 5:width:64] = 0
    both = both.to(TORCH_DTYPES[p.x])
    ape = torch.randn(p.ratio, width, generator=gen, device=device)
    weight = (1 + 0.2 * torch.randn(p.head_dim, generator=gen, device=device)).to(TORCH_DTYPES[p.weight])
    state = torch.randn(p.sequence_count, p.overlaps * p.ratio, 2, width, generator=gen, device=device)
    data = torch.empty(_pages(p), p.layout.page_bytes, dtype=torch.uint8, device=device)
    cache: Any
    if name == p.format:
        cache = PagedCache(data, cast(KVFormat, name), p.page_size, p.head_dim, p.rope_dim)
    else:
        cache = IndexCache(data, cast(IndexFormat, name), p.page_size, p.head_dim)
    return CompressorStep(both[:, :width], both[:, width:], ape, weight, state, cache, bool(p.hadamard))


def _compressing(
    reference_on: Callable[..., None], *named: tuple[str, CompressorStep]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """How what compressors change is put back, and compared with `reference_on` copies of their steps."""
    old = [step.state.clone() for _, step in named]

    def poison() -> None:
        for (_, step), state in zip(named, old, strict=True):
            step.state.copy_(state)
            step.cache.data.fill_(0xFF)

    def verify() -> None:
        wants = [
            replace(step, state=state.clone(), cache=replace(step.cache, data=torch.full_like(step.cache.data, 0xFF)))
            for (_, step), state in zip(named, old, strict=True)
        ]
        reference_on(*wants)
        for (name, step), want in zip(named, wants, strict=True):
            assert_same_bytes(step.cache.data, want.cache.data, f"{name}cache")
            assert_same_bytes(step.state, want.state, f"{name}ring")

    return poison, verify


def _index_query_case(p: IndexQueryProblem, gen: torch.Generator) -> Case:
    q = random_activations((p.m, p.heads, p.head_dim), gen, TORCH_DTYPES[p.x])
    positions, table = _positions(p.m, p.rope_dim, gen)
    operands = (q, positions, table, p.format, bool(p.hadamard))
    if p.codes:
        weights = torch.randn(p.m, p.heads, generator=gen, device=gen.device)
        codes, scaled = torch.empty(q.shape, dtype=torch.uint8, device=gen.device), torch.empty_like(weights)

        def poison() -> None:
            codes.fill_(0x7F)
            scaled.fill_(torch.nan)

        def verify() -> None:
            want = reference.index_query_fp8(q, weights, positions, table, hadamard=bool(p.hadamard))
            assert_same_bytes(codes, want[0].view(torch.uint8), "codes")
            assert_same_bytes(scaled, want[1], "weights")

        both = partial(reference.index_query_fp8, q, weights, positions, table, hadamard=bool(p.hadamard))
        return Case(p, operands, codes, ((weights, scaled),), poison, verify, both)
    out, format = torch.empty_like(q), cast(IndexFormat, p.format)
    eager = partial(reference.index_query, q, positions, table, format=format, hadamard=bool(p.hadamard))
    same = lambda: assert_same_bytes(out, eager(), "out")  # noqa: E731
    return Case(p, operands, out, (None,), partial(out.fill_, torch.nan), same, eager)


def _csa_queries_case(p: CsaQueriesProblem, gen: torch.Generator) -> Case:
    """Queries of layer and indexer side by side, as one GEMM gives them."""
    widths, dtype = (p.heads * p.head_dim, p.index_heads * p.index_dim), TORCH_DTYPES[p.x]
    both = random_activations((p.m, sum(widths)), gen, dtype).split(widths, dim=1)
    q, index_q = both[0].unflatten(1, (p.heads, -1)), both[1].unflatten(1, (p.index_heads, -1))
    positions, table = _positions(p.m, p.rope_dim, gen)
    weights = torch.randn(p.m, p.index_heads, generator=gen, device=gen.device)
    index_type = torch.uint8 if p.codes else dtype
    out = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty(index_q.shape, dtype=index_type, device=gen.device),
    )
    scaled, format, hadamard = torch.empty_like(weights), cast(IndexFormat, p.format), bool(p.hadamard)

    def wanted(some: slice) -> tuple[Tensor, ...]:
        at = positions[some]
        if p.codes:
            first, codes, own = reference.csa_queries_fp8(
                q[some], index_q[some], weights[some], at, table, EPS, hadamard=hadamard
            )
            return first, codes.view(torch.uint8), own
        return reference.csa_queries(q[some], index_q[some], at, table, EPS, format=format, hadamard=hadamard)

    results = {"queries": out[0], "index queries": out[1], **({"weights": scaled} if p.codes else {})}

    def poison() -> None:
        for x in results.values():
            x.fill_(torch.nan if x.is_floating_point() else 0x7F)

    def verify() -> None:
        for tokens in torch.arange(p.m).split(VERIFIED_TOKENS):
            some = slice(int(tokens[0]), int(tokens[-1]) + 1)
            for (name, got), want in zip(results.items(), wanted(some), strict=True):
                assert_same_bytes(got[some], want, f"{name}, tokens from {some.start} on")

    operands = (q, index_q, positions, table, EPS, p.format, hadamard)
    tail = ((weights, scaled) if p.codes else None,)
    return Case(p, operands, out, tail, poison, verify, lambda: wanted(slice(0, p.m)))


def assert_index_logits_close(
    got: Tensor, q: Tensor, weights: Tensor, keys: Tensor, limits: Tensor, scale: float
) -> None:
    """Scores got [tokens, entries] of q [tokens, heads, d] and keys [entries, d] against FP64; -inf past `limits`."""
    _assert_index_logits(got, *index_logits_within(q, weights, keys, scale), limits)


def _assert_index_logits(got: Tensor, want: Tensor, room: Tensor, limits: Tensor) -> None:
    hidden = torch.arange(got.shape[1], device=got.device) >= limits[:, None]
    if not torch.equal(got == -torch.inf, hidden):
        raise AssertionError("what is -inf is not what cannot be seen")
    _assert_within(got.masked_fill(hidden, 0), want.masked_fill(hidden, 0), room)


def index_logits_within(q: Tensor, weights: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [tokens, entries] of q [tokens, heads, d] and keys [entries, d] in FP64, and by how much they may be off.

    In FP32: (d / 16 + 16 + heads) * 2^-23 * scale * sum over heads of |weight| sum |q k|. A product is summed in FP32
    that the tensor core truncates once a step of 16, as in `assert_gemm_close`; then heads are added up in FP32.

    q in E4M3 may be multiplied by the FP8 tensor cores of sm_90, and adds scale * sum over heads of |weight| times how
    far such a product can be off, `_fp8_wgmma_room`. ReLU makes no difference larger.
    """
    d, heads = q.shape[2], q.shape[1]
    keys = keys.double()
    want = torch.zeros(len(q), len(keys), dtype=torch.float64, device=q.device)
    room = torch.zeros_like(want)
    for h in range(heads):
        a, w = q[:, h].double(), weights[:, h, None].double() * scale
        want += (a @ keys.T).relu() * w
        off = (a.abs() @ keys.abs().T) * ((d / 16 + 16 + heads) * 2.0**-23)
        if q.dtype == torch.float8_e4m3fn:
            off += _fp8_wgmma_room(a, keys)
        room += off * w.abs()
    return want, room


def _fp8_wgmma_room(a: Tensor, b: Tensor) -> Tensor:
    """How far a [m, k] @ b [n, k].T in FP8, summed by sm_90's WGMMA in steps of 32, can be from the exact products.

    A step aligns its 32 products and the old sum to the largest of their exponents and cuts each at 13 bits of fraction
    below it, then cuts what they add up to at 13 bits of its own (`ptx_emulator.tensorcore`, found on an H100). So each
    of the 33 is off by less than 2^-13 of 2^exponent, which is at most the largest of them, and the new sum by less
    than 2^-13 of itself. The largest product is at most the root of the sum of the step's squares. Subnormal numbers
    have the exponent of the least normal one, 2^-6: less than 2^-13.8 of a row's largest, for rows are scaled so that
    this is beyond 224, or as if it were FP8_FLOOR. By what an old sum is off, it can be cut coarser: less than 1 / 32
    of the whole. No right kernel is further off, and where all that is cut has one sign, half of it is reached.
    """
    rows = [(x.abs(), x.abs().amax(-1, keepdim=True).clamp(min=FP8_FLOOR) * 2.0**-13.8) for x in (a, b)]
    left, right = (size.maximum(least).square().split(FP8_STEP, -1) for size, least in rows)
    total = torch.zeros(len(a), len(b), dtype=a.dtype, device=a.device)
    room = torch.zeros_like(total)
    for i, (x, y) in enumerate(zip(a.split(FP8_STEP, -1), b.split(FP8_STEP, -1), strict=True)):
        largest = (left[i] @ right[i].T).sqrt().maximum(total.abs())
        total += x @ y.T
        room += (FP8_STEP + 1) * largest + total.abs()
    return room * (2.0**-13 * 33 / 32)


def _index_logits_case(p: IndexLogitsProblem, gen: torch.Generator) -> Case:
    """Queries of a sequence behind each other, up to its end; weights of either sign, keys of many magnitudes."""
    device, ratio, scale = gen.device, 4, p.head_dim**-0.5 * p.heads**-0.5
    pages = -(-p.entries // p.page_size)
    # sequences share keys where they would fill the memory
    stored = min(p.sequence_count * pages, MOST_KEYS // p.page_size + pages)
    page_bytes = index_layout(p.format, p.page_size, p.head_dim).page_bytes
    cache = IndexCache(
        torch.empty(stored, page_bytes, dtype=torch.uint8, device=device), p.format, p.page_size, p.head_dim
    )
    for some in torch.arange(cache.slots, device=device).split(1 << 18):
        reference.write_rows(cache, some, random_activations((len(some), p.head_dim), gen).float())
    block_table = torch.stack(
        [torch.randperm(stored, generator=gen, device=device)[:pages] for _ in range(p.sequence_count)]
    ).int()
    q = random_activations((p.m, p.heads, p.head_dim), gen, TORCH_DTYPES.get(p.x, torch.float32))
    weights = torch.randn(p.m, p.heads, generator=gen, device=device)
    if p.x == "fp8":  # of a head the largest is 448; what it was is in the weight
        step = q.abs().amax(-1).clamp_min(1e-20) / E4M3_MAX
        q, weights = (q / step[..., None]).to(torch.float8_e4m3fn), weights * step
    sequence_ids = (torch.arange(p.m, device=device) * p.sequence_count // max(p.m, 1)).int()
    back = torch.arange(p.m - 1, -1, -1, device=device) % max(1, p.m // p.sequence_count)
    positions = (p.entries * ratio - 1 - back).clamp(min=0).int()
    out = torch.empty(p.m, pages * p.page_size, device=device)
    operands = (q, weights, cache, block_table, positions, sequence_ids, ratio, scale)

    @functools.cache  # one for all the configs that are compared with it
    def expected() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of tokens of one sequence: which, their scores, how far these may be off, and how many can be seen."""
        found = []
        slots = (block_table.long()[:, :, None] * p.page_size + torch.arange(p.page_size, device=device)).flatten(1)
        for tokens in torch.arange(p.m, device=device).split(VERIFIED_TOKENS)[:: max(1, p.m // 512)]:
            for sequence in sequence_ids[tokens].unique():
                own = tokens[sequence_ids[tokens] == sequence]
                keys = reference.read_rows(cache, slots[sequence])
                limits = (positions[own] + 1) // ratio
                found.append((own, *index_logits_within(q[own], weights[own], keys, scale), limits))
        return found

    def verify() -> None:
        for own, want, room, limits in expected():
            _assert_index_logits(out[own], want, room, limits)

    eager = partial(
        reference.index_logits, q, weights, cache, block_table,
        positions=positions, sequence_ids=sequence_ids, ratio=ratio, scale=scale,
    )  # fmt: skip
    return Case(p, operands, out, (), partial(out.fill_, torch.nan), verify, eager)


def _index_topk_case(p: IndexTopkProblem, gen: torch.Generator) -> Case:
    """Every entry visible; every 16th query with scores that are equal, rising, zero or not finite."""
    device, ratio, sequences = gen.device, 4, min(p.m, 4)
    pages = -(-p.entries // p.page_size)
    logits = torch.randn(p.m, p.entries, generator=gen, device=device)
    hard = logits[15::16]
    hard[0::4] = hard[0::4].round()
    hard[1::4] = hard[1::4].sort(-1).values
    hard[2::4] = torch.where(hard[2::4] < 1, hard[2::4] * 0.0, hard[2::4])
    hard[3::4] = torch.where(hard[3::4] > 2, torch.nan, torch.where(hard[3::4] < -2, -torch.inf, hard[3::4]))
    block_table = torch.stack([torch.randperm(pages, generator=gen, device=device) for _ in range(sequences)]).int()
    positions = torch.full((p.m,), p.entries * ratio, dtype=torch.int32, device=device)
    sequence_ids = (torch.arange(p.m, device=device) * sequences // p.m).int()
    out = torch.empty(p.m, min(p.topk, p.entries), dtype=torch.int32, device=device)
    operands = (logits, block_table, positions, sequence_ids, ratio, p.page_size)

    eager = partial(
        reference.index_topk, logits, block_table,
        positions=positions, sequence_ids=sequence_ids, ratio=ratio, topk=p.topk, page_size=p.page_size,
    )  # fmt: skip
    return Case(p, operands, out, (), partial(out.fill_, -2), lambda: assert_same_bytes(out, eager(), "slots"), eager)


def _route_case(p: RouteProblem, gen: torch.Generator) -> Case:
    """Every eighth token has logits or biased scores that tie, or logits whose scores are nearly or quite zero."""
    device = gen.device
    logits = 3 * torch.randn(p.m, p.experts, generator=gen, device=device)
    logits[7::24] = logits[7::24].round()
    logits[15::24] = logits[15::24].round() * 40 - 80
    logits[23::24] = 0.0
    logits = logits.to(TORCH_DTYPES[p.x])
    bias = token_ids = table = None
    if p.choice == "bias":
        bias = (torch.randn(p.experts, generator=gen, device=device) * 4).round() / 16
    elif p.choice == "table":
        table = torch.randint(p.experts, (4096, p.topk), generator=gen, device=device, dtype=torch.int32)
        token_ids = torch.randint(4096, (p.m,), generator=gen, device=device)
    ids = torch.empty(p.m, p.topk, dtype=torch.int32, device=device)
    out = ids, torch.empty(p.m, p.topk, device=device)
    eager = partial(
        reference.route, logits, topk=p.topk, scale=2.5, bias=bias, token_ids=token_ids, table=table
    )  # fmt: skip

    def poison() -> None:
        out[0].fill_(-7)
        out[1].fill_(torch.nan)

    def verify() -> None:
        for name, got, want in zip(("ids", "weights"), out, eager(), strict=True):
            assert_same_bytes(got, want, name)

    return Case(p, (logits, bias, token_ids, table, 2.5), out, (), poison, verify, eager)


def random_choices(m: int, topk: int, experts: int, gen: torch.Generator) -> Tensor:
    """Different experts a token, int32 [m, topk]; every fourth token takes the first ones, every 50th slot none."""
    ids = torch.rand(m, experts, generator=gen, device=gen.device).topk(topk).indices.int()
    ids[3::4] = torch.arange(topk, device=gen.device, dtype=torch.int32)
    ids.view(-1)[49::50] = -1
    return ids


def _permute_case(p: PermuteProblem, gen: torch.Generator) -> Case:
    ids = random_choices(p.m, p.topk, p.experts, gen)
    order = torch.empty(p.m * p.topk, dtype=torch.int32, device=gen.device)
    out = order, torch.empty(p.experts + 1, dtype=torch.int32, device=gen.device)
    eager = partial(reference.permute, ids, p.experts)

    def verify() -> None:
        for name, got, want in zip(("order", "offsets"), out, eager(), strict=True):
            assert_same_bytes(got, want, name)

    return Case(p, (ids, p.experts), out, (), lambda: [x.fill_(-7) for x in out], verify, eager)


def _combine_case(p: CombineProblem, gen: torch.Generator) -> Case:
    """Slots of no expert hold NaN, as rows that no GEMM has written may."""
    experts = max(256, p.topk)
    ids = random_choices(p.m, p.topk, experts, gen)
    order, _ = reference.permute(ids, experts)
    y = random_activations((p.m * p.topk, p.k), gen, TORCH_DTYPES[p.x])
    y[ids.view(-1)[order.long()] < 0] = torch.nan
    weights = torch.rand(p.m, p.topk, generator=gen, device=gen.device)
    shared = random_activations((p.m, p.k), gen, y.dtype) if p.shared else None
    out = torch.empty(p.m, p.k, dtype=y.dtype, device=gen.device)
    eager = partial(reference.combine, y, order, ids, weights, shared=shared)

    def verify() -> None:
        assert_same_bytes(out, eager(), "out")

    return Case(p, (y, order, ids, weights, shared), out, (), partial(out.fill_, torch.nan), verify, eager)


def _sample_case(p: SampleProblem, gen: torch.Generator) -> Case:
    """Greedy rows, whole distributions and nuclei in turn; every 16th row of logits has few different ones."""
    device = gen.device
    logits = (3 * torch.randn(p.m, p.vocab, generator=gen, device=device)).to(TORCH_DTYPES[p.x])
    logits[15::16] = logits[15::16].round()
    turn = torch.arange(p.m, device=device) % 4
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.5], device=device)[turn]
    top_p = torch.tensor([1.0, 1.0, 0.95, 0.6], device=device)[turn]
    operands = (logits, temperature, top_p, torch.rand(p.m, generator=gen, device=device))
    out = torch.empty(p.m, dtype=torch.int64, device=device)
    eager = partial(reference.sample, *operands)

    def verify() -> None:
        for rows in torch.arange(p.m).split(64):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            assert_same_bytes(out[some], reference.sample(*(x[some] for x in operands)), f"rows from {some.start} on")

    return Case(p, operands, out, (), partial(out.fill_, -7), verify, eager)


def _heads_case(p: QnormRopeProblem | RopeInverseProblem | RopeInverseQuantizeProblem, gen: torch.Generator) -> Case:
    dtype = TORCH_DTYPES[p.x]
    x = random_activations((p.m, p.heads, p.head_dim), gen, dtype)
    positions, table = _positions(p.m, p.rope_dim, gen)
    if isinstance(p, RopeInverseQuantizeProblem):
        return _rope_inverse_quantize_case(p, x, positions, table)
    out = torch.empty_like(x)
    eps = (EPS,) if isinstance(p, QnormRopeProblem) else ()
    op: Callable[..., Tensor] = reference.qnorm_rope if isinstance(p, QnormRopeProblem) else reference.rope_inverse

    def verify() -> None:
        for tokens in torch.arange(p.m).split(VERIFIED_TOKENS):
            some = slice(int(tokens[0]), int(tokens[-1]) + 1)
            assert_same_bytes(out[some], op(x[some], positions[some], table, *eps), f"tokens from {some.start} on")

    return Case(p, (x, positions, table, *eps), out, (), partial(out.fill_, torch.nan), verify)


def _qnorm_rope_quantize_case(p: QnormRopeQuantizeProblem, gen: torch.Generator) -> Case:
    q = random_activations((p.m, p.heads, p.head_dim), gen, TORCH_DTYPES[p.x])
    positions, table = _positions(p.m, p.rope_dim, gen)
    out = torch.empty(p.m, p.heads, p.row_bytes, dtype=torch.uint8, device=gen.device)

    def verify() -> None:
        for tokens in torch.arange(p.m).split(VERIFIED_TOKENS):
            some = slice(int(tokens[0]), int(tokens[-1]) + 1)
            want = reference.qnorm_rope_quantize(q[some], positions[some], table, EPS)
            assert_same_bytes(out[some], want, f"tokens from {some.start} on")

    return Case(p, (q, positions, table, EPS), out, (), partial(out.fill_, 0xFF), verify)


def _rope_inverse_in_place_case(p: RopeInverseInPlaceProblem, gen: torch.Generator) -> Case:
    before = random_activations((p.m, p.heads, p.head_dim), gen, TORCH_DTYPES[p.x])
    positions, table = _positions(p.m, p.rope_dim, gen)
    o = before.clone()

    def verify() -> None:
        for tokens in torch.arange(p.m).split(VERIFIED_TOKENS):
            some = slice(int(tokens[0]), int(tokens[-1]) + 1)
            want = reference.rope_inverse(before[some], positions[some], table)
            assert_same_bytes(o[some], want, f"tokens from {some.start} on")

    return Case(p, (positions, table), o, (), partial(o.copy_, before), verify)


def _rope_inverse_quantize_case(p: RopeInverseQuantizeProblem, o: Tensor, positions: Tensor, table: Tensor) -> Case:
    alpha = torch.tensor(0.01, device=o.device)
    out = NVFP4Tensor.empty((p.groups, p.m, p.k), alpha, p.sf_layout)

    def verify() -> None:
        linear = out.with_sf_layout("linear")
        assert_same_bytes(out.sf, linear.with_sf_layout(p.sf_layout).sf, "padding of sf")
        for tokens in torch.arange(p.m).split(VERIFIED_TOKENS):
            some = slice(int(tokens[0]), int(tokens[-1]) + 1)
            want = reference.rope_inverse_quantize(
                o[some], positions[some], table, groups=p.groups, alpha=alpha, rule=p.rule
            )
            assert_same_bytes(linear.sf[:, some], want.sf, f"sf, tokens from {some.start} on")
            assert_same_bytes(linear.data[:, some], want.data, f"data, tokens from {some.start} on")

    return Case(p, (o, positions, table, p.groups, alpha), out, (p.rule,), lambda: _poison(out), verify)


def _kv_norm_rope_insert_case(p: KvNormRopeInsertProblem, gen: torch.Generator, kv: Tensor | None = None) -> Case:
    device, dtype = gen.device, TORCH_DTYPES[p.x]
    kv = random_activations((p.m, p.head_dim), gen, dtype) if kv is None else kv
    weight = _norm_weight(p.head_dim, gen, dtype)
    positions, table = _positions(p.m, p.rope_dim, gen)
    geometry = (p.format, p.page_size, p.head_dim, p.rope_dim)
    pages = p.m // p.page_size + 2
    slots = torch.randperm(pages * p.page_size, generator=gen, device=device)[: p.m].int()
    slots[7:8] = -1
    cache = PagedCache(torch.empty(pages, kv_layout(*geometry).page_bytes, dtype=torch.uint8, device=device), *geometry)

    def verify() -> None:
        want = PagedCache(torch.full_like(cache.data, 0xFF), *geometry)
        reference.kv_norm_rope_insert(kv, weight, positions, table, EPS, want, slots)
        assert_same_bytes(cache.data, want.data, "cache")

    operands = (kv, weight, positions, table, EPS, slots)
    return Case(p, operands, cache, (), partial(cache.data.fill_, 0xFF), verify)


def _qkv_norm_rope_insert_case(p: QkvNormRopeInsertProblem, gen: torch.Generator) -> Case:
    """q and kv are columns of one tensor."""
    q, kv = random_activations((p.m, p.k + p.head_dim), gen, TORCH_DTYPES[p.x]).split((p.k, p.head_dim), dim=1)
    insert = _kv_norm_rope_insert_case(p.insert, gen, kv)
    _, *rest = insert.operands
    q_weight = _norm_weight(p.k, gen, kv.dtype)
    out = torch.empty(p.m, p.k, dtype=kv.dtype, device=gen.device)

    def poison() -> None:
        out.fill_(torch.nan)
        insert.poison()

    def verify() -> None:
        assert_same_bytes(out, reference.rms_norm(q, q_weight, EPS), "q")
        insert.verify()

    return Case(p, (q, q_weight, kv, *rest), (out, insert.out), (), poison, verify)


def _positions(m: int, rope_dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions int32 [m], the last there is among them, and the table that they are of."""
    positions = torch.randint(0, POSITIONS, (m,), generator=gen, device=gen.device, dtype=torch.int32)
    positions[-1:] = POSITIONS - 1
    return positions, _rope_table(rope_dim, gen.device)


@functools.cache
def _rope_table(rope_dim: int, device: torch.device) -> Tensor:
    frequencies = reference.rope_frequencies(rope_dim, 160000.0, factor=16.0, original_max_position=65536)
    return reference.rope_table(frequencies.to(device), POSITIONS)


def _poison(t: NVFP4Tensor) -> None:
    t.data.fill_(0xFF)
    t.sf.view(torch.uint8).fill_(0xFF)


def assert_folded(
    got: tuple[Tensor, ...],
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm_eps: float = EPS,
    eps: float = EPS,
    iterations: int = 20,
    fn_error: float = 0.0,
) -> None:
    """got (y, post, comb), or (y,) of the head, against the FP64 fold of streams h [tokens, n, d].

    Errors of an FP32 sum of terms of either sign grow as the root of the sum of their squares, q: bound 2^-18 q, 32
    units in the last place. A kernel that has fn within fn_error of each element adds errors whose standard deviation
    is at most fn_error q / 3: bound 1.5 fn_error q. (fn in BF16 would be off by 2^-9 q, in TF32 by 2^-12 q.) The
    coefficients pass it on by the slopes of sigmoid and of exp, which Sinkhorn's normalisations may add up. y may fall
    on the other side of a rounding, before the norm and after it: one unit in its last place each, but in few elements.
    """
    n, head = h.shape[1], len(got) == 1
    h64, u = h.double(), h.double().flatten(1)
    norm = torch.rsqrt(u.square().mean(1, keepdim=True) + norm_eps)
    m = (u @ fn.double().T) * norm
    room = (2.0**-18 + 1.5 * fn_error) * (u.square() @ fn.double().T.square()).sqrt() * norm + 2.0**-20 * m.abs()
    s = scale.double().abs().repeat_interleave(torch.tensor([n] if head else [n, n, n * n], device=h.device))
    logit_room = room * s + 2.0**-22 * (m.abs() * s + base.double().abs())  # [tokens, outputs]

    how: dict[str, Any] = {"norm_eps": norm_eps, "eps": eps} | ({} if head else {"iterations": iterations})
    op: Callable[..., Any] = reference.hyper_connection_head if head else reference.hyper_connection_pre
    exact = op(h64, fn, base, scale, None, **how)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    y_room = ((logit_room[:, :n] / 4 + 2.0**-21 * pre)[:, :, None] * h64.abs()).sum(1)
    if head:
        y = exact
    else:
        y, post, comb = exact
        _assert_within(got[1], post, logit_room[:, n : 2 * n] / 2 + 2.0**-21 * post)
        worst = logit_room[:, 2 * n :].amax(1)[:, None, None]
        _assert_within(got[2], comb, (16 * worst + 2.0**-17) * comb)

    open_sums = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    if weight is not None:
        rounded, ulp = y.to(h.dtype).double(), _ulp(y, h.dtype)
        squares = rounded.square().sum(1, keepdim=True).clamp_min(1e-300)
        gain = weight.double() * torch.rsqrt(squares / h.shape[2] + norm_eps)
        either = (y - y_room).to(h.dtype) != (y + y_room).to(h.dtype)  # elements at a tie: either neighbour is right
        drift = (rounded.abs() * torch.where(either, ulp, y_room)).sum(1, keepdim=True) / squares + 2.0**-20
        open_sums = drift[:, 0] > 2.0**-14  # where a few such elements are many
        y_room = (y_room + ulp) * gain.abs() + drift * (rounded * gain).abs()
        y = rounded * gain
    _assert_within(got[0], y, y_room)
    if h.dtype != torch.float32:
        plain = op(h, fn, base, scale, weight, **how)
        off = (got[0] != (plain if head else plain[0]))[~open_sums]
        if off.sum() > max(3, off.numel() // 50):
            raise AssertionError(f"{int(off.sum())} of {off.numel()} elements of y are rounded another way")


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of FP64 numbers as numbers of dtype."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(info.smallest_normal)))) * info.eps


def random_streams(m: int, k: int, n: int, gen: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Streams [m, n, k] of several amplitudes; the second token is zero, the third large, the fourth has equal ones."""
    h = random_activations((m, n, k), gen, dtype)
    h[1:2] = 0
    h[2:3] *= 2.0 ** (30 if dtype != torch.float16 else 2)
    h[3:4] = h[3:4, :1].clone()
    return h


def _fold_weights(outputs: int, k: int, n: int, dtype: torch.dtype, gen: torch.Generator) -> tuple[Tensor, ...]:
    """fn, base, scale and the norm's weight: `outputs` coefficients of n streams of k columns, of unlike magnitude."""
    fn = torch.randn(outputs, n * k, generator=gen, device=gen.device) * (n * k) ** -0.5
    fn = fn * torch.exp2(torch.randint(-4, 3, (outputs, 1), generator=gen, device=gen.device).float())
    base = torch.randn(outputs, generator=gen, device=gen.device)
    scale = torch.tensor([0.7, 1.3, 2.0] if outputs > n else [0.7], device=gen.device)
    weight = 1 + 0.2 * torch.randn(k, generator=gen, device=gen.device)
    return fn, base, scale, weight.to(dtype)


def _fold_within(launched: list[Any], *operands: Any) -> None:
    """`assert_folded`, with the error of fn that the module which was launched says that it has."""
    assert_folded(*operands, fn_error=getattr(launched[0], "FN_ERROR", 0.0) if launched else 0.0)


def _fold_case(p: HyperConnectionPreProblem | HyperConnectionHeadProblem, gen: torch.Generator) -> Case:
    h, launched = random_streams(p.m, p.k, p.n, gen, TORCH_DTYPES[p.x]), list[Any]()
    y = h.new_empty(p.m, p.k)
    if isinstance(p, HyperConnectionHeadProblem):
        fold = (h, *_fold_weights(p.n, p.k, p.n, h.dtype, gen))
        return Case(
            p, (*fold, EPS, EPS), y, (), partial(_poison_all, (y,)), lambda: _fold_within(launched, (y,), *fold),
            lambda: reference.hyper_connection_head(*fold, norm_eps=EPS, eps=EPS), launched=launched,
        )  # fmt: skip
    fold = (h, *_fold_weights(p.n * (p.n + 2), p.k, p.n, h.dtype, gen))
    out = (y, *(torch.empty(p.m, *shape, device=gen.device) for shape in ((p.n,), (p.n, p.n))))
    return Case(
        p, (*fold, EPS, EPS, 20), out, (), partial(_poison_all, out), lambda: _fold_within(launched, out, *fold),
        lambda: reference.hyper_connection_pre(*fold, norm_eps=EPS, eps=EPS), launched=launched,
    )  # fmt: skip


def _site_case(p: HyperConnectionPostProblem | HyperConnectionPostPreProblem, gen: torch.Generator) -> Case:
    h = random_streams(p.m, p.k, p.n, gen, TORCH_DTYPES[p.x])
    y = random_activations((p.m, p.k), gen, h.dtype)
    post = 2 * torch.rand(p.m, p.n, generator=gen, device=gen.device)
    comb = torch.rand(p.m, p.n, p.n, generator=gen, device=gen.device)
    site, streams = (y, h, post, comb), torch.empty_like(h)

    def verify_streams() -> None:
        assert_same_bytes(streams, reference.hyper_connection_post(*site), "streams")

    if isinstance(p, HyperConnectionPostProblem):
        eager: Callable[[], object] = lambda: reference.hyper_connection_post(*site)  # noqa: E731
        return Case(p, site, streams, (), partial(_poison_all, (streams,)), verify_streams, eager)
    weights = _fold_weights(p.n * (p.n + 2), p.k, p.n, h.dtype, gen)
    out = (streams, h.new_empty(p.m, p.k), torch.empty_like(post), torch.empty_like(comb))

    launched = list[Any]()

    def verify() -> None:
        verify_streams()
        _fold_within(launched, out[1:], streams, *weights)

    return Case(
        p, (*site, *weights, EPS, EPS, 20), out, (), partial(_poison_all, out), verify,
        lambda: reference.hyper_connection_post_pre(*site, *weights, norm_eps=EPS, eps=EPS), launched=launched,
    )  # fmt: skip


def _poison_all(tensors: tuple[Tensor, ...]) -> None:
    for t in tensors:
        t.fill_(torch.nan)
