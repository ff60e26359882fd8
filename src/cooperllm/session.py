"""A run from beginning to end: rounds, evaluation, files. Several of them side by side are a comparison, see `comparison.py`."""

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cooperllm import report
from cooperllm.algorithm import replay
from cooperllm.algorithm.baselines import arm
from cooperllm.assembly import Assembly, Material, assemble, make_devices
from cooperllm.cloud import Cloud
from cooperllm.config import EngineName, RunConfig, to_plain
from cooperllm.edge import Edge
from cooperllm.errors import RunDirectoryError
from cooperllm.link import flower
from cooperllm.link.base import Link
from cooperllm.link.codec import encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import FORMAT_VERSION, StepKind, Update
from cooperllm.models import Examples, Model
from cooperllm.round import RoundResult, run_round
from cooperllm.run_directory import Checkpoint, RunDirectory, config_hash
from cooperllm.wall_clock import DEFAULT_CLOCK, DeviceClock, round_seconds

LEVELS = tuple(round(0.05 * step, 2) for step in range(4, 20))
EVALUATION_BATCH = 50

Observer = Callable[[RunConfig, Mapping[str, Any]], None]
"""Called with the figures of each round as it ends; progress bars live there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run or comparison.

    Attributes:
        path: Its directory.
        summary: Contents of `summary.json`.
    """

    path: Path
    summary: dict[str, Any]

    def export(self, directory: Path | str) -> Path:
        """Writes the trained adapter the way PEFT does; see `export`."""
        return export(self.path, directory)


def run(config: RunConfig, directory: Path | str, observe: Observer | None = None) -> Run:
    """Trains one arm from the beginning.

    Args:
        config: Settings.
        directory: A missing or empty directory for the run.
        observe: Called after every round.

    Returns:
        The finished run.

    Raises:
        CooperLLMError: See `cooperllm.errors`; what was done so far stays in the directory.
    """
    material = Material(config)
    material.check([config.arm.name])
    return _continued(RunDirectory.create(Path(directory), config), material, observe)


def resume(directory: Path | str, observe: Observer | None = None, material: Material | None = None, *, draws: bool = True) -> Run:
    """Continues a run where it stopped; a finished one only gets its report anew.

    Args:
        directory: A run directory.
        observe: Called after every round.
        material: Model and texts of another run, used again where they are the same.
        draws: Whether plots and page are made; a comparison makes its own.

    Returns:
        The finished run: θ has the bits of an uninterrupted one.

    Raises:
        RunDirectoryError: If the directory is missing or damaged; nothing in it is overwritten.
    """
    return _continued(RunDirectory(Path(directory)), material, observe, draws=draws)


def export(directory: Path | str, target: Path | str) -> Path:
    """Writes the adapter of a run as a directory that plain PEFT loads.

    Args:
        directory: A run, finished or not.
        target: Where to write.

    Returns:
        The target.

    Raises:
        RunDirectoryError: If there is no such run.
    """
    files = RunDirectory(Path(directory))
    assembly = assemble(files)
    _save(assembly, _restored(files, assembly, files.updates(), []), Path(target))
    return Path(target)


def _continued(files: RunDirectory, material: Material | None, observe: Observer | None, *, draws: bool = True) -> Run:
    assembly = assemble(files, material)
    config = assembly.config
    with files.locked():
        updates = files.repair()
        if len(updates) < config.num_rounds:
            assembly.package()
            _carried_by(config, assembly, partial(_train, files, assembly, updates, observe))
        return _finished(files, assembly, draws=draws)


def _carried_by(config: RunConfig, assembly: Assembly, drive: Callable[[Link], None]) -> None:
    """Chooses the engine; every one of them gives the same numbers."""
    count = config.federation.num_devices
    if config.engine is EngineName.LOOPBACK:
        drive(Loopback(assembly.devices()))
    elif config.engine is EngineName.GRID:
        flower.run_in_process(assembly.devices, count, drive)
    else:
        flower.run_in_simulation(partial(make_devices, assembly.directory.path.resolve()), count, drive, num_cpus=1)


def _train(files: RunDirectory, assembly: Assembly, updates: Sequence[Update], observe: Observer | None, link: Link) -> None:
    config = assembly.config
    edges = assembly.edges()
    cloud = _restored(files, assembly, updates, edges)
    for round_number in range(len(updates) + 1, config.num_rounds + 1):
        begun = time.perf_counter()
        before = _evaluated(assembly, cloud) if round_number == 1 else {}
        result = run_round(cloud, edges, link)
        figures = _figures(config, round_number, result)
        figures |= {f"{name}_before": value for name, value in before.items()}
        if round_number % config.evaluate_every == 0 or round_number == config.num_rounds:
            figures |= _evaluated(assembly, cloud)
        figures["seconds"] = round(time.perf_counter() - begun, 4)
        files.append_update(result.closed.update)
        files.append_round(figures)
        if round_number % config.checkpoint_every == 0:
            files.write_checkpoint(_checkpoint(config, cloud))
        if observe is not None:
            observe(config, figures)


def _restored(files: RunDirectory, assembly: Assembly, updates: Sequence[Update], edges: Sequence[Edge]) -> Cloud:
    """Brings cloud and edges to the end of the log, from the newest checkpoint that belongs to it."""
    cloud = assembly.cloud()
    checkpoint = files.checkpoint() if updates else None
    if checkpoint is not None and checkpoint.config_hash != config_hash(assembly.config):
        raise RunDirectoryError(
            f"{files.path / 'checkpoint.bin'} belongs to another configuration; delete it: the replay log alone is enough"
        )
    if checkpoint is not None and checkpoint.snapshot.model_version <= len(updates):
        done = updates[: checkpoint.snapshot.model_version]
        replica = replay.restore(checkpoint.snapshot, assembly.material.model.layout.size)
        cloud.restore(replica, checkpoint.pool, checkpoint.maps, checkpoint.good, done)
    for update in updates[cloud.replica.model_version :]:
        cloud.replay(update)
    figures = files.rounds() if edges else []
    for index, update in enumerate(updates if edges else ()):
        for edge in edges:
            edge.remember(update, len(encode(update)))
            edge.note_version(figures[index]["answered"], index)
    return cloud


