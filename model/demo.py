"""The whole chain on a small model: make a checkpoint, tune its layer shapes, load both, generate, compare with FP32.

The weights are random, so the text means nothing; the figures do. The checkpoint has NVFP4 in every linear, the
`modelopt` family, hence no draft block: that is taken from a second checkpoint in the native formats, as one would for
a real model.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fp4suite
from fp4suite import dispatch, shapes, table
from fp4suite.problem import PROBLEMS

from .cache import KVCache
from .checkpoint import Family, load, make_checkpoint
from .checkpoint.load import default_act_format
from .config import ModelConfig
from .generate import Sampling
from .runtime import Generated, pick_device, reference_where_no_kernel, text_table, timed_generation
from .tokenizer import load_tokenizer
from .transformer import Transformer

PROMPT = (
    "NVFP4 keeps two numbers in a byte. Sixteen of them share a scale, and a matrix shares one more, so that a "
    "trillion parameters fit where a quarter did:"
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chain, prints what came of it, returns the same as data."""
    config, device = ModelConfig.named(args.config), pick_device(args.device)
    times: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fp4suite-demo-")))
        quiet = False if args.quiet else None
        tokenizer = load_tokenizer(root / "modelopt", config)
        prompt = tokenizer.encode(PROMPT if args.prompt is None else args.prompt)

        families: tuple[Family, ...] = ("modelopt", "native", "fp32")
        with _timed(times, "make checkpoints"):
            sizes = {family: _make(root / family, config, family, args.seed, quiet) for family in families}
        print(f"checkpoints of one set of random weights, seed {args.seed}: ", end="")
        print(", ".join(f"{family} {size / 1e6:.1f} MB" for family, size in sizes.items()))

        with _timed(times, "tune"):
            tuned = _tune(root, (1, len(prompt)), device, args)
        planned = _planned(tuned["tables"], config, (1, len(prompt)))
        with _timed(times, "load"):
            drafts = root / "native" if config.num_nextn_predict_layers else None
            model = load(None, root / "modelopt", device, drafts=drafts, progress=quiet)
        stack.callback(fp4suite.use_table, None)
        if device.type == "cuda":
            fp4suite.use_table(tuned["tables"][0])

        sampling = Sampling(max_new_tokens=args.max_new_tokens, seed=args.seed)
        references = stack.enter_context(reference_where_no_kernel(device))
        if device.type == "cuda":  # kernels compile when they are first met
            with _timed(times, "warm up"):
                timed_generation(model, prompt, Sampling(max_new_tokens=2), device)
        with dispatch.recording() as choices:
            made = _generate(model, prompt, sampling, device, args.quiet)
        times["prefill"], times["decode"] = made.prefill_s, made.decode_s
        print(f"\nprompt  {tokenizer.decode(prompt)!r}\ntext    {tokenizer.decode(made.tokens)!r}\n")

        with _timed(times, "compare with FP32"):
            errors, acceptance = _compare(model, root, prompt + made.tokens, device, args.quiet)

    speeds = {"prefill": len(prompt) / made.prefill_s, "decode": made.decode_tokens_per_s}
    print(_time_table(times, speeds, made))
    used = _used(choices)
    print(f"\nwhat ran on {device}:")
    print(text_table(("op", "kernel", "config", "why", "shapes", "calls"), [list(row.values()) for row in used]))
    if device.type == "cpu":
        how = "measured" if tuned["measured"] else "predicted: nothing was timed here"
        print(f"\nwhat the tuned tables choose on GPUs ({how}):")
        print(text_table(("arch", "kernel", "m", "config", "layers"), _joined(planned)))
    print("\nlogits at every position against the same weights in FP32 (random layers pass errors on undamped):")
    print(text_table(("model", "relative error", "same top token"), [list(row.values()) for row in errors]))
    if acceptance is not None:
        print(f"draft block: {acceptance:.1%} of its tokens are the model's own (random weights: chance is the rule)")
    return {
        "config": args.config,
        "seed": args.seed,
        "device": str(device),
        "prompt_tokens": len(prompt),
        "tokens": made.tokens,
        "text": tokenizer.decode(made.tokens),
        "tokenizer": tokenizer.name,
        "checkpoint_bytes": sizes,
        "seconds": times,
        "tokens_per_s": speeds,
        "used": used,
        "ops_on_reference": references,
        "tables": tuned["tables"],
        "measured": tuned["measured"],
        "planned": planned,
        "errors": errors,
        "draft_acceptance": acceptance,
    }


@contextlib.contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times[phase] = time.perf_counter() - began


def _make(directory: Path, config: ModelConfig, family: Family, seed: int, quiet: bool | None) -> int:
    return make_checkpoint(directory, config, family, seed=seed, shard_bytes=8 << 20, force=True, progress=quiet)


def _tune(root: Path, m: Sequence[int], device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The tuner's command line, in a process of its own: its report. Raises ValueError with its last words."""
    package = (__package__ or "model").rpartition(".")[0]
    module = f"{package}.tuner" if package else "tuner"
    command = [
        sys.executable,
        "-m",
        module,
        "tune",
        "--layers-of",
        str(root / "modelopt"),
        "--out",
        str(root / "tables"),
    ]
    command += ["--budget", "small", "--m", ",".join(map(str, m)), "--seconds", str(args.tune_seconds), "--json"]
    command += ["--quiet"] if args.quiet else []
    command += ["--device", f"cuda:{device.index or 0}"] if device.type == "cuda" else []
    environment = dict(os.environ)
    if not package:  # a checkout, which the process has to find wherever this one was started
        known = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *([known] if known else [])])
    # its progress bars go where ours go
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ValueError(f"tuning failed ({' '.join(command)}): {lines[-1] if lines else 'no output'}")
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def _generate(
    model: Transformer, prompt: list[int], sampling: Sampling, device: torch.device, quiet: bool
) -> Generated:
    with tqdm(total=sampling.max_new_tokens, desc="generate", unit="tok", disable=True if quiet else None) as bar:
        return timed_generation(model, prompt, sampling, device, on_token=lambda _: (bar.update(), None)[1])


