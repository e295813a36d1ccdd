"""gemm_nvfp4_sm90_fp8: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import functools
import itertools
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fp4suite import dispatch, layouts, ops, reference, testing
from fp4suite.built import Built, resources, sass
from fp4suite.formats import BLOCK, E2M1_VALUES, NVFP4Tensor
from fp4suite.problem import GemmProblem
from fp4suite.reference import fp8
from kernels_cute import build, gemm_nvfp4_sm90_fp8 as kernel
from kernels_cute.gemm_nvfp4_sm90_fp8 import SPACE, Config
from kernels_cute.gemm_nvfp4_sm90_wgmma import registers_at_launch
from ptx_emulator import emulate

Problem = partial(GemmProblem, act="fp8", order=kernel.WEIGHT_ORDER)
BIG = Problem(m=256, n=7168, k=3072)
SMALL = Config(tile_m=16, groups_n=1, groups_k=2, stages=4)
WIDE = Config(tile_m=256)
DEEP = Config(tile_m=192, promote=4)
CONFIGS = [
    SMALL,
    Config(tile_m=32, groups_n=1, stages=3, share=2),
    Config(tile_m=32, groups_n=4, stages=2),
    Config(tile_m=32, groups_n=2, groups_k=2, stages=4, split=2, share=2),
    Config(tile_m=128, groups_n=1, groups_k=2, stages=4, split=2),
    Config(tile_m=128, groups_n=2, stages=3, share=2),
    Config(tile_m=128, groups_n=1, stages=2, blocks=2),
    Config(tile_m=192, groups_n=1, stages=3, split=3),
    Config(tile_m=256, groups_n=1, stages=2, blocks=2),
    replace(WIDE, stages=3),
    replace(WIDE, stages=3, share=2),
    Config(tile_m=64, groups_n=3, stages=2, split=2),
    Config(tile_m=8, groups_n=1, groups_k=2, stages=4),
    Config(tile_m=8, groups_n=3, stages=2, split=3),
    Config(tile_m=16, groups_n=2, stages=3, promote=2),
    Config(tile_m=64, groups_n=1, groups_k=2, stages=4, promote=2),
    Config(tile_m=32, groups_n=2, stages=3, split=2, promote=4),
    Config(tile_m=16, groups_n=1, groups_k=2, stages=4, split=2, promote=4),
    Config(tile_m=192, stages=3, promote=4),
    Config(tile_m=128, stages=3, share=2, tail=2),
    Config(tile_m=128, groups_n=1, stages=3, share=2, tail=2, promote=2),
    replace(WIDE, stages=3, share=2, tail=2),
]
FEW_TOKENS = Problem(m=12, n=4096, k=4096)
REPEATED = [SMALL, WIDE, Config(tile_m=64, groups_n=1, groups_k=2, split=2)]

# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", REPEATED, ids=str)
def test_what_is_repeated_on_a_gpu_is_supported(config):
    assert kernel.supports(FEW_TOKENS, config) is None


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (replace(BIG, act="bf16"), Config(), 'activations in bf16: this kernel takes fp8 (act="fp8")'),
        (replace(BIG, act="nvfp4"), Config(), "activations in nvfp4"),
        (replace(BIG, out="fp16"), Config(), "output in fp16"),
        (replace(BIG, order="rows"), Config(), "weights in the order rows"),
        (replace(BIG, n=7208), Config(), "n must be a multiple of 64, k of 128"),
        (replace(BIG, k=3136), Config(), "n must be a multiple of 64, k of 128"),
        (replace(BIG, segments=9), Config(), "segments=9 is not in 1..8"),
        (BIG, Config(tile_m=24), "tile_m=24 is none of"),
        (BIG, Config(tile_m=256, groups_n=3), "1 x 3 warpgroups: the registers do not hold"),
        (BIG, Config(tile_m=128, groups_n=3), "1 x 3 warpgroups: the registers do not hold"),
        (BIG, Config(tile_m=128, groups_n=2, stages=2, blocks=2), "2 x 2 warpgroups: the registers do not hold"),
        (BIG, Config(groups_n=1, groups_k=2, stages=2), "2 stages: 2 warpgroups hold 1 each"),
        (BIG, Config(groups_n=1, groups_k=2, stages=3), "stages=3 is not a multiple of 2"),
        (BIG, Config(share=4), "share=4 is none of 1, 2"),
        (replace(BIG, k=512), Config(split=3), "too little for the last of 3 parts"),
        (replace(BIG, k=512), Config(groups_k=2, split=4), "too little for the last of 4 parts of 2 warpgroups"),
        (BIG, Config(stages=12), "bytes of shared memory"),
        (BIG, Config(tile_m=8, share=2), "tile_m=8 is not shared by 2 CTAs in parts of 8 tokens"),
        (BIG, Config(promote=3), "promote=3 is none of 1, 2, 4"),
        (BIG, replace(WIDE, promote=2), "promote=2 is for tiles of at most 192 tokens"),
        (BIG, Config(tail=3), "tail=3 is none of 1, 2"),
        (BIG, Config(tail=2), "tail=2 is for 128 or 256 tokens, share=2 and split=1"),
        (BIG, Config(tile_m=64, share=2, tail=2), "tail=2 is for 128 or 256 tokens, share=2 and split=1"),
        (BIG, Config(share=2, tail=2, split=2), "tail=2 is for 128 or 256 tokens, share=2 and split=1"),
        (BIG, Config(groups_n=1, groups_k=2, share=2, tail=2), "tail=2 is for 128 or 256 tokens, share=2 and split=1"),
        (replace(BIG, k=128), Config(share=2, tail=2), "k=128 is too little for 2 CTAs"),
        (BIG, replace(WIDE, groups_n=1, share=2, tail=2), "is for two warpgroups an SM: one alone spills"),
        (BIG, Config(tile_m=16, groups_n=2, groups_k=2, blocks=2), "2 x 4 warpgroups: the registers do not hold"),
        (BIG, Config(tile_m=64, groups_n=4, split=2, promote=2), "1 x 4 warpgroups: the registers do not hold"),
        (BIG, Config(tile_m=64, groups_n=1, groups_k=2, blocks=2), "2 x 2 warpgroups: the registers do not hold"),
        (BIG, Config(groups_n=2, split=2, promote=2), "1 x 2 warpgroups: the registers do not hold"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


@pytest.mark.parametrize("k", [128, 384, 1536, 7168, 16384])
@pytest.mark.parametrize("n", [64, 192, 512, 1536, 7168, 65536])
def test_there_is_a_default_for_every_problem(n, k):
    for m in (1, 8, 33, 64, 65, 128, 200, 256, 512, 2048, 16384):
        for out, segments in (("bf16", 1), ("fp32", 3)):
            problem = Problem(m=m, n=n, k=k, out=out, segments=segments)
            assert kernel.supports(problem, kernel.default(problem)) is None


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(BIG, Config(), "sm_100a")


def room(c: Config) -> int:
    """Registers that sums leave to a thread."""
    return registers_at_launch(c.blocks * c.threads) - c.registers


def scarcest() -> list[Config]:
    """Of SPACE, for every number of tokens and way of the sums, what has the fewest registers for them; but for ways
    that `test_in_the_emulator` compiles with as few, and those that leave 32 or more, which all use ten fewer than they
    have. Up to 64 tokens, whose sums are few, all pairs of two of what else makes a way.
    """
    found: dict[tuple, tuple[tuple, Config]] = {}
    for values in itertools.product(*SPACE.values()):
        c = Config(**dict(zip(SPACE, values, strict=True)))
        if kernel.supports(Problem(m=4096, n=65536, k=8192), c) is None:
            order = (room(c), -c.share, -c.groups_n)
            found[way(c)] = min(found.get(way(c), (order, c)), (order, c), key=lambda one: one[0])
    emulated = {(way(c), room(c)) for c in CONFIGS}
    left = [c for _, c in found.values() if (way(c), room(c)) not in emulated and room(c) < 32]
    odd = {c: (c.tile_m.bit_length() + (c.groups_k > 1) + (c.split > 1) + (c.promote > 1)) % 2 for c in left}
    return [c for c in left if c.tile_m > 64 or odd[c]]


def way(c: Config) -> tuple:
    return c.tile_m, c.groups_k, c.split > 1, c.tail, c.promote > 1


@pytest.mark.parametrize(("number", "config"), list(enumerate(scarcest())), ids=str)
def test_no_way_of_the_sums_spills(number, config):
    """All other points of SPACE leave at least as many registers; the outputs take turns."""
    out = ("bf16", "fp32")[number % 2]
    check_code(kernel.build(Problem(m=4096, n=65536, k=8192, segments=2, out=out), config), config, out)


def check_code(built: Built, config: Config, out: str) -> None:
    assert resources(built).spill_bytes == 0
    assert built.shared_bytes == kernel.shared_bytes(config, out)
    assert ".ftz" not in built.ptx  # codes pass through subnormal numbers


MAIN_LOOPS = [SMALL, WIDE, DEEP, Config(tile_m=8, groups_n=4), Config(share=2, tail=2), replace(WIDE, share=2, tail=2)]


@functools.cache
def machine_code(config: Config) -> str:
    return sass(kernel.build(BIG, config))


@pytest.mark.parametrize("config", MAIN_LOOPS, ids=str)
def test_main_loop_keeps_the_tensor_cores_busy(config):
    """A step is decoded once for all its MMAs, none is waited for right after its issue, sums are added once a run.

    ptxas serialises MMAs where registers do not suffice, and would say so by waiting more often.
    """
    code = machine_code(config)
    loop = main_loop(code)
    assert count(r"QGMMA\.", code) == count(r"QGMMA\.", loop) == 4 * config.runs
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
    assert waits == re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", loop)
    if config.promote == 1:  # sums of all runs but the last, the MMAs before the last, the last
        assert waits == ["0"] * (config.runs - 1) + ["1", "0"]
    else:  # the step before, whose stage is released; the MMAs before the last; the last, at the end of a run or of all
        assert waits == ["1", "1", "0", "0"]
    # tables of two blocks: 2 x 4 products and conversions of two numbers each, and as many look-ups as words
    halves = {loop: 2, code: 4}  # and before the loop: one half decoded, the next one's tables
    for text, number in halves.items():
        assert count(r"F2FP\.SATFINITE\.E4M3\.F16", text) == 8 * number
        assert count(r"HMUL2", text) == 9 * number
        assert count(r"F2FP\.F16\.E4M3", text) == number
    selectors = count(r"PRMT", loop)
    assert 16 <= selectors <= 17
    fresh = config.tile_m // 2
    assert fresh == count(r"FADD", loop)
    assert count(r"LDS\.128", loop) == 2


def test_a_step_takes_few_instructions():
    """64 x 128 weights by 256 tokens: 128 additions, and fewer than 180 to decode, multiply and go on."""
    loop = main_loop(machine_code(WIDE)).splitlines()
    assert 128 + 100 < len(loop) < 128 + 180


def count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b{instruction}", code))


def main_loop(code: str) -> str:
    """The instructions of the shortest loop around every QGMMA."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    lines = [(int(address, 16), text) for address, text in found]
    multiplied = [address for address, text in lines if "QGMMA" in text]
    loops = []
    for end, text in lines:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= multiplied[0] and multiplied[-1] <= end:
            loops.append([text for address, text in lines if int(jump[1], 16) <= address <= end])
    return "\n".join(min(loops, key=len))


