"""gemm_nvfp4_sm90_wgmma: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import itertools
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from fp4suite import dispatch, layouts, testing
from fp4suite.built import resources, sass
from fp4suite.problem import GemmProblem
from kernels_cute import build, gemm_nvfp4_sm90_wgmma as kernel
from kernels_cute.gemm_nvfp4_sm90_wgmma import SPACE, Config
from ptx_emulator import emulate
from ptx_emulator.errors import Fault
from tuner import targets

from . import sm90_cases
from .scoreboards import loads_on_their_way

Problem = partial(GemmProblem, act="bf16", order=kernel.WEIGHT_ORDER)
BIG = Problem(m=256, n=7168, k=3072)
SMALL = Config(tile_m=8, groups_n=1, groups_k=2, stages=4)
WIDE = Config(tile_m=256, tile_k=64)
CONFIGS = [
    SMALL,
    Config(tile_m=8, groups_n=2, stages=2, tile_k=256),
    Config(tile_m=8, groups_n=1, groups_k=4, warps=3, stages=8),
    Config(tile_m=16, groups_n=1, groups_k=2, warps=2, tile_k=256, stages=4, blocks=2),
    Config(tile_m=16, groups_n=1, warps=3, stages=3, split=2),
    Config(tile_m=16, groups_n=1, groups_k=4, stages=8, split=2),
    Config(tile_m=16, groups_n=1, strips=2, tile_k=64, share=2, split=2),
    Config(tile_m=32, groups_n=1, stages=3, share=2),
    Config(tile_m=64, groups_n=3, tile_k=64, stages=3, share=2),
    Config(tile_m=64, groups_n=1, groups_k=2, tile_k=64, stages=8),
    Config(tile_m=128, groups_n=1, strips=2, tile_k=64, stages=2, blocks=2),
    Config(tile_m=128, groups_n=3, stages=2, split=2),
    Config(tile_m=128, groups_n=3, tile_k=64, stages=5),
    Config(tile_m=192, groups_n=1, tile_k=64, stages=3, split=3),
    replace(WIDE, stages=3),
    replace(WIDE, stages=3, share=2),
    replace(WIDE, stages=3, share=2, tail=2),
    Config(tile_m=128, groups_n=3, tile_k=64, stages=3, share=2, tail=2),
    Config(tile_m=128, groups_n=4, tile_k=64, stages=3, overlap=True),
    Config(tile_m=128, groups_n=2, stages=2, share=2, overlap=True),
    replace(WIDE, stages=4, overlap=True),
    Config(tile_m=176, groups_n=2, stages=3, split=2),
    Config(tile_m=176, groups_n=2, tile_k=64, stages=3, share=2),
    Config(tile_m=96, groups_n=3, stages=2),
    Config(tile_m=192, groups_n=3, tile_k=64, stages=3),
    Config(tile_m=176, groups_n=3, tile_k=64, stages=3, share=2),
    Config(tile_m=16, groups_n=1, groups_k=2, warps=3, stages=4, share=2),
    Config(tile_m=16, groups_n=1, groups_k=4, warps=3, stages=8),
]
OVERLAPPING = Config(tile_m=128, groups_n=4, tile_k=64, overlap=True)

# --- anywhere ---------------------------------------------------------------------------------------------------------


def test_tokens_have_a_loading_warp_of_their_own_where_they_are_more_than_the_weights():
    loaders = {c: c.loaders for c in CONFIGS}
    assert [c for c, count in loaders.items() if count == 2] == [CONFIGS[-1]]
    assert replace(CONFIGS[-1], warps=4).loaders == replace(CONFIGS[-1], groups_k=2).loaders == 1
    assert CONFIGS[-1].threads == 32 * (3 * 4 + 2)


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (replace(BIG, act="nvfp4"), Config(), "activations in nvfp4"),
        (replace(BIG, out="fp16"), Config(), "output in fp16"),
        (replace(BIG, order="rows"), Config(), "weights in the order rows"),
        (replace(BIG, n=7208), Config(), "n must be a multiple of 64, k of 128"),
        (replace(BIG, k=3136), Config(), "n must be a multiple of 64, k of 128"),
        (replace(BIG, k=3136), WIDE, "k of 128"),
        (replace(BIG, segments=9), Config(), "segments=9 is not in 1..8"),
        (BIG, Config(tile_m=24), "tile_m=24 is none of"),
        (BIG, Config(tile_m=256, strips=2), "256 tokens by 2 strips"),
        (BIG, Config(groups_n=2, groups_k=4), "8 warpgroups"),
        (BIG, Config(tile_m=256, groups_n=3), "3 warpgroups"),
        (BIG, Config(groups_n=1, groups_k=4, stages=4), "4 stages: 4 warpgroups hold 1 each"),
        (BIG, Config(groups_n=1, groups_k=2, stages=3), "stages=3 is not a multiple of 2"),
        (BIG, Config(share=4), "share=4 is none of 1, 2"),
        (BIG, Config(groups_n=1, groups_k=2, warps=3), "warps=3 is for 16 tokens, and groups_n"),
        (BIG, Config(tile_m=8, groups_n=2, groups_k=2, warps=2), "warps=2 is for 16 tokens, and groups_n"),
        (BIG, Config(tile_m=8, groups_n=1, warps=3), "warps=3 is for sums that are reduced"),
        (BIG, Config(tile_m=8, groups_n=1, groups_k=2, warps=3, tile_k=64), "and tile_k of 128 or more"),
        (BIG, Config(tile_m=8, share=2), "not shared by 2 CTAs"),
        (replace(BIG, k=512), Config(split=3), "too little for the last of 3 parts"),
        (replace(BIG, k=512), Config(groups_k=2, split=4), "too little for the last of 4 parts of 2 warpgroups"),
        (BIG, Config(tile_m=128, groups_n=2, strips=1, stages=2, blocks=2), "registers do not hold"),
        (BIG, Config(stages=12), "bytes of shared memory"),
        (BIG, Config(share=2, tail=2), "tail=2 is for one strip of 128 or 256 tokens, share=2 and split=1"),
        (BIG, replace(WIDE, tail=2), "tail=2 is for one strip of 128 or 256 tokens, share=2 and split=1"),
        (replace(BIG, k=128), replace(WIDE, share=2, tail=2), "k=128 is too little for 2 CTAs"),
        (BIG, replace(OVERLAPPING, tile_m=64), "overlap is for two groups or more with one strip of 128 or 256 tokens"),
        (BIG, replace(OVERLAPPING, groups_n=1), "overlap is for two groups or more"),
        (BIG, replace(OVERLAPPING, split=2), "and split and tail of 1"),
        (BIG, replace(OVERLAPPING, share=2, tail=2), "and split and tail of 1"),
        (replace(BIG, n=8192), OVERLAPPING, "n=8192 is not a multiple of 448, the rows of two tiles that overlap"),
        (BIG, replace(OVERLAPPING, tile_m=256), "4 warpgroups with sums of 256 x 1"),
        (replace(BIG, segments=8), OVERLAPPING, "segments=8 and four groups that overlap: the loading warp"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


@pytest.mark.parametrize("k", [128, 384, 1536, 7168, 16384])
@pytest.mark.parametrize("n", [64, 192, 512, 1536, 7168, 65536])
def test_there_is_a_default_for_every_problem(n, k):
    for m in (1, 8, 9, 33, 64, 65, 128, 200, 256, 512, 2048, 16384):
        for out, segments in (("bf16", 1), ("fp32", 3)):
            problem = Problem(m=m, n=n, k=k, out=out, segments=segments)
            config = kernel.default(problem)
            assert kernel.supports(problem, config) is None
            assert m > 64 or config.tile_m * (4 if n <= 1536 else 1) >= m


@pytest.mark.parametrize(
    ("m", "n", "k", "won"),
    [
        (1, 512, 7168, {"tile_m": 8, "tile_k": 256, "split": 4, "blocks": 2}),
        (16, 256, 4096, {"tile_m": 8, "split": 4, "blocks": 2}),
        (32, 512, 4096, {"tile_m": 16, "groups_k": 4, "warps": 2, "tile_k": 128, "split": 2}),
        (64, 256, 7168, {"tile_m": 16, "groups_k": 4, "warps": 2, "tile_k": 256, "split": 2}),
        (64, 1024, 1024, {"tile_m": 32, "split": 4, "blocks": 2}),
        (64, 1536, 7168, {"tile_m": 64, "split": 4, "blocks": 1}),
        (64, 2048, 7168, {"tile_m": 64, "groups_k": 1, "split": 4, "blocks": 2}),
        (64, 2624, 7168, {"tile_m": 64, "groups_k": 2, "tile_k": 128, "split": 2}),
        (4, 2624, 4096, {"tile_m": 8, "groups_k": 4, "warps": 4, "tile_k": 256, "split": 2}),
        (16, 4096, 4096, {"tile_m": 16, "groups_k": 4, "warps": 3, "tile_k": 256, "split": 1}),
        (64, 65536, 1536, {"tile_m": 64, "groups_n": 2, "groups_k": 1, "blocks": 2}),
        (64, 73728, 1536, {"tile_m": 64, "groups_n": 3, "groups_k": 1, "blocks": 1}),
    ],
)
def test_defaults_are_what_won(m, n, k, won):
    config = kernel.default(Problem(m=m, n=n, k=k))
    assert {knob: getattr(config, knob) for knob in won} == won


@pytest.mark.parametrize("config", [SMALL, WIDE, *(c for c in CONFIGS if c.overlap)], ids=str)
def test_least_rows(config):
    """What `warm` launches with: no config runs with fewer, this many segments or not."""
    for segments in (1, 3):
        problem = Problem(m=1, n=segments * kernel.least_rows(config), k=3072, segments=segments)
        assert kernel.supports(problem, config) is None
        assert kernel.supports(replace(problem, n=problem.n - 64 if config.overlap else 32), config) is not None


def test_times_at_one_m_say_something_of_an_m_of_as_many_tiles():
    some = (1, 48, 65, 384, 420, 512, 513)
    like = {t: [m for m in some if kernel.alike(Config(tile_m=t), m, 512)] for t in (64, 256)}
    assert like == {64: [512], 256: [420, 512]}  # 384 leave a quarter of two tiles empty
    assert [m for m in (1, 48, 64, 65) if kernel.alike(Config(tile_m=64), m, 64)] == [1, 48, 64]


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(BIG, Config(), "sm_100a")


def check_code(built, config, out):
    assert built.shared_bytes == kernel.shared_bytes(config, out)
    assert resources(built).spill_bytes == 0
    assert ".ftz" not in built.ptx  # scales and codes pass through subnormal numbers


@pytest.mark.parametrize("config", [replace(SMALL, tile_m=32), WIDE], ids=str)
def test_main_loop_waits_for_one_mma_at_most(config):
    """No MMA is waited for right after its issue, as ptxas does where it cannot keep operands apart."""
    code = sass(kernel.build(BIG, config))
    units = config.tile_k // 64 * config.strips * config.paired
    assert len(re.findall(r"\bHGMMA\.", code)) == 4 * units
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
    assert sorted(waits) == ["0"] + ["1"] * units


@pytest.mark.parametrize("tile_k", [64, 128])
def test_half_of_a_unit_is_decoded_while_the_other_is_multiplied(tile_k):
    """The same, by two MMAs at a time, for the warpgroups with all tokens and for the one with half of them."""
    code = sass(kernel.build(BIG, replace(OVERLAPPING, tile_k=tile_k)))
    assert re.findall(r"\bHGMMA\.64x(\d+)x16", code) == ["128"] * (tile_k // 16) + ["64"] * (tile_k // 16)
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
    assert waits == (["1"] * (tile_k // 32) + ["0"]) * 2


@pytest.mark.parametrize("config", [SMALL, replace(WIDE, split=2)], ids=str)
def test_tiles_and_alphas_are_found_without_delay(config):
    """The walk over tiles has no division, and alpha no load that somebody waits for: it is copied from the start."""
    code = sass(kernel.build(replace(BIG, segments=2), config))
    assert "MUFU.RCP" not in code
    assert re.findall(r"\bLDG\w*", code) == ["LDGSTS", "LDGDEPBAR"]


def test_warps_multiply_few_tokens():
    built = kernel.build(BIG, SMALL)
    assert not loads_on_their_way(built)
    code = sass(built)
    assert "HGMMA" not in code
    assert len(re.findall(r"\bHMMA\.16816\.F32\.BF16", code)) == SMALL.tile_k // 16


def test_every_code_and_scale_decodes_exactly():
    """The bit arithmetic of the kernel, on every word position, code and scale, in Python integers."""

    def mul(x, y):  # of BF16 pairs, as the hardware: exact in FP32, rounded to BF16
        pair = [[(v >> s) & 0xFFFF for s in (0, 16)] for v in (x, y)]
        bits = torch.tensor(pair, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        out = (bits[0].double() * bits[1].double()).to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        return int(out[0]) | int(out[1]) << 16

    for code in range(16):
        for position in range(8):  # pair, and half of it
            data = torch.zeros(64, 32, dtype=torch.uint8)
            row, column = 8 * (position // 2 % 2), 8 * (position // 4) + position % 2
            data[row, column // 2] = code << 4 * (column % 2)
            layouts.to_fragments_(data, torch.zeros(64, 4, dtype=torch.uint8), kernel.WEIGHT_ORDER)
            word = int.from_bytes(bytes(data.view(-1)[:4].tolist()), "little")
            images = (
                word & kernel.MAGNITUDE,
                (word >> 3 | word << 29) & kernel.MAGNITUDE,
                (word >> 6 | word << 26) & kernel.MAGNITUDE,
                (word & 0x001B001B) * 0x4108 & kernel.MAGNITUDE,
            )
            want = [0] * 4
            want[position // 2] = ((code & 8) << 12 | (code & 7) << 6) << 16 * (position % 2)
            assert list(images) == want, (code, position)
    for scale in range(127):
        image = scale << 4 | scale << 20
        value = torch.tensor(mul(mul(image, 0x7F007F00), 0x77007700) & 0xFFFF, dtype=torch.int32).to(torch.int16)
        true = torch.tensor(scale, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * 2.0**118
        assert value.view(torch.bfloat16).double() == true


def test_launch_refuses_what_it_would_misread():
    sm90_cases.check_refuses_misfits(kernel, Config(), 1024)
    gen = torch.Generator().manual_seed(0)
    rows = testing.random_nvfp4(64, 1024, gen)
    a, b, out = torch.zeros(3, 1024, dtype=torch.bfloat16), rows.with_order(kernel.WEIGHT_ORDER), torch.empty(3, 64)
    with pytest.raises(ValueError, match="activations in nvfp4"):
        kernel.launch(testing.random_nvfp4(3, 1024, gen), b, None, out, Config())
    with pytest.raises(ValueError, match="rows of out must start at multiples of 16 bytes"):
        kernel.launch(a, b, None, torch.empty(3, 66)[:, :64], Config())
    with pytest.raises(ValueError, match="weights in the order rows"):
        kernel.launch(a, rows, None, out, Config())


def test_empty_m_is_nothing_to_do():
    sm90_cases.check_empty(kernel, Config(), 1024)


RUNS = list(zip(itertools.cycle(("late", "eager")), itertools.cycle(("bf16", "fp32", "fp32", "bf16")), CONFIGS))


@pytest.mark.parametrize(("schedule", "out", "config"), RUNS, ids=str)
def test_in_the_emulator(schedule, out, config, monkeypatch):
    """Ragged m and n, several tiles a CTA; every element against the FP64 product, every access against the others'.
    What has run spills nothing; outputs by turns."""
    kernel.compiled.cache_clear()
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: 3 if config.tail > 1 else 1)
    step = config.tile_k * config.paired * config.groups_k * config.split
    rounds = max(2, -(-config.stages * config.tile_k // step))
    k = rounds * step if config.split == 1 else 2 * step - config.tile_k * config.paired
    tiles = config.tail  # beside a ragged one
    rows = 2 if config.tail > 1 or config.overlap or (config.tile_m in (8, 64) and config.split == 1) else 1
    n = 2 * config.rows if config.overlap else -(-config.tile_n * tiles // 64) * 64 + 64
    problem = Problem(m=rows * config.tile_m - 3, n=n, k=k, out=out, segments=2)
    case = testing.case(problem, "cpu", 1)
    with emulate("sm_90a", schedule=schedule):
        case.run(kernel, config)
        compiled = kernel.compiled(config, kernel._variant(problem, config))
        assert kernel.compiled.cache_info().misses == 1  # what has run
    kernel.compiled.cache_clear()
    case.check()
    check_code(build.built(compiled, "sm_90a"), config, out)


def test_alpha_of_any_size_acts_on_the_sum():
    """The largest power of two that is allowed, where sums may overflow, and the smallest normal one."""
    with emulate("sm_90a"):
        sm90_cases.check_alpha_acts_on_the_sum(
            kernel, Config(tile_m=16, tile_k=64, stages=4), 128, torch.device("cpu"), powers=(119, -126)
        )


@pytest.mark.parametrize(("m_tiles", "clusters", "segments"), [(1, 2, 3), (8, 1, 1), (11, 5, 8)])
def test_clusters_walk_over_all_tiles(m_tiles, clusters, segments, monkeypatch):
    """Whole bands of tiles of tokens and others, one segment to as many as there can be."""
    kernel.compiled.cache_clear()
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: clusters)
    case = testing.case(Problem(m=8 * m_tiles - 3, n=192, k=64, out="fp32", segments=segments), "cpu", 2)
    with emulate("sm_90a"):
        case.run(kernel, Config(tile_m=8, groups_n=1, tile_k=64, stages=2))
    kernel.compiled.cache_clear()
    case.check()


@pytest.mark.parametrize("config", [replace(WIDE, stages=3), replace(OVERLAPPING, stages=3)], ids=str)
def test_tiles_of_any_shape_give_equal_bits(config, monkeypatch):
    """A last tile that leaves through the stages, and tiles that overlap; of the last tokens one half has none."""
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: 2)
    problem = Problem(m=config.tile_m + 3, n=2 * config.rows, k=128, segments=2)
    found = []
    for each in (config, Config(tile_k=64, stages=4)):
        kernel.compiled.cache_clear()
        case = testing.case(problem, "cpu", 5)
        with emulate("sm_90a", schedule="eager"):
            case.run(kernel, each)
        case.check()
        found.append(case.out)
    kernel.compiled.cache_clear()
    assert torch.equal(*found)


@pytest.mark.parametrize(("turn", "stages"), [(2, 4), (1, 3)])
def test_copies_that_end_in_any_order(turn, stages, monkeypatch):
    """Stages that change hands between warpgroups gave wrong results on an H100, now and then."""
    kernel.compiled.cache_clear()
    monkeypatch.setattr(Config, "turn", turn)
    refused = 0
    for seed in range(7):
        case = testing.case(Problem(m=5, n=64, k=2048, out="fp32"), "cpu", 1)
        try:
            with emulate("sm_90a", schedule="round", seed=seed):
                case.run(kernel, replace(SMALL, stages=stages))
            case.check()
        except Fault:
            refused += 1
    kernel.compiled.cache_clear()
    assert (refused > 0) == (turn == 1)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

DEFAULT = Config()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, WIDE, Config(split=2)], ids=str)
def test_single_elements_land_where_they_belong(config, device):
    n, k = config.tile_n + 64, 128 * config.split * config.groups_k * 2
    columns = [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 200, k // 2, k - 1]
    rows = [0, 1, 7, 8, 9, 15, 16, 33, config.tile_n - 1, config.tile_n, n - 1]
    sm90_cases.check_single_elements(kernel, config, 6, n, k, columns, rows, device)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
def test_every_code_under_every_scale_is_exact(config, device):
    sm90_cases.check_decodes(kernel, config, device)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*CONFIGS, *testing.configs(kernel, most=80)], ids=str)
def test_configs(config, device):
    for problem in (
        Problem(m=13, n=576, k=6144, out="fp32", segments=2),
        Problem(m=1, n=192, k=3072),
        Problem(m=300, n=192, k=1536, segments=2),
        Problem(m=300, n=448, k=1536, segments=2),
    ):
        sm90_cases.check_runs_or_refuses(kernel, problem, config, device)


@pytest.mark.gpu
def test_ragged_m(device):
    for m in [*range(1, 66), 127, 128, 129, 255, 257, 1000, 16383, 16384]:
        tile_m = next((t for t in SPACE["tile_m"] if t >= m), 64 if m % 2 else 128)
        config = Config(tile_m=tile_m, tile_k=64, stages=4) if tile_m > 64 else Config(tile_m=tile_m)
        case = testing.case(Problem(m=m, n=192, k=1024), device, seed=m)
        case.run(kernel, config)
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 2048, 7168), (2, 64, 7168), (5, 1024, 4096), (16, 7168, 2048), (33, 1536, 1536), (2048, 4096, 4096)],
)
def test_model_shapes(m, n, k, device):
    for segments, out in ((1, "bf16"), (2, "fp32")):
        case = testing.case(Problem(m=m, n=n, k=k, out=out, segments=segments), device, seed=7)
        case.run(kernel, WIDE if m > 64 else Config())
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [3, 77, 1030])
def test_every_linear_of_both_models(m, tp, device):
    """Its slice of `tp` GPUs, by what is chosen for it, into BF16 and, where a layer wants it, FP32."""
    target = dispatch.target_of(device)
    configs = targets.load_configs(["pro", "flash"])
    found = targets.problems(configs, "gemm_nvfp4", targets.Target(target.arch, target.device), [m], tp)
    assert len(found) >= 25
    for problem in found:
        choice = dispatch.choose_for("gemm_nvfp4", problem, target)
        assert choice.kernel == "cute_gemm_nvfp4_sm90_wgmma"
        case = testing.case(problem, device, seed=9)
        case.run(choice.module, choice.config)
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, DEFAULT], ids=str)
def test_alpha_acts_on_the_sum(config, device):
    sm90_cases.check_alpha_acts_on_the_sum(kernel, config, 1024, device)


ONE_ARITHMETIC = [
    Config(tile_m=8),
    Config(tile_m=64, tile_k=256, stages=2),
    Config(tile_m=128, strips=2, stages=2),
    OVERLAPPING,
    replace(OVERLAPPING, share=2),
]


@pytest.mark.parametrize("config", ONE_ARITHMETIC, ids=str)
def test_configs_of_one_arithmetic_run(config):
    problem = GemmProblem(m=300, n=448, k=2048, out="fp32", order=kernel.WEIGHT_ORDER)
    assert kernel.supports(problem, config) is None
    assert kernel.arithmetic(problem, config) == kernel.arithmetic(problem, WIDE)


@pytest.mark.gpu
def test_sums_depend_on_neither_tile_nor_other_rows(device):
    """Without parts of K, a row's bits are the same in any batch and under any tile."""
    gen = torch.Generator(device=device).manual_seed(6)
    b = testing.random_nvfp4(448, 2048, gen, adversarial=True)
    a = testing.random_activations((300, 2048), gen)
    whole = sm90_cases.gemm(kernel, a, b, WIDE)
    for config in ONE_ARITHMETIC:
        assert torch.equal(sm90_cases.gemm(kernel, a, b, config), whole)
        assert torch.equal(sm90_cases.gemm(kernel, a[7:8], b, config), whole[7:8])


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, DEFAULT], ids=str)
def test_strided_rows_are_read_and_written_in_place(config, device):
    sm90_cases.check_strided_rows(kernel, config, 1024, device)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, DEFAULT, Config(tile_m=16, groups_k=2, split=2)], ids=str)
