"""The layer shapes of a DeepSeek-V4 model, from the numbers of its config.json.

    problems(config, "gemm_nvfp4", arch="sm_90a", m=(1, 16, 256))

gives each problem that a forward pass of m tokens brings, once, with the layers that have it. Plain integers in, plain
integers out: no model is built, and any mapping with the field names of the Hugging Face config.json will do.

Linears that read one input are joined: q_a and kv; what a compressed layer sums up in FP32 (values and gates of its
compressor, in CSA layers of the indexer's too, and the indexer's weights); queries and the indexer's.

Tensor parallelism follows DeepSeek's own inference code: q_b, the indexer's q_b and o_a (by group) are split over rows,
o_b over columns; q_a, kv, compressors, the indexer's weights projection and the shared expert are whole on every rank.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .formats import KVFormat
from .problem import (
    PROBLEMS,
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

KV_FORMATS: tuple[KVFormat, ...] = ("fp8_ds_mla", "nvfp4", "bf16")  # of which a cache has one
SAMPLED = 4096  # sequences whose next token one step draws, at most
OVERLAP_RATIO = 4  # the compress ratio whose entries pool two windows (CSA); its compressor has two lanes
DECODING = 64  # up to as many rows are a token each of as many sequences, more are one chunk of a prompt
INDEX_CONTEXTS = ((32768, 16384), (131072, 1024), (1048576, 64))  # tokens behind a query, the most queries of a step
FIELDS = (
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_hash_layers",
    "vocab_size",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "compress_ratios",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y[m, n] = x[m, k] @ w[n, k].T, `count` times in the model; n falls into `segments` with an alpha of their own.

    A count of 0: of weights that the model reads together with others, unless they are in other formats.
    """

    name: str
    n: int
    k: int
    count: int = 0
    segments: int = 1
    out: Literal["bf16", "fp32"] = "bf16"  # compressors, indexer scores and SwiGLU take the sum before it is rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """A problem, the layers that have it, and how often one forward pass meets it (0: see `Linear`)."""

    problem: Problem
    layers: tuple[str, ...]
    count: int


