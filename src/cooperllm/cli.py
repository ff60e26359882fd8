"""The command line: thin, no arithmetic."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.progress
import typer

from cooperllm import models, recipes, session
from cooperllm.config import AdapterKind, ArmName, EngineName, OptimizerKind, Partition, RunConfig
from cooperllm.errors import ConfigError, CooperLLMError
from cooperllm.report import arms_table, verdict

app = typer.Typer(
    name="cooperllm",
    help="Fine-tune language models across devices that can only afford forward passes, guided by a cloud.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = rich.console.Console()

RecipeName = Annotated[str, typer.Argument(help="A recipe; `cooperllm recipes` lists them.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; by default runs/RECIPE-N with the next free N.")]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Names every random choice of the run.")]
Model = Annotated[str | None, typer.Option("--model", help="'minilm', 'tiny-llama', a hub id or a local directory.")]
Targets = Annotated[str | None, typer.Option("--target-modules", help="Adapted linear layers, comma-separated; '' lets PEFT choose.")]
LastLayers = Annotated[int | None, typer.Option("--last-layers", help="Adapt this many of the last layers.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Cut texts at this many tokens.")]
Public = Annotated[str | None, typer.Option("--public", help="The cloud's data: file, directory, hub name or 'generated'.")]
Private = Annotated[str | None, typer.Option("--private", help="The devices' data: file, directory, hub name or 'generated'.")]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="Column with the text, in both sources.")]
SecondTextColumn = Annotated[str | None, typer.Option("--second-text-column", help="Column with the second text of a pair.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column with the label, in both sources.")]
DataDirectory = Annotated[str, typer.Option("--data-directory", help="Where recipes on files find their data sets.")]
NumDevices = Annotated[int | None, typer.Option("--devices", help="Number of devices.")]
NumEdges = Annotated[int | None, typer.Option("--edges", help="Number of edges.")]
DevicesPerRound = Annotated[int | None, typer.Option("--devices-per-round", help="Devices that take part in a round.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Private examples per device and round.")]
PartitionKind = Annotated[Partition | None, typer.Option("--partition", help="How private examples are spread.")]
PartitionColumn = Annotated[str | None, typer.Option("--partition-column", help="Column whose values are the devices.")]
Alpha = Annotated[float | None, typer.Option("--dirichlet-alpha", help="Concentration of the Dirichlet partition.")]
Engine = Annotated[EngineName | None, typer.Option("--engine", help="What carries messages; all give the same numbers.")]
MemoryMib = Annotated[float | None, typer.Option("--memory-mib", help="Memory for batched points on a device; one by one by default.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="Step size; the recipe's by default.")]
OptimizerName = Annotated[OptimizerKind | None, typer.Option("--optimizer", help="The server's optimiser; rates are for momentum.")]
Adapter = Annotated[AdapterKind | None, typer.Option("--adapter", help="What is trained.")]
Queries = Annotated[int | None, typer.Option("--queries", help="Two-point queries per device and round.")]


@app.command("run")
def run_command(
    recipe: RecipeName = "demo",
    arm: Annotated[ArmName, typer.Option("--arm", help="Method.")] = ArmName.MEASURED,
    learning_rate: LearningRate = None,
    queries: Queries = None,
    rounds: Rounds = None,
    seed: Seed = None,
    optimizer: OptimizerName = None,
    model: Model = None,
    adapter: Adapter = None,
    target_modules: Targets = None,
    last_layers: LastLayers = None,
    max_tokens: MaxTokens = None,
    public: Public = None,
    private: Private = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    data_directory: DataDirectory = "data",
    devices: NumDevices = None,
    edges: NumEdges = None,
    devices_per_round: DevicesPerRound = None,
    batch_size: BatchSize = None,
    partition: PartitionKind = None,
    partition_column: PartitionColumn = None,
    dirichlet_alpha: Alpha = None,
    engine: Engine = None,
    memory_mib: MemoryMib = None,
    out: Out = None,
) -> None:
    """Train one arm and write a run directory with log, plots, report and adapter."""
    chosen = recipes.recipe(recipe, data_directory)
    settings = {key: value for key, value in locals().items() if key not in {"chosen", "recipe", "arm", "out", "data_directory"}}
    config = _changed(chosen.with_arm(arm), settings)
    directory = _directory(out, recipe)
    _show(lambda observe: session.run(config, directory, observe), directory, [config])


@app.command("compare")
def compare_command(
    recipe: RecipeName = "demo",
    arms: Annotated[str, typer.Option("--arms", help="Arms, comma-separated; the recipe's by default.")] = "",
    queries: Queries = None,
    rounds: Rounds = None,
    seed: Seed = None,
    optimizer: OptimizerName = None,
    model: Model = None,
    adapter: Adapter = None,
    target_modules: Targets = None,
    last_layers: LastLayers = None,
    max_tokens: MaxTokens = None,
    public: Public = None,
    private: Private = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    data_directory: DataDirectory = "data",
    devices: NumDevices = None,
    edges: NumEdges = None,
    devices_per_round: DevicesPerRound = None,
    batch_size: BatchSize = None,
    partition: PartitionKind = None,
    partition_column: PartitionColumn = None,
    dirichlet_alpha: Alpha = None,
    engine: Engine = None,
    memory_mib: MemoryMib = None,
    out: Out = None,
) -> None:
    """Train several arms on the same task, with the same budget, and report on all of them."""
    chosen = recipes.recipe(recipe, data_directory)
    settings = {key: value for key, value in locals().items() if key not in {"chosen", "recipe", "arms", "out", "data_directory"}}
    names = _arm_names(arms) or chosen.compared
    configs = [_changed(chosen.with_arm(name), settings) for name in names]
    directory = _directory(out, f"{recipe}-compare")
    _show(lambda observe: session.compare(configs, directory, observe), directory, configs)


@app.command("resume")
def resume_command(run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")]) -> None:
    """Continue a run where it stopped; it ends with the same bits as an uninterrupted one."""
    _show(lambda observe: session.resume(run, observe), run, [])


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a comparison.")] = None,
) -> None:
    """Write the adapter as a directory that plain PEFT loads."""
    console.print(f"adapter written to {session.export(run, target, arm)}")


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes."""
    for name, make in recipes.RECIPES.items():
        console.print(f"[bold]{name}[/bold]  {(make.__doc__ or '').splitlines()[0]}")


