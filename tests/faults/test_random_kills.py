"""Twenty random sequences of kills: each ends with the bits of an undisturbed run, no round lost and none applied twice.

Anybody may be killed, at any moment: the cloud, an edge, a device, with or without its disk; it is started again at once. Whoever waits
for it gives it what it had been given before, so that the same devices take part in every round.

Run: make faults
"""

import random
import shutil
import signal
import time

import pytest
from deployments import copied, ended, hashes, prepared_in, rounds_done, simulated_in, started, wait_for, words

from cooperllm.algorithm import replay
from cooperllm.config import OptimizerConfig
from cooperllm.deployment.state_file import StateFile
from cooperllm.device.onnx_forward import open_package
from cooperllm.run_directory import RunDirectory

ROUNDS, KILLS = 30, 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_in(tmp_path_factory.mktemp("prepared") / "all", ROUNDS)


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    return simulated_in(tmp_path_factory.mktemp("simulated") / "run", prepared, ROUNDS)


def killings(seed, victims):
    """(after which round, how long after it, who, whether its disk is lost), in order."""
    drawn = random.Random(seed)
    found = [(drawn.randrange(1, ROUNDS - 2), drawn.uniform(0, 0.5), drawn.choice(victims), drawn.random() < 0.5) for _ in range(KILLS)]
    return sorted(found)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_survives(seed, prepared, undisturbed, tmp_path, record_property):
    deployment = copied(prepared, tmp_path / "all")
    folders = {folder.name: folder for folder in deployment.iterdir() if folder.name.partition("-")[0] in {"cloud", "edge", "device"}}
    running = {name: started(name.partition("-")[0], folder) for name, folder in folders.items()}
    told = []
    try:
        for after, delay, victim, loses_disk in killings(seed, sorted(folders)):
            wait_for(lambda after=after: rounds_done(deployment) >= after or running["cloud"].poll() is not None, "the run stands still")
            time.sleep(delay)
            told.append(f"{victim} after round {rounds_done(deployment)}{', disk lost' if loses_disk and 'device' in victim else ''}")
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            if loses_disk and "device" in victim:
                shutil.rmtree(folders[victim] / "state", ignore_errors=True)
            running[victim] = started(victim.partition("-")[0], folders[victim])
        ended(running["cloud"], deployment)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    record_property("killed", "; ".join(told))
    run = RunDirectory(deployment / "cloud" / "run")
    assert [row["round"] for row in run.rounds()] == list(range(1, ROUNDS + 1))
    assert [update.model_version for update in run.updates()] == list(range(ROUNDS))
    assert hashes(run.path) == undisturbed, (told, words(deployment))
    start = replay.start(open_package(deployment / "package").theta, OptimizerConfig(kind=run.config().optimizer.kind))
    for name, folder in folders.items():
        if "device" in name and (kept := StateFile(folder / "state" / "replica.bin").read(start)) is not None:
            assert kept.state_hash.hex() == [start.state_hash.hex(), *undisturbed][kept.model_version], name
