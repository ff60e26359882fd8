"""Runs from beginning to end: rounds, evaluation, files, and several arms side by side.

A comparison is a directory of runs, one per arm; both kinds of directory have a `summary.json` of the same form.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
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
from cooperllm.messages import FORMAT_VERSION, Update
from cooperllm.models import Examples, Model
from cooperllm.round import RoundResult, run_round
from cooperllm.run_directory import Checkpoint, RunDirectory, config_hash

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

    def export(self, directory: Path | str, arm: str | None = None) -> Path:
        """Writes the trained adapter the way PEFT does; see `export`."""
        return export(self.path, Path(directory), arm)


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


def compare(configs: Sequence[RunConfig], directory: Path | str, observe: Observer | None = None) -> Run:
    """Trains several arms one after the other on the same task and reports on all of them.

    Args:
        configs: One configuration per arm; everything but the arm is expected to be the same.
        directory: A missing or empty directory.
        observe: Called after every round.

    Returns:
        The finished comparison.

    Raises:
        RunDirectoryError: If the directory is not empty; for what else can happen see `cooperllm.errors`. What was done so far stays.
    """
    path = Path(directory)
    if path.exists() and any(path.iterdir()):
        raise RunDirectoryError(f"{path}: the directory is not empty; choose another, or continue it with `cooperllm resume {path}`")
    material = Material(configs[0])
    material.check([config.arm.name for config in configs])
    for config in configs:
        RunDirectory.create(path / config.arm.name.value, config)
    names = [config.arm.name.value for config in configs]
    RunDirectory(path).write_json("comparison.json", {"arms": names})
    return _all_continued(path, names, material, observe)


def resume(directory: Path | str, observe: Observer | None = None) -> Run:
    """Continues a run or a comparison where it stopped; a finished one only gets its report anew.

    Args:
        directory: A run directory or a comparison.
        observe: Called after every round.

    Returns:
        The finished run: θ has the bits of an uninterrupted one.

    Raises:
        RunDirectoryError: If the directory is missing or damaged; nothing in it is overwritten.
    """
    path = Path(directory)
    names = _compared(path)
    if not names:
        return _continued(RunDirectory(path), None, observe)
    return _all_continued(path, names, Material(RunDirectory(path / names[0]).config()), observe)


def _all_continued(path: Path, names: Sequence[str], material: Material, observe: Observer | None) -> Run:
    """Brings every arm of a comparison to its end and reports on all of them."""
    runs = [_continued(RunDirectory(path / name), material, observe) for name in names]
    summary = runs[0].summary | {"arms": {name: part for run in runs for name, part in run.summary["arms"].items()}}
    summary["command"] = f"cooperllm compare {summary['recipe']} --arms {','.join(names)} --seed {summary['seed']}"
    return _reported(RunDirectory(path), summary)


def export(directory: Path | str, target: Path | str, arm: str | None = None) -> Path:
    """Writes the adapter of a run as a directory that plain PEFT loads.

    Args:
        directory: A run, finished or not, or a comparison.
        target: Where to write.
        arm: Which arm of a comparison; the only one of a run by default.

    Returns:
        The target.

    Raises:
        RunDirectoryError: If there is no such run.
    """
    path = Path(directory)
    names = _compared(path)
    if names:
        chosen = arm or ("measured" if "measured" in names else names[0])
        if chosen not in names:
            raise RunDirectoryError(f"{path}: no arm {arm!r}; expected one of {', '.join(names)}")
        path = path / chosen
    files = RunDirectory(path)
    assembly = assemble(files)
    _save(assembly, _restored(files, assembly, files.updates(), []), Path(target))
    return Path(target)


def _compared(path: Path) -> list[str]:
    """The arms of a comparison; none for a single run."""
    file = path / "comparison.json"
    if not file.is_file():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])["arms"]
    except (msgspec.DecodeError, KeyError) as error:
        raise RunDirectoryError(f"{file} is damaged ({error}); it lists the arms, one directory each; nothing was changed") from error


def _continued(files: RunDirectory, material: Material | None, observe: Observer | None) -> Run:
    assembly = assemble(files, material)
    config = assembly.config
    with files.locked():
        updates = files.repair()
        if len(updates) < config.num_rounds:
            _carried_by(config, assembly, partial(_train, files, assembly, updates, observe))
        return _finished(files, assembly)


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
        cloud.restore(replay.restore(checkpoint.snapshot, assembly.material.model.layout.size), checkpoint.pool, checkpoint.maps, done)
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
        "public_loss": result.public_loss,
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


def _finished(files: RunDirectory, assembly: Assembly) -> Run:
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
        "config": to_plain(config),
        "arms": {name: _arm_summary(config, rounds)},
    }
    return _reported(files, summary)


def _save(assembly: Assembly, cloud: Cloud, target: Path) -> None:
    assembly.material.model.save_adapter(cloud.replica.theta, target, assembly.material.task.label_names)


def _arm_summary(config: RunConfig, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curve = [[0, rounds[0]["accuracy_before"]]] + [[row["round"], row["accuracy"]] for row in rounds if row["accuracy"] is not None]
    evaluated = [number for number, _ in curve]
    forward_passes = np.cumsum([0] + [row["forward_passes"] for row in rounds]).tolist()
    link_bytes = np.cumsum([0] + [row["bytes_down"] + row["bytes_up"] for row in rounds]).tolist()
    dropped: dict[str, int] = {}
    for row in rounds:
        for outcome, count in row["dropped"].items():
            dropped[outcome] = dropped.get(outcome, 0) + count
    return {
        "arm": config.arm.name.value,
        "finished": len(rounds) == config.num_rounds,
        "rounds": len(rounds),
        "learning_rate": config.arm.learning_rate,
        "final_accuracy": curve[-1][1],
        "best_accuracy": max(accuracy for _, accuracy in curve),
        "accuracy_by_round": curve,
        "validation_accuracy_by_round": [
            [row["round"], row["validation_accuracy"]] for row in rounds if row["validation_accuracy"] is not None
        ],
        "forward_passes_by_round": [[number, forward_passes[number]] for number in evaluated],
        "bytes_by_round": [[number, link_bytes[number]] for number in evaluated],
        "rho_by_round": [[row["round"], row["rho"]] for row in rounds if row["rho"] is not None],
        "rounds_to": {str(level): rounds_to(curve, level) for level in LEVELS},
        "queries_per_device_round": max(row["queries"] for row in rounds),
        "forward_passes": forward_passes[-1],
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "bytes_down": sum(row["bytes_down"] for row in rounds),
        "bytes_between": sum(row["bytes_between"] for row in rounds),
        "wall_seconds": round(sum(row["seconds"] for row in rounds), 2),
        "seed": config.seed,
        "uses_back_propagation_on_devices": arm(config.arm.name).local_training(config.arm) is not None,
        "dropped_reports": dropped,
    }


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


def _reported(files: RunDirectory, summary: dict[str, Any]) -> Run:
    files.write_json("summary.json", summary)
    plots = report.write_plots(summary, files.path)
    report.write_page(summary, files.path, plots)
    return Run(path=files.path, summary=summary)