# --- decoding, in Python integers -------------------------------------------------------------------------------------


def halves_of(word):
    return np.array([word & 0xFFFF, word >> 16], np.uint16).view(np.float16)


def word_of_halves(halves):
    low, high = halves.astype(np.float16).view(np.uint16).tolist()
    return low | high << 16


def rounded(numbers):
    """FP16 numbers -> their E4M3 bytes, nearest even."""
    return torch.from_numpy(numbers.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).tolist()


@pytest.fixture
def in_integers(monkeypatch):
    """The kernel's instructions on Python integers of 32 bits."""

    def multiplied(kind, x, scales, half):
        assert kind == "f16x2"
        exact = halves_of(x).astype(np.float64) * np.float64(halves_of(scales)[half])
        product = exact.astype(np.float16)
        assert (product.astype(np.float64) == exact).all()  # no product is rounded in FP16
        return word_of_halves(product)

    def permuted(x, y, selectors):
        found = (x | y << 32).to_bytes(8, "little")
        digits = [selectors >> 4 * i & 15 for i in range(4)]
        assert max(digits) < 8  # bit 3 would replicate a sign
        return int.from_bytes(bytes(found[digit] for digit in digits), "little")

    def converted(x, y):
        return int.from_bytes(bytes(rounded(np.concatenate([halves_of(x), halves_of(y)]))), "little")

    monkeypatch.setattr(kernel, "Uint32", int)
    monkeypatch.setattr(kernel, "mul_by_half", multiplied)
    monkeypatch.setattr(kernel, "permute", permuted)
    monkeypatch.setattr(kernel, "f16x2_to_e4m3x4", converted)


