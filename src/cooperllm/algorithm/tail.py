"""What receivers have missed: the updates since the version that each of them has, or a snapshot where that is shorter.

So nobody is ever sent more than a snapshot, and a sender keeps no more than that, however long a run is.
"""

from collections.abc import Collection, Mapping

from cooperllm.algorithm.replay import Replica
from cooperllm.messages import Snapshot, Update

UNKNOWN = -1
"""Version of a receiver that does not even have θ_0."""


class Tail:
    """The updates that a sender knows of, and what it knows of its receivers.

    Attributes:
        versions: Updates that each receiver has.
    """

    def __init__(self, versions: Mapping[int, int]) -> None:
        self.versions = dict(versions)
        self._expected: dict[int, int] = {}
        self._updates: dict[int, tuple[Update, int]] = {}

    def remember(self, update: Update, num_bytes: int) -> None:
        """Keeps an update for receivers that will need it.

        Args:
            update: Sealed update of a round that has closed.
            num_bytes: Its length on the link.
        """
        self._updates[update.model_version] = update, num_bytes

    def note(self, receivers: Collection[int], version: int) -> None:
        """Records that receivers have reached a version, also where word of a later one came first; who is not known here is left out."""
        self.versions |= {one: max(version, self.versions[one]) for one in receivers if one in self.versions}

    def fall_back(self, receiver: int, version: int) -> None:
        """Records what a receiver has said that it has, whatever was sent to it; who is not known here is left out."""
        self._expected.pop(receiver, None)
        if receiver in self.versions:
            self.versions[receiver] = version

    def expect(self, receivers: Collection[int], version: int) -> None:
        """Records that what leads receivers to a version is on its way: a message that is sent after it starts from there."""
        self._expected |= dict.fromkeys(receivers, version)

    def settle(self, receivers: Collection[int], version: int) -> None:
        """Records that what was on its way has arrived, or is lost: from here on only what is known counts."""
        self._expected = {one: sent for one, sent in self._expected.items() if one not in receivers or sent != version}

    def missed(self, receiver: int, replica: Replica) -> tuple[tuple[Update, ...], Snapshot | None]:
        """Finds what leads a receiver to a state.

        Args:
            receiver: One of `versions`.
            replica: The state.

        Returns:
            (updates, oldest first; None), or (nothing; a snapshot) where that is shorter or an update is not known. Who does not even have
            θ_0 gets a snapshot and, where they are shorter, all updates as well, for those that it serves in turn: they start from θ_0.

        Example:
            >>> import numpy as np
            >>> from cooperllm.algorithm import replay
            >>> from cooperllm.config import OptimizerConfig
            >>> start = replay.start(np.zeros(2, np.float32), OptimizerConfig())
            >>> Tail({7: 0}).missed(7, start)
            ((), None)
            >>> Tail({7: UNKNOWN}).missed(7, start)[1].model_version
            0
        """
        known = max(self.versions[receiver], self._expected.get(receiver, UNKNOWN))
        wanted = range(max(known, 0), replica.model_version)
        self._forget(replica.theta.nbytes * (1 + len(replica.moments)))
        is_whole = all(version in self._updates for version in wanted)
        updates = tuple(self._updates[version][0] for version in wanted) if is_whole else ()
        return updates, None if is_whole and known != UNKNOWN else replica.snapshot()

    def _forget(self, snapshot_bytes: int) -> None:
        """Drops updates that no tail shorter than a snapshot goes back to."""
        total = 0
        for version in sorted(self._updates, reverse=True):
            total += self._updates[version][1]
            if total > snapshot_bytes:
                del self._updates[version]
