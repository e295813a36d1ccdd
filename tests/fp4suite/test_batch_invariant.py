"""Batch-invariant mode: how it is asked for, one arithmetic for all m, and ops whose rows do not know of each other."""

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fp4suite
from fp4suite import (
    NVFP4Tensor,
    PagedCache,
    TableError,
    UnsupportedError,
    by_token,
    dispatch,
    ops,
    override,
    reference,
    registry,
    table,
)
from fp4suite.dispatch import Target, batch_invariant, choose, choose_for, is_batch_invariant, on_target
from fp4suite.layouts import Order
from fp4suite.problem import Act, GemmProblem, QuantizeProblem

from .op_arguments import OPCHECKS, PUBLIC, arguments, assert_same, flat, g, weight

H100 = Target("sm_90a", "nvidia-h100-80gb-hbm3")

# --- the switch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def process() -> None:
    yield
    fp4suite.set_batch_invariant(None)


def test_block_beats_process_beats_environment(process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_batch_invariant()
    monkeypatch.setenv("FP4SUITE_BATCH_INVARIANT", "1")
    assert is_batch_invariant()
    fp4suite.set_batch_invariant(False)
    assert not is_batch_invariant()
    with batch_invariant():
        assert is_batch_invariant()
        with batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    fp4suite.set_batch_invariant(None)
    assert is_batch_invariant()
    monkeypatch.setenv("FP4SUITE_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="FP4SUITE_BATCH_INVARIANT must be 0 or 1, got 'yes'"):
        is_batch_invariant()


def test_the_process_setting_reaches_threads_and_the_block_does_not(process: None) -> None:
    def seen() -> bool:
        found = []
        thread = threading.Thread(target=lambda: found.append(is_batch_invariant()))
        thread.start()
        thread.join()
        return found[0]

    with batch_invariant():
        assert not seen()
    fp4suite.set_batch_invariant(True)
    assert seen()


# --- the choice -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeConfig:
    tile: int = 64
    parts: int = 1


def _fake(default_parts: Callable[[int], int], most_m: int = 1 << 30, invariant: str | None = "1 part") -> ModuleType:
    module = ModuleType("fake")
    module.Config, module.SF_LAYOUT = FakeConfig, "linear"
    module.supports = lambda p, c: f"m={p.m} is over {most_m}" if p.m > most_m else None
    module.default = lambda p: FakeConfig(parts=default_parts(p.m))
    module.arithmetic = lambda p, c: f"{c.parts} part"
    module.in_arithmetic = lambda p, wanted: FakeConfig(parts=int(wanted.split()[0]))
    if invariant is not None:
        module.INVARIANT = invariant
    return module


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ "small" is preferred but ends at m = 16; "any" sums in parts where there are few rows."""
    modules = {
        "small": _fake(lambda m: 1, most_m=16),
        "silent": _fake(lambda m: 1, invariant=None),
        "any": _fake(lambda m: 4 if m < 64 else 1),
    }
    rows = []
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"fakes.{name}", module)
        rows.append(registry.Kernel("gemm_nvfp4", name, f"fakes.{name}", ("sm_90a",)))
    monkeypatch.setattr(registry, "KERNELS", rows)
    monkeypatch.setattr(registry, "source_hash", lambda name: "now")
    monkeypatch.setattr(table, "shipped_dir", lambda: tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    dispatch.reread_tables()
    registry.load.cache_clear()


def _entry(m: int, tile: int, parts: int, kernel: str = "any", invariant: bool = False) -> table.Entry:
    return table.Entry(
        op="gemm_nvfp4",
        problem=GemmProblem(m=m, n=256, k=512).dims(),
        kernel=kernel,
        config={"tile": tile, "parts": parts},
        measured=True,
        median_us=1.0,
        source_hash="now",
        invariant=invariant,
    )


def _write(path: Path, *entries: table.Entry) -> None:
    table.write(path, table.Table(schema=table.SCHEMA, device=H100.device, arch="sm_90a", entries=list(entries)))
    _forget()


def _chosen(m: int) -> tuple[str, FakeConfig]:
    choice = choose_for("gemm_nvfp4", GemmProblem(m=m, n=256, k=512), H100)
    assert choice.invariant == is_batch_invariant()
    return choice.kernel, choice.config


def test_one_kernel_and_one_arithmetic_for_every_m(fakes: Path) -> None:
    assert (_chosen(1)[0], _chosen(17)[0]) == ("small", "silent")
    with batch_invariant():
        assert {_chosen(m) for m in (1, 16, 17, 9000)} == {("any", FakeConfig())}


def test_entries_of_another_arithmetic_or_kernel_are_passed_over(fakes: Path) -> None:
    entries = [_entry(1, 8, 4), _entry(8, 16, 1, "small"), _entry(64, 32, 1), _entry(256, 128, 1)]
    _write(fakes / f"{H100.device}.json", *entries)
    assert [_chosen(m)[1].tile for m in (1, 8, 64, 256, 9000)] == [8, 16, 32, 128, 128]
    with batch_invariant():
        # of "any" in one part: its default, where the entries are of m far from this one
        assert [_chosen(m)[1] for m in (1, 8, 9000)] == [FakeConfig()] * 3
        assert [_chosen(m)[1].tile for m in (32, 64, 100, 256, 512)] == [32, 32, 32, 128, 128]


def test_entries_tuned_for_the_mode_decide_the_arithmetic(fakes: Path) -> None:
    """Also one in parts, as long as all m have the same; nobody else sees them."""
    ordinary = [_entry(1, 8, 4), _entry(256, 128, 1), _entry(512, 32, 2)]
    _write(
        fakes / f"{H100.device}.json", *ordinary, _entry(1, 64, 2, invariant=True), _entry(64, 256, 2, invariant=True)
    )
    assert [_chosen(m)[1] for m in (1, 64)] == [FakeConfig(tile=8, parts=4), FakeConfig(tile=128)]
    with batch_invariant():
        tiles = {m: _chosen(m)[1] for m in (1, 4, 64, 300, 512, 9000)}
        assert {c.parts for c in tiles.values()} == {2}
        assert [c.tile for c in tiles.values()] == [64, 64, 256, 32, 32, 256]
        assert choose_for("gemm_nvfp4", GemmProblem(m=9, n=512, k=512), H100).config.parts == 1  # another weight


def test_entries_that_disagree_are_an_error(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(1, 64, 2, invariant=True), _entry(64, 64, 1, invariant=True))
    _chosen(1)
    with batch_invariant(), pytest.raises(TableError, match=r"do not sum in one way: any 1 part; any 2 part"):
        _chosen(1)


def test_a_table_keeps_both_kinds_of_entry(fakes: Path) -> None:
    path = fakes / "t.json"
    table.merge(path, "d", "sm_90a", [_entry(8, 64, 1)])
    merged = table.merge(path, "d", "sm_90a", [_entry(8, 128, 1, invariant=True)])
    assert [(e.invariant, e.config["tile"]) for e in merged.entries] == [(False, 64), (True, 128)]
    assert table.read(path).entries == merged.entries
    old = path.read_text().replace('"invariant":false,', "")
    assert '"invariant":false' not in old
    path.write_text(old)
    assert table.read(path).entries == merged.entries


def test_overrides(fakes: Path) -> None:
    problem = GemmProblem(m=1, n=256, k=512)
    with on_target("sm_90a", H100.device), override(kernel="any"):
        assert choose("gemm_nvfp4", problem, "cpu").config == FakeConfig(parts=4)
        with batch_invariant():
            assert choose("gemm_nvfp4", problem, "cpu").config == FakeConfig()
            with override(kernel="silent"), pytest.raises(ValueError, match="no arithmetic that is the same for every"):
                choose("gemm_nvfp4", problem, "cpu")
            with override(kernel="silent", config=FakeConfig(tile=1)):  # the same for every m by the caller's word
                assert choose("gemm_nvfp4", problem, "cpu").config.tile == 1


def test_no_kernel_for_every_m_is_an_error(fakes: Path) -> None:
    registry.KERNELS.pop()
    with (
        batch_invariant(),
        pytest.raises(
            UnsupportedError, match=r"small: m=64 is over 16; silent: it has no arithmetic that is the same for every m"
        ),
    ):
        _chosen(1)
    assert _chosen(1)[0] == "small"


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_registered_kernels_keep_to_one_arithmetic(arch: str) -> None:
    """With the shipped tables: all m of a problem, and quantising kernels, whose configs all give the same bytes."""
    device = H100.device if arch == "sm_90a" else "sm_100a"
    kinds: dict[str, tuple[tuple[Act, Order], ...]] = {
        "sm_90a": (("bf16", "rows"), ("bf16", "fragments_sm90"), ("fp8", "fragments_sm90_fp8")),
        "sm_100a": (("nvfp4", "rows"),),
    }
    with batch_invariant():
        for act, order in kinds[arch]:
            for n, k in ((7168, 3072), (1536, 7168), (65536, 1536), (64, 7168)):
                made = {}
                for m in (1, 7, 8, 9, 16, 33, 64, 65, 200, 256, 500, 2048, 16384):
                    problem = GemmProblem(m=m, n=n, k=k, act=act, order=order)
                    choice = choose_for("gemm_nvfp4", problem, Target(arch, device))
                    made[choice.kernel, registry.arithmetic(choice.kernel, problem, choice.config)] = m
                assert len(made) == 1, made
        assert choose_for("quantize_nvfp4", QuantizeProblem(m=3, k=64), Target(arch, device)).invariant


# --- ops --------------------------------------------------------------------------------------------------------------

BY_ALL_ROWS = {"quantize_nvfp4", "rmsnorm_quantize", "swiglu_quantize", "rope_inverse_quantize"}
FIXED = {name: {"alpha": torch.tensor(0.01)} for name in BY_ALL_ROWS}


@pytest.mark.parametrize("name", sorted(BY_ALL_ROWS))
def test_a_global_scale_of_all_rows_is_refused(name: str) -> None:
    args, kwargs = arguments(name)
    kwargs.pop("alpha", None)
    with batch_invariant():
        with pytest.raises(ValueError, match="a global scale cannot come from all rows of the call: give alpha="):
            getattr(ops, name)(*args, **kwargs)
        getattr(ops, name)(*args, **kwargs, **FIXED[name])


def test_every_operator_without_a_kernel_can_be_cut() -> None:
    with_kernel = {k.op for k in registry.KERNELS}
    assert {name for name in PUBLIC if name not in with_kernel} <= by_token.EXACT | set(by_token.CUTS)
    with pytest.raises(UnsupportedError, match="new_op cannot be run token by token"):
        by_token.run("new_op", lambda x: x, (g(2, 3),))


@pytest.mark.parametrize("name", PUBLIC)
def test_ops_give_the_references_numbers(name: str) -> None:
    """Up to the order of sums; one graph and opcheck as without the mode."""
    args, kwargs = arguments(name)
    kwargs |= FIXED.get(name, {})
    want_args, want_kwargs = arguments(name)
    want = getattr(reference, name)(*want_args, **(want_kwargs | FIXED.get(name, {})))
    with batch_invariant():
        got = getattr(ops, name)(*args, **kwargs)
    for x, y in zip(flat((got, args)), flat((want, want_args)), strict=True):
        assert x.shape == y.shape
        if x.element_size() == 1:
            assert (x.view(torch.uint8) != y.view(torch.uint8)).float().mean() < 0.02
        else:
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-4, equal_nan=True)
    again, again_kwargs = arguments(name)
    compiled = torch.compile(
        lambda: getattr(ops, name)(*again, **(again_kwargs | FIXED.get(name, {}))), fullgraph=True, backend="aot_eager"
    )
    with batch_invariant():
        assert_same(compiled(), got)
    torch._dynamo.reset()


def _rows_of(m: int, k: int, seed: int) -> Tensor:
    return g(m, k, seed=seed, dtype=torch.bfloat16)


def _qkv_norm_rope_insert(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normed queries [tokens, 384], and the rows of 128 dims that were stored."""
    cache = PagedCache(torch.zeros(1, 80 * 256, dtype=torch.uint8), "bf16", 80, 128, 64)
    at, slots = torch.full((len(x),), 7, dtype=torch.int32), torch.arange(len(x), dtype=torch.int32)
    q, kv = x.split((384, 128), dim=1)
    normed = ops.qkv_norm_rope_insert(q, g(384), kv, g(128), at, g(20, 64, seed=8), 1e-6, cache, slots)
    return normed, reference.read_rows(cache, slots)


CALLS: dict[str, Callable[[Tensor], object]] = {
    "w4a16": lambda x: ops.gemm_nvfp4(x, weight(192, 512), out_dtype=torch.float32),
    "w4a16 in NVFP4": lambda x: ops.gemm_nvfp4(x, weight(192, 512), out_alpha=torch.tensor(0.02)),
    "w4a4": lambda x: ops.gemm_nvfp4(ops.quantize_nvfp4(x, alpha=torch.tensor(0.002)), weight(192, 512)),
    "w4a4 in NVFP4": lambda x: ops.gemm_nvfp4(
        ops.quantize_nvfp4(x, alpha=torch.tensor(0.002)), weight(192, 512), out_alpha=torch.tensor(0.02)
    ),
    "norm": lambda x: ops.rmsnorm_quantize(x, torch.ones(512), 1e-6, alpha=torch.tensor(0.002)),
    "rms_norm": lambda x: ops.rms_norm(x, torch.linspace(0.5, 1.5, 512), 1e-6),
    "qkv_norm_rope_insert": _qkv_norm_rope_insert,
    "swiglu_quantize": lambda x: ops.swiglu_quantize(x, alpha=torch.tensor(0.002)),
    "swiglu": lambda x: ops.swiglu(x, 10.0),
    "embed": lambda x: ops.embed((x[:, 0] * 4).long() % 40, g(40, 64), streams=4),
    "qnorm_rope": lambda x: ops.qnorm_rope(
        x.view(-1, 4, 128), torch.full((len(x),), 7, dtype=torch.int32), g(20, 64, seed=8), 1e-6
    ),
    "qnorm_rope_quantize": lambda x: ops.qnorm_rope_quantize(
        x.view(-1, 4, 128), torch.full((len(x),), 7, dtype=torch.int32), g(20, 64, seed=8), 1e-6
    ),
    "route": lambda x: ops.route(x.float(), topk=6, scale=2.5),
    "moe": lambda x: ops.moe_nvfp4(
        x,
        weight(4, 128, 512),
        weight(4, 512, 64),
        torch.tensor([[0, 3, 1]] * len(x), dtype=torch.int32),
        x[:, :3].float(),
    ),
    "hyper_connection_head": lambda x: ops.hyper_connection_head(
        x.view(-1, 4, 128), g(4, 512), g(4), g(1), g(128).bfloat16(), norm_eps=1e-6, eps=1e-6
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_row_is_the_same_in_any_batch(name: str) -> None:
    x = _rows_of(67, 512, seed=3)
    with batch_invariant():
        whole = flat(CALLS[name](x))
        for rows in (slice(0, 1), slice(5, 6), slice(60, 67), slice(1, 66)):
            for part, all_of_it in zip(flat(CALLS[name](x[rows])), whole, strict=True):
                if all_of_it.ndim:  # not the given alpha
                    assert torch.equal(part, all_of_it[rows]), name


def test_a_batch_without_rows() -> None:
    with batch_invariant():
        assert ops.gemm_nvfp4(_rows_of(0, 512, 1), weight(192, 512)).shape == (0, 192)
        ids = torch.zeros(0, 2, dtype=torch.int32)
        assert ops.moe_nvfp4(g(0, 64), weight(4, 64, 64), weight(4, 64, 32), ids, g(0, 2)).shape == (0, 64)


@pytest.mark.parametrize("operator", ["gemm_w4a16", "gemm_w4a4", "gemm_w4a4_quantize"])
def test_opcheck_in_the_mode(operator: str) -> None:
    a, b = _rows_of(5, 64, 0), weight(48, 64)
    right = (b.data, b.sf.view(torch.uint8), b.alpha, "linear", "rows", [])
    packed: NVFP4Tensor = reference.quantize_nvfp4(a)
    left = (packed.data, packed.sf.view(torch.uint8), packed.alpha, "linear")
    args = {
        "gemm_w4a16": (a, *right, torch.float32),
        "gemm_w4a4": (*left, *right, torch.bfloat16),
        "gemm_w4a4_quantize": (*left, *right, torch.tensor(0.01), "blocked_128x4"),
    }[operator]
    with batch_invariant():
        torch.library.opcheck(getattr(torch.ops.fp4suite, operator).default, args, test_utils=OPCHECKS)
