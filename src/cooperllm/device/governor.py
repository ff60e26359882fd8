"""Chooses how a device spends memory: settings are tried in processes of their own, and the fastest that fits the budget is taken.

Nothing is modelled: what a setting takes is what a process with that setting was seen to take, imports included.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cooperllm.device.settings import Settings, ladder
from cooperllm.device.trial import ESTIMATE, SLOPES, Findings, Task
from cooperllm.errors import ConfigError, PackageError
from cooperllm.process_memory import is_measurable

WORTH = 0.9
"""A setting that takes more memory is worth it if it takes at most this share of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A setting and what it came to.

    Attributes:
        settings: How memory was spent.
        findings: What was seen.
    """

    settings: Settings
    findings: Findings

    @property
    def work_cpu_s(self) -> float:
        """Processor seconds of a query and an estimate together."""
        return self.findings.cpu_s(SLOPES) + self.findings.cpu_s(ESTIMATE)


def tried(
    package: Path | str,
    steps: Sequence[Settings],
    *,
    batch_size: int,
    num_threads: int,
    budget_mib: float | None,
    imports: Sequence[str] = (),
) -> list[Trial]:
    """Measures settings from the most frugal on, and stops behind the first that a budget has no room for.

    Args:
        package: Directory of a package.
        steps: Settings, the most frugal first.
        batch_size: Texts of a batch, >= 1.
        num_threads: Threads, >= 1.
        budget_mib: Memory of the process, or None.
        imports: Modules of ours that the device loads besides.

    Returns:
        Trials in that order, at least one.

    Raises:
        ConfigError: If this system does not tell what a process uses.
        PackageError: If the package cannot be used, or the process that measures it died.
    """
    if not is_measurable():
        raise ConfigError("device: found no /proc, expected Linux: what a process uses cannot be measured here; run without --memory-mib")
    trials: list[Trial] = []
    for settings in steps:
        task = Task(package=str(package), settings=settings, batch_size=batch_size, num_threads=num_threads, imports=tuple(imports))
        trials.append(Trial(settings=settings, findings=_measured(task)))
        if budget_mib is not None and trials[-1].findings.peak_mib > budget_mib:
            break
    return trials


def chosen(trials: Sequence[Trial], budget_mib: float | None) -> Trial:
    """Takes the fastest setting that fits; of those that are hardly slower, the most frugal.

    Args:
        trials: From the most frugal to the most generous, at least one.
        budget_mib: Memory of the process, > 0, or None for no limit.

    Returns:
        The choice.

    Raises:
        ConfigError: If not even the first fits.
    """
    smallest = min(trial.findings.peak_mib for trial in trials)
    if budget_mib is not None and smallest > budget_mib:
        raise ConfigError(
            f"memory_mib: found {budget_mib:g}, expected at least {math.ceil(smallest)}: that is what this package takes with "
            f"{', '.join(trials[0].settings.words)}; give more, or package fewer adapted layers, shorter texts or smaller weights"
        )
    best: Trial | None = None
    for trial in trials:
        fits = budget_mib is None or trial.findings.peak_mib <= budget_mib
        if fits and (best is None or trial.work_cpu_s < WORTH * best.work_cpu_s):
            best = trial
    assert best is not None, "the smallest fits"
    return best


def govern(
    package: Path | str,
    budget_mib: float | None,
    states_directory: Path,
    *,
    states_quota_mib: float,
    batch_size: int,
    num_threads: int,
    imports: Sequence[str] = (),
) -> tuple[Trial, list[Trial]]:
    """Chooses settings for a package on this machine.

    Args:
        package: Directory of a package.
        budget_mib: Memory of the whole process at its peak, > 0, or None for no limit.
        states_directory: Where states of the prefix may go on disk.
        states_quota_mib: The most that they may take there, >= 0.
        batch_size: Texts of a batch, >= 1.
        num_threads: Threads, >= 1.
        imports: Modules of ours that the device loads besides: the link, where it takes part in a run.

    Returns:
        (the choice, all that was tried).

    Raises:
        ConfigError: If no setting fits the budget, or a budget, a quota or a size is outside its domain.
        PackageError: If the package cannot be used.
    """
    for name, value, is_sound in (
        ("memory_mib", budget_mib, budget_mib is None or budget_mib > 0),
        ("cache_mib", states_quota_mib, states_quota_mib >= 0),
        ("batch_size", batch_size, batch_size >= 1),
        ("threads", num_threads, num_threads >= 1),
    ):
        if not is_sound:
            raise ConfigError(f"device: found {name} {value}, expected more; see `cooperllm device --help`")
    scratch = states_directory / f"trial-{os.getpid()}"  # on the disk that is meant, so that a full one is noticed
    try:
        steps = ladder(str(scratch), states_quota_mib)
        trials = tried(package, steps, batch_size=batch_size, num_threads=num_threads, budget_mib=budget_mib, imports=imports)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    meant = [_on_disk(trial, states_directory) for trial in trials]
    return chosen(meant, budget_mib), meant


def _on_disk(trial: Trial, directory: Path) -> Trial:
    """The trial as one whose states are where they are meant to be."""
    settings = trial.settings
    return trial if settings.states_directory is None else replace(trial, settings=replace(settings, states_directory=str(directory)))


def _measured(task: Task) -> Findings:
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(task.num_threads))
    command = [sys.executable, "-m", "cooperllm.device.trial"]
    done = subprocess.run(command, input=msgspec.json.encode(task), stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        raise PackageError(f"{task.package}: the process that measured it ended with status {done.returncode}; its words are above")
    findings = msgspec.json.decode(done.stdout, type=Findings)
    if findings.failure:
        raise PackageError(findings.failure)
    return findings
