"""One page that says what happened: it opens from a file, loads nothing, runs nothing, and can be sent by mail."""

import base64
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from cooperllm.report.plots import CHARTS, FALLBACK, STYLES, replace_file
from cooperllm.report.spread import cells_of, format_duration, pace
from cooperllm.report.table import BOUND_MARK, Summary, final_scores, format_number, format_score, judged_by, title
from cooperllm.report.timeline import COLORS, Row, bars, lanes_of, spans
from cooperllm.summary import rounds_to, score_curve

LEADS = ("feedback", "measured")
UNGUIDED = "mezo-fl"
TIMELINE_WIDTH, LANE_HEIGHT = 700, 18


def write_page(summary: Summary, directory: Path, plots: Sequence[Path], times: Sequence[Row] = ()) -> Path:
    """Writes report.html with everything it shows inside it.

    Args:
        summary: Content of summary.json; not modified. Whatever it says is shown as text, never as markup.
        directory: Existing directory; a report.html in it is replaced at once.
        plots: PNG files to embed, as `write_plots` returns them.
        times: Rounds to show as a timeline, where tiers were processes of their own.

    Returns:
        The file.

    Raises:
        OSError: If a plot cannot be read or the directory cannot be written.
    """
    loader = PackageLoader("cooperllm.report", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    cells = cells_of(summary)
    axes = {chart.file_name: chart.axis for chart in CHARTS}
    text = environment.get_template("report.html.jinja").render(
        summary=summary,
        verdict=verdict(summary),
        title=title(summary),
        cells=cells,
        rows=list(zip(summary["arms"], cells.rows, strict=True)),
        finals={name: format_score(final, judged_by(summary)) for name, final in final_scores(summary).items()},
        judged=judged_by(summary),
        styles={name: STYLES.get(name, FALLBACK) for name in summary["arms"]},
        figures=[(plot.name, axes.get(plot.name, plot.stem), base64.b64encode(plot.read_bytes()).decode()) for plot in plots],
        times=times,
        lanes=lanes_of(times) if times else [],
        bars=bars(times, TIMELINE_WIDTH, LANE_HEIGHT) if times else [],
        kinds=COLORS,
        timeline_s=max((span.ended_s for span in spans(times)), default=0.0) if times else 0.0,
        timeline_width=TIMELINE_WIDTH,
        lane_height=LANE_HEIGHT,
        command=_command(summary),
        standard_error=_standard_error(summary),
        bound_mark=BOUND_MARK,
        format_number=format_number,
        format_score=format_score,
        format_duration=format_duration,
    )
    return replace_file(directory / "report.html", text.encode())


def verdict(summary: Summary) -> str:
    """Says in one sentence how the run ended.

    The lead is our own arm, or without one the best that does not back-propagate on devices. Its rounds are compared with
    the round in which the unguided arm itself first reached its final accuracy, not with that arm's last round.

    Args:
        summary: Content of summary.json; not modified.

    Returns:
        A sentence in plain text.

    Example:
        >>> verdict({"arms": {"measured": {"final_accuracy": 0.831}, "cloud-only": {"final_accuracy": 0.789}}})
        'measured ends at 83.1 %, 4.2 points above cloud-only.'
    """
    arms, finals, judged = summary["arms"], final_scores(summary), judged_by(summary)
    if not finals:
        return "No arm has finished yet."
    forward_only = [name for name in finals if not arms[name].get("uses_back_propagation_on_devices")]
    best = max(forward_only or finals, key=lambda name: finals[name])
    lead = next((name for name in LEADS if name in finals), best)
    others = sorted(finals.keys() - {lead}, key=lambda name: (-finals[name], name))
    sentence = f"{lead} ends at {'a loss of ' if judged == 'loss' else ''}{format_score(finals[lead], judged)}"
    if len(seeds := summary.get("comparison", {}).get("seeds", [])) > 1:
        sentence += f" (median of {len(seeds)} seeds)"
    if others:
        sentence += f", {_enumerate(_margins(finals, lead, others, judged))}"
    else:
        sentence += f" after {arms[lead]['rounds']} rounds and {format_number(arms[lead]['forward_passes'])} forward passes"
    if "comparison" in summary:
        sentence += f"; {pace(summary, lead)}" if summary["comparison"]["baseline"] not in {None, lead} else ""
    elif UNGUIDED in others:
        sentence += f"; {_pace(arms[lead], arms[UNGUIDED])}"
    unfinished = [name for name in arms if name not in finals]
    if unfinished:
        sentence += f"; {_enumerate(unfinished)} {'has' if len(unfinished) == 1 else 'have'} not finished"
    return sentence + "."


def _margins(finals: dict[str, float], lead: str, others: list[str], judged: str) -> list[str]:
    """Gaps in points of a percentage, the unit said once, or of losses."""
    if judged == "loss":
        gaps = {name: finals[lead] - finals[name] for name in others}
        return [f"{abs(gap):.3f} {'below' if gap > 0 else 'above'} {name}" for name, gap in gaps.items()]
    margins, unit = list[str](), " points"
    for name in others:
        gap = round(100 * (finals[lead] - finals[name]), 1)
        margins.append(f"{abs(gap):.1f}{unit} {'above' if gap > 0 else 'below'} {name}" if gap else f"level with {name}")
        unit = "" if gap else unit
    return margins


def _pace(lead: Summary, unguided: Summary) -> str:
    rounds, unguided_rounds = (_first_round(arm, unguided) for arm in (lead, unguided))
    final = f"{UNGUIDED}'s final {unguided.get('judged_by', 'accuracy')}"
    if rounds is None or unguided_rounds is None:
        return f"it never reaches {final}"
    if rounds == 0 or unguided_rounds == 0:
        return f"{UNGUIDED} ends no higher than the start"
    ratio = unguided_rounds / rounds
    comparison = "as many" if ratio == 1 else f"{ratio:.1f}x fewer" if ratio > 1 else f"{1 / ratio:.1f}x more"
    return f"it reaches {final} in {rounds} rounds, {UNGUIDED} itself in {unguided_rounds} ({comparison})"


def _first_round(arm: Summary, unguided: Summary) -> int | None:
    """The first round at which an arm is where the unguided one ends."""
    return rounds_to(score_curve(arm), score_curve(unguided)[-1][1])


def _enumerate(parts: Sequence[str]) -> str:
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def _command(summary: Summary) -> str:
    verb = "run" if len(summary["arms"]) == 1 else "compare"
    return summary.get("command") or f"cooperllm {verb} {shlex.quote(str(summary['recipe']))} --seed {summary['seed']}"


def _standard_error(summary: Summary) -> float | None:
    """Largest binomial standard error of a final accuracy, if the number of test examples is known."""
    if judged_by(summary) == "loss":
        return None
    num_test = summary.get("config", {}).get("data", {}).get("num_test")
    variances = [accuracy * (1 - accuracy) for accuracy in final_scores(summary).values()]
    return math.sqrt(max(variances) / num_test) if num_test and variances else None
