"""What is known of a comparison's runs, and which one is next. All of it is read from the run directories, so nothing else can be lost.

`summary.json` is the last file of a run and says that it is finished; `diverged.json` says that repeating it would be in vain. Whatever
else goes wrong is a sentence, and the run is tried again when the comparison is resumed.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cooperllm.config import RunConfig
from cooperllm.report.table import format_score
from cooperllm.run_directory import RunDirectory
from cooperllm.session import Observer
from cooperllm.study import Job, Study, mean_of_last
from cooperllm.summary import arm_summary, judged_by, score, score_curve

DIVERGED = "diverged.json"


class News(NamedTuple):
    """What happened in a comparison: a run begins, ends, fails or has to wait.

    Attributes:
        sentence: What happened.
        ended: The run that has just ended or failed, or None.
        num_ended: Runs that have ended or failed.
        num_known: Runs that there will be at least.
    """

    sentence: str
    ended: Job | None
    num_ended: int
    num_known: int


Teller = Callable[[News], None]


class Desk:
    """Gives out runs and notes how they end.

    Attributes:
        scores: Mean of the last validation accuracies of each run that has ended; None where it diverged or nothing was validated.
        failures: Runs that something else stopped, each with a sentence.
    """

    def __init__(self, path: Path, study: Study, observe: Observer | None, tell: Teller | None) -> None:
        self._path, self._study, self._observe, self._tell = path, study, observe, tell
        self.scores = scores(path, study)
        self.failures: dict[Job, str] = {}
        self._running: set[Job] = set()

    def has_job(self) -> bool:
        """Tells whether a run is due now."""
        return bool(self._due())

    def take(self) -> tuple[Job, Path]:
        """Gives the next run and its directory, made if it is missing."""
        job = self._due()[0]
        path = self._path / self._study.directory(job)
        prepare(path, self._study.config(job))
        self._running.add(job)
        self.tell(f"{job}: begins")
        return job, path

    def observe(self, job: Job, figures: Mapping[str, Any]) -> None:
        """Passes the figures of a round on."""
        if self._observe is not None:
            self._observe(self._study.config(job), figures)

    def close(self, job: Job, failure: str | None) -> None:
        """Notes the end of a run; a failure is anything but divergence."""
        self._running.discard(job)
        if failure is not None:
            self.failures[job] = failure
            self.tell(f"{job}: failed: {failure}", job)
            return
        files = RunDirectory(self._path / self._study.directory(job))
        self.scores[job] = _score(files)
        summary = arm_summary(files.config(), files.rounds())
        end = mean_of_last(score_curve(summary))
        is_lost = outcome(files) == "diverged" or end is None
        self.tell(f"{job}: " + ("diverged" if is_lost else f"ends at {format_score(end, summary['judged_by'])}"), job)

    def tell(self, sentence: str, ended: Job | None = None) -> None:
        """Passes on what happened."""
        if self._tell is not None:
            self._tell(News(sentence, ended, len(self.scores) + len(self.failures), self._study.least_jobs(self.scores)))

    def _due(self) -> list[Job]:
        return self._study.due(self.scores, self._running | self.failures.keys())


def scores(path: Path, study: Study) -> dict[Job, float | None]:
    """Finds the runs that have ended, grid after grid.

    Args:
        path: Directory of the comparison.
        study: What it consists of.

    Returns:
        See `Desk.scores`.
    """
    found: dict[Job, float | None] = {}
    while True:
        due = {job: RunDirectory(path / study.directory(job)) for job in study.due(found, ())}
        ended = {job: _score(files) for job, files in due.items() if outcome(files) != "failed"}
        if not ended:
            return found
        found |= ended


def outcome(files: RunDirectory) -> str:
    """Says how a run ended: "finished", "diverged", or "failed" for anything else."""
    if (files.path / DIVERGED).is_file():
        return "diverged"
    return "finished" if (files.path / "summary.json").is_file() else "failed"


def prepare(path: Path, config: RunConfig) -> None:
    """Makes a run directory, all at once, unless it is there.

    Args:
        path: The directory.
        config: Settings.

    Raises:
        RunDirectoryError: If nothing can be written.
    """
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    RunDirectory.create(temporary, config).path.rename(path)


def _score(files: RunDirectory) -> float | None:
    if outcome(files) == "diverged":
        return None
    judged = judged_by(files.config())
    scored = [(row["round"], score(row, "validation_", judged)) for row in files.rounds()]
    return mean_of_last([(number, found) for number, found in scored if found is not None])
