"""`report`: a summary and plots, drawn from the rows of benchmarks and from nothing else."""

import io
from pathlib import Path
from typing import Any

from . import bench, fusion_rows, peers_plot, peers_rows

MOST_LINES = 8  # shapes in one plot: more cannot be told apart
MOST_RUNS = 3  # that a line of the summary names
MEANING = """Rows of `tuner bench`, the newest of each problem; date and commit say of which run.
share of roof: the least time that a problem's bytes or flops can take, over ours
speed-up: the time of what it is over, in the same run, over ours; below 1 ours is slower"""


def write(rows_dir: Path, plots_dir: Path) -> tuple[str, list[Path]]:
    """Text of the summary, and the plots written. Raises ValueError if there are no rows."""
    files = sorted(rows_dir.rglob("*.csv"))
    if not files:
        raise ValueError(f"no rows under {rows_dir}; run bench first")
    beside = [path for path in files if path.stem.endswith(peers_rows.SUFFIX)]
    text, plots = _without_peers([path for path in files if path not in beside], plots_dir)
    for path in beside:
        op = fusion_rows.op_of(path)
        if op is not None:
            text.append(_fusion(fusion_rows.load(path, op)))
            continue
        rows = peers_rows.load(path)
        runs = ", ".join(sorted({r["run"] for r in rows}))
        text.append(f"{rows[0]['device']}, {rows[0]['op']} beside its peers, timed {runs}\n{peers_rows.summary(rows)}")
        plots += peers_plot.draw(rows, plots_dir)
    return "\n\n".join(text), plots


def _fusion(rows: list[bench.Row]) -> str:
    runs = ", ".join(sorted({r["run"] for r in rows}))
    return f"{rows[0]['device']}, {rows[0]['op']} beside its peers, timed {runs}\n{fusion_rows.summary(rows)}"


def _without_peers(files: list[Path], plots_dir: Path) -> tuple[list[str], list[Path]]:
    import pandas as pd

    if not files:
        return [], []
    frame = pd.DataFrame([row for path in files for row in bench.load(path)])
    for column in ("median_us", "p20_us", "p80_us", "tflop_per_s", "gb_per_s", "share_of_roof", "baseline_us", "calls"):
        frame[column] = pd.to_numeric(frame[column])
    frame["measured"] = frame["measured"] == "True"
    frame["m"] = frame["problem"].str.extract(r"\bm=(\d+)")[0].astype(int)
    frame["rest"] = frame["problem"].str.replace(r"\bm=\d+ ", "", regex=True)
    text = [
        _summary(group, str(device), bool(measured))
        for (device, measured), group in frame.groupby(["device", "measured"])
    ]
    plots = [
        _plot(group, plots_dir / f"{device}{'' if measured else '-predicted'}-{op}.svg")
        for (device, measured, op), group in frame.groupby(["device", "measured", "op"])
    ]
    return [MEANING, *text], plots


def _summary(rows: Any, device: str, measured: bool) -> str:
    """One line an op: how near the roof, and how much faster than the baseline (geometric mean over problems)."""
    import numpy as np
    from tabulate import tabulate

    lines = []
    for op, group in rows.groupby("op"):
        faster = group["baseline_us"] / group["median_us"]
        lines.append(
            [
                op,
                len(group),
                f"{100 * group['share_of_roof'].median():.0f} %",
                f"{100 * group['share_of_roof'].min():.0f} .. {100 * group['share_of_roof'].max():.0f} %",
                f"{float(np.exp(np.log(faster.dropna()).mean())):.2f}x" if faster.notna().any() else "-",
                group["baseline"].iloc[0] or "-",
                _runs(group),
            ]
        )
    headers = ["op", "rows", "share of roof (median)", "range", "speed-up (geometric mean)", "over", "rows of"]
    return f"{device}, {'measured' if measured else 'PREDICTED, not measured'}\n" + tabulate(
        lines, headers=headers, disable_numparse=True
    )


def _runs(rows: Any) -> str:
    """Date and commit of the runs that rows come from, the newest first, each with its rows where there are several."""
    runs = rows.groupby(["date", "commit"]).size().sort_index(ascending=False)
    named = [f"{date} {commit}" + f" ({count})" * (len(runs) > 1) for (date, commit), count in runs.items()]
    return ", ".join(named[:MOST_RUNS]) + f", {len(named) - MOST_RUNS} older" * (len(named) > MOST_RUNS)


def _plot(rows: Any, path: Path) -> Path:
    """Time over m, a line a shape, the baseline dotted. The same rows give the same file, byte for byte."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fp4suite"
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    figure, axes = plt.subplots(figsize=(9, 5))
    measured = bool(rows["measured"].iloc[0])
    shapes = sorted(rows.groupby("rest"), key=lambda item: (-item[1]["median_us"].max(), item[0]))
    for index, (shape, group) in enumerate(shapes[:MOST_LINES]):
        group = group.sort_values("m")
        colour = f"C{index % 10}"
        axes.plot(group["m"], group["median_us"], "o-" if measured else "o--", ms=3, lw=1.2, color=colour, label=shape)
        if group["baseline_us"].notna().any():
            axes.plot(group["m"], group["baseline_us"], ":", lw=1.2, color=colour)
    unit = "microseconds" + ("" if measured else " (predicted)")
    axes.set(xscale="log", yscale="log", xlabel="m (rows)", ylabel=unit)
    axes.xaxis.set_major_locator(FixedLocator(sorted(rows["m"].unique())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    op, device, baseline = rows["op"].iloc[0], rows["device"].iloc[0], rows["baseline"].iloc[0]
    some = f", the {MOST_LINES} longest of {len(shapes)} shapes" if len(shapes) > MOST_LINES else ""
    dotted = f", dotted: {baseline}" if baseline else ""
    axes.set_title(f"{op} on {device}{dotted}{some}{'' if measured else ', PREDICTED'}", fontsize=10)
    axes.grid(True, lw=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    bench.replace_file(path, drawn.getvalue())
    return path
