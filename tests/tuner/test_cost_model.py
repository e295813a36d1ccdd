"""The cost model: not its figures, but that they move the right way, and agree with what was measured once."""

import dataclasses
import itertools

import pytest

from fp4suite import registry, shapes
from fp4suite.built import Resources
from fp4suite.problem import (
    DequantProblem,
    GemmProblem,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPreProblem,
    Problem,
    QuantizeProblem,
    RmsnormQuantizeProblem,
    RouteProblem,
    SwigluQuantizeProblem,
)
from kernels_cute.gemm_nvfp4_sm90_wgmma import Config as Wgmma
from kernels_cute.hyper_connection_sm90 import Config as Clusters
from kernels_triton.route import Config as Route
from tuner import cost_model
from tuner.cost_model import MACHINES, occupancy, predict_us
from tuner.targets import load_configs


@dataclasses.dataclass(frozen=True)
class Gemm:
    tile_m: int = 64
    tile_n: int = 128
    tile_k: int = 64
    num_stages: int = 4
    split_k: int = 1
    cluster_m: int = 1
    cluster_n: int = 1


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    tile_n: int = 128
    mma_ctas: int = 1
    cluster_m: int = 1
    cluster_n: int = 1
    swap_ab: bool = False
    split_k: int = 1
    band: int = 0


@dataclasses.dataclass(frozen=True)
class Rows:
    block_m: int = 4
    block_k: int = 1024
    num_warps: int = 4


@dataclasses.dataclass(frozen=True)
class WholeRows:
    block_m: int = 1
    num_warps: int = 2
    parts: int = 1
    held: bool = True
    tile_k: int = 1024


def act(arch):
    return "nvfp4" if arch == "sm_100a" else "bf16"


def problems_at(m, arch):
    yield GemmProblem(m=m, n=7168, k=2048, act=act(arch)), Gemm()
    yield RmsnormQuantizeProblem(m=m, k=7168), WholeRows()
    for kind in (DequantProblem, QuantizeProblem, SwigluQuantizeProblem):
        yield kind(m=m, k=7168), Rows()


@pytest.mark.parametrize("arch", MACHINES)
def test_more_rows_never_take_less_time_and_nothing_beats_the_roof(arch):
    before = {}
    for m in (1, 2, 7, 16, 64, 200, 256, 1024, 2048, 8192):
        for problem, config in problems_at(m, arch):
            us = predict_us(problem, config, arch)
            assert us >= cost_model.roof_us(problem, arch, act(arch)), problem
            assert us >= before.get(problem.op, 0), problem
            before[problem.op] = us


