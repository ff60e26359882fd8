"""The command line: thin, no arithmetic.

What computes is imported by the command that needs it: a device's command must work where PyTorch is not installed, and not load it.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import rich.text
import typer

from cooperllm import recipes
from cooperllm.config import (
    AdapterKind,
    ArmName,
    EngineName,
    OptimizerKind,
    Partition,
    RunConfig,
    RuntimeName,
    SlopeMethod,
    Variant,
    from_plain,
    to_plain,
)
from cooperllm.errors import ConfigError, CooperLLMError
from cooperllm.wall_clock import clock_from

if TYPE_CHECKING:
    from cooperllm.progress import Progress
    from cooperllm.session import Run

app = typer.Typer(
    name="cooperllm",
    help="Fine-tune language models across devices that can only afford forward passes, guided by a cloud.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = rich.console.Console()
errors = rich.console.Console(stderr=True)

CACHE = Path.home() / ".cache" / "cooperllm"

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
Runtime = Annotated[RuntimeName | None, typer.Option("--runtime", help="What runs forward on a device: PyTorch, or a package.")]
Slopes = Annotated[
    SlopeMethod | None, typer.Option("--slopes", help="How devices measure slopes: differences of losses, or derivatives in forward mode.")
]
ActivationMib = Annotated[
    float | None, typer.Option("--activation-mib", help="Memory of the points of one batched pass; one point a pass by default.")
]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="Step size; the recipe's by default.")]
OptimizerName = Annotated[
    OptimizerKind | None, typer.Option("--optimizer", help="The server's optimiser; an arm's rate belongs to the recipe's.")
]
Adapter = Annotated[AdapterKind | None, typer.Option("--adapter", help="What is trained.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Several seeds, comma-separated; the report shows their spread.")]
RoundsOf = Annotated[str, typer.Option("--rounds-of", help="Rounds of single arms: mezo-fl=200,decomfl=200.")]
Tune = Annotated[bool, typer.Option("--tune", help="Search each arm's learning rate in the same way, on validation.")]
TuneRounds = Annotated[int | None, typer.Option("--tune-rounds", help="Tune with runs of so many rounds; by default those of the arm.")]
Processes = Annotated[int, typer.Option("--processes", help="Runs at the same time, each with one thread.")]
MemoryLimit = Annotated[float | None, typer.Option("--memory-limit-mib", help="Memory for all processes at their peaks.")]
Clock = Annotated[str, typer.Option("--clock", help="Modelled device and link: forward_passes_per_s=5,latency_s=0.05,...")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting by its path in config.json: --set arm.local_steps=1 --set data.public.label_column=null"),
]
Queries = Annotated[int | None, typer.Option("--queries", help="Two-point queries per device and round.")]


@app.command("run")
def run_command(
    recipe: RecipeName = "demo",
    arm: Annotated[ArmName, typer.Option("--arm", help="Method.")] = ArmName.FEEDBACK,
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
    runtime: Runtime = None,
    activation_mib: ActivationMib = None,
    slopes: Slopes = None,
    settings: Set = None,
    out: Out = None,
) -> None:
    """Train one arm and write a run directory with log, plots, report and adapter."""
    from cooperllm import session  # noqa: PLC0415 -- of the extra `cloud`

    chosen = recipes.recipe(recipe, data_directory)
    options = {key: value for key, value in locals().items() if key not in {"chosen", "recipe", "arm", "out", "data_directory"}}
    config = _changed(chosen.with_arm(arm), options)
    directory = _directory(out, recipe)
    _show(lambda progress: session.run(config, directory, progress.observe), directory)


@app.command("compare")
def compare_command(
    recipe: RecipeName = "demo",
    arms: Annotated[str, typer.Option("--arms", help="Arms, comma-separated; the recipe's by default.")] = "",
    queries: Queries = None,
    rounds: Rounds = None,
    rounds_of: RoundsOf = "",
    seed: Seed = None,
    seeds: Seeds = "",
    tune: Tune = False,  # noqa: FBT002 -- an option
    tune_rounds: TuneRounds = None,
    processes: Processes = 1,
    memory_limit_mib: MemoryLimit = None,
    clock: Clock = "",
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
    runtime: Runtime = None,
    activation_mib: ActivationMib = None,
    slopes: Slopes = None,
    settings: Set = None,
    out: Out = None,
) -> None:
    """Train several arms on the same task, with the same budget, and report on all of them."""
    from cooperllm import comparison  # noqa: PLC0415 -- of the extra `cloud`

    chosen = recipes.recipe(recipe, data_directory)
    options = {key: value for key, value in locals().items() if key not in {"chosen", "recipe", "arms", "out", "data_directory"}}
    names = _arm_names(arms) or chosen.compared
    own_rounds = _rounds_of(rounds_of, names)
    configs = [_changed(chosen.with_arm(name), options | {"rounds": own_rounds.get(name, rounds)}) for name in names]
    if seeds and seed is not None:
        raise ConfigError("--seeds: found --seed beside it, expected one of them")
    directory, speeds = _directory(out, f"{recipe}-compare"), clock_from(clock)
    _show(
        lambda progress: comparison.compare(
            configs, directory, progress.observe, seeds=_numbers("--seeds", seeds) or None, tune=tune, tune_rounds=tune_rounds,
            processes=processes, memory_limit_mib=memory_limit_mib, clock=speeds, tell=progress.tell,
        ),
        directory,
    )  # fmt: skip


@app.command("resume")
def resume_command(run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")]) -> None:
    """Continue a run where it stopped; it ends with the same bits as an uninterrupted one."""
    from cooperllm import comparison  # noqa: PLC0415 -- of the extra `cloud`

    _show(lambda progress: comparison.resume(run, progress.observe, progress.tell), run)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a comparison.")] = None,
) -> None:
    """Write the adapter as a directory that plain PEFT loads."""
    from cooperllm import comparison  # noqa: PLC0415 -- of the extra `cloud`

    console.print(f"adapter written to {comparison.export(run, target, arm)}")


@app.command("package")
def package_command(
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    recipe: Annotated[str, typer.Option("--recipe", help="The run that the devices take part in.")] = "demo",
    variant: Annotated[Variant, typer.Option("--variant", help="How frozen weights are kept.")] = Variant.FP32,
    slopes: Slopes = None,
    seed: Seed = None,
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
    settings: Set = None,
) -> None:
    """Write what a device without PyTorch needs to take part: ONNX graphs, weights, tokeniser, manifest."""
    from cooperllm import assembly, models  # noqa: PLC0415 -- of the extra `cloud`

    models.hush()
    options = {key: value for key, value in locals().items() if key not in {"target", "recipe", "variant", "data_directory"}}
    config = _changed(recipes.recipe(recipe, data_directory).config, options)
    with console.status("tracing the model, writing its weights, comparing losses"):
        size = assembly.write_device_package(config, assembly.Material(config), target, variant)
    console.print(f"package of {size / 2**20:.1f} MiB written to {target}", highlight=False, soft_wrap=True)


@app.command("device")
def device_command(
    package: Annotated[Path, typer.Option("--measure", help="A device package; says what it takes on this machine.")],
    memory_mib: Annotated[float | None, typer.Option("--memory-mib", help="Memory of the whole process; no limit by default.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts of a batch, each as long as the package takes.")] = 16,
    threads: Annotated[int, typer.Option("--threads", help="Threads of one operator.")] = 1,
    cache_directory: Annotated[Path, typer.Option("--cache-directory", help="Where states of frozen layers may be kept.")] = CACHE,
    cache_mib: Annotated[float, typer.Option("--cache-mib", help="The most that they may take there.")] = 256.0,
) -> None:
    """Choose how a device spends memory, by measuring: needs no PyTorch."""
    from cooperllm.device import footprint_report, governor  # noqa: PLC0415 -- of the extra `device`

    with console.status("trying settings, each in a process of its own"):
        choice, trials = governor.govern(
            package, memory_mib, cache_directory, states_quota_mib=cache_mib, batch_size=batch_size, num_threads=threads
        )
    console.print(footprint_report.settings_table(trials, choice, memory_mib))
    console.print(footprint_report.phases_table(choice))
    console.print(footprint_report.words(choice, memory_mib), highlight=False)


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes."""
    for name, make in recipes.RECIPES.items():
        console.print(f"[bold]{name}[/bold]  {(make.__doc__ or '').splitlines()[0]}")