def packed_word(codes):
    """What the order makes of eight neighbours of K."""
    data = torch.zeros(64, 32, dtype=torch.uint8)
    for i, code in enumerate(codes):
        data[0, i // 2] |= code << 4 * (i % 2)
    layouts.to_fragments_(data, torch.zeros(64, 4, dtype=torch.uint8), kernel.WEIGHT_ORDER)
    return int.from_bytes(bytes(data.view(-1)[:4].tolist()), "little")


def test_every_scale_has_its_table_and_every_code_its_place(in_integers):
    """All scales under all exponents of a row that may hold them, in both halves of a word; under each, every code in
    every place of a word. The sign of zero counts."""
    turned = [[(7 * turn + 5 * place) % 16 for place in range(8)] for turn in range(16)]  # each code once in each place
    words = [(packed_word(codes), codes) for codes in turned]
    assert all({codes[place] for codes in turned} == set(range(16)) for place in range(8))
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    seen = 0
    for exponent in range(-12, 4):
        largest = (
            126 if exponent == 3 else (exponent + 12) * 8 + 7
        )  # of the scales that a row of this exponent may have
        for byte in range(largest + 1):
            scale = np.float16(float(values[byte]) * 2.0**-exponent)
            assert float(scale) == float(values[byte]) * 2.0**-exponent <= 60
            want = (magnitudes * float(scale)).to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
            for row in range(2):
                scales = word_of_halves(np.roll(np.array([scale, np.float16(1.5)]), row))
                low, high = kernel.table(scales, row)
                assert list((low | high << 32).to_bytes(8, "little")) == want
            for word, codes in words:
                first, second = kernel.decode_word(word, low, high)
                got = (first | second << 32).to_bytes(8, "little")
                assert list(got) == [want[code & 7] | (code & 8) << 4 for code in codes]
            seen += 1
    assert seen == sum(range(8, 129, 8)) - 1


def test_codes_do_not_touch_each_other(in_integers):
    """Every code in every place beside zeros and beside negative sixes, looked up among eight different bytes."""
    low, high = 0x03020100, 0x07060504
    for others in (0, 15):
        for place in range(8):
            for code in range(16):
                codes = [others] * 8
                codes[place] = code
                first, second = kernel.decode_word(packed_word(codes), low, high)
                got = (first | second << 32).to_bytes(8, "little")
                assert list(got) == [c & 7 | (c & 8) << 4 for c in codes]


# --- what it is launched with -----------------------------------------------------------------------------------------


def weight(n, k, gen, *, adversarial=False):
    """In the kernel's order, with row exponents."""
    return testing.random_nvfp4(n, k, gen, adversarial=adversarial).with_order(kernel.WEIGHT_ORDER).prepare_fp8()


def activations(shape, gen):
    return fp8.quantize_fp8(testing.random_activations(shape, gen))


def test_launch_refuses_what_it_would_misread():
    gen = torch.Generator().manual_seed(0)
    a, b, out = activations((3, 1024), gen), weight(64, 1024, gen), torch.empty(3, 64)
    with pytest.raises(ValueError, match="activations in bf16"):
        kernel.launch(torch.zeros(3, 1024, dtype=torch.bfloat16), b, None, out, Config())
    with pytest.raises(ValueError, match=r"no row exponents: FP8 GEMMs read what NVFP4Tensor.prepare_fp8\(\) gives"):
        kernel.launch(a, replace(b, row_exponent=None), None, out, Config())
    with pytest.raises(TypeError, match="out must be bfloat16 or float32"):
        kernel.launch(a, b, None, out.half(), Config())
    with pytest.raises(ValueError, match="do not make"):
        kernel.launch(a, b, None, out[:2], Config())
    with pytest.raises(ValueError, match="rows of out must start at multiples of 16 bytes"):
        kernel.launch(a, b, None, torch.empty(3, 66)[:, :64], Config())
    odd = torch.zeros(3 * 1024 + 1, dtype=torch.uint8)[1:].view(3, 1024).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        kernel.launch(replace(a, data=odd), b, None, out, Config())
    with pytest.raises(ValueError, match=r"a\.scale contiguous"):
        kernel.launch(replace(a, scale=torch.ones(6)[::2]), b, None, out, Config())
    with pytest.raises(ValueError, match="weights in the order rows"):
        kernel.launch(a, b.with_order("rows"), None, out, Config())


def test_empty_m_is_nothing_to_do():
    gen = torch.Generator().manual_seed(0)
    kernel.launch(activations((0, 1024), gen), weight(64, 1024, gen), None, torch.empty(0, 64), Config())


@pytest.fixture
def in_emulator(monkeypatch):
    """run(launch, schedule): two clusters, or three, whatever the tiles: one of them takes what a last wave leaves."""
    kernel.compiled.cache_clear()
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: 1 + config.tail)

    def run(launch, schedule="late"):
        with emulate("sm_90a", schedule=schedule):
            launch()

    yield run
    kernel.compiled.cache_clear()


