"""Where a run is, read from its directory alone: for whoever looks while it runs, or after it was left."""

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cooperllm.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """An edge or a device of a deployment, as it was when it last answered.

    Attributes:
        name: "edge 0", "device 3".
        last_round: Its last answer, a round from 1.
        received_s: Seconds that its order travelled.
        worked_s: Seconds at work; an edge waits for its devices.
        returned_s: Seconds that its answer travelled.
    """

    name: str
    last_round: int
    received_s: float
    worked_s: float
    returned_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run is.

    Attributes:
        recipe: Its recipe.
        arm: Its arm.
        seed: Its seed.
        num_rounds: Rounds that it is to have.
        is_busy: Whether a process is working on it.
        rounds: Figures of the rounds that are closed, as in rounds.jsonl.
        last_closed_s: Seconds since the last one was closed; None before the first.
        nodes: Of a deployment, in the order of tiers and numbers.
    """

    recipe: str
    arm: str
    seed: int
    num_rounds: int
    is_busy: bool
    rounds: tuple[dict[str, Any], ...]
    last_closed_s: float | None
    nodes: tuple[Node, ...]

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """Rounds that were judged, with the accuracy after each."""
        return [(row["round"], row["accuracy"]) for row in self.rounds if row["accuracy"] is not None]

    @property
    def dropped(self) -> dict[str, int]:
        """Reports that were not used so far, by outcome."""
        counts: Counter[str] = Counter()
        for row in self.rounds:
            counts.update(row["dropped"])
        return dict(sorted(counts.items()))

    def total(self, figure: str) -> int:
        """Adds a figure up over all rounds: bytes_down, bytes_up, bytes_between or forward_passes."""
        return sum(row[figure] for row in self.rounds)


def read_status(path: Path, now: datetime.datetime) -> Status:
    """Reads where a run is.

    Args:
        path: A run directory.
        now: The time, with a zone.

    Returns:
        Its status.

    Raises:
        RunDirectoryError: If there is no run, or it is damaged.
    """
    files = RunDirectory(path)
    config, rounds = files.config(), files.rounds()
    since = now - datetime.datetime.fromtimestamp((path / "rounds.jsonl").stat().st_mtime, datetime.UTC)
    return Status(
        recipe=config.recipe,
        arm=config.arm.name.value,
        seed=config.seed,
        num_rounds=config.num_rounds,
        is_busy=files.is_busy(),
        rounds=tuple(rounds),
        last_closed_s=since.total_seconds() if rounds else None,
        nodes=_nodes(files.times()),
    )


def status_words(status: Status) -> str:
    """Says where a run is.

    Args:
        status: Of the run.

    Returns:
        Some lines.
    """
    state = "a process is working on it" if status.is_busy else "no process is working on it"
    head = f"{status.recipe}, {status.arm}, seed {status.seed}: round {len(status.rounds)} of {status.num_rounds}; {state}"
    if not status.rounds:
        return head
    last = status.rounds[-1]
    accuracy = f"; accuracy {status.accuracies[-1][1]:.1%} after round {status.accuracies[-1][0]}" if status.accuracies else ""
    loss = "no loss" if last["private_loss"] is None else f"loss {last['private_loss']:.3f}"
    lost = ", ".join(f"{count} {outcome}" for outcome, count in status.dropped.items()) or "none"
    answered = ", ".join(map(str, last["answered"])) or "none"
    return "\n".join((
        head,
        f"last round: {max(status.last_closed_s or 0.0, 0.0):.0f} s ago, took {last['seconds']:.1f} s, {loss}{accuracy}",
        f"devices that answered in it: {answered}",
        f"reports not used so far: {lost}",
        f"bytes to devices {status.total('bytes_down')}, from devices {status.total('bytes_up')}, "
        f"between cloud and edges {status.total('bytes_between')}",
    ))


def _nodes(times: list[dict[str, Any]]) -> tuple[Node, ...]:
    latest: dict[tuple[int, int], Node] = {}
    for row in times:
        for edge in row["edges"]:
            for rank, kind, spent in ((0, "edge", edge["own"]), *((1, "device", device) for device in edge["devices"])):
                latest[rank, spent["node"]] = Node(
                    name=f"{kind} {spent['node']}",
                    last_round=row["round"],
                    received_s=spent["received_s"],
                    worked_s=spent["worked_s"],
                    returned_s=spent["returned_s"],
                )
    return tuple(latest[key] for key in sorted(latest))
