"""compress_kv gives the reference's bytes in cache and ring: every format, ragged steps, chunks, whole and in parts."""

import random

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.formats import IndexCache, PagedCache, index_layout, kv_layout
from fp4suite.problem import CompressKvProblem
from kernels_triton import compress_kv as kernel

ROPE, EPS = 16, 1e-6
TABLE = reference.rope_table(reference.rope_frequencies(ROPE, 160000.0), 1024)
WHOLE = kernel.Config(num_warps=1)
PARTS = kernel.Config(block_c=32, num_warps=1)


def new_cache(format: str, head_dim: int, page: int, pages: int, device: torch.device) -> PagedCache | IndexCache:
    name = format.removeprefix("index_")
    if name == format:
        size = kv_layout(name, page, head_dim, ROPE).page_bytes  # type: ignore[arg-type]
        data = torch.full((pages, size), 0xFF, dtype=torch.uint8, device=device)
        return PagedCache(data, name, page, head_dim, ROPE)  # type: ignore[arg-type]
    size = index_layout(name, page, head_dim).page_bytes  # type: ignore[arg-type]
    data = torch.full((pages, size), 0xFF, dtype=torch.uint8, device=device)
    return IndexCache(data, name, page, head_dim)  # type: ignore[arg-type]


class Layer:
    """A compressor with two states and caches, one for the reference and one for the kernel, compared at every step."""

    def __init__(
        self,
        device: torch.device,
        ratio: int = 4,
        lanes: int = 2,
        head_dim: int = 40,
        format: str = "bf16",
        *,
        config: kernel.Config = WHOLE,
        extra: int = 0,
        hadamard: bool = False,
        table: Tensor = TABLE,
        weight_dtype: torch.dtype = torch.bfloat16,
        slots: int = 3,
    ) -> None:
        g = torch.Generator().manual_seed(ratio)
        self.device, self.ratio, self.width = device, ratio, lanes * head_dim
        self.config, self.hadamard = config, hadamard
        self.ape = torch.randn(ratio, self.width, generator=g).to(device)
        self.weight = (1 + 0.3 * torch.randn(head_dim, generator=g)).to(weight_dtype).to(device)
        self.table, self.page = table.to(device), 5
        # nothing that is not written may be read
        shape = (slots, lanes * ratio + extra, 2, self.width)
        self.states = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
        self.caches = [new_cache(format, head_dim, self.page, 8 * slots, device) for _ in range(2)]
        self.order = torch.randperm(8 * slots, generator=g)  # of pages

    def rows(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """kv and gate side by side in one tensor, as one GEMM gives them."""
        g = torch.Generator().manual_seed(seed)
        both = torch.randn(tokens, 2 * self.width, generator=g)
        both[:, self.width :] *= 3
        return both[:, : self.width], both[:, self.width :]

    def arguments(self, parts: list[tuple[int, int, Tensor, Tensor]], padding: int = 0) -> tuple[tuple, dict]:
        """(state slot, first position, kv, gate) of each sequence, then padding tokens full of NaN."""
        sizes = torch.tensor([len(kv) for _, _, kv, _ in parts])
        positions = torch.cat([torch.arange(at, at + n) for (_, at, _, _), n in zip(parts, sizes, strict=True)])
        sequences = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        owner = torch.tensor([slot for slot, _, _, _ in parts])[sequences]
        entry = positions // self.ratio % (8 * self.page)
        slots = self.order[8 * owner + entry // self.page] * self.page + entry % self.page
        slots = torch.where((positions + 1) % self.ratio == 0, slots, -1)
        both = torch.cat([torch.cat((kv, gate), dim=1) for _, _, kv, gate in parts])
        both = torch.cat((both, torch.full((padding, both.shape[1]), float("nan")))).to(self.device)
        pad = torch.full((padding,), -1)
        integers = {
            "positions": torch.cat((positions, 0 * pad + self.ratio - 1)),
            "sequence_ids": torch.cat((sequences, pad)),
            "cu_seqlens": torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))),
            "state_slots": torch.tensor([slot for slot, _, _, _ in parts]),
            "slots": torch.cat((slots, 0 * pad)),
        }
        integers = {name: t.int().to(self.device) for name, t in integers.items()}
        kv, gate = both[:, : self.width], both[:, self.width :]
        return (kv, gate, self.ape, self.weight, self.table, EPS), integers

    def step(self, parts: list[tuple[int, int, Tensor, Tensor]], padding: int = 0) -> None:
        args, integers = self.arguments(parts, padding)
        reference.compress_kv(
            *args, self.states[0], self.caches[0], **integers, ratio=self.ratio, hadamard=self.hadamard
        )
        kernel.launch(*args, self.states[1], *integers.values(), self.ratio, self.hadamard, self.caches[1], self.config)
        self.check()

    def check(self) -> None:
        testing.assert_same_bytes(self.caches[1].data, self.caches[0].data, "cache")
        testing.assert_same_bytes(self.states[1], self.states[0], "ring")


