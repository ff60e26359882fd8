"""The command line: thin, no arithmetic.

What computes is imported by the command that needs it: a device's command must work where PyTorch is not installed, and not load it.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.console
import rich.text
import typer

from cooperllm import deployment_commands, process_log, recipes
from cooperllm.config import (
    ArmName,
    Variant,
)
from cooperllm.errors import ConfigError, CooperLLMError
from cooperllm.launch import is_launched
from cooperllm.options import (
    ActivationMib,
    Adapter,
    Alpha,
    ArmOption,
    BatchSize,
    Clock,
    CompletionColumn,
    DataDirectory,
    DevicesPerRound,
    Engine,
    LabelColumn,
    LastLayers,
    LearningRate,
    MaxTokens,
    MemoryLimit,
    Model,
    NumDevices,
    NumEdges,
    OptimizerName,
    Out,
    PartitionColumn,
    PartitionKind,
    Private,
    Processes,
    Prompt,
    Public,
    Queries,
    RecipeName,
    Rounds,
    RoundsOf,
    Runtime,
    SecondTextColumn,
    Seed,
    Seeds,
    Set,
    Slopes,
    Targets,
    TextColumn,
    Tune,
    TuneRounds,
    changed,
    free_directory,
)
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


@app.command("run")
def run_command(
    recipe: RecipeName = "demo",
    arm: ArmOption = ArmName.FEEDBACK,
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
    prompt: Prompt = None,
    public: Public = None,
    private: Private = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    completion_column: CompletionColumn = None,
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
    config = changed(chosen.with_arm(arm), options)
    directory = free_directory(out, recipe)
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
    prompt: Prompt = None,
    public: Public = None,
    private: Private = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    completion_column: CompletionColumn = None,
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
    configs = [changed(chosen.with_arm(name), options | {"rounds": own_rounds.get(name, rounds)}) for name in names]
    if seeds and seed is not None:
        raise ConfigError("--seeds: found --seed beside it, expected one of them")
    directory, speeds = free_directory(out, f"{recipe}-compare"), clock_from(clock)
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
    push_to_hub: Annotated[str | None, typer.Option("--push-to-hub", help="Upload it, too, into this private repository.")] = None,
) -> None:
    """Write the adapter and its model card as a directory that plain PEFT loads."""
    from cooperllm import comparison, pretrained  # noqa: PLC0415 -- of the extra `cloud`

    pretrained.hush()
    console.print(f"adapter written to {comparison.export(run, target, arm)}", highlight=False, soft_wrap=True)
    if push_to_hub is not None:
        console.print(f"pushed to {comparison.push(target, push_to_hub)}", highlight=False, soft_wrap=True)


@app.command("chat")
def chat_command(
    run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")],
    text: Annotated[str | None, typer.Argument(help="What to answer; without it, line after line is asked for.")] = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a comparison.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 128,
) -> None:
    """Try a trained model: what it says after a text, or the classes it finds in it."""
    from cooperllm import comparison, pretrained  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.listening import Listener  # noqa: PLC0415 -- of the extra `cloud`

    pretrained.hush()
    listener = Listener.of(comparison.run_of(run, arm))
    while True:
        try:
            asked = text if text is not None else console.input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if asked.strip() or text is not None:
            listener.answer(asked, lambda words: console.print(words, end="", markup=False, highlight=False), max_new_tokens=max_new_tokens)
            console.print()
        if text is not None:
            return


@app.command("export-metrics")
def export_metrics_command(
    run: Annotated[Path, typer.Argument(help="A run directory, or one with some below it: a comparison, a deployment.")],
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Directory to write event files to, one below it for each run.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", metavar="URI|DIRECTORY", help="Tracking server, or a directory for a database of its own.")
    ] = None,
) -> None:
    """Write every figure of every round for TensorBoard or MLflow."""
    from cooperllm.report.event_files import write_event_files  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.report.mlflow_runs import log_to_mlflow, tracking_uri  # noqa: PLC0415 -- of the extra `cloud`

    if tensorboard is None and mlflow is None:
        raise ConfigError("export-metrics: found nowhere to write to, expected --tensorboard, --mlflow or both")
    if tensorboard is not None:
        written = write_event_files(run, tensorboard)
        console.print(f"{len(written)} written; look at them with: tensorboard --logdir {tensorboard}", highlight=False, soft_wrap=True)
    if mlflow is not None:
        count, uri = log_to_mlflow(run, mlflow), tracking_uri(mlflow)
        console.print(f"{count} logged; look at them with: mlflow ui --backend-store-uri {uri}", highlight=False, soft_wrap=True)


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run directory or a comparison.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a comparison.")] = None,
    max_texts: Annotated[int, typer.Option("--max-texts", min=1, help="Answers that are generated at most.")] = 100,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 128,
) -> None:
    """Judge a trained model on all held-out texts: accuracy and loss, for completions perplexity, exact match and ROUGE-L."""
    from cooperllm import comparison, pretrained  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.evaluation import evaluate  # noqa: PLC0415 -- of the extra `cloud`

    pretrained.hush()
    with console.status("judging held-out texts") as status:
        found = evaluate(
            comparison.run_of(run, arm), max_texts=max_texts, max_new_tokens=max_new_tokens,
            observe=lambda done, count: status.update(f"answer {done} of {count}"),
        )  # fmt: skip
    if found.exact_match is None or found.rouge_l is None:
        console.print(f"{found.num_texts} test texts: accuracy {found.accuracy:.1%}, loss {found.loss:.4f}", highlight=False)
        return
    console.print(
        f"{found.num_texts} test texts: loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, right tokens {found.accuracy:.1%}\n"
        f"{found.num_answers} answers: exact match {found.exact_match:.1%}, ROUGE-L {found.rouge_l:.3f}",
        highlight=False,
    )


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
    prompt: Prompt = None,
    public: Public = None,
    private: Private = None,
    text_column: TextColumn = None,
    second_text_column: SecondTextColumn = None,
    label_column: LabelColumn = None,
    completion_column: CompletionColumn = None,
    data_directory: DataDirectory = "data",
    settings: Set = None,
) -> None:
    """Write what a device without PyTorch needs to take part: ONNX graphs, weights, tokeniser, manifest."""
    from cooperllm import assembly, pretrained  # noqa: PLC0415 -- of the extra `cloud`

    pretrained.hush()
    options = {key: value for key, value in locals().items() if key not in {"target", "recipe", "variant", "data_directory"}}
    config = changed(recipes.recipe(recipe, data_directory).config, options)
    with console.status("tracing the model, writing its weights, comparing losses"):
        size = assembly.write_device_package(config, assembly.Material(config), target, variant)
    console.print(f"package of {size / 2**20:.1f} MiB written to {target}", highlight=False, soft_wrap=True)


app.command("enroll")(deployment_commands.enroll_command)
app.command("admit-supernodes")(deployment_commands.admit_supernodes_command)
app.command("up")(deployment_commands.up_command)
app.command("cloud")(deployment_commands.cloud_command)
app.command("edge")(deployment_commands.edge_command)
app.command("status")(deployment_commands.status_command)
app.command("monitor")(deployment_commands.monitor_command)
app.command("stop")(deployment_commands.stop_command)
app.command("device")(deployment_commands.device_command)
app.command("timeline")(deployment_commands.timeline_command)


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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed PEFT imports it, and it names packages it could use
    try:
        with _launched():
            app()
    except CooperLLMError as error:
        _refuse(type(error).__name__, str(error))
        raise SystemExit(1) from error
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "cooperllm":
            raise
        extra = "device" if sys.argv[1:2] in (["device"], ["stop"]) else "cloud"
        _refuse("ConfigError", f"found no module {error.name!r}, which this command needs; pip install 'cooperllm[{extra}]'")
        raise SystemExit(1) from error


def _launched() -> AbstractContextManager[None]:
    """Within it, a process that accelerate launched is one of those of its launch."""
    if not is_launched(os.environ):
        return nullcontext()
    from cooperllm import accelerated  # noqa: PLC0415 -- of the extra `cloud`

    return accelerated.together()


def _refuse(kind: str, sentence: str) -> None:
    if process_log.is_json():
        logging.getLogger("cooperllm").error("%s: %s", kind, sentence)
        return
    said = rich.text.Text.assemble((kind, "bold red"), ": ", sentence)
    # A log keeps the sentence on one line, whatever the length of the paths in it; a terminal breaks it between words.
    errors.print(said, highlight=False, soft_wrap=not errors.is_terminal)


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


def _show(work: "Callable[[Progress], Run]", directory: Path) -> None:
    from cooperllm.showing import show  # noqa: PLC0415 -- of the extra `cloud`

    show(console, work, f"cooperllm resume {directory}")