@pytest.mark.parametrize(("config", "schedule"), list(zip(CONFIGS, itertools.cycle(("late", "eager")))), ids=str)
def test_in_the_emulator(config, schedule, in_emulator, monkeypatch):
    """Ragged m and n, two tiles a cluster; every element against the FP64 product, every access against the others'."""
    step = kernel.STEP * config.groups_k * config.split
    rounds = 2 if config.promote == 1 else config.promote + 1  # a run of steps, and one that is cut short
    k = max(rounds * step, (config.stages + 1) * kernel.STEP) if config.split == 1 else rounds * step - kernel.STEP
    tiles = config.tail  # beside a ragged one
    rows = 2 if config.tail > 1 or (config.tile_m in (8, 64) and config.split == 1) else 1
    if config.tail == 1:  # as many clusters as give each two tiles
        monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: rows)
    problem = Problem(m=rows * config.tile_m - 3, n=config.tile_n * tiles + 64, k=k, out="fp32", segments=2)
    case = testing.case(problem, "cpu", 1)
    in_emulator(lambda: case.run(kernel, config), schedule)
    case.check()
    compiled = kernel.compiled(config, kernel._variant(problem, config))
    assert kernel.compiled.cache_info().misses == 1  # what has run
    check_code(build.built(compiled, "sm_90a"), config, "fp32")


