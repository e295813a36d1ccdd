"""State space duality (Mamba 2) of sm_100a: a recurrence over chunks of 128 steps, with GEMMs inside of each.

    y[t] = C[t] S[t] + D x[t],  S[t] = exp(delta[t] a) S[t - 1] + delta[t] x[t] B[t]

S is [head size, state size], B and C belong to a group of heads. The reference is FP64 and goes step by step in chunks.
"""

from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from torch import Tensor

from .attention import Near, rounded
from .harness import Case, Prepared
from .operands import FORMATS

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once
CHUNK, HEAD, STATE = 128, 64, 128


def _scan(x: Tensor, sums: Tensor, delta: Tensor, b: Tensor, c: Tensor, digits: int) -> tuple[Tensor, ...]:
    """One head: x [chunks, CHUNK, HEAD]; sums of delta a over the steps of a chunk, and delta, [chunks, CHUNK]; b and c
    [chunks, CHUNK, STATE] -> y, S, and what rounding can change in each: the kernel rounds the matrices it multiplies.
    """
    unit = 2.0**-digits + 2.0**-16  # and approximate exponentials
    state, size = torch.zeros(2, x.shape[2], b.shape[2], dtype=torch.float64)
    ys, errors = [], []
    for x_c, sum_c, delta_c, b_c, c_c in zip(x, sums, delta, b, c, strict=True):
        decay = (sum_c[:, None] - sum_c[None]).tril().exp().tril() * delta_c
        inner = (c_c @ b_c.T) * decay
        inner_size = (c_c.abs() @ b_c.abs().T) * decay
        carried = sum_c.exp()[:, None]
        ys.append(inner @ x_c + carried * (c_c @ state.T))
        # the state has an error of a unit of its size, and is rounded once more to be multiplied
        errors.append(inner_size @ x_c.abs() * unit + carried * (c_c.abs() @ size.T) * 2 * unit)
        left = ((sum_c[-1] - sum_c).exp() * delta_c)[:, None] * b_c
        state = sum_c[-1].exp() * state + x_c.T @ left
        size = sum_c[-1].exp() * size + x_c.abs().T @ left.abs()
    return torch.stack(ys), state, torch.stack(errors), size * unit


def _tensor(t: Tensor, order: tuple[int, ...], dynamic: tuple[int, ...]) -> Any:
    """A contiguous tensor with its axes in another order, as a CuTe tensor."""
    view = t.permute(order)
    made = from_dlpack(view, assumed_align=16)
    for mode in dynamic:
        made = made.mark_compact_shape_dynamic(mode=mode, stride_order=view.dim_order())
    return made


def ssd(
    module: ModuleType,
    gen: torch.Generator,
    batch: int,
    heads: int,
    groups: int,
    chunks: int,
    skip: str = "vector",
    io: str = "bf16",
    sums: str = "fp32",
) -> Prepared:
    """skip: whether D is a "vector" or a "scalar" of each head, or "none". sums: type of the sums of delta a."""
    f, torch_io = FORMATS[io], FORMATS[io].dtype
    assert torch_io is not None

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=gen) / 2).to(torch_io)

    x, y = random(batch, heads, HEAD, chunks, CHUNK), torch.zeros(batch, heads, HEAD, chunks, CHUNK, dtype=torch_io)
    b, c = (random(batch, groups, STATE, chunks, CHUNK) for _ in range(2))
    state = torch.zeros(batch, heads, HEAD, STATE, dtype=torch_io)
    delta = torch.nn.functional.softplus(random(batch, heads, chunks, CHUNK).float() - 4).to(torch_io)
    a = -random(heads).float().exp()
    total = (delta.float() * a[:, None, None]).cumsum(-1).to(FORMATS[sums].dtype)
    d = None if skip == "none" else random(heads, HEAD if skip == "vector" else 1)

    arguments = [
        _tensor(x, (2, 4, 3, 1, 0), (2, 3, 4)),
        *(_tensor(t, (3, 2, 1, 0), (1, 2, 3)) for t in (total, delta)),
        *(_tensor(t, (4, 2, 3, 1, 0), (2, 3, 4)) for t in (b, c, y)),
        _tensor(state, (2, 3, 1, 0), (2, 3)),
        None if d is None else _tensor(d, (1, 0), (1,)),
    ]
    types = (FORMATS[n].type for n in (io, sums, "fp32"))
    kernel = module.SSDKernel(*types, CHUNK, HEAD, STATE, d is not None, skip == "vector")
    compiled = cute.compile(kernel, *arguments, FEW, STREAM)
    outputs = []
    for n in range(batch):
        for h in range(heads):
            g = h * groups // heads
            wide = x[n, h].double().permute(1, 2, 0)
            want, last, error, last_error = _scan(
                wide,
                *(t[n, h].double() for t in (total, delta)),
                *(t[n, g].double().permute(1, 2, 0) for t in (b, c)),
                f.digits,
            )
            want = want if d is None else want + wide * d[h].double()
            near = (t.permute(2, 0, 1) for t in (want, rounded(error, want, f)))
            outputs.append(Near(f"y[{n}, {h}]", y[n, h], *near))
            outputs.append(Near(f"state[{n}, {h}]", state[n, h], last, rounded(last_error, last, f)))
    return Prepared(lambda: compiled(*arguments, STREAM), outputs, (x, total, delta, b, c, d))


CASES = [
    Case("cute.blackwell.kernel.attention.mamba2_ssd.mamba2_ssd", ssd, config)
    for config in (
        {"batch": 1, "heads": 2, "groups": 1, "chunks": 3},
        {"batch": 2, "heads": 2, "groups": 2, "chunks": 1, "skip": "scalar"},
        {"batch": 1, "heads": 4, "groups": 2, "chunks": 2, "skip": "none", "io": "fp16"},
    )
]
