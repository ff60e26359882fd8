"""Random sequences of kills: each ends with the bits of an undisturbed run, no round lost and none applied twice.

Anybody may be killed, at any moment: the cloud, an edge, a device, with or without its disk; it is started again at once. Whoever waits
for it gives it what it had been given before, so that the same devices take part in every round.

Run: make faults SEQUENCES=20
"""

import os
import random
import shutil
import time

import pytest
from deployments import Fleet, check_survived, copied, kind_of, prepared_in, rounds_done, simulated_in

ROUNDS, KILLS = 30, 4
SEQUENCES = int(os.environ.get("COOPERLLM_FAULT_SEQUENCES", "20"))


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


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_a_run_survives(seed, prepared, undisturbed, tmp_path, record_property):
    told = []
    with Fleet(copied(prepared, tmp_path / "all")) as fleet:
        for after, delay, victim, loses_disk in killings(seed, sorted(fleet.folders)):
            fleet.wait_for_rounds(after)
            time.sleep(delay)
            loses_disk = loses_disk and kind_of(victim) == "device"
            told.append(f"{victim} after round {rounds_done(fleet.path)}{', disk lost' if loses_disk else ''}")
            fleet.kill(victim)
            if loses_disk:
                shutil.rmtree(fleet.folders[victim] / "state", ignore_errors=True)
            fleet.start(victim)
        fleet.ended()
    record_property("case", f"sequence {seed}: {'; '.join(told)}")
    check_survived(fleet.path, undisturbed, told)
