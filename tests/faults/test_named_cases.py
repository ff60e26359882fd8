"""What may happen to a deployment, by name: each run ends with the bits of an undisturbed one, no round lost and none applied twice.

A round is under way whenever something happens: all devices are stopped before, and go on after. The cloud's server and its app are one
process (`link/fleet_server.py`): to kill the one is to kill the other. A cut link is a proxy in the test that forwards nothing.

Run: make faults SEQUENCES=0
"""

import contextlib
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from cuttable_link import Cut, CuttableLink
from deployments import (
    Fleet,
    check_survived,
    copied,
    port_in,
    prepared_in,
    replace_port,
    rounds_done,
    simulated_in,
    with_staleness,
)

from cooperllm.run_directory import RunDirectory

ROUNDS, AFTER = 10, 3
UNDER_WAY_S, CUT_S = 1.0, 6.0
"""How long after the devices were stopped something happens, and how long a link is cut: longer than a node's question stays open, and
than a node waits before it looks for its server again; shorter than its server's patience."""

SMALL_BYTES = 2048
"""A disk with room for a device's words of a round or two, and not for its replica."""


@dataclass(frozen=True)
class Scene:
    """What a case may touch.

    Attributes:
        fleet: All processes.
        asked: Devices of the round under way, by name.
        links: The cuttable links.
    """

    fleet: Fleet
    asked: Sequence[str]
    links: Sequence[CuttableLink]

    def kill_and_start(self, *names):
        self.fleet.kill(*names)
        self.fleet.start(*names)


@dataclass(frozen=True)
class Case:
    """Something that happens.

    Attributes:
        happens: Does it, with a round under way.
        linked: Settings files whose servers are reached through cuttable links: (pattern, name of the address).
        started: Starts single processes otherwise before the run begins.
        check: Looks at the end whether it has really happened.
    """

    happens: Callable[[Scene], object] = lambda _: None
    linked: tuple[str, str] | None = None
    started: Callable[[Fleet], object] = lambda _: None
    check: Callable[[Fleet], object] = lambda _: None


def lose_disk(scene):
    victim = scene.asked[0]
    scene.fleet.kill(victim)
    shutil.rmtree(scene.fleet.folders[victim] / "state")
    scene.fleet.start(victim)


def cut(how):
    def happens(scene):
        for link in scene.links:
            link.cut(how)
        time.sleep(CUT_S)
        for link in scene.links:
            link.heal()

    return happens


def with_a_full_disk(fleet):
    fleet.kill("device-1")
    shutil.rmtree(fleet.folders["device-1"] / "state", ignore_errors=True)
    fleet.start("device-1")
    resource.prlimit(fleet.running["device-1"].pid, resource.RLIMIT_FSIZE, (SMALL_BYTES, SMALL_BYTES))


def has_written_nothing(fleet):
    assert "not written" in (fleet.folders["device-1"] / "device.log").read_text()
    assert not (fleet.folders["device-1"] / "state" / "replica.bin").exists()


def with_a_wrong_clock(hours):
    def begun(fleet):
        program = (
            "import datetime; from cooperllm.link import fleet_node; right = fleet_node._now;"
            f"fleet_node._now = lambda: right() + datetime.timedelta(hours={hours});"
            "from cooperllm.cli import main; main()"
        )
        fleet.kill("device-1")
        fleet.start("device-1", program=("-c", program))

    return begun


def has_seen_the_clock(fleet):
    assert "off the server's, whose time is used" in (fleet.folders["device-1"] / "device.log").read_text()


CLOUD_TO_EDGES, EDGES_TO_DEVICES = ("edge-*/edge.toml", "cloud"), ("device-*/device.toml", "edge")
CASES = {
    "nothing happens": Case(),
    "a device is killed": Case(lambda scene: scene.kill_and_start(scene.asked[0])),
    "a device is killed and its disk lost": Case(lose_disk),
    "all devices of the round are killed": Case(lambda scene: scene.kill_and_start(*scene.asked)),
    "an edge is killed": Case(lambda scene: scene.kill_and_start("edge-0")),
    "both edges are killed": Case(lambda scene: scene.kill_and_start("edge-0", "edge-1")),
    "the cloud is killed": Case(lambda scene: scene.kill_and_start("cloud")),
    "the cloud and an edge are killed": Case(lambda scene: scene.kill_and_start("cloud", "edge-1")),
    "everybody is killed": Case(lambda scene: scene.kill_and_start(*scene.fleet.folders)),
    "links from cloud to edges go silent": Case(cut(Cut.SILENT), CLOUD_TO_EDGES),
    "links from cloud to edges are reset": Case(cut(Cut.RESET), CLOUD_TO_EDGES),
    "links from edges to devices go silent": Case(cut(Cut.SILENT), EDGES_TO_DEVICES),
    "links from edges to devices are reset": Case(cut(Cut.RESET), EDGES_TO_DEVICES),
    "a device's disk is full": Case(started=with_a_full_disk, check=has_written_nothing),
    "a device's clock is an hour behind": Case(started=with_a_wrong_clock(-1), check=has_seen_the_clock),
    "a device's clock is an hour ahead": Case(started=with_a_wrong_clock(1), check=has_seen_the_clock),
}
WITH_STALENESS = [name for name in CASES if "clock" not in name and "disk is full" not in name]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_in(tmp_path_factory.mktemp("prepared") / "all", ROUNDS)


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Digests by staleness, and who takes part in each round."""
    paths = [tmp_path_factory.mktemp("simulated") / "run" for _ in range(2)]
    digests = [simulated_in(path, prepared, ROUNDS, staleness=staleness) for staleness, path in enumerate(paths)]
    return digests, [row["answered"] for row in RunDirectory(paths[0]).rounds()]


@contextlib.contextmanager
def links_of(case, deployment):
    """Each node of the case reaches its server through a link of its own."""
    with contextlib.ExitStack() as stack:
        links = []
        for file in sorted(deployment.glob(case.linked[0])) if case.linked else ():
            port = port_in(file, case.linked[1])
            links.append(stack.enter_context(CuttableLink(port)))
            replace_port(file, port, links[-1].port)
        yield links


@pytest.mark.parametrize(("staleness", "name"), [*((0, name) for name in CASES), *((1, name) for name in WITH_STALENESS)])
def test_a_run_survives(staleness, name, prepared, undisturbed, tmp_path, record_property):
    record_property("case", f"{name}{', two rounds under way' if staleness else ''}")
    case, (digests, answered) = CASES[name], undisturbed
    deployment = copied(prepared, tmp_path / "all")
    if staleness:
        with_staleness(deployment)
    with links_of(case, deployment) as links, Fleet(deployment) as fleet:
        case.started(fleet)
        fleet.wait_for_rounds(AFTER)
        with fleet.all_devices_stopped():
            time.sleep(UNDER_WAY_S)
            done = rounds_done(deployment)
            assert done < ROUNDS, "the round that something was to happen in is over"
            case.happens(Scene(fleet=fleet, asked=[f"device-{number}" for number in answered[done]], links=links))
        fleet.ended()
        case.check(fleet)
    check_survived(deployment, digests[staleness], name)
