"""Accuracy against what it costs: rounds, forward passes, bytes. An arm keeps its colour and dashes in every plot of every run."""

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from cooperllm.report.table import Summary, format_percent

REFERENCE = "cloud-only"


class Style(NamedTuple):
    """An arm's line: its colour, its width in points, and lengths on and off in line widths (empty is solid)."""

    color: str
    width: float
    dashes: tuple[float, ...] = ()


class Chart(NamedTuple):
    """A plot: its file, its horizontal axis, and the arm's list of cumulative costs (None: rounds)."""

    file_name: str
    axis: str
    cost_key: str | None = None
    is_logarithmic: bool = False


# Okabe and Ito's colours, distinct to colour-blind readers; dashes tell arms apart in print.
STYLES = {
    "feedback": Style("#E69F00", 2.6),
    "measured": Style("#D55E00", 2.2, (9, 1)),
    "paper": Style("#0072B2", 1.8, (6, 1.5, 1, 1.5)),
    "mezo-fl": Style("#009E73", 1.8, (3.5, 1.2)),
    "decomfl": Style("#CC79A7", 1.8, (4, 1.2, 1, 1.2, 1, 1.2)),
    "fedkseed": Style("#009E73", 1.8, (1, 1.2)),
    "fwdllm": Style("#CC79A7", 1.8, (8, 1.5, 2, 1.5)),
    "warm-start": Style("#56B4E9", 1.8, (5, 1.5)),
    REFERENCE: Style("#222222", 1.8, (1, 1.5)),
    "fedavg-bp": Style("#888888", 1.8, (7, 2.5)),
    "fedavg-bp-checkpointed": Style("#888888", 1.8, (2, 2)),
}
FALLBACK = Style("#56B4E9", 1.8)

CHARTS = (
    Chart("accuracy_by_rounds.png", "rounds"),
    Chart("accuracy_by_forward_passes.png", "forward passes, all devices", "forward_passes_by_round"),
    Chart("accuracy_by_bytes.png", "bytes to and from all devices", "bytes_by_round", is_logarithmic=True),
)


def write_plots(summary: Summary, directory: Path) -> list[Path]:
    """Draws every chart as a PNG at 150 dpi.

    Args:
        summary: Content of summary.json; not modified.
        directory: Existing directory; files of the same names are replaced, each at once.

    Returns:
        The files, in the order of `CHARTS`.

    Raises:
        OSError: If the directory is missing or cannot be written.
    """
    return [replace_file(directory / chart.file_name, _draw(chart, summary)) for chart in CHARTS]


def replace_file(path: Path, content: bytes) -> Path:
    """Writes a file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw(chart: Chart, summary: Summary) -> bytes:
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, arm in sorted(summary["arms"].items(), key=lambda item: item[1].get("final_accuracy") or 0, reverse=True):
        _draw_arm(axes, chart, name, arm)
    _dress(axes, chart, summary)
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=min(3, len(axes.lines)), frameon=False, fontsize=9.5, handlelength=3.2)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _draw_arm(axes: Axes, chart: Chart, name: str, arm: Summary) -> None:
    style = STYLES.get(name, FALLBACK)
    final = arm.get("final_accuracy")
    label = _literal(f"{name} {format_percent(final) if arm.get('finished', True) else '(unfinished)'}")
    dashes = (0, style.dashes) if style.dashes else "-"
    look: dict[str, Any] = {"label": label, "color": style.color, "linewidth": style.width, "linestyle": dashes, "zorder": 2 + style.width}
    points = _points(chart, arm)
    if name == REFERENCE and chart.cost_key and final is not None:
        axes.axhline(final, **look)
        axes.annotate(name, (1, final), (4, 0), axes.get_yaxis_transform(), "offset points", color=style.color, fontsize=9.5, va="center")
    elif points:
        axes.plot(*zip(*points, strict=True), **look)


def _points(chart: Chart, arm: Summary) -> list[tuple[float, float]]:
    """Cost and accuracy wherever both were recorded; a logarithmic axis has no place for a cost of zero."""
    accuracies: list[tuple[int, float]] = arm.get("accuracy_by_round", [])
    costs: dict[int, int] = dict(arm.get(chart.cost_key, []) if chart.cost_key else ((index, index) for index, _ in accuracies))
    points = [(costs[index], accuracy) for index, accuracy in accuracies if index in costs]
    return [point for point in points if point[0] > 0 or not chart.is_logarithmic]


def _dress(axes: Axes, chart: Chart, summary: Summary) -> None:
    axes.set_title("accuracy", loc="left", fontsize=10.5)
    axes.set_title(_literal(f"{summary['recipe']}, seed {summary['seed']}"), loc="right", fontsize=10.5, color="#666666")
    axes.set_xlabel(chart.axis, fontsize=10.5)
    if chart.is_logarithmic:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter("B") if chart.is_logarithmic else StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.tick_params(labelsize=10, length=0, which="both")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _literal(text: str) -> str:
    """Keeps matplotlib from reading dollar signs as mathematics."""
    return text.replace("$", r"\$")
