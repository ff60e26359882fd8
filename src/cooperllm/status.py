"""Where a run is, read from its directory alone: for whoever looks while it runs, or after it was left."""

import datetime
from collections import Counter
from pathlib import Path

from cooperllm.run_directory import RunDirectory


def status_words(path: Path, now: datetime.datetime) -> str:
    """Says where a run is.

    Args:
        path: A run directory.
        now: The time, with a zone.

    Returns:
        Some lines.

    Raises:
        RunDirectoryError: If there is no run, or it is damaged.
    """
    files = RunDirectory(path)
    config, rounds = files.config(), files.rounds()
    state = "a process is working on it" if files.is_busy() else "no process is working on it"
    head = f"{config.recipe}, {config.arm.name.value}, seed {config.seed}: round {len(rounds)} of {config.num_rounds}; {state}"
    if not rounds:
        return head
    last = rounds[-1]
    ended = datetime.datetime.fromtimestamp((path / "rounds.jsonl").stat().st_mtime, datetime.UTC)
    judged = [row for row in rounds if row["accuracy"] is not None]
    accuracy = f"; accuracy {judged[-1]['accuracy']:.1%} after round {judged[-1]['round']}" if judged else ""
    dropped: Counter[str] = Counter()
    for row in rounds:
        dropped.update(row["dropped"])
    lost = ", ".join(f"{count} {outcome}" for outcome, count in sorted(dropped.items())) or "none"
    answered = ", ".join(map(str, last["answered"])) or "none"
    return "\n".join((
        head,
        f"last round: {(now - ended).total_seconds():.0f} s ago, took {last['seconds']:.1f} s, loss {last['private_loss']}{accuracy}",
        f"devices that answered in it: {answered}",
        f"reports not used so far: {lost}",
        f"bytes to devices {sum(row['bytes_down'] for row in rounds)}, from devices {sum(row['bytes_up'] for row in rounds)}, "
        f"between cloud and edges {sum(row['bytes_between'] for row in rounds)}",
    ))
