"""What the emulator raises: a fault names the kernel, the PTX line, its text and the thread."""


class PtxSyntaxError(ValueError):
    """Text that is not PTX, or PTX that the parser does not know."""


class Fault(RuntimeError):
    """A kernel did what the PTX ISA forbids, or what the emulator does not know. Never computed past."""

    described = False  # whether the text names the instruction


class UnknownInstructionError(Fault):
    """An opcode, or a form of one, that the emulator does not execute."""


class DeadlockError(Fault):
    """Every warp waits. The message says who waits for what."""


class ProcessError(RuntimeError):
    """One of the processes that share a launch died."""
