"""Who was at work when, and what travelled: a lane for the cloud, each edge and each device, from what a deployment has noted.

    cloud     plan | - answers are awaited - | fold and step
    edge      order travels | in hand | waits for its devices | answer travels
    device    order travels | in hand | at work | answer travels

A node tells how long it took, not when: its parts are laid end to end from the moment its message left, by its sender's clock. So no two
clocks are compared, and what a node cannot see of its link counts as the way back. Two rounds may be under way together: those with even
numbers are in the upper half of a lane, the others in the lower. An outline is what the edge's schedule expected of a device.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

from cooperllm.report.plots import replace_file
from cooperllm.report.table import lay_out

Row = Mapping[str, Any]
"""A line of timeline.jsonl: a `round.RoundTimes` and its round."""

SHOWN_ROUNDS = 6
PARTS = {"received_s": "order travels", "waited_s": "in hand", "worked_s": "at work", "returned_s": "answer travels"}
# Okabe and Ito's colours; what waits is grey.
COLORS = {
    "plan": "#0072B2",
    "order travels": "#56B4E9",
    "in hand": "#D9D9D9",
    "waits for devices": "#EFEFEF",
    "at work": "#E69F00",
    "answer travels": "#009E73",
    "fold and step": "#D55E00",
}
EXPECTED = "expected"


class Span(NamedTuple):
    """One bar.

    Attributes:
        lane: Whose.
        kind: Of `COLORS`, or `EXPECTED`.
        number: Round, from 1.
        begun_s: Since the first plan that is shown.
        ended_s: The same.
    """

    lane: str
    kind: str
    number: int
    begun_s: float
    ended_s: float


class Bar(NamedTuple):
    """A bar of the page's drawing, in its own units."""

    x: float
    y: float
    width: float
    height: float
    color: str
    outline: str
    words: str


def spans(rows: Sequence[Row]) -> list[Span]:
    """Lays the parts of every message end to end.

    Args:
        rows: Rounds, oldest first; not empty.

    Returns:
        Bars of every lane, the cloud's first, then each edge's followed by its devices'.

    Example:
        >>> own = dict(node=0, begun_s=0.0, received_s=0.1, waited_s=0.0, worked_s=1.0, returned_s=0.2)
        >>> row = dict(round=1, begun_at=5.0, asked_at=6.0, answered_at=8.0, closed_at=8.5, edges=[dict(own=own, devices=[], scheduled=[])])
        >>> [(span.lane, span.kind, round(span.ended_s, 1)) for span in spans([row])][1:3]
        [('cloud', 'fold and step', 3.5), ('edge 0', 'order travels', 1.1)]
    """
    start = min(row["begun_at"] for row in rows)
    found: list[Span] = []
    for row in rows:
        number, asked_s = row["round"], row["asked_at"] - start
        found.append(Span("cloud", "plan", number, row["begun_at"] - start, asked_s))
        found.append(Span("cloud", "fold and step", number, row["answered_at"] - start, row["closed_at"] - start))
        for edge in row["edges"]:
            own = edge["own"]
            found += _parts(f"edge {own['node']}", number, own, asked_s, "waits for devices")
            begun_s = asked_s + own["begun_s"] + own["received_s"] + own["waited_s"]
            expected = {one["expected"]["node"]: _seconds(one["expected"]) for one in edge["scheduled"]}
            for device in edge["devices"]:
                found += _parts(lane := f"device {device['node']}", number, device, begun_s, "at work")
                if device["node"] in expected:
                    sent_s = begun_s + device["begun_s"]
                    found.append(Span(lane, EXPECTED, number, sent_s, sent_s + expected[device["node"]]))
    return found


def times_table(rows: Sequence[Row]) -> Table:
    """Sums every node up: medians over the rounds that it answered in.

    Args:
        rows: Rounds; not empty.

    Returns:
        A line for each edge and device.
    """
    nodes: dict[str, list[Row]] = {}
    for row in rows:
        for edge in row["edges"]:
            nodes.setdefault(f"edge {edge['own']['node']}", []).append(edge["own"])
            for device in edge["devices"]:
                nodes.setdefault(f"device {device['node']}", []).append(device)
    lines = [
        ((name, *(f"{median(spent[part] for spent in found):.3f}" for part in PARTS), str(len(found))), False)
        for name, found in sorted(nodes.items(), key=lambda item: _place(item[0]))
    ]
    ends = [row["closed_at"] for row in rows]
    apart = [later - earlier for earlier, later in pairwise(ends)]
    caption = f"{median(apart):.2f} s from one step to the next in the median" if apart else "one round"
    heading = f"rounds {rows[0]['round']} to {rows[-1]['round']}, median seconds"
    return lay_out(
        heading,
        ("", "order\ntravels", "in hand", "at work*", "answer\ntravels", "rounds"),
        lines,
        f"{caption}. * an edge waits for its devices",
    )


