"""Arms over several seeds or with tuned learning rates: the cells of terminal and page, and the sentence about pace.

A summary of such a comparison has "comparison", the figures of `results.json`. Numbers by seed stand below one another, in the order of
the seeds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from cooperllm.report.table import (
    BOUND_MARK,
    DASH,
    Summary,
    arm_rows,
    final_scores,
    format_number,
    format_rate,
    format_score,
    headings,
    judged_by,
    lay_out,
    title,
)

SUMS = "Forward passes and bytes are sums over all devices."
PLAIN_CAPTION = f"Final and best are accuracies; “to” is the first round at which that accuracy was seen; – is never, or not known. {SUMS}"
LOSS_CAPTION = f"Losses are means over the tokens of held-out completions; – is not known. {SUMS}"
EDGE_MARK = "† the best rate tried, at the edge of the grid"


class Cells(NamedTuple):
    """A table: headings, each arm's cells with whether it is the best, and what stands below."""

    headings: tuple[str, ...]
    rows: list[tuple[tuple[str, ...], bool]]
    caption: str


def arms_table(summary: Summary) -> Table:
    """Lays the arms of a summary out for an 80-column terminal.

    Args:
        summary: Content of summary.json; not modified.

    Returns:
        One row per arm, the best end in bold.

    Example:
        >>> arms_table({"recipe": "demo", "seed": 0, "arms": {"measured": {"final_accuracy": 0.83}}}).row_count
        1
    """
    cells = cells_of(summary)
    has_bound = any(arm.get("uses_back_propagation_on_devices") for arm in summary["arms"].values())
    marks = [BOUND_MARK] if has_bound else []
    marks += [cells.caption] if "comparison" in summary else []
    return lay_out(title(summary), cells.headings, cells.rows, "\n".join(marks))


def cells_of(summary: Summary) -> Cells:
    """Chooses the table: costs of single runs, or the spread of several.

    Args:
        summary: Content of summary.json; not modified.

    Returns:
        Headings, rows and caption.
    """
    if "comparison" in summary:
        return Cells(_headings(summary), _rows(summary), _caption(summary))
    return Cells(headings(summary), arm_rows(summary), LOSS_CAPTION if judged_by(summary) == "loss" else PLAIN_CAPTION)


def _headings(summary: Summary) -> tuple[str, ...]:
    figures: Summary = summary["comparison"]
    loss = "\nloss" if judged_by(summary) == "loss" else ""
    names = ("arm", "rate", "rounds", f"end{loss}", f"best{loss}")
    if figures["baseline"] is not None:
        names += ("rounds\nto its\nend", "rounds\nto its\nbest", "times\nsooner")
        names += ("bound:\nsooner",) if figures["bound"] is not None else ()
    return (*names, "time")


def _rows(summary: Summary) -> list[tuple[tuple[str, ...], bool]]:
    finals = final_scores(summary)
    best = max(finals.values(), default=None)
    return [(_cells(name, summary), name in finals and finals[name] == best) for name in summary["arms"]]


def _caption(summary: Summary) -> str:
    figures: Summary = summary["comparison"]
    baseline, bound = figures["baseline"], figures["bound"]
    end = f"End: mean of the last {figures['last_evaluations']} evaluations"
    sentences = [f"{end}, median over seeds, lowest–highest; best: median." if len(figures["seeds"]) > 1 else f"{end}."]
    if baseline is not None:
        by_seed = ", a line per seed" if len(figures["seeds"]) > 1 else ""
        sentences += [
            f"Its: {baseline}'s, the best zeroth-order baseline{by_seed}.",
            f"Sooner: {baseline}'s own rounds to its best / the arm's.",
        ]
        sentences += [f"Bound: {bound}."] if bound is not None else []
    sentences += ["Time: modelled, median."]
    sentences += [f"{EDGE_MARK}."] if any(arm["is_at_edge"] for arm in figures["arms"].values()) else []
    return " ".join(sentences)


def format_duration(seconds: float | None) -> str:
    """Writes a duration: 90 is '1.5 min', 3000 is '50 min'."""
    if seconds is None:
        return DASH
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


def pace(summary: Summary, lead: str) -> str:
    """Says how soon an arm has the baseline's best accuracy or loss, beside the baseline itself and back-propagation.

    Args:
        summary: Content of summary.json with a comparison that has a baseline; not modified.
        lead: The arm.

    Returns:
        A clause in plain text.
    """
    figures: Summary = summary["comparison"]
    arms, baseline, bound = figures["arms"], figures["baseline"], figures["bound"]
    if not any(arms[baseline]["rounds_to_baseline_best"]):
        return f"{baseline} is never better than at its start"
    clause = f"it reaches {baseline}'s best {judged_by(summary)} in {_by_seed(arms[lead]['rounds_to_baseline_best'])} rounds"
    clause += f", {baseline} itself in {_by_seed(arms[baseline]['rounds_to_baseline_best'])}"
    clause += f" ({_by_seed(_times(arms[lead]['ratio_to_baseline_best']))} sooner"
    if bound not in {None, lead}:
        clause += f"; back-propagation on devices {_by_seed(_times(arms[bound]['ratio_to_baseline_best']))}"
    return clause + ")"


def _by_seed(values: Sequence[Any]) -> str:
    return " / ".join("never" if value is None else str(value) for value in values)


def _times(ratios: Sequence[float | None]) -> list[str]:
    return [DASH if ratio is None else f"{ratio:.1f}x" for ratio in ratios]


def _stacked(values: Sequence[Any]) -> str:
    return "\n".join("never" if value is None else str(value) for value in values)


def _cells(name: str, summary: Summary) -> tuple[str, ...]:
    figures: Summary = summary["comparison"]
    arm, bound, judged = figures["arms"][name], figures["bound"], judged_by(summary)
    mark = "*" * summary["arms"][name].get("uses_back_propagation_on_devices", False)
    stopped = [outcome for outcome in arm["outcomes"] if outcome != "finished"]
    count = f"{len(stopped)} of {len(arm['outcomes'])} " if len(arm["outcomes"]) > 1 else ""
    cells = (
        name + mark + (f"\n{count}{'diverged' if set(stopped) == {'diverged'} else 'failed'}" if stopped else ""),
        format_rate(arm["learning_rate"], summary["arms"][name].get("optimizer")) + "†" * arm["is_at_edge"],
        format_number(arm["rounds"]),
        _spread(arm[f"end_{judged}"], judged),
        _written(arm[f"best_{judged}"]["median"], judged),
    )
    if figures["baseline"] is not None:
        cells += (_stacked(arm["rounds_to_baseline_end"]), _stacked(arm["rounds_to_baseline_best"]))
        cells += (_stacked(_times(arm["ratio_to_baseline_best"])),)
        cells += (_stacked(_times(figures["arms"][bound]["ratio_to_baseline_best"])),) if bound is not None else ()
    return (*cells, format_duration(arm["modelled_seconds"]["median"]))


def _spread(values: Summary, judged: str) -> str:
    """The median, and below it the range of several seeds."""
    median = _written(values["median"], judged)
    if values["median"] is None or len(values["by_seed"]) == 1:
        return median
    if judged == "loss":
        return f"{median}\n{values['min']:.2f}–{values['max']:.2f}"
    return f"{median}\n{100 * values['min']:.1f}–{100 * values['max']:.1f}"


def _written(value: float | None, judged: str) -> str:
    return format_score(-value if value is not None and judged == "loss" else value, judged)
