"""`bench --peers` on the CPU: a peer installed in a folder of the test, real products and checks, made-up times."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from fp4suite import registry, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem
from tuner import bench_cells, bench_peers, measure, peers, peers_plot, peers_rows, report, side_by_side, worker
from tuner.__main__ import main
from tuner.targets import Target

from . import cpu_kernel, fake_cells

CONFIG = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 64,
    "q_lora_rank": 64,
    "o_lora_rank": 64,
    "o_groups": 1,
    "index_n_heads": 1,
    "index_head_dim": 64,
    "qk_rope_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 0,
    "vocab_size": 256,
    "index_topk": 16,
    "compress_ratios": [4, 0],
}
TARGET = Target("sm_90a", "some-gpu", "cpu")

PEER = '''
"""A peer that decodes with tables of its own."""
import torch

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def pack(codes, scales):
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    return VALUES[pairs] * scales.repeat_interleave(16, dim=-1)


def matmul(x, packed, alpha):
    return (x.float() @ packed.T * alpha * FACTOR).bfloat16()
'''


class Inline:
    """A worker without a process: what it calls raises as it would across the pipe."""

    def call(self, function, *args, timeout):
        try:
            return function(*args)
        except Exception as e:
            raise worker.RemoteError(type(e).__name__, str(e)) from e

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _installed(monkeypatch, fake, tmp_path):
    """The fake peer's package is on the path; everything that fake_cells.install replaces comes back afterwards."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("Timer", "cuda_device", "l2_bytes"):
        monkeypatch.setattr(measure, name, getattr(measure, name))
    monkeypatch.setitem(peers.PEERS, "fake", fake_cells.FAKE)
    monkeypatch.setattr(cpu_kernel, "FAULT_M", {})
    monkeypatch.delitem(sys.modules, "fake_peer", raising=False)
    registry.KERNELS[:] = [fake_cells.OWN_KERNEL]
    yield
    bench_cells._shape = bench_cells._cell = None


@pytest.fixture
def install(tmp_path):
    def put(factor=1.0):
        (tmp_path / "site" / "fake_peer.py").write_text(f"FACTOR = {factor}\n{PEER}")

    return put


def bench(tmp_path, start=Inline, said=None, **options):
    options = {
        "m": (1, 16, 128),
        "peers": tuple(peers.PEERS),
        "layers": ("q_a", "shared_gate_up"),
        "quiet": True,
    } | options
    say = said.append if said is not None else lambda text: None
    return bench_peers.run(
        TARGET, {"mini": CONFIG}, tmp_path / "bench", bench_peers.Options(**options), fake_cells, start, say
    )


def test_ratios_are_those_of_the_medians(install, tmp_path):
    install()
    outcome = bench(tmp_path)
    assert len(outcome.rows) == 6
    for row in outcome.rows:
        scale = row["m"] ** 0.5
        assert row["fp4suite_us"] == pytest.approx(10 * scale, abs=1e-3)
        assert row["fake_us"] == pytest.approx(12.5 * scale, abs=1e-3)
        assert row["fake_p20_us"] < row["fake_us"] < row["fake_p80_us"]
        assert row["best_peer"] == "fake"
        assert row["ratio"] == 1.25
        assert row["share_of_read"] == 0.9
        assert row["kernel"] == "cpu_gemm"
        assert 1e-4 < row["fake_error"] < peers.RMS_LIMIT
        assert row["rounds"] >= side_by_side.LEAST_ROUNDS


def test_rows_are_stored_and_come_back(install, tmp_path):
    install()
    outcome = bench(tmp_path)
    assert outcome.path == tmp_path / "bench" / "some-gpu" / "gemm_nvfp4-peers.csv"
    loaded = peers_rows.load(outcome.path)
    assert {r["problem"]: r["ratio"] for r in loaded} == {r["problem"]: r["ratio"] for r in outcome.rows}
    assert all(r["marlin_us"] is None and r["run"].endswith("Z") for r in loaded)
    with outcome.path.open() as f:
        assert tuple(next(csv.reader(f))) == peers_rows.columns()


def test_absent_peers_are_named_in_output_rows_and_table(install, tmp_path):
    install()
    said = []
    outcome = bench(tmp_path, said=said)
    assert set(outcome.absent) == {"marlin", "humming", "quack"}
    assert any("peer marlin: not installed (pip install vllm)" in line for line in said)
    assert all("quack: not installed (pip install quack-kernels)" in r["notes"] for r in outcome.rows)
    text = peers_rows.render(outcome.rows, outcome.absent)
    assert "no time of humming: not installed (pip install humming-kernels)" in text
    assert len(re.findall(r"1\.25x", text)) == 6


