"""Programmatic dependent launch: a kernel is on the GPU, and waits, when the one before it ends.

What a launch takes, a microsecond of each kernel of a decode step, then passes while the kernel before runs. Every
kernel that is launched so begins with `begin` or `wait` and touches nothing of global memory before. The wait comes
first, so that whatever ran before the kernel before has ended, too, when a kernel comes: the second launch of an op
may read what the op was given at once. GEMMs of sm_90a and the products of hyper-connections read weights before they
wait, so what may have written weights does not let the next kernel come there: it has `wait` alone.

The launches of one op overlap always, those of different ops unless FP4SUITE_OVERLAP=0.
"""

import triton
import triton.language as tl

from fp4suite import env

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
OVERLAP = tl.constexpr(env.overlaps() and COMPILED.value)


@triton.jit
def wait(FOLLOWS: tl.constexpr = False):
    """Until the kernel before has ended, and all that it wrote can be read. FOLLOWS: it is of the same op."""
    if OVERLAP or (FOLLOWS and COMPILED):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_come(FOLLOWED: tl.constexpr = False):
    """The next kernel may come: for one that has waited. FOLLOWED: it is of the same op."""
    if OVERLAP or (FOLLOWED and COMPILED):
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin(FOLLOWED: tl.constexpr = False, FOLLOWS: tl.constexpr = False):
    """`wait`; then the next kernel may come. It waits for the end of this one."""
    wait(FOLLOWS)
    let_come(FOLLOWED)
