"""Layer shapes of the shipped models against the published matrix sizes, and against the checkpoints' own tensors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fp4suite import shapes
from fp4suite.problem import PROBLEMS

CONFIGS = Path(__file__).parents[2] / "model" / "configs"

# n x k of the projections as the public tensor lists of both models have them, and of those that are read together:
# name: (n, k, layers that read it so)
PRO = {
    "q_a_kv": (1536 + 512, 7168, 61),
    "q_a": (1536, 7168, 0),
    "kv": (512, 7168, 0),
    "q_b": (65536, 1536, 31),
    "csa_q_b": (65536 + 8192, 1536, 30),
    "indexer_q_b": (8192, 1536, 0),
    "o_a": (1024, 4096, 61 * 16),
    "o_b": (7168, 16384, 61),
    "hca_compressor_kv_gate": (1024, 7168, 31),
    "hca_compressor": (512, 7168, 0),
    "csa_sums": (2048 + 512 + 64, 7168, 30),
    "csa_compressor_kv_gate": (2048, 7168, 0),
    "csa_compressor": (1024, 7168, 0),
    "indexer_compressor_kv_gate": (512, 7168, 0),
    "indexer_compressor": (256, 7168, 0),
    "indexer_weights": (64, 7168, 0),
    "shared_gate_up": (6144, 7168, 61),
    "shared_down": (7168, 3072, 61),
}
FLASH = {
    "q_a_kv": (1024 + 512, 4096, 43),
    "q_a": (1024, 4096, 0),
    "kv": (512, 4096, 0),
    "q_b": (32768, 1024, 22),
    "csa_q_b": (32768 + 8192, 1024, 21),
    "indexer_q_b": (8192, 1024, 0),
    "o_a": (1024, 4096, 43 * 8),
    "o_b": (4096, 8192, 43),
    "hca_compressor_kv_gate": (1024, 4096, 20),
    "hca_compressor": (512, 4096, 0),
    "csa_sums": (2048 + 512 + 64, 4096, 21),
    "csa_compressor_kv_gate": (2048, 4096, 0),
    "csa_compressor": (1024, 4096, 0),
    "indexer_compressor_kv_gate": (512, 4096, 0),
    "indexer_compressor": (256, 4096, 0),
    "indexer_weights": (64, 4096, 0),
    "shared_gate_up": (4096, 4096, 43),
    "shared_down": (4096, 2048, 43),
}


def config_of(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize(("name", "want"), [("pro", PRO), ("flash", FLASH)])
def test_linears_are_the_published_ones(name, want):
    found = {x.name: (x.n, x.k, x.count) for x in shapes.linears(config_of(name))}
    assert found == want


def test_what_is_read_together_keeps_its_alphas():
    found = {x.name: x.segments for x in shapes.linears(config_of("pro")) if x.segments > 1}
    two = ("q_a_kv", "csa_q_b", "shared_gate_up")
    two += tuple(f"{name}_kv_gate" for name in ("hca_compressor", "csa_compressor", "indexer_compressor"))
    assert found == dict.fromkeys(two, 2) | {"csa_sums": 5}


def test_tensor_parallel_ranks_split_what_deepseek_splits():
    whole, rank = ({x.name: x for x in shapes.linears(config_of("pro"), tp)} for tp in (1, 8))
    assert rank["q_b"].n * 8 == whole["q_b"].n
    assert rank["indexer_q_b"].n * 8 == whole["indexer_q_b"].n
    assert rank["csa_q_b"].n * 8 == whole["csa_q_b"].n
    assert rank["o_a"].count * 8 == whole["o_a"].count
    assert rank["o_b"].k * 8 == whole["o_b"].k
    for name in (
        "q_a_kv",
        "q_a",
        "kv",
        "csa_compressor",
        "csa_sums",
        "indexer_weights",
        "shared_gate_up",
        "shared_down",
    ):
        assert rank[name] == whole[name]


READ_TOGETHER = ("gemm_nvfp4", "dequant_nvfp4", "quantize_fp8")  # of a linear, which another may hold


@pytest.mark.parametrize("op", PROBLEMS)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_every_op_has_each_problem_once(op, arch):
    found = shapes.problems(config_of("flash"), op, arch=arch, m=(1, 64))
    assert found
    assert len({p.problem for p in found}) == len(found)
    assert all(p.layers and (p.count > 0 or op in READ_TOGETHER) for p in found)


def test_routing_is_that_of_the_published_models():
    """384 and 256 experts, six a token, three layers that route by token id; a vocabulary of 129280."""
    for name, experts, hidden, depth in (("pro", 384, 7168, 61), ("flash", 256, 4096, 43)):
        config = config_of(name)
        found = {
            op: [(p.layers, p.count, p.problem.dims()) for p in shapes.problems(config, op, arch="sm_90a", m=(16,))]
            for op in ("route", "permute", "combine", "sample")
        }
        choice = {"m": 16, "experts": experts, "topk": 6}
        assert found["route"] == [
            (("router",), depth - 3, {**choice, "choice": "bias", "x": "fp32"}),
            (("hash_router",), 3, {**choice, "choice": "table", "x": "fp32"}),
        ]
        assert found["permute"] == [(("experts",), depth, {"m": 16, "topk": 6, "experts": experts})]
        assert found["combine"][0][1:] == (depth, {"m": 16, "topk": 6, "k": hidden, "shared": 1, "x": "bf16"})
        assert found["sample"] == [(("sampler",), 1, {"m": 16, "vocab": 129280, "x": "fp32"})]
        assert not shapes.problems(config, "sample", arch="sm_90a", m=(8192,))


def test_norms_are_those_of_queries_and_of_draft_blocks():
    """Of the streams' norm each of four is a row."""
    found = shapes.problems(config_of("pro"), "rms_norm", arch="sm_90a", m=(16,))
    dims = {p.layers: (p.count, p.problem.m, p.problem.k) for p in found}
    assert dims == {("q_norm",): (61, 16, 1536), ("enorm",): (1, 16, 7168), ("hnorm",): (1, 64, 7168)}
    found = shapes.problems(config_of("flash"), "qkv_norm_rope_insert", arch="sm_90a", m=(16,))
    assert {(p.count, p.problem.m, p.problem.k, p.problem.head_dim) for p in found} == {(43, 16, 1024, 512)}
    assert [p.problem.format for p in found] == list(shapes.KV_FORMATS)
    without = config_of("pro") | {"num_nextn_predict_layers": 0}
    assert len(shapes.problems(without, "rms_norm", arch="sm_90a", m=(16,))) == 1


