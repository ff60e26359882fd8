"""What a device keeps of a run on its disk: its replica, replaced in one step, with a checksum."""

import logging
import zlib
from pathlib import Path

from cooperllm.algorithm import replay
from cooperllm.algorithm.replay import Replica
from cooperllm.errors import DecodeError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Snapshot
from cooperllm.whole_file import write_whole

CHECKSUM_BYTES = 4
_log = logging.getLogger(__name__)


class StateFile:
    """A replica on disk. What cannot be written or read is not needed: the edge sends it again."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self, start: Replica) -> Replica | None:
        """Reads what was kept.

        Args:
            start: Version 0, which says how long vectors are and how many.

        Returns:
            The replica, or None where there is none that can be used.
        """
        try:
            data = self._file.read_bytes()
            return replay.restore(decode(_checked(data), Snapshot), len(start.theta), len(start.moments))
        except FileNotFoundError:
            return None
        except (OSError, DecodeError) as error:
            _log.warning("%s: not used (%s); starting from version 0", self._file, error)
            return None

    def write(self, replica: Replica) -> None:
        """Keeps a replica; a full disk costs a snapshot after the next start, and nothing else."""
        content = encode(replica.snapshot())
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") + content)
        except OSError as error:
            _log.warning("%s: not written (%s)", self._file, error)


def _checked(data: bytes) -> bytes:
    if zlib.crc32(data[CHECKSUM_BYTES:]) != int.from_bytes(data[:CHECKSUM_BYTES], "little"):
        raise DecodeError("its checksum is wrong")
    return data[CHECKSUM_BYTES:]