def _compare(
    model: Transformer, root: Path, tokens: list[int], device: torch.device, quiet: bool
) -> tuple[list[dict[str, Any]], float | None]:
    """Errors of the logits at every position against the FP32 weights in FP32 arithmetic, and draft acceptance."""
    true, _ = _logits(load(None, root / "fp32", device, weights="fp32", progress=False), tokens, device, "fp32")
    own = default_act_format(device)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("NVFP4 weights, FP32 arithmetic", {"weights": "fp32"}),
        ("NVFP4 weights, BF16 arithmetic", {"act_format": "float"}),
        ("NVFP4 weights and activations", {"act_format": "nvfp4"}),
    ]
    rows = []
    acceptance = None
    for name, options in tqdm(cases, desc="compare", disable=True if quiet else None):
        if options.get("act_format") == own:
            got, acceptance = _logits(model, tokens, device, "bf16")
        elif own == "nvfp4" and options.get("act_format") == "float":
            continue  # these tensor cores multiply FP4 by FP4 only
        else:
            other = load(None, root / "modelopt", device, progress=False, **options)
            got, _ = _logits(other, tokens, device, "fp32" if "weights" in options else "bf16")
        error = float((got - true).norm() / true.norm())
        agreement = float((got.argmax(1) == true.argmax(1)).float().mean())
        rows.append({"model": name, "relative_error": error, "same_top": agreement})
    return rows, acceptance


def _logits(model: Transformer, tokens: list[int], device: torch.device, format: Any) -> tuple[Tensor, float | None]:
    """FP32 logits [tokens - 1, vocab] of one pass over all tokens but the last, and how often the draft block agrees.

    The draft block's guess at t, of the token at t + 2, counts if it is the model's own most probable one at t + 1.
    """
    cache = KVCache(model.config, max_tokens=len(tokens), kv_format=format, index_format=format, device=device)
    batch = cache.prepare([(cache.open(), tokens[:-1])])
    with torch.inference_mode():
        streams = model.streams(batch, cache)
        logits = model.logits(streams)
        if not model.config.num_nextn_predict_layers:
            return logits, None
        guesses, _ = model.draft(streams, torch.tensor(tokens[1:], device=device), batch, cache)
    agree = guesses[:-1].argmax(1) == logits[1:].argmax(1)
    return logits, float(agree.float().mean())


def _time_table(times: dict[str, float], speeds: dict[str, float | None], made: Generated) -> str:
    counts = {"prefill": made.prompt_tokens, "decode": len(made.tokens)}
    rows = [[phase, counts.get(phase), seconds, speeds.get(phase)] for phase, seconds in times.items()]
    rows.append(["all", None, sum(times.values()), None])
    return text_table(("phase", "tokens", "seconds", "tokens/s"), rows)


def _used(choices: Sequence[dispatch.Choice]) -> list[dict[str, Any]]:
    """What ran, equal choices joined, in the order of first use."""
    joined: dict[tuple[str, str, str, str], tuple[set[str], int]] = {}
    for choice in choices:
        key = (choice.op, choice.kernel, _knobs(choice.config), choice.reason)
        problems, calls = joined.get(key, (set(), 0))
        joined[key] = ({*problems, str(choice.problem)} if choice.problem else problems, calls + 1)
    names = ("op", "kernel", "config", "why")
    return [
        {**dict(zip(names, key, strict=True)), "shapes": len(problems) or None, "calls": calls}
        for key, (problems, calls) in joined.items()
    ]


def _planned(tables: Sequence[str], config: ModelConfig, m: Sequence[int]) -> list[dict[str, Any]]:
    """What each table chooses for the layers' shapes on its own architecture."""
    rows = []
    for path in tables:
        target = _target(path)
        fp4suite.use_table(path)
        for op in PROBLEMS:
            if op == "dequant_nvfp4":
                continue  # for layers without a 4-bit kernel: no such layer here
            for layer in shapes.problems(config.to_json(), op, arch=target.arch, m=m):
                choice = dispatch.choose_for(op, layer.problem, target)
                rows.append(
                    {
                        "arch": target.arch,
                        "op": op,
                        "layers": ", ".join(layer.layers),
                        "m": layer.problem.dims()["m"],
                        "kernel": choice.kernel,
                        "config": _knobs(choice.config),
                    }
                )
    fp4suite.use_table(None)
    return rows


def _joined(planned: Sequence[dict[str, Any]]) -> list[list[object]]:
    """The rows of `_planned` with the layers of one choice in one row."""
    layers: dict[tuple[object, ...], dict[str, None]] = {}
    for row in planned:
        names = dict.fromkeys(row["layers"].split(", "))
        layers.setdefault((row["arch"], row["kernel"], row["m"], row["config"]), {}).update(names)
    return [[*key, ", ".join(names)] for key, names in layers.items()]


def _target(path: str) -> dispatch.Target:
    """What a table is of."""
    found = table.read(path)
    return dispatch.Target(found.arch, found.device)


def _knobs(config: Any) -> str:
    """A kernel's config by the knobs that differ from its default."""
    if config is None:
        return "-"
    default = type(config)()
    changed = [(f.name, getattr(config, f.name)) for f in fields(config)]
    return " ".join(f"{name}={value}" for name, value in changed if value != getattr(default, name)) or "default"
