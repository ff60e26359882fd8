"""Convergence of every arm on real data under shift, each with its learning rate tuned in the same way.

For each task and arm: one run per learning rate of the grid with the first seed; the rate with the best mean of its last validation
accuracies is chosen, and while that is the smallest or largest tried, the grid grows beyond it. The test accuracies of that very run are
the arm's result for the first seed; then the other seeds run with that rate.
Everything else (data, model, batches, optimiser, two-point queries per device and round) is the same for all arms.

A job is a run directory, so a killed benchmark continues where it stopped. Results go to benchmarks/results/.

    python benchmarks/convergence/benchmark.py --data-directory ../shared/data --work runs/convergence
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cooperllm
from cooperllm.config import ArmName, EngineName, RunConfig
from cooperllm.session import rounds_to

TASKS = ("sentiment-shift", "missing-topics")
GRIDS = {
    ArmName.MEZO_FL: (0.001, 0.002, 0.004),
    ArmName.FEEDBACK: (0.015, 0.03, 0.06),
    ArmName.MEASURED: (0.03, 0.06, 0.12),
    ArmName.CLOUD_ONLY: (0.03, 0.06, 0.12),
    ArmName.PAPER: (0.05, 0.1, 0.2),
    ArmName.FEDAVG_BP: (0.015, 0.03, 0.06),
    ArmName.DECOMFL: (0.001, 0.002, 0.004),
    ArmName.FEDKSEED: (0.001, 0.002, 0.004),
    ArmName.FWDLLM: (0.001, 0.002, 0.004),
    ArmName.WARM_START: (0.001, 0.002, 0.004),
}
WIDEST = 7
"""Learning rates tried at most; a best one at the edge of so wide a grid is reported as such."""
LONG, SHORT = 200, 60
ROUNDS = {name: LONG if name is ArmName.MEZO_FL else SHORT for name in GRIDS}
LAST = 4
"""Evaluations whose mean counts as the end of a run: single ones are noisy."""


@dataclass(frozen=True)
class Job:
    """One run."""

    task: str
    arm: ArmName
    learning_rate: float
    seed: int

    def path(self, work: Path) -> Path:
        """Names its run directory."""
        return work / self.task / f"{self.arm.value}-{self.learning_rate:g}-seed{self.seed}"

    def config(self, data_directory: str) -> RunConfig:
        """Gives its settings."""
        base = cooperllm.recipe(self.task, data_directory).with_arm(self.arm)
        return replace(
            base,
            arm=replace(base.arm, learning_rate=self.learning_rate),
            num_rounds=ROUNDS[self.arm],
            seed=self.seed,
            validates=True,
            evaluate_every=5 if self.arm in {ArmName.FEEDBACK, ArmName.MEASURED} else 10,
            checkpoint_every=50,
            engine=EngineName.LOOPBACK,
        )


def curve(job: Job, work: Path, figure: str = "accuracy") -> list[list[float]]:
    """Reads a job's evaluations, also those of a run that was stopped."""
    rounds = [json.loads(line) for line in (job.path(work) / "rounds.jsonl").read_text().splitlines()]
    start = [[0, rounds[0][f"{figure}_before"]]]
    return start + [[row["round"], row[figure]] for row in rounds if row[figure] is not None]


def validated(job: Job, work: Path) -> float:
    """What a learning rate is chosen by."""
    return end(curve(job, work, "validation_accuracy"))


def end(points: list[list[float]], every: int = 10) -> float:
    """Means the last evaluations that all runs share."""
    shared = [accuracy for number, accuracy in points if number % every == 0]
    return sum(shared[-LAST:]) / len(shared[-LAST:])


