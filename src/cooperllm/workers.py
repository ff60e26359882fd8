"""Carries out the jobs of a comparison, in this process or in several.

A worker is a process with one thread. It reads paths of run directories, one JSON string a line, and answers with lines of JSON: figures
of a round, or the end of a job. It ends with its standard input, so that none outlives the comparison.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cooperllm import pretrained, session
from cooperllm.assembly import Material
from cooperllm.desk import DIVERGED, Desk
from cooperllm.errors import ConfigError, CooperLLMError, DivergenceError, QuorumError
from cooperllm.messages import Outcome
from cooperllm.process_memory import footprint, is_measurable
from cooperllm.run_directory import RunDirectory
from cooperllm.session import Observer
from cooperllm.study import Job

POLL_S = 0.2
ENTRY = "from cooperllm import workers; workers.main()"


def carry_out(path: Path, material: Material | None, observe: Observer | None) -> None:
    """Brings a job to its end; divergence is an end.

    Args:
        path: Its run directory.
        material: Model and texts of another run, used again where they are the same.
        observe: Called after every round.

    Raises:
        QuorumError: If too few devices answered for another reason than divergence; it can be tried again.
    """
    try:
        session.resume(path, observe, material, draws=False)
    except DivergenceError as error:
        RunDirectory(path).write_json(DIVERGED, {"error": str(error)})
    except QuorumError as error:
        if Outcome.NON_FINITE_LOSS.value not in error.dropped:
            raise
        RunDirectory(path).write_json(DIVERGED, {"error": str(error)})


def in_this_process(desk: Desk, material: Material | None) -> None:
    """Carries out jobs one after the other; those of one seed share model and texts.

    Args:
        desk: Where jobs come from and go to.
        material: Model and texts that the first jobs may share, or None.
    """
    while desk.has_job():
        (job, path), failure = desk.take(), None
        try:
            material = _fitting(material, path)
            carry_out(path, material, lambda _, figures, job=job: desk.observe(job, figures))
        except CooperLLMError as error:
            failure = str(error)
        desk.close(job, failure)


def in_processes(desk: Desk, count: int, memory_limit_mib: float | None, log: Path) -> None:
    """Carries out jobs side by side, as many as memory allows and at least one.

    Args:
        desk: Where jobs come from and go to.
        count: Processes at most, >= 1.
        memory_limit_mib: Memory for all processes together, this one included; None sets no limit.
        log: File for what the processes write to standard error.

    Raises:
        ConfigError: If there is a limit and the system does not tell how much memory a process uses.
    """
    if memory_limit_mib is not None and not is_measurable():
        raise ConfigError("memory_limit_mib: found a limit, expected none on a system without /proc; choose fewer --processes instead")
    with log.open("ab") as errors:
        crew = _Crew(desk, count, memory_limit_mib, errors)
        try:
            crew.work()
        finally:
            crew.dismiss()


def admits(peaks_mib: Collection[float], estimate_mib: float, own_mib: float, limit_mib: float) -> bool:
    """Tells whether one more process fits, if every one comes to use as much as the largest has.

    Args:
        peaks_mib: Peak of each running process so far.
        estimate_mib: Peak expected of the next one.
        own_mib: Memory of this process.
        limit_mib: Memory for all.

    Returns:
        Whether it fits.

    Example:
        >>> admits([900.0, 400.0], 1000.0, 300.0, 3300.0)
        True
    """
    return own_mib + sum(max(peak, estimate_mib) for peak in peaks_mib) + estimate_mib <= limit_mib


def main() -> None:
    """A worker: carries out what it is told until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the comparison decides
    warnings.filterwarnings("ignore", category=FutureWarning)
    pretrained.hush()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not garble the answers
    paths: queue.SimpleQueue[Path] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(paths,), daemon=True).start()
    material = None
    while True:
        path, failure = paths.get(), None
        try:
            material = _fitting(material, path)
            carry_out(path, material, lambda _, figures: print(json.dumps({"round": figures}), file=answers))
        except CooperLLMError as error:
            failure = str(error)
        print(json.dumps({"failure": failure}), file=answers)