def write_timeline(rows: Sequence[Row], directory: Path) -> Path:
    """Draws rounds as a PNG at 150 dpi.

    Args:
        rows: Rounds, oldest first; not empty.
        directory: Existing directory; a timeline.png in it is replaced at once.

    Returns:
        The file.

    Raises:
        OSError: If the directory cannot be written.
    """
    drawn, lanes = spans(rows), lanes_of(rows)
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(lanes)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for span in drawn:
        top = lanes.index(span.lane) + (0.06 if span.number % 2 == 0 else 0.5)
        look: dict[str, Any] = {"facecolors": COLORS.get(span.kind, "none")}
        if span.kind == EXPECTED:
            look |= {"edgecolors": "#222222", "linewidth": 0.7}
        axes.broken_barh([(span.begun_s, span.ended_s - span.begun_s)], (top, 0.42), **look)
    for row in rows:
        axes.axvline(row["asked_at"] - rows[0]["begun_at"], color="#999999", linewidth=0.6, linestyle=":", zorder=0)
        axes.annotate(
            str(row["round"]), (row["asked_at"] - rows[0]["begun_at"], 1), (2, 2), axes.get_xaxis_transform(), "offset points", fontsize=8
        )
    axes.set_yticks([index + 0.5 for index in range(len(lanes))], lanes, fontsize=8.5)
    axes.set_ylim(len(lanes), 0)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds; a dotted line where a round's plan leaves, with its number")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    kinds = [kind for kind in COLORS if any(span.kind == kind for span in drawn)]
    handles = [Patch(facecolor=COLORS[kind], edgecolor="#999999", linewidth=0.4, label=kind) for kind in kinds]
    if any(span.kind == EXPECTED for span in drawn):
        handles.append(Patch(facecolor="none", edgecolor="#222222", linewidth=0.7, label=EXPECTED))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return replace_file(directory / "timeline.png", png.getvalue())


def bars(rows: Sequence[Row], width: float, lane_height: float) -> list[Bar]:
    """Places bars for the page, where each says in words what it is when pointed at.

    Args:
        rows: Rounds, oldest first; not empty.
        width: Of the drawing, without names.
        lane_height: Of a lane.

    Returns:
        Bars.
    """
    drawn, lanes = spans(rows), lanes_of(rows)
    scale = width / max(span.ended_s for span in drawn)
    half = lane_height / 2
    return [
        Bar(
            x=span.begun_s * scale,
            y=lanes.index(span.lane) * lane_height + (1 if span.number % 2 == 0 else half),
            width=max(0.5, (span.ended_s - span.begun_s) * scale),
            height=half - 1,
            color=COLORS.get(span.kind, "none"),
            outline="currentColor" if span.kind == EXPECTED else "none",
            words=f"{span.lane}, round {span.number}: {span.kind} {span.ended_s - span.begun_s:.3f} s, from {span.begun_s:.3f} s",
        )
        for span in drawn
    ]


def lanes_of(rows: Sequence[Row]) -> list[str]:
    """Names the lanes from top to bottom: the cloud, then edges, then devices.

    Args:
        rows: Rounds.

    Returns:
        Each lane once.
    """
    return sorted({span.lane for span in spans(rows)}, key=_place)


def _place(lane: str) -> tuple[int, int]:
    kind, _, number = lane.partition(" ")
    return ("cloud", "edge", "device").index(kind), int(number or 0)


def _seconds(spent: Row) -> float:
    return sum(spent[part] for part in PARTS)


def _parts(lane: str, number: int, spent: Row, asked_s: float, work: str) -> list[Span]:
    found: list[Span] = []
    at = asked_s + spent["begun_s"]
    for part, kind in PARTS.items():
        if spent[part] > 0:
            found.append(Span(lane, work if part == "worked_s" else kind, number, at, at + spent[part]))
        at += spent[part]
    return found
