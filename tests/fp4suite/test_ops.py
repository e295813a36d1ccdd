"""Every op: the reference's numbers, opcheck, a whole-graph torch.compile, and refusals by their message."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from fp4suite import UnsupportedError, dispatch, ops, override, reference
from fp4suite.dispatch import on_target
from fp4suite.layouts import Order
from fp4suite.problem import GemmProblem
from fp4suite.reference import CompressorStep

from .op_arguments import OPCHECKS, PUBLIC, arguments, assert_same, g, weight


class Recorder:
    """In place of `ops._ops`: runs the operators and keeps what they were called with."""

    def __init__(self, calls: list[tuple[str, tuple]]) -> None:
        self.calls = calls

    def __getattr__(self, operator: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.calls.append((operator, args))
            return getattr(torch.ops.fp4suite, operator)(*args)

        return call


@pytest.mark.parametrize("name", PUBLIC)
def test_signature_is_the_references(name: str) -> None:
    def parameters(f: object) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert parameters(getattr(ops, name)) == parameters(getattr(reference, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_cpu_tensors_get_the_reference(name: str) -> None:
    args, kwargs = arguments(name)
    want_args, want_kwargs = arguments(name)
    got = getattr(ops, name)(*args, **kwargs)
    want = getattr(reference, name)(*want_args, **want_kwargs)
    assert_same(got, want)
    assert_same((args, kwargs), (want_args, want_kwargs))  # what is changed in place is changed alike


@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator that the public function calls, with the arguments it really gets."""
    calls: list[tuple[str, tuple]] = []
    monkeypatch.setattr(ops, "_ops", Recorder(calls))
    args, kwargs = arguments(name)
    getattr(ops, name)(*args, **kwargs)
    assert calls
    for operator, args in calls:
        overload = getattr(torch.ops.fp4suite, operator).default
        torch.library.opcheck(overload, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_as_one_graph(name: str) -> None:
    args, kwargs = arguments(name)
    want_args, want_kwargs = arguments(name)
    want = getattr(ops, name)(*want_args, **want_kwargs)
    compiled = torch.compile(lambda: getattr(ops, name)(*args, **kwargs), fullgraph=True, backend="aot_eager")
    assert_same(compiled(), want)
    assert_same((args, kwargs), (want_args, want_kwargs))
    torch._dynamo.reset()


def twice(x: object) -> object:
    """Arguments of twice as many tokens: five of them, or their ten slots."""
    if isinstance(x, torch.Tensor):
        more = len(x) if list(x.shape) == [10] else 0  # an order of slots
        return torch.cat((x, x + more)) if x.ndim and len(x) in (5, 10) else x
    if isinstance(x, CompressorStep):
        return CompressorStep(*(twice(getattr(x, f.name)) for f in fields(x)))
    return type(x)(twice(part) for part in x) if isinstance(x, tuple | list) else x


# where `twice` makes columns of one tensor tensors of their own, which have other strides
GRAPHS = {"qkv_norm_rope_insert": 2}


@pytest.mark.parametrize("name", PUBLIC)
def test_one_graph_for_any_number_of_tokens(name: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, dynamic=True, backend=backend)
    for change in (lambda x: x, twice):
        args, kwargs = arguments(name)
        more = [change(x) for x in args], {key: change(x) for key, x in kwargs.items()}
        args, kwargs = arguments(name)
        again = [change(x) for x in args], {key: change(x) for key, x in kwargs.items()}
        assert_same(compiled(*more[0], **more[1]), getattr(ops, name)(*again[0], **again[1]))
        assert_same(more, again)
    assert len(graphs) == GRAPHS.get(name, 1)
    torch._dynamo.reset()


def test_a_gpu_op_without_a_kernel_says_what_works() -> None:
    args, kwargs = arguments("sparse_attention")
    with (
        on_target("sm_90a"),
        pytest.raises(UnsupportedError, match=r"sparse_attention on sm_90a: no GPU kernel .*override"),
    ):
        ops.sparse_attention(*args, **kwargs)
    with on_target("sm_90a"), override(op="sparse_attention", kernel="reference"):
        assert ops.sparse_attention(*args, **kwargs).shape == args[0].shape


def test_refusals() -> None:
    w = weight(48, 64)
    with pytest.raises(ValueError, match=r"must agree in k, got \[5, 32\] and \[48, 64\]"):
        ops.gemm_nvfp4(g(5, 32), w)
    with pytest.raises(ValueError, match=r"segments \[16, 16\] must be 2 positive runs .* sum to n=48"):
        ops.gemm_nvfp4(g(5, 64), weight(48, 64, alpha=2), segments=(16, 16))
    with pytest.raises(ValueError, match="segments must say how many columns"):
        ops.gemm_nvfp4(g(5, 64), weight(48, 64, alpha=2))
    with pytest.raises(TypeError, match=r"x must be one of bfloat16, float16, float32, got torch\.int32"):
        ops.quantize_nvfp4(torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k a multiple of 16, got \[2, 24\]"):
        ops.quantize_nvfp4(torch.zeros(2, 24))
    with pytest.raises(TypeError, match="alpha must be float32"):
        ops.quantize_nvfp4(torch.zeros(2, 16), alpha=torch.ones((), dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must be one of bfloat16, float16, float32, got torch\.float64"):
        ops.swiglu(g(2, 16).double(), 10.0)
    with pytest.raises(TypeError, match=r"out_dtype must be one of .*, got torch\.float8_e4m3fn"):
        ops.swiglu(g(2, 16), 10.0, torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"weight must be one of bfloat16, float16, float32, got torch\.int32"):
        ops.embed(torch.zeros(2).long(), torch.zeros(3, 16).int())
    with pytest.raises(TypeError, match=r"out_dtype must be one of .*, got torch\.int64"):
        ops.embed(torch.zeros(2).long(), g(3, 16), out_dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets must be int32"):
        ops.grouped_gemm_nvfp4(g(7, 64), weight(3, 16, 64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs w2 \[4, 64, 32\]"):
        ops.moe_nvfp4(g(5, 64), weight(4, 64, 64), weight(4, 64, 64), torch.zeros(5, 2, dtype=torch.int32), g(5, 2))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("route", {"logits": g(5)}, r"logits must be \[tokens, 2 or more experts\], got \[5\]"),
        ("route", {"topk": 9}, r"logits must be \[tokens, 9 or more experts\], got \[5, 8\]"),
        ("route", {"bias": g(7)}, r"bias must be \[8\], got \[7\]"),
        ("route", {"token_ids": torch.zeros(5).int()}, "token_ids and table go together"),
        (
            "route",
            {"bias": None, "token_ids": torch.zeros(4).int(), "table": torch.zeros(9, 2).int()},
            r"token_ids must be int32 or int64 \[5\], got torch.int32 \[4\]",
        ),
        ("permute", {"topk_ids": torch.zeros(5, 2)}, r"topk_ids must be int32 \[tokens, topk\], got torch.float32"),
        ("permute", {"experts": 0}, "experts must be positive, got 0"),
        ("combine", {"y": g(9, 64)}, r"y must be \[10, hidden\] and order int32 \[10\], got \[9, 64\]"),
        ("combine", {"order": torch.zeros(10)}, r"order int32 \[10\], got .* torch.float32 \[10\]"),
        ("combine", {"topk_weights": g(5, 3)}, r"topk_weights must be .* as topk_ids \[5, 2\], got \[5, 3\]"),
        ("combine", {"shared": g(5, 63)}, r"shared must be \[5, 64\], got \[5, 63\]"),
        ("embed", {"token_ids": torch.zeros(5)}, r"token_ids must be int64 or int32 \[tokens\], got torch.float32"),
        ("embed", {"token_ids": torch.zeros(5, 1).int()}, r"must be int64 or int32 \[tokens\], got .* \[5, 1\]"),
        ("embed", {"token_ids": torch.zeros(5).long().to("meta")}, "token_ids must be on cpu beside weight, got meta"),
        ("embed", {"weight": g(9)}, r"weight must be \[vocab, hidden\], .* got \[9\] with strides \[1\]"),
        ("embed", {"weight": g(0, 64)}, r"weight must be \[vocab, hidden\], one row at least .* got \[0, 64\]"),
        ("embed", {"weight": g(64, 9).T}, r"each of them contiguous, got \[9, 64\] with strides \[1, 9\]"),
        ("embed", {"streams": 0}, "streams must be positive, got 0"),
        ("swiglu", {"x": g(64)}, r"x must be \[..., m, 2 k\], gate columns first, got \[64\]"),
        ("swiglu", {"x": g(5, 63)}, r"x must be \[..., m, 2 k\], gate columns first, got \[5, 63\]"),
        ("swiglu", {"limit": 0.0}, "limit must be positive, got 0.0"),
        ("swiglu", {"limit": float("nan")}, "limit must be positive, got nan"),
        ("sample", {"logits": g(5)}, r"logits must be \[rows, vocab\], got \[5\]"),
        ("sample", {"temperature": torch.ones(4)}, r"temperature must be float32 \[5\], got torch.float32 \[4\]"),
        ("sample", {"uniform": torch.ones(5).double()}, r"uniform must be float32 \[5\], got torch.float64"),
    ],
)
def test_other_shapes_are_refused(name: str, change: dict, message: str) -> None:
    args, kwargs = arguments(name)
    given = inspect.signature(getattr(ops, name)).bind(*args, **kwargs)
    given.arguments |= change
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*given.args, **given.kwargs)


def in_order(name: str, order: str) -> tuple[tuple, dict]:
    """Arguments of an op with weights of whole tiles, in an order."""
    a, b = g(5, 64, dtype=torch.bfloat16), weight(128, 64, alpha=2).with_order(order)
    experts = weight(3, 128, 64).with_order(order)
    match name:
        case "w4a16":
            return (a, b), {"segments": (48, 80)}
        case "w4a4":
            return (reference.quantize_nvfp4(a), b), {"segments": (48, 80)}
        case "grouped":
            return (a, experts, torch.tensor([0, 2, 2, 5], dtype=torch.int32)), {}
        case "moe":
            ids = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]], dtype=torch.int32)
            return (g(5, 64), experts, weight(3, 64, 64, seed=9).with_order(order), ids, g(5, 2, seed=5).abs()), {}
    raise AssertionError(name)


@pytest.mark.parametrize("order", ["fragments_sm90", "fragments_sm90_fp8"])
@pytest.mark.parametrize(
    ("name", "op"),
    [("w4a16", "gemm_nvfp4"), ("w4a4", "gemm_nvfp4"), ("grouped", "grouped_gemm_nvfp4"), ("moe", "moe_nvfp4")],
)
def test_an_order_changes_no_number(name: str, op: str, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op, its reference and its compiled form, and opcheck of what it calls, on weights in another order."""
    rows, options = in_order(name, "rows")
    want = getattr(reference, op)(*rows, **options)
    args, _ = in_order(name, order)
    assert any(not torch.equal(x.data, y.data) for x, y in zip(args, rows, strict=True) if hasattr(x, "order"))
    assert torch.equal(getattr(reference, op)(*args, **options), want)
    compiled = torch.compile(lambda: getattr(ops, op)(*args, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), want)
    torch._dynamo.reset()
    seen = []
    monkeypatch.setattr(ops, "_ops", Recorder(seen))
    assert torch.equal(getattr(ops, op)(*args, **options), want)
    assert seen
    for operator, given in seen:
        assert order in given
        torch.library.opcheck(getattr(torch.ops.fp4suite, operator).default, given, test_utils=OPCHECKS)


@pytest.mark.parametrize("order", ["fragments_sm90", "fragments_sm90_fp8"])
def test_ops_that_read_rows_say_so(order: Order) -> None:
    t = reference.quantize_nvfp4(g(64, 64)).with_order(order)
    ids = torch.zeros(64, 1, dtype=torch.int32)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    one = weight(1, 128, 64)
    for call in (
        lambda: ops.dequant_nvfp4(t),
        lambda: ops.gemm_nvfp4(t, weight(48, 64)),
        lambda: ops.grouped_gemm_nvfp4(t, one, offsets),
        lambda: ops.moe_nvfp4(t, one, weight(1, 64, 64), ids, g(64, 1)),
    ):
        with pytest.raises(ValueError, match=f'must be in the order "rows", got "{order}": with_order'):
            call()


@pytest.mark.parametrize("act", ["w4a16", "w4a4"])
@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_gemm_with_a_quantized_result(act: str, sf_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of quantising the FP32 result; opcheck and one graph."""
    a, b = g(5, 64, dtype=torch.bfloat16), weight(48, 64, alpha=2)
    left = reference.quantize_nvfp4(a) if act == "w4a4" else a
    options = {"segments": (16, 32), "out_alpha": torch.tensor(0.01), "out_sf_layout": sf_layout}
    whole = reference.gemm_nvfp4(left, b, segments=(16, 32), out_dtype=torch.float32)
    want = reference.quantize_nvfp4(whole, alpha=options["out_alpha"], sf_layout=sf_layout)
    calls: list[tuple[str, tuple]] = []
    monkeypatch.setattr(ops, "_ops", Recorder(calls))
    assert_same(ops.gemm_nvfp4(left, b, **options), want)
    assert_same(reference.gemm_nvfp4(left, b, **options), want)
    for operator, args in calls:
        torch.library.opcheck(getattr(torch.ops.fp4suite, operator).default, args, test_utils=OPCHECKS)
    monkeypatch.undo()
    compiled = torch.compile(lambda: ops.gemm_nvfp4(left, b, **options), fullgraph=True, backend="aot_eager")
    assert_same(compiled(), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
def test_gemm_in_fp8(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float a is quantised, an FP8RowTensor is one; the reference's numbers, opcheck and one graph."""
    a, b = g(2, 5, 64, dtype=torch.bfloat16), weight(48, 64, alpha=2).prepare_fp8()
    want = reference.gemm_nvfp4(a, b, act="fp8", segments=(16, 32))
    quantized = reference.gemm_nvfp4(a.flatten(0, 1), b, act="fp8", segments=(16, 32), out_alpha=torch.tensor(0.01))
    calls: list[tuple[str, tuple]] = []
    left, act = (ops.quantize_fp8(a), None) if packed else (a, "fp8")
    monkeypatch.setattr(ops, "_ops", Recorder(calls))

    def run() -> torch.Tensor:
        return ops.gemm_nvfp4(left, b, act=act, segments=(16, 32))  # type: ignore[call-overload]

    assert_same(run(), want)
    got = ops.gemm_nvfp4(left, b, act=act, segments=(16, 32), out_alpha=torch.tensor(0.01))  # type: ignore[call-overload]
    assert_same(got.data.flatten(0, 1), quantized.data)
    assert [name for name, _ in calls][-2:] == ["gemm_w4a8", "quantize_nvfp4"]
    for operator, args in calls:
        torch.library.opcheck(getattr(torch.ops.fp4suite, operator).default, args, test_utils=OPCHECKS)
    monkeypatch.undo()
    torch._dynamo.reset()
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(), want)


def test_gemm_in_fp8_refuses_what_it_cannot() -> None:
    a, b = g(5, 64, dtype=torch.bfloat16), weight(48, 64)
    with pytest.raises(ValueError, match=r"needs the row exponents of b: pass what b.prepare_fp8\(\) gives"):
        ops.gemm_nvfp4(a, b, act="fp8")
    with pytest.raises(ValueError, match='act must be "fp8" or None'):
        ops.gemm_nvfp4(a, b, act="fp4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="of float activations, got an NVFP4Tensor"):
        ops.gemm_nvfp4(reference.quantize_nvfp4(a), b, act="fp8")
    with pytest.raises(ValueError, match="n in multiples of 16, got 40"):
        ops.gemm_nvfp4(a, weight(40, 64).prepare_fp8(), act="fp8", out_alpha=torch.tensor(0.01))
    with pytest.raises(ValueError, match=r"k a multiple of 64, got \[5, 96\]"):
        ops.gemm_nvfp4(g(5, 96), weight(48, 96).prepare_fp8(), act="fp8")


@pytest.mark.parametrize("order", ["rows", "fragments_sm90", "fragments_sm90_fp8"])
def test_gemm_in_fp8_in_every_order(order: Order) -> None:
    a, b = g(5, 128, dtype=torch.bfloat16), weight(64, 128)
    want = reference.gemm_nvfp4(a, b.prepare_fp8(), act="fp8")
    for laid_out in (b.with_order(order).prepare_fp8(), b.prepare_fp8().with_order(order)):
        assert_same(ops.gemm_nvfp4(a, laid_out, act="fp8"), want)


def test_kernels_of_bf16_and_of_fp8_refuse_each_others_orders() -> None:
    """What a GPU would run is asked, not the CPU's reference."""
    a, b = GemmProblem(m=64, n=256, k=512), GemmProblem(m=64, n=256, k=512, act="fp8")
    with dispatch.on_target("sm_90a"):
        assert dispatch.weight_layout(256, 512, "cpu").order == "fragments_sm90"
        assert dispatch.weight_layout(256, 512, "cpu", act="fp8").order == "fragments_sm90_fp8"
        for p, order in ((a, "fragments_sm90_fp8"), (b, "fragments_sm90")):
            with pytest.raises(UnsupportedError, match=f"weights in the order {order}"):
                dispatch.choose("gemm_nvfp4", replace(p, order=order), "cpu")


def test_gemm_refuses_a_quantized_result_that_cannot_be() -> None:
    a, alpha = g(5, 64, dtype=torch.bfloat16), torch.tensor(0.01)
    with pytest.raises(ValueError, match="n in multiples of 16, got 40"):
        ops.gemm_nvfp4(a, weight(40, 64), out_alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha must be one number \[\], got \[2\]"):
        ops.gemm_nvfp4(a, weight(48, 64), out_alpha=alpha.expand(2))


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    assert ops.gemm_nvfp4(x, weight(48, 64)).shape == (*shape[:-1], 48)
    assert ops.quantize_nvfp4(x, alpha=torch.ones(())).shape == shape
    assert ops.swiglu(x, 10.0).shape == (*shape[:-1], 32)


def test_an_embedding_of_no_tokens() -> None:
    assert ops.embed(torch.zeros(0, dtype=torch.int64), g(9, 64), streams=4).shape == (0, 4, 64)


def test_numbers_that_are_not_finite() -> None:
    """NaN stays, a gate of -inf is NaN, all else is clamped; a token of no row is NaN, its neighbours are not."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1], [1, nan], [-inf, 1], [inf, 1], [1, inf], [1, -inf], [-3e38, 1]])
    clamped = ops.swiglu(torch.tensor([[10.0, 1], [1, 10], [1, -10]]), 10.0, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.swiglu(x, 10.0, dtype)
        assert got[:3].isnan().all()
        assert torch.equal(got[3:6], clamped.to(dtype))
        assert got[6] == 0
    weight = torch.tensor([[1.0, inf], [nan, -inf]], dtype=torch.bfloat16)
    ids = torch.tensor([0, 1, -1, 2, 2**40, -(2**63)])
    rows = ops.embed(ids, weight)[:, 0]
    assert torch.equal(rows[:2].view(torch.int16), weight.view(torch.int16))
    assert rows[2:].isnan().all()
    assert torch.equal(ops.embed(ids[:4].int(), weight).isnan(), rows[:4, None].isnan())