def linears(config: Mapping[str, Any], tp: int = 1) -> list[Linear]:
    """The linear layers of one rank that a checkpoint may hold in NVFP4, the routed experts aside (they are grouped).

    Raises ValueError for a config without the fields of a V4 model, and for a tp that does not divide it.
    """
    missing = [f for f in FIELDS if f not in config]
    if missing:
        raise ValueError(f"config has no {', '.join(missing)}: not the config.json of a DeepSeek-V4 model")
    layers = config["num_hidden_layers"]
    ratios = list(config["compress_ratios"])[:layers]
    if len(ratios) < layers:
        raise ValueError(f"compress_ratios has {len(ratios)} entries for {layers} layers")
    d, rq, groups, ro = config["hidden_size"], config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    if tp < 1 or groups % tp:
        raise ValueError(f"tp must divide o_groups = {groups}, got {tp}")
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    inter = config["moe_intermediate_size"]
    csa = ratios.count(OVERLAP_RATIO)
    hca = sum(r > 0 for r in ratios) - csa
    queries, index_queries = heads * head_dim // tp, index_heads * index_dim // tp
    found = [
        Linear(name="q_a_kv", n=rq + head_dim, k=d, count=layers, segments=2),
        Linear(name="q_b", n=queries, k=rq, count=layers - csa),
        Linear(name="o_a", n=ro, k=heads // groups * head_dim, count=layers * (groups // tp)),
        Linear(name="o_b", n=d, k=groups * ro // tp, count=layers),
        Linear(name="shared_gate_up", n=2 * inter, k=d, count=layers, segments=2, out="fp32"),
        Linear(name="shared_down", n=d, k=inter, count=layers),
        Linear(name="q_a", n=rq, k=d),
        Linear(name="kv", n=head_dim, k=d),
    ]
    if hca:
        found += [
            Linear(name="hca_compressor_kv_gate", n=2 * head_dim, k=d, count=hca, segments=2, out="fp32"),
            Linear(name="hca_compressor", n=head_dim, k=d, out="fp32"),
        ]
    if csa:
        sums = 4 * head_dim + 4 * index_dim + index_heads
        found += [
            Linear(name="csa_q_b", n=queries + index_queries, k=rq, count=csa, segments=2),
            Linear(name="csa_sums", n=sums, k=d, count=csa, segments=5, out="fp32"),
            Linear(name="csa_compressor_kv_gate", n=4 * head_dim, k=d, segments=2, out="fp32"),
            Linear(name="csa_compressor", n=2 * head_dim, k=d, out="fp32"),
            Linear(name="indexer_q_b", n=index_queries, k=rq),
            Linear(name="indexer_compressor_kv_gate", n=4 * index_dim, k=d, segments=2, out="fp32"),
            Linear(name="indexer_compressor", n=2 * index_dim, k=d, out="fp32"),
            Linear(name="indexer_weights", n=index_heads, k=d, out="fp32"),
        ]
    return found


def problems(config: Mapping[str, Any], op: str, *, arch: str, m: Sequence[int], tp: int = 1) -> list[LayerProblem]:
    """The problems of one op at each m (rows; `dequant_nvfp4` has the rows of the weight instead), equal ones joined.

    sm_90a runs W4A16 and takes linear scales, sm_100a runs W4A4 on `blocked_128x4`.
    """
    if op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    if any(x < 1 for x in m):
        raise ValueError(f"m must be positive, got {list(m)}")
    joined: dict[Problem, tuple[list[str], int]] = {}
    for name, count, problem in _walk(config, op, arch, m, tp):
        names, before = joined.get(problem, ([], 0))
        joined[problem] = (names if name in names else [*names, name], before + count)
    return [LayerProblem(problem=p, layers=tuple(names), count=count) for p, (names, count) in joined.items()]


def _walk(
    config: Mapping[str, Any], op: str, arch: str, m: Sequence[int], tp: int
) -> Iterator[tuple[str, int, Problem]]:
    layers = linears(config, tp)
    depth, d, rq = config["num_hidden_layers"], config["hidden_size"], config["q_lora_rank"]
    csa = list(config["compress_ratios"])[:depth].count(OVERLAP_RATIO)
    act: Literal["bf16", "nvfp4"] = "nvfp4" if arch == "sm_100a" else "bf16"
    sf_layout: Literal["linear", "blocked_128x4"] = "blocked_128x4" if arch == "sm_100a" else "linear"
    if op == DequantProblem.op:
        for x in layers:
            yield x.name, x.count, DequantProblem(m=x.n, k=x.k, sf_layout=sf_layout)
        return
    for rows in m:
        if op == GemmProblem.op:
            for x in layers:
                yield x.name, x.count, GemmProblem(m=rows, n=x.n, k=x.k, act=act, out=x.out, segments=x.segments)
        elif op == QuantizeProblem.op:
            # what no norm and no SwiGLU hands over already quantised: the attention output (all groups) and o_a's
            heads, head_dim = config["num_attention_heads"], config["head_dim"]
            yield "attention_output", depth, QuantizeProblem(m=rows, k=heads * head_dim // tp, sf_layout=sf_layout)
            low_rank = config["o_groups"] * config["o_lora_rank"] // tp
            yield "o_a_output", depth, QuantizeProblem(m=rows, k=low_rank, sf_layout=sf_layout)
        elif op == QuantizeFp8Problem.op:
            for x in layers:
                yield x.name, x.count, QuantizeFp8Problem(m=rows, k=x.k)
        elif op == RmsnormQuantizeProblem.op:
            yield "attn_norm", depth, RmsnormQuantizeProblem(m=rows, k=d, sf_layout=sf_layout)
            yield "ffn_norm", depth, RmsnormQuantizeProblem(m=rows, k=d, sf_layout=sf_layout)
            yield "q_norm", depth, RmsnormQuantizeProblem(m=rows, k=rq, sf_layout=sf_layout)
        elif op == RmsNormProblem.op:
            yield "q_norm", depth, RmsNormProblem(m=rows, k=rq)
            if drafts := config["num_nextn_predict_layers"]:
                yield "enorm", drafts, RmsNormProblem(m=rows, k=d)
                yield "hnorm", drafts, RmsNormProblem(m=rows * config["hc_mult"], k=d)  # each stream
        elif op in (HyperConnectionPreProblem.op, HyperConnectionPostProblem.op):
            kind = HyperConnectionPreProblem if op == HyperConnectionPreProblem.op else HyperConnectionPostProblem
            yield "attn_site", depth, kind(m=rows, k=d, n=config["hc_mult"])
            yield "ffn_site", depth, kind(m=rows, k=d, n=config["hc_mult"])
        elif op == HyperConnectionPostPreProblem.op:
            yield "between_sites", 2 * depth - 1, HyperConnectionPostPreProblem(m=rows, k=d, n=config["hc_mult"])
        elif op == HyperConnectionHeadProblem.op:
            yield "head", 1, HyperConnectionHeadProblem(m=rows, k=d, n=config["hc_mult"])
        elif op == CompressKvProblem.op:
            sequences = 0 if rows <= DECODING else 1
            heads = {"head_dim": config["head_dim"], "rope_dim": config["qk_rope_head_dim"], "sequences": sequences}
            hca = {ratio for ratio in list(config["compress_ratios"])[:depth] if ratio not in (0, OVERLAP_RATIO)}
            for kept in ("fp8_ds_mla", "nvfp4"):
                own = {**heads, "format": kept}
                yield "csa_compressor", csa, CompressKvProblem(m=rows, ratio=OVERLAP_RATIO, overlaps=2, **own)
                for ratio in sorted(hca):
                    layers_of = list(config["compress_ratios"])[:depth].count(ratio)
                    yield "hca_compressor", layers_of, CompressKvProblem(m=rows, ratio=ratio, overlaps=1, **own)
            for kept in ("index_fp8", "index_mxfp4"):
                hadamard = int(kept == "index_mxfp4")
                own = {**heads, "head_dim": config["index_head_dim"], "format": kept, "hadamard": hadamard}
                yield "indexer_compressor", csa, CompressKvProblem(m=rows, ratio=OVERLAP_RATIO, overlaps=2, **own)
        elif op == CompressKvPairProblem.op:
            for kept, keys in itertools.product(("fp8_ds_mla", "nvfp4"), ("index_fp8", "index_mxfp4")):
                yield "csa_compressors", csa, CompressKvPairProblem(
                    m=rows, ratio=OVERLAP_RATIO, overlaps=2, head_dim=config["head_dim"],
                    rope_dim=config["qk_rope_head_dim"], format=kept, key_dim=config["index_head_dim"], key_format=keys,
                    sequences=0 if rows <= DECODING else 1, key_hadamard=int(keys == "index_mxfp4"),
                )  # fmt: skip
        elif op == IndexLogitsProblem.op:
            sequences = 0 if rows <= DECODING else 1
            for context, most in INDEX_CONTEXTS:
                for format in ("fp8", "mxfp4") if rows <= most else ():
                    yield "index_logits", csa, IndexLogitsProblem(
                        m=rows, entries=context // OVERLAP_RATIO, format=format, sequences=sequences,
                        heads=config["index_n_heads"] // tp, head_dim=config["index_head_dim"],
                        x="fp8" if format == "fp8" else "bf16",
                    )  # fmt: skip
        elif op == IndexQueryProblem.op:
            for format in ("fp8", "mxfp4"):
                yield "index_query", csa, IndexQueryProblem(
                    m=rows, format=format, hadamard=int(format == "mxfp4"), heads=config["index_n_heads"] // tp,
                    head_dim=config["index_head_dim"], rope_dim=config["qk_rope_head_dim"],
                    codes=int(format == "fp8"),
                )  # fmt: skip
        elif op == CsaQueriesProblem.op:
            for format in ("fp8", "mxfp4"):
                yield "csa_queries", csa, CsaQueriesProblem(
                    m=rows, heads=config["num_attention_heads"] // tp, format=format,
                    hadamard=int(format == "mxfp4"), head_dim=config["head_dim"],
                    index_heads=config["index_n_heads"] // tp, index_dim=config["index_head_dim"],
                    rope_dim=config["qk_rope_head_dim"], codes=int(format == "fp8"),
                )  # fmt: skip
        elif op == IndexTopkProblem.op:
            for context, most in INDEX_CONTEXTS:
                if rows <= most:
                    entries = context // OVERLAP_RATIO
                    yield "index_topk", csa, IndexTopkProblem(m=rows, entries=entries, topk=config["index_topk"])
        elif op == RouteProblem.op:
            sizes, hashed = _choice(config), config["num_hash_layers"]
            yield "router", depth - hashed, RouteProblem(m=rows, **sizes)
            yield "hash_router", hashed, RouteProblem(m=rows, **sizes, choice="table")
        elif op == PermuteProblem.op:
            yield "experts", depth, PermuteProblem(m=rows, **_choice(config))
        elif op == CombineProblem.op:
            yield "experts", depth, CombineProblem(m=rows, topk=config["num_experts_per_tok"], k=d)
        elif op == SampleProblem.op:
            if rows <= SAMPLED:
                yield "sampler", 1, SampleProblem(m=rows, vocab=config["vocab_size"])
        elif op == SwigluQuantizeProblem.op:
            inter = config["moe_intermediate_size"]
            yield "shared_expert", depth, SwigluQuantizeProblem(m=rows, k=inter, sf_layout=sf_layout)
        elif op == SwigluProblem.op:
            yield "shared_expert", depth, SwigluProblem(m=rows, k=config["moe_intermediate_size"])
        elif op == EmbedProblem.op:
            yield "embedding", 1, EmbedProblem(m=rows, vocab=config["vocab_size"], k=d, n=config["hc_mult"])
        elif op in (
            QnormRopeProblem.op,
            QnormRopeQuantizeProblem.op,
            RopeInverseProblem.op,
            RopeInverseInPlaceProblem.op,
            RopeInverseQuantizeProblem.op,
        ):
            heads = {"heads": config["num_attention_heads"] // tp, "head_dim": config["head_dim"]}
            heads["rope_dim"] = config["qk_rope_head_dim"]
            if op == QnormRopeProblem.op:
                yield "queries", depth, QnormRopeProblem(m=rows, **heads)
            elif op == QnormRopeQuantizeProblem.op:
                yield "queries", depth, QnormRopeQuantizeProblem(m=rows, **heads)
            elif op == RopeInverseProblem.op:
                yield "attention_output", depth, RopeInverseProblem(m=rows, **heads)
            elif op == RopeInverseInPlaceProblem.op:
                yield "attention_output", depth, RopeInverseInPlaceProblem(m=rows, **heads)
            else:
                groups = config["o_groups"] // tp
                problem = RopeInverseQuantizeProblem(m=rows, **heads, groups=groups, sf_layout=sf_layout)
                yield "attention_output", depth, problem
        elif op in (KvNormRopeInsertProblem.op, QkvNormRopeInsertProblem.op):
            dims = {"head_dim": config["head_dim"], "rope_dim": config["qk_rope_head_dim"]}
            for format in KV_FORMATS:
                if op == KvNormRopeInsertProblem.op:
                    yield "window", depth, KvNormRopeInsertProblem(m=rows, **dims, format=format)
                else:
                    yield "q_norm_window", depth, QkvNormRopeInsertProblem(m=rows, k=rq, **dims, format=format)


def _choice(config: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts a token has the choice of, and how many it takes."""
    return {"experts": config["n_routed_experts"], "topk": config["num_experts_per_tok"]}