def test_a_peer_that_is_not_there_at_all_leaves_cublas(tmp_path):
    outcome = bench(tmp_path, layers=("q_a",), m=(1,))
    assert outcome.absent["fake"] == "not installed (pip install fake-peer)"
    assert outcome.rows[0]["best_peer"] == "cublas_bf16"
    assert outcome.rows[0]["ratio"] == 2.0


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_wrong_peer_is_refused(install, tmp_path, factor):
    install(factor if factor == factor else "float('nan')")
    outcome = bench(tmp_path, m=(16,))
    for row in outcome.rows:
        assert row["fake_us"] is None
        assert "fake: wrong: differs from the reference" in row["notes"]
        assert (row["best_peer"], row["ratio"]) == ("cublas_bf16", 2.0)
    assert "failed" in peers_rows.render(outcome.rows, outcome.absent)


def test_a_peer_that_raises_states_its_error(install, tmp_path):
    install("undefined_name")
    outcome = bench(tmp_path, m=(16,))
    assert all("fake: NameError: name 'undefined_name' is not defined" in r["notes"] for r in outcome.rows)


def test_one_wrong_element_of_ours_is_refused(install, tmp_path, monkeypatch):
    install()
    monkeypatch.setattr(cpu_kernel, "FAULT_M", {16: "wrong"})
    outcome = bench(tmp_path, layers=("q_a",))
    by_m = {r["m"]: r for r in outcome.rows}
    assert by_m[16]["fp4suite_us"] is by_m[16]["ratio"] is None
    assert "fp4suite: wrong: 1 of" in by_m[16]["notes"]
    assert by_m[16]["fake_us"] == 50.0
    assert by_m[1]["ratio"] == 1.25


def test_a_crash_costs_one_contender_not_the_run(install, tmp_path):
    """In a process of its own: the peer ends it, and the cell is timed again without the peer."""
    install()
    path = tmp_path / "site" / "fake_peer.py"
    path.write_text(path.read_text() + "\n\ndef matmul(x, packed, alpha):\n    import os; os._exit(7)\n")
    outcome = bench(tmp_path, start=worker.Worker, m=(1, 16), layers=("q_a",))
    assert [r["ratio"] for r in outcome.rows] == [2.0, 2.0]
    assert all("fake: crash: the process ended with exit code 7" in r["notes"] for r in outcome.rows)


def test_a_peer_that_ends_the_process_twice_is_left_out(install, tmp_path):
    install()
    died = []

    class Dying(Inline):
        def call(self, function, *args, timeout):
            if function is fake_cells.record and args == ("fake",):
                died.append(bench_cells._shape.n)
                bench_cells._shape = bench_cells._cell = None
                raise worker.WorkerDied("timeout", "no answer within 9 s")
            return super().call(function, *args, timeout=timeout)

    outcome = bench(tmp_path, start=Dying, m=(1,), layers=())
    assert len(died) == 2
    assert len(outcome.rows) == 7
    notes = ["fake: timeout: no answer within 9 s" in r["notes"] for r in outcome.rows]
    assert notes == [True, True, *[False] * 5]
    assert all("fake: left out, as before: timeout" in r["notes"] for r in outcome.rows[2:])
    assert all(r["ratio"] == 2.0 for r in outcome.rows)


def test_a_run_that_was_cut_goes_on(install, tmp_path, monkeypatch):
    install()
    outcome = bench(tmp_path, seconds=0.0)
    assert (len(outcome.rows), outcome.left) == (1, 5)
    assert len(peers_rows.load(outcome.path)) == 1
    timed = []
    monkeypatch.setattr(fake_cells, "times", lambda *args: timed.append(args) or bench_cells.times(*args))
    resumed = bench(tmp_path, resume=True)
    assert (len(resumed.rows), resumed.left, len(timed)) == (6, 0, 5)
    assert len(peers_rows.load(outcome.path)) == 6


