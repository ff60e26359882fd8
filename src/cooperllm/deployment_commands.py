"""The commands of a deployment: one for each tier, one that writes what they need, one that starts all of them here."""

import datetime
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import rich.console
import typer

from cooperllm import recipes
from cooperllm.config import ArmName, RunConfig
from cooperllm.errors import ConfigError
from cooperllm.options import (
    ActivationMib,
    Adapter,
    Alpha,
    ArmOption,
    BatchSize,
    CompletionColumn,
    DataDirectory,
    DevicesPerRound,
    LabelColumn,
    LastLayers,
    LearningRate,
    MaxTokens,
    Model,
    NumDevices,
    NumEdges,
    OptimizerName,
    PartitionColumn,
    PartitionKind,
    Private,
    Prompt,
    Public,
    Queries,
    RecipeName,
    Rounds,
    Runtime,
    SecondTextColumn,
    Seed,
    Set,
    Slopes,
    Targets,
    TextColumn,
    changed,
    free_directory,
)
from cooperllm.process_log import LogFormat, begin_log

CACHE = Path.home() / ".cache" / "cooperllm"
CLOUD_PORT = 9100
SettingsFile = Annotated[Path, typer.Argument(help="TOML file, as `cooperllm enroll` writes it.")]
Log = Annotated[
    LogFormat, typer.Option("--log-format", help="What the process says of itself: lines for people, or JSON, an object a line.")
]
Hosts = Annotated[str, typer.Option("--hosts", help="Names of the cloud's host and of each edge's, comma-separated: cloud.lan,edge0.lan")]
console = rich.console.Console()


def until_told(work: Callable[[threading.Event], object]) -> None:
    """Runs a node until SIGTERM or Ctrl-C, after which it says goodbye to its server."""
    stop = threading.Event()

    def told(_number: int, _frame: object) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    work(stop)


def enroll_command(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    recipe: Annotated[str, typer.Option("--recipe", help="What is trained.")] = "demo",
    arm: ArmOption = ArmName.FEEDBACK,
    hosts: Hosts = "",
    port: Annotated[int, typer.Option("--port", help="Of the cloud; edges have the ones after it where hosts are shared.")] = CLOUD_PORT,
    texts: Annotated[bool, typer.Option("--texts", help="Write the devices their part of the recipe's private texts, too.")] = False,  # noqa: FBT002
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
    runtime: Runtime = None,
    activation_mib: ActivationMib = None,
    slopes: Slopes = None,
    settings: Set = None,
) -> None:
    """Write keys, certificates and settings for every process of a deployment, its run and its device package."""
    begin_log(LogFormat.TEXT, "enroll")
    others = {"directory", "recipe", "arm", "hosts", "port", "texts", "data_directory"}
    options = {key: value for key, value in locals().items() if key not in others}
    config = _chosen(recipe, data_directory, arm, options)
    _prepare(directory, config, hosts, port, has_texts=texts)
    for kind, start in (("cloud", "cloud"), ("edge-0", "edge"), ("device-0", "device")):
        console.print(f"cooperllm {start} {directory / kind / start}.toml", highlight=False, soft_wrap=True)


def admit_supernodes_command(
    directory: Annotated[Path, typer.Argument(help="A deployment, as `cooperllm enroll` has written it.")],
) -> None:
    """Let a deployment's devices run on Flower's official SuperNode, and say how: its edges then ask devices for no certificate."""
    from cooperllm.deployment.enrolment import admit_supernodes  # noqa: PLC0415 -- of the extra `cloud`

    for line in admit_supernodes(directory):
        typer.echo(line)


