"""Ops on a GPU: those with kernels give the reference's numbers under opcheck, torch.compile and CUDA graphs."""

import contextlib

import pytest
import torch

from fp4suite import (
    IndexCache,
    NVFP4Tensor,
    PagedCache,
    UnsupportedError,
    WeightLayout,
    arch,
    ops,
    override,
    reference,
    registry,
    warmup,
    weight_layout,
)
from fp4suite.dispatch import recording, reread_tables
from fp4suite.formats import BLOCK
from fp4suite.problem import GemmProblem, QuantizeProblem
from fp4suite.reference import CompressorStep
from fp4suite.testing import assert_gemm_close, random_activations, random_nvfp4

from .op_arguments import OPCHECKS, PUBLIC, arguments, assert_same, flat, moved

pytestmark = pytest.mark.gpu

WITH_KERNEL = sorted({k.op for k in registry.KERNELS})
QUANTISING = ["quantize_nvfp4", "rmsnorm_quantize", "swiglu_quantize"]


def _input(name: str, device: torch.device, seed: int, m: int = 37, k: int = 512) -> torch.Tensor:
    gen = torch.Generator(device=device).manual_seed(seed)
    return random_activations((m, 2 * k if name == "swiglu_quantize" else k), gen)


def _call(name: str, x: torch.Tensor, **more: object) -> NVFP4Tensor:
    if name == "rmsnorm_quantize":
        weight = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device).bfloat16()
        return getattr(ops, name)(x, weight, 1e-6, **more)
    return getattr(ops, name)(x, **more)


@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
@pytest.mark.parametrize("rule", ["absmax", "mse", "modelopt_weight"])
@pytest.mark.parametrize("name", QUANTISING)
def test_quantising_ops_give_the_cpus_bytes(name: str, rule: str, sf_layout: str, device: torch.device) -> None:
    x = _input(name, device, seed=1)
    want = _call(name, x.cpu(), rule=rule, sf_layout=sf_layout)
    assert_same(_call(name, x, rule=rule, sf_layout=sf_layout).to("cpu"), want)  # alpha from the data too


