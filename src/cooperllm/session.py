"""A run from beginning to end: rounds, evaluation, files. Several of them side by side are a comparison, see `comparison.py`."""

import datetime
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float32

from cooperllm import report
from cooperllm.algorithm import replay
from cooperllm.assembly import Assembly, Material, assemble, make_devices
from cooperllm.batches import Examples
from cooperllm.cloud import Cloud
from cooperllm.config import EngineName, RunConfig, to_plain
from cooperllm.errors import ConfigError, QuorumError, RunDirectoryError
from cooperllm.link import flower
from cooperllm.link.base import Link
from cooperllm.link.loopback import Loopback
from cooperllm.messages import FORMAT_VERSION, Update
from cooperllm.model_card import model_card
from cooperllm.models import Model
from cooperllm.round import Begun, RoundResult, begin_round, end_round
from cooperllm.run_directory import Checkpoint, RunDirectory, config_hash
from cooperllm.summary import arm_summary
from cooperllm.tiers import LocalEdges, Tiers
from cooperllm.wall_clock import DEFAULT_CLOCK

EVALUATION_BATCH = 50
_log = logging.getLogger(__name__)

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
    _check_engine(config)
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
    assembly, theta = trained(directory)
    _save(assembly, theta, Path(target))
    return Path(target)


def trained(directory: Path | str) -> tuple[Assembly, Float32[np.ndarray, "n"]]:
    """Finds what a run has come to.

    Args:
        directory: A run, finished or not.

    Returns:
        (its rooms; θ at the end of its log, shape [n]).

    Raises:
        RunDirectoryError: If there is no such run.
    """
    files = RunDirectory(Path(directory))
    assembly = assemble(files)
    return assembly, _restored(files, assembly, files.updates()).replica.theta


def deployed(directory: Path | str, tiers: Tiers, observe: Observer | None = None, *, wait_s: float = 5.0) -> Run:
    """Continues a run whose edges and devices are elsewhere, from its first round or from where it stopped.

    A round without a quorum is no end here: devices come and go, and it is asked again until enough of them answer.

    Args:
        directory: A run directory.
        tiers: The edges.
        observe: Called after every round.
        wait_s: Seconds before a round that found no quorum is asked again, >= 0.

    Returns:
        The finished run.

    Raises:
        RunDirectoryError: If the directory is missing or damaged; nothing in it is overwritten.
    """
    files = RunDirectory(Path(directory))
    assembly = assemble(files)
    with files.locked():
        updates = files.repair()
        if len(updates) < assembly.config.num_rounds:
            known = _known_to_first(assembly.config, updates)
            cloud = _restored(files, assembly, known)
            for update in known:
                tiers.remember(update)
            _train(files, assembly, updates, observe, cloud, tiers, wait_s)
        return _finished(files, assembly, draws=True)


def _continued(files: RunDirectory, material: Material | None, observe: Observer | None, *, draws: bool = True) -> Run:
    assembly = assemble(files, material)
    config = assembly.config
    with files.locked():
        updates = files.repair()
        if len(updates) < config.num_rounds:
            _check_engine(config)
            assembly.package()
            _carried_by(config, assembly, partial(_simulated, files, assembly, updates, observe))
        return _finished(files, assembly, draws=draws)


def _check_engine(config: RunConfig) -> None:
    if config.engine is EngineName.FLEET:
        raise ConfigError(
            "engine: found fleet, expected grid, loopback or simulation: the devices of such a run are elsewhere; "
            "`cooperllm up` or `cooperllm enroll` begins one, `cooperllm cloud` goes on with it"
        )
    for name, plain in (("over_selection", 1.0), ("adapts_bits", False)):
        if (found := getattr(config.federation, name)) != plain:
            raise ConfigError(
                f"federation.{name}: found {found}, expected {plain}: in one process no device is slower than another; "
                "`cooperllm up` has processes"
            )


def _carried_by(config: RunConfig, assembly: Assembly, drive: Callable[[Link], None]) -> None:
    """Chooses the engine; every one of them gives the same numbers."""
    count = config.federation.num_devices
    if config.engine is EngineName.LOOPBACK:
        drive(Loopback(assembly.devices()))
    elif config.engine is EngineName.GRID:
        flower.run_in_process(assembly.devices, count, drive)
    else:
        flower.run_in_simulation(partial(make_devices, assembly.directory.path.resolve()), count, drive, num_cpus=1)


def _simulated(files: RunDirectory, assembly: Assembly, updates: Sequence[Update], observe: Observer | None, link: Link) -> None:
    tiers, known = LocalEdges(assembly.edges(), link), _known_to_first(assembly.config, updates)
    for update in known:
        tiers.remember(update)
    for index, figures in enumerate(files.rounds()):
        tiers.note_answered(figures["answered"], index - figures["staleness"])
    _train(files, assembly, updates, observe, _restored(files, assembly, known), tiers)


def _known_to_first(config: RunConfig, updates: Sequence[Update]) -> Sequence[Update]:
    """The part of a log that the first round to be closed starts from: with staleness, all but the last update."""
    return updates[: max(0, len(updates) - config.federation.staleness)]


