"""gemlite's NVFP4 quantiser, written in Triton as ours is, beside ours.

Its global scale is a constant, and block scales end at E4M3's largest number and lose precision below its smallest
normal one: blocks beyond that are not compared.
"""

import importlib

from torch import Tensor

from fp4suite.formats import BLOCK, E4M3_MAX
from fp4suite.problem import Problem, QuantizeProblem
from fp4suite.reference import e2m1
from fp4suite.testing import Case

from .fusion_peer import Call, FusionPeer, spread, within

SMALLEST_NORMAL = 2.0**-6  # of E4M3
SCALE_STEP = 2.0**-3  # two neighbouring E4M3 numbers, relative to the smaller


def quantize(case: Case) -> Call:
    quant = importlib.import_module("gemlite.quant_utils")
    x = case.operands[0]
    rows = spread(len(x), x.device)

    def check(got: tuple[Tensor, Tensor]) -> float:
        blocks = x[rows].double().unflatten(1, (-1, BLOCK))
        amax = blocks.abs().amax(-1)
        ideal = amax / e2m1.MAX
        held = (ideal >= quant.NVFP4_META_SCALE * SMALLEST_NORMAL) & (ideal <= quant.NVFP4_META_SCALE * E4M3_MAX)
        scale = got[1][rows].double() * quant.NVFP4_META_SCALE
        worst = within(scale[held], ideal[held], SCALE_STEP * ideal[held], "block scales")
        step = scale[held][:, None]
        want = blocks[held]
        # halfway between the neighbours of a number, and what lies above the largest
        half = (want.abs() / step >= 2) * 0.25 + (want.abs() / step >= 4) * 0.5 + 0.25
        room = 1.01 * half * step + (want.abs() - e2m1.MAX * step).clamp_min(0)
        codes = e2m1.decode(e2m1.unpack(got[0][rows])).double().unflatten(1, (-1, BLOCK))
        return max(worst, within(codes[held] * step, want, room, "elements"))

    return Call(lambda: quant.scale_activations_nvfp4(x), check)


def _refuses(problem: Problem) -> str | None:
    assert isinstance(problem, QuantizeProblem)
    if problem.sf_layout != "linear":
        return f"writes linear scales, not {problem.sf_layout}"
    return None


PEERS = (
    FusionPeer(
        name="gemlite_nvfp4",
        module="gemlite",
        package="gemlite",
        ops=(QuantizeProblem.op,),
        prepare=quantize,
        refuses=_refuses,
        tolerance="half an E2M1 step of its own block scale, which is one E4M3 step from the ideal",
        note="under a constant global scale",
    ),
)