@pytest.mark.parametrize("name", QUANTISING)
def test_strided_and_batched_inputs(name: str, device: torch.device) -> None:
    x = _input(name, device, seed=2, m=24)
    columns = torch.cat((x, x), dim=1)[:, : x.shape[1]]  # rows twice as far apart
    assert_same(_call(name, columns), _call(name, x))
    alpha = torch.tensor(0.02, device=device)
    batched = _call(name, x.view(2, 12, -1), alpha=alpha)
    assert_same(batched.to("cpu"), _call(name, x.view(2, 12, -1).cpu(), alpha=alpha.cpu()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequant_gives_the_cpus_bytes(dtype: torch.dtype, device: torch.device) -> None:
    gen = torch.Generator(device=device).manual_seed(3)
    t = random_nvfp4(70, 1024, gen, adversarial=True)
    assert_same(ops.dequant_nvfp4(t, dtype).cpu(), reference.dequant_nvfp4(t.to("cpu"), dtype))


def _gemm_operands(act: str, device: torch.device, m: int, seed: int = 4) -> tuple:
    gen = torch.Generator(device=device).manual_seed(seed)
    alpha = torch.tensor([0.5, 3.0], device=device)
    b = random_nvfp4(192, 512, gen, alpha=alpha, adversarial=True)
    a = random_activations((m, 512), gen) if act == "bf16" else random_nvfp4(m, 512, gen, adversarial=True)
    return a, b, (64, 128), alpha.double().repeat_interleave(torch.tensor([64, 128], device=device))


def _decoded(t: torch.Tensor | NVFP4Tensor) -> torch.Tensor:
    if not isinstance(t, NVFP4Tensor):
        return t.double()
    one = NVFP4Tensor(t.data, t.sf, torch.ones((), device=t.device))
    return reference.dequant_nvfp4(one, torch.float64) * (t.alpha.double() if t.alpha.ndim == 0 else 1.0)


@pytest.mark.parametrize("shape", [(320, 1024), (3, 128, 192)])
@pytest.mark.parametrize("layout", [WeightLayout("fragments_sm90"), WeightLayout(sf_layout="blocked_128x4")])
def test_layouts_give_the_cpus_bytes(layout: WeightLayout, shape: tuple[int, ...], device: torch.device) -> None:
    gen = torch.Generator(device=device).manual_seed(7)
    rows = random_nvfp4(torch.Size(shape[:-1]).numel(), shape[-1], gen, adversarial=True)
    t = NVFP4Tensor(rows.data.view(*shape[:-1], -1), rows.sf.view(*shape[:-1], -1), rows.alpha)
    before = NVFP4Tensor(t.data.cpu().clone(), t.sf.cpu().clone(), t.alpha.cpu())
    made = t.lay_out_(layout)
    assert made.data.data_ptr() == t.data.data_ptr()
    assert_same(made.to("cpu"), before.with_order(layout.order).with_sf_layout(layout.sf_layout))
    assert_same(made.lay_out_(WeightLayout()).to("cpu"), before)


@pytest.mark.parametrize("m", [0, 1, 37])
@pytest.mark.parametrize("act", ["bf16", "nvfp4"])
@pytest.mark.parametrize("laid_out", [False, True])
def test_gemm(laid_out: bool, act: str, m: int, device: torch.device) -> None:
    a, b, segments, alpha = _gemm_operands(act, device, m)
    exact = _decoded(b)
    if laid_out:
        b = b.lay_out_(weight_layout(*b.shape, device, act=act, segments=2))
        assert arch.current() != "sm_90a" or b.order == "fragments_sm90"
    if arch.current() == "sm_100a" and act == "bf16":
        with pytest.raises(UnsupportedError, match="quantise the activations"):
            ops.gemm_nvfp4(a, b, segments=segments)
        return
    for dtype in (torch.bfloat16, torch.float32):
        got = ops.gemm_nvfp4(a, b, segments=segments, out_dtype=dtype)
        assert_gemm_close(got, _decoded(a), exact, alpha)


@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_gemm_with_a_quantized_result_has_the_bytes_of_quantizing_fp32(sf_layout: str, device: torch.device) -> None:
    alpha = torch.tensor(0.05, device=device)
    for act in ("nvfp4",) if arch.of(device) == "sm_100a" else ("nvfp4", "bf16"):
        a, b, segments, _ = _gemm_operands(act, device, 37)
        whole = ops.gemm_nvfp4(a, b, segments=segments, out_dtype=torch.float32)
        want = ops.quantize_nvfp4(whole, alpha=alpha, sf_layout=sf_layout)
        got = ops.gemm_nvfp4(a, b, segments=segments, out_alpha=alpha, out_sf_layout=sf_layout)
        assert_same(got, want)


def test_gemm_of_transposed_and_batched_activations(device: torch.device) -> None:
    act = "nvfp4" if arch.current() == "sm_100a" else "bf16"
    a, b, segments, _ = _gemm_operands(act, device, 24)
    want = ops.gemm_nvfp4(a, b, segments=segments)
    if act == "bf16":
        assert torch.equal(ops.gemm_nvfp4(a.T.contiguous().T, b, segments=segments), want)
        assert torch.equal(ops.gemm_nvfp4(a.view(2, 12, -1), b, segments=segments), want.view(2, 12, -1))
    assert torch.equal(ops.gemm_nvfp4(a, b.with_sf_layout("blocked_128x4"), segments=segments), want)


def _kernel_calls(device: torch.device) -> dict:
    """A call of each op that has a kernel, on tensors that the caller can overwrite between replays."""
    calls = {name: (lambda x, name=name: flat(_call(name, x)), _input(name, device, 5)) for name in QUANTISING}
    t = random_nvfp4(37, 512, torch.Generator(device=device).manual_seed(6))
    calls["dequant_nvfp4"] = (
        lambda x: [ops.dequant_nvfp4(NVFP4Tensor(x, t.sf, t.alpha), torch.float32)],
        t.data,
    )
    act = "nvfp4" if arch.current() == "sm_100a" else "bf16"
    a, b, segments, _ = _gemm_operands(act, device, 37)
    if act == "bf16":
        calls["gemm_nvfp4"] = (lambda x: [ops.gemm_nvfp4(x, b, segments=segments)], a)
    else:
        calls["gemm_nvfp4"] = (
            lambda x: [ops.gemm_nvfp4(NVFP4Tensor(x, a.sf, a.alpha), b, segments=segments)],
            a.data,
        )
    return calls | {name: _small_call(name, device) for name in WITH_KERNEL if name not in calls}


def _small_call(name: str, device: torch.device) -> tuple:
    """A call with the arguments of the tests on CPU, and their first tensor; it gives caches that it changes too.

    An op that works in place is given a copy of the tensor.
    """
    args, kwargs = moved(arguments(name), device)
    first = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    caches = [a for a in args if isinstance(a, PagedCache | IndexCache | CompressorStep)]

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        own = x.clone() if name.endswith("_") else x
        return flat((getattr(ops, name)(*args[:first], own, *args[first + 1 :], **kwargs), caches))

    return call, args[first]


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_cuda_graph_replays_on_new_inputs(name: str, device: torch.device) -> None:
    call, x = _kernel_calls(device)[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x)
    for turn in range(3):
        x.copy_(torch.roll(x, turn + 1, dims=0))
        graph.replay()
        torch.cuda.synchronize()
        assert_same([t.clone() for t in out], call(x.clone()))


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_compiles_as_one_graph(name: str, device: torch.device) -> None:
    call, x = _kernel_calls(device)[name]
    compiled = torch.compile(call, fullgraph=True)
    assert_same(compiled(x), call(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_opcheck(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Spy:
        def __getattr__(self, operator: str):
            def call(*args):
                calls.append((operator, args))
                return getattr(torch.ops.fp4suite, operator)(*args)

            return call

    call, x = _kernel_calls(device)[name]
    monkeypatch.setattr(ops, "_ops", Spy())
    call(x)
    assert calls
    for operator, args in calls:
        torch.library.opcheck(getattr(torch.ops.fp4suite, operator).default, args, test_utils=OPCHECKS)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch):
    """A registry without rows: what an op without a kernel does stays to be tested when all have one."""
    monkeypatch.setattr(registry, "KERNELS", [])
    reread_tables()
    yield
    monkeypatch.undo()
    reread_tables()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in (*WITH_KERNEL, "csa_queries_fp8", "index_query_fp8")])
def test_ops_without_a_kernel_refuse_and_run_the_reference_when_asked(name: str, device: torch.device) -> None:
    args, kwargs = arguments(name)
    with recording() as choices:
        want = getattr(ops, name)(*args, **kwargs)
    on_gpu, more = moved(arguments(name), device)
    with pytest.raises(UnsupportedError, match=f"{choices[0].op} .*no GPU kernel exists yet"):
        getattr(ops, name)(*on_gpu, **more)
    with contextlib.ExitStack() as asked:
        for choice in choices:
            asked.enter_context(override(op=choice.op, kernel="reference"))
        got = getattr(ops, name)(*on_gpu, **more)
    for found, expected in zip(flat((got, on_gpu, more)), flat((want, args, kwargs)), strict=True):
        if expected.dtype == torch.uint8:  # packed numbers may round apart where the GPU sums in another order
            assert (found.cpu() != expected).float().mean() < 0.02
        else:
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_warmup_compiles_what_dispatch_would_choose(device: torch.device) -> None:
    act = "nvfp4" if arch.current() == "sm_100a" else "bf16"
    problems = [GemmProblem(m=8, n=256, k=512, act=act), QuantizeProblem(m=8, k=16 * BLOCK)]
    assert [c.op for c in warmup(problems, device)] == ["gemm_nvfp4", "quantize_nvfp4"]


def test_float_activations_of_another_type_are_refused(device: torch.device) -> None:
    _, b, segments, _ = _gemm_operands("bf16", device, 1)
    with pytest.raises(UnsupportedError, match=r"activations in fp16|quantise the activations"):
        ops.gemm_nvfp4(torch.zeros(3, 512, dtype=torch.float16, device=device), b, segments=segments)
