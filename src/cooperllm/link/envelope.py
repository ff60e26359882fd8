"""Our bytes in a message of Flower's: short ones in a record, long ones in an `Array`, which Flower cuts into chunks.

Every part of a message is a request of its own: a record has one, an array three.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from cooperllm.errors import DecodeError

SHORT_BYTES = 1 << 20


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