def run_job(job: Job, arguments: argparse.Namespace) -> None:
    """Runs one job in a process of its own, with one thread, unless it is finished."""
    path = job.path(arguments.work)
    if (path / "summary.json").is_file() or arguments.report_only:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = [job.task, job.arm.value, repr(job.learning_rate), str(job.seed)]
    command = [sys.executable, __file__, "--data-directory", arguments.data_directory, "--work", str(arguments.work), "--job", *settings]
    with path.with_suffix(f"{path.suffix}.out").open("ab") as output:
        subprocess.run(command, check=True, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{datetime.datetime.now():%H:%M:%S} {path.relative_to(arguments.work)}  {validated(job, arguments.work):.3f}", flush=True)


def work_on(job: Job, arguments: argparse.Namespace) -> None:
    """The job's own process."""
    path = job.path(arguments.work)
    if (path / "config.json").is_file():
        cooperllm.resume(path)
    else:
        cooperllm.run(job.config(arguments.data_directory), path)


def tuned(task: str, arm: ArmName, arguments: argparse.Namespace) -> tuple[float, list[float]]:
    """Chooses the learning rate on the validation split, first seed, and returns it with every rate tried."""
    rates = _tried(task, arm, arguments) if arguments.report_only else list(GRIDS[arm])
    while True:
        jobs = [Job(task, arm, rate, arguments.seeds[0]) for rate in rates]
        with ThreadPoolExecutor(arguments.processes) as pool:
            list(pool.map(lambda job: run_job(job, arguments), jobs))
        found = [job for job in jobs if (job.path(arguments.work) / "rounds.jsonl").is_file()]
        best = max(found, key=lambda job: validated(job, arguments.work)).learning_rate
        if rates[0] < best < rates[-1] or len(rates) == WIDEST or arguments.report_only:
            return best, rates
        rates = [*rates, 2 * best] if best == rates[-1] else [best / 2, *rates]


def _tried(task: str, arm: ArmName, arguments: argparse.Namespace) -> list[float]:
    """Learning rates that have a run, of the first seed."""
    ending = f"-seed{arguments.seeds[0]}"
    paths = (arguments.work / task).glob(f"{arm.value}-*{ending}/rounds.jsonl")
    return sorted(float(path.parent.name.removeprefix(f"{arm.value}-").removesuffix(ending)) for path in paths)


def results(task: str, found: dict[ArmName, tuple[float, list[float]]], arguments: argparse.Namespace) -> dict[str, object]:
    """Runs every seed at the chosen rates and puts the figures together."""
    jobs = [Job(task, arm, rate, seed) for arm, (rate, _) in found.items() for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(lambda job: run_job(job, arguments), jobs))
    rows = {}
    for arm, (rate, tried) in found.items():
        curves = [curve(Job(task, arm, rate, seed), arguments.work) for seed in arguments.seeds]
        grid = {f"{other:g}": _entry(Job(task, arm, other, arguments.seeds[0]), arguments.work) for other in tried}
        rows[arm.value] = {
            "learning_rate": rate,
            "at_edge_of_grid": rate in (tried[0], tried[-1]),
            "validation_by_rate": grid,
            "rounds": ROUNDS[arm],
            "end_accuracy": [end(points) for points in curves],
            "last_accuracy": [points[-1][1] for points in curves],
            "best_accuracy": [max(accuracy for _, accuracy in points) for points in curves],
            "curves": curves,
        }
    return rows


def _entry(job: Job, work: Path) -> str:
    """One learning rate's validation accuracy; a run that was stopped says after how many rounds."""
    if not (job.path(work) / "rounds.jsonl").is_file():
        return "not run"
    points = curve(job, work, "validation_accuracy")
    stopped = "" if points[-1][0] == ROUNDS[job.arm] else f" (stopped after round {int(points[-1][0])})"
    return f"{end(points):.3f}{stopped}"


def _reached(row: dict[str, Any], baseline: dict[str, Any] | None, key: str) -> list[int | None]:
    """First evaluated round at the baseline's accuracy, seed by seed."""
    return [rounds_to(points, level) for points, level in zip(row["curves"], baseline[key], strict=True)] if baseline else []


def markdown(tables: dict[str, dict[str, object]], arguments: argparse.Namespace) -> str:
    """Writes the table that people read."""
    lines = [
        f"# Convergence under shift, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/convergence/benchmark.py --data-directory {arguments.data_directory} --seeds "
        f"{' '.join(map(str, arguments.seeds))}`; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"cooperllm {cooperllm.session.version('cooperllm')}.",
        "",
        "MiniLM-L6, LoRA r 8 on query and value of the last two layers, mean-pooled head, texts cut at 32 tokens, 20 devices in 4 edges, "
        "Dirichlet 0.5, 5 devices a round, batch 16, 5 two-point queries per device and round for every zeroth-order arm, server "
        f"momentum 0.9 for every arm. 'End' is the mean of the last {LAST} evaluations (every 10 rounds, 800 test examples); "
        "one entry per seed.",
    ]
    for task, rows in tables.items():
        baseline = rows.get(ArmName.MEZO_FL.value)
        head = "| arm | learning rate | rounds | end | last | best | rounds to MeZO-FL's end | rounds to MeZO-FL's best | ratio (best) |"
        lines += ["", f"## {task}", "", head, "|---" * 9 + "|"]
        for name, row in rows.items():
            edge = " (edge of grid)" if row["at_edge_of_grid"] else ""
            numbers = [" / ".join(f"{value:.3f}" for value in row[key]) for key in ("end_accuracy", "last_accuracy", "best_accuracy")]
            to_end, to_best = _reached(row, baseline, "end_accuracy"), _reached(row, baseline, "best_accuracy")
            ratios = " / ".join(f"{LONG / found:.1f}" if found else "-" for found in to_best)
            reached = " | ".join(" / ".join("never" if found is None else str(found) for found in rounds) for rounds in (to_end, to_best))
            lines.append(f"| {name} | {row['learning_rate']:g}{edge} | {row['rounds']} | {' | '.join(numbers)} | {reached} | {ratios} |")
        lines += ["", "Validation accuracy by learning rate (first seed):", ""]
        for name, row in rows.items():
            lines.append(f"- {name}: " + ", ".join(f"{rate}: {value}" for rate, value in row["validation_by_rate"].items()))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything that is not yet there and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-directory", required=True, help="directory with sst2, customer_reviews and ag_news")
    parser.add_argument("--work", type=Path, default=Path("runs/convergence"), help="where run directories go")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arms", nargs="+", default=[arm.value for arm in GRIDS], choices=[arm.value for arm in GRIDS])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--report-only", action="store_true", help="run nothing; report on what is there, stopped runs included")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        task, arm, rate, seed = arguments.job
        work_on(Job(task, ArmName(arm), float(rate), int(seed)), arguments)
        return
    arms = [arm for arm in GRIDS if arm.value in arguments.arms]
    tables = {}
    for task in arguments.tasks:
        present = [arm for arm in arms if not arguments.report_only or _tried(task, arm, arguments)]
        tables[task] = results(task, {arm: tuned(task, arm, arguments) for arm in present}, arguments)
        name = f"convergence_minilm_{platform.machine()}_{datetime.date.today()}"
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / f"{name}.json").write_text(json.dumps(tables, indent=1) + "\n")
        (arguments.results / f"{name}.md").write_text(markdown(tables, arguments))
    print(markdown(tables, arguments))


if __name__ == "__main__":
    main()
