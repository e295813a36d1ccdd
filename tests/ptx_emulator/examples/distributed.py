"""Examples for several GPUs: their memories are tensors of one host, and the kernels of all ranks run together.

What the host code of the examples gets from NVSHMEM or symmetric memory is made here: the tensors of all ranks, and
multicast tensors, whose addresses stand for those of every rank.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from torch import Tensor

from ptx_emulator import active

from .attention import Near
from .harness import Case, Prepared
from .operands import FORMATS, Expected, Matrix, Scales, empty, expected, matrix, product, scales

STREAM = driver.CUstream(0)


def multicast(parts: Sequence[Tensor]) -> Tensor:
    """Of the shape of each part, and of no contents."""
    device = active()
    assert device is not None
    window = torch.from_numpy(device.multicast([p.view(torch.uint8).numpy() for p in parts]))
    return window.view(parts[0].dtype).view(parts[0].shape)


def together(calls: Sequence[Callable[[], Any]]) -> None:
    """One call a rank."""
    device = active()
    assert device is not None
    with device.together():
        for call in calls:
            call()


def _summed(parts: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Near]:
    """Every rank has the sum of all; FP32 sums in any order."""
    values = torch.stack([p.double() for p in parts])
    want, bound = values.sum(0), values.abs().sum(0)
    return [Near(f"output of rank {n}", out, want, bound * len(parts) * 2.0**-24) for n, out in enumerate(outputs)]


def _random(ranks: int, shape: tuple[int, ...], gen: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(shape, generator=gen) for _ in range(ranks)]
    return inputs, [torch.zeros(shape) for _ in range(ranks)]


def all_reduce_simple(module: ModuleType, gen: torch.Generator, ranks: int, mn: tuple[int, int]) -> Prepared:
    inputs, outputs = _random(ranks, mn, gen)
    tensors = [from_dlpack(x) for x in inputs]
    compiled = cute.compile(module.all_reduce_simple, tensors, from_dlpack(outputs[0]))
    calls = [lambda out=out: compiled(tensors, from_dlpack(out)) for out in outputs]
    return Prepared(lambda: together(calls), _summed(inputs, outputs), inputs)


def all_reduce_multimem(module: ModuleType, gen: torch.Generator, ranks: int, mn: tuple[int, int]) -> Prepared:
    inputs, outputs = _random(ranks, mn, gen)
    flags = [torch.zeros(mn[0] * mn[1] // 128**2, dtype=torch.int32) for _ in range(ranks)]

    def arguments(rank: int, shared: Sequence[Tensor]) -> list[Any]:
        into, out, flag = (from_dlpack(x) for x in shared)
        return [into, out, from_dlpack(flags[rank]), flag]

    like = [(inputs[0], outputs[0], flags[0])]
    compiled = [
        cute.compile(module.all_reduce_multimem, *arguments(rank, like[0]), rank, ranks) for rank in range(ranks)
    ]

    def run() -> None:
        for flag in flags:
            flag.zero_()
        shared = [multicast(parts) for parts in (inputs, outputs, flags)]
        together([lambda n=n: compiled[n](*arguments(n, shared)) for n in range(ranks)])

    return Prepared(run, _summed(inputs, outputs), (inputs, flags))


def all_reduce_tma(module: ModuleType, gen: torch.Generator, ranks: int, shape: tuple[int, ...]) -> Prepared:
    inputs, outputs = _random(ranks, shape, gen)
    kernel = module.AllReduceTmaKernel
    tiles = -(-inputs[0].numel() // kernel._elems_per_cta)
    flags = [torch.zeros(-(-tiles // ranks), dtype=torch.int32) for _ in range(ranks)]
    tensors = [from_dlpack(x) for x in inputs]
    compiled = [
        cute.compile(
            kernel(cutlass.Float32), tensors, *(from_dlpack(x) for x in (outputs[0], flags[0], flags[0])), n, ranks
        )
        for n in range(ranks)
    ]

    def run() -> None:
        for flag in flags:
            flag.zero_()
        out, flag = multicast(outputs), multicast(flags)
        together(
            [
                lambda n=n: compiled[n](tensors, from_dlpack(out), from_dlpack(flags[n]), from_dlpack(flag))
                for n in range(ranks)
            ]
        )

    return Prepared(run, _summed(inputs, outputs), (inputs, flags))


def all_reduce_lamport(module: ModuleType, gen: torch.Generator, ranks: int, mn: tuple[int, int]) -> Prepared:
    """Two in a row, with the buffers that the first leaves behind. Minus zero says that a number is yet to come."""
    steps = [_random(ranks, mn, gen) for _ in range(2)]
    buffers = [torch.zeros(module.PING_PONG_SIZE, ranks, *mn) for _ in range(ranks)]
    shared = [from_dlpack(b.permute(2, 3, 1, 0), assumed_align=32) for b in buffers]

    def arguments(step: int, rank: int) -> list[Any]:
        inputs, outputs = steps[step]
        return [from_dlpack(x[rank], assumed_align=32) for x in (inputs, outputs)]

    compiled = [
        cute.compile(
            module.AllReduceOneShotLamportKernel(), n, ranks, cutlass.Int32(0), *arguments(0, n), shared, stream=STREAM
        )
        for n in range(ranks)
    ]

    def run() -> None:
        for buffer in buffers:
            buffer.fill_(-0.0)
        for step in range(len(steps)):
            together(
                [
                    lambda n=n, step=step: compiled[n](cutlass.Int32(step), *arguments(step, n), shared, STREAM)
                    for n in range(ranks)
                ]
            )

    return Prepared(run, [near for step in steps for near in _summed(*step)], (steps, buffers))


# --- GEMMs whose tiles are added up over the ranks ---


@dataclass(frozen=True)
class Gemms:
    """Operands of every rank: a and b, with scales where they are block-scaled, the product, what the collective
    leaves, flags."""

    ranks: int
    a: list[Matrix]
    b: list[Matrix]
    sfa: list[Scales]
    sfb: list[Scales]
    c: list[Matrix]
    out: list[Matrix]
    flags: list[Tensor]
    outputs: list[Expected]

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.a, self.b, self.sfa, self.sfb, self.c, self.out, self.flags

    def shared(self, parts: Sequence[Matrix]) -> Any:
        return replace(parts[0], data=multicast([p.data for p in parts])).tensor()

    def flag(self, tensor: Tensor) -> Any:
        return from_dlpack(tensor, assumed_align=16).mark_layout_dynamic()


def _gemms(
    gen: torch.Generator, ranks: int, mnk: tuple[int, int, int], c: str, ab: str = "fp16", scatter: bool = False
) -> Gemms:
    """scatter: every rank gets its own share of the rows, and not all of them."""
    m, n, k = mnk
    a, b = ([matrix(ab, 1, size, k, gen) for _ in range(ranks)] for size in (m, n))
    sfa, sfb = ([scales("e4m3", 1, size, k, 16, gen) for _ in range(ranks)] for size in (m, n))
    left, right = (
        [x.values if ab == "fp16" else x.values * sf.expanded(k) for x, sf in zip(*pair, strict=True)]
        for pair in ((a, sfa), (b, sfb))
    )
    share = m // ranks if scatter else m
    products, out = ([empty(c, 1, rows, n) for _ in range(ranks)] for rows in (m, share))
    pairs = [product(x, y) for x, y in zip(left, right, strict=True)]
    want, bound = (torch.stack(x).sum(0) for x in zip(*pairs, strict=True))
    # each product is rounded to the type of C before they are added
    steps = k // 16 + 4 + ranks + 2.0 ** (24 - FORMATS[c].digits)
    outputs = []
    for rank in range(ranks):
        rows = slice(rank * share, (rank + 1) * share) if scatter else slice(None)
        outputs.append(expected(out[rank], want[:, rows], bound[:, rows], f"sum at rank {rank}", steps))
        if not scatter:
            outputs.append(expected(products[rank], *pairs[rank], f"product of rank {rank}", k // 16 + 4))
    flags = [torch.zeros((m // 64) * (n // 64) + 160, dtype=torch.int32) for _ in range(ranks)]
    return Gemms(ranks, a, b, sfa, sfb, products, out, flags, outputs)


def _all_reduce(g: Gemms) -> list[dict[str, Any]]:
    c, out, flag = g.shared(g.c), g.shared(g.out), g.flag(multicast(g.flags))
    return [
        {
            "c": g.c[n].tensor(),
            "comm_in_multicast_tensor": c,
            "comm_out_multicast_tensor": out,
            "barrier_flag_unicast": g.flag(g.flags[n]),
            "barrier_flag_multicast": flag,
        }
        for n in range(g.ranks)
    ]


def _all_reduce_by_loads(g: Gemms) -> list[dict[str, Any]]:
    out, flag = g.shared(g.out), g.flag(multicast(g.flags))
    return [
        {
            "c": g.c[n].tensor(),
            "comm_in_unicast_tensors_per_peer": tuple(c.tensor() for c in g.c),
            "comm_out_multicast_tensor": out,
            "barrier_flag_unicast": g.flag(g.flags[n]),
            "barrier_flag_multicast": flag,
        }
        for n in range(g.ranks)
    ]


def _reduce_scatter(g: Gemms) -> list[dict[str, Any]]:
    c, flag = g.shared(g.c), g.flag(multicast(g.flags))
    return [
        {
            "c": g.c[n].tensor(),
            "comm_in_multicast_tensor": c,
            "comm_out_unicast_tensor": g.out[n].tensor(),
            "barrier_flag_unicast": g.flag(g.flags[n]),
            "barrier_flag_multicast": flag,
            "barrier_flag_unicast_per_peer": tuple(g.flag(f) for f in g.flags),
        }
        for n in range(g.ranks)
    ]


_COLLECTIVES: dict[str, tuple[str, Callable[[Gemms], list[dict[str, Any]]]]] = {
    "all_reduce": ("Sm100PersistentDenseGemmAllReduceLDMCxSTMCKernel", _all_reduce),
    "all_reduce_by_loads": ("Sm100PersistentDenseGemmAllReduceLDxSTMCKernel", _all_reduce_by_loads),
    "reduce_scatter": ("Sm100PersistentDenseGemmReduceScatterLDMCKernel", _reduce_scatter),
}
FEW = 2  # clusters of a rank


def gemm(
    module: ModuleType,
    gen: torch.Generator,
    collective: str,
    ranks: int,
    mnk: tuple[int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    c: str = "fp16",
    tma_store: bool = True,
) -> Prepared:
    g = _gemms(gen, ranks, mnk, c, scatter=collective == "reduce_scatter")
    name, shared = _COLLECTIVES[collective]
    types = FORMATS["fp32"].type, FORMATS[c].type

    def arguments() -> list[dict[str, Any]]:
        own = [{"a": a.tensor(), "b": b.tensor(), "stream": STREAM} for a, b in zip(g.a, g.b, strict=True)]
        return [{**x, **y} for x, y in zip(own, shared(g), strict=True)]

    compiled = []
    for rank, known in enumerate(arguments()):
        kernel = getattr(module, name)(*types, tile[0] == 256, tile, cluster, tma_store, rank, ranks)
        if not kernel.can_implement((*mnk, 1), FORMATS["fp16"].type, types[1], "k", "k", "n"):
            raise ValueError("the example refuses this configuration")
        compiled.append(cute.compile(kernel, **known, max_active_clusters=FEW))

    def run() -> None:
        _run(g, [lambda f=f, x=x: f(**x) for f, x in zip(compiled, arguments(), strict=True)])

    return Prepared(run, g.outputs, g.inputs)


def _run(g: Gemms, calls: Sequence[Callable[[], Any]]) -> None:
    for flag in g.flags:
        flag.zero_()
    together(calls)
    if any(flag.any() for flag in g.flags):
        raise AssertionError("flags are left over")


def gemm_lamport(
    module: ModuleType,
    gen: torch.Generator,
    ranks: int,
    mnk: tuple[int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    c: str = "fp16",
) -> Prepared:
    """Each rank sends its product to a buffer of its own at every rank, where minus zero says what is yet to come."""
    g = _gemms(gen, ranks, mnk, c)
    m, n, _ = mnk
    buffers = [[[empty(c, 1, m, n) for _ in range(ranks)] for _ in range(ranks)] for _ in range(2)]
    types = FORMATS["fp32"].type, FORMATS[c].type

    def arguments() -> list[dict[str, Any]]:
        """buffers: [ping or pong][at rank][from rank]"""
        sent = [g.shared([at[source] for at in buffers[0]]) for source in range(ranks)]
        return [
            {
                "a": g.a[rank].tensor(),
                "b": g.b[rank].tensor(),
                "c_multicast_tensor": sent[rank],
                "comm_in_unicast_tensor_per_peer": tuple(x.tensor() for x in buffers[0][rank]),
                "comm_clear_unicast_tensor_per_peer": tuple(x.tensor() for x in buffers[1][rank]),
                "comm_out_unicast_tensor": g.out[rank].tensor(),
                "stream": STREAM,
            }
            for rank in range(ranks)
        ]

    compiled = []
    for rank, known in enumerate(arguments()):
        kernel = module.Sm100PersistentDenseGemmAllReduceLamportKernel(
            *types, tile[0] == 256, tile, cluster, True, rank, ranks
        )
        if not kernel.can_implement((*mnk, 1), FORMATS["fp16"].type, types[1], "k", "k", "n"):
            raise ValueError("the example refuses this configuration")
        compiled.append(cute.compile(kernel, **known, max_active_clusters=FEW))

    def run() -> None:
        for at in buffers[0]:
            for buffer in at:
                buffer.data.view(FORMATS[c].dtype).fill_(-0.0)
        together([lambda f=f, x=x: f(**x) for f, x in zip(compiled, arguments(), strict=True)])
        left = [x.data.view(FORMATS[c].dtype) for at in buffers[1] for x in at]
        if not all(torch.equal(x, torch.zeros_like(x)) and x.signbit().all() for x in left):
            raise AssertionError("the buffers of the next step are not cleared")

    return Prepared(run, [o for o in g.outputs if o.name.startswith("sum")], (g.inputs, buffers))


def gemm_blockscaled(
    module: ModuleType,
    gen: torch.Generator,
    ranks: int,
    mnk: tuple[int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    c: str = "fp16",
) -> Prepared:
    """NVFP4."""
    g = _gemms(gen, ranks, mnk, c, "e2m1")
    types = [FORMATS[x].type for x in ("e2m1", "e2m1", c, "e4m3")]

    def arguments() -> list[list[Any]]:
        return [
            [*(x[n].pointer() for x in (g.a, g.b, g.sfa, g.sfb, g.c)), (*mnk, 1), STREAM, *list(shared.values())[1:]]
            for n, shared in enumerate(_all_reduce(g))
        ]

    compiled = []
    for rank, known in enumerate(arguments()):
        kernel = module.Sm100PersistentBlockScaleDenseGemmAllReduceLDMCxSTMCKernel(
            16, tile, cluster, FORMATS[c].type, rank, ranks
        )
        compiled.append(module.scaled_mm_ar(kernel, *types, "k", "k", "n", FEW, STREAM, *known[-4:]))

    def run() -> None:
        _run(g, [lambda f=f, x=x: f(*x) for f, x in zip(compiled, arguments(), strict=True)])

    return Prepared(run, g.outputs, g.inputs)


def all_gather_gemm(
    module: ModuleType,
    gen: torch.Generator,
    ranks: int,
    mnk: tuple[int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
) -> Prepared:
    """Each rank has a share of the rows of A, and multiplies those of the others when a flag says that they are there.

    The ranks meet in one kernel; a GEMM that waits runs together with the kernel that sets its flag.
    """
    m, n, k = mnk
    share = m // ranks
    a = [matrix("fp16", 1, share, k, gen) for _ in range(ranks)]
    b = matrix("fp16", 1, n, k, gen)
    # [at rank][of rank]
    gathered, out = ([[empty("fp16", 1, share, size) for _ in a] for _ in a] for size in (k, n))
    flags = [torch.zeros(ranks, dtype=torch.int32) for _ in a]
    counters = [torch.zeros(1, dtype=torch.int32) for _ in a]
    addresses = torch.tensor([x.data_ptr() for x in counters])

    def kernel(rank: int, source: int) -> Any:
        gated = source != rank
        made = module.PersistentDenseGemmKernel(FORMATS["fp32"].type, tile[0] == 256, tile, cluster, True, gated)
        tensors = gathered[rank][source].tensor(), b.tensor(), out[rank][source].tensor()
        flag = from_dlpack(flags[rank])
        compiled = cute.compile(made, *tensors, FEW, STREAM, flag_offset=source, gate_a_flags=flag)
        return lambda: compiled(*tensors, STREAM, gate_a_flags=flag)

    meet = cute.compile(
        module.SyncNvlDevices(ranks),
        device_idx=0,
        device_arrival_counters=from_dlpack(addresses),
        iteration_flags=from_dlpack(flags[0]),
        stream=STREAM,
    )
    release = cute.compile(
        module.ReleaseFlagSet(), gate_a_flags=from_dlpack(flags[0]), step=cutlass.Int32(0), stream=STREAM
    )
    kernels = {(rank, source): kernel(rank, source) for rank in range(ranks) for source in range(ranks)}

    def run() -> None:
        for at in (*flags, *counters):
            at.fill_(0)
        together([lambda n=n: meet(n, from_dlpack(addresses), from_dlpack(flags[n]), STREAM) for n in range(ranks)])
        for (rank, source), multiply in kernels.items():
            gathered[rank][source].data.copy_(a[source].data)
            set_flag = [lambda r=rank, s=source: release(from_dlpack(flags[r]), cutlass.Int32(s), STREAM)]
            together([multiply, *(set_flag if source != rank else ())])

    outputs = []
    for rank, source in kernels:
        want, bound = product(a[source].values, b.values)
        outputs.append(expected(out[rank][source], want, bound, f"rows of rank {source} at {rank}", k // 16 + 4))
    return Prepared(run, outputs, (a, b, gathered, flags, counters, addresses))


def _waits_for_writes(ptx: str) -> str:
    """The flag of a tile says that it is there; but before setting it the example waits with
    cp.async.bulk.wait_group.read, which is over when the TMA stores have read shared memory."""
    return re.sub(r"wait_group\.read(\s+0;)", r"wait_group\1", ptx)


def _cases(example: str, prepare: Any, *configs: dict[str, Any], script: bool = False, **more: Any) -> list[Case]:
    name = f"cute.blackwell.kernel.distributed.{example}"
    return [Case(name, prepare, config, script=script, **more) for config in configs]


def _acquires(ptx: str) -> str:
    """And the wait for the flag is relaxed, with no fence behind it."""
    return _waits_for_writes(ptx).replace("ld.relaxed.gpu.global.b32", "ld.acquire.gpu.global.b32")


_MENDED = {"rewrite": _waits_for_writes}

CASES = [
    *_cases("all_reduce_simple", all_reduce_simple, {"ranks": 4, "mn": (64, 256)}, script=True),
    *_cases(
        "all_reduce_two_shot_multimem",
        all_reduce_multimem,
        {"ranks": 2, "mn": (256, 128)},
        {"ranks": 4, "mn": (256, 256)},
        script=True,
    ),
    *_cases("all_reduce_tma", all_reduce_tma, {"ranks": 2, "shape": (4, 6, 8, 10, 12)}, script=True),
    *_cases(
        "distributed_gemm_all_reduce_blackwell",
        gemm,
        {"collective": "all_reduce", "ranks": 2, "mnk": (256, 256, 192), "tile": (128, 128)},
        {
            "collective": "all_reduce",
            "ranks": 4,
            "mnk": (512, 256, 128),
            "tile": (256, 128),
            "cluster": (2, 1),
            "c": "fp32",
        },
        device=_MENDED,
    ),
    *_cases(
        "distributed_gemm_all_reduce_ldxstmc_blackwell",
        gemm,
        {"collective": "all_reduce_by_loads", "ranks": 2, "mnk": (256, 256, 192), "tile": (128, 128)},
        device=_MENDED,
    ),
    *_cases(
        "distributed_gemm_reduce_scatter_blackwell",
        gemm,
        {"collective": "reduce_scatter", "ranks": 2, "mnk": (512, 256, 192), "tile": (128, 128)},
        device={"rewrite": _acquires},
    ),
    *_cases(
        "distributed_gemm_blockscaled_all_reduce_ldmcxstmc_blackwell",
        gemm_blockscaled,
        {"ranks": 2, "mnk": (256, 256, 256), "tile": (128, 128)},
        {"ranks": 2, "mnk": (512, 256, 256), "tile": (256, 128), "cluster": (2, 1), "c": "bf16"},
        device=_MENDED,
    ),
    *_cases(
        "distributed_all_gather_gemm_blackwell",
        all_gather_gemm,
        {"ranks": 2, "mnk": (256, 128, 192), "tile": (128, 128)},
    ),
    *_cases(
        "distributed_gemm_all_reduce_lamport_blackwell",
        gemm_lamport,
        {"ranks": 2, "mnk": (256, 256, 192), "tile": (128, 128)},
        # what is weak, a TMA store, is looked for with strong loads: its own values say whether it is there
        refused="data race: .* TMA store|TMA store: data race",
    ),
    *_cases("all_reduce_one_shot_lamport", all_reduce_lamport, {"ranks": 4, "mn": (16, 256)}),
]
