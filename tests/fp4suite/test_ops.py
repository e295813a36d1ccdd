"""Every op: the reference's numbers, opcheck, a whole-graph torch.compile, and refusals by their message."""

import inspect

import pytest
import torch

from fp4suite import UnsupportedError, ops, override, reference
from fp4suite.dispatch import on_target

from .op_arguments import OPCHECKS, PUBLIC, arguments, assert_same, g, weight


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
    calls = []

    class Spy:
        def __getattr__(self, operator: str):
            def call(*args):
                calls.append((operator, args))
                return getattr(torch.ops.fp4suite, operator)(*args)

            return call

    monkeypatch.setattr(ops, "_ops", Spy())
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
    with pytest.raises(ValueError, match="offsets must be int32"):
        ops.grouped_gemm_nvfp4(g(7, 64), weight(3, 16, 64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs w2 \[4, 64, 32\]"):
        ops.moe_nvfp4(g(5, 64), weight(4, 64, 64), weight(4, 64, 64), torch.zeros(5, 2, dtype=torch.int32), g(5, 2))


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    assert ops.gemm_nvfp4(x, weight(48, 64)).shape == (*shape[:-1], 48)
    assert ops.quantize_nvfp4(x, alpha=torch.ones(())).shape == shape