def main() -> None:
    """Entry point: a mistake of the user's or the world's ends with a sentence and status 1.

    Raises:
        SystemExit: With status 1 after such a sentence.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    models.hush()
    try:
        app()
    except CooperLLMError as error:
        console.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise SystemExit(1) from error


def _changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Applies the options that were given."""
    given = {key: value for key, value in settings.items() if value is not None}

    def pick(**names: str) -> dict[str, Any]:
        return {field: given[option] for field, option in names.items() if option in given}

    model = pick(name="model", adapter="adapter", last_layers="last_layers", max_tokens="max_tokens")
    if "target_modules" in given:
        model["target_modules"] = tuple(filter(None, given["target_modules"].split(",")))
    columns = pick(text_column="text_column", second_text_column="second_text_column", label_column="label_column")
    federation = pick(
        num_devices="devices", num_edges="edges", devices_per_round="devices_per_round", batch_size="batch_size",
        partition="partition", partition_column="partition_column", dirichlet_alpha="dirichlet_alpha",
    )  # fmt: skip
    return replace(
        config,
        model=replace(config.model, **model),
        data=replace(
            config.data,
            public=replace(config.data.public, **pick(name="public"), **columns),
            private=replace(config.data.private, **pick(name="private"), **columns),
        ),
        federation=replace(config.federation, **federation),
        optimizer=replace(config.optimizer, **pick(kind="optimizer")),
        arm=replace(config.arm, **pick(learning_rate="learning_rate", queries="queries")),
        **pick(num_rounds="rounds", seed="seed", engine="engine", memory_mib="memory_mib"),
    )


def _arm_names(text: str) -> tuple[ArmName, ...]:
    known = [name.value for name in ArmName]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"--arms: found {name!r}, expected some of {', '.join(known)}")
    return tuple(ArmName(name) for name in dict.fromkeys(names))


def _directory(out: Path | None, name: str) -> Path:
    if out is not None:
        return out
    taken = (Path("runs") / f"{name}-{number}" for number in range(1, 1_000_000))
    return next(path for path in taken if not path.exists())


def _show(work: Callable[[session.Observer], session.Run], directory: Path, configs: Sequence[RunConfig]) -> None:
    """Runs with one progress bar per arm, then prints the table and where everything is."""
    columns = (
        rich.progress.TextColumn("[bold]{task.description:<11}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[figures]}"),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        bars = {config.arm.name: progress.add_task(config.arm.name.value, total=config.num_rounds, figures="waiting") for config in configs}
        seen = _Seen()

        def observe(config: RunConfig, figures: Mapping[str, Any]) -> None:
            name = config.arm.name
            if name not in bars:
                bars[name] = progress.add_task(name.value, total=config.num_rounds, figures="")
            progress.update(bars[name], completed=figures["round"], figures=seen.line(name, figures))

        try:
            finished = work(observe)
        except KeyboardInterrupt as interrupt:
            progress.stop()
            console.print(f"interrupted; continue with: cooperllm resume {directory}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from interrupt
    for notice in finished.summary["notices"]:
        console.print(f"note: {notice}", highlight=False)
    console.print(arms_table(finished.summary))
    console.print(verdict(finished.summary), highlight=False)
    console.print(f"report: {(finished.path / 'report.html').resolve()}", highlight=False, soft_wrap=True)


class _Seen:
    """What a progress line shows: the newest accuracy and loss, and bytes so far."""

    def __init__(self) -> None:
        self._newest: dict[ArmName, str] = {}
        self._bytes: dict[ArmName, int] = {}

    def line(self, name: ArmName, figures: Mapping[str, Any]) -> str:
        """Formats one round's figures."""
        if figures["accuracy"] is not None:
            self._newest[name] = f"accuracy {figures['accuracy']:.1%}  loss {figures['loss']:.3f}"
        self._bytes[name] = self._bytes.get(name, 0) + figures["bytes_down"] + figures["bytes_up"]
        rho = "" if figures["rho"] is None else f"  rho {figures['rho']:+.2f}"
        return f"{self._newest.get(name, '')}  {self._bytes[name] / 1e6:.1f} MB{rho}"
