"""What the rounds of a run come to: curves, sums, and in how many rounds which accuracy was reached. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cooperllm.algorithm.baselines import arm
from cooperllm.config import Objective, RunConfig
from cooperllm.messages import StepKind
from cooperllm.wall_clock import DEFAULT_CLOCK, DeviceClock, round_seconds

LEVELS = tuple(round(0.05 * step, 2) for step in range(4, 20))
"""Accuracies that the rounds to are told of."""


def arm_summary(config: RunConfig, rounds: Sequence[Mapping[str, Any]], clock: DeviceClock = DEFAULT_CLOCK) -> dict[str, Any]:
    """Sums up the figures of a run, finished or not.

    Args:
        config: Its settings.
        rounds: Figures of each round, oldest first.
        clock: Device and link of the modelled wall clock.

    Returns:
        An arm's entry in `summary.json`.
    """
    curve, losses = ([[0, rounds[0][f"{name}_before"]]] if rounds else [] for name in ("accuracy", "loss"))
    curve += [[row["round"], row["accuracy"]] for row in rounds if row["accuracy"] is not None]
    losses += [[row["round"], row["loss"]] for row in rounds if row["loss"] is not None]
    evaluated = [number for number, _ in curve]
    forward_passes = np.cumsum([0] + [row["forward_passes"] for row in rounds]).tolist()
    link_bytes = np.cumsum([0] + [row["bytes_down"] + row["bytes_up"] for row in rounds]).tolist()
    seconds = modelled_seconds(config, rounds, clock)
    dropped: dict[str, int] = {}
    for row in rounds:
        for outcome, count in row["dropped"].items():
            dropped[outcome] = dropped.get(outcome, 0) + count
    return {
        "arm": config.arm.name.value,
        "finished": len(rounds) == config.num_rounds,
        "rounds": len(rounds),
        "optimizer": config.optimizer.kind.value,
        "learning_rate": config.arm.learning_rate,
        "final_accuracy": curve[-1][1] if curve else None,
        "best_accuracy": max((accuracy for _, accuracy in curve), default=None),
        "accuracy_by_round": curve,
        "judged_by": judged_by(config),
        "final_loss": losses[-1][1] if losses else None,
        "best_loss": min((loss for _, loss in losses), default=None),
        "loss_by_round": losses,
        "forward_passes_by_round": [[number, forward_passes[number]] for number in evaluated],
        "bytes_by_round": [[number, link_bytes[number]] for number in evaluated],
        "modelled_seconds_by_round": [[number, seconds[number]] for number in evaluated],
        "rho_by_round": [[row["round"], row["rho"]] for row in rounds if row["rho"] is not None],
        "rounds_to": {str(level): rounds_to(curve, level) for level in LEVELS},
        "queries_per_device_round": max((row["queries"] for row in rounds), default=0),
        "forward_passes": forward_passes[-1],
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "bytes_down": sum(row["bytes_down"] for row in rounds),
        "bytes_between": sum(row["bytes_between"] for row in rounds),
        "wall_seconds": round(sum(row["seconds"] for row in rounds), 2),
        "seed": config.seed,
        "uses_back_propagation_on_devices": arm(config.arm.name).local_training(config.arm) is not None,
        "dropped_reports": dropped,
        "rounds_taken_back": [row["round"] for row in rounds if row["step"] == StepKind.ROLLBACK.value],
    }


def judged_by(config: RunConfig) -> str:
    """Says by what runs are ordered: "accuracy", or for next tokens "loss", since a right token more or less says little there."""
    return "loss" if config.model.objective is Objective.NEXT_TOKEN else "accuracy"


def score(figures: Mapping[str, Any], name: str, judged: str) -> float | None:
    """Finds the figure by which runs are ordered, so that more is better.

    Args:
        figures: With accuracy and loss under names that end with these words.
        name: What stands before the word: "", "final_", "validation_".
        judged: "accuracy" or "loss".

    Returns:
        The accuracy, or the negative loss; None where it is not known.

    Example:
        >>> score({"final_accuracy": 0.2, "final_loss": 3.5}, "final_", "loss")
        -3.5
    """
    found = figures.get(f"{name}{judged}")
    return -found if found is not None and judged == "loss" else found


def score_curve(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Lists the scores of a run by round.

    Args:
        run: An arm's entry in `summary.json`.

    Returns:
        Pairs of round and score, in order.

    Example:
        >>> score_curve({"accuracy_by_round": [[0, 0.5]]}), score_curve({"judged_by": "loss", "loss_by_round": [[0, 3.5]]})
        ([(0, 0.5)], [(0, -3.5)])
    """
    by_loss = run.get("judged_by") == "loss"
    curve: Sequence[Sequence[float]] = run.get("loss_by_round" if by_loss else "accuracy_by_round", [])
    return [(int(number), -value if by_loss else value) for number, value in curve]


def modelled_seconds(config: RunConfig, rounds: Sequence[Mapping[str, Any]], clock: DeviceClock) -> list[float]:
    """Models the wall clock from the start to the end of each round, see `wall_clock`.

    Args:
        config: Settings of the run.
        rounds: Figures of each round, oldest first.
        clock: Device and link.

    Returns:
        Seconds, one more than rounds; the first is 0.
    """
    devices, seconds = config.federation.devices_per_round, [0.0]
    for row in rounds:
        of_device = {name: row[name] / devices for name in ("forward_passes", "bytes_down", "bytes_up")}
        seconds.append(round(seconds[-1] + round_seconds(clock, **of_device), 6))
    return seconds


def rounds_to(curve: Sequence[Sequence[float]], level: float) -> int | None:
    """Finds the first evaluated round at an accuracy or another score.

    Args:
        curve: Pairs of round and score, in order.
        level: Score.

    Returns:
        The round, or None when it was never reached.

    Example:
        >>> rounds_to([[0, 0.5], [5, 0.61], [10, 0.7]], 0.6)
        5
    """
    return next((int(number) for number, reached in curve if reached >= level), None)
