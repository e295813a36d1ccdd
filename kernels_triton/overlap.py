"""Programmatic dependent launch: a kernel is on the GPU, and waits, when the one before it ends.

What a launch takes, a microsecond of each kernel of a decode step, then passes while the kernel before runs. Every
kernel that is launched so begins with `begin` or `wait` and touches nothing of global memory before. The wait comes
first, so that whatever ran before the kernel before has ended, too, when a kernel comes: the second launch of an op
may read what the op was given at once. GEMMs of sm_90a and the products of hyper-connections read weights before they
wait, so what may have written weights does not let the next kernel come there: it has `wait` alone. These GEMMs let the
next kernel come before they wait, so that a weight has to be complete longer before: see `ops.gemm_nvfp4`.

The launches of one op overlap always, those of several unless FP4SUITE_OVERLAP=0. There only the last programs let the
next kernel come: each that does takes 1.2 ns of a kernel of very many, others 0.9 (H100).
"""

import triton
import triton.language as tl

from fp4suite import env

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
OVERLAP = tl.constexpr(env.overlaps() and COMPILED.value)
# The last programs let the next kernel come: those before them have mostly ended then, which says the same.
LAST_LET_COME = tl.constexpr(
    "{ .reg .pred last; setp.le.s32 last, $1, 1024; @last griddepcontrol.launch_dependents; mov.b32 $0, $1; }"
)


@triton.jit
def wait(FOLLOWS: tl.constexpr = False):
    """Until the kernel before has ended, and all that it wrote can be read. FOLLOWS: it is of the same op."""
    if OVERLAP or (FOLLOWS and COMPILED):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_come(FOLLOWED: tl.constexpr = False):
    """The next kernel may come: for one that has waited. FOLLOWED: it is of the same op."""
    if FOLLOWED and COMPILED:
        tl.extra.cuda.gdc_launch_dependents()
    elif OVERLAP:
        left = tl.num_programs(2) - tl.program_id(2)
        left = left * tl.num_programs(1) - tl.program_id(1)
        left = left * tl.num_programs(0) - tl.program_id(0)
        tl.inline_asm_elementwise(LAST_LET_COME, "=r,r", [left], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def begin(FOLLOWED: tl.constexpr = False, FOLLOWS: tl.constexpr = False):
    """`wait`; then the next kernel may come. It waits for the end of this one."""
    wait(FOLLOWS)
    let_come(FOLLOWED)
