"""vLLM's CUDA kernels beside our fusions, called as operators of its libraries: vLLM itself is not imported."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import E4M3_MAX, PagedCache
from fp4suite.problem import (
    CombineProblem,
    EmbedProblem,
    IndexQueryProblem,
    IndexTopkProblem,
    KvNormRopeInsertProblem,
    PermuteProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QuantizeFp8Problem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    RouteProblem,
    SwigluProblem,
    SwigluQuantizeProblem,
)
from fp4suite.reference.quant import rmsnorm_fp32, swiglu_fp32
from fp4suite.reference.rope import rotate
from fp4suite.reference.router import affinity
from fp4suite.testing import Case, assert_same_bytes

from .fusion_peer import BF16_STEP, Call, FusionPeer, near, spread, within
from .peers import vllm_ops

HEAD_DIM, ROPE_DIM, PADDED_HEADS = 512, 64, (8, 16, 32, 64, 128)  # of the kernels for V4
TOPKS = (512, 1024, 2048)
COOPERATIVE_ROWS = 32
WORKSPACE = 1 << 20  # bytes, of the top-k kernels
ALIGNED = 16  # rows to which an expert's slots are padded, the smallest tile there is
E4M3_STEP = 2.0**-3  # two neighbouring E4M3 numbers, relative to the smaller
SOFTPLUS_ERROR = 2.0**-23  # of log(1 + e) in FP32: half a step of 1 + e, and what lg2.approx adds


def qnorm_rope(case: Case) -> Call:
    """The kernel that also inserts KV rows, without slots for any: only its queries are left."""
    op = vllm_ops("_C", "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert")
    q, positions, table, eps = case.operands
    kv = torch.zeros(len(q), HEAD_DIM, dtype=q.dtype, device=q.device)
    pages = torch.zeros(1, 64 * 584, dtype=torch.uint8, device=q.device)
    at, none = positions.long(), torch.empty(0, dtype=torch.long, device=q.device)
    rows = spread(len(q), q.device)

    def launch() -> Tensor:
        return cast(
            Tensor,
            op.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(q, kv, pages, none, at, table, q.shape[1], eps, 64),
        )

    return Call(launch, lambda got: near(got[rows], reference.qnorm_rope(q[rows], positions[rows], table, eps)))


def _qnorm_rope_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, QnormRopeProblem)
    if (problem.head_dim, problem.rope_dim) != (HEAD_DIM, ROPE_DIM) or problem.heads not in PADDED_HEADS:
        return f"made for heads of {HEAD_DIM} and {PADDED_HEADS} of them"
    return None


def norm_insert(case: Case) -> Call:
    """Two launches: `rms_norm`, then RoPE, rounding and insertion."""
    op = vllm_ops("_C", "fused_deepseek_v4_kv_rope_insert", "rms_norm")
    kv, weight, positions, table, eps, slots = case.operands
    p = case.problem
    assert isinstance(p, KvNormRopeInsertProblem)
    cache = PagedCache(torch.zeros_like(case.out.data), p.format, p.page_size, p.head_dim, p.rope_dim)
    want = PagedCache(torch.zeros_like(case.out.data), p.format, p.page_size, p.head_dim, p.rope_dim)
    layout, count = cache.layout, len(cache.data)
    if p.format == "bf16":
        pages = cache.data.view(torch.bfloat16).view(count, p.page_size, p.head_dim)
    else:  # rows and scales of a page as vLLM names them; the page may end in padding
        row = layout.row_bytes + layout.scale_bytes
        pages = cache.data.as_strided((count, p.page_size, row), (layout.page_bytes, row, 1))
    at, to, normed = positions.long(), slots.long(), torch.empty_like(kv)

    def launch() -> Tensor:
        op.rms_norm(normed, kv, weight, eps)
        op.fused_deepseek_v4_kv_rope_insert(normed, pages, to, at, table, p.page_size)
        return cache.data

    def check(got: Tensor) -> float:
        reference.kv_norm_rope_insert(kv, weight, positions, table, eps, want, slots)
        stored = slots[slots >= 0][spread(int((slots >= 0).sum()), kv.device)]
        a, b = (reference.read_rows(c, stored) for c in (cache, want))
        nope = p.head_dim - p.rope_dim
        if p.format == "bf16":
            return near(a, b, 2, of_row=2.0**-7)
        room = E4M3_STEP * b.abs() + 2.0**-8 * b[:, :nope].abs().amax(-1, keepdim=True)
        latent = within(a[:, :nope], b[:, :nope], room[:, :nope], "rows but for RoPE")
        return max(latent, near(a[:, nope:], b[:, nope:], 2, of_row=2.0**-7))

    return Call(launch, check)


def _norm_insert_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, KvNormRopeInsertProblem)
    if problem.format not in ("fp8_ds_mla", "bf16"):
        return f"writes no {problem.format} rows of V4"
    return None


def norms_insert(case: Case) -> Call:
    """Three launches: `rms_norm` of q, then `norm_insert`."""
    op = vllm_ops("_C", "rms_norm")
    q, q_weight, *rest = case.operands
    p, eps = case.problem, rest[4]
    assert isinstance(p, QkvNormRopeInsertProblem)
    insert = norm_insert(replace(case, problem=p.insert, operands=tuple(rest), out=case.out[1]))
    normed, rows = torch.empty_like(case.out[0]), spread(len(q), q.device)

    def launch() -> tuple[Tensor, Tensor]:
        op.rms_norm(normed, q, q_weight, eps)
        return normed, insert.launch()

    def check(got: tuple[Tensor, Tensor]) -> float:
        return max(near(got[0][rows], rmsnorm_fp32(q[rows], q_weight, eps), 2), insert.check(got[1]))

    return Call(launch, check)


def _norms_insert_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, QkvNormRopeInsertProblem)
    return _norm_insert_refuses(problem.insert)


def rotary(case: Case) -> Call:
    """In place: what is not rotated is neither read nor written."""
    op = vllm_ops("_C", "rotary_embedding")
    in_place = isinstance(case.problem, RopeInverseInPlaceProblem)
    o, positions, table = (case.out.clone(), *case.operands) if in_place else case.operands[:3]
    turned, at = o.clone(), positions.long()
    head_dim, rope_dim = o.shape[-1], table.shape[1]
    rows = spread(len(o), o.device)

    def launch() -> Tensor:
        op.rotary_embedding(at, turned, None, head_dim, table, False, head_dim - rope_dim, True)
        return turned

    def check(got: Tensor) -> float:
        return near(got[rows], reference.rope_inverse(o[rows], positions[rows], table))

    return Call(launch, check, partial(turned.copy_, o))


def rotary_quantize(case: Case) -> Call:
    """Two launches: RoPE in place, then E4M3 with a power of two a head."""
    op = vllm_ops("_C", "rotary_embedding", "per_token_group_fp8_quant")
    q, positions, table, _, _ = case.operands
    turned, at = q.clone(), positions.long()
    d, rope_dim = q.shape[-1], table.shape[1]
    heads = turned.view(-1, d)
    codes = torch.empty_like(heads, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(heads), 1, device=q.device)
    rows = spread(len(q), q.device)

    def launch() -> tuple[Tensor, Tensor]:
        op.rotary_embedding(at, turned, None, d, table, False, d - rope_dim, False)
        op.per_token_group_fp8_quant(heads, codes, scales, d, 1e-10, -E4M3_MAX, E4M3_MAX, True, False, False)
        return codes, scales

    def check(got: tuple[Tensor, Tensor]) -> float:
        given = got[0].view(q.shape)[rows].float() * got[1].view(*q.shape[:-1], 1)[rows]
        want = rotate(q[rows].float(), positions[rows], table)
        room = (E4M3_STEP / 2 + BF16_STEP) * want.abs() + 2.0**-16 * want.abs().amax(-1, keepdim=True)
        return within(given, want, room)

    return Call(launch, check, partial(turned.copy_, q))


def _rotary_quantize_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, IndexQueryProblem)
    if problem.format != "fp8" or problem.hadamard:
        return "rounds to E4M3 only, and has no Hadamard transform"
    return None


def persistent_topk(case: Case) -> Call:
    return _topk(case, "persistent_topk")


def cooperative_topk(case: Case) -> Call:
    return _topk(case, "cooperative_topk")


def _topk(case: Case, name: str) -> Call:
    op = vllm_ops("_C", name)
    logits, p = case.operands[0], case.problem
    assert isinstance(p, IndexTopkProblem)
    lengths = torch.full((p.m,), p.entries, dtype=torch.int32, device=logits.device)
    out = torch.empty(p.m, p.topk, dtype=torch.int32, device=logits.device)
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=logits.device)

    def launch() -> Tensor:
        getattr(op, name)(logits, lengths, out, workspace, p.topk, p.entries)
        return out

    return Call(launch, partial(check_entries, logits))


def topk_per_row(case: Case) -> Call:
    op = vllm_ops("_C", "top_k_per_row_prefill")
    logits, p = case.operands[0], case.problem
    assert isinstance(p, IndexTopkProblem)
    first = torch.zeros(p.m, dtype=torch.int32, device=logits.device)
    end = torch.full_like(first, p.entries)
    out = torch.empty(p.m, p.topk, dtype=torch.int32, device=logits.device)

    def launch() -> Tensor:
        op.top_k_per_row_prefill(logits, first, end, out, p.m, logits.stride(0), logits.stride(1), p.topk)
        return out

    return Call(launch, partial(check_entries, logits))


def torch_topk(case: Case) -> Call:
    logits, p = case.operands[0], case.problem
    assert isinstance(p, IndexTopkProblem)
    values = torch.empty(p.m, p.topk, device=logits.device)
    entries = torch.empty(p.m, p.topk, dtype=torch.long, device=logits.device)

    def launch() -> Tensor:
        torch.topk(logits, p.topk, dim=-1, sorted=False, out=(values, entries))
        return entries

    return Call(launch, partial(check_entries, logits))


def check_entries(logits: Tensor, got: Tensor) -> float:
    """Entries [m, topk] in any order: as good as the best ones, score by score.

    Every 16th row of a case, with equal scores by the thousand or some that are not finite, is left out.
    """
    rows = spread(len(logits), logits.device, 256)
    rows = rows[rows % 16 != 15]
    scores, chosen = logits[rows], got[rows].long()
    _assert_in_range(chosen, logits.shape[1], "entries")
    ordered = chosen.sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise AssertionError("an entry is chosen twice")
    best = scores.sort(-1, descending=True).values[:, : chosen.shape[1]]
    if not torch.equal(scores.gather(1, chosen).sort(-1, descending=True).values, best):
        raise AssertionError("a better entry is left out")
    return 0.0


def _assert_in_range(numbers: Tensor, end: int, what: str) -> None:
    if numbers.numel() and not (int(numbers.amin()) >= 0 and int(numbers.amax()) < end):
        raise AssertionError(f"{what} must be in [0, {end}), got {int(numbers.amin())}..{int(numbers.amax())}")


def _topk_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, IndexTopkProblem)
    if problem.topk not in TOPKS or problem.entries < problem.topk:
        return f"selects {TOPKS} of at least as many entries"
    return None


def _cooperative_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, IndexTopkProblem)
    if problem.m > COOPERATIVE_ROWS:
        return f"takes {COOPERATIVE_ROWS} rows at most"
    return _topk_refuses(problem)


def route(case: Case) -> Call:
    op = vllm_ops("_moe_C", "topk_softplus_sqrt")
    logits, bias, token_ids, table, scale = case.operands
    p = case.problem
    assert isinstance(p, RouteProblem)
    weights = torch.empty(p.m, p.topk, device=logits.device)
    ids, places = (torch.empty(p.m, p.topk, dtype=torch.int32, device=logits.device) for _ in range(2))
    tokens = None if token_ids is None else token_ids.int()
    rows = spread(p.m, logits.device, 256)

    def launch() -> tuple[Tensor, Tensor]:
        op.topk_softplus_sqrt(weights, ids, places, logits, True, scale, bias, tokens, table, None)
        return weights, ids

    def check(got: tuple[Tensor, Tensor]) -> float:
        score, chosen = affinity(logits[rows].float()), got[1][rows].long()
        _assert_in_range(chosen, p.experts, "experts")
        if table is not None:
            if not torch.equal(chosen.sort(-1).values, table[token_ids[rows]].long().sort(-1).values):
                raise AssertionError("other experts than the table has")
            worst = 0.0
        else:
            ranked = score if bias is None else score + bias
            best = ranked.sort(-1, descending=True).values[:, : p.topk]
            taken = ranked.gather(1, chosen).sort(-1, descending=True).values
            worst = within(taken, best, 1e-5 * (1 + best.abs()), "scores of the chosen")
        own = score.gather(1, chosen)
        total = own.sum(-1, keepdim=True)
        some = total[:, 0] > 1e-10
        want = own / total * scale
        # log(1 + e) loses what 1 + e rounds off, 2^-24, and fast logarithms are off by as much again: little of a large
        # score, but 3e-4 of one of 0.01, as tables choose them
        lost = torch.clamp(SOFTPLUS_ERROR / own, max=SOFTPLUS_ERROR**0.5) * scale / total
        tolerance = 1e-4 * want + 1e-6 + lost
        return max(worst, within(got[0][rows][some], want[some], tolerance[some], "weights"))

    return Call(launch, check)


def scatter(case: Case) -> Call:
    """Destination of each slot, and where experts begin. Takes no slot of no expert: those have one here."""
    op = vllm_ops("_moe_C", "moe_prepare_scatter", "moe_permute_sort_workspace_size")
    ids, experts = case.operands
    slots = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view_as(ids)
    ids = torch.where(ids < 0, slots % experts, ids)
    first = torch.empty(experts + 1, dtype=torch.long, device=ids.device)
    to, sorted_ids, sorted_rows, spare = (torch.empty_like(ids) for _ in range(4))
    size = op.moe_permute_sort_workspace_size(ids.numel(), experts)
    workspace = torch.empty(size, dtype=torch.int8, device=ids.device)

    def launch() -> tuple[Tensor, Tensor]:
        op.moe_prepare_scatter(ids, slots, None, experts, experts, first, to, workspace, sorted_ids, sorted_rows, spare)
        return to, first

    def check(got: tuple[Tensor, Tensor]) -> float:
        _, offsets = reference.permute(ids, experts)
        if not torch.equal(got[1], offsets.long()):
            raise AssertionError("experts begin elsewhere")
        place, expert = got[0].flatten().long(), ids.flatten().long()
        if not torch.equal(place.sort().values, torch.arange(len(place), device=ids.device)):
            raise AssertionError("destinations are not all different")
        if not ((offsets[expert] <= place) & (place < offsets[expert + 1])).all():
            raise AssertionError("a slot lies outside its expert's rows")
        return 0.0

    return Call(launch, check)


def align(case: Case) -> Call:
    """Slots by expert, each expert's padded to a whole tile. Takes no slot of no expert: those have one here."""
    op = vllm_ops("_moe_C", "moe_align_block_size")
    ids, experts = case.operands
    count = ids.numel()
    slots = torch.arange(count, dtype=torch.int32, device=ids.device).view_as(ids)
    ids = torch.where(ids < 0, slots % experts, ids)
    most = min(count + experts * (ALIGNED - 1), count * ALIGNED)
    order = torch.empty(most, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(-(-most // ALIGNED), dtype=torch.int32, device=ids.device)
    total = torch.empty(1, dtype=torch.int32, device=ids.device)

    def launch() -> tuple[Tensor, Tensor, Tensor]:
        op.moe_align_block_size(ids, experts, ALIGNED, order, tiles, total, None)
        return order, tiles, total

    def check(got: tuple[Tensor, Tensor, Tensor]) -> float:
        used = int(got[2])
        placed = got[0][:used].long()
        real = placed < count
        if not torch.equal(placed[real].sort().values, torch.arange(count, device=ids.device)):
            raise AssertionError("not every slot has one place")
        expert = got[1].long().repeat_interleave(ALIGNED)[:used]
        if not torch.equal(ids.flatten().long()[placed[real]], expert[real]):
            raise AssertionError("a slot lies in a tile of another expert")
        return 0.0

    return Call(launch, check)


def unpermute(case: Case) -> Call:
    """Two launches: the weighted sum, then the shared expert. Slots of no expert have weight 0 and finite rows."""
    op = vllm_ops("_moe_C", "moe_unpermute")
    y, order, ids, weights, shared = case.operands
    p = case.problem
    assert isinstance(p, CombineProblem)
    y, weights = y.nan_to_num(nan=0.0), torch.where(ids < 0, 0.0, weights)
    place = torch.empty_like(order)
    place[order.long()] = torch.arange(len(order), dtype=torch.int32, device=y.device)
    place = place.view_as(ids)
    out = torch.empty(p.m, p.k, dtype=y.dtype, device=y.device)
    rows = spread(p.m, y.device)

    def launch() -> Tensor:
        op.moe_unpermute(y, weights, place, None, p.topk, out)
        return out if shared is None else out.add_(shared)

    def check(got: Tensor) -> float:
        terms = y[place[rows].long()].double() * weights[rows].double()[..., None]  # [rows, topk, k]
        want, size = terms.sum(1), terms.abs().sum(1)
        if shared is not None:
            want, size = want + shared[rows].double(), size + shared[rows].double().abs()
        return within(got[rows], want, BF16_STEP * size)

    return Call(launch, check)


def rms_norm(case: Case) -> Call:
    op = vllm_ops("_C", "rms_norm")
    x, weight, eps = case.operands[:3]
    out, rows = torch.empty_like(x), spread(len(x), x.device)

    def launch() -> Tensor:
        op.rms_norm(out, x, weight, eps)
        return out

    return Call(launch, lambda got: near(got[rows], rmsnorm_fp32(x[rows], weight, eps), 2))


def swiglu(case: Case) -> Call:
    """Of BF16 gate and up, as a GEMM leaves them there, where ours reads FP32: 6 bytes an element, not 10."""
    op = vllm_ops("_C", "silu_and_mul_with_clamp")
    x, limit = case.operands[0].bfloat16(), case.operands[1]
    out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
    rows = spread(len(x), x.device)

    def launch() -> Tensor:
        op.silu_and_mul_with_clamp(out, x, limit)
        return out

    return Call(launch, lambda got: near(got[rows], swiglu_fp32(x[rows], limit), 2))


def _swiglu_refuses(problem: Problem) -> str | None:
    assert isinstance(problem, SwigluProblem | SwigluQuantizeProblem)
    if isinstance(problem, SwigluProblem) and problem.out != "bf16":
        return f"compared in BF16, not in {problem.out}"
    return None


def torch_embedding(case: Case) -> Call:
    """A gather, and the streams' copies of it."""
    ids, weight = case.operands
    p = case.problem
    assert isinstance(p, EmbedProblem)
    dtype = case.out.dtype

    def launch() -> Tensor:
        rows = torch.nn.functional.embedding(ids, weight).to(dtype)
        return rows[:, None].expand(-1, p.n, -1).contiguous()

    def check(got: Tensor) -> float:
        assert_same_bytes(got, reference.embed(ids, weight, streams=p.n, out_dtype=dtype), "rows")
        return 0.0

    return Call(launch, check)


def quantize_fp8(case: Case) -> Call:
    op = vllm_ops("_C", "dynamic_per_token_scaled_fp8_quant")
    (x,) = case.operands
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales, rows = torch.empty(len(x), 1, device=x.device), spread(len(x), x.device)

    def launch() -> tuple[Tensor, Tensor]:
        op.dynamic_per_token_scaled_fp8_quant(codes, x, scales, None)
        return codes, scales

    def check(got: tuple[Tensor, Tensor]) -> float:
        want = x[rows].double()
        # halfway between neighbours, or between 0 and the smallest number, 2^-9 of a scale of amax / 448
        room = 1.01 * (E4M3_STEP / 2 * want.abs() + 2.0**-10 / E4M3_MAX * want.abs().amax(-1, keepdim=True))
        return within(got[0][rows].double() * got[1][rows].double(), want, room)

    return Call(launch, check)


def _peer(
    name: str, op: str | tuple[str, ...], prepare: Callable[[Case], Call], tolerance: str, note: str = "", **more: Any
) -> FusionPeer:
    ops = (op,) if isinstance(op, str) else op
    given: dict[str, Any] = {"module": "vllm", "package": "vllm"} | more
    return FusionPeer(name=name, ops=ops, prepare=prepare, tolerance=tolerance, note=note, **given)


STEP, STEPS = "one BF16 step", "two BF16 steps"
SAME = "the same scores in any order"

PEERS = (
    _peer("vllm_qnorm_rope", QnormRopeProblem.op, qnorm_rope, STEP, refuses=_qnorm_rope_refuses),
    _peer(
        "vllm_norm_insert", KvNormRopeInsertProblem.op, norm_insert, "one E4M3 step, two BF16 steps where BF16",
        "two launches", refuses=_norm_insert_refuses,
    ),
    _peer(
        "vllm_norms_insert", QkvNormRopeInsertProblem.op, norms_insert,
        "two BF16 steps, one E4M3 step where the cache is FP8", "three launches", refuses=_norms_insert_refuses,
    ),
    _peer(
        "vllm_rotary", (RopeInverseProblem.op, RopeInverseInPlaceProblem.op, RopeInverseQuantizeProblem.op), rotary,
        STEP, "in place, leaves dims without RoPE alone; quantises nothing", part_of=(RopeInverseQuantizeProblem.op,),
    ),
    _peer(
        "vllm_rotary_quantize", IndexQueryProblem.op, rotary_quantize, "half an E4M3 step of the rotated query",
        "two launches, the first in place; codes and scales instead of BF16", refuses=_rotary_quantize_refuses,
    ),
    _peer(
        "torch_topk", IndexTopkProblem.op, torch_topk, SAME, "entries, not slots", module="torch", package="torch",
    ),
    _peer("vllm_persistent_topk", IndexTopkProblem.op, persistent_topk, SAME, "entries, not slots",
          refuses=_topk_refuses),
    _peer("vllm_cooperative_topk", IndexTopkProblem.op, cooperative_topk, SAME, "entries, not slots",
          refuses=_cooperative_refuses),
    _peer("vllm_topk_per_row", IndexTopkProblem.op, topk_per_row, SAME, "entries, not slots"),
    _peer("vllm_route", RouteProblem.op, route, "scores to 1e-5, weights to 1e-4 where softplus is within 2^-23"),
    _peer("vllm_scatter", PermuteProblem.op, scatter, "the same places but for an expert's order", "the inverse order"),
    _peer("vllm_align", PermuteProblem.op, align, "every slot in a tile of its expert", f"tiles of {ALIGNED}"),
    _peer("vllm_unpermute", CombineProblem.op, unpermute, "one BF16 step of the terms' sizes", "two launches"),
    _peer("vllm_rms_norm", (RmsnormQuantizeProblem.op, RmsNormProblem.op), rms_norm, STEPS,
          "BF16 out, quantises nothing", part_of=(RmsnormQuantizeProblem.op,)),
    _peer("vllm_swiglu", (SwigluQuantizeProblem.op, SwigluProblem.op), swiglu, STEPS,
          "BF16 in and out, quantises nothing", part_of=(SwigluQuantizeProblem.op,), refuses=_swiglu_refuses),
    _peer("torch_embedding", EmbedProblem.op, torch_embedding, "the same bytes", "a gather, then a copy into streams",
          module="torch", package="torch"),
    _peer("vllm_fp8", QuantizeFp8Problem.op, quantize_fp8, "half an E4M3 step of the input"),
)  # fmt: skip
