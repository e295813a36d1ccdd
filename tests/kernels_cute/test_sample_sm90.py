"""sample_sm90: its refusals and machine code anywhere, the reference's tokens in the emulator and on a GPU."""

import functools
import itertools
import re

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, reference, table, testing
from fp4suite.built import resources, sass
from fp4suite.problem import SampleProblem
from kernels_cute import sample_sm90 as kernel
from kernels_cute.sample_sm90 import Config
from ptx_emulator import emulate

from ..index_scores import INF, KINDS, NAN

SMALL = Config(threads=32, each=8, cluster=2)  # 512 logits
SHAPES = [Config(threads=t, each=e, cluster=c) for t, e, c in itertools.product(*kernel.SPACE.values())]
CONFIGS = [c for c in SHAPES if kernel.supports(SampleProblem(m=64, vocab=129280), c) is None]


def check(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, config: Config = SMALL) -> list[int]:
    out = torch.full((len(logits),), -7, dtype=torch.int64, device=logits.device)
    operands = logits, *(x.to(logits.device) for x in (temperature, top_p, uniform))
    kernel.launch(*operands, out, config)
    assert out.tolist() == reference.sample(*operands).tolist()
    return out.tolist()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniforms(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def rows_of_every_kind(vocab: int) -> Tensor:
    """What stresses a choice of the highest; normal, whole and BF16 logits; neighbours; few that have mass."""
    g = torch.Generator().manual_seed(vocab)
    made = [make(g, vocab) for make in KINDS.values()]
    normal = 3 * torch.randn(5, vocab, generator=g)
    neighbours = (torch.tensor([8.0]).view(torch.int32) + torch.randperm(vocab, generator=g).int()).view(torch.float32)
    fallen = torch.where(torch.arange(vocab) % 97 == 3, 0.0, -40.0)
    made += [normal[0], normal[1].round(), normal[2].bfloat16().float(), 1e-5 * normal[3], neighbours, fallen]
    made.append(torch.nn.functional.pad(normal[4, : vocab // 3], (0, vocab - vocab // 3), value=-INF))
    return torch.stack(made)


def asked(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures, nuclei and uniform numbers of every kind, mixed."""
    g = torch.Generator().manual_seed(seed)
    kinds = (
        torch.tensor([1.0, 0.7, 1.0, 1.5, 0.0, 3.0, 0.1, 1e-30, 1e30, INF, 1.0]),
        torch.tensor([1.0, 0.95, 0.6, 0.9, 1 - 2.0**-24, 0.3, 0.0, 1e-9, 2.0, NAN]),
        torch.tensor([0.0, 0.5, 1 - 2.0**-24, 0.9, 0.3, 0.7, 1.0]),  # the last is no number of [0, 1)
    )
    temperature, top_p, uniform = (x[torch.randint(0, len(x), (rows,), generator=g)] for x in kinds)
    return temperature, top_p, uniform


for_emulator = functools.cache(kernel.compiled.__wrapped__)  # with PTX, apart from what tests on a GPU compile


@pytest.fixture
def emulated(request, monkeypatch):
    """Emulating sm_90a; the test says whether races are looked for."""
    monkeypatch.setattr(kernel, "compiled", for_emulator)
    with emulate("sm_90a", schedule="late", races=getattr(request, "param", False)) as device:
        yield device


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "shipped_dir", lambda: tmp_path)
    dispatch.reread_tables()
    yield
    dispatch.reread_tables()


# --- anywhere ---------------------------------------------------------------------------------------------------------


build = functools.cache(kernel.build)


@pytest.mark.parametrize("config", [kernel.default(SampleProblem(m=m, vocab=129280)) for m in (4, 12, 64)], ids=str)
def test_compiles_without_spills(config):
    assert resources(built := build(SampleProblem(m=4, vocab=129280), config)).spill_bytes == 0
    assert built.shared_bytes == config.shared_bytes


def test_a_mass_takes_as_many_instructions_as_stated():
    """Of a loop over four logits, two atomic operations each; nothing in it is slower than a multiplication."""
    code = sass(build(SampleProblem(m=4, vocab=129280), Config()))
    opcodes = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*?);", code, re.M)
    ends = {int(m[1], 16) for at, op, rest in opcodes if op == "BRA" and (m := re.search(r"0x([0-9a-f]+)", rest))}
    loops = []
    for n, (at, op, rest) in enumerate(opcodes):
        target = re.search(r"0x([0-9a-f]+)", rest) if op == "BRA" else None
        if target and int(target[1], 16) < int(at, 16):
            loops.append([o for a, o, _ in opcodes[:n] if int(a, 16) >= int(target[1], 16)])
    assert ends
    weighing = min((x for x in loops if x.count("ATOMS.ADD") == 8), key=len)
    assert len(weighing) <= 4 * 32
    assert not any(o.startswith(("MUFU", "F2I", "I2F", "FRND", "LDL")) for o in weighing)


def test_every_kind_of_row(emulated):
    logits = rows_of_every_kind(500)
    check(logits, *asked(len(logits), 0))


@pytest.mark.parametrize(
    ("config", "dtype"), [(Config(threads=64, each=8, cluster=1), torch.bfloat16), (SMALL, torch.float16)], ids=str
)
def test_rows_of_any_type_and_stride(config, dtype, emulated):
    wide = (4 * draw(4, 300)).to(dtype)
    for logits in (wide[::2], wide[1::2, 5:], wide[:2, 8:299]):
        check(logits, torch.tensor([0.7, 1.0]), torch.tensor([0.9, 1.0]), uniforms(2))


def test_strides_of_fp32_rows(emulated):
    wide = 4 * draw(4, 261)
    for logits in (wide[:2], wide[::2, 3:], wide[:2, 4:256]):
        check(logits, torch.tensor([0.7, 0.0]), torch.tensor([0.9, 1.0]), uniforms(2))


@pytest.mark.parametrize("vocab", [1, 8, 40])
def test_short_rows(vocab, emulated):
    """Nothing for some of the CTAs."""
    check(2 * draw(3, vocab), torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 0.8, 1.0]), uniforms(3))


def test_equal_logits_are_drawn_by_index(emulated):
    """Ties at the end of the nucleus and in the middle of what is kept, over all CTAs; -0 equals 0."""
    logits = torch.tensor([0.0, 1.0, -0.0, 1.0, -1.0]).repeat(100).expand(3, -1)
    check(logits, torch.ones(3), torch.tensor([1.0, 0.6, 0.9]), torch.tensor([0.5, 0.74, 1 - 2.0**-24]))
    equal = check(torch.zeros(3, 500), torch.ones(3), torch.full((3,), 0.5), torch.tensor([0.0, 0.1, 0.999]))
    assert equal == [0, 25, 249]


@pytest.mark.parametrize("emulated", [True], indirect=True, ids=["races"])
def test_races(emulated):
    """Rows that take every way: greedy, no top, few tokens, many of several keys and of one."""
    logits = rows_of_every_kind(500)[[-7, 5, -7, -4, -6]]
    temperature, top_p = torch.tensor([0.0, 1.0, 0.7, 1.0, 1.5]), torch.tensor([1.0, 0.5, 0.9, 0.6, 0.8])
    check(logits, temperature, top_p, uniforms(5))


def test_what_is_not_finite(emulated):
    logits = draw(6, 60)
    logits[0, 7], logits[1, [5, 50]], logits[2, [3, 9]] = NAN, INF, NAN
    logits[3, 30:], logits[4] = -INF, -INF
    logits[5, 2], logits[5, 4] = -NAN, INF
    temperature = torch.tensor([1.0, 0.5, NAN, 1.0, 1.0, 1.0])
    tokens = check(logits, temperature, torch.full((6,), 0.99), torch.tensor([0.9, 0.7, 0.6, 1 - 2.0**-24, 0.4, 0.2]))
    assert tokens[:3] == [7, 50, 9]
    assert tokens[3] < 30


def test_the_op_in_the_emulator(emulated, no_tables):
    """Through dispatch, with operands that are not contiguous."""
    logits, two = (2 * draw(100, 2)).T, torch.tensor([[0.8, 0.9], [1.0, 0.3]]).T
    temperature, top_p, uniform = two[:, 0], two[:, 1], torch.tensor([0.3, 0.6])
    with dispatch.recording() as choices:
        got = ops.sample(logits, temperature, top_p, uniform)
    assert got.tolist() == reference.sample(logits, temperature, top_p, uniform).tolist()
    assert [c.kernel for c in choices] == ["cute_sample_sm90"]


def test_dispatch(no_tables):
    def chosen(arch: str, **sizes: int) -> str:
        return dispatch.choose_for("sample", SampleProblem(**sizes), dispatch.Target(arch, arch)).kernel

    assert chosen("sm_90a", m=4, vocab=129280) == chosen("sm_90a", m=4096, vocab=160000) == "cute_sample_sm90"
    assert chosen("sm_100a", m=4, vocab=129280) == chosen("sm_90a", m=4, vocab=2**20) == "triton_sample"
    with dispatch.batch_invariant():
        assert chosen("sm_90a", m=4, vocab=129280) == "cute_sample_sm90"


@pytest.mark.parametrize("m", [1, 12, 64])
@pytest.mark.parametrize("vocab", [1, 4096, 50257, 129280, 151936, 262144])
def test_default_configs(m, vocab):
    problem = SampleProblem(m=m, vocab=vocab)
    config = kernel.default(problem)
    assert kernel.supports(problem, config) is None
    assert vocab <= 4096 or config.capacity < 4 * vocab


def test_refusals():
    def why(vocab: int, x: str = "fp32", **config: int) -> str | None:
        return kernel.supports(SampleProblem(m=1, vocab=vocab, x=x), Config(**config))

    assert why(129280) is None
    assert "vocab=131073 is more than" in str(why(131073))
    assert why(9, "fp64") == "logits in fp64, not one of fp32, bf16, fp16"
    assert why(9, each=128) == "each=128 logits are more than 64 a thread"
    assert "of shared memory, of 232448" in str(why(9, threads=1024))
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="vocab=513 is more than"):
        kernel.launch(torch.zeros(4, 513), ones, ones, ones, ones.long(), SMALL)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.launch(torch.zeros(2, 4).T, ones, ones, ones, ones.long(), SMALL)
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(SampleProblem(m=1, vocab=9), SMALL, "sm_100a")


def test_no_rows(emulated):
    none = torch.ones(0)
    kernel.launch(torch.empty(0, 40), none, none, none, none.long(), SMALL)
    assert not emulated.launches


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_of_every_kind_on_a_gpu(config, device):
    for vocab in (129280, 129277, 100):
        logits = rows_of_every_kind(vocab).to(device).repeat(4, 1)
        first = check(logits, *asked(len(logits), vocab), config)
        assert check(logits, *asked(len(logits), vocab), config) == first


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "x"), [(1, "fp32"), (4, "bf16"), (64, "fp32"), (300, "fp16")])
def test_real_sizes(m, x, device):
    c = testing.case(SampleProblem(m=m, vocab=129280, x=x), device)
    c.run(kernel, kernel.default(c.problem))
    c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    c = testing.case(SampleProblem(m=5, vocab=129280), device)
    config = kernel.default(c.problem)
    kernel.warm(c.problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for _ in range(3):
        c.operands[0].copy_(torch.roll(c.operands[0], 12345, 1))
        c.poison()
        graph.replay()
        c.check()
