"""Runs compiled sm_90a and sm_100a PTX on a CPU.

    with ptx_emulator.emulate("sm_100a") as device:
        function(...)                   # compiled by cute.compile: host code as compiled, kernels emulated
    device.launches                     # statistics of each launch

    ptx_emulator.load(ptx).launch("kernel", grid=(2, 1, 1), block=(128, 1, 1), args=[array, 7])

Needs numpy only.
"""

from .api import Loaded, load
from .emulation import Device, active, emulate
from .errors import DeadlockError, Fault, ProcessError, PtxSyntaxError, UnknownInstructionError
from .machine import run_together

__all__ = [
    "DeadlockError",
    "Device",
    "Fault",
    "Loaded",
    "ProcessError",
    "PtxSyntaxError",
    "UnknownInstructionError",
    "active",
    "emulate",
    "load",
    "run_together",
]
