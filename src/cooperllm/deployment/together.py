"""A whole deployment on one machine: what `cooperllm enroll` writes, the package, every device's texts, and all processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from cooperllm.assembly import VARIANTS, Material, write_device_package
from cooperllm.config import EngineName, Objective, RunConfig, RuntimeName
from cooperllm.deployment.cloud_process import check_deployable
from cooperllm.deployment.enrolment import Places, enroll
from cooperllm.deployment.settings import Job
from cooperllm.errors import ConfigError
from cooperllm.process_log import LogFormat
from cooperllm.run_directory import RunDirectory

END_TIMEOUT_S = 20.0


def prepare(directory: Path, config: RunConfig, places: Places, *, has_texts: bool) -> None:
    """Writes everything that the processes of a run need.

    Args:
        directory: A missing or empty directory.
        config: The run's settings.
        places: Where cloud and edges will listen.
        has_texts: Whether each device gets its part of the run's private texts, as on one machine; elsewhere devices have theirs.

    Raises:
        ConfigError: If a setting, an address or the directory will not do.
    """
    check_deployable(config)
    runtime = RuntimeName.ONNX if config.runtime is RuntimeName.TORCH else config.runtime
    config = replace(config, engine=EngineName.FLEET, runtime=runtime)
    if len(places.edges) != config.federation.num_edges:
        raise ConfigError(f"edges: found {len(places.edges)} addresses, expected {config.federation.num_edges} (federation.num_edges)")
    material = Material(config)
    material.check([config.arm.name])
    enroll(directory, Job(config=config, num_parameters=material.model.layout.size), places)
    RunDirectory.create(directory / "cloud" / "run", config)
    write_device_package(config, material, directory / "package", VARIANTS[config.runtime])
    for number, shard in enumerate(material.shards if has_texts else ()):
        own = material.task.private.take(shard.tolist())
        targets = {"label": own.labels} if config.model.objective is not Objective.NEXT_TOKEN else {"completion": own.completions}
        columns = {"text": own.texts, "text2": own.second_texts} | targets
        given = {name: values for name, values in columns.items() if values is not None}
        rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"device-{number}" / "texts.jsonl").write_text(lines, encoding="utf8")


@contextlib.contextmanager
def edges_and_devices(directory: Path, log_format: LogFormat = LogFormat.TEXT) -> Generator[Sequence["subprocess.Popen[bytes]"]]:
    """Runs every edge and device of a directory in a process of its own, each with its words in a file beside its settings.

    Args:
        directory: Written by `prepare`.
        log_format: What its words are.

    Yields:
        The processes; they are stopped at the end.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_running(kind, folder, log_format))
            for kind in ("edge", "device")
            for folder in sorted(directory.glob(f"{kind}-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        ]
        try:
            yield running
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _running(kind: str, folder: Path, log_format: LogFormat) -> Generator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "cooperllm", kind, str(folder / f"{kind}.toml"), "--log-format", log_format]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with (folder / f"{kind}.log").open("ab") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        try:
            yield process
        finally:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
