"""A kernel of rmsnorm_quantize for the CPU: the reference, or what FAULT_M says it does wrong."""

from dataclasses import dataclass

from fp4suite import reference

FAULT_M: set[int] = set()  # numbers of tokens for which a code is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    num_warps: int = 4


SPACE = {"num_warps": (4, 8)}


def supports(problem, config):
    return None


def launch(x, weight, eps, alpha, out, rule, config):
    got = reference.rmsnorm_quantize(x, weight, eps, alpha=alpha, sf_layout=out.sf_layout, rule=rule)
    out.data.copy_(got.data)
    out.sf.copy_(got.sf)
    if len(x) in FAULT_M:
        out.data[0, 0] ^= 1
