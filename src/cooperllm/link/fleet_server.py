"""The server's side of Flower's fleet protocol, in the process that drives it.

    grid --push--> link state <--HTTPS, signed by enrolled keys-- `fleet_node`

This is a SuperLink reduced to the paths under /v1/fleet. Flower's own also serves its control and runtime interfaces on that port, and
whoever reaches them starts runs; here they do not exist. The grid works on the link state directly, so that no second process, database
or token stands between a round and its messages. What lasts is the run's log: a server that comes back has an empty state, and its nodes
come back to it.

With `fleet_node` and `supernode` what touches what Flower does not promise to keep (pinned: 1.41). Met on the way:
    - A node that was killed counts as online for a minute, and Flower refuses its return until then. Its signature says who it is: let in.
    - What a node was given before it was killed is never given again. Here it is: our nodes confirm a message when they have answered.
    - A run is only served while a task of it sends heartbeats. Ours has none: it is running because we say so.
    - A message can be seen before its parts have arrived: an order is handed out, and a reply counts, when it is whole. A reply that is
      not is in the way of another if its sender was killed, and is taken away.
    - Every part of a message is a request of its own, though a message has a field for its content. Short ones travel in it.
    - A signature covers a time, not what is asked, and is good for five minutes as often as it is shown. Here it is good once.
"""

import contextlib
import datetime
import hashlib
import socket
import threading
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import flwr
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    Status,
)
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.runtime import runtime_handlers
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from cooperllm.errors import LinkError
from cooperllm.link.envelope import SHORT_PARTS
from cooperllm.link.request_limit import RequestLimit
from cooperllm.link.seen_requests import SeenRequests
from cooperllm.link.supernode import NAME, PUBLISHER, VERSION
from cooperllm.link.tls import Certificate

KNOWN_FLOWER = "1.41.0"
START_TIMEOUT_S, STOP_TIMEOUT_S = 30.0, 10.0
HOLD_S = 2.0
"""How long a node's question for work is kept open; below Flower's patience of 30 s, and short enough for a node to end."""

