"""Small PTX kernels for tests, and their launch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import ptx_emulator
from ptx_emulator.hazards import Checks
from ptx_emulator.statistics import Statistics

LANES = 32


def module(body: str, params: str = ".param .u64 out", arch: str = "sm_100a", shared: str = "", extra: str = "") -> str:
    """A kernel `k` around `body`, with registers %p0-15, %rs0-15, %r0-255, %rd0-63, and %rd63 = out."""
    return f"""
.version 8.8
.target {arch}
.address_size 64
{extra}
.visible .entry k({params})
{{
.reg .pred %p<16>;
.reg .b16 %rs<16>;
.reg .b32 %r<256>;
.reg .b64 %rd<64>;
{shared}
ld.param.b64 %rd63, [out];
{body}
ret;
}}
"""


def run(
    body: str,
    out: NDArray[Any],
    *args: Any,
    params: str = "",
    block: int = LANES,
    grid: int = 1,
    cluster: int = 1,
    arch: str = "sm_100a",
    shared: str = "",
    extra: str = "",
    dynamic: int = 0,
    schedule: str = "round",
    seed: int | None = None,
    races: Checks = True,
) -> Statistics:
    """Run `body` with `out` as its first parameter; `params` declares the further ones."""
    text = module(body, ".param .u64 out" + (", " + params if params else ""), arch, shared, extra)
    return ptx_emulator.load(text).launch(
        "k",
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        cluster=(cluster, 1, 1),
        args=[out, *args],
        shared=dynamic,
        schedule=schedule,
        seed=seed,
        races=races,
    )


_LOAD = {
    1: ("ld.global.u8", "%rs"),
    2: ("ld.global.b16", "%rs"),
    4: ("ld.global.b32", "%r"),
    8: ("ld.global.b64", "%rd"),
}
_STORE = {1: "st.global.u8", 2: "st.global.b16", 4: "st.global.b32", 8: "st.global.b64"}


def lanewise(text: str, dtype: Any, *inputs: NDArray[Any]) -> NDArray[Any]:
    """`text` on every element: a, b, c stand for the inputs' registers, d for the result's, of `dtype`."""
    count = len(inputs[0])
    block = -(-count // LANES) * LANES
    inputs = tuple(np.resize(x, block) for x in inputs)
    out = np.zeros(block, dtype)
    assert block <= 1024
    lines = ["mov.u32 %r0, %tid.x;"]
    names = {}
    for n, (name, x) in enumerate(zip("abc", inputs, strict=False)):
        op, register = _LOAD[x.itemsize]
        names[name] = f"{register}{n + 1}"
        lines += [
            f"ld.param.b64 %rd{10 + n}, [p{n}];",
            f"mul.wide.u32 %rd20, %r0, {x.itemsize};",
            f"add.s64 %rd20, %rd20, %rd{10 + n};",
            f"{op} {names[name]}, [%rd20];",
        ]
    names["d"] = f"{_LOAD[out.itemsize][1]}9"
    for name, register in names.items():
        text = text.replace(f"${name}", register)
    lines += [
        text,
        f"mul.wide.u32 %rd20, %r0, {out.itemsize};",
        "add.s64 %rd20, %rd20, %rd63;",
        f"{_STORE[out.itemsize]} [%rd20], {names['d']};",
    ]
    params = ", ".join(f".param .u64 p{n}" for n in range(len(inputs)))
    run("\n".join(lines), out, *inputs, params=params, block=block)
    return out[:count]
