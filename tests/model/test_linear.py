"""Weights in every format: forward passes agree with the decoded weight, wrong ones are refused, meta costs nothing."""

import pytest
import torch

from fp4suite import recording
from fp4suite.formats import FP8BlockTensor, NVFP4Tensor, WeightLayout
from fp4suite.reference.native import dequant_fp8_block, quantize_fp8_block
from fp4suite.reference.quant import dequant_nvfp4, quantize_nvfp4
from model.config import ModelConfig
from model.linear import ActFormat, Format, Linear, Weight
from model.transformer import Transformer
from ptx_emulator import emulate
from tests.model.oracle import cache_for, random_model, relative_error, run

TINY = ModelConfig.named("tiny")
IDS = list(range(2, 60))


def native(name: str) -> Format:
    """The formats of the native release once its experts are NVFP4."""
    if ".ffn.w" in name:
        return "nvfp4"
    return "bf16" if "compressor" in name or name.endswith(("embed", "head", "gate", "weights_proj")) else "fp8"


def modelopt(name: str) -> Format:
    """Everything NVFP4 but the grouped output projection, the router, head and embedding."""
    return "bf16" if name.endswith(("embed", "head", "gate", "wo_a")) else "nvfp4"


def everything(name: str) -> Format:
    return "bf16" if name == "embed" else "nvfp4"