def test_repeated_runs_and_graph_replays_agree_to_the_bit(config, device):
    sm90_cases.check_repeats(kernel, Problem(m=12, n=4096, k=4096), config, device)


@pytest.mark.gpu
def test_a_chain_of_launches_waits_for_what_it_reads(device):
    """Each launch starts before the one before it has ended, and must read its output whole."""
    gen = torch.Generator(device=device).manual_seed(10)
    n = 2048
    weights = [testing.random_nvfp4(n, n, gen).with_order(kernel.WEIGHT_ORDER) for _ in range(6)]
    weights = [replace(w, alpha=torch.full((), 1 / 256, device=device)) for w in weights]
    start = testing.random_activations((64, n), gen)

    def chain(wait):
        x = start
        for config in (Config(), SMALL, Config(tile_m=16, split=2), WIDE, Config(tile_m=32, share=2), Config(blocks=2)):
            for w in weights:
                out = torch.empty(64, n, dtype=torch.bfloat16, device=device)
                kernel.launch(x, w, None, out, config)
                if wait:
                    torch.cuda.synchronize()
                x = out / out.float().std().clamp(min=1e-3).bfloat16() if w is weights[-1] else out
        return x

    want = chain(True)
    assert want.isfinite().all()
    assert want.any()
    for _ in range(10):
        assert torch.equal(chain(False), want)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    sm90_cases.check_the_op_runs_it(kernel, "cute_gemm_nvfp4_sm90_wgmma", Config(), device)