def up_command(
    recipe: RecipeName = "demo",
    arm: ArmOption = ArmName.FEEDBACK,
    port: Annotated[int, typer.Option("--port", help="Of the cloud; edges have the ones after it.")] = CLOUD_PORT,
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
    devices: NumDevices = 4,
    edges: NumEdges = 2,
    devices_per_round: DevicesPerRound = None,
    batch_size: BatchSize = None,
    partition: PartitionKind = None,
    partition_column: PartitionColumn = None,
    dirichlet_alpha: Alpha = None,
    runtime: Runtime = None,
    activation_mib: ActivationMib = None,
    slopes: Slopes = None,
    settings: Set = None,
    log_format: Log = LogFormat.TEXT,
    out: Annotated[Path | None, typer.Option("--out", help="Directory; by default runs/RECIPE-up-N with the next free N.")] = None,
) -> None:
    """Train with a process for each edge and device on this machine: the same bits as `cooperllm run --runtime onnx`."""
    begin_log(log_format, "cloud")
    options = {key: value for key, value in locals().items() if key not in {"recipe", "arm", "port", "data_directory", "out", "log_format"}}
    config = _chosen(recipe, data_directory, arm, options)
    directory = free_directory(out, f"{recipe}-up")
    _prepare(directory, config, "", port, has_texts=True)
    from cooperllm.deployment.together import edges_and_devices  # noqa: PLC0415 -- of the extra `cloud`

    with edges_and_devices(directory, log_format):
        _cloud(directory / "cloud" / "cloud.toml", log_format)


def cloud_command(settings: SettingsFile, log_format: Log = LogFormat.TEXT) -> None:
    """Train, with edges and devices elsewhere; started again, it goes on where its log ends."""
    begin_log(log_format, "cloud")
    _cloud(settings, log_format)


def status_command(run: Annotated[Path, typer.Argument(help="A run directory, such as fleet/cloud/run.")]) -> None:
    """Say where a run is, who answered last, and who was lost."""
    from cooperllm.status import read_status, status_words  # noqa: PLC0415 -- of the extra `cloud`

    console.print(status_words(read_status(run, datetime.datetime.now(datetime.UTC))), highlight=False, soft_wrap=True)


def stop_command(
    path: Annotated[Path, typer.Argument(help="A settings file, or a directory with some below it: a deployment's, all of it.")],
) -> None:
    """End processes of this machine, and wait until they have: a run goes on where it stopped when they are started again."""
    from cooperllm.deployment.process_file import stop  # noqa: PLC0415 -- of the extra `device`

    for settings in stop(path):
        console.print(f"ended: {settings}", highlight=False, soft_wrap=True)


def monitor_command(
    run: Annotated[Path, typer.Argument(help="A run directory, such as fleet/cloud/run.")],
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT, of this machine alone.")] = "127.0.0.1:9190",
) -> None:
    """Show a run on a page that keeps itself up to date, and to Prometheus (/metrics); changes nothing."""
    from cooperllm.deployment.settings import host_and_port, is_loopback  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.monitor import serve_monitor  # noqa: PLC0415

    host, port = host_and_port(listen, "--listen")
    if not is_loopback(host):
        raise ConfigError(
            f"--listen: found {host}, expected 127.0.0.1: whoever reaches the page may read it; put a server with a lock before it"
        )

    def tell(address: str) -> None:
        console.print(f"{address} shows {run}, {address}metrics is for Prometheus; Ctrl-C ends it", highlight=False, soft_wrap=True)

    serve_monitor(run, host, port, tell)


def edge_command(settings: SettingsFile, log_format: Log = LogFormat.TEXT) -> None:
    """Serve devices, and answer the cloud for them."""
    begin_log(log_format, "edge")
    from cooperllm.deployment.edge_process import run_edge_process  # noqa: PLC0415 -- imports Flower's server
    from cooperllm.deployment.process_file import running  # noqa: PLC0415
    from cooperllm.deployment.settings import EdgeSettings, read_settings  # noqa: PLC0415

    found = read_settings(settings, EdgeSettings)
    with running(settings):
        until_told(lambda stop: run_edge_process(found, stop))


