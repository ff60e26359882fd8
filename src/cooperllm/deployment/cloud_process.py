"""The cloud in a process of its own: a run whose edges are elsewhere."""

import logging
from collections.abc import Mapping
from typing import Any

from cooperllm.config import RunConfig
from cooperllm.deployment.edge_process import open_server
from cooperllm.deployment.enrolment import read_public_keys
from cooperllm.deployment.settings import CloudSettings
from cooperllm.edge import devices_of
from cooperllm.errors import ConfigError
from cooperllm.link.fleet_link import fleet_links
from cooperllm.run_directory import RunDirectory
from cooperllm.session import Observer, Run, deployed
from cooperllm.tiers import Received, RemoteEdges

WAIT_S = 2.0
_log = logging.getLogger(__name__)


def run_cloud_process(settings: CloudSettings, observe: Observer | None = None) -> Run:
    """Trains to the end of the run, from wherever its log ends.

    Args:
        settings: Of the cloud.
        observe: Called after every round.

    Returns:
        The finished run.

    Raises:
        ConfigError: If a file is missing, or the run asks for what deployments do not do.
        LinkError: If the port is taken.
        RunDirectoryError: If the run's files are damaged.
    """
    config = RunDirectory(settings.run).config()
    check_deployable(config)
    keys = read_public_keys(settings.edges)
    with open_server(keys, settings) as server:
        _log.info("cloud: listening on %s for edges %s", server.address, sorted(keys))
        links = fleet_links(server, "edge", settings.round_timeout_s)

        def send(orders: Mapping[int, bytes]) -> Received:
            link = links()
            return Received(data=link.send(orders.items()), spent=link.spent)

        federation = config.federation
        devices = {number: devices_of(number, federation.num_edges, federation.num_devices) for number in sorted(keys)}
        return deployed(settings.run, RemoteEdges(devices, send), observe, wait_s=WAIT_S)


def log_round(config: RunConfig, figures: Mapping[str, Any]) -> None:
    """Says that a round is over, with its figures for whoever collects them.

    Args:
        config: The run's settings.
        figures: Of the round, as in rounds.jsonl.
    """
    _log.info("round %d of %d is over", figures["round"], config.num_rounds, extra={"figures": dict(figures)})


def check_deployable(config: RunConfig) -> None:
    """Refuses what only simulations do.

    Args:
        config: A run's settings.

    Raises:
        ConfigError: If devices would have to back-propagate through everything, or edges to keep maps.
    """
    if config.arm.name.value.startswith("fedavg-bp"):
        raise ConfigError(
            f"arm.name: found {config.arm.name.value}, expected an arm whose devices run forward: a device package does no more"
        )
    if config.arm.map_examples:
        raise ConfigError(
            f"arm.map_examples: found {config.arm.map_examples}, expected 0: an edge that comes back would lack the maps sent before"
        )
