"""Where a device keeps what the frozen layers make of its texts: in memory, or on disk within a quota.

Both keep float32, so that a run has the same bits wherever they are. A file is the CRC-32 of what follows, and the states; it is named
after the text's tokens, in a directory named after the package, so that nothing of another package is ever read.
"""

import hashlib
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64

from cooperllm.whole_file import write_whole

CHECKSUM_BYTES = 4


class States(Protocol):
    """A store of the prefix's results."""

    def get(self, token_ids: Int64[np.ndarray, "T"]) -> Float32[np.ndarray, "T H"] | None:
        """Finds what the prefix made of a text, or None."""
        ...

    def put(self, token_ids: Int64[np.ndarray, "T"], states: Float32[np.ndarray, "T H"]) -> None:
        """Keeps it, where there is room."""
        ...


class StatesInMemory:
    """Keeps everything; equal texts once."""

    def __init__(self) -> None:
        self._known: dict[bytes, Float32[np.ndarray, "_T _H"]] = {}

    def get(self, token_ids: Int64[np.ndarray, "T"]) -> Float32[np.ndarray, "T H"] | None:
        """Finds what the prefix made of a text, or None."""
        return self._known.get(token_ids.tobytes())

    def put(self, token_ids: Int64[np.ndarray, "T"], states: Float32[np.ndarray, "T H"]) -> None:
        """Keeps it."""
        self._known[token_ids.tobytes()] = states


class StatesOnDisk:
    """Keeps as much as a quota and the disk allow; what finds no room, or has been damaged, is computed again when it is needed.

    Attributes:
        used_bytes: Of all files of the directory.
        num_refused: States that found no room.
        num_damaged: Times that a file was not what had been written.
    """

    def __init__(self, directory: Path, width: int, quota_bytes: int) -> None:
        """Opens a directory, or makes it.

        Args:
            directory: For the states of one package alone.
            width: Hidden size H of its model.
            quota_bytes: The most that files may take, >= 0.
        """
        self._directory, self._width, self._quota_bytes = directory, width, quota_bytes
        self.used_bytes = self.num_refused = self.num_damaged = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.used_bytes = sum(file.stat().st_size for file in directory.iterdir())
        except OSError:
            self._quota_bytes = 0  # nothing can be kept here; each state is counted as refused

    def get(self, token_ids: Int64[np.ndarray, "T"]) -> Float32[np.ndarray, "T H"] | None:
        """Finds what the prefix made of a text, or None."""
        file = self._file(token_ids)
        try:
            data = file.read_bytes() if file.stat().st_size == self._size(token_ids) else b""
        except FileNotFoundError:
            return None
        except OSError:
            data = b""
        if len(data) != self._size(token_ids) or zlib.crc32(data[CHECKSUM_BYTES:]) != int.from_bytes(data[:CHECKSUM_BYTES], "little"):
            self.num_damaged += 1
            return None
        return np.frombuffer(data, "<f4", offset=CHECKSUM_BYTES).reshape(len(token_ids), self._width).astype(np.float32, copy=False)

    def put(self, token_ids: Int64[np.ndarray, "T"], states: Float32[np.ndarray, "T H"]) -> None:
        """Keeps it, where there is room: the file appears whole or not at all."""
        content, file = states.astype("<f4", copy=False).tobytes(), self._file(token_ids)
        replaced = file.stat().st_size if file.is_file() else 0
        if self.used_bytes - replaced + CHECKSUM_BYTES + len(content) > self._quota_bytes:
            self.num_refused += 1
            return
        try:
            write_whole(file, zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") + content)
        except OSError:  # the disk is full, or was taken away
            self.num_refused += 1
            return
        self.used_bytes += CHECKSUM_BYTES + len(content) - replaced

    def _file(self, token_ids: Int64[np.ndarray, "T"]) -> Path:
        return self._directory / hashlib.sha256(token_ids.astype("<i8").tobytes()).hexdigest()

    def _size(self, token_ids: Int64[np.ndarray, "T"]) -> int:
        return CHECKSUM_BYTES + 4 * len(token_ids) * self._width
