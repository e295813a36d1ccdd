"""index_logits against FP64: every format, scattered and missing pages, runs of queries, causality, padding."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, registry, testing
from fp4suite.dispatch import Target, batch_invariant, choose_for, on_target, override
from fp4suite.formats import IndexCache, index_layout
from fp4suite.problem import IndexLogitsProblem
from kernels_triton import index_logits as kernel

INF = float("inf")
SMALL = kernel.Config(block_m=4, block_n=16, num_warps=1)
FORMATS = ["fp32", "bf16", "fp8", "mxfp4"]


def new_cache(format: str, pages: int, page: int, d: int, device: torch.device) -> IndexCache:
    """Keys of many magnitudes, a row of zeros, the smallest and large ones among them."""
    data = torch.empty(pages, index_layout(format, page, d).page_bytes, dtype=torch.uint8)  # type: ignore[arg-type]
    cache = IndexCache(data, format, page, d)  # type: ignore[arg-type]
    keys = testing.random_activations((pages * page, d), torch.Generator().manual_seed(d)).float()
    keys[3], keys[5], keys[8] = 0.0, 1e-6 * keys[5], 1e4 * keys[8]
    reference.write_rows(cache, torch.arange(cache.slots), keys)
    return IndexCache(data.to(device), format, page, d)  # type: ignore[arg-type]


class Step:
    """Queries of three sequences in runs of 1, 7 and 5 with padding behind, over pages in any order, some missing."""

    def __init__(
        self, device: torch.device, format: str, heads: int = 6, d: int = 32, page: int = 5, dtype: str = "bf16"
    ) -> None:
        g = torch.Generator().manual_seed(heads)
        self.cache = new_cache(format, 24, page, d, device)
        table = torch.randperm(24, generator=g).view(3, 8)
        table[1, 2] = table[2, 7] = -1
        self.page, self.seen = page, torch.tensor([33, *range(22, 29), 0, 1, 16, 17, 40, 40, 40])
        q = testing.random_activations((15, heads, d), g, testing.TORCH_DTYPES.get(dtype, torch.float32))
        if dtype == "fp8":
            q = (q * (448 / q.abs().amax(-1, keepdim=True))).to(torch.float8_e4m3fn)
        self.q, self.weights = q.to(device), torch.randn(15, heads, generator=g).to(device)
        self.table = table.int().to(device)
        self.positions = (3 * self.seen + 1).int().to(device)
        self.sequences = torch.tensor([0] + [1] * 7 + [2] * 5 + [-1] * 2).int().to(device)

    def run(self, config: kernel.Config, ratio: int = 3) -> Tensor:
        out = torch.full((15, 8 * self.page), float("nan"), device=self.q.device)
        rows = self.table, self.positions, self.sequences
        kernel.launch(self.q, self.weights, self.cache, *rows, ratio, 0.3, out, config)
        return out

    def check(self, got: Tensor, ratio: int = 3) -> None:
        for sequence in (0, 1, 2):
            own = self.sequences == sequence
            at = torch.arange(8 * self.page, device=got.device)
            page = self.table[sequence].long()[at // self.page]
            keys = reference.read_rows(self.cache, torch.where(page >= 0, page * self.page + at % self.page, -1))
            limits = (self.positions[own] + 1) // ratio
            testing.assert_index_logits_close(got[own], self.q[own], self.weights[own], keys, limits, 0.3)
        assert torch.all(got[self.sequences < 0] == -INF)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_type(format, dtype, device):
    step = Step(device, format, dtype=dtype)
    got = step.run(SMALL)
    step.check(got)
    want = reference.index_logits(
        step.q, step.weights, step.cache, step.table,
        positions=step.positions, sequence_ids=step.sequences, ratio=3, scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want[want > -INF].abs().max()))


@pytest.mark.parametrize(("heads", "d"), [(6, 32), (64, 128)])
def test_queries_in_fp8(heads, d, device):
    step = Step(device, "fp8", heads=heads, d=d, dtype="fp8")
    step.check(step.run(SMALL))


@pytest.mark.parametrize("block_m", [1, 2, 16])
@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_blocks_of_any_size(dtype, block_m, block_n, device):
    """Runs that end inside of a block, blocks that nobody sees, ragged ends; other ratios."""
    step, config = Step(device, "fp8", dtype=dtype), kernel.Config(block_m=block_m, block_n=block_n, num_warps=1)
    step.check(step.run(config))
    step.check(step.run(config, ratio=7), ratio=7)


@pytest.mark.parametrize(
    ("heads", "d", "format"), [(1, 16, "fp8"), (64, 128, "fp8"), (20, 96, "mxfp4"), (33, 80, "bf16")]
)
def test_heads_and_dims(heads, d, format, device):
    step = Step(device, format, heads=heads, d=d)
    step.check(step.run(SMALL))


def test_relu_is_inside_and_weights_are_outside(device):
    """A key against which all heads are negative scores 0, and a negative weight makes a score negative."""
    step = Step(device, "fp32", heads=2, dtype="fp32")
    step.q[:] = -1.0
    reference.write_rows(step.cache, torch.arange(120, device=device), torch.ones(120, 32, device=device))
    assert torch.all(step.run(SMALL)[0, :33] == 0)
    step.q[:] = 1.0
    step.weights[:] = torch.tensor([-2.0, 1.0])
    torch.testing.assert_close(step.run(SMALL)[0, :33], torch.full((33,), -32 * 0.3, device=device))


def test_strides_and_nothing(device):
    step = Step(device, "mxfp4")
    want = step.run(SMALL)
    step.q = torch.cat((step.q, step.q + 1), dim=1).transpose(0, 1).contiguous().transpose(0, 1)[:, :6]
    step.weights = torch.cat((step.weights, step.weights + 1), dim=1)[:, :6]
    step.table = torch.cat((step.table, 0 * step.table), dim=1)[:, :8]
    assert torch.equal(step.run(SMALL), want)
    empty = torch.zeros(0, 40, device=device)
    rows = step.table, step.positions[:0], step.sequences[:0]
    kernel.launch(step.q[:0], step.weights[:0], step.cache, *rows, 3, 0.3, empty, SMALL)


def test_cases_of_the_tuner(device):
    for m, sequences, x in ((5, 5, "bf16"), (9, 1, "bf16"), (9, 1, "fp8")):
        problem = IndexLogitsProblem(
            m=m, entries=40, format="fp8", sequences=sequences, heads=5, head_dim=32, page_size=8, x=x
        )
        c = testing.case(problem, device)
        c.run(kernel, SMALL)
        c.check()
        c.out[2, 7] += 1e-2 * c.out[2].masked_fill(c.out[2] == -INF, 0).abs().max()
        with pytest.raises(AssertionError, match="elements are out of bound"):
            c.check()


@pytest.mark.parametrize("fault", ["head", "power of a head", "scale of a key", "dims of a key"])
def test_wrong_scores_in_fp8_are_seen(fault, device):
    """By the bound of FP8 tensor cores too: 64 heads of one size, where each is the least part of a score."""
    problem = IndexLogitsProblem(m=3, entries=256, format="fp8", sequences=3, x="fp8")
    c = testing.case(problem, device)
    q, weights, cache, table = c.operands[:4]
    g = torch.Generator().manual_seed(1)
    q.copy_((100 * torch.randn(q.shape, generator=g)).clamp(-448, 448))
    weights.copy_(torch.randn(weights.shape, generator=g))
    slots = torch.arange(cache.slots, device=device)
    reference.write_rows(cache, slots, torch.randn(cache.slots, 128, generator=g).to(device))
    c.run(kernel, SMALL)
    c.check()
    weight, data = weights.clone(), cache.data.clone()
    if fault == "head":
        weights[1, 7] = 0
    elif fault == "power of a head":
        weights[1, 7] *= 2
    elif fault == "scale of a key":
        cache.data[table[1, 2], cache.page_size * 128 + 2] ^= 0x80  # the lowest bit of its exponent
    else:
        cache.data[table[1, 2], 16:32] = 0
    c.run(kernel, SMALL)
    weights.copy_(weight)
    cache.data.copy_(data)
    with pytest.raises(AssertionError, match="elements are out of bound"):
        c.check()


def test_the_op_and_its_mode(device):
    """Through dispatch; in batch-invariant mode every m has one way to add up heads."""
    step = Step(device, "fp8")
    step.q = step.q.transpose(1, 2).contiguous().transpose(1, 2)
    call = {"positions": step.positions, "sequence_ids": step.sequences, "ratio": 3, "scale": 0.3}
    with on_target("sm_90a"), override(kernel="triton_index_logits", config=SMALL):
        step.check(ops.index_logits(step.q, step.weights, step.cache, step.table, **call))
    with batch_invariant():
        found = set()
        for m in (1, 5, 300, 5000):
            problem = IndexLogitsProblem(m=m, entries=4096, format="fp8", sequences=min(m, 5))
            choice = choose_for("index_logits", problem, Target("sm_90a", "sm_90a"))
            found.add(registry.arithmetic(choice.kernel, problem, choice.config))
        assert found == {kernel.INVARIANT}


def test_refusals():
    def why(config: kernel.Config, **dims) -> str | None:
        return kernel.supports(IndexLogitsProblem(m=1, entries=64, **{"format": "fp8", **dims}), config)

    usual = kernel.Config()
    assert why(usual) is None
    assert why(usual, x="fp16") == "q in fp16: only fp8, bf16 and fp32 are multiplied"
    assert why(usual, x="fp8") is None
    assert why(usual, x="fp8", format="mxfp4") == "q in fp8, keys in mxfp4: both have to be"
    assert why(usual, head_dim=48, format="mxfp4") == "head_dim=48 is not a multiple of 32"
    assert why(usual, heads=129) == "heads=129: a program holds up to 128"
    assert why(kernel.Config(block_n=64, num_warps=8)) == "block_n=64 is less than 16 entries a warp: num_warps=8"


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("m", "sequences"), [(1, 1), (64, 64), (700, 3)])
def test_real_sizes(m, sequences, config, device):
    for format, x in (("fp8", "fp8"), ("fp8", "bf16"), ("mxfp4", "bf16"), ("bf16", "bf16")):
        problem = IndexLogitsProblem(m=m, entries=3000, format=format, sequences=sequences, x=x)
        if kernel.supports(problem, config) is None:
            c = testing.case(problem, device)
            c.run(kernel, config)
            c.check()


@pytest.mark.gpu
@pytest.mark.parametrize("x", ["bf16", "fp8"])
def test_a_row_is_the_same_in_any_batch(x, device):
    """To the bit, under configs of one arithmetic, wherever its run of queries begins."""
    problem = IndexLogitsProblem(m=200, entries=2000, format="fp8", sequences=2, x=x)
    c = testing.case(problem, device)
    c.run(kernel, kernel.in_arithmetic(problem, kernel.INVARIANT))
    q, weights, cache, table, positions, sequence_ids, ratio, scale = c.operands
    for rows in (slice(0, 1), slice(5, 6), slice(90, 130)):
        out = torch.empty_like(c.out[rows])
        some = table, positions[rows], sequence_ids[rows]
        for block_m in (1, 4, 16):
            config = kernel.Config(block_m=block_m)
            kernel.launch(q[rows], weights[rows], cache, *some, ratio, scale, out, config)
            assert torch.equal(out, c.out[rows])
