"""The order of choice: override, user table, device table, architecture table, default, refusal."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fp4suite
from fp4suite import TableError, UnsupportedError, dispatch, ops, registry, table
from fp4suite.dispatch import Target, choose, choose_for, on_target, override, recording, use_table, weight_layout
from fp4suite.formats import WeightLayout
from fp4suite.problem import GemmProblem, QuantizeProblem, complete

H100 = Target("sm_90a", "nvidia-h100-80gb-hbm3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeConfig:
    tile: int = 64


def _fake_kernel(name: str, most_m: int = 1 << 30) -> ModuleType:
    """A kernel module whose launch writes its tile into out, so that a test sees which config ran."""
    module = ModuleType(name)
    module.Config = FakeConfig
    module.SPACE = {"tile": (64, 128, 256)}
    module.SF_LAYOUT = "linear"
    module.supports = lambda p, c: f"m={p.m} is over {most_m}" if p.m > most_m else None
    module.launch = lambda a, b, segments, out, config: out.fill_(config.tile)
    return module


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two fake GEMM kernels on sm_90a, no shipped tables, caches emptied around the test."""
    for name, most in (("fake_small", 16), ("fake_any", 1 << 30)):
        monkeypatch.setitem(sys.modules, f"fakes.{name}", _fake_kernel(name, most))
    rows = [registry.Kernel("gemm_nvfp4", n, f"fakes.{n}", ("sm_90a",)) for n in ("fake_small", "fake_any")]
    monkeypatch.setattr(registry, "KERNELS", rows)
    monkeypatch.setattr(registry, "source_hash", lambda name: "now")
    monkeypatch.setattr(table, "shipped_dir", lambda: tmp_path)
    _forget()
    yield tmp_path
    use_table(None)
    _forget()


def _forget() -> None:
    dispatch.reread_tables()
    registry.load.cache_clear()


def _entry(m: int, tile: int, kernel: str = "fake_any", **more: object) -> table.Entry:
    fields = {"measured": True, "median_us": 1.0, "source_hash": "now"} | more
    fields.setdefault("problem", GemmProblem(m=m, n=256, k=512).dims())
    return table.Entry(op="gemm_nvfp4", kernel=kernel, config={"tile": tile}, **fields)


def _write(path: Path, *entries: table.Entry, device: str = H100.device, arch: str = "sm_90a") -> Path:
    table.write(path, table.Table(schema=table.SCHEMA, device=device, arch=arch, entries=list(entries)))
    return path


def _choose(m: int, target: Target = H100) -> dispatch.Choice:
    return choose_for("gemm_nvfp4", GemmProblem(m=m, n=256, k=512), target)


def test_default_is_the_first_row_that_supports(fakes: Path) -> None:
    assert (_choose(16).kernel, _choose(17).kernel) == ("fake_small", "fake_any")
    assert _choose(16).config == FakeConfig()
    assert _choose(16).reason == "default: no table entry fits"


def test_tables_in_order(fakes: Path) -> None:
    _write(fakes / "sm_90a.json", _entry(8, 64, measured=False, median_us=None), device="sm_90a")
    assert _choose(8).config == FakeConfig(tile=64)
    assert _choose(8).reason == "architecture table sm_90a (predicted)"
    _forget()
    _write(fakes / f"{H100.device}.json", _entry(8, 128))
    assert _choose(8).config == FakeConfig(tile=128)
    assert _choose(8).reason == "device table nvidia-h100-80gb-hbm3 (measured)"
    use_table(_write(fakes / "mine.json", _entry(8, 256)))
    assert _choose(8).config == FakeConfig(tile=256)
    use_table(None)
    assert _choose(8).config == FakeConfig(tile=128)


def test_an_unknown_device_falls_back_to_its_architecture_then_to_the_default(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(8, 128))
    other = Target("sm_90a", "nvidia-gh200")
    assert _choose(8, other).reason == "default: no table entry fits"
    _forget()
    _write(fakes / "sm_90a.json", _entry(8, 64), device="sm_90a")
    assert _choose(8, other).reason == "architecture table sm_90a (measured)"


