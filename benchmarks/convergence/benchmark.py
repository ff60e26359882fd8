"""Convergence of every arm on real data under shift: rows of a table, each a tuned comparison over several seeds.

What a row does is `cooperllm.compare`: the same search for a learning rate for every arm, on validation with the first seed, then all
seeds. A killed benchmark continues where it stopped: run the same command again. A row's table, plots and figures are in its directory.

    python benchmarks/convergence/benchmark.py --data-directory ../shared/data --work runs/convergence
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

import cooperllm
from cooperllm.config import ArmName, EngineName, RunConfig
from cooperllm.progress import Progress
from cooperllm.report import arms_table, verdict

ARMS = (
    ArmName.MEZO_FL,
    ArmName.FEEDBACK,
    ArmName.MEASURED,
    ArmName.CLOUD_ONLY,
    ArmName.PAPER,
    ArmName.FEDAVG_BP,
    ArmName.DECOMFL,
    ArmName.FEDKSEED,
    ArmName.FWDLLM,
    ArmName.WARM_START,
)
LONG = {ArmName.MEZO_FL: 200, ArmName.DECOMFL: 200}
SHORT = 60


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        recipe: The task.
        arms: What is compared.
        rounds: Rounds of arms that get more or fewer than `SHORT`.
        change: What differs from the recipe, for every arm.
    """

    recipe: str
    arms: tuple[ArmName, ...] = ARMS
    rounds: Mapping[ArmName, int] = field(default_factory=lambda: LONG)
    change: Callable[[RunConfig], RunConfig] = lambda config: config

    def configs(self, data_directory: str) -> list[RunConfig]:
        """Gives one configuration per arm."""
        recipe = cooperllm.recipe(self.recipe, data_directory)
        same = {"evaluate_every": 5, "checkpoint_every": 50, "engine": EngineName.LOOPBACK}
        return [self.change(replace(recipe.with_arm(arm), num_rounds=self.rounds.get(arm, SHORT), **same)) for arm in self.arms]


ROWS = {
    "sentiment-shift": Row("sentiment-shift"),
    "missing-topics": Row("missing-topics"),
}


def main() -> None:
    """Runs the rows that are not finished and prints every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-directory", required=True, help="directory with sst2, customer_reviews and ag_news")
    parser.add_argument("--work", type=Path, default=Path("runs/convergence"), help="where rows have their directories")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory-limit-mib", type=float)
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.rows:
        path = arguments.work / name
        with Progress(console) as progress:
            if (path / "comparison.json").is_file():
                found = cooperllm.resume(path, progress.observe, progress.tell)
            else:
                found = cooperllm.compare(
                    ROWS[name].configs(arguments.data_directory),
                    path,
                    progress.observe,
                    seeds=arguments.seeds,
                    tune=True,
                    processes=arguments.processes,
                    memory_limit_mib=arguments.memory_limit_mib,
                    tell=progress.tell,
                )
        console.print(arms_table(found.summary))
        console.print(verdict(found.summary), highlight=False)
        console.print(f"report: {path / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
