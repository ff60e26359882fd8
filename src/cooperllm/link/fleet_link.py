"""The link to nodes in processes of their own, one for each round that is under way: `flower.GridLink` on a `fleet_server`."""

import math
import time
from collections.abc import Callable, Iterable

from cooperllm.link.envelope import unstamp
from cooperllm.link.fleet_server import FleetServer
from cooperllm.link.flower import LATE, POLL_S, GridLink
from cooperllm.messages import Spent

RETURN_S, PATIENCE_S = 10.0, 30.0
LOOK_S = 0.5
"""How often all nodes and messages are gone through, for who has gone and what Flower answers for whom; a node's answer is seen at once."""


class FleetLink(GridLink):
    """The link to nodes in processes of their own: who is there when a round begins is asked. Its times count from when it was made.

    In the beginning it waits for those that are to be asked: all are started at once, and come back to a server one by one.
    """

    def __init__(
        self, server: FleetServer, whom: str, timeout_s: float, patience_s: float = PATIENCE_S, over_selection: float = 1.0
    ) -> None:
        super().__init__(server.grid, len(server.nodes), timeout_s)
        self.whom, self._server, self._patient_until = whom, server, time.monotonic() + patience_s
        self._seen: dict[int, float] = {}
        self._looked, self._asked_all = -math.inf, -math.inf
        self._made, self._sent = time.monotonic(), dict[int, float]()
        self._over_selection, self._enough = over_selection, 0

    def _push(self, label: int, node_id: int, kind: str, data: bytes, ttl: float) -> dict[str, int]:
        self._sent[label] = time.monotonic() - self._made
        return super()._push(label, node_id, kind, data, ttl)

    def _opened(self, number: int, data: bytes) -> bytes:
        """Notes a node's times; the rest of the time since the message left is its way back."""
        answer, times = unstamp(data)
        begun_s = self._sent[number]
        returned_s = max(0.0, time.monotonic() - self._made - begun_s - sum(times))
        self.spent[number] = Spent(
            node=number, begun_s=begun_s, received_s=times[0], waited_s=times[1], worked_s=times[2], returned_s=returned_s
        )
        return answer

    def send(self, packed: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
        """Sends bytes to those nodes that are there, and waits for what they answer."""
        messages = dict(packed)
        self._enough, self.spent = math.ceil(len(messages) / self._over_selection), {}
        while not set(messages) <= self._server.online() and self._wait(self._patient_until):
            pass
        return super().send(messages.items())

    def _find_nodes(self) -> None:
        self._nodes = {number: self._server.nodes[number] for number in self._server.online()}
        self._seen = dict.fromkeys(self._nodes, time.monotonic())

    def _give_up(self, message_id: str) -> None:
        self._server.forget(message_id)

    def _wait(self, deadline: float) -> bool:
        self._server.wait_for_news(POLL_S)
        return time.monotonic() < deadline

    def _worth_asking(self, pending: dict[str, int]) -> list[str]:
        now = time.monotonic()
        if now - self._asked_all < LOOK_S:
            return self._server.worth_asking(pending)
        self._asked_all = now
        return list(pending)

    def _is_gone(self, number: int) -> bool:
        """A node that has said goodbye, or sent no heartbeat for a minute, has some seconds to come back."""
        if len(self.spent) >= self._enough:
            self.lost_reasons[number] = LATE
            return True
        now = time.monotonic()
        if now - self._looked > LOOK_S:
            self._looked = now
            self._seen |= dict.fromkeys(self._server.online(), now)
        if now - self._seen[number] > RETURN_S:
            self.lost_reasons[number] = "went away"
        return now - self._seen[number] > RETURN_S


def fleet_links(server: FleetServer, whom: str, timeout_s: float, over_selection: float = 1.0) -> Callable[[], FleetLink]:
    """Says how rounds that are under way at the same time reach the same nodes.

    Args:
        server: The nodes' server.
        whom: What the nodes are, for people.
        timeout_s: Seconds after which a node that has not answered is lost to the round.
        over_selection: Nodes that are asked for each one that is waited for, >= 1.

    Returns:
        Makes a link; those made within half a minute from now wait that long for nodes that are still on their way.
    """
    patient_until = time.monotonic() + PATIENCE_S
    return lambda: FleetLink(server, whom, timeout_s, max(0.0, patient_until - time.monotonic()), over_selection)
