"""Options that several commands take, and what they make of a recipe's configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cooperllm.config import (
    AdapterKind,
    ArmName,
    EngineName,
    Objective,
    OptimizerKind,
    Partition,
    RunConfig,
    RuntimeName,
    SlopeMethod,
    from_plain,
    to_plain,
)
from cooperllm.errors import ConfigError

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
CompletionColumn = Annotated[
    str | None, typer.Option("--completion-column", help="Column with what is to be said after a text: learn its next tokens, not classes.")
]
Prompt = Annotated[str | None, typer.Option("--prompt", help="What a text is put into: '{text} It was'.")]
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
ArmOption = Annotated[ArmName, typer.Option("--arm", help="Method.")]


def changed(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Applies the options that were given.

    Args:
        config: A recipe's.
        options: Values by the names that the commands give them; None for those left out.

    Returns:
        The configuration.

    Raises:
        ConfigError: If a value is outside its domain.
    """
    given = {key: value for key, value in options.items() if value is not None}

    def pick(**names: str) -> dict[str, Any]:
        return {field: given[option] for field, option in names.items() if option in given}

    model = pick(name="model", adapter="adapter", last_layers="last_layers", max_tokens="max_tokens", prompt="prompt")
    if "target_modules" in given:
        model["target_modules"] = tuple(filter(None, given["target_modules"].split(",")))
    columns = pick(
        text_column="text_column",
        second_text_column="second_text_column",
        label_column="label_column",
        completion_column="completion_column",
    )
    if "completion_column" in given:
        model["objective"], columns["label_column"] = Objective.NEXT_TOKEN, given.get("label_column")
    federation = pick(
        num_devices="devices", num_edges="edges", devices_per_round="devices_per_round", batch_size="batch_size",
        partition="partition", partition_column="partition_column", dirichlet_alpha="dirichlet_alpha",
    )  # fmt: skip
    found = replace(
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
    return _set(found, given.get("settings", ()))


def free_directory(out: Path | None, name: str) -> Path:
    """Chooses where a run goes.

    Args:
        out: What was asked for, or None.
        name: Of the runs that it is one of.

    Returns:
        `out`, or runs/NAME-N with the next free N.
    """
    if out is not None:
        return out
    taken = (Path("runs") / f"{name}-{number}" for number in range(1, 1_000_000))
    return next(path for path in taken if not path.exists())


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
