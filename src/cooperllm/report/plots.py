"""Accuracy, or for next tokens loss, against what it costs: rounds, forward passes, bytes, modelled time.

An arm keeps its colour and dashes in every plot of every run. Over several seeds a line is the median and its band the range.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MultipleLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from cooperllm.report.table import Summary, final_scores, format_score, judged_by, title
from cooperllm.summary import score_curve

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
    Chart("accuracy_by_modelled_time.png", "modelled wall clock", "modelled_seconds_by_round"),
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
    finals, judged = final_scores(summary), judged_by(summary)
    ends: Summary = summary.get("comparison", {}).get("arms", {})
    for name, arm in sorted(summary["arms"].items(), key=lambda item: finals.get(item[0], -math.inf), reverse=True):
        _draw_arm(axes, chart, name, arm, finals.get(name), ends.get(name, {}).get(f"end_{judged}"))
    _dress(axes, chart, summary)
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=min(3, len(axes.lines)), frameon=False, fontsize=9.5, handlelength=3.2)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _draw_arm(axes: Axes, chart: Chart, name: str, arm: Summary, final: float | None, ends: Summary | None = None) -> None:
    style, judged = STYLES.get(name, FALLBACK), arm.get("judged_by", "accuracy")
    label = _literal(f"{name} {'(unfinished)' if final is None else format_score(final, judged)}")
    dashes = (0, style.dashes) if style.dashes else "-"
    look: dict[str, Any] = {"label": label, "color": style.color, "linewidth": style.width, "linestyle": dashes, "zorder": 2 + style.width}
    shade: dict[str, Any] = {"color": style.color, "alpha": 0.16, "linewidth": 0, "zorder": 1}
    runs: list[Summary] = arm.get("seeds", [arm])
    points = _points(chart, runs)
    if name == REFERENCE and chart.cost_key and final is not None:
        final = abs(final)
        axes.axhline(final, **look)
        if ends is not None and len(runs) > 1:
            axes.axhspan(ends["min"], ends["max"], **shade)
        axes.annotate(name, (1, final), (4, 0), axes.get_yaxis_transform(), "offset points", color=style.color, fontsize=9.5, va="center")
    elif points:
        costs, lows, medians, highs = zip(*points, strict=True)
        axes.plot(costs, medians, **look)
        if len(runs) > 1:
            axes.fill_between(costs, lows, highs, **shade)


def _points(chart: Chart, runs: Sequence[Summary]) -> list[tuple[float, float, float, float]]:
    """Median cost; lowest, median and highest value wherever all runs have both; a logarithmic axis has no place for a cost of zero."""
    curves: list[dict[int, float]] = [{at: abs(score) for at, score in score_curve(run)} for run in runs]
    costs: list[dict[int, float]] = [
        dict(run.get(chart.cost_key, [])) if chart.cost_key else {at: at for at in curve} for run, curve in zip(runs, curves, strict=True)
    ]
    points: list[tuple[float, float, float, float]] = []
    for at in [at for at in curves[0] if all(at in known for known in (*curves, *costs))]:
        values = [curve[at] for curve in curves]
        points.append((median(cost[at] for cost in costs), min(values), median(values), max(values)))
    return [point for point in points if point[0] > 0 or not chart.is_logarithmic]


def _dress(axes: Axes, chart: Chart, summary: Summary) -> None:
    judged = judged_by(summary)
    axes.set_title(judged, loc="left", fontsize=10.5)
    axes.set_title(_literal(title(summary)), loc="right", fontsize=10.5, color="#666666")
    axes.set_xlabel(chart.axis, fontsize=10.5)
    if chart.is_logarithmic:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if chart.cost_key == "modelled_seconds_by_round":
        _label_time(axes)
    else:
        axes.xaxis.set_major_formatter(EngFormatter("B") if chart.is_logarithmic else StrMethodFormatter("{x:,.0f}"))
    if judged == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.tick_params(labelsize=10, length=0, which="both")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label_time(axes: Axes) -> None:
    """Labels a time axis in the largest unit of which it holds two or more."""
    longest = axes.get_xlim()[1]
    unit, size = next(((unit, size) for unit, size in (("hours", 3600), ("minutes", 60)) if longest >= 2 * size), ("seconds", 1))
    axes.xaxis.set_major_locator(MultipleLocator(size * _step(longest / size)))

    def divided(seconds: float, _position: int) -> str:
        return f"{seconds / size:g}"

    axes.xaxis.set_major_formatter(FuncFormatter(divided))
    axes.set_xlabel(f"{axes.get_xlabel()}, {unit}", fontsize=10.5)


def _step(length: float) -> float:
    """A round step that divides a length into four to ten parts."""
    power = 10.0 ** math.floor(math.log10(length / 4))
    return next(power * digit for digit in (5, 2, 1) if power * digit <= length / 4)


def _literal(text: str) -> str:
    """Keeps matplotlib from reading dollar signs as mathematics."""
    return text.replace("$", r"\$")
