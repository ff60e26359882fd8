"""Our bytes in a message of Flower's: an `Array`, which Flower cuts into chunks where it does not cut a `ConfigRecord`."""

from flwr.app import Array, ArrayRecord, Message, RecordDict

from cooperllm.errors import DecodeError


def wrap(data: bytes) -> RecordDict:
    """Makes the content of a message.

    Args:
        data: Anything encoded.

    Returns:
        Content for `Message`.

    Example:
        >>> wrap(b"ab").array_records["message"]["bytes"].shape
        (2,)
    """
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
    try:
        return message.content.array_records["message"]["bytes"].data
    except KeyError as error:
        raise DecodeError("an answer without our bytes") from error
