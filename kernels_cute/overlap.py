"""Programmatic dependent launch of kernels that read nothing before the kernel before has ended; see the Triton one."""

from cutlass import cute

from fp4suite import env

OVERLAP = env.overlaps()  # of a launch: `use_pdl`; of a compiled function: what it is made for


def wait() -> None:
    """For the end of the kernel before, and all that it wrote."""
    if OVERLAP:
        cute.arch.griddepcontrol_wait()


def begin() -> None:
    """`wait`; then the next kernel may come, and wait for the end of this one."""
    wait()
    if OVERLAP:
        cute.arch.griddepcontrol_launch_dependents()