@pytest.mark.parametrize("config", [SMALL, Config(tile_m=64, stages=2)], ids=str)
def test_every_code_under_every_scale_is_rounded_once(config, in_emulator):
    """a picks single columns of b, so that d is b in E4M3: every code in every place, under every scale."""
    n, k = 128, 256
    data = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(2, 128).repeat(n // 2, 1)
    scales = torch.arange(n, dtype=torch.uint8).clamp(max=126)
    for top in (None, 126):  # a row's own largest scale, or one of 448 beside it
        sf = scales[:, None].repeat(1, k // BLOCK)
        if top is not None:
            sf[:, -1] = top
        b = NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), torch.ones(()))
        b = b.with_order(kernel.WEIGHT_ORDER).prepare_fp8()
        out = torch.full((k, n), float("nan"))
        in_emulator(lambda: kernel.launch(fp8.quantize_fp8(448 * torch.eye(k)), b, None, out, config))  # noqa: B023
        torch.testing.assert_close(out, 448 * fp8.dequant_fp8_weight(b).T, rtol=0, atol=0)
        if top is None:  # nothing vanishes, and what needs no more than four bits is kept
            exact = reference.dequant_nvfp4(b.with_order("rows"), torch.float32).T
            assert torch.equal(out == 0, exact == 0)
            assert (out == 448 * exact).float().mean() > 0.7


