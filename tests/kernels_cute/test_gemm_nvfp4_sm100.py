"""gemm_nvfp4_sm100 as far as a machine without a B200 can tell: it compiles for sm_100a, fits, asks the tensor core for
the right thing, and its layouts agree with the formulas of the PTX ISA. Only the last test executes it, on a B200;
tests/ptx_emulator/test_gemm_nvfp4_sm100.py executes its PTX. `sweep_sm100` does both for the whole of SPACE.
"""

import functools
import json
import re
from pathlib import Path

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.utils import blackwell_helpers, blockscaled_layout

from fp4suite import layouts, shapes, testing
from fp4suite.built import MAX_SHARED_BYTES, TMEM_COLUMNS, Built, resources, sass
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem
from kernels_cute import build as cross, gemm_nvfp4_sm100 as kernel
from kernels_cute.gemm_nvfp4_sm100 import Config

from . import sm100_cases


def problem(**changes) -> GemmProblem:
    return GemmProblem(**{"m": 7, "n": 576, "k": 64 * 129, "act": "nvfp4"} | changes)


CONFIGS = [*sm100_cases.by_value(), Config(mma_ctas=2, cluster_m=4, cluster_n=2), Config(cluster_m=2)]
TILES = list({(c.tile_n, c.mma_ctas): c for c in CONFIGS}.values())  # one config a shape of the MMA


def test_space_holds_what_the_sets_of_configs_are_to_cover():
    every, covering = sm100_cases.every(), sm100_cases.covering()
    assert len(every) == 223
    assert Config() in every
    pairs = {(c.tile_n, c.mma_ctas, c.cluster_m, c.cluster_n) for c in every}
    assert {(c.tile_n, c.mma_ctas, c.cluster_m, c.cluster_n) for c in covering} == pairs
    for chosen in (covering, CONFIGS):
        for knob, values in kernel.SPACE.items():
            assert {getattr(c, knob) for c in chosen} == set(values)
    assert len(TILES) >= 8


# --- what the compiler makes of it ------------------------------------------------------------------------------------


@functools.cache
def built(config: Config, out: str = "bf16", segments: int = 1) -> Built:
    return kernel.build(problem(out=out, segments=segments), config)


VARIANTS = [("bf16", 1), ("fp32", 3), ("nvfp4", 3), ("bf16", 3), ("nvfp4", 1)]


def by_turns(config: Config) -> Built:
    return built(config, *VARIANTS[CONFIGS.index(config) % len(VARIANTS)])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_fit(config):
    """Outputs and segments by turns."""
    made = by_turns(config)
    found, want = resources(made), kernel.budget(config)
    assert found.spill_bytes == 0
    assert made.shared_bytes == want.shared_bytes <= MAX_SHARED_BYTES["sm_100a"]
    assert made.tmem_columns == want.tmem_columns <= TMEM_COLUMNS
    _check_instructions(made.ptx, config)


