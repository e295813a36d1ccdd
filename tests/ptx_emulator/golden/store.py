"""The record's file: for every case the kernel's hash, the buffers before and after the launch, the tensor maps.

One xz-compressed npz; arrays are flat, and equal ones stand once. Its entry `index` is JSON: device, driver and, by
case, the names of the arrays.
"""

import hashlib
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .catalogue import Array, Case

FILE = Path(__file__).parent / "h100.npz.xz"


def kernel_hash(case: Case) -> str:
    """Of the kernel's text, white space left out."""
    return hashlib.sha256("".join(case.ptx.split()).encode()).hexdigest()[:16]


class Writer:
    def __init__(self, **about: Any):
        self.arrays: dict[str, Array] = {}
        self.index: dict[str, Any] = {"about": about, "cases": {}, "refused": {}}

    def put(self, data: Array) -> str:
        name = hashlib.sha256(data.tobytes() + str(data.dtype).encode()).hexdigest()[:12]
        self.arrays[name] = data.reshape(-1)
        return name

    def case(
        self, case: Case, before: Sequence[Array], after: dict[int, Array], maps: dict[int, tuple[int, bytes]]
    ) -> None:
        """before: of the buffers in order; after and maps: by argument; a map with the address in it."""
        self.index["cases"][case.name] = {
            "kernel": kernel_hash(case),
            "before": [self.put(x) for x in before],
            "after": {str(n): self.put(x) for n, x in after.items()},
            "maps": {str(n): [base, raw.hex()] for n, (base, raw) in maps.items()},
        }

    def keep(self, record: "Record", name: str) -> None:
        """The case as it stands in another record."""
        entry = record.cases[name]
        self.index["cases"][name] = entry
        self.arrays |= {x: record.arrays[x] for x in (*entry["before"], *entry["after"].values())}

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        index = np.frombuffer(json.dumps(self.index).encode(), np.uint8)
        np.savez(buffer, index=index, **self.arrays)  # type: ignore[arg-type]
        path.write_bytes(lzma.compress(buffer.getvalue(), preset=9))


class Record:
    def __init__(self, path: Path = FILE):
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as data:
            self.arrays = {name: data[name].reshape(-1) for name in data.files}
        self.index = json.loads(self.arrays.pop("index").tobytes())
        self.cases: dict[str, Any] = self.index["cases"]

    def is_of(self, case: Case) -> bool:
        """Whether the case's kernel, as it is now, was recorded."""
        return case.name in self.cases and self.cases[case.name]["kernel"] == kernel_hash(case)

    def before(self, name: str) -> list[Array]:
        return [self.arrays[x].copy() for x in self.cases[name]["before"]]

    def after(self, name: str) -> dict[int, Array]:
        return {int(n): self.arrays[x] for n, x in self.cases[name]["after"].items()}

    def maps(self, name: str) -> dict[int, tuple[int, bytes]]:
        return {int(n): (base, bytes.fromhex(raw)) for n, (base, raw) in self.cases[name]["maps"].items()}