MOST_HELD = 4000
"""Questions that may be open at the same time, each in a thread of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a server listens or is found.

    Attributes:
        host: Name or number.
        port: 1 to 65535; 0 lets the system choose where one listens.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class FleetServer:
    """Lets nodes with enrolled keys in and sends them messages; a context, which ends with every connection closed.

    Attributes:
        address: Where it listens, with the port that the system chose.
        grid: Sends and receives, for the thread that runs the rounds.
        nodes: Flower's number of each enrolled node, by ours.
    """

    def __init__(self, public_keys: Mapping[int, bytes], address: Address, certificate: Certificate | None, fab: Fab | None = None) -> None:
        """Opens the port.

        Args:
            public_keys: Of the nodes that may come in, by our numbers, in PEM.
            address: Where to listen.
            certificate: For TLS; None for plain text.
            fab: What a node that is Flower's own SuperNode is told to start; None lets none of them work.

        Raises:
            LinkError: If the port is taken, or Flower is another than the one that this file knows.
        """
        if flwr.__version__ != KNOWN_FLOWER:
            raise LinkError(f"flwr {flwr.__version__} found, {KNOWN_FLOWER} expected: pip install 'flwr=={KNOWN_FLOWER}'")
        self._state = _State(NoOpFederationManager(), ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME).store())
        self.nodes = {
            number: self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0) for number, key in sorted(public_keys.items())
        }
        named = (None, None, None) if fab is None else (f"{PUBLISHER}/{NAME}", VERSION, self._state.store_fab(fab))
        run_id = self._state.create_run(*named, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        self._state.begin(run_id)
        self.grid = _Grid(self._state, run_id)
        self._socket = _listening(address)
        self.address = Address(host=address.host, port=self._socket.getsockname()[1])
        tls = {} if certificate is None else certificate.options()
        app = _app(self._state, _once(public_keys.values()))
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none", **tls))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="fleet", daemon=True)

    def __enter__(self) -> "FleetServer":
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._socket.close()
                raise LinkError(f"{self.address}: the server did not start; see its words above")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._state.end()
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()

    def wait_for_news(self, seconds: float) -> None:
        """Waits until a node has sent a message or come in, but not for long."""
        with self._state.news:
            self._state.news.wait(seconds)

    def worth_asking(self, message_ids: Iterable[str]) -> list[str]:
        """Lists those messages that a reply has begun to arrive for."""
        return [one for one in message_ids if one in self._state.message_ins_id_to_message_res_id]

    def forget(self, message_id: str) -> None:
        """Takes a message back: neither it nor an answer to it is kept."""
        self._state.delete_messages({message_id})
        self._state.object_store.delete(message_id)

    def online(self) -> set[int]:
        """Lists our numbers of the nodes that are there."""
        there = set(self.grid.get_node_ids())
        return {number for number, node_id in self.nodes.items() if node_id in there}


class _State(InMemoryLinkState):
    """Flower's link state, of one run that is always running, into which a node may come back at once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._news_lock, self._is_ending = threading.RLock(), False
        self.news = threading.Condition(self._news_lock)
        # A node's question and its messages are looked up by its number: what goes through all of either is a tier's whole time at
        # some hundred nodes. `news` and the nodes' own conditions have one lock.
        self._questions: dict[int, object] = {}
        self._own_news: dict[int, threading.Condition] = defaultdict(lambda: threading.Condition(self._news_lock))
        self._orders: dict[int, list[str]] = defaultdict(list)

    def store_message_and_object_tree(self, message: Message, object_tree: Any, session_id: str) -> tuple[bool, list[str]]:
        """Takes a message with the parts that came in it, and wakes whoever waits for one.

        A reply that is whole says that its order has arrived: that is not kept for a word of its own.
        """
        run_id, order = message.metadata.run_id, message.metadata.reply_to_message_id
        is_stored, missing = super().store_message_and_object_tree(remove_content_from_message(message), object_tree, session_id)
        if missing:
            parts = get_all_nested_objects(message)
            missing = [one for one in missing if one not in parts or not self.store_object(run_id, session_id, one, parts[one].deflate())]
        if order and not missing:
            self.object_store.delete(order)
        with self.news:
            if order:
                self.news.notify_all()
            elif is_stored:
                self._orders[message.metadata.dst_node_id].append(message.metadata.message_id)
                self._own_news[message.metadata.dst_node_id].notify_all()
        return is_stored, missing

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Waits a while for a message to a node: one request in two seconds, where looking often would fill a slow link.

        Who asks is there, though it may have missed that the server was away: its next heartbeat may be half a minute off. An older
        question of the same node is nobody's any more. A short message is handed out with its content.
        """
        if node_id == SUPERLINK_NODE_ID:
            return super().get_message_ins(node_id, limit, run_id=run_id)
        deadline, question = time.monotonic() + HOLD_S, object()
        self.acknowledge_node_heartbeat(node_id, HEARTBEAT_DEFAULT_INTERVAL)
        with self.news:
            self._questions[node_id] = question
            self._own_news[node_id].notify_all()
            self.news.notify_all()
            while not self._is_ending and self._questions.get(node_id) is question:
                found, left = self._next(node_id), deadline - time.monotonic()
                if found is not None:
                    return [self._whole_if_short(found)]
                if left <= 0:
                    return []
                self._own_news[node_id].wait(left)
            return []

    def end(self) -> None:
        """Answers every question that is open: there is nothing."""
        with self.news:
            self._is_ending = True
            for condition in (self.news, *self._own_news.values()):
                condition.notify_all()

    def _next(self, node_id: int) -> Message | None:
        """Takes the oldest message to a node that it was not given yet, as Flower does for all of them."""
        with self.lock:
            self._check_stored_messages(set(self._orders[node_id]))
            self._orders[node_id] = [one for one in self._orders[node_id] if one in self.message_ins_store]
            for message_id in self._orders[node_id]:
                message = self.message_ins_store[message_id]
                if not message.metadata.delivered_at:
                    message.metadata.delivered_at = now().isoformat()
                    return message
        return None

    def _whole_if_short(self, message: Message) -> Message:
        name = message.metadata.message_id
        try:
            parts = [part.object_id for part in iterate_object_tree(self.object_store.get_object_tree(name))]
        except NoObjectInStoreError:  # taken back meanwhile; Flower's route says so
            return message
        contents = {part: content for part in parts if len(parts) <= SHORT_PARTS and (content := self.object_store.get(part))}
        if len(contents) < len(parts):
            return message
        whole: Any = inflate_object_from_contents(name, contents)
        whole.metadata.__dict__["_message_id"] = name
        return whole

    def _give_again(self, node_id: int) -> None:
        with self.lock:
            for message_id in self._orders[node_id]:
                message = self.message_ins_store.get(message_id)
                if message is not None and not self._has_whole_reply(message_id):
                    self.message_res_store.pop(self.message_ins_id_to_message_res_id.pop(message_id, ""), None)
                    message.metadata.delivered_at = ""

    def begin(self, run_id: int) -> None:
        """Calls the run's task running: no other process claims it."""
        run = self.run_ids[run_id].run
        self.task_store[run.primary_task_id or 0].status.status = Status.RUNNING

    def create_node(self, owner_aid: str, owner_name: str, public_key: bytes, heartbeat_interval: float, **others: Any) -> int:
        """Numbers a node after its key: the same after the server was away, so that a node need not notice."""
        drawn = super().create_node(owner_aid, owner_name, public_key, heartbeat_interval, **others)
        node = self.nodes.pop(drawn)
        node.node_id = 2 + int.from_bytes(hashlib.sha256(public_key).digest()[:7])
        self.nodes[node.node_id] = node
        self.node_public_key_to_node_id[public_key] = node.node_id
        self.owner_to_node_ids[owner_aid] = self.owner_to_node_ids[owner_aid] - {drawn} | {node.node_id}
        return node.node_id

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Lets a node in, though it may not have said goodbye.

        It has nothing in hand: what it was given and has not answered was lost on the way, or with the process that it was before. Nor
        does it ask for anything yet.
        """
        with self.news:
            self._questions.pop(node_id, None)
            self._own_news[node_id].notify_all()
            self.news.notify_all()
        with self.lock:  # at no moment is the node away for whoever waits for it
            self.deactivate_node(node_id)
            self._give_again(node_id)
            return super().activate_node(node_id, heartbeat_interval)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Hands out replies that are there with all their parts; what is wrong with others is Flower's to say."""
        with self.lock:
            partial = {one for one in message_ids if one in self.message_ins_id_to_message_res_id and not self._has_whole_reply(one)}
            return super().get_message_res(message_ids - partial, run_id)

    def _has_whole_reply(self, message_id: str) -> bool:
        reply = self.message_ins_id_to_message_res_id.get(message_id)
        try:
            tree = None if reply is None else self.object_store.get_object_tree(reply)
        except NoObjectInStoreError:
            return False
        return tree is not None and all(self.object_store.get(part.object_id) for part in iterate_object_tree(tree))