def _listen(paths: "queue.SimpleQueue[Path]") -> None:
    for line in sys.stdin:
        paths.put(Path(json.loads(line)))
    os._exit(0)  # whoever asked is gone; a run directory survives that at any moment


def _fitting(material: Material | None, path: Path) -> Material:
    config = RunDirectory(path).config()
    return material if material is not None and material.fits(config) else Material(config)


@dataclass(eq=False)
class _Worker:
    """A process and the job it is at; its peak is that of all its jobs."""

    process: "subprocess.Popen[str]"
    events: "queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]"
    job: Job | None = None
    peak_mib: float = 0.0

    def __post_init__(self) -> None:
        self._ear = threading.Thread(target=self._hear, daemon=True)
        self._ear.start()

    def give(self, job: Job, path: Path) -> None:
        """Sends a job; should the process have died, the end of its answers says so."""
        self.job = job
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(str(path.resolve())), file=self.process.stdin)

    def end(self) -> int:
        """Ends the process, in the middle of a job too, whose run directory can be resumed; returns its status."""
        self.process.kill()
        status = self.process.wait()
        self._ear.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def _hear(self) -> None:
        for line in self.process.stdout or ():
            self.events.put((self, json.loads(line)))
        self.events.put((self, None))


class _Crew:
    """The processes of a comparison."""

    def __init__(self, desk: Desk, count: int, limit_mib: float | None, errors: IO[bytes]) -> None:
        self._desk, self._count, self._limit_mib, self._errors = desk, count, limit_mib, errors
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._estimate_mib: float | None = None
        self._waiting_at = 0

    def work(self) -> None:
        """Keeps as many workers at work as there are jobs and memory for."""
        while True:
            self._measure()
            while self._desk.has_job() and (worker := self._free()) is not None:
                worker.give(*self._desk.take())
            if not any(worker.job for worker in self._workers):
                return
            try:
                self._heard(*self._events.get(timeout=POLL_S))
            except queue.Empty:
                continue

    def dismiss(self) -> None:
        """Ends every worker."""
        for worker in self._workers:
            worker.end()

    def _free(self) -> _Worker | None:
        """An idle worker, or a new one where there is room."""
        idle = next((worker for worker in self._workers if worker.job is None), None)
        return idle or (self._hire() if len(self._workers) < self._count and self._has_room() else None)

    def _has_room(self) -> bool:
        if not self._workers or self._limit_mib is None:
            return True
        if self._estimate_mib is None:
            return False  # the first process has yet to show what one uses
        peaks, own_mib = [worker.peak_mib for worker in self._workers], footprint().resident_mib
        if admits(peaks, self._estimate_mib, own_mib, self._limit_mib):
            return True
        if len(peaks) != self._waiting_at:
            self._waiting_at = len(peaks)
            self._desk.tell(
                f"no room for process {len(peaks) + 1}: this one and {len(peaks)} at work use {own_mib + sum(peaks):,.0f} MiB at their "
                f"peaks, one more would use {self._estimate_mib:,.0f}, the limit is {self._limit_mib:,.0f}"
            )
        return False

    def _hire(self) -> _Worker:
        command, one_thread = [sys.executable, "-c", ENTRY], os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, env=one_thread, text=True, bufsize=1)
        self._workers.append(_Worker(process, self._events))
        return self._workers[-1]

    def _heard(self, worker: _Worker, answer: dict[str, Any] | None) -> None:
        job = worker.job
        if answer is None:
            self._workers.remove(worker)
            status = worker.end()
            if job is not None:
                self._desk.close(job, f"its process ended with status {status}; {self._errors.name} may say why")
        elif job is not None and "round" in answer:
            self._measure()
            self._estimate_mib = max([self._estimate_mib or 0.0, *(other.peak_mib for other in self._workers)])
            self._desk.observe(job, answer["round"])
        elif job is not None:
            worker.job = None
            self._desk.close(job, answer["failure"])

    def _measure(self) -> None:
        for worker in self._workers if self._limit_mib is not None else ():
            worker.peak_mib = max(worker.peak_mib, footprint(worker.process.pid).peak_mib)
