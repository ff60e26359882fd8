"""A run's figures as TensorBoard's event files: a scalar for each figure and round."""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cooperllm.config import to_plain
from cooperllm.errors import ConfigError
from cooperllm.run_directory import RunDirectory


def write_event_files(path: Path, target: Path) -> list[Path]:
    """Writes the figures of runs for TensorBoard; a directory for each run, as it expects them.

    Args:
        path: A run directory, or one with some below it: a comparison's, a deployment's.
        target: Directory to write; what TensorBoard finds there already stays.

    Returns:
        The directories written, one a run.

    Raises:
        ConfigError: If TensorBoard is not installed, or there is no run.
        RunDirectoryError: If a run is damaged.
    """
    if not _has_tensorboard():
        raise ConfigError('event files are written with TensorBoard, which is not installed: pip install "cooperllm[tensorboard]"')
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- of the extra `tensorboard`

    runs = sorted(file.parent for file in path.glob("**/rounds.jsonl"))
    if not runs:
        raise ConfigError(
            f"{path}: found no run, expected rounds.jsonl there or below: the directory of a run, a comparison or a deployment"
        )
    written = [target / run.relative_to(path) for run in runs]
    for run, directory in zip(runs, written, strict=True):
        files, begun_s = RunDirectory(run), (run / "config.json").stat().st_mtime
        with SummaryWriter(directory) as writer:
            writer.add_text("settings", f"```\n{json.dumps(to_plain(files.config()), indent=2)}\n```", 0, begun_s)
            for row in files.rounds():
                begun_s += row["seconds"]
                for name, value in scalars(row):
                    writer.add_scalar(name, value, row["round"], walltime=begun_s)
    return written


def _has_tensorboard() -> bool:
    try:
        return find_spec("tensorboard") is not None
    except ValueError:  # it is known to be missing
        return False


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
