"""Triton's interpreter without work that it repeats: the same results, sooner.

Half of its time went into objects that say what others said: every operation makes block types and shapes anew. And
every call of a device function puts the interpreter's functions into triton.language, which took most of small tests.
"""

import functools
from types import SimpleNamespace
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


def install() -> None:
    """For the rest of this process, in which Triton interprets."""
    _replace_functions_once()
    _make_block_types_once()
    _make_shapes_once()
    _broadcast_what_differs()
    _convert_what_differs()
    _skip_checks_that_nobody_sees()
    _look_up_numpy_types()
    _compare_names()


def _replace_functions_once() -> None:
    """The interpreter's functions stay in triton.language."""
    replace, replaced = interpreter._patch_lang, set()

    @functools.cache
    def replace_once(function: Any) -> SimpleNamespace:
        seen = {x for x in (tl, tl.core) if any(x is found for found in function.__globals__.values())}
        if not seen <= replaced:
            replace(function)  # what it returns would put the compiler's functions back
            replaced.update(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once


def _make_block_types_once() -> None:
    """They are compared by what they hold, and nobody writes to one."""
    block, fill, made = tl.core.block_type, tl.core.block_type.__init__, {}

    def find(cls: type, element_ty: Any, shape: Any) -> Any:
        sizes = [x.value if isinstance(x, tl.constexpr) else x for x in shape]
        key = (element_ty.name, getattr(element_ty, "address_space", 0), *sizes)
        found = made.get(key)
        if found is None:
            found = object.__new__(cls)
            fill(found, element_ty, shape)  # raises for what is no shape
            made[key] = found
        return found

    block.__new__ = find
    block.__init__ = lambda self, element_ty, shape: None


def _make_shapes_once() -> None:
    """A tensor's shape and number of elements, as constants, are its type's."""
    tensor, fill = tl.core.tensor, tl.core.tensor.__init__
    shapes: dict[Any, tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        found = shapes.get(sizes)
        if found is None:
            fill(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found

    tensor.__init__ = init


def _broadcast_what_differs() -> None:
    """Blocks of one shape stay as they are; a number is spread over the other's shape without asking for its types."""
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def spread(self: Any, number: Any, block: Any) -> Any:
        kind = block.type.with_element_ty(number.dtype)
        return self.tensor(self.builder.create_splat(kind, number.handle), kind)

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type.is_block(), rhs.type.is_block()
        if left and right and lhs.shape is not rhs.shape:
            return broadcast(self, lhs, rhs)
        if left != right:
            return (lhs, spread(self, rhs, lhs)) if left else (spread(self, lhs, rhs), rhs)
        return lhs, rhs

    semantic.broadcast_impl_value = broadcast_others


def _convert_what_differs() -> None:
    """Two tensors of one type are operands as they are; pointers and divisions have rules of their own."""
    semantic = type(interpreter.interpreter_semantic)
    check = semantic.binary_op_type_checking_impl

    def check_others(
        self: Any, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False, arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        alike = type(lhs) is type(rhs) is tl.core.tensor and lhs.type is rhs.type
        if alike and not div_or_mod and not lhs.dtype.is_ptr():
            return lhs, rhs
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)

    semantic.binary_op_type_checking_impl = check_others


def _skip_checks_that_nobody_sees() -> None:
    """A third of its time: whether sums and products of integers overflow, which it says only where it debugs."""
    semantic = type(interpreter.interpreter_semantic)
    check = semantic.binary_op_sanitize_overflow_impl

    def check_aloud(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, operation)

    semantic.binary_op_sanitize_overflow_impl = check_aloud


def _look_up_numpy_types() -> None:
    """The interpreter makes the table of them at each question."""
    known, of = {}, interpreter._get_np_dtype

    def get(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = of(dtype)
        return known[name]

    interpreter._get_np_dtype = get


def _compare_names() -> None:
    """Of two types of elements, without asking whether one is a constant that holds a type."""
    dtype, equal = tl.core.dtype, tl.core.dtype.__eq__
    dtype.__eq__ = lambda self, other: self.name == other.name if type(other) is dtype else equal(self, other)