@pytest.mark.parametrize(("ratio", "lanes", "first"), [(4, 2, 0), (3, 1, 1), (12, 1, 0), (10, 2, 1)])
@pytest.mark.parametrize("chunks", [(41,), (3, 1, 1, 9, 2, 20, 5), (7, 34)], ids=str)
def test_one_sequence_in_chunks(ratio, lanes, first, chunks, device):
    """Chunks that begin anywhere in a window, longer than the ring too: older rows are in the ring, and overwritten."""
    layer = Layer(device, ratio, lanes, config=(WHOLE, PARTS)[(first + len(chunks)) % 2])
    kv, gate = layer.rows(41, seed=ratio)
    at = 0
    for size in chunks:
        layer.step([(1, at, kv[at : at + size], gate[at : at + size])])
        at += size


@pytest.mark.parametrize(("ratio", "lanes", "extra"), [(4, 2, 0), (4, 2, 3), (9, 1, 2)])
def test_programs_in_another_order(ratio, lanes, extra, device, monkeypatch):
    """The last one first: what a program writes to a ring, no other one reads."""
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z))
    layer = Layer(device, ratio, lanes, head_dim=16, config=WHOLE, extra=extra)
    sizes = (6, 3, 8, 5, 19)
    kv, gate = layer.rows(sum(sizes), seed=ratio)
    at = 0
    for size in sizes:
        layer.step([(1, at, kv[at : at + size], gate[at : at + size])])
        at += size


@pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize(("ratio", "lanes", "extra"), [(4, 2, 0), (8, 1, 0), (4, 2, 3)])
def test_ragged_steps_with_padding(ratio, lanes, extra, config, device):
    """Three sequences in steps of random sizes and order, single tokens among them, NaN padding behind."""
    dice, layer = random.Random(ratio), Layer(device, ratio, lanes, config=config, extra=extra)
    data = {slot: layer.rows(20 + 7 * slot, seed=slot) for slot in range(3)}
    at = dict.fromkeys(data, 0)
    while any(at[s] < len(data[s][0]) for s in data):
        parts = []
        for slot in dice.sample(sorted(data), dice.randint(1, 3)):
            kv, gate = data[slot]
            size = min(dice.choice((1, 2, 5, 13)), len(kv) - at[slot])
            if size:
                parts.append((slot, at[slot], kv[at[slot] : at[slot] + size], gate[at[slot] : at[slot] + size]))
                at[slot] += size
        if parts:
            layer.step(parts, padding=dice.randint(0, 3))


FORMATS = [("fp32", 80), ("bf16", 80), ("fp8_ds_mla", 80), ("nvfp4", 80)]
FORMATS += [("index_fp32", 64), ("index_bf16", 64), ("index_fp8", 64), ("index_mxfp4", 64)]


@pytest.mark.parametrize(("format", "head_dim"), FORMATS)
def test_every_format(format, head_dim, device):
    """With the Hadamard transform where keys have one; weights in FP32 beside BF16."""
    config = PARTS if format in ("fp8_ds_mla", "index_mxfp4") else WHOLE
    for weight_dtype in (torch.bfloat16, torch.float32):
        hadamard = format.startswith("index_") and weight_dtype == torch.bfloat16
        layer = Layer(device, 4, 2, head_dim, format, config=config, hadamard=hadamard, weight_dtype=weight_dtype)
        for state in layer.states:
            state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(0)))
        a, b = layer.rows(17, seed=1), layer.rows(9, seed=2)
        layer.step([(0, 0, a[0][:6], a[1][:6]), (2, 2, *b)])
        layer.step([(2, 11, b[0][:1], b[1][:1]), (0, 6, a[0][6:], a[1][6:])])


