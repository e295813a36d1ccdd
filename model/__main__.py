"""`python -m model check | make-checkpoint | convert | generate | bench | agree | launches | demo`.

Each has --help and --json (the last line of output is one JSON document). On failure each says why in one sentence and
exits with 1.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fp4suite import command_line
from fp4suite.errors import TableError, UnsupportedError

from .cache import OutOfPages
from .checkpoint.inventory import FAMILIES
from .config import SHIPPED, ModelConfig
from .runtime import INDEX_FORMATS, KV_FORMATS, pick_device, reference_where_no_kernel, text_table, timed_generation

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        document = args.command(args)
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, OutOfPages, TableError, UnsupportedError, torch.OutOfMemoryError) as error:
        if isinstance(error, BrokenPipeError) and command_line.output_is_closed():
            raise
        print(f"python -m {__package__} {args.name}: {error}", file=sys.stderr)
        document, code = {"error": str(error)}, 1
    if args.json:
        print(json.dumps(document), flush=True)
    return code


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from .check import check_checkpoint, check_config
    from .checkpoint import Checkpoint

    if args.config is None and args.checkpoint is None:
        raise ValueError("check needs --config, --checkpoint or both")
    document: dict[str, Any] = {}
    checkpoint = Checkpoint(args.checkpoint) if args.checkpoint else None
    if args.config is not None:
        document = check_config(ModelConfig.named(args.config), args.config)
        if checkpoint is not None:
            checkpoint.expect_config(ModelConfig.named(args.config))
        layers = ", ".join(f"{count} {kind.upper()}" for kind, count in document["layers"].items())
        print(f"{args.config}: {document['parameters']:,} parameters, layers {layers}, MTP {document['draft_blocks']}")
        rows = [[family, f"{c['tensors']:,}", f"{c['bytes']:,}"] for family, c in document["families"].items()]
        print(text_table(("family", "tensors", "bytes"), rows))
        if document["published_native_bytes"] is not None:
            print(f"native bytes equal the published {document['published_native_bytes']:,}")
        model = document["model"]
        print(f"the model's {model['weights']:,} weights are the inventory's; {model['bytes']:,} bytes in memory")
    if checkpoint is not None:
        document["checkpoint"] = found = check_checkpoint(checkpoint)
        print(
            f"{found['directory']}: family {found['family']}, {found['tensors']:,} tensors, {found['bytes']:,} bytes; "
            f"fills the model's {found['model']['weights']:,} weights ({found['model']['bytes']:,} bytes in memory)"
        )
    return document


def _make_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    from .checkpoint import make_checkpoint

    written = make_checkpoint(
        args.directory,
        ModelConfig.named(args.config),
        args.family,
        seed=args.seed,
        shard_bytes=_mib(args.shard_mib),
        force=args.force,
        progress=_progress(args),
    )
    print(f"{args.directory}: {written:,} bytes of {args.family} weights, seed {args.seed}")
    return {"directory": str(args.directory), "family": args.family, "seed": args.seed, "bytes": written}


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from .checkpoint import Checkpoint, convert

    source = Checkpoint(args.source)
    written = convert(
        source,
        args.directory,
        args.family,
        shard_bytes=_mib(args.shard_mib),
        force=args.force,
        progress=_progress(args),
    )
    print(f"{args.directory}: {written:,} bytes of {args.family} weights, from {source.family}")
    return {"directory": str(args.directory), "family": args.family, "from": source.family, "bytes": written}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from .checkpoint import Checkpoint, load
    from .generate import Sampling
    from .tokenizer import load_tokenizer

    device = pick_device(args.device)
    checkpoint = Checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config)
    text = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else args.prompt
    prompt = tokenizer.encode(text)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        eos=None if args.ignore_eos else checkpoint.config.eos_token_id,
    )
    model = load(None, checkpoint, device, weights=args.weights, act_format=args.act_format, progress=_progress(args))
    with reference_where_no_kernel(device) as references:
        result = timed_generation(
            model,
            prompt,
            sampling,
            device,
            kv_format=args.kv_format,
            index_format=args.index_format,
            chunk=args.chunk,
        )
    new_text = tokenizer.decode(result.tokens)
    print(f"{text}{new_text}")
    speed = result.decode_tokens_per_s
    print(
        f"\n{result.prompt_tokens} prompt tokens in {result.prefill_s:.3g} s, {len(result.tokens)} new"
        + (f" at {speed:.3g} a second" if speed else "")
        + f" on {device} ({tokenizer.name})"
    )
    return {
        "prompt": text,
        "text": new_text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "decode_tokens_per_s": speed,
        "tokenizer": tokenizer.name,
        "device": str(device),
        "family": checkpoint.family,
        "ops_on_reference": references,
    }


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from .bench import run

    return run(args)


def _launches(args: argparse.Namespace) -> dict[str, Any]:
    from .launches import run

    return run(args)


def _agree(args: argparse.Namespace) -> dict[str, Any]:
    from .agree import run

    return run(args)


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from .demo import run

    return run(args)


def _mib(value: float) -> int:
    if value <= 0:
        raise ValueError(f"--shard-mib must be positive, got {value}")
    return int(value * (1 << 20))


def _progress(args: argparse.Namespace) -> bool | None:
    return False if args.quiet else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="DeepSeek-V4 in NVFP4: checkpoints, text, speed."
    )
    commands = parser.add_subparsers(dest="name", required=True)

    def command(name: str, function: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--json", action="store_true", help="print one JSON document as the last line")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--shard-mib", type=float, default=5120, help="size of a shard in MiB (default 5120)")
        sub.add_argument("--force", action="store_true", help="replace a checkpoint that is there")

    def runs(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
        sub.add_argument("--kv-format", choices=KV_FORMATS, default="bf16", help="of cache rows (default bf16)")
        sub.add_argument("--index-format", choices=INDEX_FORMATS, default="bf16", help="of indexer keys (default bf16)")
        sub.add_argument(
            "--act-format",
            choices=("float", "nvfp4", "fp8"),
            help="nvfp4: W4A4 linears (default on sm_100a); fp8: W4A8",
        )
        sub.add_argument("--weights", choices=("stored", "fp32"), default="stored", help="fp32: all dequantised")

    a_config = f"{', '.join(SHIPPED)}, or the path of a config.json"

    check = command("check", _check, "Build the model without memory and compare it with its inventory, byte by byte.")
    check.add_argument("--config", metavar="NAME", help=a_config)
    check.add_argument("--checkpoint", type=Path, metavar="DIR", help="also check every header of this checkpoint")

    make = command("make-checkpoint", _make_checkpoint, "Write a checkpoint of random weights.")
    make.add_argument("directory", type=Path, metavar="DIR")
    make.add_argument("--config", required=True, metavar="NAME", help=a_config)
    make.add_argument("--family", required=True, choices=FAMILIES)
    make.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights in every family")
    writes(make)

    conv = command("convert", _convert, "Write a checkpoint's weights in another family's formats.")
    conv.add_argument("source", type=Path, metavar="SRC")
    conv.add_argument("directory", type=Path, metavar="DST")
    conv.add_argument("--family", required=True, choices=FAMILIES)
    writes(conv)

    gen = command("generate", _generate, "Continue a text.")
    gen.add_argument("checkpoint", type=Path, metavar="DIR")
    text = gen.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", type=Path, metavar="FILE")
    gen.add_argument("--max-new-tokens", type=int, default=64)
    gen.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most probable token")
    gen.add_argument("--top-p", type=float, default=1.0)
    gen.add_argument("--seed", type=int, default=0)
    gen.add_argument("--ignore-eos", action="store_true", help="go on after an end token")
    gen.add_argument("--chunk", type=int, default=512, help="prompt tokens a step (default 512)")
    runs(gen)

    bench = command("bench", _bench, "Tokens a second in prefill and decode.")
    bench.add_argument("checkpoint", type=Path, metavar="DIR")
    bench.add_argument("--prefill", type=_sizes, default=[128, 512], metavar="N,...", help="prompt lengths (128,512)")
    bench.add_argument("--batch", type=_sizes, default=[1, 4], metavar="N,...", help="sequences decoding (1,4)")
    bench.add_argument("--context", type=int, default=256, help="tokens that decoding sequences have (default 256)")
    bench.add_argument("--repeats", type=int, default=5, help="timings a row (default 5)")
    runs(bench)

    agree = command("agree", _agree, "How far a device's layers are from the CPU's, kind by kind.")
    agree.add_argument("checkpoint", type=Path, metavar="DIR")
    agree.add_argument("--tokens", type=int, default=656, help="of a random prompt (default 656)")
    agree.add_argument("--new-tokens", type=int, default=16, help="generated greedily on both (default 16)")
    runs(agree)

    launches = command("launches", _launches, "What a layer of each kind launches in a decode step.")
    launches.add_argument("--config", default="demo", metavar="NAME", help=a_config)
    launches.add_argument("--family", choices=FAMILIES, default="modelopt", help="formats of weights (modelopt)")
    launches.add_argument("--batch", type=int, default=4, help="sequences decoding (default 4)")
    launches.add_argument("--device", help="cpu: count operators; cuda: kernels (default: the GPU if there is one)")
    launches.add_argument("--act-format", choices=("float", "nvfp4", "fp8"), default="float", help="see generate")

    demo = command("demo", _demo, "A small model from checkpoint to tokens: make, tune, load, generate, compare.")
    demo.add_argument("--dir", type=Path, help="where to keep what is made (default: a temporary folder)")
    demo.add_argument("--config", default="demo", metavar="NAME", help=a_config)
    demo.add_argument("--prompt", default=None, help="the text to continue")
    demo.add_argument("--max-new-tokens", type=int, default=32)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    demo.add_argument("--tune-seconds", type=command_line.seconds, default=45, help="time for tuning (default 45)")
    return parser


def _sizes(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted integers separated by commas, got {text!r}") from None
    if any(size < 1 for size in found):
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return found


if __name__ == "__main__":
    sys.exit(command_line.run(main))
