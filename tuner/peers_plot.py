"""Time over m of gemm_nvfp4 and its peers, a panel a layer shape, the roofline under them; drawn from rows alone."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bench, peers_rows
from .bench import Row
from .bench_cells import READ
from .peers import PEERS
from .side_by_side import OWN

COLUMNS = 4  # panels side by side
PANEL = (3.4, 2.5)  # inches
DPI = 85  # a figure of 12 panels stays under 300 KB


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG a model, <device>-<op>-peers-<model>.png. The same rows give the same file, byte for byte."""
    import matplotlib

    matplotlib.use("agg")
    models = list(dict.fromkeys(name.partition(".")[0] for r in rows for name in r["layers"].split()))
    paths = []
    for model in models:
        panels: dict[tuple[int, int, str], list[Row]] = {}
        for r in rows:
            mine = [name.partition(".")[2] for name in r["layers"].split() if name.startswith(f"{model}.")]
            if mine:
                panels.setdefault((r["n"], r["k"], ", ".join(mine)), []).append(r)
        stem = peers_rows.stem("fp8" if peers_rows.is_fp8(rows) else None)
        path = folder / f"{rows[0]['device']}-{stem}-{model}.png"
        bench.replace_file(path, _figure(model, panels))
        paths.append(path)
    return paths


def _figure(model: str, panels: dict[tuple[int, int, str], list[Row]]) -> bytes:
    from matplotlib import pyplot as plt

    lines = -(-len(panels) // COLUMNS)
    wide = min(COLUMNS, len(panels))
    figure, grid = plt.subplots(
        lines, wide, figsize=(max(2, wide) * PANEL[0], lines * PANEL[1] + 0.7), squeeze=False, sharex=True
    )
    for axes, ((n, k, layers), rows) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, sorted(rows, key=lambda r: r["m"]))
        axes.set_title(f"{layers}: {n} x {k}", fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    shown = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=len(shown), fontsize=8, frameon=False)
    first = next(iter(panels.values()))[0]
    figure.suptitle(
        f"{first['op']}, layers of {model}, on {first['device']}: microseconds over m (cold L2)", fontsize=10
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return drawn.getvalue()


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    def line(name: str, values: list[float | None], style: str, **more: Any) -> None:
        points = [(r["m"], v) for r, v in zip(rows, values, strict=True) if v is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, **more)

    line("roofline", [_roof(r) for r in rows], "-", color="0.75", lw=3)
    line("bare read", [r[f"{READ}_us"] for r in rows], ":", color="0.3", lw=1)
    for index, name in enumerate(PEERS):
        line(name, [r[f"{name}_us"] for r in rows], "o--", color=f"C{index + 1}", ms=2.5, lw=0.9)
    line(OWN, [r[f"{OWN}_us"] for r in rows], "o-", color="C0", ms=3.5, lw=1.8)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator([r["m"] for r in rows if r["m"] in (1, 4, 16, 64, 256, 2048, 8192)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=7, labelbottom=True)
    axes.grid(True, lw=0.3)


def _roof(row: Row) -> float | None:
    """The time that bytes and flops allow; it was stored as a share of ours."""
    own, share = row[f"{OWN}_us"], row["share_of_roof"]
    return None if own is None or share is None else float(own * share)