def decoded(model: Transformer) -> Transformer:
    """The same model with every packed weight as an FP32 tensor."""
    out = Transformer(model.config, lambda name: "fp32", act_dtype=torch.float32)
    for name, value in model.weights():
        if isinstance(value, NVFP4Tensor):
            halves = (value.shape[-2] // 2,) * 2 if value.alpha.ndim > value.data.ndim - 2 else None
            value = dequant_nvfp4(value, torch.float32, segments=halves)
        elif isinstance(value, FP8BlockTensor):
            value = dequant_fp8_block(value, torch.float32)
        out.set_weight(name, value.float() if value.is_floating_point() else value)
    return out


@pytest.mark.parametrize("formats", [native, modelopt, everything])
def test_packed_model_equals_its_decoded_weights(formats) -> None:
    """FP32 activations, so that only the order of sums differs."""
    model = random_model(TINY, weight_format=formats)
    caches = [cache_for(TINY), cache_for(TINY)]
    got = run(model, caches[0], [[(caches[0].open(), IDS)]])[0]
    want = run(decoded(model), caches[1], [[(caches[1].open(), IDS)]])[0]
    assert relative_error(got, want) < 1e-5


def test_gate_and_up_keep_their_own_alpha() -> None:
    """Were gate's alpha used for both, or the two averaged, the model would be far off."""
    model = random_model(TINY, weight_format=modelopt)
    name = "layers.1.ffn.shared.w13"
    weight = dict(model.weights())[name]
    assert weight.alpha.shape == (2,)
    weight.alpha[1] *= 4
    caches = [cache_for(TINY), cache_for(TINY)]
    got = run(model, caches[0], [[(caches[0].open(), IDS)]])[0]
    want = run(decoded(model), caches[1], [[(caches[1].open(), IDS)]])[0]
    assert relative_error(got, want) < 1e-5


def test_w4a4_error_is_that_of_quantised_inputs() -> None:
    """Four-bit inputs beside four-bit weights: off by about 0.1 in one layer, by exactly their rounding."""
    layer = Linear(96, 256, "nvfp4", act="nvfp4")
    generator = torch.Generator().manual_seed(0)
    layer.weight = quantize_nvfp4(torch.randn(96, 256, generator=generator))
    x = torch.randn(50, 256, generator=generator)
    exact = x @ dequant_nvfp4(layer.weight, torch.float32).T
    assert 0.05 < relative_error(layer(x), exact) < 0.15
    rounded = dequant_nvfp4(quantize_nvfp4(x), torch.float32)
    assert relative_error(layer(x), rounded @ dequant_nvfp4(layer.weight, torch.float32).T) < 1e-6
    model = random_model(TINY, weight_format=modelopt, act_format="nvfp4")
    cache = cache_for(TINY)
    assert run(model, cache, [[(cache.open(), IDS)]])[0].isfinite().all()


def test_w4a8_runs_where_a_kernel_takes_it() -> None:
    """In the emulator on Hopper's FP8 tensor cores, with the error of eight bits; other shapes keep their input."""
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(5, 256, generator=gen).bfloat16()
    for n, act in ((128, "fp8"), (136, "bf16")):
        layer = Linear(n, 256, "nvfp4", act="fp8")
        layer.weight = quantize_nvfp4(torch.randn(n, 256, generator=gen))
        exact = x.float() @ dequant_nvfp4(layer.weight, torch.float32).T
        with emulate("sm_90a"), recording() as choices:
            layer.lay_out(None, "cpu")
            error = relative_error(layer(x, torch.float32), exact)
        assert [c.problem.act for c in choices if c.op == "gemm_nvfp4"] == [act]
        assert 0.02 < error < 0.05 if act == "fp8" else error < 1e-5
        assert layer.order == ("fragments_sm90_fp8" if act == "fp8" else "rows")
    model = random_model(TINY, weight_format=modelopt, act_format="fp8")
    for module in model.modules():
        if isinstance(module, Linear):
            module.lay_out(None, "cpu")
    cache, plain = cache_for(TINY), cache_for(TINY)
    got = run(model, cache, [[(cache.open(), IDS)]])[0]
    want = run(random_model(TINY, weight_format=modelopt), plain, [[(plain.open(), IDS)]])[0]
    assert 1e-3 < relative_error(got, want) < 0.3
    assert not any("row_exponent" in name for name in model.state_dict())


def test_a_weight_for_fp8_goes_back_to_other_layouts() -> None:
    """Each `lay_out` leaves the weight as kernels of its activations and layout read it, and the numbers the same."""
    gen = torch.Generator().manual_seed(6)
    layer, x = Linear(128, 256, "nvfp4", act="fp8"), torch.randn(5, 256, generator=gen).bfloat16()
    layer.weight = quantize_nvfp4(torch.randn(128, 256, generator=gen))
    exact = x.float() @ dequant_nvfp4(layer.weight, torch.float32).T
    asked: tuple[tuple[ActFormat, WeightLayout | None, str], ...] = (
        ("fp8", None, "fragments_sm90_fp8"),
        ("float", None, "fragments_sm90"),
        ("fp8", WeightLayout("fragments_sm90"), "fragments_sm90"),  # no kernel takes FP8 beside it
        ("fp8", None, "fragments_sm90_fp8"),
    )
    for act, layout, order in asked:
        layer.act = act
        with emulate("sm_90a"), recording() as choices:
            layer.lay_out(layout, "cpu")
            error = relative_error(layer(x, torch.float32), exact)
        assert layer.order == order
        in_fp8 = order == "fragments_sm90_fp8"
        assert [c.problem.act for c in choices if c.op == "gemm_nvfp4"] == ["fp8" if in_fp8 else "bf16"]
        assert 0.02 < error < 0.05 if in_fp8 else error < 1e-5


def test_fp8_keeps_the_input_where_rows_cannot_be_permuted() -> None:
    """k=96 is no multiple of 64: on the CPU too, where the reference runs whatever it is given."""
    layer, x = Linear(64, 96, "nvfp4", act="fp8"), torch.randn(5, 96)
    layer.weight = quantize_nvfp4(torch.randn(64, 96))
    layer.lay_out(None, "cpu")
    assert relative_error(layer(x), x @ dequant_nvfp4(layer.weight, torch.float32).T) < 1e-5


def test_one_weight_in_memory_serves_both_kinds_of_activations() -> None:
    """Laid out for Hopper's kernel, run by it in the emulator, W4A16 and W4A4 by turns."""
    gen = torch.Generator().manual_seed(5)
    layer, x = Linear(128, 256, "nvfp4"), torch.randn(5, 256, generator=gen).bfloat16()
    layer.weight = quantize_nvfp4(torch.randn(128, 256, generator=gen))
    exact = dequant_nvfp4(layer.weight, torch.float32).T
    with emulate("sm_90a"), recording() as choices:
        for act, inputs in (("float", x), ("nvfp4", dequant_nvfp4(quantize_nvfp4(x), torch.float32))) * 2:
            layer.act = act
            layer.lay_out(None, "cpu")
            assert layer.order == "fragments_sm90"
            assert relative_error(layer(x, torch.float32), inputs.float() @ exact) < 1e-5
    gemms = [c for c in choices if c.op == "gemm_nvfp4"]
    assert {c.kernel for c in gemms} == {"cute_gemm_nvfp4_sm90_wgmma"}
    assert ["decoded" in c.reason for c in gemms] == [False, True] * 2


def test_bf16_model_runs() -> None:
    model = random_model(TINY, weight_format=native, act_dtype=torch.bfloat16)
    cache = cache_for(TINY, kv_format="bf16", index_format="bf16")
    got = run(model, cache, [[(cache.open(), IDS)]])[0]
    assert got.dtype == torch.float32
    cache = cache_for(TINY)
    assert relative_error(got, run(decoded(model), cache, [[(cache.open(), IDS)]])[0]) < 0.15


def test_output_dtype_is_summed_in_fp32() -> None:
    """A BF16 sum of 4096 ones and a tiny number could not come out exact."""
    layer = Linear(1, 4097)
    layer.weight = torch.ones(1, 4097, dtype=torch.bfloat16)
    x = torch.ones(1, 4097, dtype=torch.bfloat16)
    x[0, 0] = 2**-8
    assert layer(x, torch.float32).item() == 4096 + 2**-8


def test_fp8_weight_is_exact() -> None:
    layer = Linear(200, 130, "fp8")
    layer.weight = quantize_fp8_block(torch.randn(200, 130))
    x = torch.randn(3, 2, 130)
    want = torch.nn.functional.linear(x, dequant_fp8_block(layer.weight, torch.float32))
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.empty(3, 64), ValueError, r"this weight is \[4, 64\], got \[3, 64\]"),
        (torch.empty(4, 64, dtype=torch.int32), TypeError, "float type"),
        (quantize_nvfp4(torch.randn(4, 64), segments=(1, 3)), ValueError, "alpha must be"),
    ],
)
def test_wrong_weights(value, error, message) -> None:
    layer = Linear(4, 64)
    with pytest.raises(error, match=message):
        layer.weight = value