class _Grid(HttpGrid):
    """Flower's grid on a link state in this process, in the place of one behind a port and a token."""

    def __init__(self, state: _State, run_id: int) -> None:
        super().__init__(token="none: no port is crossed")
        self._client: Any = _Direct(state, Task(run_id=run_id))
        self._news = state.news
        self.set_run(state.get_run_info(run_ids=[run_id])[0])
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID

    def push_messages(self, messages: Any) -> Any:
        """Takes a list, since Flower goes through it twice; nobody sees a message before all its parts are there."""
        with self._news:
            return super().push_messages(list[Message](messages))


class _Direct:
    """What Flower's grid asks of its server, answered by Flower's own functions."""

    def __init__(self, state: _State, task: Task) -> None:
        self._given: dict[str, Any] = {"state": state, "task": task}

    def GetNodes(self, request: Any) -> Any:  # noqa: N802 -- Flower's names, here and below
        """Lists who is online."""
        return runtime_handlers.get_nodes(request, **self._given)

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        """Takes messages for nodes."""
        return runtime_handlers.push_messages(request, **self._given)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        """Hands out replies."""
        return runtime_handlers.pull_messages(request, **self._given)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        """Takes a part of a message."""
        return runtime_handlers.push_object(request, **self._given)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        """Hands out a part of a reply."""
        return runtime_handlers.pull_object(request, **self._given)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        """Forgets a reply."""
        return runtime_handlers.confirm_message_received(request, **self._given)


def _once(public_keys: Iterable[bytes]) -> Callable[[Request], Awaitable[None]]:
    """Makes the check that a request is taken once, of those whose signature was found right."""
    since = _now() - datetime.timedelta(seconds=SYSTEM_TIME_TOLERANCE)
    seen = {key: SeenRequests(since) for key in public_keys}

    async def check(request: Request) -> None:  # not in a thread: one request after the other
        if not hasattr(request.state, "protobuf_request"):
            return  # it is refused for its form, and nobody has looked at its signature
        known = seen.get(b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER]))
        if known is not None and not known.admit(datetime.datetime.fromisoformat(request.headers[TIMESTAMP_HEADER])):
            raise HTTPException(409, "seen before, or signed before what has been seen: sign another one")

    return check


def _app(state: _State, once: Callable[[Request], Awaitable[None]]) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = MOST_HELD
        yield

    app = FastAPI(
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(RequestLimit),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = SimpleNamespace(state=lambda: state)  # what Flower's routes ask for the state
    app.state.enable_supernode_auth, app.state.fleet_event_log_plugin = True, None
    app.include_router(fleet_router, dependencies=[Depends(once)])
    return app


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _listening(address: Address) -> socket.socket:
    try:
        return socket.create_server((address.host, address.port))
    except OSError as error:
        raise LinkError(f"{address}: cannot listen there ({error}); choose another port, or stop what has it") from error
