"""Dense GEMM of sm_100a whose epilogue is a Python function: it loads and stores any number of further tensors."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from .harness import Case, Prepared
from .operands import FORMATS, Expected, Matrix, empty, expected, matrix, product

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once


class _Gemm:
    """A, B and their exact product; `compiled` takes the epilogue's arguments in its order."""

    def __init__(self, mnkl: tuple[int, int, int, int], ab: str, majors: str, gen: torch.Generator):
        self.m, self.n, self.k, self.batch = mnkl
        self.majors, self.gen = majors, gen
        self.a = matrix(ab, self.batch, self.m, self.k, gen, "k" if majors[0] == "k" else "mn")
        self.b = matrix(ab, self.batch, self.n, self.k, gen, "k" if majors[1] == "k" else "mn")
        self.product, self.bound = product(self.a.values, self.b.values)
        self.outputs: list[Expected] = []
        self.inputs: list[Matrix] = [self.a, self.b]

    def read(self, kind: str) -> Matrix:
        """A tensor of D's shape that the epilogue loads, which must still be the same afterwards."""
        x = matrix(kind, self.batch, self.m, self.n, self.gen, "k" if self.majors[2] == "n" else "mn")
        self.inputs.append(x)
        return x

    def written(self, kind: str) -> Matrix:
        return empty(kind, self.batch, self.m, self.n, self.majors[2])

    def expect(self, out: Matrix, name: str, want: Tensor, slope: float, more: Tensor | float = 0.0) -> None:
        """slope: how far an error of the product carries. more: magnitudes of what is added to it."""
        steps = self.k // 8 + 8
        self.outputs.append(expected(out, want, slope * self.bound + more + want.abs() / steps, name, steps))

    def prepared(self, gemm: Any, arguments: tuple[Any, ...], options: dict[str, str]) -> Prepared:
        tensors = [x.tensor() if isinstance(x, Matrix) else x for x in (self.a, self.b, *arguments)]
        a, b, *rest = tensors
        gemm.check_implementable(a, b, next(x for x in rest if not isinstance(x, float)))
        compiled = gemm.compile(a, b, FEW, STREAM, *rest, **options)
        return Prepared(lambda: compiled(a, b, STREAM, *rest), self.outputs, self.inputs)


def custom(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    ab: str = "fp16",
    kinds: tuple[str, str, str, str] = ("fp16", "fp16", "fp16", "fp16"),
    majors: str = "kkn",
    checks: bool = False,
) -> Prepared:
    """Y = A B, D = relu(alpha A B + beta C) + factor X. kinds: of C, D, X, Y. checks: compiled with assertions."""
    alpha, beta, factor = 2.0, -1.5, 3.0
    fp32, g = FORMATS["fp32"].type, _Gemm(mnkl, ab, majors, gen)
    c, d, x, y = g.read(kinds[0]), g.written(kinds[1]), g.read(kinds[2]), g.written(kinds[3])

    def epilogue(efc_config, C, D, alpha, beta, X, factor, Y):  # type: ignore[no-untyped-def]
        Y.store(efc_config.accum())
        D.store(efc_config.relu(efc_config.accum() * alpha + C.load() * beta) + X.load() * factor)

    gemm = module.DenseGemmAlphaBeta(fp32, fp32, two, tile, cluster, epilogue)
    g.expect(y, "y", g.product, 1.0)
    inner = alpha * g.product + beta * c.values
    more = abs(beta) * c.values.abs() + factor * x.values.abs()
    g.expect(d, "d", inner.relu() + factor * x.values, alpha, more)
    options = {"options": "--opt-level=3 --enable-assertions --generate-line-info"} if checks else {}
    return g.prepared(gemm, (c, d, alpha, beta, x, factor, y), options)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.125 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def activation(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    name: str,
    ab: str = "fp16",
    kinds: tuple[str, str, str] = ("fp16", "fp16", "fp16"),
    majors: str = "kkn",
) -> Prepared:
    """Aux = alpha scale_a scale_b A B + beta scale_c C + bias, D = f(Aux). kinds: of C, Aux, D."""
    alpha, beta, bias, scale_a, scale_b, scale_c = 0.125, 0.75, 0.25, 1.5, 0.5, -1.0
    fp32, g = FORMATS["fp32"].type, _Gemm(mnkl, ab, majors, gen)
    c, aux, d = g.read(kinds[0]), g.written(kinds[1]), g.written(kinds[2])
    epilogue = module.create_epilogue_function(name)
    gemm = module.DenseGemmActivation(fp32, fp32, two, tile, cluster, epilogue, name)
    slope, other = alpha * scale_a * scale_b, beta * scale_c * c.values + bias
    inner = slope * g.product + other
    g.expect(aux, "aux", inner, slope, other.abs())
    # none is steeper than 1.13 (gelu)
    g.expect(d, "d", _ACTIVATIONS[name](inner), 1.13 * slope, other.abs() + 1)
    arguments = c, aux, alpha, beta, bias, scale_a, scale_b, scale_c, d, 0.125
    return g.prepared(gemm, arguments, {})


