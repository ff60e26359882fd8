"""What an export of runs to another tool needs of them: which there are, their settings, and every figure of every round with its time."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cooperllm.errors import ConfigError
from cooperllm.run_directory import RunDirectory


def require(package: str, what: str) -> None:
    """Refuses an export whose tool is not installed; its extra has the tool's name.

    Args:
        package: The tool's package.
        what: What is written with it.

    Raises:
        ConfigError: If it is missing.
    """
    try:
        is_there = find_spec(package) is not None
    except ValueError:  # it is known to be missing
        is_there = False
    if not is_there:
        raise ConfigError(f'{what} are written with {package}, which is not installed: pip install "cooperllm[{package}]"')


def runs_below(path: Path) -> list[Path]:
    """Finds runs.

    Args:
        path: A run directory, or one with some below it: a comparison's, a deployment's.

    Returns:
        Run directories, at least one.

    Raises:
        ConfigError: If there is none.
    """
    runs = sorted(file.parent for file in path.glob("**/rounds.jsonl"))
    if not runs:
        raise ConfigError(
            f"{path}: found no run, expected rounds.jsonl there or below: the directory of a run, a comparison or a deployment"
        )
    return runs


def begun_at(run: Path) -> float:
    """When a run was begun, in seconds since 1970."""
    return (run / "config.json").stat().st_mtime


def timed_rounds(run: Path) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Dates the rounds of a run: they are as far apart as they took.

    Args:
        run: Its directory.

    Yields:
        When a round was closed, in seconds since 1970, and its line of rounds.jsonl.
    """
    closed_at = begun_at(run)
    for row in RunDirectory(run).rounds():
        closed_at += row["seconds"]
        yield closed_at, row


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names the numbers of a round.

    Args:
        row: A line of rounds.jsonl.

    Yields:
        Names and values; counts by outcome are named like "dropped/late", and what is not there has no value.

    Example:
        >>> dict(scalars({"round": 1, "arm": "feedback", "loss": None, "num_reports": 5, "answered": [3, 4], "dropped": {"late": 1}}))
        {'num_reports': 5.0, 'answered': 2.0, 'dropped/late': 1.0}
    """
    for name, value in row.items():
        if name == "round" or value is None or isinstance(value, str):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", float(count)) for key, count in value.items())
        else:
            yield name, float(len(value) if isinstance(value, list) else value)