def main() -> None:
    """Entry point: a mistake of the user's or the world's ends with a sentence and status 1.

    Raises:
        SystemExit: With status 1 after such a sentence.
        ModuleNotFoundError: If a module of our own is missing: our mistake.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except CooperLLMError as error:
        _refuse(type(error).__name__, str(error))
        raise SystemExit(1) from error
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "cooperllm":
            raise
        extra = "device" if sys.argv[1:2] == ["device"] else "cloud"
        _refuse("ConfigError", f"found no module {error.name!r}, which this command needs; pip install 'cooperllm[{extra}]'")
        raise SystemExit(1) from error


def _refuse(kind: str, sentence: str) -> None:
    said = rich.text.Text.assemble((kind, "bold red"), ": ", sentence)
    # A log keeps the sentence on one line, whatever the length of the paths in it; a terminal breaks it between words.
    errors.print(said, highlight=False, soft_wrap=not errors.is_terminal)


def _changed(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Applies the options that were given."""
    given = {key: value for key, value in options.items() if value is not None}

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
    changed = replace(
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
        **pick(
            num_rounds="rounds", seed="seed", engine="engine", runtime="runtime", activation_mib="activation_mib", slope_method="slopes"
        ),
    )
    return _set(changed, given.get("settings", ()))


def _set(config: RunConfig, settings: Sequence[str]) -> RunConfig:
    """Applies PATH=VALUE; a value that is not JSON is text. Unknown paths and values outside their domain are refused as in a file."""
    plain = to_plain(config)
    for setting in settings:
        path, _, text = setting.partition("=")
        *parents, name = path.split(".")
        place: Any = plain
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or not text:
            raise ConfigError(f"--set: found {setting!r}, expected PATH=VALUE with a path of config.json, such as arm.local_steps=1")
        try:
            place[name] = json.loads(text)
        except json.JSONDecodeError:
            place[name] = text
    return from_plain(plain, where="--set") if settings else config