@pytest.mark.parametrize(("ratio", "lanes", "head_dim", "format"), [(128, 1, 112, "nvfp4"), (4, 2, 464, "fp8_ds_mla")])
def test_the_models_ratios(ratio, lanes, head_dim, format, device):
    """At the last positions of a million, a window of 128 tokens in several steps."""
    table = reference.rope_table(reference.rope_frequencies(ROPE, 160000.0), 1_048_576)
    problem = CompressKvProblem(m=1, ratio=ratio, overlaps=lanes, head_dim=head_dim, rope_dim=ROPE, format=format)
    assert kernel.supports(problem, kernel.default(problem)) is None
    layer = Layer(device, ratio, lanes, head_dim, format, table=table, config=kernel.default(problem))
    kv, gate = layer.rows(2 * ratio + 5, seed=3)
    at, end = 1_048_576 - len(kv), len(kv)
    for state in layer.states:
        state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(4)))
    for start, stop in ((0, 3), (3, end - 1), (end - 1, end)):
        layer.step([(0, at + start, kv[start:stop], gate[start:stop])])


def test_slots_that_are_not_to_be_stored(device):
    layer = Layer(device, 4, 2)
    kv, gate = layer.rows(16, seed=1)
    args, integers = layer.arguments([(0, 0, kv, gate)])
    integers["slots"][7] = -1
    before = layer.caches[1].data.clone()
    reference.compress_kv(*args, layer.states[0], layer.caches[0], **integers, ratio=4)
    kernel.launch(*args, layer.states[1], *integers.values(), 4, False, layer.caches[1], WHOLE)
    layer.check()
    assert (layer.caches[1].data != before).any()


@pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole", "parts"])
def test_gates_without_measure(config, device):
    """Apart by more than FP32's exponent range, equal, infinite and NaN, in a window that the ring begins; no window
    but theirs is touched."""
    layer = Layer(device, 8, 1, format="fp32", config=config)
    kv, gate = layer.rows(32, seed=5)
    gate[3], gate[5] = 300.0, -1e30
    gate[8:16, :9] = -0.5
    gate[13, 10], gate[14, 11], gate[15, 12] = float("inf"), float("-inf"), float("nan")
    gate[8:16, 13] = float("-inf")
    kv[9, 14], kv[10, 15], kv[11, 16] = float("inf"), float("nan"), 3e38
    kv[16:24] = 0.0
    kv[24:32] = -0.0
    for at, stop in ((0, 11), (11, 32)):
        args, integers = layer.arguments([(0, at, kv[at:stop], gate[at:stop])])
        reference.compress_kv(*args, layer.states[0], layer.caches[0], **integers, ratio=8)
        kernel.launch(*args, layer.states[1], *integers.values(), 8, False, layer.caches[1], config)
    got, want = (reference.read_rows(c, integers["slots"][integers["slots"] >= 0]) for c in reversed(layer.caches))
    assert len(got) == 3
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[0].isnan().all()  # one NaN is in the norm of its whole row
    assert got[1].eq(0).all()


def test_no_tokens(device):
    layer = Layer(device)
    empty = torch.zeros(0, layer.width, device=device)
    args, integers = layer.arguments([(0, 0, empty.cpu(), empty.cpu())])
    kernel.launch(*args, layer.states[1], *integers.values(), 4, False, layer.caches[1], WHOLE)
    assert layer.states[1].isnan().all()


@pytest.mark.parametrize("m", [1, 9, 24])
@pytest.mark.parametrize("sequences", [1, 0])
def test_cases_of_the_tuner(m, sequences, device):
    problem = CompressKvProblem(
        m=m, ratio=4, overlaps=2, head_dim=64, rope_dim=16, format="index_fp8", sequences=sequences or m, hadamard=1
    )
    c = testing.case(problem, device)
    c.run(kernel, WHOLE)
    c.check()
    c.operands[6][-1, 0, 0, 3] += 1
    with pytest.raises(AssertionError, match=r"ring: .* bytes differ"):
        c.check()


@pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole", "parts"])
def test_replays(config, device):
    """From one state always the same; on the state that the launch before left, what the reference makes of that."""
    problem = CompressKvProblem(
        m=29, ratio=4, overlaps=2, head_dim=64, rope_dim=16, format="index_fp8", sequences=2, hadamard=1
    )
    c = testing.case(problem, device)
    assert c.eager is not None
    for _ in range(2):
        c.run(kernel, config)
        c.check()
    c.launch(kernel, config)
    with pytest.raises(AssertionError, match=r"cache: .* bytes differ"):
        c.check()
    again, ring = c.out.data.clone(), c.operands[6].clone()
    c.poison()
    c.eager()
    c.eager()
    testing.assert_same_bytes(again, c.out.data, "cache")
    testing.assert_same_bytes(ring, c.operands[6], "ring")


def test_entries_and_bytes_of_a_problem():
    dims = {"ratio": 4, "overlaps": 2, "head_dim": 512, "rope_dim": 64, "format": "fp8_ds_mla"}
    assert CompressKvProblem(m=4096, **dims).entries == 1024
    assert CompressKvProblem(m=10, sequences=10, **dims).entries == 3
    constants = 4 * 4 * 1024 + 2 * 512
    one = 4 * 2 * 1024 * 2 + 7 * 4 * 1024 + 584 + 256  # a token read and kept, seven rows of the ring, an entry
    assert CompressKvProblem(m=1, **dims).bytes == one + constants


def test_the_op(device):
    """Through dispatch, kv and gate side by side and as transposed copies."""
    layer = Layer(device, 4, 2)
    kv, gate = layer.rows(21, seed=7)
    args, integers = layer.arguments([(1, 0, kv, gate)])
    transposed = (args[0].T.contiguous().T, args[1], layer.ape, *args[3:])
    reference.compress_kv(*args, layer.states[0], layer.caches[0], **integers, ratio=4)
    with on_target("sm_90a"), override(kernel="triton_compress_kv", config=WHOLE):
        ops.compress_kv(*transposed, layer.states[1], layer.caches[1], **integers, ratio=4)
    layer.check()


def test_refusals():
    dims = {"m": 1, "ratio": 4, "overlaps": 2, "rope_dim": 16}
    odd = CompressKvProblem(**dims, head_dim=96, format="index_mxfp4", hadamard=1)
    assert kernel.supports(odd, WHOLE) == "a Hadamard transform needs a power of two, got head_dim=96"
    wide = CompressKvProblem(**dims, head_dim=512, format="bf16")
    assert kernel.supports(wide, kernel.Config(num_warps=1)) == (
        "block_c=512 num_warps=1: 128 channels of 8 rows a thread, held are 1 of eight rows to 64 of all"
    )
    assert kernel.supports(wide, kernel.default(wide)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("m", "sequences"), [(1, 1), (64, 64), (4096, 1), (5000, 8)])
@pytest.mark.parametrize(
    "dims",
    [
        {"ratio": 4, "overlaps": 2, "head_dim": 512, "format": "fp8_ds_mla"},
        {"ratio": 128, "overlaps": 1, "head_dim": 512, "format": "nvfp4"},
        {"ratio": 4, "overlaps": 2, "head_dim": 128, "format": "index_mxfp4", "hadamard": 1},
    ],
    ids=lambda d: d["format"],
)
def test_real_sizes(dims, m, sequences, config, device):
    problem = CompressKvProblem(m=m, sequences=sequences, rope_dim=64, **dims)
    if kernel.supports(problem, config) is None:
        c = testing.case(problem, device)
        for _ in range(3):  # a race would not show every time
            c.run(kernel, config)
            c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on other rows."""
    problem = CompressKvProblem(m=300, ratio=128, overlaps=1, head_dim=512, rope_dim=64, format="fp8_ds_mla")
    c, config = testing.case(problem, device), kernel.default(problem)
    kernel.warm(problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for _ in range(3):
        c.operands[0].copy_(torch.roll(c.operands[0], 1, 0))
        c.poison()
        graph.replay()
        c.check()
