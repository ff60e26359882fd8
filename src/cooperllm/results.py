"""What a comparison found, as figures: deterministic, so that an interrupted comparison ends with the same file.

    end(s)   = mean of the last evaluations of seed s                                                   (1)
    ratio(s) = t_baseline(s) / t_arm(s),  t(s) = first evaluated round of seed s at the level(s)        (2)

Scores are accuracies, for next tokens negative losses. The level is the end or the best score of the baseline with the same seed. Both
rounds are looked up in the same way, so the baseline's own ratio is 1, and a baseline that peaks early gains nothing from later rounds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cooperllm.config import RunConfig
from cooperllm.report.page import LEADS
from cooperllm.study import LAST, Job, Tuning, mean_of_last
from cooperllm.summary import modelled_seconds, rounds_to, score_curve
from cooperllm.wall_clock import DeviceClock

METHOD = (*LEADS, "paper")
"""Arms that are the method itself: none of them is its own baseline."""
SCHEMA = pa.schema([
    ("arm", pa.string()),
    ("learning_rate", pa.float64()),
    ("seed", pa.int64()),
    ("is_result", pa.bool_()),
    ("outcome", pa.string()),
    ("round", pa.int64()),
    ("accuracy", pa.float64()),
    ("validation_accuracy", pa.float64()),
    ("loss", pa.float64()),
    ("validation_loss", pa.float64()),
    ("forward_passes", pa.int64()),
    ("bytes_up", pa.int64()),
    ("bytes_down", pa.int64()),
    ("modelled_seconds", pa.float64()),
])
"""Counts are sums over all devices since the start; a row is a result unless it only served to choose a rate."""


def rows(
    job: Job, config: RunConfig, rounds: Sequence[Mapping[str, Any]], clock: DeviceClock, *, is_result: bool, outcome: str
) -> list[dict[str, Any]]:
    """Lists the evaluations of a run, the state before the first round included.

    Args:
        job: Arm, rate and seed.
        config: Settings of the run.
        rounds: Figures of each round, oldest first.
        clock: Device and link of the modelled wall clock.
        is_result: Whether the run counts as a result of the comparison.
        outcome: How the run ended.

    Returns:
        One dictionary per evaluation, with the names of `SCHEMA`.
    """
    seconds = modelled_seconds(config, rounds, clock)
    facts = {"arm": job.arm.value, "learning_rate": job.learning_rate, "seed": job.seed, "is_result": is_result, "outcome": outcome}
    sums, judged = (
        dict.fromkeys(("forward_passes", "bytes_up", "bytes_down"), 0),
        ("accuracy", "validation_accuracy", "loss", "validation_loss"),
    )
    listed = (
        [facts | {"round": 0, **{name: rounds[0].get(f"{name}_before") for name in judged}, **sums, "modelled_seconds": 0.0}]
        if rounds
        else []
    )
    for row in rounds:
        sums = {name: total + row[name] for name, total in sums.items()}
        if row["accuracy"] is not None:
            evaluated = {name: row.get(name) for name in judged}
            listed.append(facts | {"round": row["round"], **evaluated, **sums, "modelled_seconds": seconds[row["round"]]})
    return listed


def write_parquet(path: Path, listed: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a Parquet file, in one step.

    Args:
        path: The file; replaced.
        listed: What `rows` lists.
    """
    temporary = path.with_name(f"{path.name}.partial")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in listed], SCHEMA), temporary)
    temporary.replace(path)