def _arm_names(text: str, option: str = "--arms") -> tuple[ArmName, ...]:
    known = [name.value for name in ArmName]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: found {name!r}, expected some of {', '.join(known)}")
    return tuple(ArmName(name) for name in dict.fromkeys(names))


def _rounds_of(text: str, arms: Sequence[ArmName]) -> dict[ArmName, int]:
    """Reads ARM=ROUNDS, comma-separated."""
    rounds: dict[ArmName, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        found = [arm for arm in _arm_names(name, "--rounds-of") if arm in arms]
        if len(found) != 1 or not number.strip().isdigit():
            raise ConfigError(f"--rounds-of: found {part!r}, expected ARM=ROUNDS with one of {', '.join(arm.value for arm in arms)}")
        rounds[found[0]] = int(number)
    return rounds


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ConfigError(f"{option}: found {text!r}, expected whole numbers") from error


def _directory(out: Path | None, name: str) -> Path:
    if out is not None:
        return out
    taken = (Path("runs") / f"{name}-{number}" for number in range(1, 1_000_000))
    return next(path for path in taken if not path.exists())


def _show(work: "Callable[[Progress], Run]", directory: Path) -> None:
    """Shows progress, then the table and where everything is."""
    from cooperllm import models  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.progress import Progress  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.report import arms_table, verdict  # noqa: PLC0415 -- of the extra `cloud`

    models.hush()
    with Progress(console) as progress:
        try:
            finished = work(progress)
        except KeyboardInterrupt as interrupt:
            progress.stop()
            console.print(f"interrupted; continue with: cooperllm resume {directory}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from interrupt
    for notice in finished.summary["notices"]:
        console.print(f"note: {notice}", markup=False, highlight=False)
    console.print(arms_table(finished.summary))
    console.print(verdict(finished.summary), highlight=False)
    console.print(f"report: {(finished.path / 'report.html').resolve()}", highlight=False, soft_wrap=True)