def test_single_elements_land_where_they_belong_in_the_emulator(in_emulator):
    """One element of b a row, another column in each, beside tokens that count columns."""
    config = Config(tile_m=16, groups_n=1, stages=2)
    n, k = 64, 256
    for shift in (0, 64, 128, 192):
        columns = (torch.arange(n) * 37 + shift) % k
        codes = torch.zeros(n, k, dtype=torch.uint8)
        codes[torch.arange(n), columns] = 2  # 1
        data = codes[:, ::2] | codes[:, 1::2] << 4
        sf = torch.full((n, k // BLOCK), 4.0).to(torch.float8_e4m3fn)
        b = NVFP4Tensor(data, sf, torch.ones(())).with_order(kernel.WEIGHT_ORDER).prepare_fp8()
        low, high = (torch.arange(k) % 16).float(), (torch.arange(k) // 16).float()
        a = torch.stack([low, high, -low])
        out = torch.full((3, n), float("nan"))
        in_emulator(lambda: kernel.launch(fp8.quantize_fp8(a), b, None, out, config))  # noqa: B023
        rounded = fp8.dequant_fp8(fp8.quantize_fp8(a))
        torch.testing.assert_close(out, rounded[:, columns] * 4, rtol=2e-7, atol=0)


def test_the_bound_of_a_check_follows_the_runs():
    """An error that runs of 512 may have is not one of runs of 128; one that none may have is not passed by either."""
    case = testing.case(Problem(m=9, n=64, k=2048, out="fp32"), "cpu", 1)
    a, b, _ = case.operands
    a64, b64 = fp8.dequant_fp8(a, torch.float64), fp8.dequant_fp8_weight(b, torch.float64) * b.alpha.double()
    runs = zip(a64.abs().split(128, -1), b64.abs().split(128, -1), strict=True)
    unit = sum((x @ y.T) ** 2 for x, y in runs).sqrt() * 2.0**-13
    for units, promote, passes in ((15, 1, True), (30, 1, False), (30, 4, True), (100, 4, False)):
        case.out.copy_(a64 @ b64.T + units * unit)
        case.launched[:] = [kernel, Config(promote=promote)]
        if passes:
            case.check()
        else:
            with pytest.raises(AssertionError, match="out of bound"):
                case.check()


# --- on a GPU ---------------------------------------------------------------------------------------------------------

DEFAULT = Config()


def _gemm(a, b, config=DEFAULT, segments=None):
    """launch into NaN, FP32."""
    out = torch.full((a.shape[0], b.shape[0]), float("nan"), device=b.device)
    kernel.launch(a, b.with_order(kernel.WEIGHT_ORDER).prepare_fp8(), segments, out, config)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
def test_every_code_under_every_scale_on_a_gpu(config, device):
    n, k = 128, 512
    data = torch.arange(256, device=device, dtype=torch.int32).to(torch.uint8).expand(n, k // 2).contiguous()
    scales = torch.arange(n, device=device, dtype=torch.uint8).clamp(max=126)
    sf = scales[:, None].expand(n, k // BLOCK).contiguous().view(torch.float8_e4m3fn)
    b = NVFP4Tensor(data, sf, torch.ones((), device=device))
    got = _gemm(fp8.quantize_fp8(448 * torch.eye(k, device=device)), b, config)
    torch.testing.assert_close(got, 448 * fp8.dequant_fp8_weight(b.prepare_fp8()).T, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*CONFIGS, *testing.configs(kernel, most=80)], ids=str)
def test_configs(config, device):
    for problem in (
        Problem(m=13, n=576, k=6144, out="fp32", segments=2),
        Problem(m=1, n=192, k=3072),
        Problem(m=300, n=192, k=1536, segments=2),
    ):
        if reason := kernel.supports(problem, config):
            with pytest.raises(ValueError, match=re.escape(reason)):
                testing.case(problem, device).run(kernel, config)
            continue
        case = testing.case(problem, device, seed=1)
        case.run(kernel, config)
        case.check()


@pytest.mark.gpu
def test_ragged_m(device):
    for m in [*range(1, 66), 127, 128, 129, 255, 257, 1000]:
        config = Config(tile_m=next((t for t in SPACE["tile_m"] if t >= m), 64 if m % 2 else 256))
        case = testing.case(Problem(m=m, n=192, k=1024), device, seed=m)
        case.run(kernel, config)
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 2048, 7168), (5, 1024, 4096), (33, 1536, 1536), (256, 7168, 2048), (2048, 4096, 4096)]
)
def test_model_shapes(m, n, k, device):
    for segments, out in ((1, "bf16"), (2, "fp32")):
        problem = Problem(m=m, n=n, k=k, out=out, segments=segments)
        case = testing.case(problem, device, seed=7)
        case.run(kernel, kernel.default(problem))
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, DEFAULT], ids=str)
def test_alpha_acts_on_the_sum(config, device):
    """2^40 and 2^-40 overflow or vanish if folded into scales; as powers of two they must leave all bits in place."""
    gen = torch.Generator(device=device).manual_seed(3)
    a, b = activations((9, 1024), gen), testing.random_nvfp4(128, 1024, gen, adversarial=True)
    one = _gemm(a, NVFP4Tensor(b.data, b.sf, torch.ones((), device=device)), config)
    alphas = torch.tensor([2.0**40, 2.0**-40, -1.0], device=device)
    segments = (8, 72, 48)
    got = _gemm(a, NVFP4Tensor(b.data, b.sf, alphas), config, segments)
    torch.testing.assert_close(
        got, one * alphas.repeat_interleave(torch.tensor(segments, device=device)), rtol=0, atol=0
    )


