"""How long a config would take on hardware that is not here: a roofline with waves, occupancy and loads in flight.

    us = launch + norm(dram, waves * (latency + norm(load, mma, alu)))

    of a persistent kernel, whose next tile is on its way before this one is done: latency + waves * norm(...)

dram: all unique bytes at the bandwidth of device memory. Per wave of CTAs: load, what one CTA reads through L2 at the
rate that its own loads in flight sustain (Little's law) or its share of L2's; mma, on the padded tile; alu, for
decoding and quantising. The norm is a sharp one (p = 6) in place of a maximum: overlap is never perfect, and a plateau
of equals would leave the choice to chance.

It ranks, it does not predict: whoever shows its figures marks them as predicted. `MACHINES` says where its constants
are from; those marked "estimate" have no better source than reasoning.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fp4suite.built import Resources
from fp4suite.formats import index_layout
from fp4suite.problem import (
    ELEMENT_BYTES,
    CombineProblem,
    CompressKvPairProblem,
    CompressKvProblem,
    CsaQueriesProblem,
    DequantProblem,
    EmbedProblem,
    GemmProblem,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPostProblem,
    HyperConnectionPreProblem,
    IndexLogitsProblem,
    IndexQueryProblem,
    IndexTopkProblem,
    KvNormRopeInsertProblem,
    PermuteProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    RouteProblem,
    SampleProblem,
    SwigluProblem,
    SwigluQuantizeProblem,
)
from fp4suite.reference.compressor import LANES

SHARPNESS = 6.0
NVFP4_BYTES = 9 / 16  # an element with its share of the block scale
BYTES_IN_FLIGHT_A_THREAD = 64  # four 16-byte loads, what a Triton kernel of this kind has outstanding; estimate
INSTRUCTIONS = {  # ALU instructions an element: estimates, from counting the steps of the algorithms
    DequantProblem.op: 12,
    QuantizeProblem.op: 12,
    QuantizeFp8Problem.op: 6,
    RmsnormQuantizeProblem.op: 21,  # SASS of one program, by its elements; so the next ones
    RmsNormProblem.op: 12,
    SwigluQuantizeProblem.op: 28,
    SwigluProblem.op: 37,
    QnormRopeProblem.op: 22,
    QnormRopeQuantizeProblem.op: 44,
    KvNormRopeInsertProblem.op: 34,
    RopeInverseProblem.op: 7,
    RopeInverseInPlaceProblem.op: 10,
    RopeInverseQuantizeProblem.op: 32,
    IndexQueryProblem.op: 24,
}
POOL_INSTRUCTIONS = 38  # of a row and channel, the norm and encoding of the entry included; from SASS
POOL_SHARED = 0.25  # more, each time that twice as many threads share a channel; from SASS
NARROW_US = 1.0  # whole entries of several warps, fewer than four channels a thread: 4.6 us, four 3.6 (H100, m=4)
COUNT_INSTRUCTIONS = 70  # of a score that is held: fifteen counts, then its place; estimate, as the next two
COUNT_OVERHEAD = 15 * 30 * 32  # of a warp that counts: sums over warps, the next middle
BIN_INSTRUCTIONS = 18  # of a score that is counted into bins; from SASS, as the next one
BIN_OVERHEAD = 400  # of a thread: the window, the sums of bins, its slots
SCAN_INSTRUCTIONS = 8  # of a score that streams by
TOPK_PROGRAMS = 132  # that share a row's maxima among them where queries are few
LOGITS_INSTRUCTIONS = 2.8  # of a product, all of them counted: 360 in SASS for 128 of a thread
SCORE_INSTRUCTIONS = 55  # of an expert's score; from SASS
SAMPLE_INSTRUCTIONS = 100  # a logit, in the three launches that read it
HELD_INSTRUCTIONS = 52  # a logit that a cluster holds, read, weighed and looked for twice; from SASS, as the next one
HELD_OVERHEAD = 600  # of a thread: sums of bins, those of the cluster, tokens that are ranked
BLOCKS_SHARE = 0.8  # of its instructions takes a row that is inserted by blocks; from SASS: 520 for 660
RMS_SUM_INSTRUCTIONS = 5  # of an element: widened, squared, added; from SASS
THREAD_US = 1e-3  # an instruction of a thread whose SM has little else to issue: two cycles; estimate
MSE_INSTRUCTIONS = 60  # more, for the rule that tries several scales
SM90_TILE_US = 0.5  # decode, barrier, MMA of one tile of K; measured on an H100 at m=1: 20 us for 32, 29 us for 56
SM100_EPILOGUE_INSTRUCTIONS = {"bf16": 1.5, "fp32": 1.9, "nvfp4": 5.7}  # a number of d: counted in SASS, one alpha
SKINNY_INSTRUCTIONS = 3.4  # a weight, everything counted: 218 in its SASS for 64 weights of a lane
# SMs that clusters of so many CTAs reach on an H100, whose GPCs have 16 and 18: seen with globaltimer and smid
CLUSTER_SMS = {1: 132, 2: 132, 3: 126, 4: 120, 6: 114, 8: 112, 16: 112}
DECODE_INSTRUCTIONS = 1.5  # NVFP4 -> BF16 by bit arithmetic, four elements a word; estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """dram, l2: GB/s. mma_tflops: dense, by activation format. latency_us: of a load from device memory, under load.

    l2_bytes: what L2 keeps. start_us: from one CTA's start to the next one's, somewhere on the GPU.
    """

    sms: int
    clock_ghz: float
    dram: float
    l2: float
    mma_tflops: dict[str, float]
    launch_us: float
    latency_us: float
    l2_bytes: float
    registers: int = 65_536  # per SM, here and below: CUDA programming guide, compute capabilities
    threads: int = 2_048
    shared_bytes: int = 233_472  # 228 KiB, of which each CTA takes 1 KiB for the system
    ctas: int = 32
    start_us: float = 6.4e-4  # empty programs on an H100: 32,768 of a warp take 21.1 us, 4,096 of four 3.7

    @property
    def ingest_per_us(self) -> float:
        """Bytes a microsecond that one SM takes in: 64 a clock."""
        return 64 * self.clock_ghz * 1e3

    @property
    def alu_per_us(self) -> float:
        """Instructions a microsecond of one SM: 128 lanes."""
        return 128 * self.clock_ghz * 1e3


MACHINES = {
    # dram, launch, latency: a plain read kernel in a CUDA graph on an H100 80GB HBM3: 2.88 TB/s at 1 GiB, 7.6 us at
    # 16 MiB, 0.98 us empty. mma: cuBLAS BF16 there. l2: public micro-benchmarks of H100
    "sm_90a": Machine(
        sms=132,
        clock_ghz=1.755,
        dram=2880,
        l2=5500,
        mma_tflops={"bf16": 800, "nvfp4": 800, "fp8": 1600},
        launch_us=0.98,
        latency_us=0.8,
        l2_bytes=50e6,
    ),
    # dram: published NVFP4 quantiser on B200 (6.7 of 8 TB/s). mma: published cuBLAS NVFP4, 8192 cubed. l2: H100's, by
    # SMs and clock. launch and latency: H100's. Estimates all, until one is measured
    "sm_100a": Machine(
        sms=148,
        clock_ghz=1.85,
        dram=6700,
        l2=6500,
        mma_tflops={"bf16": 2000, "fp8": 4000, "nvfp4": 5400},
        launch_us=0.98,
        latency_us=0.8,
        l2_bytes=126e6,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One launch.

    Per CTA: threads; bytes loaded and stored, its share of a multicast; bytes of loads in flight; bytes ingested by its
    SM, multicast or not; MMA flops of the padded tile; ALU instructions. act: format of the MMA's activations. ramps:
    how often a CTA waits with nothing in flight. serial_us: steps of a CTA that wait for each other. persistent: one
    CTA an SM takes tile after tile (of which `ctas` is the number). unshared_bytes: what all waves read from memory if
    L2 kept nothing from one to the next.
    """

    ctas: int
    threads: int
    cta_bytes: float
    in_flight: float
    ingested: float = 0.0
    cta_flops: float = 0.0
    cta_instructions: float = 0.0
    act: str = "bf16"
    ramps: int = 1
    serial_us: float = 0.0
    persistent: bool = False
    unshared_bytes: float = 0.0

    def in_turns(self, turns: int) -> "Work":
        """Where a CTA does the work of so many, one after the other."""
        return dataclasses.replace(
            self,
            ctas=math.ceil(self.ctas / turns),
            cta_bytes=self.cta_bytes * turns,
            ingested=self.ingested * turns,
            cta_instructions=self.cta_instructions * turns,
            serial_us=self.serial_us * turns,
        )


