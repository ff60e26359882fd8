"""A node of Flower's fleet protocol that stays: one process, one model, message after message.

    serve(server) --pull--> message's bytes --answer--> bytes --push--> server

Flower's own SuperNode starts a process for every message, which would load the model anew each time. A node runs what is installed on it:
no code comes over the link. Its question for work is kept open by `fleet_server` until there is some, and it comes back by itself after a
server or a network was away. It has one connection for all parts of a message: another would cost a slow link a handshake.

With `fleet_server` one of the two files that touch what Flower does not promise to keep (pinned: 1.41). Its connection ends the process
where it cannot be made (`flwr_exit`), and interrupts it where a key is no longer known; here both are a `LinkError` that says so.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from cooperllm.errors import ConfigError, LinkError
from cooperllm.link.envelope import unwrap, wrap

POLL_S = 0.2
RETURN_AFTER_S, CONNECT_TIMEOUT_S = 2.0, 10.0
_log = logging.getLogger(__name__)

Answer = Callable[[bytes], bytes]
"""What a node does: bytes of an order in, bytes of a report out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Whom a node talks to, and as whom.

    Attributes:
        address: HOST:PORT.
        key: File of the node's private key, in PEM.
        authority: File with the certificate that the server's is signed by; None for plain text.
    """

    address: str
    key: Path
    authority: Path | None


def serve(server: Server, answer: Answer, stop: threading.Event | None = None) -> None:
    """Answers a server's messages, one after the other, until told to stop.

    Args:
        server: Whom.
        answer: Called with each message's bytes; what it raises is told the server as an error.
        stop: Set by somebody who wants this to return; None serves for ever.

    Raises:
        ConfigError: If the key cannot be read.
        LinkError: If the server does not let the node in.
    """
    stop, key = stop or threading.Event(), read_private_key(server.key)
    while not stop.is_set():
        try:
            _connected(server, key, answer, stop)
        except (httpx.HTTPError, OSError) as error:
            _log.warning("%s is away (%s); trying again", server.address, error)
            stop.wait(RETURN_AFTER_S)


def read_private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Reads the key that a node signs with.

    Args:
        file: In PEM, without a password.

    Returns:
        The key.

    Raises:
        ConfigError: If there is none, or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: found no private key in PEM without a password ({error}); `cooperllm enroll` writes one") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file}: found {type(key).__name__}, expected a key on an elliptic curve; `cooperllm enroll` writes one")
    return key


def _connected(server: Server, key: ec.EllipticCurvePrivateKey, answer: Answer, stop: threading.Event) -> None:
    host, _, port = server.address.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()  # an OSError: away; what fails from here on was refused
    authority = None if server.authority is None else server.authority.read_bytes()
    failure: Exception | None = None
    try:
        with http_request_response(server.address, server.authority is None, authority, (key, key.public_key()), 3, 30.0) as callbacks:
            try:
                _loop(_Fleet(*callbacks), answer, stop)
            except Exception as error:  # noqa: BLE001 -- Flower's context logs what passes through it and goes on
                failure = error
    except SystemExit as error:
        raise LinkError(
            f"{server.address} does not let this node in: expected its key ({server.key}) to be enrolled there, and the server's "
            f"certificate to be signed by {server.authority or 'nobody'}; Flower's words are above"
        ) from error
    if failure is not None:
        raise failure


def _loop(fleet: "_Fleet", answer: Answer, stop: threading.Event) -> None:
    while not stop.is_set():
        asked = time.monotonic()
        received = fleet.receive()
        if received is not None:
            fleet.reply(fleet.whole(*received), answer)
        elif time.monotonic() - asked < POLL_S:  # a server that does not keep the question open
            stop.wait(POLL_S)


class _Fleet:
    """The calls that Flower's connection offers, put together: a message with all its parts, a reply with all of its own."""

    def __init__(
        self, _node_id: int, receive: Any, send: Any, _get_run: Any, _get_fab: Any, pull_object: Any, push_object: Any, confirm: Any
    ) -> None:
        self.receive = receive
        self._send, self._pull_object, self._push_object, self._confirm = send, pull_object, push_object, confirm

    def whole(self, announced: Message, tree: Any) -> Message:
        run_id = announced.metadata.run_id
        parts = [part.object_id for part in iterate_object_tree(tree)]
        contents = pull_objects(
            parts, lambda part: self._pull_object(run_id, part), max_concurrent_pulls=1, initial_backoff=0.02, backoff_cap=0.5
        )
        message: Any = inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def reply(self, message: Message, answer: Answer) -> None:
        begun, run_id = time.monotonic(), message.metadata.run_id
        try:
            reply = Message(wrap(answer(unwrap(message))), reply_to=message)
        except Exception as error:  # noqa: BLE001 -- the wall: whatever a node raises is a value for the other side
            _log.warning("a message could not be answered", exc_info=error)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            head = remove_content_from_message(reply) if reply.has_content() else reply
            wanted, session = self._send(head, get_object_tree(reply), time.monotonic() - begun)
            push_objects(
                get_all_nested_objects(reply),
                lambda part, content: self._push_object(run_id, session, part, content),
                object_ids_to_push=wanted,
            )
        self._confirm(run_id, message.metadata.message_id)  # only now: a node that is killed in between gets the message again