def _train(
    files: RunDirectory,
    assembly: Assembly,
    updates: Sequence[Update],
    observe: Observer | None,
    cloud: Cloud,
    tiers: Tiers,
    wait_s: float | None = None,
) -> None:
    """Closes the rounds that the log lacks. A resumed run has its rounds under way again, each begun at the version it was begun at."""
    config, under_way = assembly.config, deque[Begun]()
    for update in updates[cloud.replica.model_version :]:
        under_way.append(begin_round(cloud, tiers, len(updates)))
        cloud.replay(update)
        tiers.remember(update)
    for round_number in range(len(updates) + 1, config.num_rounds + 1):
        begun = time.perf_counter()
        before = _evaluated(assembly, cloud) if round_number == 1 else {}
        last = min(round_number + config.federation.staleness, config.num_rounds)
        while round_number + len(under_way) <= last:
            under_way.append(begin_round(cloud, tiers, round_number - 1 + len(under_way)))
        result = _closed(cloud, tiers, under_way.popleft(), wait_s)
        figures = _figures(config, round_number, result)
        figures |= {f"{name}_before": value for name, value in before.items()}
        if round_number % config.evaluate_every == 0 or round_number == config.num_rounds:
            figures |= _evaluated(assembly, cloud)
        figures["seconds"] = round(time.perf_counter() - begun, 4)
        files.append_update(result.closed.update)
        files.append_round(figures)
        if result.times.edges:
            files.append_times({"round": round_number, **msgspec.to_builtins(result.times)})
        if round_number % config.checkpoint_every == 0:
            files.write_checkpoint(_checkpoint(config, cloud))
        if observe is not None:
            observe(config, figures)


def _closed(cloud: Cloud, tiers: Tiers, begun: Begun, wait_s: float | None) -> RoundResult:
    """Ends a round, asked again and again where there is somebody to wait for."""
    while True:
        try:
            return end_round(cloud, tiers, begun)
        except QuorumError as error:
            if wait_s is None:
                raise
            _log.warning("%s; asked again in %g s", error, wait_s)
            time.sleep(wait_s)
            begun = begin_round(cloud, tiers, begun.prepared.plan.round_index)


def _restored(files: RunDirectory, assembly: Assembly, updates: Sequence[Update]) -> Cloud:
    """Brings the cloud to the end of the log, from the newest checkpoint that belongs to it."""
    cloud = assembly.cloud()
    checkpoint = files.checkpoint() if updates else None
    if checkpoint is not None and checkpoint.config_hash != config_hash(assembly.config):
        raise RunDirectoryError(
            f"{files.path / 'checkpoint.bin'} belongs to another configuration; delete it: the replay log alone is enough"
        )
    if checkpoint is not None and checkpoint.snapshot.model_version <= len(updates):
        done = updates[: checkpoint.snapshot.model_version]
        num_moments = replay.NUM_MOMENTS[assembly.config.optimizer.kind]
        replica = replay.restore(checkpoint.snapshot, assembly.material.model.layout.size, num_moments)
        cloud.restore(replica, checkpoint.pool, checkpoint.maps, checkpoint.good, done)
    for update in updates[cloud.replica.model_version :]:
        cloud.replay(update)
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
    model, theta = assembly.material.model, cloud.replica.theta
    accuracy, loss = judged(model, assembly.material.test, theta)
    figures = {"accuracy": accuracy, "loss": loss}
    if assembly.config.validates:
        accuracy, loss = judged(model, assembly.material.validation, theta)
        figures |= {"validation_accuracy": accuracy, "validation_loss": loss}
    return figures


def judged(model: Model, examples: Examples, theta: Float32[np.ndarray, "n"]) -> tuple[float, float]:
    """Judges a model on held-out examples; they are sorted by length, so that little is padding.

    Args:
        model: The network.
        examples: At least one.
        theta: θ, shape [n].

    Returns:
        (share of targets with the highest score; their mean loss).
    """
    point = torch.from_numpy(theta.copy())
    order = sorted(range(len(examples)), key=lambda index: len(examples.token_ids[index]))
    correct, loss, count = 0, 0.0, examples.num_targets(order)
    with torch.inference_mode():
        for start in range(0, len(order), EVALUATION_BATCH):
            batch = model.batch(examples, order[start : start + EVALUATION_BATCH])
            found = model.judged(point, batch)
            correct, loss = correct + found[0], loss + found[1]
    # JSON has no word for infinity, which a diverged run may reach.
    return correct / count, loss / count if np.isfinite(loss) else float(np.finfo(np.float32).max)


def _figures(config: RunConfig, round_number: int, result: RoundResult) -> dict[str, Any]:
    closed = result.closed
    return {
        "round": round_number,
        "arm": config.arm.name.value,
        "accuracy": None,
        "loss": None,
        "validation_accuracy": None,
        "validation_loss": None,
        "private_loss": closed.update.loss,
        "public_loss": result.public_loss,
        "step": closed.update.kind.value,
        "learning_rate": closed.update.learning_rate,
        **dict.fromkeys(("rho", "weight", "shrinkage", "span_energy", "slope_variance", "gain", "relative_variance")),
        **closed.observed,
        "staleness": result.staleness,
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
    cloud = _restored(files, assembly, updates)
    _save(assembly, cloud.replica.theta, files.path / "adapter")
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
        "notices": list(assembly.material.notices),
        "clock": asdict(DEFAULT_CLOCK),
        "config": to_plain(config),
        "arms": {name: arm_summary(config, rounds)},
    }
    return reported(files.path, summary, draws=draws)


def _save(assembly: Assembly, theta: Float32[np.ndarray, "n"], target: Path) -> None:
    names = assembly.material.task.label_names
    assembly.material.model.save_adapter(theta, target, names)
    card = model_card(assembly.config, assembly.directory.rounds(), names, version("cooperllm"))
    (target / "README.md").write_text(card, encoding="utf8")  # in place of the form that PEFT leaves to be filled in


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
        report.write_page(summary, path, report.write_plots(summary, path), RunDirectory(path).times()[-report.SHOWN_ROUNDS :])
    RunDirectory(path).write_json("summary.json", summary)
    return Run(path=path, summary=summary)
