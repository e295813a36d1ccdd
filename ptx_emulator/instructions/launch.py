"""What concerns the launch: cluster launch control, dependent grids, registers of a warp (PTX ISA,
"clusterlaunchcontrol.try_cancel", "clusterlaunchcontrol.query_cancel", "griddepcontrol", "setmaxnreg").

Clusters run one after another, so a request to cancel one takes the next that would have run; with a seed it is now and
then refused, as by a GPU that has just started that cluster elsewhere. The response, opaque to kernels, is whether it
succeeded and the first CTA's index, 32 bits each.
"""

import numpy as np

from ..errors import Fault
from ..machine import LANES, Warp
from ..parser import Instruction, Vec
from ..program import Mask, Program, Run, constant, decoder, only, unknown
from .bulk import each_lane, fresh_queue, shared_place
from .sync import mbarrier_of

_ALL = np.ones(LANES, bool)
RESPONSE_BYTES = 16
NOWHERE = 0xFFFFFFFF  # "first CTA" of a request that failed: CuTe DSL asks for it at any rate, and then for the success
REGISTERS = 65_536  # of one SM
WARPGROUP = 4  # warps


# --- cluster launch control ---


@decoder("clusterlaunchcontrol")
def _cluster_launch_control(i: Instruction, p: Program) -> Run:
    if i.op[1] == "try_cancel":
        return _try_cancel(i, p)
    if i.op[2] == "is_canceled":
        return _is_canceled(i, p)
    if i.op[2].startswith("get_first_ctaid"):
        return _first_ctaid(i, p)
    raise unknown(i)


def _try_cancel(i: Instruction, p: Program) -> Run:
    everyone = "multicast:cluster:all" in i.op
    only(i, "clusterlaunchcontrol try_cancel async shared:cta mbarrier:complete_tx:bytes multicast:cluster:all b128")
    target, barrier = p.address(i.operands[0]), p.address(i.operands[1])

    def issue(w: Warp, lane: int) -> None:
        cluster, launch = w.cta.cluster, w.cta.cluster.launch
        at, signal = (shared_place(w, int(x(w)[lane]), own=True)[1] for x in (target, barrier))
        if at % RESPONSE_BYTES:
            raise Fault(f"the response's address {at:#x} is not a multiple of {RESPONSE_BYTES}")
        if w.cta.state.get("launch control refused"):
            raise Fault(f"CTA {w.cta.index} asks for another cluster after it has seen a request fail")
        ctas = cluster.ctas if everyone else [w.cta]
        for cta in ctas:
            if not any(x.fragments for x in cta.warps):
                raise Fault(f"the response goes to every CTA of the cluster, but CTA {cta.index} has exited")
        signals = [mbarrier_of(cta, signal) for cta in ctas]

        def work() -> None:
            words, place = np.array([0, *3 * [NOWHERE]], np.uint32), launch.cancel()
            if place is not None:
                words[:] = 1, *(a * b for a, b in zip(place, launch.cluster, strict=True))
            for cta, found in zip(ctas, signals, strict=True):
                cta.shared.write(at, words.view(np.uint8))
                found.complete(RESPONSE_BYTES)

        launch.statistics.events["clusters asked for"] += 1
        cluster.submit(fresh_queue(w), work)

    return each_lane(issue)


def _is_canceled(i: Instruction, p: Program) -> Run:
    write, read = p.target(i.operands[0], "pred"), p.source(i.operands[1], "b128")

    def run(w: Warp, m: Mask) -> str | None:
        succeeded = read(w).view(np.uint32).reshape(LANES, 4)[:, 0] != 0
        if not (succeeded if m is None else succeeded[m]).all():
            w.cta.state["launch control refused"] = True
        write(w, succeeded, m)
        return None

    return run


def _first_ctaid(i: Instruction, p: Program) -> Run:
    read = p.source(i.operands[1], "b128")
    # of the four elements of a vector the last one means nothing
    axes = "xyzx" if isinstance(i.operands[0], Vec) else i.op[2].partition(":")[2]
    writes = [("xyz".index(axis), p.target(x, "b32")) for axis, x in zip(axes, p.vector(i.operands[0]), strict=True)]

    def run(w: Warp, m: Mask) -> str | None:
        words = read(w).view(np.uint32).reshape(LANES, 4)
        for axis, write in writes:
            write(w, np.ascontiguousarray(words[:, 1 + axis]), m)
        return None

    return run


# --- dependent grids ---


@decoder("griddepcontrol")
def _griddepcontrol(i: Instruction, p: Program) -> Run:
    """Launches run one after another: a prerequisite grid has always ended."""
    if i.op[1:] not in (("launch_dependents",), ("wait",)):
        raise unknown(i)

    def run(w: Warp, m: Mask) -> str | None:
        w.cta.cluster.launch.statistics.events[i.name] += 1
        return None

    return run


# --- registers ---


@decoder("setmaxnreg")
def _setmaxnreg(i: Instruction, p: Program) -> Run:
    """The CTA's pool is what its warps do not own of its share of the SM's registers. All warps of a warpgroup must
    execute the same instruction, so one that never comes is seen when another one is asked for.
    """
    count, more = constant(i.operands[0]), i.op[1] == "inc"
    if i.op[2:] != ("sync", "aligned", "u32") or i.op[1] not in ("inc", "dec"):
        raise unknown(i)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "an aligned instruction is executed by a divergent warp"
        if count % 8 or not 24 <= count <= 256:
            raise Fault(f"setmaxnreg to {count}, which is not a multiple of 8 from 24 to 256")
        group = w.cta.warps[w.index // WARPGROUP * WARPGROUP :][:WARPGROUP]
        history = w.state.setdefault("setmaxnreg", [])
        if not more and count > _registers(w):
            raise Fault(f"setmaxnreg.dec to {count} of a warp with {_registers(w)} registers a thread")
        # the assembler may have started the warp with less than its share: only a value that was set is known
        if more and history and count < _registers(w):
            raise Fault(f"setmaxnreg.inc to {count} of a warp with {_registers(w)} registers a thread")
        pool = LANES * (_initial(w) * len(w.cta.warps) - sum(_registers(x) for x in w.cta.warps if x.fragments))
        wanted = LANES * (count - _registers(w))
        if wanted > pool:
            return f"waits for {wanted} registers, {pool} are in the CTA's pool"
        step = len(history)
        for other in group:
            done = other.state.get("setmaxnreg", [])
            # warps that give registers back may differ in how many they keep, as in CUTLASS's mixed-input GEMM, though
            # the ISA has all of a warpgroup execute the same instruction: each has its own
            if len(done) > step and done[step] != (i.op[1], count) and {done[step][0], i.op[1]} != {"dec"}:
                raise Fault(f"setmaxnreg.{i.op[1]} {count} where warp {other.index} of the warpgroup did another")
        history.append((i.op[1], count))
        return None

    return run


def _initial(w: Warp) -> int:
    """What a thread starts with: its share of all registers, by the granule of allocation, or what .maxnreg says."""
    share = REGISTERS // (LANES * len(w.cta.warps)) // 8 * 8
    return min(w.program.kernel.max_registers or 256, share, 256)


def _registers(w: Warp) -> int:
    history = w.state.get("setmaxnreg")
    return history[-1][1] if history else _initial(w)