@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("dim", ["n", "k"])
def test_a_larger_weight_never_takes_less_time(arch, dim):
    times = [
        predict_us(GemmProblem(**{"m": 64, "n": 4096, "k": 4096, "act": act(arch), dim: size}), Gemm(), arch)
        for size in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    assert times == sorted(times)


def w4a4(config=None, **sizes):
    """Microseconds of the block-scaled kernel."""
    problem = GemmProblem(**{"m": 8192, "n": 7168, "k": 7168, "act": "nvfp4"} | sizes)
    return predict_us(problem, config or BlockScaled(), "sm_100a")


def test_block_scaled_weights_as_rows_and_parts_of_k_help_with_few_tokens():
    few = {"m": 8, "n": 1536}
    swapped = BlockScaled(tile_n=8, swap_ab=True)
    assert w4a4(swapped, **few) < w4a4(**few)
    assert w4a4(dataclasses.replace(swapped, split_k=8), **few) < w4a4(swapped, **few)
    many = {"m": 8192, "n": 8192}
    assert w4a4(BlockScaled(tile_n=32, swap_ab=True), **many) > w4a4(**many)


def test_block_scaled_pairs_read_less_and_wide_tiles_more_at_once():
    problem = GemmProblem(m=8192, n=7168, k=7168, act="nvfp4")
    one, pair = (cost_model.work(problem, BlockScaled(tile_n=256, mma_ctas=n, cluster_m=2), "sm_100a") for n in (1, 2))
    assert pair.ingested < one.ingested
    assert w4a4(BlockScaled(tile_n=256)) < w4a4(BlockScaled(tile_n=64))


def test_block_scaled_bands_count_where_l2_does_not_hold_the_operands():
    large, small = {"m": 65536, "k": 16384}, {"m": 2048, "k": 1024}
    square, rows = BlockScaled(band=8), BlockScaled()
    assert w4a4(square, **large) < w4a4(rows, **large)
    assert w4a4(square, **small) == pytest.approx(w4a4(rows, **small), rel=1e-6)


def test_block_scaled_nvfp4_output_stores_less():
    problem = GemmProblem(m=8192, n=7168, k=512, act="nvfp4")
    whole, packed = (dataclasses.replace(problem, out=out) for out in ("fp32", "nvfp4"))
    stored = [cost_model.work(p, BlockScaled(), "sm_100a").cta_bytes for p in (packed, whole)]
    assert stored[0] < stored[1]
    assert packed.bytes < whole.bytes


@pytest.mark.parametrize("op", dict.fromkeys(k.op for k in registry.KERNELS))
def test_every_op_with_a_kernel_has_a_model(op):
    """Of the default config; more tokens take no less."""
    module = registry.load(registry.kernels(op)[0].name)
    config = load_configs(["flash"])["flash"]
    few, many = (shapes.problems(config, op, arch="sm_90a", m=(m,))[0].problem for m in (64, 4096))
    times = [predict_us(p, registry.default_config(module, p), "sm_90a") for p in (few, many)]
    assert 0 < times[0] <= times[1]


def test_clusters_that_fold_take_about_what_they_took_on_an_h100():
    for kind, d, m, config, us in (
        (HyperConnectionPreProblem, 7168, 512, Clusters(), 31.2),
        (HyperConnectionPreProblem, 7168, 4096, Clusters(), 130.1),
        (HyperConnectionPreProblem, 7168, 4096, Clusters(stages=4), 143.6),
        (HyperConnectionPreProblem, 4096, 4096, Clusters(), 78.8),
        (HyperConnectionPostPreProblem, 7168, 256, Clusters(block_m=16), 29.3),
        (HyperConnectionPostPreProblem, 7168, 1024, Clusters(), 67.8),
        (HyperConnectionPostPreProblem, 7168, 4096, Clusters(), 231.3),
        (HyperConnectionPostPreProblem, 4096, 4096, Clusters(cluster=8, stages=4), 145.1),
        (HyperConnectionHeadProblem, 7168, 4096, Clusters(stages=32), 119.2),
    ):
        assert predict_us(kind(m=m, k=d), config, "sm_90a") == pytest.approx(us, rel=0.13), (kind.op, d, m, config)


def test_few_tokens_of_a_fold_wait_for_fn_at_once():
    """H100: 5.2 us of 4 tokens, 9.0 of 64."""
    module = registry.load("triton_hyper_connection_pre")
    problems = [HyperConnectionPreProblem(m=m, k=7168) for m in (1, 4, 16, 64)]
    times = [predict_us(p, registry.default_config(module, p), "sm_90a") for p in problems]
    assert times == sorted(times)
    assert times[-1] < 9.0


def test_the_heads_clusters_take_less_than_pre_and_gain_from_stages():
    pre, head = (kind(m=4096, k=7168) for kind in (HyperConnectionPreProblem, HyperConnectionHeadProblem))
    times = [predict_us(p, Clusters(stages=s), "sm_90a") for p, s in ((head, 32), (head, 8), (pre, 8))]
    assert times[0] < times[1] < times[2]


def test_tokens_of_a_router_take_turns_where_there_are_many():
    def us(m, **knobs):
        return predict_us(RouteProblem(m=m, experts=384, topk=6), Route(**knobs), "sm_90a")

    times = [[us(m, presort=True, turns=turns) for turns in (1, 2, 4)] for m in (1, 64, 4096, 16384)]
    assert times[0][0] == times[0][1] == times[0][2]  # a turn without a token takes no time
    assert times[1][0] < times[1][1] < times[1][2]
    assert times[2][1] < min(times[2][0], times[2][2])
    assert times[3] == sorted(times[3], reverse=True)
    assert us(4096, presort=True) < us(4096)


def test_what_has_no_model_is_refused():
    class Other(Problem):
        op = "other"

    with pytest.raises(ValueError, match="no cost model of other"):
        predict_us(Other(m=1), Rows(), "sm_90a")
    with pytest.raises(ValueError, match="arch must be one of"):
        predict_us(QuantizeProblem(m=1, k=64), Rows(), "sm_80")


def test_more_stages_help_until_memory_is_busy():
    problem = GemmProblem(m=16, n=7168, k=16384)
    times = [predict_us(problem, Gemm(num_stages=s), "sm_90a") for s in (2, 3, 4, 6)]
    assert times == sorted(times, reverse=True)


def test_wide_token_tiles_cost_tensor_time_when_there_are_few_tokens():
    few, many = GemmProblem(m=8, n=7168, k=4096), GemmProblem(m=4096, n=7168, k=4096)
    assert predict_us(few, Gemm(tile_m=16), "sm_90a") <= predict_us(few, Gemm(tile_m=256), "sm_90a")
    assert predict_us(many, Gemm(tile_m=16), "sm_90a") > predict_us(many, Gemm(tile_m=128), "sm_90a")


def test_a_wave_and_a_bit_costs_two_waves():
    machine = MACHINES["sm_90a"]
    full = GemmProblem(m=64 * machine.sms, n=128, k=8192)
    over = dataclasses.replace(full, m=full.m + 64)
    resources = Resources(registers=255, spill_bytes=0, shared_bytes=200_000, tmem_columns=0)  # one CTA an SM
    ratio = predict_us(over, Gemm(), "sm_90a", resources) / predict_us(full, Gemm(), "sm_90a", resources)
    assert ratio > 1.5


def test_multicast_takes_load_off_l2():
    problem = GemmProblem(m=8192, n=8192, k=8192, act="nvfp4")
    alone, shared = Gemm(tile_m=128), Gemm(tile_m=128, cluster_m=2, cluster_n=2)
    assert cost_model.work(problem, shared, "sm_100a").cta_bytes < cost_model.work(problem, alone, "sm_100a").cta_bytes


def test_split_k_helps_where_there_are_few_ctas():
    thin = GemmProblem(m=1, n=512, k=16384)
    assert predict_us(thin, Gemm(tile_m=8, split_k=8), "sm_90a") < predict_us(thin, Gemm(tile_m=8), "sm_90a")


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "ctas"),
    [
        (128, 32, 0, 16),  # 2048 threads
        (128, 255, 0, 2),  # 65536 / (256 * 128)
        (256, 64, 100_000, 2),  # shared memory
        (32, 16, 0, 32),  # the SM's limit on CTAs
        (384, 168, 232_448, 1),
    ],
)
def test_occupancy_is_the_programming_guides_arithmetic(threads, registers, shared, ctas):
    resources = Resources(registers=registers, spill_bytes=0, shared_bytes=shared, tmem_columns=0)
    assert occupancy(threads, resources, MACHINES["sm_90a"]) == ctas