@pytest.mark.gpu
def test_sums_depend_on_neither_tile_nor_other_rows(device):
    """Without parts of K, a row's bits are the same in any batch and under any tile."""
    gen = torch.Generator(device=device).manual_seed(6)
    b = testing.random_nvfp4(256, 2048, gen, adversarial=True)
    a = activations((300, 2048), gen)
    whole = _gemm(a, b, WIDE)
    for config in (Config(tile_m=16), Config(tile_m=32, groups_n=4), Config(tile_m=192, share=2)):
        assert torch.equal(_gemm(a, b, config), whole)
        assert torch.equal(_gemm(replace(a, data=a.data[7:8], scale=a.scale[7:8]), b, config), whole[7:8])


@pytest.mark.gpu
def test_strided_rows_are_read_and_written_in_place(device):
    gen = torch.Generator(device=device).manual_seed(6)
    b = weight(128, 1024, gen)
    a = activations((30, 1024), gen)
    wide = torch.zeros(30, 2048, dtype=torch.uint8, device=device)
    wide[:, 1024:] = a.data.view(torch.uint8)
    for config in (SMALL, DEFAULT):
        frame = torch.full((30, 200), float("nan"), device=device)
        kernel.launch(replace(a, data=wide[:, 1024:].view(torch.float8_e4m3fn)), b, None, frame[:, 8:136], config)
        torch.testing.assert_close(frame[:, 8:136], _gemm(a, b, config), rtol=0, atol=0)
        assert frame[:, :8].isnan().all()
        assert frame[:, 136:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", REPEATED, ids=str)
def test_repeated_runs_and_graph_replays_agree_to_the_bit(config, device):
    kernel.warm(FEW_TOKENS, config)
    case = testing.case(FEW_TOKENS, device, seed=8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    case.poison()
    with torch.cuda.graph(graph, stream=stream):
        case.launch(kernel, config)
    graph.replay()
    case.check()
    first = case.out.clone()
    for _ in range(20):
        case.poison()
        graph.replay()
        assert torch.equal(case.out, first)
        case.run(kernel, config)
        assert torch.equal(case.out, first)


@pytest.mark.gpu
def test_a_chain_of_ops_waits_for_what_it_reads(device):
    """Each GEMM starts before the quantiser before it has ended, and must read its rows and scales whole."""
    gen = torch.Generator(device=device).manual_seed(10)
    n = 2048
    weights = [weight(n, n, gen) for _ in range(4)]
    weights = [replace(w, alpha=torch.full((), 1 / 256, device=device)) for w in weights]
    start = testing.random_activations((300, n), gen)

    def chain(wait):
        x = start
        for w in weights:
            x = ops.gemm_nvfp4(x, w, act="fp8")
            if wait:
                torch.cuda.synchronize()
            x = x / x.float().std().clamp(min=1e-3).bfloat16()
        return x

    want = chain(True)
    assert want.isfinite().all()
    for _ in range(10):
        assert torch.equal(chain(False), want)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    gen = torch.Generator(device=device).manual_seed(9)
    b = weight(256, 1024, gen)
    a = testing.random_activations((2, 5, 1024), gen)
    with dispatch.recording() as choices:
        got = ops.gemm_nvfp4(a, b, act="fp8", out_dtype=torch.float32)
    assert [c.kernel for c in choices] == ["triton_quantize_fp8", "cute_gemm_nvfp4_sm90_fp8"]
    rows = fp8.dequant_fp8(fp8.quantize_fp8(a.flatten(0, 1)), torch.float64)
    alpha = b.alpha.double().expand(256)
    run = testing.fp8_run(choices[1].config)
    testing.assert_fp8_gemm_close(got.flatten(0, 1), rows, fp8.dequant_fp8_weight(b, torch.float64), alpha, run)
