"""Linears of one input in one product: the same numbers as apart, the same weights by the same names, and cut where
tiles end."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fp4suite import recording
from fp4suite.formats import NVFP4Tensor, WeightLayout
from fp4suite.reference.native import quantize_fp8_block
from fp4suite.reference.quant import dequant_nvfp4, quantize_nvfp4
from model.config import ModelConfig
from model.inputs import Input
from model.joined import Joined, Whole
from model.linear import ActFormat, Format, Linear
from model.transformer import Transformer
from ptx_emulator import emulate
from tests.model.oracle import cache_for, random_model, relative_error, run

TINY = ModelConfig.named("tiny")
ROWS = WeightLayout()
FRAGMENTS = WeightLayout(order="fragments_sm90")
BLOCKED = WeightLayout(sf_layout="blocked_128x4")


def modelopt(name: str) -> Format:
    return "bf16" if name.endswith(("embed", "head", "ffn.gate", "wo_a")) else "nvfp4"


def native(name: str) -> Format:
    if ".ffn.w" in name:
        return "nvfp4"
    return "bf16" if "compressor" in name or name.endswith(("embed", "head", "ffn.gate", "weights_proj")) else "fp8"


def linears(*rows: int, k: int = 256, format: Format = "nvfp4", act: ActFormat = "float") -> list[Linear]:
    """Each of its own magnitude, so that one's alpha would be far off for another."""
    gen = torch.Generator().manual_seed(sum(rows))
    made = [Linear(n, k, format, act=act) for n in rows]
    for i, linear in enumerate(made):
        w = 4.0**i * torch.randn(linear.shape, generator=gen)
        if format == "nvfp4":
            linear.weight = quantize_nvfp4(w)
        else:
            linear.weight = quantize_fp8_block(w) if format == "fp8" else w.to(linear.data.dtype)
    return made


def same(one: object, other: object) -> bool:
    """Weights, to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(
            one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
        )
    names = ("data", "sf", "alpha") if isinstance(one, NVFP4Tensor) else ("data", "sf")
    return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize("first", [None, 1, 2, 3])
def test_products_are_those_of_the_parts(format: Format, first: int | None) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = linears(128, 256, 64, format=format)
    want = [part(x, torch.float32) for part in parts[:first]]
    joined = Joined(*parts)
    assert all(map(torch.equal, joined(x, torch.float32, first=first), want))  # apart as yet
    joined.join(None, "cpu")
    assert joined.whole is not None
    assert joined.whole.shape == (448, 256)
    got = joined(Input(x), torch.float32, first=first)
    assert len(got) == len(want)
    assert all(relative_error(g, w) < 1e-6 for g, w in zip(got, want, strict=True))
    assert len({g.untyped_storage().data_ptr() for g in got}) == 1  # columns of one tensor
    assert joined(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("arch", "layout", "act"), [("sm_90a", FRAGMENTS, "float"), ("sm_100a", BLOCKED, "nvfp4")])
def test_on_tensor_cores(arch: str, layout: WeightLayout, act: ActFormat) -> None:
    """One launch of the emulated GPU's kernel for all parts, and for the first two alone, with the same bits."""
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    joined = Joined(*linears(128, 128, 64, act=act))
    read = x.float() if act == "float" else dequant_nvfp4(quantize_nvfp4(x), torch.float32)
    want = [read @ dequant_nvfp4(part.weight, torch.float32).T for part in joined.parts]
    with emulate(arch), recording() as choices:
        joined.join(None, "cpu")
        assert joined.whole is not None
        weight = joined.whole.weight
        assert isinstance(weight, NVFP4Tensor)
        assert weight.layout == layout
        got = joined(x)
        few = joined(x, first=2)
    asked = [(c.problem.n, c.problem.segments, c.is_reference) for c in choices if c.op == "gemm_nvfp4"]
    assert asked == [(320, 3, False), (256, 2, False)]
    assert all(relative_error(g, w) < 5e-3 for g, w in zip(got, want, strict=True))  # rounded to BF16
    assert all(map(torch.equal, few, got))