def _checkpoint(config: RunConfig, cloud: Cloud) -> Checkpoint:
    return Checkpoint(
        format_version=FORMAT_VERSION,
        config_hash=config_hash(config),
        snapshot=cloud.replica.snapshot(),
        pool=cloud.pool(),
        maps=cloud.maps(),
        good=cloud.good(),
    )


def _evaluated(assembly: Assembly, cloud: Cloud) -> dict[str, float]:
    """Accuracy and mean loss of the current θ on the held-out texts."""
    accuracy, loss = _judged(assembly.material.model, assembly.material.test, cloud)
    figures = {"accuracy": accuracy, "loss": loss}
    if assembly.config.validates:
        figures["validation_accuracy"] = _judged(assembly.material.model, assembly.material.validation, cloud)[0]
    return figures


def _judged(model: Model, examples: Examples, cloud: Cloud) -> tuple[float, float]:
    """Examples are sorted by length, so that little is padding."""
    theta = torch.from_numpy(cloud.replica.theta.copy())
    order = sorted(range(len(examples)), key=lambda index: len(examples.token_ids[index]))
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(order), EVALUATION_BATCH):
            batch = model.batch(examples, order[start : start + EVALUATION_BATCH])
            scores = model.scores(theta, batch)
            correct += int((scores.argmax(1) == batch.labels).sum())
            loss += float(torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum"))
    # JSON has no word for infinity, which a diverged run may reach.
    return correct / len(order), loss / len(order) if np.isfinite(loss) else float(np.finfo(np.float32).max)


def _figures(config: RunConfig, round_number: int, result: RoundResult) -> dict[str, Any]:
    closed = result.closed
    return {
        "round": round_number,
        "arm": config.arm.name.value,
        "accuracy": None,
        "loss": None,
        "validation_accuracy": None,
        "private_loss": closed.update.loss,
        "public_loss": result.public_loss,
        "step": closed.update.kind.value,
        "learning_rate": closed.update.learning_rate,
        **dict.fromkeys(("rho", "weight", "shrinkage", "span_energy", "slope_variance", "gain", "relative_variance")),
        **closed.observed,
        "queries": result.queries,
        "forward_passes": result.forward_passes,
        "bytes_down": result.bytes_down,
        "bytes_up": result.bytes_up,
        "bytes_between": result.bytes_between,
        "num_reports": closed.num_reports,
        "answered": list(result.answered),
        "dropped": {outcome.value: count for outcome, count in closed.dropped.items()},
        "theta_hash": closed.update.theta_hash.hex(),
    }


def _finished(files: RunDirectory, assembly: Assembly, *, draws: bool) -> Run:
    config = assembly.config
    updates, rounds = files.updates(), files.rounds()
    cloud = _restored(files, assembly, updates, [])
    _save(assembly, cloud, files.path / "adapter")
    name = config.arm.name.value
    summary = {
        "recipe": config.recipe,
        "seed": config.seed,
        "model": config.model.name,
        "num_parameters": assembly.material.model.layout.size,
        "num_rounds": config.num_rounds,
        "version": version("cooperllm"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "command": f"cooperllm run {config.recipe} --arm {name} --seed {config.seed}",
        "notices": list(assembly.material.task.notices),
        "clock": asdict(DEFAULT_CLOCK),
        "config": to_plain(config),
        "arms": {name: arm_summary(config, rounds)},
    }
    return reported(files.path, summary, draws=draws)


def _save(assembly: Assembly, cloud: Cloud, target: Path) -> None:
    assembly.material.model.save_adapter(cloud.replica.theta, target, assembly.material.task.label_names)


def arm_summary(config: RunConfig, rounds: Sequence[Mapping[str, Any]], clock: DeviceClock = DEFAULT_CLOCK) -> dict[str, Any]:
    """Sums up the figures of a run, finished or not.

    Args:
        config: Its settings.
        rounds: Figures of each round, oldest first.
        clock: Device and link of the modelled wall clock.

    Returns:
        An arm's entry in `summary.json`.
    """
    curve = [[0, rounds[0]["accuracy_before"]]] if rounds else []
    curve += [[row["round"], row["accuracy"]] for row in rounds if row["accuracy"] is not None]
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
        "validation_accuracy_by_round": [
            [row["round"], row["validation_accuracy"]] for row in rounds if row["validation_accuracy"] is not None
        ],
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
    """Finds the first evaluated round at an accuracy.

    Args:
        curve: Pairs of round and accuracy, in order.
        level: Accuracy in [0, 1].

    Returns:
        The round, or None when it was never reached.

    Example:
        >>> rounds_to([[0, 0.5], [5, 0.61], [10, 0.7]], 0.6)
        5
    """
    return next((int(number) for number, accuracy in curve if accuracy >= level), None)


def reported(path: Path, summary: dict[str, Any], *, draws: bool = True) -> Run:
    """Writes plots and page, and last the summary, which says that everything is there.

    Args:
        path: Directory of a run or a comparison.
        summary: Contents of `summary.json`.
        draws: Whether plots and page are made.

    Returns:
        The finished run or comparison.
    """
    if draws:
        report.write_page(summary, path, report.write_plots(summary, path))
    RunDirectory(path).write_json("summary.json", summary)
    return Run(path=path, summary=summary)
