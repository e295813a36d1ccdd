"""What `bench --peers` does on the device, in one process: a layer shape's weights, then m by m checks and timings.

    open_shape(n, k, segments, device, seed)     # the weights, several copies where L2 could hold one
    open_cell(dims, seed)                        # activations of m tokens
    record_own(kernel, knobs); record("marlin")  # prepared once a shape, checked, captured
    times(["fp4suite", "marlin"], ...)           # interleaved rounds

Every contender gets the same weights and activations. Weights have one alpha and no subnormal block scales, which is
what all peers can take; that ours is exact for every code and scale is the tests' to show.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp4suite import ops, problem as problems, reference, registry, testing
from fp4suite.formats import BLOCK, FP8RowTensor, NVFP4Tensor, WeightLayout
from fp4suite.problem import GemmProblem, nvfp4_bytes
from fp4suite.reference.quant import scaled_codes

from . import measure, peers
from .measure import Timed
from .peers import Launch, Layer
from .side_by_side import EMPTY, OWN, rounds_within

READ, FP8 = "read", peers.FP8.name
ALPHA = 2.0**-6
CHECKED_COPIES = 2
CHECKED_ROWS = 64  # of the result, spread over all of it


class Shape:
    """Weights [n, k] on the device, and what contenders have made of them."""

    def __init__(self, n: int, k: int, segments: int, device: torch.device | str, seed: int) -> None:
        self.device = measure.cuda_device(device)
        self.n, self.k, self.segments = n, k, testing.split(n, segments)
        self.nbytes = nvfp4_bytes(n, k)
        gen = torch.Generator(device=self.device).manual_seed(seed)
        one = torch.tensor(ALPHA, device=self.device)
        self.packed: list[Tensor] = []  # codes, then scales, as bytes
        self.weights: list[NVFP4Tensor] = []
        for _ in range(measure.sets_for(self.nbytes, measure.l2_bytes(self.device))):
            made = testing.random_nvfp4(n, k, gen, alpha=one)
            flat = torch.cat([made.data.flatten(), made.sf.view(torch.uint8).flatten()])
            codes, sf = flat.split([n * k // 2, n * k // BLOCK])
            self.packed.append(flat)
            self.weights.append(NVFP4Tensor(codes.view(n, -1), sf.view(n, -1).view(torch.float8_e4m3fn), one))
        self.read_variant: tuple[int, int] | None = None  # the fastest of bench_kernels.READS, once known
        self._layers: dict[str, list[Layer]] = {}
        self._own: dict[WeightLayout, list[NVFP4Tensor]] = {}
        self._decoded: dict[int, Tensor] = {}

    def layers(self, peer: peers.GemmPeer) -> list[Layer]:
        """The weights as a peer wants them."""
        if peer.name not in self._layers:
            self._layers[peer.name] = [peer.prepare(w, ALPHA) for w in self.weights]
        return self._layers[peer.name]

    def own(self, module: Any, act: str) -> list[NVFP4Tensor]:
        """The weights as a kernel of ours reads them beside activations in `act`."""
        layout = registry.weight_layout(module)
        if layout not in self._own:
            alpha = self.weights[0].alpha
            if len(self.segments) > 1:
                alpha = alpha.repeat(len(self.segments))
            plain = [NVFP4Tensor(w.data, w.sf, alpha) for w in self.weights]
            self._own[layout] = [w.with_order(layout.order).with_sf_layout(layout.sf_layout) for w in plain]
        if act == "fp8":
            self._own[layout] = [w if w.row_exponent is not None else w.prepare_fp8() for w in self._own[layout]]
        return self._own[layout]

    def decoded(self, copy: int) -> Tensor:
        """FP64 [n, k], without alpha."""
        if copy not in self._decoded:
            self._decoded[copy] = scaled_codes(self.weights[copy]).double()
        return self._decoded[copy]


class Cell:
    """m tokens on a shape, with its contenders."""

    def __init__(self, shape: Shape, problem: GemmProblem, seed: int) -> None:
        self.shape, self.problem = shape, problem
        gen = torch.Generator(device=shape.device).manual_seed(seed)
        self.x = [testing.random_activations((problem.m, problem.k), gen) for _ in shape.weights]
        self.timer = measure.Timer(range(len(shape.weights)), shape.device, seed)
        self.timed: dict[str, Timed] = {}
        self.rows = torch.linspace(0, problem.m - 1, min(problem.m, CHECKED_ROWS), device=shape.device).round().long()
        self._references: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: list[Any] = []  # what graphs read and write that was not allocated while they were captured

    def record_own(self, kernel: str, config: Any) -> float:
        module = registry.load(kernel)
        if hasattr(module, "warm"):
            module.warm(self.problem, config)
        dtype = testing.TORCH_DTYPES[self.problem.out]
        segments = self.shape.segments if len(self.shape.segments) > 1 else None
        launches: list[Launch] = []
        fp8 = self.problem.act == "fp8"
        for x, b in zip(self.x, self.shape.own(module, self.problem.act), strict=True):
            out = torch.full((self.problem.m, self.problem.n), torch.nan, dtype=dtype, device=x.device)
            a = ops.quantize_fp8(x) if fp8 else x  # once, whatever number of weights it is multiplied by
            launches.append(partial(_launch_own, module, a, b, segments, out, config))
        return self._record(OWN, launches, partial(self._check_fp8, config) if fp8 else self._check_exactly)

    def record(self, peer: peers.GemmPeer) -> float:
        launches = [layer(x) for layer, x in zip(self.shape.layers(peer), self.x, strict=True)]
        return self._record(peer.name, launches, self._check_size if peer is peers.FP8 else self._check)

    def record_read(self) -> None:
        """A bare read of the weights' bytes, by the variant that is fastest for this shape."""
        from . import bench_kernels

        words = [flat.view(torch.int32) for flat in self.shape.packed]
        most = torch.empty(words[0].numel() // min(b for b, _ in bench_kernels.READS) + 1, dtype=torch.int32)
        most = most.to(self.shape.device)
        self._kept.append(most)

        def variant(block: int, warps: int) -> Timed:
            bench_kernels.read(words[0], most, block, warps)
            return self.timer.capture(READ, lambda i: bench_kernels.read(words[i], most, block, warps))

        if self.shape.read_variant is None:
            tried = [variant(*v) for v in bench_kernels.READS]
            medians = torch.tensor(self.timer.rounds(tried, 5)).median(dim=0).values
            self.shape.read_variant = bench_kernels.READS[int(medians.argmin())]
        self.timed[READ] = variant(*self.shape.read_variant)

    def record_empty(self) -> None:
        from . import bench_kernels

        bench_kernels.empty()
        self.timed[EMPTY] = self.timer.capture(EMPTY, lambda i: bench_kernels.empty())

    def _record(self, name: str, launches: list[Launch], check: Callable[[int, Tensor], float]) -> float:
        """Run, check, capture, and check what the graph writes; the larger error."""
        self._kept.append(launches)
        errors = []
        for i in range(CHECKED_COPIES):
            got = launches[i]()
            self._wait()
            errors.append(check(i, got))
        results: dict[int, Tensor] = {}  # kept, so that every launch of a graph writes to memory of its own

        def launch(i: int) -> None:
            results[i] = launches[i]()

        timed = self.timer.capture(name, launch)
        for i in range(CHECKED_COPIES):
            results[i].fill_(torch.nan)
        self._wait()
        timed.replay()
        self._wait()
        errors += [check(i, results[i]) for i in range(CHECKED_COPIES)]
        self.timed[name] = timed
        return max(errors)

    def _check(self, copy: int, got: Tensor) -> float:
        want, scale, _ = self._reference(copy)
        return peers.assert_close(got[self.rows], want, scale)

    def _check_exactly(self, copy: int, got: Tensor) -> float:
        """Ours: each element within FP32 accumulation error and the output's rounding."""
        _, _, a = self._reference(copy)
        alpha = torch.full((self.shape.n,), ALPHA, dtype=torch.float64, device=a.device)
        testing.assert_gemm_close(got[self.rows], a, self.shape.decoded(copy), alpha)
        return self._check(copy, got)

    def _check_fp8(self, config: Any, copy: int, got: Tensor) -> float:
        """Ours from FP8: as close to the product of its own operands as its sums are; the error against the product."""
        want, scale, _ = self._reference(copy)
        rows = reference.quantize_fp8(self.x[copy][self.rows])
        weight = reference.dequant_fp8_weight(self.shape.weights[copy].prepare_fp8(), torch.float64)
        alpha = torch.full((self.shape.n,), ALPHA, dtype=torch.float64, device=got.device)
        a, run = reference.dequant_fp8(rows, torch.float64), testing.fp8_run(config)
        testing.assert_fp8_gemm_close(got[self.rows], a, weight, alpha, run)
        off = (got[self.rows].double() - want) / scale
        return float(off[scale > 0].square().mean().sqrt())

    def _check_size(self, copy: int, got: Tensor) -> float:
        if got.shape != (self.problem.m, self.problem.n):
            raise AssertionError(f"result is {list(got.shape)}, want {[self.problem.m, self.problem.n]}")
        return 0.0

    def _reference(self, copy: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows that are checked: the FP64 product, its scale, and the activations in FP64."""
        if copy not in self._references:
            a, b = self.x[copy][self.rows].double(), self.shape.decoded(copy)
            scale = (a.square() @ b.square().T).sqrt() * ALPHA
            self._references[copy] = (a @ b.T) * ALPHA, scale, a
        return self._references[copy]

    def _wait(self) -> None:
        if self.shape.device.type == "cuda":
            torch.cuda.synchronize(self.shape.device)


def _launch_own(
    module: Any, x: Tensor | FP8RowTensor, b: NVFP4Tensor, segments: Any, out: Tensor, config: Any
) -> Tensor:
    module.launch(x, b, segments, out, config)
    return out


# --- what runs in the measuring child ---

_shape: Shape | None = None
_cell: Cell | None = None


def open_shape(n: int, k: int, segments: int, device: str, seed: int) -> int:
    """Start on a shape; forgets the one before. Returns the number of copies of its weights."""
    global _shape, _cell
    _shape = _cell = None
    _free()
    _shape = Shape(n, k, segments, device, seed)
    return len(_shape.weights)


def open_cell(dims: dict[str, int | str], seed: int) -> None:
    """Start on a number of tokens."""
    global _cell
    assert _shape is not None, "open_shape comes first"
    _cell = None
    problem = problems.from_dims(GemmProblem.op, dims)
    assert isinstance(problem, GemmProblem)
    _cell = Cell(_shape, problem, seed)


def record_own(kernel: str, knobs: dict[str, Any]) -> float:
    """Check and capture a kernel of ours; returns its error. Raises what compiling, launching or checking raises."""
    assert _cell is not None, "open_cell comes first"
    return _cell.record_own(kernel, registry.make_config(registry.load(kernel), knobs))


def record(name: str) -> float:
    """Check and capture a peer or a roof; returns its error (0 for a roof)."""
    assert _cell is not None, "open_cell comes first"
    if name == READ:
        _cell.record_read()
        return 0.0
    if name == EMPTY:
        _cell.record_empty()
        return 0.0
    return _cell.record(peers.FP8 if name == FP8 else peers.PEERS[name])


def times(names: list[str], seconds: float, least: int, most: int) -> list[list[float]]:
    """`rounds_within` of contenders by name."""
    assert _cell is not None, "open_cell comes first"
    return rounds_within(_cell.timer, [_cell.timed[name] for name in names], seconds, least, most)


def sound() -> None:
    """Raises if the device can no longer be used, as after an illegal access."""
    assert _shape is not None, "open_shape comes first"
    _shape.packed[0][:16].clone().sum().item()


def warm_own(dims: dict[str, int | str], kernel: str, knobs: dict[str, Any]) -> None:
    """Compile what launches of a problem need in this process."""
    module = registry.load(kernel)
    if hasattr(module, "warm"):
        module.warm(problems.from_dims(GemmProblem.op, dims), registry.make_config(module, knobs))


def warm_peer(name: str, n: int, k: int, m: int, device: str) -> None:
    """Have a peer that compiles while running do so, into the cache that it keeps on disk."""
    where = measure.cuda_device(device)
    gen = torch.Generator(device=where).manual_seed(0)
    weight = testing.random_nvfp4(n, k, gen, alpha=torch.tensor(ALPHA, device=where))
    layer = peers.PEERS[name].prepare(weight, ALPHA)
    layer(torch.zeros(m, k, dtype=torch.bfloat16, device=where))().sum().item()


def roofs(device: str) -> dict[str, float]:
    """GB/s of reading, TFLOP/s of cuBLAS in BF16."""
    return {"read": measure.read_bandwidth(device), "mma": measure.matmul_tflops(device)}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
