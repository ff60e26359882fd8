"""One row per arm: the same cells for the terminal and for the page, in human units.

A summary maps names to plain values; its "arms" maps an arm's name to its numbers. A number that an unfinished arm lacks is a dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cooperllm.summary import score

Summary = Mapping[str, Any]

BOUND_MARK = "* back-propagates on devices: a bound, not a competitor"
DASH = "–"


def lay_out(heading: str, columns: Sequence[str], rows: Sequence[tuple[tuple[str, ...], bool]], caption: str) -> Table:
    """Lays cells out for an 80-column terminal.

    Args:
        heading: Title.
        columns: Headings, one per cell.
        rows: Cells of each arm, or of whatever a row is, and whether it is the best one.
        caption: What stands below, or nothing.

    Returns:
        The table; what the best arm ends at is bold.
    """
    table = Table(title=Text(heading), caption=caption or None, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    bold = next((index for index, column in enumerate(columns) if column.split("\n")[0] in {"final", "end"}), None)
    for cells, is_best in rows:
        table.add_row(*(Text(cell, "bold" if is_best and index == bold else "") for index, cell in enumerate(cells)))
    return table


def title(summary: Summary) -> str:
    """Names a run or comparison by its recipe and seeds."""
    seeds: Sequence[int] = summary.get("comparison", {}).get("seeds", [summary["seed"]])
    return f"{summary['recipe']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def headings(summary: Summary) -> tuple[str, ...]:
    """Names the columns; a newline shows where a narrow terminal breaks the line."""
    levels = (f"to\n{100 * float(level):g} %" for level in _levels(summary))
    loss = "\nloss" if judged_by(summary) == "loss" else ""
    return ("arm", "learning\nrate", f"final{loss}", f"best{loss}", *levels, "forward\npasses", "bytes\nup", "bytes\ndown", "seconds")


def arm_rows(summary: Summary) -> list[tuple[tuple[str, ...], bool]]:
    """Writes each arm as one cell per heading, and tells whether no finished arm ends at a higher accuracy."""
    levels, finals = _levels(summary), final_scores(summary)
    best = max(finals.values(), default=None)
    return [(_cells(name, arm, levels), name in finals and finals[name] == best) for name, arm in summary["arms"].items()]


def judged_by(summary: Summary) -> str:
    """Says by what the arms of a summary are ordered, "accuracy" or "loss"."""
    return next((arm["judged_by"] for arm in summary["arms"].values() if "judged_by" in arm), "accuracy")


def final_scores(summary: Summary) -> dict[str, float]:
    """Maps each finished arm to the score it ends at, over several seeds the median; an unfinished arm cannot be compared.

    Args:
        summary: Content of summary.json; not modified.

    Returns:
        Accuracies, or negative losses: more is better.
    """
    judged = judged_by(summary)
    if "comparison" in summary:
        figures: Summary = summary["comparison"]["arms"]
        ends = {name: arm[f"end_{judged}"]["median"] for name, arm in figures.items() if set(arm["outcomes"]) == {"finished"}}
        return {name: -end if judged == "loss" else end for name, end in ends.items()}
    arms = summary["arms"].items()
    found = {name: score(arm, "final_", judged) for name, arm in arms if arm.get("finished", True)}
    return {name: end for name, end in found.items() if end is not None}


def format_score(score: float | None, judged: str) -> str:
    """Writes a score as what it is: an accuracy as '83.1 %', a loss as '3.512'."""
    if score is None or judged != "loss":
        return format_percent(score)
    return f"{-score:.3f}"


def format_percent(fraction: float | None) -> str:
    """Writes a fraction as a percentage: 0.831 is '83.1 %'."""
    return DASH if fraction is None else f"{100 * fraction:.1f} %"


def format_number(value: float | None, form: str = ",.0f") -> str:
    """Writes a number, thousands set apart: 3200 is '3,200'."""
    return DASH if value is None else f"{value:{form}}"


def format_rate(rate: float | None, optimizer: str | None) -> str:
    """Writes a learning rate and, where it is not momentum's, whose it is: 'adam 0.005'."""
    number = format_number(rate, "g")
    return number if optimizer in {None, "momentum"} else f"{optimizer} {number}"


def format_bytes(num_bytes: int | None) -> str:
    """Writes bytes with a decimal unit, 1 kB = 1000 B: 1234567 is '1.2 MB'."""
    if num_bytes is None:
        return DASH
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" and value < 99.95 else f"{value:.0f} {unit}"


def _levels(summary: Summary) -> list[str]:
    """At most three accuracy levels, the highest that some arm has reached; none where runs are judged by their loss."""
    if judged_by(summary) == "loss":
        return []
    arms: list[Summary] = [arm.get("rounds_to", {}) for arm in summary["arms"].values()]
    levels = sorted({level for rounds_to in arms for level in rounds_to}, key=float)
    reached = [level for level in levels if any(rounds_to.get(level) is not None for rounds_to in arms)]
    return levels if len(levels) <= 3 else (reached or levels)[-3:]


def _cells(name: str, arm: Summary, levels: list[str]) -> tuple[str, ...]:
    judged = arm.get("judged_by", "accuracy")
    mark = "*" * arm.get("uses_back_propagation_on_devices", False)
    return (
        name + mark + ("" if arm.get("finished", True) else f"\n{arm.get('outcome', 'unfinished')}"),
        format_rate(arm.get("learning_rate"), arm.get("optimizer")),
        format_score(score(arm, "final_", judged), judged),
        format_score(score(arm, "best_", judged), judged),
        *(format_number(arm.get("rounds_to", {}).get(level)) for level in levels),
        format_number(arm.get("forward_passes")),
        format_bytes(arm.get("bytes_up")),
        format_bytes(arm.get("bytes_down")),
        format_number(arm.get("wall_seconds")),
    )