def test_parts_stay_the_models_weights() -> None:
    """By name, to the bit, in a state dict and a copy; the joined ones are none."""
    model = random_model(TINY, weight_format=modelopt)
    before, state = dict(model.weights()), {n: t.clone() for n, t in model.state_dict().items()}
    size = sum(t.nbytes for t in model.buffers())
    model.lay_out(ROWS, "cpu")
    for one in (model, copy.deepcopy(model)):
        wholes = [name.split(".")[-2] for name, module in one.named_modules() if isinstance(module, Whole)]
        kinds = [TINY.kind(i) for i in range(TINY.num_hidden_layers)] + ["swa"] * TINY.num_nextn_predict_layers
        assert Counter(wholes) == {
            "latents": len(kinds),
            "sums": len(kinds) - kinds.count("swa"),
            "queries": kinds.count("csa"),
        }
        after = dict(one.weights())
        assert after.keys() == before.keys()
        assert all(same(after[name], before[name]) for name in before)
        again = one.state_dict()
        assert again.keys() == state.keys()
        assert all(same(again[n], state[n]) for n in state)
        assert sum(t.nbytes for t in one.buffers()) == size  # held once


def test_the_model_gives_the_same() -> None:
    apart, joined = (random_model(TINY, weight_format=modelopt) for _ in range(2))
    joined.lay_out(ROWS, "cpu")
    ids = list(range(2, 60))  # more entries than are chosen, so that the indexer works; in the first step it does not
    logits = []
    for model in (apart, joined):
        cache = cache_for(TINY)
        slot = cache.open()
        logits.append(run(model, cache, [[(slot, ids[:9])], [(slot, ids[9:])]])[slot])
    assert relative_error(logits[1], logits[0]) < 1e-5


def test_setting_a_part_takes_the_whole_apart() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    parts = linears(128, 64)
    joined, kept, new = Joined(*parts), parts[1].weight, quantize_nvfp4(torch.randn(128, 256))
    joined.join(FRAGMENTS, "cpu")
    assert {part.order for part in parts} == {"fragments_sm90"}
    with pytest.raises(ValueError, match=r"this weight is \[128, 256\]"):
        parts[0].weight = torch.randn(64, 256)
    assert joined.whole is not None  # a refusal changes nothing
    parts[0].weight = new
    assert joined.whole is None
    assert [part.order for part in parts] == ["rows", "fragments_sm90"]
    assert same(parts[1].weight.with_order("rows"), kept)
    got = joined(x)
    assert relative_error(got[0], x @ dequant_nvfp4(new, torch.float32).T) < 1e-6
    joined.join(FRAGMENTS, "cpu")
    assert joined.whole is not None
    assert all(relative_error(g, w) < 1e-6 for g, w in zip(joined(x), got, strict=True))


def test_a_state_dict_fills_parts() -> None:
    model = random_model(TINY, weight_format=modelopt)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    other = random_model(TINY, weight_format=modelopt, seed=1)
    other.lay_out(ROWS, "cpu")
    other.load_state_dict(state)
    assert all(same(w, dict(model.weights())[name]) for name, w in other.weights())
    other.lay_out(FRAGMENTS, "cpu")
    with pytest.raises(ValueError, match='"fragments_sm90" is not read from a state dict'):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("parts", "layout"),
    [
        (linears(128) + linears(64, format="bf16"), ROWS),
        (linears(64, format="bf16") + linears(64, format="fp32"), ROWS),
        (linears(80, 128, format="fp8"), ROWS),  # a block of 128 rows would be of both
        (linears(64, 80), FRAGMENTS),  # 80 rows are not tiles of 64
        (linears(64, 128), BLOCKED),  # an atom of 128 rows would be of both
        (linears(64), ROWS),
    ],
    ids=["packed and plain", "two dtypes", "FP8 blocks", "fragments", "atoms of scales", "one alone"],
)
def test_the_unlike_stay_apart(parts: list[Linear], layout: WeightLayout) -> None:
    x, joined = torch.randn(3, 256), Joined(*parts)
    want = joined(x)
    joined.join(layout, "cpu")
    assert joined.whole is None
    assert all(map(torch.equal, joined(x), want))


def test_gate_and_up_cannot_be_a_part() -> None:
    with pytest.raises(ValueError, match="one alpha each"):
        Joined(Linear(64, 64), Linear(64, 64, segments=(32, 32)))


def test_every_group_of_the_released_models() -> None:
    """In the formats of their checkpoints all join, on both architectures' layouts."""
    pro = ModelConfig.named("pro")
    config = replace(pro, num_hidden_layers=3, compress_ratios=(0, 128, 4), num_nextn_predict_layers=0)
    for formats, layouts in ((modelopt, (ROWS, FRAGMENTS, BLOCKED)), (native, (ROWS,))):
        for layout in layouts:
            model = Transformer(config, formats, device="meta")
            groups = set(model.joined().values())
            for group in groups:
                group.join(layout, "cpu")
            assert {len(group.parts) for group in groups} == {1, 2, 5}
            assert all((group.whole is None) == (len(group.parts) == 1) for group in groups)