def predict_us(problem: Problem, config: Any, arch: str, resources: Resources | None = None) -> float:
    """Microseconds of one launch with a cold L2. Without `resources`, occupancy is taken from the config alone.

    Raises ValueError for an architecture or an op that it has no model of.
    """
    if arch not in MACHINES:
        raise ValueError(f"arch must be one of {', '.join(MACHINES)}, got {arch!r}")
    machine = MACHINES[arch]
    if isinstance(problem, GemmProblem) and hasattr(config, "groups_k"):
        return _wgmma_us(problem, config, machine)
    w = work(problem, config, arch, resources)
    room = 1 if w.persistent else occupancy(w.threads, resources, machine)
    resident = min(room, math.ceil(w.ctas / machine.sms))
    active = min(w.ctas, resident * machine.sms)
    rate = min(w.in_flight / machine.latency_us, machine.l2 * 1e3 / active)  # bytes a microsecond, of one CTA
    load = max(w.cta_bytes / rate, w.ingested * resident / machine.ingest_per_us)
    mma = w.cta_flops * resident * machine.sms / (machine.mma_tflops[w.act] * 1e6)
    alu = w.cta_instructions * resident / machine.alu_per_us
    wave, ramp = _norm(load, mma, alu, w.serial_us), w.ramps * machine.latency_us
    waves = math.ceil(w.ctas / (resident * machine.sms))
    busy = ramp + waves * wave if w.persistent else waves * (ramp + wave)
    # what does not fit into L2 is read again in every wave
    again = max(0.0, w.unshared_bytes - problem.bytes) * max(0.0, 1 - machine.l2_bytes / problem.bytes)
    dram = (problem.bytes + again) / (machine.dram * 1e3)
    starting = 0.0 if w.persistent else w.ctas * machine.start_us
    return machine.launch_us + _norm(dram + machine.latency_us, busy, starting)