def test_equal_shapes_of_different_layers_are_one_problem():
    found = {p.layers: p for p in shapes.problems(config_of("flash"), "gemm_nvfp4", arch="sm_90a", m=(16,))}
    joined = found["o_a", "q_a"]
    assert joined.count == 43 * 8
    assert joined.problem.out == "bf16"
    assert found[("csa_compressor",)].problem == replace(joined.problem, out="fp32")  # pooled before it is rounded


def test_the_architecture_decides_activations_and_scale_layout():
    for arch, act, layout in (("sm_90a", "bf16", "linear"), ("sm_100a", "nvfp4", "blocked_128x4")):
        gemm = shapes.problems(config_of("demo"), "gemm_nvfp4", arch=arch, m=(1,))[0].problem
        norm = shapes.problems(config_of("demo"), "rmsnorm_quantize", arch=arch, m=(1,))[0].problem
        assert (gemm.act, norm.sf_layout) == (act, layout)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({"hidden_size": None}, {}, "config has no hidden_size"),
        ({"compress_ratios": [0]}, {}, "compress_ratios has 1 entries for 43 layers"),
        ({}, {"tp": 3}, "tp must divide o_groups = 8, got 3"),
        ({}, {"m": (0,)}, "m must be positive"),
        ({}, {"op": "nothing"}, "op must be one of"),
    ],
)
def test_what_is_refused(change, kwargs, message):
    config = {k: v for k, v in (config_of("flash") | change).items() if v is not None}
    arguments = {"op": "gemm_nvfp4", "arch": "sm_90a", "m": (1,)} | kwargs
    with pytest.raises(ValueError, match=message):
        shapes.problems(config, arguments.pop("op"), **arguments)