def test_formats_that_cannot_hold_a_shape() -> None:
    with pytest.raises(ValueError, match="cannot be 'fp8'"):
        Weight((2, 4, 64), "fp8")
    with pytest.raises(ValueError, match="cannot be 'int4'"):
        Weight((4, 64), "int4")


def test_set_weight_refuses_what_does_not_fit() -> None:
    model = Transformer(TINY, device="meta")
    with pytest.raises(KeyError, match=r"layers\.0\.attn\.wq"):
        model.set_weight("layers.0.attn.wq", torch.empty(1))
    with pytest.raises(KeyError, match="data"):
        model.set_weight("layers.0.attn.wq_a.data", torch.empty(64, 128))
    with pytest.raises(ValueError, match=r"norm must be \[128\], got \[64\]"):
        model.set_weight("norm", torch.empty(64))
    with pytest.raises(TypeError, match="tid2eid"):
        model.set_weight("layers.0.ffn.gate.tid2eid", torch.empty(288, 2))


def test_kinds_that_no_op_takes() -> None:
    model = random_model(TINY, weight_format=lambda name: "nvfp4" if name == "layers.0.ffn.w13" else "fp32")
    cache = cache_for(TINY)
    with pytest.raises(TypeError, match="both be NVFP4 or both plain tensors, got NVFP4Tensor and Tensor"):
        run(model, cache, [[(cache.open(), IDS)]])
    model = random_model(TINY)
    model.embed.weight = quantize_nvfp4(model.embed.weight)
    cache = cache_for(TINY)
    with pytest.raises(TypeError, match="embedding must be a plain tensor, got NVFP4Tensor"):
        run(model, cache, [[(cache.open(), IDS)]])


@pytest.mark.parametrize(("name", "parameters"), [("pro", 1572.99e9), ("flash", 284.3e9)])
def test_released_models_on_meta(name: str, parameters: float) -> None:
    """All weights under their names, nothing allocated; the trunks' published sizes."""
    model = Transformer(ModelConfig.named(name), native, device="meta")
    weights = dict(model.weights())
    assert all(w.device.type == "meta" for w in weights.values())
    count = sum(torch.Size(w.shape).numel() for n, w in weights.items() if not n.endswith("tid2eid") and "mtp" not in n)
    assert count == pytest.approx(parameters, rel=2e-4)
    assert weights["layers.2.attn.indexer.compressor.ape"].shape == (4, 256)
    assert isinstance(weights["mtp.0.e_proj"], FP8BlockTensor)
