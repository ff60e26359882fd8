"""A node of Flower's fleet protocol that stays: one process, one model, message after message.

    serve(server) --pull--> message's bytes --answer--> bytes --push--> server

Flower's own SuperNode starts a process for every message, which would load the model anew each time. A node runs what is installed on it:
no code comes over the link. Its question for work is kept open by `fleet_server` until there is some, and it comes back by itself after a
server or a network was away. A short message is one request each way, over one connection; the parts of a long one travel side by side.

With `fleet_server` and `supernode` what touches what Flower does not promise to keep (pinned: 1.41). Its requests are used and its
connection is not: that one ends the process five seconds after it was refused (`flwr_exit`), interrupts it where a key is no longer
known, and signs with a clock that may be wrong.
"""

import datetime
import email.utils
import logging
import queue
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry.retry_invoker import RetryInvoker, exponential
from flwr.supernode.fleet_http_client import FleetHttpClient

from cooperllm.errors import ConfigError, LinkError
from cooperllm.link.envelope import SHORT_PARTS, stamp, unwrap, wrap
from cooperllm.link.tls import is_about_tls, node_context

POLL_S = 0.2
RETURN_AFTER_S, RETRY_S, LAST_WORDS_S = 2.0, 30.0, 5.0
CLOCK_TOLERANCE_S = 2.0
"""When a signature is refused and the clocks differ by more, ours is corrected; the server's answers tell whole seconds."""
PARTS_AT_ONCE = 4
"""Parts of a long message that travel at the same time, each over a connection of its own: all those of one below 10 MB but one, so that it
takes two round trips. More would only share the link, and a node would hold more parts twice."""
_BAD_SIGNATURE, _UNKNOWN_KEY, _SEEN_BEFORE = 401, 412, 409
_HEADERS_ARE_THERE = "http11.receive_response_headers.complete"
Given = TypeVar("Given")
Found = TypeVar("Found")
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
        certificate: File of the node's own, for that key, where the server wants to see one; else None.
    """

    address: str
    key: Path
    authority: Path | None
    certificate: Path | None = None


def serve(server: Server, answer: Answer, stop: threading.Event | None = None, at_once: int = 1, most_at_work: int = 1) -> None:
    """Answers a server's messages until told to stop.

    Args:
        server: Whom.
        answer: Called with each message's bytes; what it raises is told the server as an error.
        stop: Set by somebody who wants this to return; None serves for ever.
        at_once: Messages in hand at the same time, >= 1: with 2 the next one is fetched while an answer is made or sent.
        most_at_work: Answers made at the same time, >= 1; a node that only waits for others makes as many as it has in hand.

    Raises:
        ConfigError: If the key or a certificate cannot be read.
        LinkError: If the server does not let the node in.
    """
    stop, key = stop or threading.Event(), read_private_key(server.key)
    while not stop.is_set():
        try:
            _connected(server, key, answer, stop, at_once, most_at_work)
        except (ObjectPullError, ObjectPushError, ObjectUnavailableError) as error:
            _log.warning("%s took a message back (%s)", server.address, error)
        except (httpx.HTTPError, OSError) as error:
            _log.warning("%s is away (%s%s); trying again", server.address, error, _doubt(server, error))
            stop.wait(RETURN_AFTER_S)


def _doubt(server: Server, error: Exception) -> str:
    """A server that refuses a node's certificate ends the connection after the node's part of the handshake, and says nothing."""
    is_silent = server.authority is not None and isinstance(error, httpx.RemoteProtocolError)
    return f", or it wants another certificate than {server.certificate or 'none'}" if is_silent else ""


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


def _connected(
    server: Server, key: ec.EllipticCurvePrivateKey, answer: Answer, stop: threading.Event, at_once: int, most_at_work: int
) -> None:
    try:
        with connected(server, key, most_at_work) as fleet:
            hands = _Hands(fleet, answer, at_once)
            try:
                while not stop.is_set():
                    if not hands.is_one_free():
                        continue
                    asked = time.monotonic()
                    received = fleet.receive()
                    if received is not None:
                        hands.take(received)
                        continue
                    hands.free()
                    if time.monotonic() - asked < POLL_S:  # a server that does not keep the question open
                        stop.wait(POLL_S)
            finally:
                hands.finish(LAST_WORDS_S if stop.is_set() else None)
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in {_BAD_SIGNATURE, _UNKNOWN_KEY}:
            raise
        raise LinkError(f"{server.address} does not let this node in: expected its key ({server.key}) to be enrolled there") from error
    except httpx.ConnectError as error:
        if not is_about_tls(error):
            raise
        raise LinkError(
            f"{server.address} is not who it should be ({error}): expected a certificate signed by {server.authority or 'nobody'}"
        ) from error


class _Hands:
    """Answers a few messages side by side; what goes wrong with the link meanwhile is raised where the next hand is waited for."""

    def __init__(self, fleet: "Fleet", answer: Answer, count: int) -> None:
        self._fleet, self._answer, self._free = fleet, answer, threading.Semaphore(count)
        self._busy: list[threading.Thread] = []
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def is_one_free(self) -> bool:
        """Waits a while for a hand, which is then either given a message or freed."""
        is_free = self._free.acquire(timeout=POLL_S)
        if not self._failures.empty():
            raise self._failures.get()
        return is_free

    def free(self) -> None:
        """There was no message."""
        self._free.release()

    def take(self, received: tuple[Message, float]) -> None:
        """Begins to answer."""
        self._busy = [thread for thread in self._busy if thread.is_alive()]
        self._busy.append(threading.Thread(target=self._reply, args=received, daemon=True))
        self._busy[-1].start()

    def finish(self, timeout_s: float | None) -> None:
        """Waits for what is in hand."""
        for thread in self._busy:
            thread.join(timeout_s)

    def _reply(self, message: Message, received_s: float) -> None:
        try:
            self._fleet.reply(message, received_s, self._answer)
        except Exception as error:  # noqa: BLE001 -- raised by whoever waits for a free hand
            self._failures.put(error)
        finally:
            self._free.release()


@contextmanager
def connected(server: Server, key: ec.EllipticCurvePrivateKey, most_at_work: int = 1) -> Generator["Fleet"]:
    """Says that a node is there, now and then while it works, and at the end that it is gone.

    Args:
        server: Whom.
        key: Of the node.
        most_at_work: Answers made at the same time, >= 1.

    Yields:
        The node's calls.

    Raises:
        ConfigError: If a certificate cannot be read.
        httpx.HTTPError: If the server is away, or refuses.
    """
    context = None if server.authority is None else node_context(server.authority, server.certificate, server.key)
    arrival = _Arrival()
    url = f"{'http' if context is None else 'https'}://{server.address}"
    with FleetHttpClient(url, verify=context or False, interceptors=[_Signature(key), arrival]) as client:
        shown = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        node = Node(node_id=client.ActivateNode(shown).node_id)

        def is_heard() -> bool:
            with suppress(httpx.HTTPError):
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
                return True
            return False

        heart = HeartbeatSender(is_heard)
        heart.start()
        try:
            yield Fleet(client, node, arrival, most_at_work)
            with suppress(httpx.HTTPError):  # a goodbye; who leaves because something failed is coming back, and is not given up
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        finally:
            heart.stop()


class Fleet:
    """What a node asks of its server: a message with all its parts, and to take a reply with all of its own."""

    def __init__(self, client: FleetHttpClient, node: Node, arrival: "_Arrival", most_at_work: int = 1) -> None:
        self._client, self._node, self._arrival, self._minds = client, node, arrival, threading.Semaphore(most_at_work)
        # A connection that breaks in the middle of an answer is made again, so that what was computed is not computed twice.
        self._retry = RetryInvoker(lambda: exponential(0.1, max_delay=1), httpx.TransportError, max_tries=None, max_time=RETRY_S)

    def receive(self) -> tuple[Message, float] | None:
        """Waits for a message for as long as the server keeps the question open.

        Returns:
            The message, and the seconds that its parts took; None where there is none.
        """
        found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        message = message_from_proto(found.messages_list[0])
        if not message.has_content() or not message.content:  # its parts are to be fetched
            message = self._fetched(found.message_object_trees[0], message.metadata.run_id)
        return message, time.monotonic() - self._arrival.begun_s

    def _fetched(self, tree: ObjectTree, run_id: int) -> Message:
        pull = make_pull_object_fn_protobuf(lambda request: self._retry.invoke(self._client.PullObject, request), self._node, run_id)
        parts = [part.object_id for part in iterate_object_tree(tree)]
        message: Any = inflate_object_from_contents(tree.object_id, dict(zip(parts, _side_by_side(pull, parts), strict=True)))
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def reply(self, message: Message, received_s: float, answer: Answer) -> None:
        """Answers a message.

        Args:
            message: As received.
            received_s: How long that took.
            answer: Makes the answer; what it raises is the answer then.
        """
        run_id = message.metadata.run_id
        try:
            reply = Message(wrap(self._stamped(message, received_s, answer)), reply_to=message)
        except Exception as error:  # noqa: BLE001 -- the wall: whatever a node raises is a value for the other side
            _log.warning("a message could not be answered", exc_info=error)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)
        # Valid for as long as the question, by the clock of who asked: that of this machine may be wrong.
        reply.metadata.created_at, reply.metadata.ttl = message.metadata.created_at, message.metadata.ttl
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            head = reply if len(objects) <= SHORT_PARTS else remove_content_from_message(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            taken = self._retry.invoke(self._client.PushMessages, request)
            if not taken.objects_to_push:
                return
            push = make_push_object_fn_protobuf(
                lambda request: self._retry.invoke(self._client.PushObject, request), self._node, run_id, taken.session_id
            )
            _side_by_side(lambda part: push(part, objects[part].deflate()), taken.objects_to_push)
        # Only now: a node that is killed in between gets the message again.
        make_confirm_message_received_fn_protobuf(
            lambda request: self._retry.invoke(self._client.ConfirmMessageReceived, request), self._node, run_id
        )(message.metadata.message_id)

    def _stamped(self, message: Message, received_s: float, answer: Answer) -> bytes:
        received = time.monotonic()
        with self._minds:
            begun = time.monotonic()
            data = answer(unwrap(message))
        return stamp(data, received_s, begun - received, time.monotonic() - begun)


def _side_by_side(work: Callable[[Given], Found], given: Iterable[Given]) -> list[Found]:
    """Results in the order of what is given; the first failure is raised, and what has not begun by then is left undone.

    Flower's own functions take as many threads as there are processors, where these only wait for a link.
    """
    pool = ThreadPoolExecutor(PARTS_AT_ONCE, "part")
    try:
        return list(pool.map(work, given))
    finally:
        pool.shutdown(cancel_futures=True)


class _Arrival:
    """When the latest answer to a question for work began to arrive: until then it was waited for, from then on it was received.

    Attributes:
        begun_s: That moment, by the clock that never goes back.
    """

    def __init__(self) -> None:
        self.begun_s = time.monotonic()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sends a request; one for work with a note of when its headers came back."""
        if isinstance(context.message, PullMessagesRequest):
            context.request.extensions["trace"] = self._note
        return call_next(context)

    def _note(self, event: str, _details: object) -> None:
        if event == _HEADERS_ARE_THERE:
            self.begun_s = time.monotonic()


