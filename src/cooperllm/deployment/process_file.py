"""One process for each settings file, and a way to end it: its number stands beside the settings, in a file that is locked while it runs.

The lock is the system's: it is gone with the process, however that ended, so that a number left behind is never taken for a process.
"""

import contextlib
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path

import filelock

from cooperllm.errors import ConfigError

END_TIMEOUT_S, LOOK_S = 30.0, 0.05


@contextlib.contextmanager
def running(settings: Path) -> Generator[None]:
    """Says that a process with these settings runs, for as long as the block lasts.

    Args:
        settings: Its TOML file.

    Yields:
        None; the number is written by then.

    Raises:
        ConfigError: If another one does: two devices with one state would ruin it.
    """
    lock, number = _files(settings)
    try:
        with filelock.FileLock(lock, timeout=1):  # whoever looks has it for an instant
            number.write_text(f"{os.getpid()}\n")
            try:
                yield
            finally:
                number.unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise ConfigError(f"{settings}: found a process that runs with these settings; `cooperllm stop {settings}` ends it") from error


def stop(path: Path) -> list[Path]:
    """Ends processes and waits until they have.

    Args:
        path: A settings file, or a directory with some below it, such as a whole deployment's.

    Returns:
        The settings files whose processes have ended.

    Raises:
        ConfigError: If nothing runs there, or something does not end.
    """
    found = [path] if path.is_file() else sorted(path.glob("**/*.toml"))
    busy = [settings for settings in found if _number(settings) is not None]
    if not busy:
        raise ConfigError(f"{path}: found no process that runs with settings from here; `cooperllm status` says how a run stands")
    for settings in busy:
        if (number := _number(settings)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := [settings for settings in busy if _number(settings) is not None]:
        if time.monotonic() > deadline:
            raise ConfigError(f"{left[0]}: found its process {_number(left[0])} still at work after {END_TIMEOUT_S:g} s; look at its words")
        time.sleep(LOOK_S)
    return busy


def _number(settings: Path) -> int | None:
    """The number of the process that runs with some settings."""
    lock, number = _files(settings)
    if not lock.exists():
        return None
    try:
        with filelock.FileLock(lock, timeout=0):
            return None
    except filelock.Timeout:
        pass
    try:
        return int(number.read_text())
    except (OSError, ValueError):  # it is just beginning, or just ending
        return None


def _files(settings: Path) -> tuple[Path, Path]:
    return settings.with_suffix(".lock"), settings.with_suffix(".pid")
