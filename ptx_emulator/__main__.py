"""The command line: run a kernel of a PTX file, or list what a file holds."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .api import Argument, Loaded, load
from .errors import Fault, ProcessError
from .machine import SCHEDULES
from .numbers import Array, to_bf16
from .statistics import Statistics

EXAMPLE = """\
arguments of the kernel, in order:
  TYPE:VALUE                  a scalar: u32:7, s64:-1, f32:1.5, b64:0xff
  zeros:TYPE:SHAPE            an array, passed by address: zeros:f32:1024, zeros:u8:64x32
  random:TYPE:SHAPE[:SEED]    normal numbers, or every value of an integer type alike: random:f16:64x64:3
  FILE.npy                    an array from a file, which is not written to
TYPE is one of u8 u16 u32 u64, s8 s16 s32 s64, b8 b16 b32 b64, f16 bf16 f32 f64; bf16 arrays hold their bits as uint16.

example:
  python -m ptx_emulator run axpy.ptx --grid 4 --block 128 --args f32:2 random:f32:512 y.npy u32:512 --out 2=out.npy

exit status: 0, 1 if the kernel did what the PTX ISA forbids or the emulator does not know, 2 for wrong input
"""
_TYPES: dict[str, Any] = {
    **{f"{kind}{n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n // 8}") for kind in "usb" for n in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


class InputError(ValueError):
    """What the user got wrong, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ptx_emulator", description="Run compiled PTX of sm_90a and sm_100a on a CPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    _add_list(commands)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except (Fault, ProcessError) as e:
        print(e, file=sys.stderr)
        return 1
    except (ValueError, OSError) as e:
        if hasattr(e, "__notes__"):  # of the instruction at which the emulator itself failed
            raise
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def _add_run(commands: Any) -> None:
    p = commands.add_parser(
        "run",
        help="run a kernel",
        description="Run one kernel of a PTX file.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", type=Path, metavar="FILE.ptx")
    p.add_argument("--kernel", metavar="NAME", help="needed if the file holds several")
    p.add_argument("--arch", help="instead of the file's target, for example sm_100a")
    for name, what in (("grid", "CTAs"), ("block", "threads of a CTA"), ("cluster", "CTAs of a cluster")):
        p.add_argument(f"--{name}", type=_dims, default=(1, 1, 1), metavar="X[,Y[,Z]]", help=f"{what}, 1 by default")
    p.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory")
    p.add_argument("--args", nargs="*", default=[], metavar="ARG", help="see below")
    p.add_argument(
        "--out",
        action="append",
        default=[],
        metavar="ARG=FILE.npy",
        help="save an array after the run; ARG is a parameter's name or its place, from 0 on",
    )
    p.add_argument("--schedule", choices=SCHEDULES, default="round", help="when asynchronous work is carried out")
    p.add_argument("--seed", type=int, help="shuffle warps and asynchronous work")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="spread the clusters over N processes")
    p.add_argument("--no-races", dest="races", action="store_false", help="do not look for data races")
    p.add_argument(
        "--strict", dest="races", action="store_const", const="strict", help="and for every fence that the ISA wants"
    )
    p.add_argument("--stats", action="store_true", help="print the launch's statistics")
    p.add_argument("--json", action="store_true", help="print them as one JSON document")
    p.set_defaults(do=_run)


def _add_list(commands: Any) -> None:
    p = commands.add_parser("list", help="list a file's kernels and which of their opcodes are not known")
    p.add_argument("file", type=Path, metavar="FILE.ptx")
    p.add_argument("--arch", help="instead of the file's target, for example sm_100a")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.set_defaults(do=_list)