def roof_us(problem: Problem, arch: str, act: str = "bf16") -> float:
    """The time that no kernel can beat: unique bytes at full bandwidth, or flops at full rate, whichever is longer."""
    machine = MACHINES[arch]
    flops = (
        problem.flops / (machine.mma_tflops[act] * 1e6)
        if isinstance(problem, GemmProblem | IndexLogitsProblem)
        else 0.0
    )
    return max(problem.bytes / (machine.dram * 1e3), flops)


def occupancy(threads: int, resources: Resources | None, machine: Machine) -> int:
    """CTAs that fit on one SM together."""
    registers, shared = (resources.registers, resources.shared_bytes) if resources else (64, 0)
    by_registers = machine.registers // (max(8, -(-registers // 8) * 8) * threads)  # in units of 8 a thread
    by_shared = machine.shared_bytes // (shared + 1024)
    return max(1, min(by_registers, by_shared, machine.threads // threads, machine.ctas))


def work(problem: Problem, config: Any, arch: str, resources: Resources | None = None) -> Work:
    """What a launch of a config does, read from the names of its knobs. Raises ValueError for an op without a model."""
    for kind, model in _MODELS.items():
        if isinstance(problem, kind):
            return model(problem, config, arch, resources)
    raise ValueError(f"no cost model of {problem.op}")


def _rows(problem: Any, config: Any, arch: str, resources: Resources | None) -> Work:
    """A memory-bound kernel: one program a [block_m, block_k] tile of the output; without block_k, whole rows.

    block_h: heads of a token in place of columns. groups: so many matrices.
    """
    block_m, groups = getattr(config, "block_m", 1), getattr(problem, "groups", 1)
    if hasattr(config, "block_h"):
        block_k = config.block_h * (problem.k // problem.heads)
    else:
        block_k = getattr(config, "block_k", None)
    block_k = min(block_k or problem.k, problem.k)
    ctas = math.ceil(problem.m / block_m) * math.ceil(problem.k / block_k) * groups
    threads = 32 * config.num_warps
    elements = block_m * block_k
    many = dataclasses.replace(problem, m=1 << 20)  # where what all rows share, such as a norm's weight, counts nothing
    cta_bytes = elements * many.bytes / (many.m * many.k * groups)
    instructions = INSTRUCTIONS[problem.op] + (MSE_INSTRUCTIONS if getattr(problem, "rule", "") == "mse" else 0)
    return Work(
        ctas=ctas,
        threads=threads,
        cta_bytes=cta_bytes,
        in_flight=min(cta_bytes, threads * BYTES_IN_FLIGHT_A_THREAD),
        cta_instructions=elements * instructions,
    )


def _rmsnorm(
    problem: RmsnormQuantizeProblem | RmsNormProblem, config: Any, arch: str, resources: Resources | None
) -> Work:
    """Rows in parts, each of which sums them as a whole. A row that is held is asked for at once; of others each tile
    is waited for again.
    """
    whole, k, block_m = _rows(problem, config, arch, resources), problem.k, getattr(config, "block_m", 1)
    tiles = math.ceil(math.ceil(k / config.tile_k) / config.parts)
    summed = block_m * k * RMS_SUM_INSTRUCTIONS
    instructions = summed + (whole.cta_instructions - summed) / config.parts
    return dataclasses.replace(
        whole,
        ctas=whole.ctas * config.parts,
        cta_bytes=whole.cta_bytes / config.parts,
        in_flight=min(whole.cta_bytes / config.parts, float(block_m * k * ELEMENT_BYTES[problem.x])),
        ingested=block_m * k * ELEMENT_BYTES[problem.x] * (1 + (not config.held) / config.parts),
        cta_instructions=instructions,
        ramps=1 if config.held or tiles == 1 else 1 + math.ceil(tiles / 2),
        serial_us=instructions / whole.threads * THREAD_US,
    )


def _inserted(
    problem: KvNormRopeInsertProblem | QnormRopeQuantizeProblem, config: Any, arch: str, resources: Resources | None
) -> Work:
    """Rows, by blocks with fewer instructions."""
    whole = _rows(problem, config, arch, resources)
    if not config.by_blocks:
        return whole
    less = dataclasses.replace(whole, cta_instructions=whole.cta_instructions * BLOCKS_SHARE)
    return less.in_turns(getattr(config, "turns", 1))


def _norm_and_insert(problem: QkvNormRopeInsertProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """Programs of two kinds, counted as so many of the mean of both; those that wait longest say how long."""
    norm = _rmsnorm(problem.norm, config.norm, arch, resources)
    insert = _rows(problem.insert, config.insert, arch, resources)
    ctas = norm.ctas + insert.ctas

    def mean(a: float, b: float) -> float:
        return (norm.ctas * a + insert.ctas * b) / ctas

    return Work(
        ctas=ctas,
        threads=norm.threads,
        cta_bytes=mean(norm.cta_bytes, insert.cta_bytes),
        in_flight=mean(norm.in_flight, insert.in_flight),
        ingested=mean(norm.ingested, insert.ingested),
        cta_instructions=mean(norm.cta_instructions, insert.cta_instructions),
        ramps=max(norm.ramps, insert.ramps),
        serial_us=max(norm.serial_us, insert.serial_us),
    )


def _site(problem: HyperConnectionPostProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program block_d columns of all streams."""
    p, threads = problem, 32 * config.num_warps
    cta_bytes = config.block_d * (2 * p.n + 1) * ELEMENT_BYTES[p.x]
    return Work(
        ctas=p.m * math.ceil(p.k / config.block_d),
        threads=threads,
        cta_bytes=cta_bytes,
        in_flight=min(cta_bytes, threads * BYTES_IN_FLIGHT_A_THREAD),
        cta_instructions=config.block_d * p.n * (2 * p.n + 4),
    )


def _fold(problem: Any, config: Any, arch: str, resources: Resources | None) -> Work:
    """The product of the streams with fn, in programs that keep their columns; the fold that follows counts as ramps
    and a second reading.
    """
    if hasattr(config, "cluster"):
        return _fold_by_clusters(problem, config)
    p, threads = problem, 32 * config.num_warps
    size, outputs = ELEMENT_BYTES[p.x], p.n if isinstance(p, HyperConnectionHeadProblem) else p.n * (p.n + 2)
    post = isinstance(p, HyperConnectionPostPreProblem)
    parts, blocks = math.ceil(p.k / config.block_d), math.ceil(p.m / config.block_m)
    groups = max(1, min(blocks, config.programs // parts))
    steps = math.ceil(blocks / groups)
    columns, rows = config.block_d * p.n, min(config.block_m, p.m)
    moved = (2 * p.n + 1) / p.n if post else 1  # streams in and out, and y
    step = rows * columns * size * moved
    part, fn = 4 * 32 * rows, 4 * outputs * columns
    return Work(
        ctas=parts * groups,
        threads=threads,
        cta_bytes=steps * (step + part) + fn,
        in_flight=max(fn, max(1, config.num_stages - 1) * step),  # fn is asked for at once
        # thread instructions a number of a step, counted in SASS of sm_90a (Triton 3.7): 8 without making it, 27 with
        cta_instructions=steps * config.block_m * columns * (27 if post else 8) + 32 * columns * 10,
        ramps=2 + (not config.ahead),  # fn, then streams; the fold's, which begins when all parts are there
        unshared_bytes=p.bytes + p.m * p.n * p.k * size,
    )


def _fold_by_clusters(problem: Any, config: Any) -> Work:
    """Clusters that take block_m tokens a step, each CTA its share of the columns: streams once, fn's terms (two BF16
    numbers of each of its own) from L2.

    What a step waits for is fitted to 25 timings on an H100 (d of 4096 and 7168, m of 256 to 4096), of which none is
    off by more than 12 %, but for 16 tokens a step of d=4096, which took 97 us, not 134: its bytes, terms of 64 columns
    of a stream at a time, groups of such columns where it makes streams, and the way through the cluster.
    """
    p, post = problem, isinstance(problem, HyperConnectionPostPreProblem)
    blocks, columns = math.ceil(p.m / config.block_m), p.k // config.cluster
    clusters = max(1, min(blocks, CLUSTER_SMS[config.cluster] // config.cluster))
    steps = math.ceil(blocks / clusters)
    terms = 2 * (p.n if isinstance(p, HyperConnectionHeadProblem) else p.n * (p.n + 2))
    of_tokens = config.block_m * columns * ELEMENT_BYTES[p.x] * (2 * p.n + 2 if post else p.n + 1)  # in and out
    groups = columns / 64
    return Work(
        ctas=clusters * config.cluster,
        threads=config.threads,
        cta_bytes=steps * (of_tokens + 2 * terms * columns * p.n),
        in_flight=config.block_m * columns * p.n * ELEMENT_BYTES[p.x],
        cta_flops=steps * 2.0 * 64 * terms * columns * p.n,
        cta_instructions=steps
        * config.block_m
        * columns
        * p.n
        * (15 if post else 5),  # from the steps of the algorithm
        ramps=8,  # fn, its terms, streams, then what CTAs send each other, thrice
        serial_us=steps * (of_tokens / 30e3 + groups * (0.05 * p.n / config.stages + (0.05 if post else 0.0)) + 0.25),
        persistent=True,
    )


def _route(problem: RouteProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program block_m tokens, held in registers. A table waits for the token, and for its logits unless `ahead`."""
    p, block_m = problem, config.block_m
    programs, read = math.ceil(p.m / block_m), block_m * p.bytes / max(1, p.m)
    if config.presort:
        of_token = 20.0 * p.experts + 32 * (230 + 12 * p.topk)  # SASS of sm_90a
        turns = min(config.turns, max(1, programs))
        moved = _moved(math.ceil(programs / turns), turns * read, config.num_warps, turns * block_m * of_token, ramps=2)
        # tokens one behind the other, with their logits there
        return dataclasses.replace(moved, serial_us=(turns - 1) * of_token / 32 * 2 * THREAD_US)
    if p.choice != "table":
        instructions = block_m * p.experts * (90.0 + 7 * p.topk)  # SASS of sm_90a, by experts
        return _moved(programs, read, config.num_warps, instructions, ramps=2)
    instructions = block_m * (p.topk * SCORE_INSTRUCTIONS + 32 * 200)
    if config.ahead:
        logits = block_m * p.experts
        return _moved(programs, read + 4.0 * logits, config.num_warps, instructions + 2.0 * logits, ramps=3)
    return _moved(programs, read, config.num_warps, instructions, ramps=4)


def _permute(problem: PermuteProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """All pairs of slots at once; or three launches: pairs within blocks, and two that read and write their counts."""
    slots = problem.m * problem.topk
    if hasattr(config, "block_p"):
        programs = math.ceil((slots + problem.experts + 1) / config.block_p)
        return _moved(programs, 4.0 * slots, config.num_warps, 4.0 * config.block_p * slots, ramps=2)
    blocks, counts = math.ceil(slots / config.block_s), 20.0 * problem.experts  # bytes and instructions of a block's
    instructions = 3.0 * config.block_s**2 + counts
    return _moved(blocks, 32.0 * config.block_s + counts, config.num_warps, instructions, ramps=6)


def _combine(problem: CombineProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program a tile of the output; the places of its rows are found in its own search or by a launch before."""
    p, elements = problem, config.block_m * config.block_k
    slots = p.m * p.topk
    searched = 2.0 * p.topk * slots * config.block_m if config.search else 0.0
    return _moved(
        math.ceil(p.m / config.block_m) * math.ceil(p.k / config.block_k),
        elements * ELEMENT_BYTES[p.x] * (p.topk + p.shared + 1) + (4.0 * slots if config.search else 0.0),
        config.num_warps,
        elements * 4 * (p.topk + 2) + searched,
        ramps=5 if not config.search else 3 + (config.num_warps > 1),  # warps that search together wait for each other
    )


def _sample(problem: SampleProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """Four launches, of which three read the logits; or a cluster a row, which is read once."""
    p = problem
    if hasattr(config, "cluster"):
        return _moved(
            p.m * config.cluster,
            p.vocab / config.cluster * ELEMENT_BYTES[p.x],
            config.threads // 32,
            config.threads * (config.each * HELD_INSTRUCTIONS + HELD_OVERHEAD),
            ramps=8,
        )
    chunks = math.ceil(p.vocab / config.chunk)
    return _moved(
        p.m * chunks, 3 * config.chunk * ELEMENT_BYTES[p.x], config.num_warps, config.chunk * SAMPLE_INSTRUCTIONS,
        ramps=8,
    )  # fmt: skip


def _embed(problem: EmbedProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program block_k columns of a token, which waits for its id, then for its row."""
    p = problem
    moved = config.block_k * (ELEMENT_BYTES[p.x] + p.n * ELEMENT_BYTES[p.out])
    ctas = p.m * math.ceil(p.k / config.block_k)
    return _moved(ctas, moved, config.num_warps, config.block_k * (3 + p.n), ramps=2)  # SASS: 6.6 of four streams


def _compress(problem: CompressKvProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program an entry, or block_c of its channels; norm and encoding follow, in a second launch if in parts."""
    p, pooled = problem, problem.overlaps * problem.ratio
    block_c = min(config.block_c, p.head_dim)
    parts = math.ceil(p.head_dim / block_c)
    cta_bytes = (p.bytes / max(1, p.sequence_count + p.entries)) / parts
    # of a long pool, threads beyond one for four channels share a channel's rows, whose sums then cross warps
    shared = 8 / pooled * max(0.0, math.log2(128 * config.num_warps / block_c)) if pooled > 2 * LANES else 0.0
    instructions = pooled * block_c * POOL_INSTRUCTIONS * (1 + POOL_SHARED * shared)
    narrow = NARROW_US if parts == 1 and config.num_warps > 1 and block_c < 128 * config.num_warps else 0.0
    return Work(
        ctas=(2 * p.sequence_count + (math.ceil(p.m / p.ratio) if p.m >= pooled else 0)) * parts,
        threads=32 * config.num_warps,
        cta_bytes=cta_bytes,
        in_flight=min(cta_bytes, 8.0 * pooled * block_c),
        cta_instructions=instructions,
        ramps=2 if parts == 1 else 3,
        serial_us=instructions / (32 * config.num_warps) * THREAD_US + narrow,
    )


def _compress_pair(problem: CompressKvPairProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """Programs of both in one launch, or keys in one that waits for the entries'."""
    entries, keys = (
        _compress(part, SimpleNamespace(block_c=part.head_dim, num_warps=warps), arch, resources)
        for part, warps in zip(problem.parts, (config.num_warps, config.key_warps), strict=True)
    )
    both = _together(entries, keys)
    return dataclasses.replace(both, ramps=entries.ramps + keys.ramps) if config.apart else both


def _queries(problem: CsaQueriesProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    queries, indexer = problem.parts
    return _together(
        _rows(queries, config.of_queries, arch, resources), _rows(indexer, config.of_indexer, arch, resources)
    )


def _together(a: Work, b: Work) -> Work:
    """Programs of two kinds in one launch: as many as there are, each as the mean of them."""
    ctas = a.ctas + b.ctas

    def mean(name: str) -> float:
        return float((a.ctas * getattr(a, name) + b.ctas * getattr(b, name)) / max(1, ctas))

    return dataclasses.replace(
        a,
        ctas=ctas,
        cta_bytes=mean("cta_bytes"),
        in_flight=mean("in_flight"),
        cta_instructions=mean("cta_instructions"),
        ramps=max(a.ramps, b.ramps),
        serial_us=max(a.serial_us, b.serial_us),
    )


def _topk(problem: IndexTopkProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """A program a query: what it holds is counted over and over. Longer rows have maxima, by a launch before.

    Or a cluster a query, whose CTAs hold all of a row and count it into bins.
    """
    if hasattr(config, "cluster"):
        held = config.threads * config.each
        return _moved(
            problem.m * config.cluster,
            4.0 * min(held, problem.entries),
            config.threads // 32,
            held * BIN_INSTRUCTIONS + config.threads * BIN_OVERHEAD,
            ramps=4 + (config.cluster > 1) * 3,
        )
    p, k, top, levels = problem, min(problem.topk, problem.entries), problem.entries, 0
    while top > config.held:
        top, levels = math.ceil(top / config.group), levels + 1
    members = k * config.group if levels else 0
    streamed = p.entries * min(1.0, p.m / TOPK_PROGRAMS) if levels else 0.0
    held = 2.0 ** math.ceil(math.log2(top)) + levels * 2.0 ** math.ceil(math.log2(max(members, 1)))
    counted = held * COUNT_INSTRUCTIONS + (1 + levels) * config.num_warps * COUNT_OVERHEAD
    return _moved(
        p.m, 4.0 * (top + levels * members + streamed), config.num_warps, counted + streamed * SCAN_INSTRUCTIONS,
        ramps=6 + 5 * levels,
    )  # fmt: skip


def _logits(problem: IndexLogitsProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """Keys of block_n entries once, then block_m queries one after the other, on their way in num_stages."""
    p, own = problem, min(config.block_m, max(1, problem.m // problem.sequence_count))
    query = p.heads * (p.head_dim * ELEMENT_BYTES[p.x] + 4)
    row = index_layout(p.format, 1, p.head_dim)
    if hasattr(config, "key_stages"):  # warpgroups that take items in turn, all of an SM's
        keys, tiles = config.tile_n * (row.row_bytes + row.scale_bytes), math.ceil(p.entries / config.tile_n)
        rounds = math.ceil(p.m * tiles / (MACHINES[arch].sms * own))
        own = math.ceil(p.m * tiles / (MACHINES[arch].sms * rounds))  # as many items for each SM
        products = own * config.tile_n * p.heads
        return Work(
            ctas=math.ceil(p.m * tiles / own),
            threads=config.threads,
            cta_bytes=keys + own * (query + 4 * config.tile_n),
            in_flight=config.key_stages * keys + config.stages * config.queries * query,
            cta_flops=2.0 * products * p.head_dim,
            cta_instructions=LOGITS_INSTRUCTIONS * products,
            ramps=2,
            act="fp8",
            persistent=True,
        )
    products = own * config.block_n * p.heads
    return Work(
        ctas=math.ceil(p.m / own) * math.ceil(p.entries / config.block_n),
        threads=32 * config.num_warps,
        cta_bytes=config.block_n * (row.row_bytes + row.scale_bytes) + own * (query + 4 * config.block_n),
        in_flight=(config.num_stages - 1) * query,
        cta_flops=2.0 * products * p.head_dim,
        cta_instructions=(4.7 if p.x == "fp8" else 6.2) * products + 6.0 * config.block_n * p.head_dim,
        ramps=3,
        act="fp8" if p.x == "fp8" else "bf16",
    )


def _moved(ctas: int, cta_bytes: float, num_warps: int, instructions: float, *, ramps: int) -> Work:
    """Programs whose loads are all in flight at once, as far as their threads can hold them."""
    threads = 32 * num_warps
    return Work(
        ctas=ctas,
        threads=threads,
        cta_bytes=cta_bytes,
        in_flight=min(cta_bytes, threads * BYTES_IN_FLIGHT_A_THREAD),
        cta_instructions=instructions,
        ramps=ramps,
    )


def _gemm(problem: GemmProblem, config: Any, arch: str, resources: Resources | None) -> Work:
    """Tiles of the output, all of k (or a split of it) a CTA, operands through a ring of stages."""
    p = problem
    if hasattr(config, "warps_k"):
        return _skinny(problem, config)
    if hasattr(config, "mma_ctas"):
        return _block_scaled(problem, config, MACHINES[arch])
    tile_m, tile_n = getattr(config, "tile_m", 128), config.tile_n
    tile_k, split = getattr(config, "tile_k", 256), getattr(config, "split_k", 1)
    cluster_m, cluster_n = getattr(config, "cluster_m", 1), getattr(config, "cluster_n", 1)
    tiles_m, tiles_n = math.ceil(p.m / tile_m), math.ceil(p.n / tile_n)
    ctas = math.ceil(tiles_m / cluster_m) * cluster_m * math.ceil(tiles_n / cluster_n) * cluster_n * split
    k = math.ceil(p.k / (tile_k * split)) * tile_k
    a_bytes = 2.0 if p.act == "bf16" else NVFP4_BYTES
    # rows past m and n cost no traffic (TMA does not read them, cp.async finds them in L1), but the MMA computes them
    rows, columns = min(tile_m, p.m), min(tile_n, p.n)
    loaded = (
        rows * a_bytes / cluster_n + columns * NVFP4_BYTES / cluster_m
    ) * k  # multicast shares a tile in a cluster
    stored = rows * columns * _out_bytes(p)
    stage = (tile_m * a_bytes + tile_n * NVFP4_BYTES) * tile_k
    stages = getattr(config, "num_stages", None)
    if stages is None:  # the kernel takes what shared memory holds
        room = resources.shared_bytes if resources else MACHINES[arch].shared_bytes
        stages = max(2, int(room * 0.85 / stage))
    decoded = (tile_n + (tile_m if p.act == "nvfp4" else 0)) * k if arch == "sm_90a" else 0
    return Work(
        ctas=ctas,
        threads=2 * tile_n if arch == "sm_90a" else 192,  # a warpgroup for each 64 rows of weights; six warps
        cta_bytes=loaded + stored,
        in_flight=min((stages - 1) * (rows * a_bytes + columns * NVFP4_BYTES) * tile_k, loaded),
        ingested=(rows * a_bytes + columns * NVFP4_BYTES) * k,
        cta_flops=2.0 * tile_m * tile_n * k,
        cta_instructions=decoded * DECODE_INSTRUCTIONS,
        act=p.act,
        ramps=2 if split > 1 else 1,  # the reduction waits for the others
        serial_us=k / tile_k * SM90_TILE_US if arch == "sm_90a" else 0.0,
    )


def _block_scaled(p: GemmProblem, config: Any, machine: Machine) -> Work:
    """NVFP4 on both sides, codes and scales as they are; rows and columns are the MMA's, weights either of them."""
    c, tile_m, tile_k = config, 128, 256
    sides = (p.n, p.m) if c.swap_ab else (p.m, p.n)
    tiles = [
        math.ceil(size / (tile * cluster)) * cluster
        for size, tile, cluster in zip(sides, (tile_m, c.tile_n), (c.cluster_m, c.cluster_n), strict=True)
    ]
    ctas = tiles[0] * tiles[1] * c.split_k
    k = math.ceil(p.k / (tile_k * c.split_k)) * tile_k
    rows, columns = min(tile_m, sides[0]), min(c.tile_n, sides[1])
    # scales come as atoms of 128 rows, whatever there is of them
    a_row, b_row = 0.5 + 128 / rows / 16, 0.5 + max(128, columns) / columns / 16
    outputs = rows * columns / c.split_k
    # an SM reads 128 bytes a clock of its shared memory, for all rows of a and its share of b: 128 x 128 x 64 keeps up
    mma_columns = max(c.tile_n, 64 + c.tile_n / (2 * c.mma_ctas))
    stages = max(2, int(machine.shared_bytes * 0.85 / ((tile_m + c.tile_n / c.mma_ctas) * NVFP4_BYTES * tile_k)))
    loaded = (rows * a_row / c.cluster_n + columns * b_row / c.cluster_m) * k
    return Work(
        ctas=ctas,
        threads=192,
        cta_bytes=loaded + outputs * _out_bytes(p),
        in_flight=min((stages - 1) * (rows * a_row + columns * b_row) * tile_k, loaded),
        ingested=(rows * a_row + columns * b_row / c.mma_ctas) * k,  # a pair halves b
        cta_flops=2.0 * tile_m * mma_columns * k,
        cta_instructions=outputs * SM100_EPILOGUE_INSTRUCTIONS[p.out],
        act=p.act,
        ramps=2 if c.split_k > 1 else 1,  # the reduction waits for the others
        persistent=True,
        unshared_bytes=_unshared(p, config, tiles, machine),
    )


def _unshared(p: GemmProblem, config: Any, tiles: list[int], machine: Machine) -> float:
    """Bytes that all waves of `_block_scaled` read, each row of an operand once a wave, and what they store."""
    c = config
    wave = min(machine.sms // c.split_k, tiles[0] * tiles[1])
    high = min(tiles[0], c.band * c.cluster_m) if c.band else tiles[0]
    rows, columns = min(wave, high), math.ceil(wave / high)
    waves = tiles[0] * tiles[1] / wave
    return waves * (rows * 128 + columns * c.tile_n) * p.k * NVFP4_BYTES + p.m * p.n * _out_bytes(p)


def _out_bytes(p: GemmProblem) -> float:
    """A number of d with its share of a block scale."""
    return NVFP4_BYTES if p.out == "nvfp4" else ELEMENT_BYTES[p.out]


def _skinny(p: GemmProblem, config: Any) -> Work:
    """Few tokens: whole rows of weights or parts of them a warp, from memory to registers."""
    parts, step = config.split * config.warps_k, 128
    steps = math.ceil(p.k / (step * parts))
    k = steps * config.warps_k * step  # of a CTA, some of it perhaps past the end
    tokens = min(config.tile_m, p.m)
    weights = config.tile_n * k * NVFP4_BYTES
    return Work(
        ctas=math.ceil(p.n / config.tile_n) * config.split * math.ceil(p.m / config.tile_m),
        threads=config.threads,
        cta_bytes=weights + tokens * k * 2 + config.tile_n * tokens * _out_bytes(p) / config.split,
        in_flight=min(config.threads * config.depth * 36.0, weights),  # two 16-byte and two 2-byte loads a step
        cta_flops=2.0 * 8 * math.ceil(config.tile_m / 8) * config.tile_n * k,
        cta_instructions=config.tile_n * k * SKINNY_INSTRUCTIONS,
        ramps=2 if config.split > 1 else 1,
    )


def _wgmma_us(p: GemmProblem, config: Any, machine: Machine) -> float:
    """gemm_nvfp4_sm90_wgmma, by 64 rows x 64 of K at a time.

    The constants are fitted to 12,000 timings of it on an H100 (nine weight shapes, m of 1 to 8192, 700 configs): 9 %
    rms, and the best of the eight configs that rank first is 1.3 % behind the best of all on average. For
    gemm_nvfp4_sm90_fp8: half the cycles of an MMA, instructions counted in SASS, and factors fitted to 832 timings (22
    configs, 16 weight shapes, m of 256 to 8192), of which the best of the five that rank first is at most 1 % behind.
    """
    c = config
    cluster, clock = c.share * c.split, 1700.0  # cycles a microsecond under load
    tiles_m, rows = math.ceil(p.m / c.tile_m), getattr(c, "rows", c.tile_n)
    ctas = tiles_m * math.ceil(p.n / (rows * c.share)) * cluster
    sms = CLUSTER_SMS[cluster]
    resident = min(c.blocks, math.ceil(ctas / sms))
    rounds: float = math.ceil(ctas / (sms * c.blocks))
    k, tokens = p.k / c.split, min(c.tile_m, p.m)
    units = c.tile_n / 64 * k / 64  # of a CTA and tile
    a_bytes, mma_cycles, issue = (2, 2.0, 160.0) if p.act == "bf16" else (1, 1.0, 150 + 0.25 * c.tile_m)
    mma = mma_cycles * c.tile_m * rows / c.tile_n  # cycles a unit, as the next
    chain = (430 + 0.33 * c.tile_m) / (c.groups * resident)
    compute = units * resident * _norm(mma, chain, issue) / clock
    ingest = (units * 64 * 64 * NVFP4_BYTES + k * tokens * a_bytes / c.share) * resident / 150e3
    if c.reduces:
        through = c.groups_k * tokens * c.tile_n / 1e4
        leave = 0.6 + 0.8 * through if c.split > 1 else 1.5 * through  # split: fitted to 1,600 timings
    else:
        leave = 1.75 + 0.3 * tokens * rows / 1e4
    if c.tail > 1 and 0 < ctas % (sms * c.blocks) <= sms * c.blocks // 2:
        rounds -= 0.5  # what two CTAs swap is about what each does not store
    dram = p.bytes / (0.965 * machine.dram * 1e3)
    us = 1.2 + _norm(dram, rounds * _norm(compute, ingest)) + leave * rounds
    if p.act == "fp8":
        return us * _fp8_habits(c)
    return us * _wgmma_habits(c, rounds <= 1) if p.m > 128 else us


def _wgmma_habits(c: Any, one_wave: bool) -> float:
    """What the formula leaves out for large m: fitted to 1,500 timings within 1.6 of the best of their problem.

    With it the best of the five configs that rank first is at most 8 % behind, in each of 45 problems.
    """
    stage = c.tile_n * c.tile_k * NVFP4_BYTES + c.tile_m * c.tile_k * 2
    in_flight = 230e3 / c.blocks // stage * c.tile_k  # of K
    factor = {64: 1.16, 96: 1.12, 128: 1.07, 176: 0.98, 192: 0.96, 256: 1.0}.get(c.tile_m, 1.16)
    factor *= 1.23 if in_flight <= 256 else 1.12 if in_flight <= 384 else 1.0
    factor *= 1.07 if c.paired == 2 and c.tile_m <= 128 else 1.0
    factor *= 0.95 if c.ahead and c.tile_m <= 128 else 1.0  # 210 timings of both
    factor *= 0.96 if c.reads_ahead else 1.0  # 45 pairs
    factor *= 1.07 if c.share == 2 and one_wave and c.split == 1 else 1.0
    factor *= 1.07 if c.groups_k > 1 and c.split == 1 else 1.0
    factor *= (1.1 if c.tile_m == 192 else 0.88) if c.groups == 1 else 1.0
    return float(factor)


def _fp8_habits(c: Any) -> float:
    """What `_wgmma_us` leaves out for the FP8 kernel."""
    factor = {64: 0.92, 128: 0.93, 192: 1.02, 256: 1.14}.get(c.tile_m, 1.0)
    factor *= 1.15 if c.blocks > 1 and c.groups_k > 1 else 1.0
    factor *= 1.02 if c.share > 1 else 1.0
    factor *= 1.03 if c.promote < 4 and c.tile_m <= 192 and c.groups_k == 1 else 1.0
    return factor


def _norm(*times: float) -> float:
    longest = max(times)
    if longest == 0:
        return 0.0
    return float(longest * sum((t / longest) ** SHARPNESS for t in times) ** (1 / SHARPNESS))


_MODELS: dict[type[Problem], Callable[[Any, Any, str, Resources | None], Work]] = {
    GemmProblem: _gemm,
    DequantProblem: _rows,
    QuantizeProblem: _rows,
    QuantizeFp8Problem: _rows,
    RmsnormQuantizeProblem: _rmsnorm,
    RmsNormProblem: _rmsnorm,
    SwigluQuantizeProblem: _rows,
    SwigluProblem: _rows,
    EmbedProblem: _embed,
    RouteProblem: _route,
    PermuteProblem: _permute,
    CombineProblem: _combine,
    SampleProblem: _sample,
    CompressKvProblem: _compress,
    CompressKvPairProblem: _compress_pair,
    IndexQueryProblem: _rows,
    CsaQueriesProblem: _queries,
    IndexLogitsProblem: _logits,
    IndexTopkProblem: _topk,
    HyperConnectionPreProblem: _fold,
    HyperConnectionPostProblem: _site,
    HyperConnectionHeadProblem: _fold,
    HyperConnectionPostPreProblem: _fold,
    QnormRopeProblem: _rows,
    QnormRopeQuantizeProblem: _inserted,
    KvNormRopeInsertProblem: _inserted,
    QkvNormRopeInsertProblem: _norm_and_insert,
    RopeInverseProblem: _rows,
    RopeInverseInPlaceProblem: _rows,
    RopeInverseQuantizeProblem: _rows,
}
