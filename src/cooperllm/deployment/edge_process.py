"""An edge in a process of its own: a node towards the cloud, a server towards its devices."""

import logging
import threading

from cooperllm.deployment.enrolment import read_public_keys
from cooperllm.deployment.settings import CloudSettings, EdgeSettings, host_and_port, read_job
from cooperllm.edge import Edge, Schedule
from cooperllm.link.fleet_link import fleet_links
from cooperllm.link.fleet_node import Server, serve
from cooperllm.link.fleet_server import Address, FleetServer
from cooperllm.link.supernode import signed_pointer
from cooperllm.link.tls import Certificate
from cooperllm.tiers import EdgeHost

_log = logging.getLogger(__name__)


def run_edge_process(settings: EdgeSettings, stop: threading.Event) -> None:
    """Serves devices and answers the cloud until told to stop.

    Args:
        settings: Of this edge.
        stop: Set when it is to end.

    Raises:
        ConfigError: If a file is missing or is not what it should be.
        LinkError: If the port is taken, or the cloud does not let this edge in.
    """
    job, keys = read_job(settings.job), read_public_keys(settings.devices)
    with open_server(keys, settings) as server:
        _log.info("edge %d: listening on %s for devices %s", settings.number, server.address, sorted(keys))
        edge = Edge(settings.number, sorted(keys), job.num_parameters)
        federation = job.config.federation
        schedule = Schedule(job.num_parameters, federation.staleness, adapts=federation.adapts_bits)
        links = fleet_links(server, "device", settings.round_timeout_s, federation.over_selection)
        host = EdgeHost(edge, links, job.config.optimizer, schedule)
        cloud = Server(address=settings.cloud, key=settings.key, authority=settings.authority, certificate=settings.node_certificate)
        at_once = 1 + federation.staleness
        serve(cloud, host.answer, stop, at_once, at_once)


def open_server(keys: dict[int, bytes], settings: CloudSettings | EdgeSettings) -> FleetServer:
    """Opens the port of a tier.

    Args:
        keys: Public keys of the nodes that may come in.
        settings: Of the tier: where it listens, what it shows, and whether nodes show something.

    Returns:
        The server, a context.

    Raises:
        ConfigError: If there is no signature where one is named.
        LinkError: If the port is taken or a file is missing.
    """
    host, port = host_and_port(settings.listen, "listen")
    chain, key = settings.certificate, settings.certificate_key
    certificate = None if chain is None or key is None else Certificate(chain=chain, key=key, node_authority=settings.node_authority)
    signature = settings.supernode if isinstance(settings, EdgeSettings) else None
    fab = None if signature is None else signed_pointer(signature)
    return FleetServer(keys, Address(host=host, port=port), certificate, fab)
