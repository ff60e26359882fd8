"""Deployments for tests: prepared once, copied for each test with ports of its own, started, watched and ended."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cooperllm
from cooperllm.config import ArmName, EngineName, RuntimeName
from cooperllm.deployment.enrolment import Places
from cooperllm.deployment.together import prepare
from cooperllm.run_directory import RunDirectory

TIMEOUT_S = 120


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


def with_staleness(deployment):
    """The same deployment, whose devices may be a round behind."""
    for file in (*deployment.glob("*/job.json"), deployment / "cloud" / "run" / "config.json"):
        text = file.read_text()
        changed = re.sub(r'"staleness": ?0', '"staleness": 1', text)
        assert changed != text, file
        file.write_text(changed)
    return deployment


def simulated_in(path, prepared, rounds, staleness=0):
    """The same run in one process, with the same package: its digests, round by round."""
    config = config_of(rounds)
    RunDirectory.create(path, replace(config, federation=replace(config.federation, staleness=staleness)))
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
        text = file.read_text()
        for old, new in zip((1, 2, 3), ports, strict=True):
            text = text.replace(f'"127.0.0.1:{old}"', f'"127.0.0.1:{new}"')
        file.write_text(text)
    return path


def hashes(run):
    return [row["theta_hash"] for row in RunDirectory(run).rounds()]


def started(kind, folder):
    with (folder / f"{kind}.log").open("ab") as said:
        return subprocess.Popen([sys.executable, "-m", "cooperllm", kind, str(folder / f"{kind}.toml")], stdout=said, stderr=said)


@contextlib.contextmanager
def cloud_of(deployment):
    process = started("cloud", deployment / "cloud")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


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
