"""Messages to bytes and back: MessagePack, checked against the message's types; nothing that arrives is ever executed.

An array travels as (dtype, shape, data). Its size is checked against the bytes that are really there before anything is allocated.
"""

import math
from typing import Any, TypeVar

import msgspec
import numpy as np

from cooperllm.errors import DecodeError

Message = TypeVar("Message")

MAX_BYTES = 1 << 31
"""Largest message that is looked at."""

DTYPES = frozenset({"<f4"})
"""Kinds of arrays that may arrive."""


def encode(message: object) -> bytes:
    """Packs a message.

    Args:
        message: Any dataclass of `cooperllm.messages`.

    Returns:
        Its bytes: what the link carries and what is counted.

    Example:
        >>> from cooperllm.messages import RandomTerm
        >>> len(encode(RandomTerm(group=1, coefficients=np.zeros(2, np.float32))))
        46
    """
    return msgspec.msgpack.encode(message, enc_hook=_from_array)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Unpacks a message that arrived.

    Args:
        data: Bytes from anywhere.
        kind: What is expected.

    Returns:
        The message, its fields of the declared types and within the declared bounds.

    Raises:
        DecodeError: If the bytes are anything else.

    Example:
        >>> from cooperllm.messages import RandomTerm
        >>> decode(encode(RandomTerm(group=1, coefficients=np.zeros(2, np.float32))), RandomTerm).group
        1
    """
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{kind.__name__}: {len(data)} bytes found, at most {MAX_BYTES} expected")
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_to_array)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise DecodeError(f"{kind.__name__}: {error}") from error


def _from_array(value: object) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(value, np.ndarray):
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return little.dtype.newbyteorder("<").str, little.shape, little.tobytes()
    raise TypeError(f"{type(value).__name__} cannot travel")


def _to_array(_kind: type, value: Any) -> np.ndarray:
    match value:
        case [str(dtype), [*shape], bytes(data)] if dtype in DTYPES and all(isinstance(side, int) and side >= 0 for side in shape):
            if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
                raise ValueError(f"an array of shape {shape} and {dtype} does not have {len(data)} bytes")
            return np.frombuffer(data, dtype).astype(np.float32).reshape(shape)
        case _:
            raise ValueError("an array was expected: (dtype, shape, data)")
