"""What a process of a deployment says of itself: lines for people, or a JSON object a line for what collects them.

    2026-11-21 19:40:00,123 INFO edge 0: listening on ...
    {"time": "2026-11-21T19:40:00.123+00:00", "level": "INFO", "process": "edge", "logger": "cooperllm.tiers", "message": "edge 0: ..."}

Everything goes to standard error, Flower's errors, warnings and what ends the process included. No line of ours has a key or a text in
it; a private key that a library's error quotes is left out.
"""

import datetime
import json
import logging
import os
import re
import sys
import threading
from enum import StrEnum
from types import TracebackType

SECRET = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
LEFT_OUT = "(a private key was here)"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_log = logging.getLogger(__name__)


class LogFormat(StrEnum):
    """How a process says what it does."""

    TEXT = "text"
    JSON = "json"


class TextLines(logging.Formatter):
    """A line for people, with the time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record, and what was raised below it."""
        return SECRET.sub(LEFT_OUT, super().format(record))


class JsonLines(logging.Formatter):
    """An object a line: time, level, process, logger, message, fields of its own, and the traceback of what was raised.

    Example:
        >>> record = logging.makeLogRecord({"msg": "round %d is over", "args": (3,), "levelname": "INFO", "num_reports": 5})
        >>> found = json.loads(JsonLines("cloud").format(record))
        >>> found["message"], found["process"], found["num_reports"]
        ('round 3 is over', 'cloud', 5)
    """

    def __init__(self, process: str) -> None:
        """Takes what all lines have.

        Args:
            process: Kind of the process: cloud, edge or device.
        """
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record on one line."""
        fields = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": SECRET.sub(LEFT_OUT, record.getMessage()),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN | set(fields)}
        if record.exc_info:
            fields["traceback"] = SECRET.sub(LEFT_OUT, self.formatException(record.exc_info))
        return json.dumps(fields, default=str, ensure_ascii=False)


def begin_log(log_format: LogFormat, process: str) -> None:
    """Decides what this process says, and keeps Flower from phoning home; before Flower is imported.

    Args:
        log_format: How.
        process: Its kind, in every line of JSON.
    """
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    handler = logging.StreamHandler()
    handler.setFormatter(TextLines() if log_format is LogFormat.TEXT else JsonLines(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("cooperllm").setLevel(logging.INFO)

    def take_errors(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            handler.handle(record)
        return False

    logging.getLogger("flwr").addFilter(take_errors)  # its import undoes a level, and brings a handler with lines of another form
    if log_format is LogFormat.JSON:
        logging.captureWarnings(capture=True)
        sys.excepthook = _told
        threading.excepthook = lambda given: _told(given.exc_type, given.exc_value, given.exc_traceback)


def is_json() -> bool:
    """Tells whether this process says what it does in JSON.

    Returns:
        Whether `begin_log` was told so.
    """
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers)


def _told(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    _log.critical("ended by %s", kind.__name__, exc_info=(kind, error or kind(), traceback))
