"""What passes between our cases and libraries: arguments against the libraries' own schemas, checks that can fail."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fp4suite import problem as problems, testing
from fp4suite.formats import E4M3_MAX
from tuner import bench_fusions, peers_deep_gemm, peers_fusions, peers_vllm, targets

from . import fake_vllm

HEADS = {"heads": 8, "head_dim": 512, "rope_dim": 64}
VLLM = {
    "vllm_qnorm_rope": problems.QnormRopeProblem(m=5, **HEADS),
    "vllm_norm_insert": problems.KvNormRopeInsertProblem(m=70),
    "vllm_norms_insert": problems.QkvNormRopeInsertProblem(m=70, k=256),
    "vllm_rotary": problems.RopeInverseProblem(m=5, **HEADS),
    "vllm_rotary_quantize": problems.IndexQueryProblem(m=5, format="fp8"),
    "torch_topk": problems.IndexTopkProblem(m=17, entries=640, topk=512),
    "vllm_persistent_topk": problems.IndexTopkProblem(m=65, entries=640, topk=512),
    "vllm_cooperative_topk": problems.IndexTopkProblem(m=17, entries=640, topk=512),
    "vllm_topk_per_row": problems.IndexTopkProblem(m=17, entries=640, topk=512),
    "vllm_route": problems.RouteProblem(m=48, experts=256, topk=6),
    "vllm_scatter": problems.PermuteProblem(m=19, topk=6, experts=32),
    "vllm_align": problems.PermuteProblem(m=19, topk=6, experts=32),
    "vllm_unpermute": problems.CombineProblem(m=9, topk=6, k=128),
    "vllm_rms_norm": problems.RmsnormQuantizeProblem(m=9, k=256),
    "vllm_swiglu": problems.SwigluQuantizeProblem(m=9, k=128),
    "torch_embedding": problems.EmbedProblem(m=9, vocab=50, k=64, n=4),
    "vllm_fp8": problems.QuantizeFp8Problem(m=9, k=256),
}


@pytest.fixture(autouse=True)
def _vllm(monkeypatch):
    for module in (peers_vllm, peers_deep_gemm):
        monkeypatch.setattr(module, "vllm_ops", fake_vllm.ops)


def called(name, problem):
    peer = peers_fusions.PEERS[name]
    assert problem.op in peer.ops
    assert peer.refuses(problem) is None
    call = peer.prepare(testing.case(problem, "cpu", 1))
    if call.reset is not None:
        call.launch()
        call.reset()
    return call, call.launch()


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_each_part_matters(call, result):
    """Each tensor of the result, overwritten, fails the check."""
    for t in tensors(result):
        kept = t.clone()
        t.view(torch.uint8).fill_(0xFF)
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            call.check(result)
        t.copy_(kept)
    assert call.check(result) <= 1


@pytest.mark.parametrize("name", VLLM)
def test_a_right_result_passes_and_a_wrong_one_does_not(name):
    call, result = called(name, VLLM[name])
    assert 0 <= call.check(result) <= 1
    if name != "vllm_align":  # its tiles and count go into memory that is used in part only
        assert_each_part_matters(call, result)


def test_every_peer_of_vllm_is_here():
    assert set(VLLM) == {p.name for p in peers_vllm.PEERS}


@pytest.mark.parametrize(
    ("name", "problem", "place"),
    [
        ("vllm_norm_insert", problems.KvNormRopeInsertProblem(m=70, format="bf16"), (1,)),
        ("vllm_rms_norm", VLLM["vllm_rms_norm"], (8, 3)),
        ("vllm_rms_norm", problems.RmsNormProblem(m=9, k=256), (8, 3)),
        ("vllm_swiglu", VLLM["vllm_swiglu"], (0, 100)),
        ("vllm_qnorm_rope", VLLM["vllm_qnorm_rope"], (4, 7, 500)),
        ("vllm_rotary", VLLM["vllm_rotary"], (4, 7, 500)),
        ("vllm_unpermute", VLLM["vllm_unpermute"], (8, 64)),
    ],
)
def test_what_is_off_by_more_than_a_twentieth_fails(name, problem, place):
    call, result = called(name, problem)
    call.check(result)
    numbers = result.view(torch.bfloat16) if result.dtype == torch.uint8 else result
    numbers[place] = numbers[place] * 1.05 + 0.25 * numbers.float().abs().amax()
    with pytest.raises(AssertionError, match="differs from the reference by"):
        call.check(result)


def test_a_row_elsewhere_in_the_cache_fails():
    call, cache = called("vllm_norm_insert", VLLM["vllm_norm_insert"])
    call.check(cache)
    cache.copy_(cache.roll(576, dims=1))
    with pytest.raises(AssertionError):
        call.check(cache)


def test_a_table_of_experts_is_followed():
    problem = problems.RouteProblem(m=20, experts=256, topk=6, choice="table")
    call, (weights, ids) = called("vllm_route", problem)
    assert call.check((weights, ids)) <= 1
    ids[3, 0] = (ids[3, 0] + 1) % 256
    with pytest.raises(AssertionError, match="other experts than the table has"):
        call.check((weights, ids))


def test_small_scores_may_lose_what_one_plus_their_exponential_rounds_off():
    problem = problems.RouteProblem(m=256, experts=384, topk=6, choice="table")
    call, (weights, ids) = called("vllm_route", problem)
    logits, *_, scale = testing.case(problem, "cpu", 1).operands
    softplus = torch.where(logits > 20, logits, torch.log(1 + torch.exp(logits)))
    score = softplus.sqrt().gather(1, ids.long())
    weights.copy_(score / (score.sum(-1, keepdim=True) + 1e-20) * scale)
    assert 0 < call.check((weights, ids)) <= 1
    large = torch.where(score > 0.1, 1 + 5e-4, 1.0)
    with pytest.raises(AssertionError, match="weights differs from the reference"):
        call.check((weights * large, ids))


def test_entries_are_as_good_as_the_best_and_different():
    call, entries = called("vllm_topk_per_row", VLLM["vllm_topk_per_row"])
    call.check(entries)
    logits = testing.case(VLLM["vllm_topk_per_row"], "cpu", 1).operands[0]
    worst = int(logits[0].argmin())
    kept = int(entries[0, 0])
    entries[0, 0] = worst
    with pytest.raises(AssertionError, match="a better entry is left out"):
        call.check(entries)
    entries[0, 0] = entries[0, 1]
    with pytest.raises(AssertionError, match="chosen twice"):
        call.check(entries)
    entries[0, 0] = 640
    with pytest.raises(AssertionError, match=r"entries must be in \[0, 640\)"):
        call.check(entries)
    entries[0, 0] = kept
    assert call.check(entries) == 0


def test_a_slot_in_anothers_rows_fails():
    call, (to, first) = called("vllm_scatter", VLLM["vllm_scatter"])
    flat = to.view(-1)
    low, high = int(flat.argmin()), int(flat.argmax())
    flat[low], flat[high] = flat[high].clone(), flat[low].clone()
    with pytest.raises(AssertionError, match="outside its expert's rows"):
        call.check((to, first))
    call, (order, tiles, total) = called("vllm_align", VLLM["vllm_align"])
    tiles[0] += 1
    with pytest.raises(AssertionError, match="tile of another expert"):
        call.check((order, tiles, total))


def test_swiglu_that_quantises_nothing_has_a_peer():
    call, result = called("vllm_swiglu", problems.SwigluProblem(m=9, k=128))
    assert result.dtype == torch.bfloat16
    assert call.check(result) <= 1
    assert_each_part_matters(call, result)


def test_what_peers_were_not_made_for():
    refused = {
        "vllm_swiglu": problems.SwigluProblem(m=1, k=64, out="fp32"),
        "vllm_norm_insert": problems.KvNormRopeInsertProblem(m=1, format="nvfp4"),
        "vllm_norms_insert": problems.QkvNormRopeInsertProblem(m=1, k=256, format="nvfp4"),
        "vllm_qnorm_rope": problems.QnormRopeProblem(m=1, heads=12),
        "vllm_rotary_quantize": problems.IndexQueryProblem(m=1, format="mxfp4", hadamard=1),
        "vllm_cooperative_topk": problems.IndexTopkProblem(m=33, entries=640, topk=512),
        "vllm_persistent_topk": problems.IndexTopkProblem(m=1, entries=640, topk=500),
        "deep_gemm_logits": problems.IndexLogitsProblem(m=1, entries=64, format="mxfp4"),
        "flashinfer_mhc_post": problems.HyperConnectionPostProblem(m=1, k=64, n=2),
    }
    for name, problem in refused.items():
        assert peers_fusions.PEERS[name].refuses(problem), name


# --- DeepGEMM and FlashInfer, as modules with their functions' signatures ---


class DeepGemm(ModuleType):
    wrong = 1.0

    def __init__(self):
        super().__init__("deep_gemm")

    def get_num_sms(self):
        return 132

    def get_paged_mqa_logits_metadata(self, context_lens, block_kv, num_sms):
        assert (context_lens.ndim, context_lens.dtype, block_kv) == (2, torch.int32, 64)
        return "schedule"

    def fp8_fp4_mqa_logits(self, q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k):
        (codes, none), (keys, scales) = q, kv
        assert none is None
        assert codes.dtype == keys.dtype == torch.float8_e4m3fn
        assert scales.shape == keys.shape[:1]
        dots = torch.einsum("mhd,nd->mhn", codes.float(), keys.float() * scales[:, None])
        out = torch.einsum("mhn,mh->mn", dots.relu(), weights) * self.wrong
        hidden = torch.arange(max_seqlen_k) >= cu_seq_len_k_end[:, None]
        return out.masked_fill(hidden, torch.nan)

    def fp8_fp4_paged_mqa_logits(self, q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len):
        assert schedule_meta == "schedule"
        assert kv_cache.shape[1:] == (64, 1, 132)
        assert kv_cache.dtype == torch.uint8
        out = []
        for row, pages in enumerate(block_table.tolist()):
            raw = kv_cache.reshape(len(kv_cache), -1)[pages]
            keys = raw[:, : 64 * 128].reshape(-1, 128).view(torch.float8_e4m3fn)
            scales = raw[:, 64 * 128 :].reshape(-1).contiguous().view(torch.float32)
            first, end = torch.zeros(1, dtype=torch.int32), context_lens[row]
            single = (q[0][row], None)
            out.append(self.fp8_fp4_mqa_logits(single, (keys, scales), weights[row : row + 1], first, end, len(keys)))
        return torch.cat(out)[:, :max_context_len]

    def tf32_hc_prenorm_gemm(self, a, b, d, sqr_sum, num_splits=None):
        parts = num_splits or 1
        assert d.shape == ((parts,) if num_splits else ()) + (len(a), len(b))
        for i, (x, y) in enumerate(zip(a.float().chunk(parts, 1), b.chunk(parts, 1), strict=True)):
            (d[i] if num_splits else d).copy_(x @ y.T * self.wrong)
            (sqr_sum[i] if num_splits else sqr_sum).copy_(x.square().sum(1))


class Mhc(ModuleType):
    wrong = 1.0

    def __init__(self):
        super().__init__("flashinfer.mhc")

    def mhc_post(self, x, residual, post_layer_mix, comb_res_mix):
        mixed = torch.einsum("toh,ton->tnh", residual.float(), comb_res_mix)
        return (x.float()[:, None] * post_layer_mix[..., None] * self.wrong + mixed).to(x.dtype)

    def _mhc_post_impl(self, out, x, residual, post_layer_mix, comb_res_mix):
        out.copy_(self.mhc_post(x, residual, post_layer_mix, comb_res_mix))

    def mhc_pre_big_fuse(
        self, dot_mix, sqrsum, residual, mhc_scale, mhc_base, k, rms_eps, mhc_pre_eps, mhc_sinkhorn_eps,
        mhc_post_mult_value, sinkhorn_repeat, num_splits,
    ):  # fmt: skip
        if num_splits > 1:
            dot_mix, sqrsum = dot_mix.sum(0), sqrsum.sum(0)
        mix = dot_mix * torch.rsqrt(sqrsum / k + rms_eps)[:, None]
        mix = mix * mhc_scale.repeat_interleave(torch.tensor([4, 4, 16])) + mhc_base
        pre = mix[:, :4].sigmoid() + mhc_pre_eps
        comb = mix[:, 8:].unflatten(1, (4, 4)).softmax(-1) + mhc_sinkhorn_eps
        for i in range(sinkhorn_repeat):
            comb = comb / (comb.sum(-1, keepdim=True) + mhc_sinkhorn_eps) if i else comb
            comb = comb / (comb.sum(-2, keepdim=True) + mhc_sinkhorn_eps)
        folded = (pre[..., None] * residual.float()).sum(1).to(residual.dtype)
        return (mix[:, 4:8].sigmoid() * mhc_post_mult_value)[..., None], comb, folded


@pytest.fixture
def libraries(monkeypatch):
    found = SimpleNamespace(deep_gemm=DeepGemm(), mhc=Mhc())
    monkeypatch.setitem(sys.modules, "deep_gemm", found.deep_gemm)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mhc", found.mhc)
    properties = SimpleNamespace(multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return found


@pytest.mark.parametrize(("m", "sequences", "paged"), [(5, 1, False), (5, 0, True), (1, 0, True)])
def test_index_scores_are_those_of_the_cache(libraries, monkeypatch, m, sequences, paged):
    problem = problems.IndexLogitsProblem(m=m, entries=200, format="fp8", sequences=sequences, heads=4)
    launched = []
    for name in ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits"):
        real = getattr(libraries.deep_gemm, name)
        watched = lambda *args, name=name, real=real: launched.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(libraries.deep_gemm, name, watched)
    call, scores = called("deep_gemm_logits", problem)
    assert launched[0] == ("fp8_fp4_paged_mqa_logits" if paged else "fp8_fp4_mqa_logits")
    assert call.check(scores) <= 1
    libraries.deep_gemm.wrong = 1.01
    with pytest.raises(AssertionError, match="scores differs from the reference"):
        call.check(call.launch())


def test_rounded_queries_stand_for_the_case():
    """Codes, scales and weights are those of the case's own queries, to E4M3's rounding."""
    case = testing.case(problems.IndexLogitsProblem(m=3, entries=64, format="fp8", heads=4), "cpu", 0)
    q, weights, scale = case.operands[0], case.operands[1], case.operands[7]
    codes, heads = peers_deep_gemm.quantized_queries(q, weights, scale)
    step = heads / weights / scale
    decoded = codes.float() * step[..., None]
    largest = q.float().abs().amax(-1, keepdim=True)
    assert ((decoded - q.float()).abs() <= q.float().abs() / 16 + largest / E4M3_MAX / 1024 * 1.01).all()


@pytest.mark.parametrize(
    ("name", "kind", "m"),
    [
        ("deep_gemm_prenorm", problems.HyperConnectionPreProblem, 7),
        ("flashinfer_mhc_pre", problems.HyperConnectionPreProblem, 7),
        ("flashinfer_mhc_pre", problems.HyperConnectionPreProblem, 600),
        ("flashinfer_mhc_post", problems.HyperConnectionPostProblem, 7),
        ("flashinfer_mhc_post_pre", problems.HyperConnectionPostPreProblem, 7),
    ],
)
def test_hyper_connections_agree_and_a_wrong_one_does_not(libraries, name, kind, m):
    call, result = called(name, kind(m=m, k=256))
    assert call.check(result) <= 1
    assert_each_part_matters(call, result)
    libraries.deep_gemm.wrong = libraries.mhc.wrong = 1.05
    with pytest.raises(AssertionError, match="differs from the reference"):
        call.check(call.launch())


def test_a_quantiser_is_judged_by_its_own_scales(monkeypatch):
    """gemlite's arithmetic: the reciprocal of the global scale, codes even column first."""
    quant = ModuleType("gemlite.quant_utils")
    quant.wrong = 0
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def scale_activations_nvfp4(x, meta_scale):
        blocks = x.float().unflatten(1, (-1, 16))
        scale = (blocks.abs().amax(-1) * meta_scale / 6).clamp(max=448).to(torch.float8_e4m3fn)
        y = blocks / (scale.float() / meta_scale).clamp_min(1e-6)[..., None]
        codes = (y.abs()[..., None] - values).abs().argmin(-1) + 8 * (y < 0)
        codes = (codes.flatten(1) + quant.wrong) % 16
        return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), scale, meta_scale

    quant.scale_activations_nvfp4 = scale_activations_nvfp4
    monkeypatch.setitem(sys.modules, "gemlite", ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.quant_utils", quant)
    call, result = called("gemlite_nvfp4", problems.QuantizeProblem(m=40, k=256))
    assert 0.5 < call.check(result) <= 1
    assert_each_part_matters(call, result)
    quant.wrong = 1
    with pytest.raises(AssertionError, match="elements differs from the reference"):
        call.check(call.launch())


def test_parts_of_a_row_fill_the_device():
    assert [peers_deep_gemm.splits(m, 132) for m in (1, 64, 65, 512, 4096, 16384)] == [16, 16, 16, 16, 2, 1]


def test_a_composition_gives_the_reference(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    peers_fusions._compiled.cache_clear()
    for op, problem in {
        "quantize_nvfp4": problems.QuantizeProblem(m=3, k=64),
        "rmsnorm_quantize": problems.RmsnormQuantizeProblem(m=3, k=64),
        "rms_norm": problems.RmsNormProblem(m=3, k=64),
        "swiglu_quantize": problems.SwigluQuantizeProblem(m=3, k=64),
        "swiglu": problems.SwigluProblem(m=3, k=64),
        "quantize_fp8": problems.QuantizeFp8Problem(m=3, k=64),
        "qnorm_rope": problems.QnormRopeProblem(m=3, heads=2, head_dim=64, rope_dim=32),
        "rope_inverse": problems.RopeInverseProblem(m=3, heads=2, head_dim=64, rope_dim=32),
    }.items():
        call, result = called("torch_compile", problem)
        assert call.check(result) == 0, op
        tensors(result)[0].view(torch.uint8)[0] ^= 1
        with pytest.raises(AssertionError, match="of its bytes"):
            call.check(result)
    peers_fusions._compiled.cache_clear()


def test_every_cell_has_a_kernel():
    """Cells of V4-Pro and V4-Flash, as the command line makes them."""
    configs = targets.load_configs(["pro", "flash"])
    options = bench_fusions.Options(ops=peers_fusions.OPS, m=bench_fusions.DEFAULT_M, peers=frozenset())
    said = []
    found = bench_fusions.cells(targets.Target("sm_90a", "sm_90a"), configs, options, said.append)
    assert {c.problem.op for c in found} == set(peers_fusions.OPS)
    assert said == []