def synthetic(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    reads: int,
    writes: int,
    kind: str = "fp32",
    majors: str = "kkn",
) -> Prepared:
    """`writes` tensors, each of which is alpha times the one before plus what was made of `reads` others."""
    alpha, beta = 0.5, 0.25
    fp32, g = FORMATS["fp32"].type, _Gemm(mnkl, "fp16", majors, gen)
    sources, targets = [g.read(kind) for _ in range(reads)], [g.written(kind) for _ in range(writes)]

    def epilogue(efc_config, alpha, beta, *tensors):  # type: ignore[no-untyped-def]
        read = beta
        for tensor in tensors[:reads]:
            read += tensor.load() * alpha
        if reads:
            read = efc_config.where(read < 1, read, read * efc_config.full_like(read, 2))
        t = efc_config.accum()
        for tensor in tensors[reads:]:
            t = t * alpha + read + 50
            tensor.store(t)

    names = ["efc_config", "alpha", "beta", *(f"r{n}" for n in range(reads)), *(f"w{n}" for n in range(writes))]
    named = module.common_efc.create_named_epilogue(names, epilogue)
    gemm = module.DenseGemmEFC(fp32, fp32, two, tile, cluster, named)
    # exact in FP32, so that no rounding can change the comparison with 1
    read = beta + alpha * sum((x.values.float() for x in sources), torch.zeros(()))
    read = (torch.where(read < 1, read, 2 * read) if reads else read).double()
    want, size = g.product, torch.zeros(())
    for n, target in enumerate(targets):
        want, size = alpha * want + read + 50, alpha * size + read.abs() + 50
        g.expect(target, f"w{n}", want, alpha ** (n + 1), size)
    return g.prepared(gemm, (alpha, beta, *sources, *targets), {})


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.blackwell.efc.{example}_custom_epilogue_dense_gemm", prepare, config) for config in configs]


_ONE: dict[str, Any] = {"mnkl": (256, 256, 128, 1), "tile": (128, 128), "cluster": (1, 1), "two": False}
_TWO: dict[str, Any] = {"mnkl": (512, 256, 192, 1), "tile": (256, 128), "cluster": (2, 1), "two": True}

CASES = [
    *(
        Case("cute.blackwell.efc.custom_epilogue_dense_gemm", custom, config)
        for config in (
            {**_ONE, "checks": True},
            {**_TWO, "ab": "bf16", "kinds": ("bf16", "fp32", "fp16", "bf16")},
            {**_ONE, "mnkl": (136, 144, 96, 2), "kinds": ("fp32",) * 4, "majors": "mnm"},
            {**_ONE, "ab": "e4m3", "tile": (64, 64), "cluster": (1, 2)},
        )
    ),
    *_cases(
        "activation",
        activation,
        *({**(_TWO if n % 2 else _ONE), "name": name} for n, name in enumerate(_ACTIVATIONS)),
    ),
    *_cases(
        "synthetic",
        synthetic,
        {**_ONE, "reads": 0, "writes": 1},
        {**_TWO, "reads": 2, "writes": 3},
        {**_ONE, "reads": 3, "writes": 1, "kind": "fp16", "majors": "mnm"},
    ),
]