def device_command(
    settings: Annotated[Path | None, typer.Argument(help="TOML file, as `cooperllm enroll` writes it: take part in a run.")] = None,
    package: Annotated[Path | None, typer.Option("--measure", help="A device package; says what it takes on this machine.")] = None,
    memory_mib: Annotated[float | None, typer.Option("--memory-mib", help="Memory of the whole process; no limit by default.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts of a batch, each as long as the package takes.")] = 16,
    threads: Annotated[int, typer.Option("--threads", help="Threads of one operator.")] = 1,
    cache_directory: Annotated[Path, typer.Option("--cache-directory", help="Where states of frozen layers may be kept.")] = CACHE,
    cache_mib: Annotated[float, typer.Option("--cache-mib", help="The most that they may take there.")] = 256.0,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Take part in a run, or choose how a device spends memory, by measuring: needs no PyTorch."""
    if (settings is None) == (package is None):
        raise ConfigError("device: found neither or both, expected a settings file, or --measure PACKAGE")
    if package is None:
        _device(settings or Path(), log_format)
        return
    from cooperllm.device import footprint_report, governor  # noqa: PLC0415 -- of the extra `device`

    with console.status("trying settings, each in a process of its own"):
        choice, trials = governor.govern(
            package, memory_mib, cache_directory, states_quota_mib=cache_mib, batch_size=batch_size, num_threads=threads
        )
    console.print(footprint_report.settings_table(trials, choice, memory_mib))
    console.print(footprint_report.phases_table(choice))
    console.print(footprint_report.words(choice, memory_mib), highlight=False)


def _device(settings: Path, log_format: LogFormat) -> None:
    begin_log(log_format, "device")
    from cooperllm.deployment.device_process import run_device_process  # noqa: PLC0415 -- of the extra `device`
    from cooperllm.deployment.process_file import running  # noqa: PLC0415
    from cooperllm.deployment.settings import DeviceSettings, read_settings  # noqa: PLC0415

    found = read_settings(settings, DeviceSettings)
    with running(settings):
        until_told(lambda stop: run_device_process(found, stop))


def timeline_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run whose tiers are processes, finished or not.")],
    last: Annotated[int, typer.Option("--last", help="Draw this many of the last rounds.", min=1)] = 6,
) -> None:
    """Draw who was at work when, and what travelled: a lane for each tier and node."""
    from cooperllm import report  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.run_directory import RunDirectory  # noqa: PLC0415

    times = RunDirectory(run).times()[-last:]
    if not times:
        raise ConfigError(f"{run}: found no times, expected a run of `cooperllm up` or `cooperllm cloud`: elsewhere nothing travels")
    console.print(report.times_table(times))
    console.print(
        f"drawn in {report.write_timeline(times, run)}; report.html of a finished run has it, too", highlight=False, soft_wrap=True
    )


def _chosen(recipe: str, data_directory: str, arm: ArmName, options: dict[str, Any]) -> RunConfig:
    """A recipe with the options given; of a fleet that is smaller than a round of the recipe all take part."""
    config, devices = recipes.recipe(recipe, data_directory).with_arm(arm), options["devices"]
    if devices is not None and options["devices_per_round"] is None:
        options["devices_per_round"] = max(1, min(devices, config.federation.devices_per_round))
    return changed(config, options)


def _prepare(directory: Path, config: RunConfig, hosts: str, port: int, *, has_texts: bool) -> None:
    """Writes a deployment's directories; edges on one host with the cloud or each other have neighbouring ports."""
    from cooperllm import pretrained  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.deployment.enrolment import Places  # noqa: PLC0415
    from cooperllm.deployment.together import prepare  # noqa: PLC0415

    pretrained.hush()
    names = [name.strip() for name in hosts.split(",")] if hosts else ["127.0.0.1"] * (1 + config.federation.num_edges)
    if len(names) != 1 + config.federation.num_edges:
        raise ConfigError(f"--hosts: found {len(names)}, expected {1 + config.federation.num_edges}: the cloud's and one for each edge")
    addresses = [f"{name}:{port + number}" for number, name in enumerate(names)]
    with console.status("loading the model, writing keys and the device package"):
        prepare(directory, config, Places(cloud=addresses[0], edges=tuple(addresses[1:])), has_texts=has_texts)
    console.print(f"everything is in {directory}", highlight=False, soft_wrap=True)


def _cloud(settings: Path, log_format: LogFormat) -> None:
    from cooperllm import pretrained  # noqa: PLC0415 -- of the extra `cloud`
    from cooperllm.deployment.cloud_process import log_round, run_cloud_process  # noqa: PLC0415
    from cooperllm.deployment.process_file import running  # noqa: PLC0415
    from cooperllm.deployment.settings import CloudSettings, read_settings  # noqa: PLC0415
    from cooperllm.showing import show  # noqa: PLC0415

    pretrained.hush()
    found = read_settings(settings, CloudSettings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to stop: as if by Ctrl-C
    with running(settings):
        if log_format is LogFormat.TEXT:
            show(console, lambda progress: run_cloud_process(found, progress.observe), f"cooperllm cloud {settings}")
            return
        try:
            run_cloud_process(found, log_round)
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(130) from interrupt
