"""A run's figures and settings in MLflow: an experiment for each recipe, a metric for each figure, a parameter for each setting.

What is there already is not logged again: a run is found by its directory and beginning, and goes on after its last round.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cooperllm.config import to_plain
from cooperllm.report.exported import begun_at, require, runs_below, scalars, timed_rounds
from cooperllm.run_directory import RunDirectory

RUN_TAG, LAST_ROUND_TAG = "cooperllm.run", "cooperllm.last_round"
LARGEST_BATCH = 1000
"""Metrics that MLflow takes at a time; of parameters a tenth."""


def tracking_uri(where: str) -> str:
    """Says where MLflow keeps what it is given.

    Args:
        where: A URI, or a directory, in which a database is made: MLflow has given up plain files.

    Returns:
        The URI, as `mlflow ui --backend-store-uri` takes it, too.

    Example:
        >>> tracking_uri("http://mlflow.lan:5000"), tracking_uri("/tmp/tracked")
        ('http://mlflow.lan:5000', 'sqlite:////tmp/tracked/mlflow.db')
    """
    return where if "://" in where else f"sqlite:///{Path(where).resolve() / 'mlflow.db'}"


def log_to_mlflow(path: Path, where: str) -> int:
    """Logs the figures and settings of runs.

    Args:
        path: A run directory, or one with some below it: a comparison's, a deployment's.
        where: A tracking server's URI, or a directory.

    Returns:
        How many runs.

    Raises:
        ConfigError: If MLflow is not installed, or there is no run.
        RunDirectoryError: If a run is damaged.
    """
    require("mlflow", "its runs")
    runs = runs_below(path)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import; it would tell its makers what is called
    from mlflow.tracking import MlflowClient  # noqa: PLC0415 -- of the extra `mlflow`

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=tracking_uri(where))
    for run in runs:
        _log_run(client, run, "/".join((path.resolve().name, *run.relative_to(path).parts)))
    return len(runs)


def _log_run(client: Any, run: Path, name: str) -> None:
    from mlflow.entities import Metric  # noqa: PLC0415 -- of the extra `mlflow`

    config = RunDirectory(run).config()
    run_id, last_round = _found(client, run, name, config.recipe)
    rows = [(closed_at, row) for closed_at, row in timed_rounds(run) if row["round"] > last_round]
    metrics = (Metric(key, value, int(at * 1e3), row["round"]) for at, row in rows for key, value in scalars(row))
    for batch in _batches(metrics, LARGEST_BATCH):
        client.log_batch(run_id, metrics=batch)
    if rows:
        client.set_tag(run_id, LAST_ROUND_TAG, str(rows[-1][1]["round"]))
        if rows[-1][1]["round"] == config.num_rounds:
            client.set_terminated(run_id, end_time=int(rows[-1][0] * 1e3))


def _found(client: Any, run: Path, name: str, recipe: str) -> tuple[str, int]:
    """Finds the run in MLflow, or makes it; with the last round that it has."""
    from mlflow.entities import Param  # noqa: PLC0415 -- of the extra `mlflow`

    experiment = client.get_experiment_by_name(recipe or "cooperllm")
    experiment_id = client.create_experiment(recipe or "cooperllm") if experiment is None else experiment.experiment_id
    identity = hashlib.sha256(f"{run.resolve()} {begun_at(run)}".encode()).hexdigest()[:32]
    if known := client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'"):
        return known[0].info.run_id, int(known[0].data.tags.get(LAST_ROUND_TAG, 0))
    started = client.create_run(experiment_id, start_time=int(begun_at(run) * 1e3), tags={RUN_TAG: identity}, run_name=name)
    run_id = started.info.run_id
    for batch in _batches((Param(key, value) for key, value in settings_of(to_plain(RunDirectory(run).config()))), LARGEST_BATCH // 10):
        client.log_batch(run_id, params=batch)
    return run_id, 0


def settings_of(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names settings as `--set` does.

    Args:
        plain: A configuration as JSON has it.
        prefix: Before every name.

    Yields:
        Names and values.

    Example:
        >>> dict(settings_of({"seed": 1, "arm": {"name": "feedback"}}))
        {'seed': '1', 'arm.name': 'feedback'}
    """
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _batches(found: Iterator[Any], size: int) -> Iterator[Sequence[Any]]:
    while batch := list(islice(found, size)):
        yield batch
