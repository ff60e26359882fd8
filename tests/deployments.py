"""Deployments for tests: prepared once, copied for each test with ports of its own, started, watched and ended."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import cooperllm
from cooperllm.algorithm import replay
from cooperllm.config import ArmName, EngineName, OptimizerConfig, RuntimeName
from cooperllm.deployment.enrolment import Places
from cooperllm.deployment.state_file import StateFile
from cooperllm.deployment.together import prepare
from cooperllm.device.onnx_forward import open_package
from cooperllm.process_log import LogFormat
from cooperllm.run_directory import RunDirectory

TIMEOUT_S, END_TIMEOUT_S = 120, 20


def config_of(rounds):
    found = cooperllm.recipe("tiny").with_arm(ArmName.FEEDBACK)
    return replace(found, num_rounds=rounds, runtime=RuntimeName.ONNX, engine=EngineName.LOOPBACK)


def prepared_in(path, rounds):
    """In a process of its own, where the exporter is three times as fast as in a fixture under pytest."""
    program = "import sys, deployments; deployments.prepare_here(sys.argv[1], int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", program, str(path), str(rounds)], check=True, cwd=Path(__file__).parent)
    return path


def prepare_here(path, rounds):
    places = Places(cloud="127.0.0.1:1", edges=("127.0.0.1:2", "127.0.0.1:3"))
    prepare(Path(path), config_of(rounds), places, has_texts=True)


def with_federation(deployment, **values):
    """The same deployment with other settings of its federation."""
    for file in (*deployment.glob("*/job.json"), deployment / "cloud" / "run" / "config.json"):
        found = json.loads(file.read_text())
        federation = found.get("config", found)["federation"]
        assert federation != federation | values, file
        federation |= values
        file.write_text(json.dumps(found))
    return deployment


def with_staleness(deployment):
    """The same deployment, whose devices may be a round behind."""
    return with_federation(deployment, staleness=1)


def simulated_in(path, prepared, rounds, **values):
    """The same run in one process, with the same package: its digests, round by round."""
    config = config_of(rounds)
    RunDirectory.create(path, replace(config, federation=replace(config.federation, **values)))
    shutil.copytree(prepared / "package", path / "package")
    cooperllm.resume(path)
    return hashes(path)


def copied(prepared, path):
    """A copy with ports that nobody has, and a new run."""
    shutil.copytree(prepared, path)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [one.getsockname()[1] for one in sockets]
    for file in path.glob("*/*.toml"):
        for old, new in zip((1, 2, 3), ports, strict=True):
            replace_port(file, old, new)
    return path


def replace_port(file, old, new):
    file.write_text(file.read_text().replace(f'"127.0.0.1:{old}"', f'"127.0.0.1:{new}"'))


def port_in(file, name):
    """The port of an address in a settings file."""
    return int(tomllib.loads(file.read_text())[name].rpartition(":")[2])


def hashes(run):
    return [row["theta_hash"] for row in RunDirectory(run).rounds()]


def started(kind, folder, log_format=LogFormat.TEXT, program=("-m", "cooperllm")):
    command = [sys.executable, *program, kind, str(folder / f"{kind}.toml"), "--log-format", log_format]
    with (folder / f"{kind}.log").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said)


@contextlib.contextmanager
def on_a_supernode(line, log, home):
    """A device on Flower's official SuperNode, with whatever that has started; killed at the end."""
    environment = os.environ | {"FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with log.open("ab") as said:
        process = subprocess.Popen(["sh", "-c", f"{line} --port {port}"], stdout=said, stderr=said, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def killed_at_the_end(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def cloud_of(deployment, log_format=LogFormat.TEXT):
    return killed_at_the_end(started("cloud", deployment / "cloud", log_format))


def rounds_done(deployment):
    return len((deployment / "cloud" / "run" / "rounds.jsonl").read_text().splitlines())


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def words(deployment):
    return "\n".join(f"{file.parent.name}: {file.read_text()}" for file in deployment.glob("*/*.log"))


def ended(process, deployment):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TIMEOUT_S)
    assert process.returncode == 0, words(deployment)


class Fleet:
    """All processes of a deployment by the names of their directories; a context, at whose end none is left.

    Attributes:
        path: The deployment.
        folders: Directory of each process.
        running: Each process.
    """

    def __init__(self, path):
        self.path, self.running = path, {}
        self.folders = {folder.name: folder for folder in path.iterdir() if kind_of(folder.name) in {"cloud", "edge", "device"}}

    def __enter__(self):
        self.start(*self.folders)
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
            process.kill()
            process.wait()

    def names(self, kind):
        return sorted(name for name in self.folders if kind_of(name) == kind)

    def start(self, *names, program=("-m", "cooperllm")):
        for name in names:
            self.running[name] = started(kind_of(name), self.folders[name], program=program)

    def kill(self, *names):
        for name in names:
            self.running[name].send_signal(signal.SIGKILL)
            self.running[name].wait()

    @contextlib.contextmanager
    def all_devices_stopped(self):
        """Meanwhile whatever round is under way stays so; a device that is killed and started again is not stopped."""
        stopped = [self.running[name] for name in self.names("device")]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)

    def wait_for_rounds(self, number):
        wait_for(lambda: rounds_done(self.path) >= number or self.running["cloud"].poll() is not None, f"{number} rounds: it stands still")

    def ended(self):
        ended(self.running["cloud"], self.path)


def kind_of(name):
    return name.partition("-")[0]


def check_survived(deployment, undisturbed, what):
    """Every round once and in order, with the digests of an undisturbed run, in the log and in what every device has kept."""
    run = RunDirectory(deployment / "cloud" / "run")
    assert [row["round"] for row in run.rounds()] == list(range(1, len(undisturbed) + 1)), what
    assert [update.model_version for update in run.updates()] == list(range(len(undisturbed))), what
    assert hashes(run.path) == undisturbed, (what, words(deployment))
    start = replay.start(open_package(deployment / "package").theta, OptimizerConfig(kind=run.config().optimizer.kind))
    for folder in deployment.glob("device-*"):
        if (kept := StateFile(folder / "state" / "replica.bin").read(start)) is not None:
            assert kept.state_hash.hex() == [start.state_hash.hex(), *undisturbed][kept.model_version], (what, folder.name)
