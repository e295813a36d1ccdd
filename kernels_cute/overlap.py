"""Programmatic dependent launch of kernels that read nothing before the kernel before has ended; see the Triton one."""

from cutlass import cute

from fp4suite import env

OVERLAP = env.overlaps()  # of a launch: `use_pdl`; of a compiled function: what it is made for


def begin() -> None:
    """Waits for the end of the kernel before; then the next one may come, and wait for the end of this one."""
    if OVERLAP:
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