def _check_instructions(ptx: str, config: Config) -> None:
    group = f"cta_group::{config.mma_ctas}"
    atoms = 4 * (1 + max(config.tile_n, 128) // 128)  # of scales a stage: a's and b's, four along k
    assert ptx.count(f"tcgen05.mma.{group}.kind::mxf4nvf4.block_scale.block16") == 4
    assert ptx.count("tcgen05.mma.") == 4
    assert ptx.count(f"tcgen05.cp.{group}.32x128b.warpx4") == ptx.count("tcgen05.cp.") == atoms

    # loads: codes as 2D boxes, scales as 3D; each multicast exactly if CTAs of the cluster share it
    loads = re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared::\w+\.global\.\S+", ptx)
    assert sorted(loads) == ["2", "2", "3", "3"]
    shared = [config.cluster_n, config.cluster_n, config.cluster_m // config.mma_ctas, config.cluster_m]
    assert len(re.findall(r"\.multicast::cluster\S* +\[.*\], *\[%rd", ptx)) == sum(s > 1 for s in shared)

    # bytes that complete a stage: of both CTAs if they share an MMA
    expected = {int(_constant(ptx, r)) for r in re.findall(r"arrive\.expect_tx\S+ +%rd\d+, \[%r\d+\], (%?\w+);", ptx)}
    assert expected == {kernel.budget(config).stage_bytes * config.mma_ctas}

    # each read of an accumulator is complete before it is used or its place given back
    reads = len(re.findall(r"tcgen05\.ld\.sync\.aligned\.32x32b", ptx))
    assert reads == len(re.findall(r"tcgen05\.wait::ld", ptx)) >= 1
    assert "tcgen05.fence::before_thread_sync" in ptx
    assert "tcgen05.fence::after_thread_sync" in ptx


def _constant(ptx: str, operand: str) -> str:
    if not operand.startswith("%"):
        return operand
    (value,) = re.findall(rf"mov\.(?:b|u)32\s+{operand}, (\d+);", ptx)
    return value


@pytest.mark.parametrize(("config", "suffix"), [(Config(), ""), (Config(mma_ctas=2, cluster_m=2), ".2CTA")], ids=str)
def test_cubin_holds_the_block_scaled_mma(config, suffix):
    text = sass(built(config))
    assert len(re.findall(rf"\bUTCOMMA{suffix}\.4X\b", text)) == 4  # OMMA: FP4; 4X: four scales a row and MMA
    assert "UTMALDG" in text
    assert "UTMASTG" in text
    assert "UTCCP" in text


@pytest.mark.parametrize(
    "config",
    [Config(), Config(tile_n=256, mma_ctas=2, cluster_m=2), Config(tile_n=8, swap_ab=True, split_k=8)],
    ids=str,
)
def test_main_loop_issues_without_waiting(config):
    """One wait a stage, for its data; from the first copy of scales to the last MMA nothing that waits, loads or jumps.

    Fewer instructions than the tensor core's clocks for the stage: 4 MMAs of 128 x tile_n x 64, 16,384 products a
    clock, or, with few columns, the time to read 128 rows of a from shared memory, 128 bytes a clock.
    """
    body = _loop_around_mmas(sass(built(config)))
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in body]
    assert sum(o.startswith("SYNCS") for o in opcodes) == 1
    assert sum(o.startswith("BRA") for o in opcodes) == 2  # to wait longer, and back to the start
    first = next(i for i, o in enumerate(opcodes) if o.startswith("UTCCP"))
    last = max(i for i, o in enumerate(opcodes) if o.startswith("UTCOMMA"))
    allowed = ("UTCCP", "UTCOMMA", "UIADD3", "UMOV", "UISETP", "ULOP3", "USEL", "ULEA", "USHF")
    assert not [o for o in opcodes[first:last] if not o.startswith(allowed)]
    assert len(body) < 4 * max(128 * config.tile_n * 64 // 16384, 128 * 32 // 128)


def _loop_around_mmas(text: str) -> list[str]:
    """The innermost loop that holds the block-scaled MMAs, an instruction an item."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text)
    addresses = [int(address, 16) for address, _ in lines]
    mmas = [i for i, (_, code) in enumerate(lines) if "UTCOMMA" in code]
    for i in range(mmas[-1], len(lines)):
        jump = re.search(r"BRA\S*.* 0x([0-9a-f]+)$", lines[i][1])
        if jump and int(jump[1], 16) <= addresses[mmas[0]]:
            return [code for _, code in lines[addresses.index(int(jump[1], 16)) : i + 1]]
    raise AssertionError("no loop around the MMAs")


@pytest.mark.parametrize("config", TILES, ids=str)
def test_instruction_descriptor(config):
    """PTX ISA, instruction descriptor of kind::mxf4nvf4: E2M1 both, K-major, UE4M3, k = 64, dense.

    The kernel ors the scale factor ids in, which are zero here: an address of whole words.
    """
    e2m1, m = 1, 128 * config.mma_ctas
    want = e2m1 << 7 | e2m1 << 10 | config.tile_n // 8 << 17 | m // 128 << 27
    ptx = by_turns(config).ptx
    constants = {int(c) for c in re.findall(r"or\.b32\s+%r\d+, %r\d+, (\d+);", ptx)}
    assert want in constants
    assert not {c for c in constants if c >> 7 & 7 == e2m1 and c >> 10 & 7 == e2m1} - {want}


@pytest.mark.parametrize("config", TILES, ids=str)
def test_shared_memory_descriptors(config):
    """PTX ISA, shared memory descriptor: codes in 128-byte swizzle, 1024 bytes from eight rows to the next eight.

    Scales are not swizzled and read as rows of 16 bytes, eight of them 128 bytes before the next eight.
    """
    version = 1 << 46
    codes = 2 << 61 | version | 1024 // 16 << 32
    few = 2 << 61 | version if config.tile_n == 8 * config.mma_ctas else codes  # there are no next eight rows
    scales = version | 128 // 16 << 32
    ptx = by_turns(config).ptx
    found = [int(c) for c in re.findall(r"or\.b64\s+%rd\d+, %rd\d+, (\d+);", ptx)]
    assert sorted(c & ~(0x3FFF << 16) for c in found) == sorted([scales, scales, codes, few])
    assert {c >> 16 & 0x3FFF for c in found} == {1}  # of no meaning for one atom along k


# --- layouts ----------------------------------------------------------------------------------------------------------


def traced(function):
    """Run `function` where CuTe's layout algebra works, and return what it returns."""
    results = []

    def body():
        results.append(function())

    @cute.jit
    def host():
        body()

    cute.compile(host, options=cross.options("sm_100a"))
    return results[0]


def table(layout) -> torch.Tensor:
    """Every offset of a static layout, one axis for each number in its shape, in that order."""
    sizes, strides = _numbers(layout.shape), _numbers(layout.stride)
    return sum(stride * axis for stride, axis in zip(strides, axes(*sizes), strict=True))


def axes(*sizes: int) -> list[torch.Tensor]:
    """Coordinates along each axis of a grid, each to be broadcast against the others."""
    rank = len(sizes)
    return [torch.arange(n).reshape([n if i == axis else 1 for i in range(rank)]) for axis, n in enumerate(sizes)]


def tensor_memory():
    return cute.make_ptr(cutlass.Float32, 0, cute.AddressSpace.tmem, assumed_align=16)


def _numbers(nested) -> list[int]:
    return [n for x in nested for n in _numbers(x)] if isinstance(nested, tuple) else [nested]


def test_global_scales_are_blocked_128x4():
    """Where the load looks for the words of an atom is where `layouts.to_blocked_128x4` put them."""
    rows, k = 300, 832
    words = traced(lambda: table(kernel.scale_words(rows, k)))  # [128, k / 64, 3]
    sf = torch.randint(0, 127, (rows, k // 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat = layouts.to_blocked_128x4(sf.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert words.max() * 4 + 4 == len(flat)
    row, s = axes(rows, k // 16)
    word = row % 32 * 4 + row % 128 // 32  # a word holds the scales of one row and 64 of k
    assert torch.equal(flat[4 * words[word, s // 4, row // 128] + s % 4], sf)


@pytest.mark.parametrize("config", TILES, ids=str)
def test_scales_in_shared_memory(config):
    """The load writes atoms of 512 bytes, four along k and then the next 128 rows; the copy on reads them as atoms."""
    gemm, stages = kernel.GemmNvfp4Sm100(config, "bf16", 1), 2

    def tables():
        mma = gemm.tiled_mma()
        a = blockscaled_layout.make_smem_layout_sfa(mma, gemm.mma_tile, 16, stages)
        b = blockscaled_layout.make_smem_layout_sfb(mma, gemm.mma_tile, 16, stages)
        atoms = (1, gemm.sfb_atoms)
        return [(table(read), table(kernel.scale_atoms(n, stages)), n) for read, n in zip((a, b), atoms, strict=True)]

    for read, written, atoms in traced(tables):
        word, atom_k, atom, stage = axes(128, 4, atoms, stages)
        assert torch.equal(written, word + 128 * (atom_k + 4 * (atom + atoms * stage)))
        # PTX ISA, scale factor layout: offset(m, s) = m % 32 * 16 + m / 32 * 4 + s in an atom of 128 x 4
        low, high, atom, _, s, _, atom_k, stage = axes(32, 4, atoms, 16, 4, 1, 4, stages)
        want = low * 16 + high * 4 + s + 512 * (atom_k + 4 * (atom + atoms * stage))
        assert torch.equal(read, want.expand(read.shape))


@pytest.mark.parametrize("config", TILES, ids=str)
def test_scales_in_tensor_memory(config):
    """PTX ISA, scale factor layout 4X: row r in lane r % 32 of column r / 32, the scales of 64 along k in its bytes."""
    gemm = kernel.GemmNvfp4Sm100(config, "bf16", 1)
    lane, column = 4 << 16, 4  # offsets count bytes; the upper half of an address is the lane

    def tables():
        mma, one = gemm.tiled_mma(), (None, None, None, 0)
        sfa = blockscaled_layout.make_smem_layout_sfa(mma, gemm.mma_tile, 16, 1)
        sfb = blockscaled_layout.make_smem_layout_sfb(mma, gemm.mma_tile, 16, 1)
        a = blockscaled_layout.make_tmem_layout_sfa(mma, gemm.mma_tile, 16, cute.slice_(sfa, one))
        b = blockscaled_layout.make_tmem_layout_sfb(mma, gemm.mma_tile, 16, cute.slice_(sfb, one))
        return [(table(a), 128), (table(b), 128 * gemm.sfb_atoms)]

    for found, rows in traced(tables):
        low, high, warp, _, s, _, mma_k = axes(32, rows // 32, 4, 16, 4, 1, 4)
        want = (low + 32 * warp) * lane + (mma_k * (rows // 32) + high) * column + s
        assert torch.equal(found, want.expand(found.shape))


@pytest.mark.parametrize("config", TILES, ids=str)
def test_codes_in_shared_memory(config):
    """The load writes rows of 128 bytes, one after the other, and the MMA reads them in the same swizzle."""
    gemm, stages = kernel.GemmNvfp4Sm100(config, "bf16", 1), 2

    def tables():
        mma = gemm.tiled_mma()
        a = blackwell_helpers.make_smem_layout_a(mma, gemm.mma_tile, kernel.E2M1, stages)
        b = blackwell_helpers.make_smem_layout_b(mma, gemm.mma_tile, kernel.E2M1, stages)
        rows = (128, gemm.b_rows)
        written = [kernel.swizzled_rows(kernel.E2M1, n, stages) for n in rows]
        assert {str(x.inner) for x in (a, b, *written)} == {"S<3,4,3>"}  # 16-byte chunk ^= 128-byte row % 8
        return [(table(r.outer), table(w.outer), n) for r, w, n in zip((a, b), written, rows, strict=True)]

    for read, written, rows in traced(tables):
        row, k, _, mma_k, stage = axes(rows, 64, 1, 4, stages)
        assert torch.equal(read, (stage * rows + row) * 256 + 64 * mma_k + k)
        row, eight, k, _, _, stage = axes(8, rows // 8, 256, 1, 1, stages)
        want = (stage * rows + 8 * eight + row) * 256 + k
        assert torch.equal(written, want.expand(written.shape))


@pytest.mark.parametrize("config", TILES, ids=str)
def test_accumulators_in_tensor_memory(config):
    """Row r of a CTA's tile in lane r, a column of d in each column, two accumulators side by side."""
    gemm = kernel.GemmNvfp4Sm100(config, "bf16", 1)

    def found():
        return table(gemm.accumulator(tensor_memory(), gemm.tiled_mma()).layout)

    row, column, _, _, slot = axes(128, config.tile_n, 1, 1, 2)
    # with 256 columns the second lies behind the first as far as the scales leave room
    stride = min(config.tile_n, 512 - 16 - 4 * max(config.tile_n, 128) // 32 - config.tile_n)
    assert torch.equal(traced(found), (row << 16) + column + slot * stride)


@pytest.mark.parametrize(
    ("config", "out"),
    [(Config(), "bf16"), (Config(), "fp32"), (Config(), "nvfp4"), (Config(tile_n=16, swap_ab=True), "bf16")],
    ids=str,
)
def test_epilogue_gives_each_thread_a_row(config, out):
    """Thread t reads lane t, which its warp may, and all columns of a part in order: `scale` finds alpha by them."""
    gemm = kernel.GemmNvfp4Sm100(config, out, 1)
    width = gemm.finish.width

    def coordinates():
        copy, _ = gemm.finish.accumulator_copy(gemm.accumulator(tensor_memory(), gemm.tiled_mma()), width)
        box = cute.make_identity_tensor((128, width))
        threads = [copy.get_slice(t).partition_D(box) for t in (0, 1, 37, 127)]
        return [[tuple(part[e]) for e in range(cute.size(part))] for part in threads]

    want = [[(t, column) for column in range(width)] for t in (0, 1, 37, 127)]
    assert traced(coordinates) == want


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_budgets_by_hand():
    staging, barriers = 2 * 128 * 128, 1024
    one = kernel.budget(Config())
    assert one.stage_bytes == 16384 + 16384 + 2048 + 2048  # a, b, sfa, sfb
    assert one.shared_bytes == barriers + staging + 5 * 36864
    assert (one.num_stages, one.acc_stages, one.overlap) == (5, 2, 0)
    assert one.tmem_columns == 512  # 2 * 128 + 16 + 16 columns

    pair = kernel.budget(Config(tile_n=256, mma_ctas=2, cluster_m=2))
    assert pair.stage_bytes == 16384 + 16384 + 2048 + 4096  # half of b, all of sfb
    assert (pair.num_stages, pair.acc_stages, pair.tmem_columns) == (5, 1, 512)
    assert (pair.acc_stride, pair.overlap) == (208, 48)  # 208 + 256 + 16 + 32 = 512 columns

    narrow = kernel.budget(Config(tile_n=64))
    assert narrow.stage_bytes == 16384 + 8192 + 2048 + 2048  # an atom of scales covers 128 rows, whatever the tile
    assert (narrow.num_stages, narrow.acc_stages, narrow.tmem_columns) == (6, 2, 256)  # 2 * 64 + 16 + 16 columns


def test_budgets_of_sums_by_hand():
    few = kernel.budget(Config(tile_n=8, swap_ab=True))
    assert few.stage_bytes == 16384 + 1024 + 2048 + 2048  # weights, eight tokens, a whole atom of scales for either
    sums = 8 * (128 + 4) * 4  # rows of d, padded
    assert few.shared_bytes == 1024 + 5120 + 10 * 21504
    assert 5120 - 1024 < sums <= 5120
    assert (few.num_stages, few.tmem_columns) == (10, 64)  # 2 * 8 + 16 + 16 columns

    wide = kernel.budget(Config(split_k=2))
    assert wide.shared_bytes == 1024 + 128 * (128 + 4) * 4 + 4 * 36864
    assert wide.num_stages == 4


# --- what it takes and what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "knobs", "reason"),
    [
        ({"act": "bf16"}, {}, r'act="bf16": .* quantise the activations first'),
        ({"out": "fp16"}, {}, r'out="fp16" is none of bf16, fp32, nvfp4'),
        ({"out": "nvfp4", "n": 584}, {}, r"n=584 is not a multiple of 64, of which an NVFP4 output is the next k"),
        ({"k": 1056}, {}, r"k=1056 is not a multiple of 64"),
        ({"n": 260}, {}, r"n=260 is not a multiple of 8"),
        ({"segments": 9}, {}, r"segments=9 is not in 1\.\.8"),
        ({}, {"tile_n": 192}, r"tile_n=192 is none of 8, 16, 32, 64, 128, 256"),
        ({}, {"cluster_n": 16}, r"cluster_n=16 is none of 1, 2"),
        ({}, {"mma_ctas": 2}, r"cluster_m=1 is not a multiple of mma_ctas=2"),
        ({}, {"cluster_m": 4, "split_k": 4}, r"4 x 1 x 4 CTAs: a cluster has 8 at most"),
        ({}, {"tile_n": 32}, r"tile_n=32 without swap_ab: rows of a store have 64 columns"),
        ({}, {"tile_n": 8, "swap_ab": True, "mma_ctas": 2, "cluster_m": 2}, r"tile_n=8 for a pair of CTAs"),
        ({}, {"tile_n": 256, "swap_ab": True}, r"tile_n=256 with swap_ab or split_k: .* sums of 128 columns"),
        ({}, {"tile_n": 256, "split_k": 2}, r"tile_n=256 with swap_ab or split_k"),
        ({}, {"band": 8, "split_k": 2}, r"band=8 with swap_ab or split_k, which are for few tiles"),
        ({"m": 17}, {"tile_n": 16, "swap_ab": True}, r"m=17 in tiles of 16: a tile's scales start at a multiple of 32"),
        ({"k": 768}, {"split_k": 4}, r"k=768 leaves nothing for the last of 4 parts of 256"),
    ],
)
def test_refusals(changes, knobs, reason):
    p, config = problem(**changes), Config(**knobs)
    assert re.match(reason, kernel.supports(p, config))
    with pytest.raises(ValueError, match=reason):
        kernel.build(p, config)
    with pytest.raises(ValueError, match=reason):
        kernel.warm(p, config)


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_100a, got 'sm_90a'"):
        kernel.build(problem(), Config(), "sm_90a")


@pytest.fixture
def launched(monkeypatch):
    """Launches that `kernel.launch` made, each as (config, out, segments, arguments); nothing runs."""
    calls = []

    def compiled(*key):
        return lambda *arguments: calls.append((*key, arguments))

    monkeypatch.setattr(kernel, "compiled", compiled)
    return calls


def operands(m=5, n=520, k=832, segments=1) -> tuple[NVFP4Tensor, NVFP4Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    alpha = torch.linspace(1, 2, segments) if segments > 1 else None
    a = testing.random_nvfp4(m, k, gen, sf_layout="blocked_128x4")
    b = testing.random_nvfp4(n, k, gen, sf_layout="blocked_128x4", alpha=alpha)
    return a, b, torch.empty(m, n, dtype=torch.bfloat16)


def test_launch_hands_over_addresses_and_sizes(launched):
    a, b, out = operands(segments=3)
    kernel.launch(a, b, (200, 8, 312), out, Config(cluster_m=2, cluster_n=2))
    [(config, name, segments, arguments)] = launched
    assert (config, name, segments) == (Config(cluster_m=2, cluster_n=2), "bf16", 3)
    *pointers, starts, m, n, k, clusters, _ = arguments
    # operands, output, scales of an NVFP4 output (any here), alphas of a, b and such an output
    want = [a.data, a.sf, b.data, b.sf, out, a.sf, a.alpha, b.alpha, a.alpha]
    assert [p._pointer for p in pointers] == [t.data_ptr() for t in want]
    codes, scales, one = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32
    wanted = [codes, scales, codes, scales, cutlass.BFloat16, cutlass.Uint8, one, one, one]
    assert [p.dtype for p in pointers] == wanted
    assert [int(s.value) for s in starts] == [0, 200, 208]
    assert [int(x.value) for x in (m, n, k, clusters)] == [5, 520, 832, 148 // 4]


def test_launch_exchanges_the_operands_and_names_the_scales_of_the_output(launched):
    a, b, _ = operands(n=576)
    out = NVFP4Tensor.empty((5, 576), torch.tensor(0.5), "blocked_128x4")
    kernel.launch(a, b, None, out, Config(tile_n=8, swap_ab=True, split_k=2, cluster_m=2))
    [(_, name, _, arguments)] = launched
    assert name == "nvfp4"
    *pointers, _, m, n, k, clusters, _ = arguments
    want = [b.data, b.sf, a.data, a.sf, out.data, out.sf, a.alpha, b.alpha, out.alpha]
    assert [p._pointer for p in pointers] == [t.data_ptr() for t in want]
    assert [int(x.value) for x in (m, n, k, clusters)] == [5, 576, 832, 148 // 4]


def test_launch_of_no_rows_does_nothing(launched):
    a, b, out = operands(m=0)
    kernel.launch(a, b, None, out, Config())
    assert launched == []


def test_launch_refuses_what_the_kernel_cannot_read(launched):
    a, b, out = operands()
    config = Config()

    def refused(error, match, *, a=a, b=b, segments=None, out=out):
        with pytest.raises(error, match=match):
            kernel.launch(a, b, segments, out, config)

    refused(TypeError, "a must be an NVFP4Tensor: .* got Tensor", a=torch.zeros(5, 832, dtype=torch.bfloat16))
    refused(TypeError, "out must be bfloat16, float32 or an NVFP4Tensor, got torch.float16", out=out.half())
    refused(ValueError, "a must have its scales in blocked_128x4, got linear", a=a.with_sf_layout("linear"))
    refused(ValueError, "b must have its scales in blocked_128x4, got linear", b=b.with_sf_layout("linear"))
    refused(ValueError, r"got \[5, 512\]", out=out[:, :512])
    refused(ValueError, "out must be contiguous", out=torch.empty(520, 5, dtype=torch.bfloat16).T)
    refused(ValueError, "segments .* sum to n=520", segments=(512,))
    refused(ValueError, "a must have one alpha", a=NVFP4Tensor(a.data, a.sf, torch.ones(2), a.sf_layout))
    shifted = torch.empty(a.data.numel() + 8, dtype=torch.uint8)[8:].view(a.data.shape)
    refused(ValueError, "a must start at multiples of 16 bytes", a=NVFP4Tensor(shifted, a.sf, a.alpha, a.sf_layout))
    assert launched == []


def test_launch_refuses_an_output_that_the_kernel_cannot_write(launched):
    a, b, _ = operands(n=576)

    def refused(match, shape, alpha, sf_layout="blocked_128x4"):
        with pytest.raises(ValueError, match=match):
            kernel.launch(a, b, None, NVFP4Tensor.empty(shape, alpha, sf_layout), Config())

    refused(r"need an out \[m, n\], got \[5, 512\]", (5, 512), torch.ones(()))
    refused("out must have its scales in blocked_128x4, got linear", (5, 576), torch.ones(()), "linear")
    refused(r"out must have one alpha, got \[2\]", (5, 576), torch.ones(2))
    assert launched == []


def test_one_compiled_kernel_for_every_size():
    assert kernel.compiled(Config(), "bf16", 1) is kernel.compiled(Config(), "bf16", 1)


def test_default_config_takes_every_gemm_of_the_models():
    for name in ("pro", "flash"):
        config = json.loads((Path(__file__).parents[2] / "model" / "configs" / f"{name}.json").read_text())
        found = shapes.problems(config, "gemm_nvfp4", arch="sm_100a", m=(1, 300))
        assert len(found) > 10
        assert [kernel.supports(x.problem, Config()) for x in found] == [None] * len(found)


# --- numbers ----------------------------------------------------------------------------------------------------------

B200 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (10, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not B200, reason="executes sm_100a code, which the GPU here cannot")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_numbers(config):
    """Ragged, single-tile and many-wave problems against the FP64 product, and twice the same bits."""
    for changes in ({}, {"m": 1, "n": 64, "k": 64}, {"m": 129, "out": "fp32", "segments": 3}, {"m": 4000, "n": 7168}):
        if kernel.supports(problem(**changes), config) is not None:
            continue
        case = testing.case(problem(**changes), "cuda", seed=1)
        case.run(kernel, config)
        case.check()
        first = case.out.clone()
        case.run(kernel, config)
        assert torch.equal(first, case.out)
