"""compress_kv_pair gives the bytes of two calls of the reference: every pair of formats, ragged steps, one launch."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.problem import CompressKvPairProblem
from fp4suite.reference import CompressorStep
from kernels_triton import compress_kv_pair as kernel

from ..fp4suite.op_arguments import arguments
from .test_compress_kv import EPS, TABLE, Layer

ENTRIES = [("nvfp4", 80), ("fp8_ds_mla", 80), ("bf16", 40)]
KEYS = [("index_fp8", 64), ("index_mxfp4", 32), ("index_bf16", 24)]
CONFIG = kernel.Config(num_warps=1)
APART = kernel.Config(num_warps=2, apart=True)


class Pair:
    """Two compressors of a layer with rings and caches for the reference and for the kernel, compared at every step.

    kv and gate of both are columns of one tensor; one slot of the caches stands for both.
    """

    def __init__(
        self, device: torch.device, *, entries=("bf16", 40), keys=("index_fp8", 64), ratio=4, lanes=2, extra=0,
        config=CONFIG,
    ):  # fmt: skip
        self.layers = [
            Layer(device, ratio, lanes, dim, format, extra=own, hadamard=format == "index_mxfp4")
            for (format, dim), own in ((entries, extra), (keys, 2 * extra))
        ]
        self.layers[1].order = self.layers[0].order
        self.ratio, self.config = ratio, config

    def rows(self, tokens: int, seed: int) -> Tensor:
        return torch.cat([part for i, layer in enumerate(self.layers) for part in layer.rows(tokens, seed + i)], dim=1)

    def step(self, parts: list[tuple[int, int, Tensor]], padding: int = 0) -> None:
        self.take_in(parts, padding)
        for layer in self.layers:
            layer.check()

    def take_in(self, parts: list[tuple[int, int, Tensor]], padding: int = 0) -> None:
        """(state slot, first position, rows of both) of each sequence."""
        widths = [layer.width for layer in self.layers for _ in range(2)]
        made = [
            layer.arguments(
                [(slot, at, *rows.split(widths, dim=1)[2 * i : 2 * i + 2]) for slot, at, rows in parts], padding
            )
            for i, layer in enumerate(self.layers)
        ]
        integers = made[0][1]
        fused = torch.cat([x for args, _ in made for x in args[:2]], dim=1).split(widths, dim=1)
        steps = [
            [
                CompressorStep(*kv_gate, layer.ape, layer.weight, layer.states[i], layer.caches[i], layer.hadamard)
                for layer, kv_gate in zip(self.layers, (fused[:2], fused[2:]), strict=True)
            ]
            for i in range(2)
        ]
        table = made[0][0][4]
        reference.compress_kv_pair(*steps[0], table, EPS, **integers, ratio=self.ratio)
        kernel.launch(table, EPS, *integers.values(), self.ratio, (steps[1][0], steps[1][1]), self.config)


@pytest.mark.parametrize("keys", KEYS, ids=lambda x: x[0])
@pytest.mark.parametrize("entries", ENTRIES, ids=lambda x: x[0])
def test_every_pair_of_formats(entries, keys, device):
    """Single tokens of two sequences, one of which completes an entry."""
    problem = CompressKvPairProblem(
        m=2, sequences=0, ratio=4, overlaps=2, head_dim=entries[1], rope_dim=16, format=entries[0], key_dim=keys[1],
        key_format=keys[0], key_hadamard=int(keys[0] == "index_mxfp4"), page_size=8,
    )  # fmt: skip
    c = testing.case(problem, device)
    assert kernel.supports(problem, CONFIG) is None
    c.run(kernel, CONFIG)
    c.check()
    assert all((step.cache.data != 0xFF).any() for step in c.out)


@pytest.mark.parametrize("config", [CONFIG, APART], ids=str)
@pytest.mark.parametrize(("ratio", "lanes", "extra"), [(4, 2, 3), (8, 1, 0)])
def test_ragged_steps_with_padding(ratio, lanes, extra, config, device):
    """Three sequences in steps of random sizes and order, single tokens among them, NaN padding behind. The rings are
    of different lengths."""
    dice, pair = random.Random(ratio), Pair(device, ratio=ratio, lanes=lanes, extra=extra, config=config)
    data = {slot: pair.rows(6 + 5 * slot, seed=10 * slot) for slot in range(3)}
    at = dict.fromkeys(data, 0)
    while any(at[s] < len(data[s]) for s in data):
        parts = []
        for slot in dice.sample(sorted(data), dice.randint(1, 3)):
            size = min(dice.choice((1, 2, 5, 13)), len(data[slot]) - at[slot])
            if size:
                parts.append((slot, at[slot], data[slot][at[slot] : at[slot] + size]))
                at[slot] += size
        if parts:
            pair.step(parts, padding=dice.randint(0, 3))


def test_programs_in_another_order(device, monkeypatch):
    """The last one first, keys before entries: what a program writes to a ring, no other one reads."""
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def last_first(x: int, y: int, z: int) -> None:
        place(builder.grid_dim[0] - 1 - x, builder.grid_dim[1] - 1 - y, z)

    monkeypatch.setattr(builder, "set_grid_idx", last_first)
    pair, at = Pair(device, keys=("index_mxfp4", 32)), 0
    rows = pair.rows(26, seed=1)
    for size in (6, 3, 17):
        pair.step([(1, at, rows[at : at + size])])
        at += size


def test_what_is_not_finite(device):
    """Infinities and NaN of one of the two stay in it, and in the windows that they are in."""
    pair = Pair(device, entries=("fp32", 40), keys=("index_fp32", 24))
    rows = pair.rows(16, seed=3)
    width = pair.layers[0].width
    # of entries: a value of the own window, a gate of the one before
    rows[5, 40 + 3], rows[6, width + 7] = torch.inf, torch.nan
    pair.take_in([(0, 0, rows[:7])])
    pair.take_in([(0, 7, rows[7:])])
    slots = pair.layers[0].order[:1] * pair.layers[0].page + torch.arange(4)
    for layer, spoilt in zip(pair.layers, ([False, True, True, False], [False] * 4), strict=True):
        want, got = (reference.read_rows(cache, slots.int().to(device)) for cache in layer.caches)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(layer.states[1], layer.states[0], rtol=0, atol=0, equal_nan=True)
        assert got.isnan().any(1).tolist() == spoilt


def test_no_tokens(device):
    pair = Pair(device)
    empty = pair.rows(1, seed=1)[:0]
    pair.step([(0, 0, empty)])
    assert all(layer.states[1].isnan().all() for layer in pair.layers)


@pytest.mark.parametrize("config", [CONFIG, APART], ids=str)
def test_cases_of_the_tuner(config, device):
    """A step of one sequence, which is as long as a pool; and that a fault in any of the four results is seen."""
    problem = CompressKvPairProblem(
        m=13, ratio=4, overlaps=2, head_dim=64, rope_dim=16, format="bf16", key_dim=32, key_format="index_fp8"
    )
    c = testing.case(problem, device)
    c.run(kernel, config)
    c.check()
    for name, step in zip(("entries'", "keys'"), c.out, strict=True):
        for what, changed in (("cache", step.cache.data), ("ring", step.state)):
            before = changed.clone()
            changed.view(torch.uint8).flatten()[-5] ^= 1
            with pytest.raises(AssertionError, match=f"{name} {what}: .* bytes differ"):
                c.check()
            changed.copy_(before)
    c.check()


def test_a_problem_counts_both():
    dims = {"m": 7, "ratio": 4, "overlaps": 2, "rope_dim": 64, "sequences": 0}
    problem = CompressKvPairProblem(**dims, head_dim=512, format="nvfp4", key_dim=128, key_format="index_fp8")
    entries, keys = problem.parts
    assert (entries.head_dim, entries.format, keys.head_dim, keys.format) == (512, "nvfp4", 128, "index_fp8")
    assert problem.bytes == entries.bytes + keys.bytes
    assert problem.flops == entries.flops + keys.flops


def test_refusals(device):
    dims = {"m": 1, "overlaps": 2, "rope_dim": 64, "head_dim": 512, "format": "nvfp4", "key_format": "index_mxfp4"}
    long = CompressKvPairProblem(**dims, ratio=16, key_dim=128)
    assert kernel.supports(long, CONFIG) == "pools of 32 rows take a second launch: call compress_kv for each"
    problem = CompressKvPairProblem(**dims, ratio=4, key_dim=128, key_hadamard=1)
    assert kernel.default(problem) == kernel.Config(num_warps=4)
    assert kernel.supports(problem, kernel.default(problem)) is None
    many = replace(problem, m=16384)
    assert kernel.default(many) == kernel.Config(num_warps=4, apart=True)
    assert kernel.supports(many, kernel.default(many)) is None
    assert "128 channels of 8 rows a thread" in (kernel.supports(problem, CONFIG) or "")
    assert kernel.supports(problem, kernel.Config(apart=True)) is None
    assert "128 channels of 8 rows a thread" in (kernel.supports(problem, replace(CONFIG, apart=True)) or "")
    odd = kernel.supports(replace(problem, key_dim=96), kernel.Config())
    assert odd == "a Hadamard transform needs a power of two, got head_dim=96"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": slice(0, 4)}, ValueError, r"keys: kv \[5, 128\] needs gate \[5, 128\], got \[4, 128\]"),
        ({"ape": slice(0, 3)}, ValueError, r"keys: kv \[5, 128\] needs ape \[4, 128\], got \[3, 128\]"),
        ({"weight": slice(0, 63)}, ValueError, r"needs weight \[64\], got \[63\]"),
        ({"state": slice(None, None, 2)}, ValueError, "keys: state and cache.data must be contiguous"),
        ({"kv": slice(0, 4), "gate": slice(0, 4)}, ValueError, r"same tokens, .* got \[5, 2, 8\] and \[4, 2, 8\]"),
        (
            {"kv": torch.float16},
            TypeError,
            "keys: kv and gate must have one dtype, got torch.float16 and torch.float32",
        ),
        (
            {"kv": torch.float16, "gate": torch.float16},
            TypeError,
            r"agree in the dtypes of kv, gate and weight, got .*float32.*float16",
        ),
    ],
    ids=lambda x: str(x)[:12],
)
def test_the_op_refuses(change, error, message):
    (entries, keys, *rest), step = arguments("compress_kv_pair")
    if "state" in change:
        keys = replace(keys, state=torch.cat((keys.state, keys.state)))
    changed = {
        name: getattr(keys, name)[how] if isinstance(how, slice) else getattr(keys, name).to(how)
        for name, how in change.items()
    }
    with pytest.raises(error, match=message):
        ops.compress_kv_pair(entries, replace(keys, **changed), *rest, **step)


def test_the_op_refuses_integers():
    args, step = arguments("compress_kv_pair")
    for name, length in (("positions", 5), ("sequence_ids", 5), ("slots", 5), ("cu_seqlens", 3)):
        with pytest.raises(ValueError, match=rf"{name} must be int32 \[{length}\], got .* \[{length - 1}\]"):
            ops.compress_kv_pair(*args, **{**step, name: step[name][1:]})
        with pytest.raises(ValueError, match=rf"{name} must be int32 \[{length}\], got torch.int64"):
            ops.compress_kv_pair(*args, **{**step, name: step[name].long()})


def test_the_op(device):
    """Through dispatch, one of the tensors transposed."""
    pair = Pair(device)
    rows = [layer.rows(9, seed=7 + i) for i, layer in enumerate(pair.layers)]
    both, integers = [], {}
    for layer, own in zip(pair.layers, rows, strict=True):
        (kv, gate, *_), integers = layer.arguments([(1, 0, *own)])
        both.append(
            [
                CompressorStep(a, b, layer.ape, layer.weight, layer.states[i], layer.caches[i])
                for i, (a, b) in enumerate(((kv, gate), (kv.T.contiguous().T, gate)))
            ]
        )
    table = TABLE.to(device)
    reference.compress_kv_pair(both[0][0], both[1][0], table, EPS, **integers, ratio=4)
    with on_target("sm_90a"), override(kernel="triton_compress_kv_pair", config=CONFIG):
        ops.compress_kv_pair(both[0][1], both[1][1], table, EPS, **integers, ratio=4)
    for layer in pair.layers:
        layer.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("m", "sequences"), [(1, 1), (64, 64), (4096, 1), (5000, 8)])
@pytest.mark.parametrize(
    ("entries", "keys"),  # all of either, programs of which are one or the other: each pair takes a minute to compile
    [
        ("fp8_ds_mla", "index_fp8"),
        ("nvfp4", "index_mxfp4"),
        ("bf16", "index_bf16"),
        ("fp8_ds_mla", "index_mxfp4"),
        ("nvfp4", "index_fp8"),
    ],
)
def test_real_sizes(entries, keys, m, sequences, config, device):
    problem = CompressKvPairProblem(
        m=m, sequences=sequences, ratio=4, overlaps=2, head_dim=512, rope_dim=64, format=entries, key_dim=128,
        key_format=keys, key_hadamard=int(keys == "index_mxfp4"),
    )  # fmt: skip
    if kernel.supports(problem, config) is None:
        c = testing.case(problem, device)
        for _ in range(3):  # a race would not show every time
            c.run(kernel, config)
            c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on other rows."""
    problem = CompressKvPairProblem(
        m=64, sequences=0, ratio=4, overlaps=2, head_dim=512, rope_dim=64, format="nvfp4", key_dim=128,
        key_format="index_mxfp4", key_hadamard=1,
    )  # fmt: skip
    c, config = testing.case(problem, device), kernel.default(problem)
    kernel.warm(problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for _ in range(3):
        for step in c.out:
            step.kv.copy_(torch.roll(step.kv, 1, 0))
        c.poison()
        graph.replay()
        c.check()
