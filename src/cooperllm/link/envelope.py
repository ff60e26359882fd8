"""Our bytes in a message of Flower's: short ones in a record, long ones in an `Array`, which Flower cuts into chunks.

A message with a record has three parts, itself included, and travels whole; one with an array has five or more, each a request of its own.
A node writes before its answer how long it took.
"""

import math
import struct

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from cooperllm.errors import DecodeError

SHORT_BYTES = 1 << 20
SHORT_PARTS = 3
"""Parts of a message that travels whole: itself, its dictionary, a record."""


def wrap(data: bytes) -> RecordDict:
    """Makes the content of a message.

    Args:
        data: Anything encoded.

    Returns:
        Content for `Message`.

    Example:
        >>> list(wrap(b"ab").config_records), list(wrap(bytes(1 << 21)).array_records)
        (['message'], ['message'])
    """
    if len(data) <= SHORT_BYTES:
        return RecordDict({"message": ConfigRecord({"bytes": data})})
    return RecordDict({"message": ArrayRecord({"bytes": Array("uint8", (len(data),), "cooperllm.msgpack", data)})})


def unwrap(message: Message) -> bytes:
    """Takes the bytes out of a message that arrived.

    Args:
        message: From anywhere.

    Returns:
        Its bytes, as they are.

    Raises:
        DecodeError: If the message is an error or has other content.
    """
    if message.has_error():
        raise DecodeError(f"{message.error.reason} (Flower's code {message.error.code})")
    match message.content.get("message"):
        case ConfigRecord() as record if isinstance(data := record.get("bytes"), bytes):
            return data
        case ArrayRecord() as record if (array := record.get("bytes")) is not None:
            return array.data
        case _:
            raise DecodeError("an answer without our bytes")


STAMP = struct.Struct("<3f")
LONGEST_S = 1e6


def stamp(data: bytes, received_s: float, waited_s: float, worked_s: float) -> bytes:
    """Writes before an answer how a node spent its time.

    Args:
        data: The answer.
        received_s: Fetching the message.
        waited_s: With the message in hand.
        worked_s: Answering.

    Returns:
        12 bytes more.

    Example:
        >>> unstamp(stamp(b"answer", 0.5, 0.0, 2.0))
        (b'answer', (0.5, 0.0, 2.0))
    """
    return STAMP.pack(received_s, waited_s, worked_s) + data


def unstamp(data: bytes) -> tuple[bytes, tuple[float, float, float]]:
    """Takes both apart.

    Args:
        data: From anywhere.

    Returns:
        The answer; seconds received, waited and worked.

    Raises:
        DecodeError: If it is too short or the times are none.
    """
    if len(data) < STAMP.size:
        raise DecodeError(f"an answer of {len(data)} bytes, its times alone are {STAMP.size}")
    received_s, waited_s, worked_s = STAMP.unpack_from(data)
    if not all(math.isfinite(seconds) and 0 <= seconds <= LONGEST_S for seconds in (received_s, waited_s, worked_s)):
        raise DecodeError(f"times {received_s}, {waited_s}, {worked_s} s found, seconds from 0 to {LONGEST_S:g} expected")
    return data[STAMP.size :], (received_s, waited_s, worked_s)
