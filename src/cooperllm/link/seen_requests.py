"""Which signed requests of a node have been seen, so that none has an effect twice.

A node signs each request's time, never the same twice (`fleet_node`). Flower's server checks the signature and that the time is neither
older than five minutes nor in the future; a request that somebody has recorded would pass as often as it is sent. Here the latest times
are remembered, and what is older than all of them is not taken: neither memory nor patience has to be long.
"""

import bisect
import datetime

KEPT = 512
"""Times that are remembered of a node: it asks for work every two seconds at most, so that a request which takes Flower's five minutes to
arrive is overtaken by 150 of its questions and some hundred parts; what is overtaken by more is refused, and the node comes back."""


class SeenRequests:
    """The signed requests of one node.

    Example:
        >>> noon = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
        >>> seen = SeenRequests(since=noon)
        >>> later = noon + datetime.timedelta(seconds=1)
        >>> seen.admit(later), seen.admit(later), seen.admit(noon)
        (True, False, False)
    """

    def __init__(self, since: datetime.datetime, kept: int = KEPT) -> None:
        """Begins with nothing seen.

        Args:
            since: What was signed until then is refused: it may have been seen by whoever served before.
            kept: Times to remember, >= 1.
        """
        self._floor, self._kept = since, kept
        self._times: list[datetime.datetime] = []

    def admit(self, signed_at: datetime.datetime) -> bool:
        """Notes a request.

        Args:
            signed_at: The time in it, after its signature was found right.

        Returns:
            Whether it is the first with that time, and not older than all that are remembered.
        """
        if signed_at <= self._floor:
            return False
        place = bisect.bisect_left(self._times, signed_at)
        if place < len(self._times) and self._times[place] == signed_at:
            return False
        self._times.insert(place, signed_at)
        if len(self._times) > self._kept:
            self._floor = self._times.pop(0)
        return True