def test_unseen_m_takes_the_nearest_bucket_that_supports_it(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(16, 64, "fake_small"), _entry(256, 256))
    assert _choose(11).config == FakeConfig(tile=64)
    assert _choose(11).reason == "device table nvidia-h100-80gb-hbm3 (measured, nearest m=16)"
    assert _choose(17).config == FakeConfig(tile=256)  # 16 is nearer, but its kernel takes no m over 16
    assert _choose(9000).config == FakeConfig(tile=256)


def test_an_m_unlike_any_bucket_takes_the_default(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load("fake_any")
    monkeypatch.setattr(module, "alike", lambda c, m, other: -(-m // c.tile) == -(-other // c.tile), raising=False)
    _write(fakes / f"{H100.device}.json", _entry(256, 256), _entry(512, 128))
    assert _choose(200).config == FakeConfig(tile=256)
    assert _choose(450).config == FakeConfig(tile=128)
    assert _choose(500).config == FakeConfig(tile=128)
    assert _choose(300).reason == "default: no table entry fits"  # two tiles of 256, three of 128
    assert _choose(8192).config == FakeConfig()
    _forget()
    _write(fakes / f"{H100.device}.json", _entry(512, 256), _entry(256, 128))
    assert _choose(300).config == FakeConfig(tile=256)  # 256 is nearer, but 300 are three tiles of its 128


def test_an_output_that_was_not_tuned_takes_what_was_measured_for_another(fakes: Path) -> None:
    wide = dataclasses.replace(GemmProblem(m=8, n=256, k=512), out="fp32")
    path = fakes / f"{H100.device}.json"
    _write(path, _entry(8, 128), _entry(64, 256))
    assert choose_for("gemm_nvfp4", dataclasses.replace(wide, m=9), H100).config == FakeConfig(tile=128)
    reason = "device table nvidia-h100-80gb-hbm3 (measured, nearest m=64, of out=bf16)"
    assert choose_for("gemm_nvfp4", dataclasses.replace(wide, m=60), H100).reason == reason
    _forget()
    _write(path, _entry(8, 128), _entry(64, 256, problem=dataclasses.replace(wide, m=64).dims()))
    assert choose_for("gemm_nvfp4", wide, H100).config == FakeConfig(tile=256)  # its own, however far
    _forget()
    _write(path, _entry(8, 128, measured=False, median_us=None, predicted_us=1.0))
    assert choose_for("gemm_nvfp4", wide, H100).reason == "default: no table entry fits"


def test_an_entry_of_an_older_kernel_is_used_and_says_so(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(8, 128, source_hash="then"))
    assert _choose(8).reason == "device table nvidia-h100-80gb-hbm3 (measured, kernel changed since)"


def test_a_prediction_for_an_older_kernel_is_passed_over(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(8, 128, source_hash="then", measured=False), _entry(64, 256))
    assert _choose(8).reason == "device table nvidia-h100-80gb-hbm3 (measured, nearest m=64)"


def test_an_entry_that_no_longer_parses_is_passed_over(fakes: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = table.Entry(**{**_fields(_entry(8, 1)), "config": {"cluster": 2}})
    _write(fakes / f"{H100.device}.json", gone, _entry(64, 128))
    assert _choose(8).config == FakeConfig(tile=128)
    assert "has no cluster; it has tile" in caplog.text


def _fields(e: table.Entry) -> dict:
    return {f: getattr(e, f) for f in e.__struct_fields__}


def test_a_table_entry_changes_the_config_that_runs(fakes: Path) -> None:
    a, b = torch.zeros(8, 512, dtype=torch.bfloat16), fp4suite.reference.quantize_nvfp4(torch.ones(256, 512))
    with on_target("sm_90a", H100.device):
        assert ops.gemm_nvfp4(a, b)[0, 0] == 64
        use_table(_write(fakes / "mine.json", _entry(8, 256)))
        with recording() as record:
            assert ops.gemm_nvfp4(a, b)[0, 0] == 256
    assert [(c.kernel, c.config, c.reason) for c in record] == [
        ("fake_any", FakeConfig(tile=256), "table mine (measured)")
    ]


def test_overrides_nest_and_beat_tables(fakes: Path) -> None:
    _write(fakes / f"{H100.device}.json", _entry(8, 128))
    p = GemmProblem(m=8, n=256, k=512)
    with on_target("sm_90a", H100.device):
        with override(op="gemm_nvfp4", config=FakeConfig(tile=99)):
            assert choose("gemm_nvfp4", p, "cpu").config == FakeConfig(tile=99)
            with override(kernel="fake_small"):
                assert choose("gemm_nvfp4", p, "cpu").kernel == "fake_small"
            with override(op="gemm_nvfp4", kernel="reference"):
                assert choose("gemm_nvfp4", p, "cpu").is_reference
        assert choose("gemm_nvfp4", p, "cpu").config == FakeConfig(tile=128)
        with override(kernel="fake_small"), pytest.raises(ValueError, match=r"cannot run .* m=17 is over 16"):
            choose("gemm_nvfp4", GemmProblem(m=17, n=256, k=512), "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a kernel, a config or both"),
        ({"kernel": "nothing"}, "no kernel is called 'nothing'"),
        ({"kernel": "nothing"}, r"override\(kernel='nothing'\)"),
        ({"kernel": "reference"}, "needs op="),
        ({"kernel": "fake_any", "op": "route"}, "is a kernel of gemm_nvfp4, not of route"),
        ({"op": "gemm", "kernel": "reference"}, "op must be one of quantize_nvfp4, .* got 'gemm'"),
        ({"op": "gemm_nvpf4", "config": FakeConfig()}, "op must be one of .* got 'gemm_nvpf4'"),
    ],
)
def test_wrong_overrides(fakes: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), override(**arguments):
        pytest.fail("told only once an op runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "gemm_nvfp4"}, r"must be fakes.fake_small.Config or fakes.fake_any.Config, got dict: \{'tile': 64\}"),
        ({"kernel": "fake_any"}, "must be fakes.fake_any.Config, got dict"),
        ({"op": "gemm_nvfp4", "kernel": "reference"}, "must be None, as reference has none, got dict"),
        ({"op": "sparse_attention"}, "must be None, as sparse_attention has none, got dict"),
    ],
)
def test_a_config_of_another_type_is_refused_where_it_is_given(fakes: Path, arguments: dict, message: str) -> None:
    for row in registry.kernels("gemm_nvfp4"):
        registry.load(row.name)
    with pytest.raises(TypeError, match=message), override(config={"tile": 64}, **arguments):
        pytest.fail("told only once an op runs")


def test_a_config_of_a_kernel_that_is_not_chosen_is_refused(fakes: Path) -> None:
    class Another:
        tile = 64

    registry.load("fake_any").Config = Another
    p = GemmProblem(m=8, n=256, k=512)
    with on_target("sm_90a", H100.device), override(op="gemm_nvfp4", config=Another()):
        with pytest.raises(ValueError, match=r"override of gemm_nvfp4 gives a .*Config, but fake_small is chosen here"):
            choose("gemm_nvfp4", p, "cpu")
        assert choose("gemm_nvfp4", dataclasses.replace(p, m=17), "cpu").kernel == "fake_any"


def test_an_override_for_what_has_no_kernel_takes_the_reference(fakes: Path) -> None:
    for op in ("sparse_attention", "moe_nvfp4", "index_query_fp8", "rope_inverse_"):
        with override(op=op, kernel="reference"):
            assert choose(op, None, "cpu").is_reference


def test_a_wrong_table_of_the_environment_names_its_variable(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4SUITE_TABLE", str(fakes / "none.json"))
    with pytest.raises(TableError, match=r"FP4SUITE_TABLE: .*none.json: cannot be read \(No such file"):
        _choose(8)
    other = _write(fakes / "b200.json", _entry(8, 64), device="nvidia-b200", arch="sm_100a")
    monkeypatch.setenv("FP4SUITE_TABLE", str(other))
    with pytest.raises(TableError, match=r"FP4SUITE_TABLE: .* is of nvidia-b200 \(sm_100a\); this is nvidia-h100"):
        _choose(8)
    mine = _write(fakes / "mine.json", _entry(8, 256))
    monkeypatch.setenv("FP4SUITE_TABLE", str(mine))
    assert _choose(8).reason == "table of FP4SUITE_TABLE mine (measured)"
    shipped = _write(fakes / f"{H100.device}.json", _entry(8, 64))
    assert dispatch.tables(H100) == [("table of FP4SUITE_TABLE", mine), ("device table", shipped)]


def test_nothing_fits(fakes: Path) -> None:
    registry.KERNELS.pop()
    with pytest.raises(
        UnsupportedError, match=r"gemm_nvfp4 \(m=17 .* no kernel supports it: fake_small: m=17 is over 16"
    ):
        _choose(17)
    with pytest.raises(UnsupportedError, match="on sm_100a: kernels exist for sm_90a"):
        _choose(8, Target("sm_100a", "nvidia-b200"))


def test_bad_tables(fakes: Path) -> None:
    with pytest.raises(TableError, match=r"none.json: cannot be read"):
        use_table(fakes / "none.json")
    (fakes / "broken.json").write_text('{"schema": 1, "dev')
    with pytest.raises(TableError, match=r"broken.json: not a tuned table"):
        use_table(fakes / "broken.json")
    (fakes / "newer.json").write_text('{"schema": 2, "device": "d", "arch": "sm_90a", "entries": []}')
    with pytest.raises(TableError, match="schema 2, this version reads 1"):
        use_table(fakes / "newer.json")
    _write(fakes / "twice.json", _entry(8, 64), _entry(8, 128))
    with pytest.raises(TableError, match="two entries for gemm_nvfp4"):
        use_table(fakes / "twice.json")
    _write(fakes / "negative.json", _entry(8, 64, median_us=-4.6))
    with pytest.raises(TableError, match=r"not a tuned table \(Expected `float` > 0"):
        use_table(fakes / "negative.json")
    _write(fakes / "unmeasured.json", _entry(8, 64, median_us=None))
    with pytest.raises(TableError, match="marked measured but has no median_us"):
        use_table(fakes / "unmeasured.json")
    use_table(_write(fakes / "b200.json", _entry(8, 64), device="nvidia-b200", arch="sm_100a"))
    with pytest.raises(TableError, match=r"is of nvidia-b200 \(sm_100a\); this is nvidia-h100-80gb-hbm3 \(sm_90a\)"):
        _choose(8)


def test_an_entry_is_of_its_order(fakes: Path) -> None:
    """The nearest m counts only among entries for weights that lie as these do."""
    fragments = dataclasses.replace(GemmProblem(m=64, n=256, k=512), order="fragments_sm90")
    _write(fakes / f"{H100.device}.json", _entry(8, 64), _entry(64, 128, problem=fragments.dims()))
    assert _choose(64).config == FakeConfig(tile=64)
    found = choose_for("gemm_nvfp4", dataclasses.replace(fragments, m=8), H100)
    assert found.config == FakeConfig(tile=128)
    assert found.reason == "device table nvidia-h100-80gb-hbm3 (measured, nearest m=64)"


def test_an_entry_older_than_a_dimension_is_of_its_default(fakes: Path) -> None:
    """Before weights had orders, all lay by rows: such entries serve on, and are replaced by new ones."""
    new = GemmProblem(m=8, n=256, k=512).dims()
    old = {name: value for name, value in new.items() if name != "order"}
    path = _write(fakes / f"{H100.device}.json", _entry(8, 128, problem=old))
    assert '"order"' not in path.read_text()
    assert table.read(path).entries[0].problem == new
    assert list(table.read(path).entries[0].problem) == list(new)
    assert _choose(8).config == FakeConfig(tile=128)
    merged = table.merge(path, H100.device, "sm_90a", [_entry(8, 256)])
    assert [e.config for e in merged.entries] == [{"tile": 256}]
    _write(fakes / "twice.json", _entry(8, 64), _entry(8, 128, problem=old))
    with pytest.raises(TableError, match="two entries for gemm_nvfp4"):
        table.read(fakes / "twice.json")


def test_entries_of_what_this_version_does_not_know_are_left_alone() -> None:
    assert complete("no_such_op", {"m": 1}) == {"m": 1}
    dims = {"m": 8, "n": 256, "k": 512, "colour": "red"}
    assert complete("gemm_nvfp4", dims) == GemmProblem(m=8, n=256, k=512).dims() | {"colour": "red"}


def _reading(name: str, layout: WeightLayout, refuse: Callable[[GemmProblem], bool] = lambda p: False) -> ModuleType:
    """A fake kernel of this layout, beside those of the fixture."""
    module = _fake_kernel(name)
    module.SF_LAYOUT, module.WEIGHT_ORDER = layout.sf_layout, layout.order
    module.supports = lambda p, c: "no" if p.order != layout.order or refuse(p) else None
    return module


FRAGMENTS, BLOCKED = WeightLayout(order="fragments_sm90"), WeightLayout(sf_layout="blocked_128x4")


@pytest.mark.parametrize(
    ("kernels", "want"),
    [
        ([], WeightLayout()),
        ([(BLOCKED, lambda p: False)], BLOCKED),
        ([(WeightLayout(), lambda p: False), (FRAGMENTS, lambda p: False)], FRAGMENTS),
        ([(WeightLayout(), lambda p: False), (FRAGMENTS, lambda p: p.m > 64)], WeightLayout()),
        ([(FRAGMENTS, lambda p: p.m > 64), (FRAGMENTS, lambda p: p.m <= 64)], FRAGMENTS),
        ([(BLOCKED, lambda p: p.act == "bf16"), (FRAGMENTS, lambda p: p.out == "fp32")], WeightLayout()),
        ([(BLOCKED, lambda p: False), (FRAGMENTS, lambda p: p.segments != 3)], FRAGMENTS),
    ],
)
def test_weights_lie_as_some_kernel_reads_them_for_any_m(fakes, kernels, want, monkeypatch) -> None:
    rows = []
    for i, (layout, refuse) in enumerate(kernels):
        monkeypatch.setitem(sys.modules, f"fakes.k{i}", _reading(f"k{i}", layout, refuse))
        rows.append(registry.Kernel("gemm_nvfp4", f"k{i}", f"fakes.k{i}", ("sm_90a",)))
    monkeypatch.setattr(registry, "KERNELS", rows)
    with on_target("sm_90a", H100.device):
        assert weight_layout(256, 512, "cpu", segments=3) == want
        small = weight_layout(256, 80, "cpu", segments=3)  # no whole tiles of 64
        assert small.order == "rows"
    assert weight_layout(256, 512, "cpu") == WeightLayout()


def test_merge_replaces_and_keeps(fakes: Path) -> None:
    path = fakes / "t.json"
    table.merge(path, "d", "sm_90a", [_entry(8, 64), _entry(16, 64)])
    merged = table.merge(path, "d", "sm_90a", [_entry(8, 256)])
    assert merged == table.read(path)
    assert {(e.problem["m"], e.config["tile"]) for e in merged.entries} == {(8, 256), (16, 64)}
    assert len(path.read_text().splitlines()) == 4  # head, one line an entry, foot
    with pytest.raises(TableError, match=r"is of d \(sm_90a\), will not take entries of e \(sm_100a\)"):
        table.merge(path, "e", "sm_100a", [])


def test_cpu_runs_the_reference_whatever_the_tables_say(fakes: Path) -> None:
    assert choose("quantize_nvfp4", QuantizeProblem(m=1, k=16), "cpu").is_reference


def test_what_only_kernels_that_are_not_emulated_take_is_the_references(fakes, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels_cute.fake_small", _fake_kernel("fake_small", 16))
    rows = [("fake_small", "kernels_cute.fake_small"), ("fake_any", "fakes.fake_any")]
    monkeypatch.setattr(registry, "KERNELS", [registry.Kernel("gemm_nvfp4", *row, ("sm_90a",)) for row in rows])
    chosen = [
        dispatch.choose_for(
            "gemm_nvfp4", GemmProblem(m=m, n=256, k=512), dispatch.Target("sm_90a", "a device", emulated=emulated)
        ).kernel
        for emulated, m in ((True, 16), (True, 17), (False, 17))
    ]
    assert chosen == ["fake_small", registry.REFERENCE, "fake_any"]
