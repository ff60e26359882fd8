"""A run on disk: nothing but the round under way can be lost.

    config.json      everything that decides the numbers
    replay.log       the header, then one record per round: length, CRC-32, MessagePack of the sealed update; appended, flushed, synced
    rounds.jsonl     one line of figures per round; a crash may leave it or the log one ahead, resume cuts both to the shorter
    checkpoint.bin   state every few rounds, replaced in one step; it only saves time, the log alone gives the same bits
    package/         the device package of a run whose devices use ONNX Runtime; removed by hand, it is written anew on resume
    summary.json, report.html, *.png, adapter/   made at the end

A record that ends early is a crash in the middle of a write: it is cut off on resume. A record whose checksum is wrong is damage: the run
is refused and nothing is overwritten.
"""

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.divergence import Good
from cooperllm.config import RunConfig, from_plain, to_plain
from cooperllm.errors import ConfigError, DecodeError, RunDirectoryError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import FORMAT_VERSION, Digest, Maps, Snapshot, Update
from cooperllm.whole_file import write_whole

MAGIC = b"CoopLog1"
RECORD = struct.Struct("<II")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What lets a resumed run skip the beginning of the log.

    Attributes:
        format_version: Version of messages and noise.
        config_hash: Digest of the configuration it belongs to.
        snapshot: Replica.
        pool: The cloud's pooled public gradients, newest first.
        maps: The cloud's feedback maps in use, whole ones and the differences since.
        good: Where a diverged run would go back to.
    """

    format_version: int
    config_hash: Digest
    snapshot: Snapshot
    pool: tuple[Float32[np.ndarray, "_n"], ...]
    maps: tuple[Maps, ...]
    good: Good


class RunDirectory:
    """The files of one run.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunDirectory":
        """Starts a run in an empty or missing directory.

        Args:
            path: Where.
            config: Settings.

        Returns:
            The directory, with its configuration and an empty log.

        Raises:
            RunDirectoryError: If something is there already, or nothing can be written.
        """
        refuse_taken(path)
        directory = cls(path)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            directory.write_json("config.json", to_plain(config))
            (path / "rounds.jsonl").touch()
            directory._append("replay.log", MAGIC)
        return directory

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keeps a second process from writing to the same run; whoever looks whether it is busy has the lock for an instant."""
        try:
            with filelock.FileLock(self.path / LOCK, timeout=1):
                yield
        except filelock.Timeout as error:
            raise RunDirectoryError(f"{self.path}: another process is writing to this run; wait for it or stop it") from error

    def is_busy(self) -> bool:
        """Tells whether a process is writing to the run."""
        if not (self.path / LOCK).exists():
            return False
        try:
            with filelock.FileLock(self.path / LOCK, timeout=0):
                return False
        except filelock.Timeout:
            return True

    def config(self) -> RunConfig:
        """Reads the settings.

        Returns:
            The configuration.

        Raises:
            RunDirectoryError: If the file is missing or damaged.
        """
        file = self.path / "config.json"
        try:
            return from_plain(json.loads(file.read_text(encoding="utf8")), where=str(file))
        except FileNotFoundError as error:
            raise RunDirectoryError(f"{file} does not exist: {self.path} is not a run directory") from error
        except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
            raise RunDirectoryError(
                f"{file} is damaged ({error}); restore it from a backup or start a new run; nothing was changed"
            ) from error

    def updates(self) -> list[Update]:
        """Reads the replay log; a record cut short by a crash is left out.

        Returns:
            Sealed updates, oldest first.

        Raises:
            RunDirectoryError: If the log is missing or a record is damaged.
        """
        return self._read_log()[0]

    def repair(self) -> list[Update]:
        """Cuts off what a crash left half written, in the log and in the figures.

        Returns:
            Sealed updates, oldest first.

        Raises:
            RunDirectoryError: If a file is damaged in a way that no crash explains; nothing is changed then.
        """
        updates, end = self._read_log()
        lines = self._whole_lines()
        if abs(len(lines) - len(updates)) > 1:
            raise RunDirectoryError(
                f"{self.path}: replay.log holds {len(updates)} rounds and rounds.jsonl {len(lines)}: a crash leaves at most one "
                "between them, so one of the files is damaged; restore it from a backup; nothing was changed"
            )
        if len(lines) < len(updates):
            updates, end = self._read_log(len(lines))
        with _writing(self.path):
            os.truncate(self.path / "replay.log", end)
            self.write_bytes("rounds.jsonl", "".join(line + "\n" for line in lines[: len(updates)]).encode())
        return updates

    def append_update(self, update: Update) -> None:
        """Appends a sealed update to the log; it is on disk when this returns."""
        body = encode(update)
        self._append("replay.log", RECORD.pack(len(body), zlib.crc32(body)) + body)

    def append_round(self, figures: dict[str, Any]) -> None:
        """Appends one line of figures."""
        self._append("rounds.jsonl", (json.dumps(figures, allow_nan=False) + "\n").encode())

    def rounds(self) -> list[dict[str, Any]]:
        """Reads the figures of all rounds.

        Returns:
            One dictionary per round.

        Raises:
            RunDirectoryError: If the file is missing or damaged.
        """
        return [json.loads(line) for line in self._whole_lines()]

    def append_times(self, figures: dict[str, Any]) -> None:
        """Appends a line of who spent how long on a round, where tiers are processes of their own."""
        self._append("timeline.jsonl", (json.dumps(figures, allow_nan=False) + "\n").encode())

    def times(self) -> list[dict[str, Any]]:
        """Reads who spent how long on which round.

        Returns:
            One dictionary per round, oldest first, the latest of those that were closed twice; none where all tiers were one process.
        """
        file = self.path / "timeline.jsonl"
        lines = file.read_text(encoding="utf8").split("\n")[:-1] if file.is_file() else []
        by_round: dict[int, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):  # cut off by a crash; nothing depends on it
                by_round[json.loads(line)["round"]] = json.loads(line)
        return [by_round[number] for number in sorted(by_round)]

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint in one step."""
        body = encode(checkpoint)
        self.write_bytes("checkpoint.bin", RECORD.pack(len(body), zlib.crc32(body)) + body)

    def checkpoint(self) -> Checkpoint | None:
        """Reads the checkpoint.

        Returns:
            The checkpoint, or None when none has been written.

        Raises:
            RunDirectoryError: If it is damaged.
        """
        file = self.path / "checkpoint.bin"
        if not file.is_file():
            return None
        data = file.read_bytes()
        body = data[RECORD.size :]
        if len(data) < RECORD.size or RECORD.unpack_from(data) != (len(body), zlib.crc32(body)):
            raise RunDirectoryError(f"{file} is damaged; delete it: the replay log alone restores the run; nothing was changed")
        try:
            return decode(body, Checkpoint)
        except DecodeError as error:
            raise RunDirectoryError(f"{file} is of another version ({error}); delete it: the replay log alone restores the run") from error

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file in one step."""
        self.write_bytes(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file in one step: readers see the old or the new one, never a part."""
        with _writing(self.path):
            write_whole(self.path / name, data)

    def _append(self, name: str, data: bytes) -> None:
        with _writing(self.path), (self.path / name).open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _read_log(self, at_most: int | None = None) -> tuple[list[Update], int]:
        """Returns updates and the position after the last of them."""
        file = self.path / "replay.log"
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise RunDirectoryError(f"{file} does not exist: the run cannot be continued without it; nothing was changed") from error
        if data[: len(MAGIC)] != MAGIC:
            raise RunDirectoryError(f"{file} is damaged: it does not begin as a replay log; restore it from a backup; nothing was changed")
        updates: list[Update] = []
        position = len(MAGIC)
        while position + RECORD.size <= len(data) and (at_most is None or len(updates) < at_most):
            length, checksum = RECORD.unpack_from(data, position)
            body = data[position + RECORD.size : position + RECORD.size + length]
            if len(body) < length:
                break
            if zlib.crc32(body) != checksum:
                raise RunDirectoryError(
                    f"{file} is damaged: record {len(updates)} at byte {position} fails its checksum; restore the file from a "
                    "backup or start a new run; nothing was changed"
                )
            try:
                updates.append(decode(body, Update))
            except DecodeError as error:
                raise RunDirectoryError(
                    f"{file} is of another version or damaged: record {len(updates)} at byte {position} is no update ({error}); "
                    "nothing was changed"
                ) from error
            position += RECORD.size + length
        return updates, position

    def _whole_lines(self) -> list[str]:
        file = self.path / "rounds.jsonl"
        try:
            text = file.read_text(encoding="utf8")
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{file} is missing or damaged ({error}); restore it from a backup; nothing was changed") from error
        lines = text.split("\n")[:-1]
        for number, line in enumerate(lines):
            try:
                found = json.loads(line)["round"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RunDirectoryError(
                    f"{file} is damaged: line {number + 1} is not a round; restore it from a backup; nothing was changed"
                ) from error
            if found != number + 1:
                raise RunDirectoryError(
                    f"{file} is damaged: line {number + 1} is round {found}; restore it from a backup; nothing was changed"
                )
        return lines


LOCK = ".lock"


def config_hash(config: RunConfig) -> bytes:
    """Names a configuration.

    Args:
        config: Settings.

    Returns:
        16 bytes.

    Example:
        >>> len(config_hash(RunConfig()))
        16
    """
    text = json.dumps([FORMAT_VERSION, to_plain(config)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def refuse_taken(path: Path) -> None:
    """Makes sure that a directory is missing or empty.

    Args:
        path: Where a run or a comparison is going to be.

    Raises:
        RunDirectoryError: If something is there already.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path}: a file is in the way; choose another directory for the run")
    if path.exists() and any(entry.name != LOCK for entry in path.iterdir()):
        raise RunDirectoryError(f"{path}: the directory is not empty; choose another, or continue it with `cooperllm resume {path}`")


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """Turns a full or read-only disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path}: could not write ({error.strerror or error}); make room or choose another directory, then continue with "
            f"`cooperllm resume {path}`"
        ) from error