class _Signature:
    """Signs each request's time with the node's key; the time is the server's, once it has refused this machine's.

    No two requests have the same time, nor a later one an earlier time: the server takes each once (`seen_requests.py`).
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key, self._public_key = key, public_key_to_bytes(key.public_key())
        self._ahead, self._latest, self._alone = datetime.timedelta(), _now(), threading.Lock()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sends a request with the signature that Flower's server expects, and again if it was our clock that was refused."""
        response = call_next(self._sign(context))
        if response.status_code in {_BAD_SIGNATURE, _SEEN_BEFORE} and self._corrects(response):
            response = call_next(self._sign(context))
        return response

    def _sign(self, context: ProtobufRequestContext) -> ProtobufRequestContext:
        with self._alone:
            self._latest = max(_now() + self._ahead, self._latest + datetime.timedelta(microseconds=1))
            timestamp = self._latest.isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        context.request.headers[TIMESTAMP_HEADER] = timestamp
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = b64encode(self._public_key).decode("ascii")
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(signature).decode("ascii")
        return context

    def _corrects(self, response: httpx.Response) -> bool:
        try:
            ahead = email.utils.parsedate_to_datetime(response.headers["date"]) - _now()
        except (KeyError, ValueError):
            return False
        with self._alone:
            if abs(ahead - self._ahead).total_seconds() <= CLOCK_TOLERANCE_S:
                return False
            self._ahead, self._latest = ahead, _now() + ahead
        _log.warning("this machine's clock is %.0f s off the server's, whose time is used from here on", -ahead.total_seconds())
        return True


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
