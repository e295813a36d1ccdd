"""What of shared memory is still being read where a warp says that it has read it, from the machine code of sm_90.

A load runs on its own: the instruction that needs what it loads waits for one of six scoreboards, which the load
sets. `mbarrier.arrive` needs nothing, so that it may overtake loads, and TMA write what they are about to read: seen on
an H100.
"""

import re

from fp4suite.built import Built, sass

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;.*\n\s+/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE)


def loads_on_their_way(built: Built, kind: str = "LDSM?") -> list[tuple[str, str]]:
    """Each arrival and the last load of this kind before it, by address, that no instruction between has waited for.

    Loads come in order; `fence.proxy.async` waits for all of them.
    """
    found, pending = [], list[tuple[str, int]]()
    for address, text, control in _INSTRUCTION.findall(sass(built)):
        bits = int(control, 16) >> 41
        sets, waits = bits >> 5 & 7, bits >> 11 & 63
        done = [i for i, (_, scoreboard) in enumerate(pending) if waits >> scoreboard & 1]
        pending = pending[max(done, default=-1) + 1 :]
        code = text.split()[1 if text.startswith("@") else 0]
        if code.startswith("FENCE.VIEW.ASYNC"):
            pending = []
        elif re.match(rf"({kind})\b", code) and not text.startswith("@!PT"):
            pending.append((f"{address} {text}", sets))
        elif code.startswith("SYNCS.ARRIVE") and pending:
            found.append((f"{address} {text}", pending[-1][0]))
        elif code in ("BRA", "EXIT") and not text.startswith("@"):
            pending = []
    return found
