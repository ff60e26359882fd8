"""Convergence of every arm on real data under shift: rows of a table, each a comparison over several seeds.

What a row does is `cooperllm.compare`: with --tune the same search for a learning rate for every arm, on validation with the first seed,
then all seeds. A killed benchmark continues where it stopped: run the same command again. A row's table, plots and figures are in its
directory.

    python benchmarks/convergence/benchmark.py --data-directory ../shared/data --work runs/convergence
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import cooperllm
from cooperllm.config import NO_TEXT, SUPPORTED_BITS, ArmName, EngineName, Objective, OptimizerKind, RunConfig, RuntimeName, SourceConfig
from cooperllm.progress import Progress
from cooperllm.report import arms_table, verdict

A = ArmName
CORE = (A.FEEDBACK, A.FEDAVG_BP, A.CLOUD_ONLY)
GUIDED = (A.MEASURED, A.PAPER)
UNGUIDED = (A.MEZO_FL, A.DECOMFL, A.FEDKSEED, A.FWDLLM, A.WARM_START)
LABEL_FREE = (A.FEEDBACK,)
BROAD, SHORT, LONG = 40, 60, 200


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        recipe: The task.
        arms: What is compared.
        rounds: Rounds of every arm.
        public: The cloud's text, if another than the recipe's: folder below the data directory, or "none".
        private: The devices' text, if another than the recipe's.
        source: Other fields of the public source.
        texts: Other fields of both, where they are another than the recipe's.
        last_layers: How many of the last layers are adapted.
        model: Other fields of the model.
        settings: Settings of the arms that are not the recipe's.
        runtime: What computes the devices' passes.
        staleness: Rounds that devices may be behind.
    """

    recipe: str
    arms: tuple[ArmName, ...]
    rounds: int = SHORT
    public: str | None = None
    private: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    texts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    last_layers: int | None = 2
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    runtime: RuntimeName = RuntimeName.TORCH
    staleness: int = 0

    def configs(self, data_directory: str) -> list[RunConfig]:
        """Gives one configuration per arm."""
        recipe = cooperllm.recipe(self.recipe, data_directory)
        return [self._changed(recipe.with_arm(arm), data_directory) for arm in self.arms]

    def _changed(self, config: RunConfig, data_directory: str) -> RunConfig:
        public, private = config.data.public, config.data.private
        if self.public is not None:
            public = SourceConfig(name=self.public if self.public == NO_TEXT else f"{data_directory}/{self.public}", **self.texts)
        if self.private is not None:
            private = SourceConfig(name=f"{data_directory}/{self.private}", **self.texts)
        return replace(
            config,
            data=replace(config.data, public=replace(public, **self.source), private=private),
            model=replace(config.model, last_layers=self.last_layers, **self.model),
            arm=replace(config.arm, **self.settings),
            runtime=self.runtime,
            federation=replace(config.federation, staleness=self.staleness),
            num_rounds=self.rounds,
            evaluate_every=10 if self.rounds == LONG else 5,
            checkpoint_every=50,
            engine=EngineName.LOOPBACK,
        )


