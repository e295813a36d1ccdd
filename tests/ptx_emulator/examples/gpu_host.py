"""Host code that was written for a GPU, run as it stands: its tensors are made on the CPU, and what it asks of
`torch.cuda` has the answers of a device with nothing else to do.

Functions that it compiles for TVM FFI are compiled without, so that the package is not needed: the tensors of a call
are matched here with the fake ones that the function was compiled with.
"""

import ctypes
import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cuda.bindings import driver
from torch.overrides import TorchFunctionMode

from ptx_emulator import active

from .harness import Prepared
from .operands import FORMATS

_TVM_FFI = "--enable-tvm-ffi"
_PROPERTIES = SimpleNamespace(name="emulated", major=10, minor=0, multi_processor_count=148, L2_cache_size=126 << 20)


class _OnCpu(TorchFunctionMode):
    """Every tensor for a GPU is made on the CPU, where a GPU's allocator could have put it; a copy from one to the
    other is a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
            return _aligned(args[0].clone())
        fresh = name in _FRESH or any(map(_is_gpu, kwargs.values()))
        if name == "to" and any(_is_gpu(x) for x in (*args[1:], *kwargs.values())):
            args, fresh = [args[0].clone(), *(_CPU if _is_gpu(x) else x for x in args[1:])], True
        kwargs = {key: _CPU if _is_gpu(x) else x for key, x in kwargs.items() if key != "pin_memory"}
        made = func(*args, **kwargs)
        return _aligned(made) if fresh and isinstance(made, torch.Tensor) else made


_CPU = torch.device("cpu")
_ALIGNMENT = 512  # of cudaMalloc and of torch's allocator
_FRESH = {"clone", "contiguous"} | {f"{x}_like" for x in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it in memory that starts where a GPU's would and ends with its last byte."""
    old = x.untyped_storage()
    if old.data_ptr() % _ALIGNMENT == 0:
        return x
    raw = np.empty(old.nbytes() + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    new = torch.from_numpy(raw[start : start + old.nbytes()]).untyped_storage()
    new.copy_(old)
    return torch.empty(0, dtype=x.dtype).set_(new, x.storage_offset(), x.shape, x.stride())


def _is_gpu(x: Any) -> bool:
    return (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")


class _Bound:
    """A compiled function that takes torch tensors where it was compiled with fake ones."""

    def __init__(self, function: Any, compiled_with: dict[str, Any]):
        self.function = function
        self.slots = [compiled_with.get(name) for name in function.execution_args.signature.parameters]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __call__(self, *args: Any) -> Any:
        given = iter(args)
        arguments = [driver.CUstream(0) if _of_environment(slot) else _bind(slot, next(given)) for slot in self.slots]
        if (more := next(given, None)) is not None:
            raise TypeError(f"an argument too many: {more!r}")
        return self.function(*arguments)


def _stream(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(cuda_stream=0, synchronize=lambda: None)


def _of_environment(slot: Any) -> bool:
    return bool(getattr(slot, "use_tvm_ffi_env_stream", False))


def _bind(slot: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and hasattr(slot, "_typed_tensor"):
        return _Descriptor(slot, value)
    if isinstance(value, (tuple, list)) and isinstance(slot, (tuple, list)):
        return type(value)(_bind(s, v) for s, v in zip(slot, value, strict=True))
    return value


class _Descriptor:
    """What compiled host code takes for a tensor: its address, then the sizes and the strides that were symbolic.

    Raises ValueError for a tensor that is not as the fake one said.
    """

    def __init__(self, fake: Any, tensor: torch.Tensor):
        self.tensor = tensor  # kept alive
        if tensor.element_size() * 8 != fake.element_type.width and fake.element_type.width >= 8:
            raise ValueError(f"a tensor of {tensor.dtype} for one of {fake.element_type}")
        if tensor.data_ptr() % fake._assumed_align:
            raise ValueError(f"address {tensor.data_ptr():#x} is not a multiple of {fake._assumed_align}")
        parts = [
            _dynamic(s, v, what)
            for what, wanted, found in (
                ("shape", fake.shape, tensor.shape),
                ("stride", fake.stride, tensor.stride()),
            )
            for s, v in zip(wanted, found, strict=True)
        ]
        fields = [("address", ctypes.c_void_p)]
        fields += [(f"f{n}", kind) for n, part in enumerate(parts) if part for kind, _ in [part]]
        layout = type("Layout", (ctypes.Structure,), {"_fields_": fields})
        self.memory = layout(tensor.data_ptr(), *(part[1] for part in parts if part))

    def __c_pointers__(self) -> list[int]:
        return [ctypes.addressof(self.memory)]


def _dynamic(wanted: Any, found: int, what: str) -> tuple[Any, int] | None:
    if isinstance(wanted, int):
        if wanted != found and not (what == "stride" and wanted == 0):
            raise ValueError(f"{what} {found} where the function was compiled for {wanted}")
        return None
    if found % wanted.divisibility:
        raise ValueError(f"{what} {found} is not a multiple of {wanted.divisibility}")
    return (ctypes.c_int64 if wanted.width == 64 else ctypes.c_int32), found


def _compile(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compile(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("options")
        if not isinstance(options, str) or _TVM_FFI not in options:
            return original(self, function, *args, **kwargs)
        compiled = original(self, function, *args, **{**kwargs, "options": options.replace(_TVM_FFI, "")})
        named = {name: x for name, x in kwargs.items() if name != "options"}
        signature = compiled.execution_args.original_signature
        return _Bound(compiled, dict(signature.bind(*args, **named).arguments))

    return compile


@contextmanager
def gpu_host() -> Iterator[None]:
    """Inside, host code written for a GPU runs on CPU tensors."""
    from cutlass.base_dsl.compiler import CompileCallable
    from cutlass.base_dsl.runtime import cuda
    from cutlass.cute import testing
    from cutlass.cute.runtime import _Tensor

    made = _Tensor.__init__

    def without_ffi(self: Any, *args: Any, enable_tvm_ffi: bool = False, **kwargs: Any) -> None:
        made(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_OnCpu())
        stack.enter_context(patch.object(CompileCallable, "_compile", _compile(CompileCallable._compile)))
        stack.enter_context(patch.object(testing, "benchmark", lambda *_, **__: 0.0))
        stack.enter_context(patch.object(_Tensor, "__init__", without_ffi))
        stack.enter_context(patch.object(cuda, "initialize_cuda_context", lambda *_, **__: None))
        stack.enter_context(
            patch.multiple(
                torch.cuda,
                is_available=lambda: True,
                synchronize=lambda *_: None,
                device_count=lambda: 1,
                current_device=lambda: 0,
                current_stream=_stream,
                default_stream=_stream,
                Stream=_stream,
                stream=lambda _: nullcontext(),
                get_device_capability=lambda *_: (10, 0),
                get_device_properties=lambda *_: _PROPERTIES,
                empty_cache=lambda: None,
            )
        )
        yield


def as_it_stands(module: ModuleType, gen: torch.Generator, call: str = "verify", **arguments: Any) -> Prepared:
    """The example's own function: its data, its reference and its comparison, which raises or says False or FAIL."""

    def run() -> None:
        torch.manual_seed(int(torch.randint(1 << 30, (), generator=gen)))
        with gpu_host(), redirect_stdout(io.StringIO()) as said:
            verdict = getattr(module, call)(**{key: _named(value) for key, value in arguments.items()})
        device = active()
        assert device is not None
        if not device.launches:
            raise AssertionError("no kernel was launched")
        if verdict is False or re.search(r"\bFAIL|\bERROR", said.getvalue()):
            raise AssertionError(said.getvalue())

    return Prepared(run, (), ())


def _named(value: Any) -> Any:
    """A type of CUTLASS by its name in `operands`."""
    return FORMATS[value].type if isinstance(value, str) and value in FORMATS else value
