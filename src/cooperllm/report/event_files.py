"""A run's figures as TensorBoard's event files: a scalar for each figure and round."""

import json
from pathlib import Path

from cooperllm.config import to_plain
from cooperllm.report.exported import begun_at, require, runs_below, scalars, timed_rounds
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
    require("tensorboard", "event files")
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- of the extra `tensorboard`

    runs = runs_below(path)
    written = [target / run.relative_to(path) for run in runs]
    for run, directory in zip(runs, written, strict=True):
        with SummaryWriter(directory) as writer:
            settings = json.dumps(to_plain(RunDirectory(run).config()), indent=2)
            writer.add_text("settings", f"```\n{settings}\n```", 0, begun_at(run))
            for closed_at, row in timed_rounds(run):
                for name, value in scalars(row):
                    writer.add_scalar(name, value, row["round"], walltime=closed_at)
    return written