def arms_figures(entries: Mapping[str, Sequence[Mapping[str, Any]]], tunings: Mapping[str, Tuning]) -> dict[str, Any]:
    """Compares arms, eq. (1) and (2).

    Args:
        entries: Each arm's entries of `summary.json`, one per seed, in the same order of seeds; an unfinished one has an `outcome`.
        tunings: How each arm's learning rate was found.

    Returns:
        The baseline, the bound of back-propagation on devices, and each arm's figures.
    """
    baseline = baseline_of(entries)
    bounds = [name for name, runs in entries.items() if runs[0]["uses_back_propagation_on_devices"]]
    return {
        "last_evaluations": LAST,
        "baseline": baseline,
        "bound": max(bounds, key=lambda name: _median_end(entries[name]), default=None),
        "arms": {
            name: {
                "learning_rate": runs[0]["learning_rate"],
                "is_at_edge": tunings[name].is_at_edge,
                "rounds": max(run["rounds"] for run in runs),
                "outcomes": [_outcome(run) for run in runs],
                "end_accuracy": _ends(runs, "accuracy"),
                "best_accuracy": spread([run["best_accuracy"] if run["finished"] else None for run in runs]),
                "end_loss": _ends(runs, "loss"),
                "best_loss": spread([run.get("best_loss") if run["finished"] else None for run in runs]),
                "modelled_seconds": spread([run["modelled_seconds_by_round"][-1][1] if run["finished"] else None for run in runs]),
                **(_paces(runs, entries[baseline]) if baseline else {}),
            }
            for name, runs in entries.items()
        },
    }


def baseline_of(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Finds the baseline that others are measured by: of the zeroth-order arms of others the one that ends highest.

    Args:
        entries: See `arms_figures`.

    Returns:
        An arm that asks devices for slopes, is not the method itself and does not back-propagate there, with all its runs finished; None
        without one.
    """
    able = [
        name
        for name, runs in entries.items()
        if name not in METHOD and all(run["finished"] and run["queries_per_device_round"] for run in runs)
        and not runs[0]["uses_back_propagation_on_devices"]
    ]  # fmt: skip
    return max(able, key=lambda name: _median_end(entries[name]), default=None)


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Sums up one figure of several seeds.

    Args:
        values: One per seed; None where there is none.

    Returns:
        Median, smallest and largest of those there are, and all of them by seed.

    Example:
        >>> spread([0.7, None, 0.8, 0.6])["median"]
        0.7
    """
    there = [value for value in values if value is not None]
    return {
        "median": statistics.median(there) if there else None,
        "min": min(there, default=None),
        "max": max(there, default=None),
        "by_seed": list(values),
    }


def ratio(baseline_round: int | None, arm_round: int | None) -> float | None:
    """Says how many times sooner an arm gets to a level than the baseline itself, eq. (2).

    Args:
        baseline_round: First evaluated round of the baseline there.
        arm_round: First evaluated round of the arm there.

    Returns:
        Their ratio; None when one is never there, or starts there.

    Example:
        >>> ratio(150, 10), ratio(150, None), ratio(0, 5)
        (15.0, None, None)
    """
    return baseline_round / arm_round if baseline_round and arm_round else None


def _paces(runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rounds to the baseline's end and to its best, seed by seed, and their ratios to its own rounds."""
    paces: dict[str, Any] = {}
    best = [max((reached for _, reached in score_curve(run)), default=None) for run in baseline]
    for level, levels in (("end", [_end(run) for run in baseline]), ("best", best)):
        own = [_reached(run, wanted) for run, wanted in zip(baseline, levels, strict=True)]
        reached = [_reached(run, wanted) for run, wanted in zip(runs, levels, strict=True)]
        paces[f"rounds_to_baseline_{level}"] = reached
        paces[f"ratio_to_baseline_{level}"] = [ratio(first, second) for first, second in zip(own, reached, strict=True)]
    return paces


def _reached(run: Mapping[str, Any], wanted: float | None) -> int | None:
    return None if wanted is None else rounds_to(score_curve(run), wanted)


def _outcome(run: Mapping[str, Any]) -> str:
    return "finished" if run["finished"] else run["outcome"]


def _end(run: Mapping[str, Any]) -> float | None:
    return mean_of_last(score_curve(run)) if run["finished"] else None


def _ends(runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    return spread([mean_of_last(run.get(f"{name}_by_round", [])) if run["finished"] else None for run in runs])


def _median_end(runs: Sequence[Mapping[str, Any]]) -> float:
    median = spread([_end(run) for run in runs])["median"]
    return -math.inf if median is None else median
