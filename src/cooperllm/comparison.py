"""Several arms on the same task: the same data, the same budget, the same search for a learning rate, several seeds.

A comparison is a directory of run directories:

    comparison.json            the study; written first, never changed
    ARM or ARM-RATE-seedN/     a run directory per job, see `run_directory.py`; diverged.json in one that diverged
    results.json, .parquet     every evaluation of every run, and what they say; the same bytes whether interrupted or not
    summary.json, report.html, *.png

Nothing else is remembered: what is left to do follows from the study and the run directories that are finished.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from huggingface_hub import HfApi

from cooperllm import accelerated, results, session, workers
from cooperllm.assembly import Material
from cooperllm.config import ArmName, RunConfig, from_plain
from cooperllm.desk import DIVERGED, Desk, Teller, outcome, scores
from cooperllm.errors import ConfigError, CooperLLMError, RunDirectoryError
from cooperllm.run_directory import RunDirectory, refuse_taken
from cooperllm.session import Observer, Run, reported
from cooperllm.study import Job, Study
from cooperllm.summary import arm_summary
from cooperllm.wall_clock import DEFAULT_CLOCK, DeviceClock


class Comparison(Run):
    """A finished comparison."""

    def export(self, directory: Path | str, arm: str | None = None) -> Path:
        """Writes the trained adapter of an arm the way PEFT does; see `export`."""
        return export(self.path, directory, arm)


def compare(
    configs: Sequence[RunConfig],
    directory: Path | str,
    observe: Observer | None = None,
    *,
    seeds: Sequence[int] | None = None,
    tune: bool = False,
    tune_rounds: int | None = None,
    processes: int = 1,
    memory_limit_mib: float | None = None,
    clock: DeviceClock = DEFAULT_CLOCK,
    tell: Teller | None = None,
) -> Comparison:
    """Trains several arms on the same task and reports on all of them.

    Args:
        configs: One configuration per arm; everything but the arm and its rounds is expected to be the same.
        directory: A missing or empty directory.
        observe: Called after every round.
        seeds: Seeds of every arm, instead of the configurations' own one.
        tune: Whether each arm's learning rate is searched for around its own, on validation accuracy with the first seed.
        tune_rounds: Rounds of the runs that tune; None gives them the rounds of the arm.
        processes: Runs at the same time; with more than one, each has a process and a single thread.
        memory_limit_mib: Memory for all processes at their peaks, in MiB; None sets no limit.
        clock: Device and link of the modelled wall clock.
        tell: Called when a run begins, ends, fails or has to wait.

    Returns:
        The finished comparison. A run that diverged is one of its results.

    Raises:
        CooperLLMError: See `cooperllm.errors`; what was done so far stays.
    """
    study = Study(
        configs=tuple(configs),
        seeds=tuple(seeds) if seeds is not None else (configs[0].seed,) if configs else (),
        tune=tune,
        tune_rounds=tune_rounds,
        processes=processes,
        memory_limit_mib=memory_limit_mib,
        clock=clock,
    )
    path = Path(directory)
    refuse_taken(path)
    _check_processes(study)
    material = Material(study.configs[0])
    material.check([config.arm.name for config in configs])
    path.mkdir(parents=True, exist_ok=True)
    RunDirectory(path).write_json("comparison.json", msgspec.to_builtins(study))
    return _continued(path, study, observe, tell, material if processes == 1 else None)


def resume(directory: Path | str, observe: Observer | None = None, tell: Teller | None = None) -> Run:
    """Continues a run or a comparison where it stopped; a finished one only gets its report anew.

    Args:
        directory: A run directory or a comparison.
        observe: Called after every round.
        tell: Called when a run of a comparison begins, ends, fails or has to wait.

    Returns:
        The finished run: θ has the bits of an uninterrupted one.

    Raises:
        RunDirectoryError: If the directory is missing or damaged; nothing in it is overwritten.
    """
    study = study_of(Path(directory))
    if study is None:
        return session.resume(directory, observe)
    _check_processes(study)
    return _continued(Path(directory), study, observe, tell, None)


def _check_processes(study: Study) -> None:
    if study.processes > 1 and accelerated.processes() is not None:
        raise ConfigError(
            f"processes: found {study.processes} under `accelerate launch`, expected 1: runs side by side have processes of their "
            "own, which are not those of the launch; compare without it, or with one process"
        )


def export(directory: Path | str, target: Path | str, arm: str | None = None) -> Path:
    """Writes the adapter of a run as a directory that plain PEFT loads.

    Args:
        directory: A run, finished or not, or a comparison.
        target: Where to write.
        arm: Which arm of a comparison, with its best learning rate and the first seed; the only one of a run by default.

    Returns:
        The target.

    Raises:
        RunDirectoryError: If there is no such run.
    """
    return session.export(run_of(directory, arm), target)


def push(adapter: Path, repository: str) -> str:
    """Uploads an exported adapter to a model hub, into a private repository that is made where it is missing.

    Args:
        adapter: Written by `export`.
        repository: NAME or OWNER/NAME on the hub.

    Returns:
        Its address.

    Raises:
        ConfigError: If the hub is out of reach, or does not let this user in.
    """
    hub = HfApi()
    try:
        name = hub.create_repo(repository, private=True, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=adapter, commit_message="CooperLLM: export")
    except (httpx.HTTPError, OSError, ValueError) as error:
        sentence = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--push-to-hub: {repository!r} could not be written ({sentence}); {adapter} has the adapter; log in with `hf auth login`, and "
            "see that the hub is in reach"
        ) from error
    return f"{hub.endpoint}/{name}"


def run_of(directory: Path | str, arm: str | None = None) -> Path:
    """Finds the run that speaks for a comparison.

    Args:
        directory: A run, which is its own, or a comparison.
        arm: Which arm of a comparison, with its best learning rate and the first seed; the default arm where it took part.

    Returns:
        Directory of a run.

    Raises:
        RunDirectoryError: If there is no such arm, or its rate is not known yet.
    """
    path, study = Path(directory), study_of(Path(directory))
    if study is None:
        return path
    names = [config.arm.name.value for config in study.configs]
    chosen = arm or ("feedback" if "feedback" in names else names[0])
    if chosen not in names:
        raise RunDirectoryError(f"{path}: no arm {arm!r}; expected one of {', '.join(names)}")
    rate = study.tuning(ArmName(chosen), scores(path, study)).best
    if rate is None:
        raise RunDirectoryError(f"{path}: the learning rate of {chosen} has not been found yet; continue with `cooperllm resume {path}`")
    return path / study.directory(Job(ArmName(chosen), rate, study.seeds[0]))


def study_of(path: Path) -> Study | None:
    """Reads what a comparison consists of.

    Args:
        path: Its directory.

    Returns:
        The study, or None when the directory is not a comparison.

    Raises:
        RunDirectoryError: If the file is damaged.
    """
    file = path / "comparison.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf8"))
        configs = [from_plain(config, where=str(file)) for config in values["configs"]]
        return msgspec.convert(values | {"configs": configs}, Study)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, msgspec.ValidationError, ConfigError) as error:
        raise RunDirectoryError(f"{file} is damaged ({error!r}); restore it from a backup or start anew; nothing was changed") from error


def _continued(path: Path, study: Study, observe: Observer | None, tell: Teller | None, material: Material | None) -> Comparison:
    with RunDirectory(path).locked():
        desk = Desk(path, study, observe, tell)
        if study.processes == 1:
            workers.in_this_process(desk, material)
        else:
            workers.in_processes(desk, study.processes, study.memory_limit_mib, path / "workers.log")
        return _concluded(path, study, desk)


def _concluded(path: Path, study: Study, desk: Desk) -> Comparison:
    """Writes results, plots and page from the run directories."""
    entries: dict[str, list[dict[str, Any]]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    listed: list[dict[str, Any]] = []
    tunings = {config.arm.name.value: study.tuning(config.arm.name, desk.scores) for config in study.configs}
    for config in study.configs:
        name = config.arm.name.value
        result_jobs = [Job(config.arm.name, tunings[name].best or config.arm.learning_rate, seed) for seed in study.seeds]
        tuning_jobs = study.tuning_jobs(config.arm.name, tunings[name].rates) if study.tune else []
        for job in dict.fromkeys([*tuning_jobs, *result_jobs]):
            files, is_result = RunDirectory(path / study.directory(job)), job in result_jobs
            rounds = files.rounds() if files.path.is_dir() else []
            listed += results.rows(job, study.config(job), rounds, study.clock, is_result=is_result, outcome=outcome(files))
            if is_result:
                entry = arm_summary(study.config(job), rounds, study.clock)
                stopped = {} if outcome(files) == "finished" else {"finished": False, "outcome": outcome(files)}
                entries.setdefault(name, []).append(entry | stopped)
        tried[name] = [{"learning_rate": job.learning_rate, "score": desk.scores.get(job)} for job in tuning_jobs]
    figures = results.arms_figures(entries, tunings)
    for name, arm_figures in figures["arms"].items():
        arm_figures["tried"] = tried[name]
    facts = {
        "seeds": list(study.seeds),
        "is_tuned": study.tune,
        "tune_rounds": study.tune_rounds,
        "clock": msgspec.to_builtins(study.clock),
    }
    RunDirectory(path).write_json("results.json", {"recipe": study.configs[0].recipe} | facts | figures | {"rows": listed})
    results.write_parquet(path / "results.parquet", listed)
    return _summed_up(path, study, desk, entries, facts | figures)


def _summed_up(
    path: Path, study: Study, desk: Desk, entries: Mapping[str, Sequence[dict[str, Any]]], figures: Mapping[str, Any]
) -> Comparison:
    ended = {job: RunDirectory(path / study.directory(job)) for job in study.jobs(desk.scores) if job in desk.scores}
    finished = [files.path for files in ended.values() if outcome(files) == "finished"]
    diverged = {
        job: json.loads((files.path / DIVERGED).read_text())["error"] for job, files in ended.items() if outcome(files) == "diverged"
    }
    stopped = [f"{job}: {sentence}" for job, sentence in (desk.failures | diverged).items()]
    if not finished:
        raise CooperLLMError(f"{path}: no run came to its end; {'; '.join(stopped)}")
    again = [f"failed runs are tried again by: cooperllm resume {path}"] if desk.failures else []
    summaries = [json.loads((files / "summary.json").read_text(encoding="utf8")) for files in finished]
    notices = dict.fromkeys(notice for summary in summaries for notice in summary["notices"])
    first = [runs[0] if len(runs) == 1 else runs[0] | {"seeds": list(runs)} for runs in entries.values()]
    summary = summaries[0] | {
        "seed": study.seeds[0],
        "num_rounds": max(config.num_rounds for config in study.configs),
        "command": _command(study),
        "notices": [*notices, *stopped, *again],
        "clock": msgspec.to_builtins(study.clock),
        "arms": dict(zip(entries, first, strict=True)),
    }
    run = reported(path, summary if study.is_plain else summary | {"comparison": dict(figures)})
    return Comparison(path=run.path, summary=run.summary)


def _command(study: Study) -> str:
    """The command line that a comparison of a recipe comes from, but for changes to the recipe itself."""
    rounds = {config.arm.name.value: config.num_rounds for config in study.configs}
    most = max(rounds.values())
    words = ["cooperllm", "compare", study.configs[0].recipe, "--arms", ",".join(rounds), "--rounds", str(most)]
    others = [f"{name}={number}" for name, number in rounds.items() if number != most]
    words += ["--rounds-of", ",".join(others)] if others else []
    words += ["--seed", str(study.seeds[0])] if len(study.seeds) == 1 else ["--seeds", ",".join(map(str, study.seeds))]
    words += ["--tune"] if study.tune else []
    words += ["--tune-rounds", str(study.tune_rounds)] if study.tune_rounds else []
    return shlex.join(words)