UNLABELLED = {"label_column": None}
SMALL_LLAMA = {"name": "runs/small-llama", "objective": Objective.LABEL_WORDS, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
FILMS = Row(
    "sentiment-shift", CORE, last_layers=None, model=SMALL_LLAMA | {"prompt": "{text} It was", "label_words": ("terrible", "great")}
)
ENTAILMENT = Row(
    "sentiment-shift",
    CORE,
    public="rte",
    private="rte",
    source={"max_examples": 400},
    texts={"second_text_column": "text2"},
    last_layers=None,
    model=SMALL_LLAMA | {"prompt": "{text} Is it true that {text2}? Answer:", "label_words": ("yes", "no"), "max_tokens": 128},
)
ROWS = {
    # The core table: every arm, a shift of domain and missing classes.
    "sentiment-shift": Row("sentiment-shift", CORE),
    "missing-topics": Row("missing-topics", CORE),
    "sentiment-shift-guided": Row("sentiment-shift", GUIDED),
    "missing-topics-guided": Row("missing-topics", GUIDED),
    "sentiment-shift-unguided": Row("sentiment-shift", UNGUIDED, LONG),
    "missing-topics-unguided": Row("missing-topics", UNGUIDED, LONG),
    # Without a head: the same shifts, where all learning has to go through adapters.
    "sentiment-shift-label-texts": Row("sentiment-shift-label-texts", CORE, BROAD),
    "missing-topics-label-texts": Row("missing-topics-label-texts", CORE, BROAD),
    "sentiment-shift-label-texts-baseline": Row("sentiment-shift-label-texts", (A.MEZO_FL,), LONG),
    "missing-topics-label-texts-baseline": Row("missing-topics-label-texts", (A.MEZO_FL,), LONG),
    "unlabelled-news-sst2-label-texts": Row("sentiment-shift-label-texts", LABEL_FREE, BROAD, public="ag_news", source=UNLABELLED),
    # The breadth table. Its private sets are those of the core table and two more, whose unguided baseline is below.
    "matched": Row("missing-topics", CORE, BROAD, public="ag_news", source={"max_examples": 400}),
    "imdb-sst2": Row("sentiment-shift", CORE, BROAD, public="imdb"),
    "amazon-customer": Row("sentiment-shift", CORE, BROAD, public="amazon_multi", private="customer_reviews"),
    "label-noise": Row(
        "missing-topics", (A.FEEDBACK, A.CLOUD_ONLY), BROAD, public="ag_news", source={"max_examples": 400, "label_noise": 0.4}
    ),
    "shuffled-labels": Row(
        "missing-topics", (A.FEEDBACK, A.CLOUD_ONLY), BROAD, public="ag_news", source={"max_examples": 400, "label_noise": 1.0}
    ),
    "unlabelled-news-sst2": Row("sentiment-shift", LABEL_FREE, BROAD, public="ag_news", source=UNLABELLED),
    "unrelated-amazon-news": Row("missing-topics", LABEL_FREE, BROAD, public="amazon_multi", source=UNLABELLED),
    "no-public-sst2": Row("sentiment-shift", LABEL_FREE, BROAD, public=NO_TEXT),
    "no-public-news": Row("missing-topics", LABEL_FREE, BROAD, public=NO_TEXT),
    "banking77": Row("missing-topics", CORE, BROAD, public="banking77", private="banking77", source={"max_examples": 400}),
    "customer-baseline": Row("sentiment-shift", (A.MEZO_FL,), LONG, public="amazon_multi", private="customer_reviews"),
    "banking77-baseline": Row("missing-topics", (A.MEZO_FL,), LONG, public="banking77", private="banking77"),
    # The depth table: all six layers.
    "six-layers": Row("sentiment-shift", (A.FEEDBACK, A.FEDAVG_BP), BROAD, last_layers=None),
    "six-layers-baseline": Row("sentiment-shift", (A.MEZO_FL,), LONG, last_layers=None),
    # Label words of a causal model that `pretrain.py` builds.
    "sst2-label-words": FILMS,
    "rte-label-words": ENTAILMENT,
    "sst2-label-words-baseline": replace(FILMS, arms=(A.MEZO_FL,), rounds=LONG),
    "rte-label-words-baseline": replace(ENTAILMENT, arms=(A.MEZO_FL,), rounds=LONG),
    # What the link and a device's rounding cost.
    **{
        f"{recipe}-{bits}-bit": Row(recipe, LABEL_FREE, BROAD, settings={"estimate_bits": bits})
        for recipe in ("sentiment-shift", "missing-topics")
        for bits in SUPPORTED_BITS
    },
    **{f"{recipe}-stale": Row(recipe, LABEL_FREE, BROAD, staleness=1) for recipe in ("sentiment-shift", "missing-topics")},
    "sentiment-shift-int8": Row("sentiment-shift", LABEL_FREE, BROAD, runtime=RuntimeName.ONNX_INT8),
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
    parser.add_argument("--rate", type=float, help="one learning rate for every arm, instead of the recipe's")
    parser.add_argument(
        "--optimizer", choices=[kind.value for kind in OptimizerKind], help="one optimiser for every arm, instead of the recipe's"
    )
    parser.add_argument("--tune", action="store_true", help="search for every arm's learning rate")
    parser.add_argument("--tune-rounds", type=int, help="rounds of the runs that tune")
    parser.add_argument("--arms", nargs="+", choices=[arm.value for arm in ArmName], help="only these of a row's arms")
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.rows:
        path = arguments.work / name
        with Progress(console) as progress:
            if (path / "comparison.json").is_file():
                found = cooperllm.resume(path, progress.observe, progress.tell)
            else:
                configs = [
                    c for c in ROWS[name].configs(arguments.data_directory) if c.arm.name.value in (arguments.arms or [c.arm.name.value])
                ]
                if arguments.rate is not None:
                    configs = [replace(config, arm=replace(config.arm, learning_rate=arguments.rate)) for config in configs]
                if arguments.optimizer is not None:
                    kind = OptimizerKind(arguments.optimizer)
                    configs = [replace(config, optimizer=replace(config.optimizer, kind=kind)) for config in configs]
                found = cooperllm.compare(
                    configs,
                    path,
                    progress.observe,
                    seeds=arguments.seeds,
                    tune=arguments.tune,
                    tune_rounds=arguments.tune_rounds,
                    processes=arguments.processes,
                    memory_limit_mib=arguments.memory_limit_mib,
                    tell=progress.tell,
                )
        console.print(arms_table(found.summary))
        console.print(verdict(found.summary), highlight=False)
        console.print(f"report: {path / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