def _dims(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not X, X,Y or X,Y,Z with numbers from 1 on")
    return (*map(int, text.split(",")), 1, 1)[:3]


def _load(args: argparse.Namespace) -> Loaded:
    return load(args.file.read_text(), args.arch)


# --- run ---


def _run(args: argparse.Namespace) -> None:
    module = _load(args)
    params = module.program(args.kernel).kernel.params
    values = [_argument(text) for text in args.args]
    if len(values) != len(params):
        names = ", ".join(f"{p.name} ({p.size} bytes)" for p in params) or "none"
        raise InputError(f"{len(values)} arguments for {len(params)} parameters: {names}")
    outputs = [_output(text, [p.name for p in params], values) for text in args.out]
    stats = module.launch(
        args.kernel,
        grid=args.grid,
        block=args.block,
        args=values,
        cluster=args.cluster,
        shared=args.shared,
        schedule=args.schedule,
        seed=args.seed,
        races=args.races,
        processes=args.processes,
    )
    for path, array in outputs:
        np.save(path, array)
    if args.json:
        print(stats.to_json())
    elif args.stats:
        print(stats)
    else:
        print(_summary(stats))


def _summary(stats: Statistics) -> str:
    ctas, threads = (int(np.prod(x)) for x in (stats.grid, stats.block))
    return f"{stats.kernel}: {ctas} CTAs of {threads} threads, {stats.total:,} warp instructions"


def _argument(text: str) -> Argument:
    if text.endswith(".npy"):
        data: Array = np.load(text, allow_pickle=False)
        return np.ascontiguousarray(data)
    head, *rest = text.split(":")
    if head in ("zeros", "random"):
        if not 2 <= len(rest) <= (3 if head == "random" else 2):
            raise InputError(f"argument {text!r} is not {head}:TYPE:SHAPE{'[:SEED]' if head == 'random' else ''}")
        shape, seed = _shape(rest[1], text), _integer(rest[2], text) if len(rest) > 2 else 0
        return np.zeros(shape, _dtype(rest[0], text)) if head == "zeros" else _random(rest[0], shape, seed, text)
    if len(rest) != 1:
        raise InputError(f"argument {text!r} is not TYPE:VALUE, zeros:..., random:... or a file ending in .npy")
    return _scalar(head, rest[0], text)


def _dtype(name: str, text: str) -> Any:
    if name not in _TYPES:
        raise InputError(f"argument {text!r}: type {name!r} is none of {', '.join(_TYPES)}")
    return _TYPES[name]


def _shape(text: str, argument: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise InputError(f"argument {argument!r}: shape {text!r} is not sizes joined by x")
    return tuple(map(int, text.split("x")))


def _integer(text: str, argument: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise InputError(f"argument {argument!r}: {text!r} is not an integer") from None


def _scalar(name: str, text: str, argument: str) -> Argument:
    dtype = _dtype(name, argument)
    if "f" in name:
        try:
            number = np.array([float(text)])
        except ValueError:
            raise InputError(f"argument {argument!r}: {text!r} is not a number") from None
        return (to_bf16(number) if name == "bf16" else number.astype(dtype))[0].tobytes()
    value, info = _integer(text, argument), np.iinfo(dtype)
    low = -(1 << info.bits - 1) if name[0] == "b" else int(info.min)
    if not low <= value <= int(info.max):
        raise InputError(f"argument {argument!r}: {value} does not fit into {name}")
    return (value % (1 << info.bits)).to_bytes(dtype.itemsize, "little")


def _random(name: str, shape: tuple[int, ...], seed: int, argument: str) -> Array:
    dtype, generator = _dtype(name, argument), np.random.default_rng(seed)
    if "f" not in name:
        info = np.iinfo(dtype)
        return generator.integers(info.min, info.max, shape, dtype, endpoint=True)
    values = generator.standard_normal(shape)
    return to_bf16(values) if name == "bf16" else values.astype(dtype)


def _output(text: str, names: list[str], values: list[Argument]) -> tuple[Path, Array]:
    which, _, path = text.partition("=")
    if not path.endswith(".npy"):
        raise InputError(f"--out {text!r} is not ARG=FILE.npy")
    place = names.index(which) if which in names else int(which) if which.isdigit() else -1
    if not 0 <= place < len(names):
        raise InputError(
            f"--out {text!r}: {which!r} is neither a place below {len(names)} nor one of {', '.join(names)}"
        )
    value = values[place]
    if not isinstance(value, np.ndarray):
        raise InputError(f"--out {text!r}: argument {which} is no array")
    return Path(path), value


# --- list ---


def _list(args: argparse.Namespace) -> None:
    module = _load(args)
    found = [_describe(module, name) for name in module.kernels]
    if args.json:
        print(json.dumps({"target": module.module.target, "ptx": module.module.version, "kernels": found}))
        return
    print(f"{args.file}: target {module.module.target}, PTX {module.module.version}")
    for kernel in found:
        _print_kernel(kernel)


def _describe(module: Loaded, name: str) -> dict[str, Any]:
    program = module.program(name)
    kernel = program.kernel
    registers = Counter(f"{8 * r.size} bits" if r.size else "predicates" for r in kernel.registers)
    return {
        "name": name,
        "parameters": [{"name": p.name, "bytes": p.size, "align": p.align} for p in kernel.params],
        "virtual_registers": dict(registers),
        "static_shared_bytes": program.static_shared,
        "local_bytes": program.local_bytes,
        "max_threads": kernel.max_threads or None,
        "required_threads": kernel.required_threads,
        "required_cluster": kernel.required_cluster,
        "opcodes": dict(sorted(Counter(i.name for i in kernel.code).items())),
        "unknown": [{"line": i.line, "text": i.text, "why": why} for i, why in program.unknown],
    }


def _print_kernel(kernel: dict[str, Any]) -> None:
    print(f"\n{kernel['name']}")
    for p in kernel["parameters"]:
        print(f"  parameter {p['name']}: {p['bytes']} bytes")
    registers = ", ".join(f"{n} of {kind}" for kind, n in kernel["virtual_registers"].items())
    print(f"  virtual registers: {registers or 'none'}")
    print(f"  static shared memory: {kernel['static_shared_bytes']:,} bytes, local: {kernel['local_bytes']:,}")
    for what in ("max_threads", "required_threads", "required_cluster"):
        if kernel[what]:
            print(f"  {what.replace('_', ' ')}: {kernel[what]}")
    print(f"  {sum(kernel['opcodes'].values()):,} instructions of {len(kernel['opcodes'])} opcodes")
    for opcode, count in kernel["opcodes"].items():
        print(f"    {opcode:<80} {count:>6,}")
    for line in kernel["unknown"]:
        print(f"  not known, PTX line {line['line']}: {line['text']}\n    {line['why']}")
    if not kernel["unknown"]:
        print("  every opcode is known")


if __name__ == "__main__":
    sys.exit(main())
