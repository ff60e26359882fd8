"""Three tiers as processes on this machine, with TLS and keys: the same bits as in one process, whoever is killed and comes back.

Run: pytest tests/system/test_deployment.py
"""

import contextlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from deployments import (
    TIMEOUT_S,
    cloud_of,
    copied,
    ended,
    hashes,
    killed_at_the_end,
    on_a_supernode,
    prepared_in,
    rounds_done,
    simulated_in,
    started,
    wait_for,
    with_federation,
    with_staleness,
    words,
)
from typer.testing import CliRunner

import cooperllm
from cooperllm.cli import app
from cooperllm.deployment.together import edges_and_devices
from cooperllm.errors import ConfigError
from cooperllm.process_log import LogFormat
from cooperllm.run_directory import RunDirectory

ROUNDS = 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_in(tmp_path_factory.mktemp("prepared") / "all", ROUNDS)


@pytest.fixture(scope="module")
def simulated_run(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "run"
    simulated_in(path, prepared, ROUNDS)
    return path


@pytest.fixture(scope="module")
def simulated(simulated_run):
    return hashes(simulated_run)


@pytest.fixture(scope="module")
def simulated_behind(prepared, tmp_path_factory):
    return simulated_in(tmp_path_factory.mktemp("behind") / "run", prepared, ROUNDS, staleness=1)


@pytest.fixture
def deployment(prepared, tmp_path):
    return copied(prepared, tmp_path / "all")


def test_processes_with_tls_and_keys_give_the_bits_of_one_process(deployment, simulated):
    with edges_and_devices(deployment), cloud_of(deployment) as cloud:
        ended(cloud, deployment)
    assert hashes(deployment / "cloud" / "run") == simulated
    assert json.loads((deployment / "cloud" / "run" / "summary.json").read_text())["arms"]["feedback"]["finished"]


def test_only_the_edge_with_a_device_of_the_round_is_asked_and_the_other_catches_up_when_it_is(deployment, prepared, tmp_path):
    """One device a round: its edge, which may have been left out for rounds, sends it what it would have been sent in one process."""
    simulated = simulated_in(tmp_path / "run", prepared, ROUNDS, devices_per_round=1)
    with edges_and_devices(with_federation(deployment, devices_per_round=1)), cloud_of(deployment) as cloud:
        ended(cloud, deployment)
    run, alone = RunDirectory(deployment / "cloud" / "run"), RunDirectory(tmp_path / "run")
    assert hashes(run.path) == simulated
    assert [row["bytes_down"] for row in run.rounds()] == [row["bytes_down"] for row in alone.rounds()]
    asked = [[edge["own"]["node"] for edge in row["edges"]] for row in run.times()]
    assert asked == [[device % 2 for device in row["answered"]] for row in alone.rounds()]
    assert {edge for edges in asked for edge in edges} == {0, 1}


def test_a_device_on_flowers_official_supernode_gives_the_same_bits(deployment, simulated_run, tmp_path):
    """Its process begins anew with every order, and goes on from what it has kept on its disk: it is sent no more than in one process."""
    line = commanded_here("admit-supernodes", deployment).splitlines()[0].replace("/device-0 ", "/official ")
    official = (deployment / "device-0").rename(deployment / "official")
    for idle in (2, 3):  # nobody asks them in the first three rounds
        (deployment / f"device-{idle}").rename(deployment / f"idle-{idle}")
    with edges_and_devices(deployment), on_a_supernode(line, official / "device.log", tmp_path / "flower"), cloud_of(deployment):
        wait_for(lambda: rounds_done(deployment) >= 3, words(deployment))
    run = RunDirectory(deployment / "cloud" / "run")
    found, alone = run.rounds()[:3], RunDirectory(simulated_run).rounds()[:3]
    assert [row["answered"] for row in found] == [[0, 1, 5], [0, 1, 5], [0, 4, 5]], words(deployment)
    for figure in ("theta_hash", "answered", "bytes_down"):
        assert [row[figure] for row in found] == [row[figure] for row in alone]
    worked_s = {device["node"]: device["worked_s"] for edge in run.times()[2]["edges"] for device in edge["devices"]}
    assert worked_s[0] > 0.3, "the start of its process is in it: a second of imports"


def commanded_here(*given):
    """In this process, since a new interpreter takes as long as some rounds."""
    done = CliRunner().invoke(app, [*map(str, given)])
    assert done.exit_code == 0, done.output
    return done.output


def secrets_of(deployment):
    """Lines of every private key, and every private text."""
    for key in deployment.glob("**/*.key"):
        yield from (line for line in key.read_text().splitlines() if "-----" not in line)
    for texts in deployment.glob("*/texts.jsonl"):
        yield from (json.loads(line)["text"] for line in texts.read_text().splitlines())


def test_logs_of_all_tiers_in_json_are_an_object_a_line_with_the_rounds_and_without_a_secret(deployment, simulated):
    """An edge is killed on the way, so that devices have something to tell."""
    with edges_and_devices(deployment, LogFormat.JSON) as processes, cloud_of(deployment, LogFormat.JSON) as cloud:
        wait_for(lambda: rounds_done(deployment) >= 2, words(deployment))
        processes[0].kill()
        processes[0].wait()
        with killed_at_the_end(started("edge", deployment / "edge-0", LogFormat.JSON)):
            ended(cloud, deployment)
    assert hashes(deployment / "cloud" / "run") == simulated
    said = {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in deployment.glob("*/*.log")}
    assert [line["figures"]["round"] for line in said["cloud"] if "figures" in line] == list(range(1, ROUNDS + 1))
    assert {line["process"] for name, lines in said.items() for line in lines if line["process"] != name.partition("-")[0]} == set()
    assert any("is away" in line["message"] for line in said["device-0"])
    told, secrets = words(deployment), set(secrets_of(deployment))
    assert len(secrets) > 20
    assert [secret for secret in secrets if secret in told] == []


def hashes_with_a_cloud_killed_after(rounds, deployment):
    with edges_and_devices(deployment):
        with cloud_of(deployment):
            wait_for(lambda: rounds_done(deployment) >= rounds, words(deployment))
        assert rounds_done(deployment) < ROUNDS
        with cloud_of(deployment) as again:
            ended(again, deployment)
    return hashes(deployment / "cloud" / "run")


def test_a_cloud_killed_in_the_middle_goes_on_where_its_log_ends(deployment, simulated):
    assert hashes_with_a_cloud_killed_after(2, deployment) == simulated


def test_with_rounds_under_way_together_the_bits_are_those_of_one_process(deployment, simulated, simulated_behind):
    with edges_and_devices(with_staleness(deployment)), cloud_of(deployment) as cloud:
        ended(cloud, deployment)
    assert hashes(deployment / "cloud" / "run") == simulated_behind
    assert simulated_behind[0] == simulated[0]
    assert simulated_behind[1] != simulated[1], "the second round starts from the first θ"
    assert [row["staleness"] for row in RunDirectory(deployment / "cloud" / "run").rounds()] == [0, *[1] * (ROUNDS - 1)]


def test_a_cloud_killed_with_two_rounds_under_way_begins_both_again(deployment, simulated_behind):
    assert hashes_with_a_cloud_killed_after(3, with_staleness(deployment)) == simulated_behind, words(deployment)


def commanded(*given):
    return subprocess.run([sys.executable, "-m", "cooperllm", *map(str, given)], capture_output=True, text=True, check=False)


def test_stop_ends_every_process_and_the_run_goes_on_when_they_are_started_again(deployment, simulated):
    with edges_and_devices(deployment) as processes:
        wait_for(lambda: (deployment / "edge-0" / "edge.pid").exists(), words(deployment))
        twice = commanded("edge", deployment / "edge-0" / "edge.toml")
        assert twice.returncode == 1
        assert "found a process that runs with these settings" in twice.stderr
        with cloud_of(deployment) as cloud:
            wait_for(lambda: rounds_done(deployment) >= 2, words(deployment))
            assert commanded_here("stop", deployment).count("ended: ") == 1 + 2 + 6
            assert cloud.wait(10) == 130
        assert [process.wait(10) for process in processes] == [0] * 8
    assert not list(deployment.glob("*/*.pid"))
    assert rounds_done(deployment) < ROUNDS
    with edges_and_devices(deployment), cloud_of(deployment) as again:
        ended(again, deployment)
    assert hashes(deployment / "cloud" / "run") == simulated


def test_devices_and_edges_killed_in_the_middle_come_back_with_or_without_their_disks(deployment):
    with edges_and_devices(deployment) as processes, cloud_of(deployment) as cloud:
        wait_for(lambda: rounds_done(deployment) >= 2, words(deployment))
        edge, device = processes[0], processes[3]
        for victim in (edge, device):
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        shutil.rmtree(deployment / "device-1" / "state")
        back = [started("edge", deployment / "edge-0"), started("device", deployment / "device-1")]
        try:
            ended(cloud, deployment)
        finally:
            for process in back:
                process.terminate()
                process.wait()
    run = deployment / "cloud" / "run"
    assert len(hashes(run)) == ROUNDS
    # Every digest of the log is checked again while it is replayed.
    assert cooperllm.resume(run).summary["arms"]["feedback"]["finished"]


def test_a_run_whose_devices_are_elsewhere_is_not_simulated_by_mistake(prepared):
    with pytest.raises(ConfigError, match="`cooperllm cloud` goes on with it"):
        cooperllm.resume(prepared / "cloud" / "run")


def test_nothing_but_the_fleet_paths_is_there_and_they_want_a_signature(deployment):
    with edges_and_devices(deployment):
        place = (deployment / "edge-0" / "edge.toml").read_text().split('listen = "')[1].split('"')[0]
        known = ssl.create_default_context(cafile=deployment / "authority" / "authority.pem")
        wait_for(lambda: is_open(place), words(deployment))
        with pytest.raises(httpx.TransportError):
            httpx.post(f"https://{place}/v1/fleet/pull-messages", verify=known)
        known.load_cert_chain(deployment / "device-0" / "node.pem", deployment / "device-0" / "node.key")

        def post(path, content=b"", **headers):
            return httpx.post(f"https://{place}{path}", content=content, headers=headers, verify=known).status_code

        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json"):
            assert post(path, **{"content-type": "application/protobuf"}) == 404, path
        for path in ("/v1/fleet/pull-messages", "/v1/fleet/register-node", "/v1/fleet/activate-node"):
            assert post(path, **{"content-type": "application/x-protobuf"}) in {401, 415}, path
        host, _, port = place.rpartition(":")
        with socket.create_connection((host, int(port))) as plain, known.wrap_socket(plain, server_hostname=host) as secure:
            secure.sendall(f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: {host}\r\nContent-Length: {1 << 40}\r\n\r\n".encode())
            assert secure.recv(64).startswith(b"HTTP/1.1 413")
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.post(f"https://{place}/v1/fleet/pull-messages")


def is_open(place):
    host, _, port = place.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def test_a_device_whose_key_is_not_enrolled_is_told_so(deployment):
    (deployment / "edge-0" / "devices" / "0.pem").unlink()
    with edges_and_devices(deployment) as processes:
        device = processes[2]
        device.wait(TIMEOUT_S)
    assert device.returncode == 1
    said = (deployment / "device-0" / "device.log").read_text()
    assert "does not let this node in: expected its key" in said
    assert "Traceback" not in said


def test_a_device_refuses_a_package_of_another_run(deployment):
    job = deployment / "device-0" / "job.json"
    job.write_text(job.read_text().replace('"num_parameters":', '"num_parameters":1'))
    command = [sys.executable, "-m", "cooperllm", "device", str(deployment / "device-0" / "device.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
    assert "write a package with the settings of the run" in done.stderr


def test_what_a_device_has_imported_is_not_pytorch(deployment):
    unwanted = ("torch", "transformers", "datasets", "uvicorn")
    program = f"import sys, cooperllm.deployment.device_process; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_process_of_a_tier_keeps_its_secrets_to_its_owner(prepared: Path):
    for key in [*prepared.glob("*/*.key"), *prepared.glob("*/*/*.key")]:
        assert key.stat().st_mode & 0o077 == 0, key