def test_summary_judges_each_group():
    def row(m, ratio, packed=1000, share=0.95):
        shape = {"m": m, "n": 64, "k": 64, "layers": f"pro.l{m}", "packed_bytes": packed}
        return shape | {"ratio": ratio, "share_of_read": share}

    rows = [row(1, 2.0), row(64, 0.5, packed=25_000_000), row(16, 1.0, packed=25_000_000, share=0.81), row(4, None)]
    rows += [row(128, 1.2), row(512, 0.98), row(2048, 1.0), row(8192, 0.9)]
    lines = peers_rows.summary(rows).splitlines()[2:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[0] == ["ratio, m = 1..64", "3", "1.000x", "1.20x", "0.500x", "1.00x", "pro.l64 m=64", "1", "1"]
    assert cells[1][:8] == ["ratio, m = 65..512", "2", "1.084x", "1.10x", "0.980x", "0.97x", "pro.l512 m=512", "0"]
    assert cells[2][:8] == ["ratio, m = 513..16384", "2", "0.949x", "1.00x", "0.900x", "0.95x", "pro.l8192 m=8192", "1"]
    assert cells[3][1:6] == ["1", "0.810", "0.810", "0.88", "pro.l16 m=16"]


def test_plots_and_report_come_from_the_rows(install, tmp_path):
    install()
    outcome = bench(tmp_path)
    (path,) = peers_plot.draw(outcome.rows, tmp_path / "plots")
    assert path.name == "some-gpu-gemm_nvfp4-peers-mini.png"
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert len(first) < 300_000
    text, plots = report.write(tmp_path / "bench", tmp_path / "plots")
    assert plots == [path]
    assert path.read_bytes() == first
    assert f"some-gpu, gemm_nvfp4 beside its peers, timed {outcome.rows[0]['run']}\n" in text
    assert "1.250x" in text


def cells(said=None, **options):
    options = {"m": (1, 4), "peers": ()} | options
    say = (said if said is not None else []).append
    return bench_peers.cells(TARGET, {"mini": CONFIG}, bench_peers.Options(**options), say)


def test_cells_are_sorted_and_chosen_by_layer():
    found = cells()
    assert [c.packed for c in found] == sorted((c.packed for c in found), reverse=True)
    assert [c.problem.m for c in found[:4]] == [1, 4, 1, 4]
    for name in ("mini.q_a", "q_a"):
        assert {c.layers for c in cells(layers=(name,))} == {("mini.o_a", "mini.q_a", "mini.kv")}
    with pytest.raises(ValueError, match=r"--layers must be of csa_compressor, .*mini\.q_a"):
        cells(layers=("q_c",))


def test_weights_lie_as_a_loader_lays_them_out():
    """What cannot lie in the kernel's order lies in rows, for which there is no kernel here: that is said."""
    said = []
    assert {c.problem.order for c in cells(said)} == {"fragments_sm90"}
    assert any(line.startswith("no kernel: gemm_nvfp4 (m=1 n=1 k=128") for line in said)
    assert cells(order="rows") == []


def test_other_architectures_take_no_bf16_activations():
    with pytest.raises(ValueError, match="takes nvfp4"):
        bench_peers.cells(Target("sm_100a", "b", "cpu"), {"mini": CONFIG}, bench_peers.Options((1,), ()), print)


def test_the_command_line_says_what_it_needs(capsys):
    assert main(["bench", "--op", "gemm_nvfp4", "--peers", "--quiet"]) == 1
    assert "measures on a GPU" in capsys.readouterr().err
    assert main(["bench", "--op", "all", "--peers"]) == 1
    assert "--peers takes --op gemm_nvfp4 alone, fusions, or any of quantize_nvfp4, " in capsys.readouterr().err
    assert main(["bench", "--op", "gemm_nvfp4", "--peers", "marlyn"]) == 1
    assert "--peers must be of cublas_bf16, marlin" in capsys.readouterr().err


def test_the_bare_read_reads_every_word():
    """On a GPU, or under Triton's interpreter: whichever word is the largest, it is found."""
    from tuner import bench_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.empty(5, dtype=torch.int32, device=device)
    for place in (0, 1023, 1024, 4095, 4999):
        x = torch.randint(-(2**31), 2**30, (5000,), dtype=torch.int32, device=device)
        x[place] = 2**31 - 1
        bench_kernels.read(x, most, 1024, 4)
        assert int(most[place // 1024]) == 2**31 - 1
        assert [int(v) for v in most] == [int(b.max()) for b in x.split(1024)]
    bench_kernels.empty()


def test_cublas_and_fp8_agree_with_the_product():
    gen = torch.Generator().manual_seed(0)
    alpha = bench_cells.ALPHA
    w = testing.random_nvfp4(64, 128, gen, alpha=torch.tensor(alpha))
    x = testing.random_activations((16, 128), gen)
    cell_scale = (x.double().square() @ bench_cells.scaled_codes(w).double().square().T).sqrt() * alpha
    want = x.double() @ bench_cells.scaled_codes(w).double().T * alpha
    peers.assert_close(peers.cublas(w, alpha)(x)(), want, cell_scale)
    got = peers.scaled_mm(w, alpha)(x)().double()
    assert 0.001 < float(((got - want) / cell_scale).square().nanmean().sqrt()) < 0.08


def test_a_vllm_without_its_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    peers.vllm_ops.cache_clear()
    assert peers.PEERS["marlin"].missing() is None
    with pytest.raises(ImportError, match=r"no library with marlin_gemm under .*site/vllm"):
        peers.vllm_ops("_C", "marlin_gemm")


def test_humming_is_told_to_compile_for_the_rows_at_hand(monkeypatch):
    """A stand-in of its interface: intervals of rows are open below and closed above, as its launcher takes them."""
    asked = []

    class HummingLayer:
        humming_config = "config"

        def __init__(self, **shape):
            self.shape = shape

        def to(self, device):
            return self

        def load_from_tensors(self, tensors):
            assert set(tensors) == {"weight", "weight_scale", "weight_scale_2"}

        def transform(self):
            pass

        def __call__(self, x, tuning_config):
            asked.append((len(x), tuning_config))
            return x

    def get_heuristics_config(config, device):
        assert config == "config"
        return [(0, 8, {"warps": 1}), (8, 64, {"warps": 2}), (64, 1 << 30, {"warps": 4})]

    monkeypatch.setitem(sys.modules, "humming", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=HummingLayer))
    monkeypatch.setitem(sys.modules, "humming.tune", SimpleNamespace(get_heuristics_config=get_heuristics_config))
    layer = peers.humming(testing.random_nvfp4(64, 64, torch.Generator().manual_seed(0)), 0.5)
    for rows in (1, 8, 9, 64, 65):
        layer(torch.zeros(rows, 64))()
    assert asked == [(1, {"warps": 1}), (8, {"warps": 1}), (9, {"warps": 2}), (64, {"warps": 2}), (65, {"warps": 4})]


def test_marlin_scales_against_their_definition(monkeypatch):
    """Bytes of the scales as the kernel reads them: FP16 without sign, in the order of its columns."""
    taken = {}

    def gemm(*args):
        taken["args"] = args

    names = ("a", "b_scales", "global_scale", "size_m")
    gemm.default = SimpleNamespace(_schema=SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in names]))
    ops = SimpleNamespace(marlin_gemm=gemm, gptq_marlin_repack=lambda w, k, n, bits, eight: w)
    monkeypatch.setattr(peers, "vllm_ops", lambda *names: ops)
    monkeypatch.setattr(peers, "_multiprocessors", lambda device: 1)
    n, k = 128, 64
    raw = torch.arange(n * k // 16, dtype=torch.int32).remainder(0x58).to(torch.uint8).view(n, k // 16)  # up to 16.0
    sf = raw.view(torch.float8_e4m3fn)
    w = NVFP4Tensor(torch.zeros(n, k // 2, dtype=torch.uint8), sf, torch.tensor(0.25))
    peers.marlin(w, 0.25)(torch.zeros(3, k))()
    _, scales, scale, m = taken["args"]
    assert m == 3
    lift = 448.0 / float(sf.float().max())
    lift = 2.0 ** int(torch.tensor(lift).log2().floor())
    assert float(scale) == 0.25 * 2.0**119 / lift
    for kb in range(k // 16):
        for place in range(n):
            block, within = divmod(place, 64)
            within = within // 4 * 4 + (0, 2, 1, 3)[within % 4]  # four neighbours: the middle two exchanged
            column = 64 * block + within // 8 + 8 * (within % 8)
            value = float(sf[column, kb].float()) * lift * 128
            byte = int(scales.view(torch.uint8)[kb, place])
            want = 0 if value < 2 else int(torch.tensor(value).half().view(torch.int16)) >> 7
            assert byte == want, (kb, place)


def test_limits_of_what_counts_as_right():
    want, scale = torch.ones(4, 8).double(), torch.ones(4, 8).double()
    assert peers.assert_close(torch.full((4, 8), 1.001), want, scale) == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(AssertionError, match=r"limit 0\.006"):
        peers.assert_close(torch.full((4, 8), 1.01), want, scale)
    with pytest.raises(AssertionError, match="want"):
        peers.assert_close(torch.ones(4, 9), want, scale)
    zero = torch.zeros(4, 8).double()
    with pytest.raises(AssertionError):
        peers.assert_close(torch.full((4, 8), 1e-30), zero, zero)
    assert peers.assert_close(torch.zeros(4, 8), zero, zero) == 0.0


def test_problem_dims_go_to_the_process_and_back():
    p = GemmProblem(m=3, n=128, k=64, order="fragments_sm90")
    fake_cells.open_shape(p.n, p.k, 1, "cpu", 0)
    bench_cells.open_cell(p.dims(), 0)
    assert bench_cells._cell.problem == p
