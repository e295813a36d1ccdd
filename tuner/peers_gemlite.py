"""gemlite's NVFP4 quantiser, written in Triton as ours is, beside ours.

Of gemlite 0.6 or newer, which takes the global scale (as its reciprocal). Block scales end at E4M3's largest number and
lose precision below its smallest normal one: blocks beyond that are not compared.
"""

import importlib

import torch
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
    x, alpha = case.operands
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 10:
        quant.set_ptx_fp4_pack_flag(False)  # gemlite asks the assembler's version alone whether it may convert to E2M1
    factor = alpha.reciprocal().reshape(1)
    rows = spread(len(x), x.device)

    def check(got: tuple[Tensor, Tensor]) -> float:
        blocks = x[rows].double().unflatten(1, (-1, BLOCK))
        amax = blocks.abs().amax(-1)
        ideal = amax / e2m1.MAX
        unit = alpha.double()
        held = (ideal >= unit * SMALLEST_NORMAL) & (ideal <= unit * E4M3_MAX)
        scale = got[1][rows].double() * unit
        worst = within(scale[held], ideal[held], SCALE_STEP * ideal[held], "block scales")
        step = scale[held][:, None]
        want = blocks[held]
        # halfway between the neighbours of a number, and what lies above the largest
        half = (want.abs() / step >= 2) * 0.25 + (want.abs() / step >= 4) * 0.5 + 0.25
        room = 1.01 * half * step + (want.abs() - e2m1.MAX * step).clamp_min(0)
        codes = e2m1.decode(e2m1.unpack(got[0][rows])).double().unflatten(1, (-1, BLOCK))
        return max(worst, within(codes[held] * step, want, room, "elements"))

    return Call(lambda: quant.scale_activations_nvfp4(x, meta_scale=factor)[:2], check)


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
        note="under the same global scale",
    ),
)
