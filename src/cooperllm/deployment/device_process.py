"""A device in a process of its own: opens its package and its texts once, then answers its edge, round after round."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

from cooperllm.algorithm import replay
from cooperllm.completion import Encoded
from cooperllm.deployment.settings import DeviceSettings, Job, read_job
from cooperllm.deployment.state_file import StateFile
from cooperllm.device import Host
from cooperllm.device.governor import govern
from cooperllm.device.onnx_forward import OnnxForward, open_package
from cooperllm.device.package import Package
from cooperllm.errors import ConfigError
from cooperllm.link.fleet_node import Server, serve

LINK_MIB = 24.0
"""Of a memory limit, for what a trial does not have: TLS, threads that fetch and send, messages under way, the replica. Seen: 15 to 23."""

_log = logging.getLogger(__name__)


def run_device_process(settings: DeviceSettings, stop: threading.Event) -> None:
    """Takes part in a run until told to stop.

    Args:
        settings: Of this device.
        stop: Set when it is to end.

    Raises:
        ConfigError: If a file does not fit the run.
        PackageError: If the package cannot be used.
        LinkError: If the edge does not let this device in.
    """
    job = read_job(settings.job)
    host = opened(settings, job)
    edge = Server(address=settings.edge, key=settings.key, authority=settings.authority, certificate=settings.node_certificate)
    serve(edge, host.answer, stop, 1 + job.config.federation.staleness)


def opened(settings: DeviceSettings, job: Job) -> Host:
    """Opens a device's package, its texts and what it has kept of the run.

    Args:
        settings: Of this device.
        job: Of the run.

    Returns:
        What answers orders.

    Raises:
        ConfigError: If a file does not fit the run.
        PackageError: If the package cannot be used.
    """
    package = _package(settings, job.config.federation.batch_size)
    if package.manifest.num_parameters != job.num_parameters:
        raise ConfigError(
            f"{settings.package}: found a package of {package.manifest.num_parameters} parameters, expected {job.num_parameters} as in "
            f"{settings.job}; write a package with the settings of the run"
        )
    examples = read_texts(settings.data, package)
    device = OnnxForward(package, examples, range(len(examples)), job.config.activation_mib, job.config.federation.label_adjustment)
    start = replay.start(package.theta, job.config.optimizer)
    kept = StateFile(settings.state / "replica.bin")
    latest = kept.read(start)
    host = Host(
        {settings.number: device}, lambda: start, job.config.optimizer, tuple[()], job.config.slope_method, keep=kept.write, latest=latest
    )
    _log.info(
        "device %d: %d texts, %d of them cut at %d tokens; version %d",
        settings.number,
        len(examples),
        examples.num_cut,
        package.manifest.max_tokens,
        (latest or start).model_version,
    )
    return host


def read_texts(file: Path, package: Package) -> Encoded:
    """Reads private texts and tokenises them as the package says.

    Args:
        file: A JSON object a line: text, text2 for pairs, and label; for next tokens completion, or nothing to learn the texts themselves.
        package: Of the device.

    Returns:
        Examples.

    Raises:
        ConfigError: If the file is missing, empty, or a line is something else.
    """
    names = {name: number for number, name in enumerate(package.manifest.label_names)}
    target = "label" if package.manifest.frame is None else "completion"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
        texts = [_field(row, "text", str) for row in rows]
        labels = [_label(row["label"], names) for row in rows] if target == "label" else []
        seconds, completions = ([_field(row, name, str) for row in rows if name in row] for name in ("text2", "completion"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); expected a JSON object with text and {target} a line") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: found a line that is no JSON object with text and {target} ({error}); mend it") from error
    if not rows or not {len(seconds), len(completions)} <= {0, len(rows)}:
        raise ConfigError(
            f"{file}: found {len(rows)} texts, {len(seconds)} with text2, {len(completions)} with completion, expected at least one text, "
            "and the others in all or none"
        )
    return package.encode(texts, seconds or None, labels, completions or None)


def _label(found: Any, names: dict[str, int]) -> int:
    return found if isinstance(found, int) else names[str(found)]


def _field(row: Any, name: str, kind: type) -> Any:
    if not isinstance(row[name], kind):
        raise TypeError(f"{name} is {type(row[name]).__name__}")
    return row[name]


def _package(settings: DeviceSettings, batch_size: int) -> Package:
    """Opens the package, with settings that fit the memory that the device may take."""
    if settings.memory_mib is None:
        return open_package(settings.package, num_threads=settings.threads)
    choice, _ = govern(
        settings.package,
        settings.memory_mib - LINK_MIB,
        settings.state,
        states_quota_mib=settings.cache_mib,
        batch_size=batch_size,
        num_threads=settings.threads,
        imports=(__name__,),
    )
    _log.info("device %d: %s, %.0f MiB", settings.number, ", ".join(choice.settings.words), choice.findings.peak_mib)
    return open_package(settings.package, choice.settings, num_threads=settings.threads)