def test_reads_take_what_a_bare_read_kernel_took_on_an_h100():
    """Microseconds for 16, 32, 64 and 128 MiB, cold, in a CUDA graph: the model's floor has to lie near them."""
    machine = MACHINES["sm_90a"]
    for mib, us in ((16, 7.6), (32, 13.9), (64, 26.5), (128, 49.3)):
        floor = machine.launch_us + machine.latency_us + (mib << 20) / (machine.dram * 1e3)
        assert floor == pytest.approx(us, rel=0.06), mib


def test_configs_are_told_apart():
    """No plateau: on the layer shapes of the models, distinct tiles get distinct times."""
    for m, n, k in itertools.product((1, 64, 2048), (512, 7168), (1536, 7168)):
        times = {
            predict_us(GemmProblem(m=m, n=n, k=k), Gemm(tile_m=tm, tile_n=tn), "sm_90a")
            for tm in (16, 64)
            for tn in (64, 128)
        }
        assert len(times) > 1


def test_tiles_that_overlap_win_where_they_fill_a_wave_that_others_do_not():
    """7168 rows by 512 tokens: 112 tiles of 128 x 256, or 128 of 224 x 128. By 256 tokens 112 of 128 x 128 do."""
    wide, overlapping = Wgmma(tile_m=256, tile_k=64), Wgmma(tile_m=128, groups_n=4, tile_k=64, overlap=True)
    for m, configs in ((512, (overlapping, wide)), (256, (Wgmma(tile_m=128), overlapping))):
        better, worse = (predict_us(GemmProblem(m=m, n=7168, k=16384), c, "sm_90a") for c in configs)
        assert better < 0.97 * worse
