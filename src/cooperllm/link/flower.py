"""The link over Flower: the only file that knows the federation engine.

    drive(GridLink) --order--> Grid --bytes--> node: ClientApp --> Devices.answer,  and the report's bytes come back the same way

The same two apps run on `InProcessGrid` (no thread, no process: thousands of devices cost a context each) and in Flower's simulation (Ray).
Messages cross as the codec's bytes in an `Array`, which Flower chunks where it does not chunk a `ConfigRecord`; nothing that arrives is
unpickled. Only Ray ships the app itself to its workers that way, anew with every message: what lasts in a process hangs on this module.

Flower 1.41, met on the way:
    - `Grid.send_and_receive` sleeps 3 s between looks, so we look ourselves; in a deployment a missing object still costs 1 s.
    - `HttpGrid` sends a generator empty. We push one by one: a grid that answers at once then holds a single order in memory.
    - `Message()` asks a process-wide `TaskIdentity`, which only Flower's own launchers fill in.
    - The simulation runs the ServerApp in a thread that Ctrl-C does not reach, and words an exception of the ClientApp with two tracebacks:
      we keep the run in the caller's thread, and make our own error replies.
"""

import gc
import logging
import os
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Event
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cooperllm.errors import ConfigError, DecodeError, LinkError
from cooperllm.link.base import Devices, Exchange, Link
from cooperllm.link.codec import decode, encode
from cooperllm.link.envelope import unwrap, wrap
from cooperllm.messages import DeviceReport, Order, Spent

MakeDevices = Callable[[], Devices]
"""Builds the devices of one process; for the simulation it must survive pickling, as a partial of a module's function does."""
Drive = Callable[[Link], None]
"""The run itself: everything above the link."""

LATE = "not waited for: enough others had answered"
IDENTIFY, PROBE = "query.identify", "train.probe"
POLL_S, START_TIMEOUT_S = 0.02, 600.0
_log = logging.getLogger(__name__)
_built: dict[str, Devices] = {}


def client_app(make_devices: MakeDevices) -> ClientApp:
    """Makes the app of every node: it says which device the node is, and answers orders.

    Args:
        make_devices: Called once in each process that runs the app, when a node is first asked who it is.

    Returns:
        The app; whatever its devices raise becomes an error reply.
    """
    app, key = ClientApp(), uuid4().hex
    for register in (app.query("identify"), app.train("probe")):
        register(partial(_answer, key, make_devices))
    weakref.finalize(app, _built.pop, key, None)  # where the app was made, the devices end with it
    return app


def message_app(answer: Callable[[Mapping[str, object], bytes], bytes]) -> ClientApp:
    """Makes the app of a node whose process lives for a single message, as Flower's official SuperNode has it.

    Args:
        answer: Called with the node's settings, as its owner gave them, and the order's bytes; returns those of the answer.

    Returns:
        The app; whatever `answer` raises becomes an error reply.
    """
    app = ClientApp()
    app.train("probe")(lambda message, context: _walled(lambda: answer(context.node_config, unwrap(message)), message, logging.WARNING))
    return app


def server_app(drive: Drive, num_devices: int, *, device_timeout_s: float = 600.0, check: Callable[[], object] = bool) -> ServerApp:
    """Makes the app that runs the federation.

    Args:
        drive: Receives the link; returns when the run is over.
        num_devices: Devices to wait for, numbered from 0.
        device_timeout_s: Seconds after which the devices of a round that have not answered are lost.
        check: Raises when the engine is gone, so that nobody waits for it; called while waiting.

    Returns:
        The app.
    """
    app = ServerApp()
    app.main()(lambda grid, _context: drive(GridLink(grid, num_devices, device_timeout_s, check)))
    return app


class GridLink:
    """The link on any grid of Flower's.

    Attributes:
        lost_reasons: Why nodes were lost in the latest exchange, by number.
        spent: How nodes that answered in it spent their time, by number; nothing where they do not say so.
        whom: What the nodes are, for people.
    """

    whom = "device"

    def __init__(self, grid: Grid, num_devices: int, device_timeout_s: float = 600.0, check: Callable[[], object] = bool) -> None:
        self.lost_reasons: dict[int, str] = {}
        self.spent: dict[int, Spent] = {}
        self._grid, self._num_devices, self._timeout_s, self._check = grid, num_devices, device_timeout_s, check
        self._nodes: dict[int, int] = {}

    def exchange(self, orders: Sequence[Order]) -> Exchange:
        """Sends every order and waits for the answers; a lost device is named, not raised.

        Args:
            orders: At most one per device.

        Returns:
            Reports in the order of their arrival, and the bytes of orders and reports as encoded.

        Raises:
            LinkError: If the engine fails, or if some device has not shown up in time for the first exchange.
        """
        num_bytes: list[int] = []

        def packed() -> Iterator[tuple[int, bytes]]:
            for order in orders:  # one at a time: a grid that answers at once then holds a single order in memory
                data = encode(order)
                num_bytes.append(len(data))
                yield order.device_id, data

        received = self.send(packed())
        reports: list[DeviceReport] = []
        for device_id, data in received.items():
            try:
                reports.append(_read(data, device_id))
            except DecodeError as error:
                self._lose(device_id, str(error))
        return Exchange(
            reports=reports,
            bytes_down=sum(num_bytes),
            bytes_up=sum(map(len, received.values())),
            lost=tuple(self.lost_reasons),
            late=tuple(number for number, reason in self.lost_reasons.items() if reason == LATE),
            spent=tuple(self.spent.values()),
        )

    def send(self, packed: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
        """Sends bytes to nodes and waits for what they answer.

        Args:
            packed: Our number of a node and what it is sent, at most once each.

        Returns:
            What came back, by number, in the order of arrival; `lost_reasons` says what became of the others.

        Raises:
            LinkError: If the engine fails, or if some node has not shown up in time for the first message.
        """
        self._find_nodes()
        self.lost_reasons, pending = {}, dict[str, int]()
        received: dict[int, bytes] = {}
        for number, data in packed:
            self.lost_reasons[number] = "no answer in time" if number in self._nodes else "not connected"
            if number in self._nodes:
                pending |= self._push(number, self._nodes[number], PROBE, data, self._timeout_s)
        for number, reply in self._replies(pending, time.monotonic() + self._timeout_s):
            try:
                received[number] = self._opened(number, unwrap(reply))
                del self.lost_reasons[number]
            except DecodeError as error:
                self.lost_reasons[number] = str(error)
        for number, reason in self.lost_reasons.items():
            self._lose(number, reason)
        return received

    def _opened(self, _number: int, data: bytes) -> bytes:
        """Takes off what a node has written before its answer."""
        return data

    def _lose(self, number: int, reason: str) -> None:
        self.lost_reasons[number] = reason
        _log.warning("%s %d is lost: %s", self.whom, number, reason)

    def _find_nodes(self) -> None:
        """Asks nodes which device they are until all devices are known; nodes appear while the engine starts."""
        pending: dict[str, int] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self._nodes) < self._num_devices:
            with _engine("listing nodes"):
                new = set(self._grid.get_node_ids()) - set(self._nodes.values())
            for node_id in new:
                pending |= self._push(node_id, node_id, IDENTIFY, b"", START_TIMEOUT_S)
            for node_id, reply in self._replies(pending, deadline):
                if reply.has_content():
                    self._nodes[decode(unwrap(reply), int)] = node_id
                elif reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                    raise LinkError(f"a node cannot build its devices: {reply.error.reason}")
            if len(self._nodes) < self._num_devices and not self._wait(deadline):
                raise LinkError(
                    f"{len(self._nodes)} of {self._num_devices} devices showed up within {START_TIMEOUT_S:g} s; "
                    "start the missing ones, or lower `federation.num_devices`"
                )

    def _push(self, label: int, node_id: int, kind: str, data: bytes, ttl: float) -> dict[str, int]:
        with _engine("sending"):  # what a grid does not take has no id, or None for one
            message_ids = self._grid.push_messages([Message(wrap(data), node_id, kind, ttl=ttl)])
            return {message_id: label for message_id in message_ids if message_id}

    def _replies(self, pending: dict[str, int], deadline: float) -> Iterator[tuple[int, Message]]:
        while pending:
            with _engine("receiving"):
                messages = list(self._grid.pull_messages(self._worth_asking(pending)))
            yield from ((pending.pop(message.metadata.reply_to_message_id), message) for message in messages)
            for message_id in [message_id for message_id, number in pending.items() if self._is_gone(number)]:
                del pending[message_id]
                self._give_up(message_id)
            if pending and not self._wait(deadline):
                for message_id in pending:
                    self._give_up(message_id)
                return

    def _worth_asking(self, pending: dict[str, int]) -> list[str]:
        """Messages that there may be a reply to."""
        return list(pending)

    def _give_up(self, _message_id: str) -> None:
        """Nobody waits for an answer any longer."""

    def _is_gone(self, _number: int) -> bool:
        """Whether nobody should wait for a node any longer."""
        return False

    def _wait(self, deadline: float) -> bool:
        self._check()
        time.sleep(POLL_S)
        return time.monotonic() < deadline


class InProcessGrid(Grid):
    """Runs an app for many nodes in the caller's process: a message is answered while it is pushed."""

    def __init__(self, app: ClientApp, num_devices: int) -> None:
        self._app, self._run = app, Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        first = SUPERLINK_NODE_ID + 1
        self._contexts = {first + i: Context(1, first + i, {"partition-id": i}, RecordDict(), {}) for i in range(num_devices)}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Keeps what Flower knows of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """What Flower knows of the run."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Makes a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Lists the nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answers messages one after the other and keeps the replies."""
        message_ids: list[str] = []
        for message in messages:
            message_ids.append(uuid4().hex)
            message.metadata.__dict__["_message_id"] = message_ids[-1]  # as Flower's own grids do it
            self._replies[message_ids[-1]] = self._app(message, self._contexts[message.metadata.dst_node_id])
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hands replies over."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Pushes and pulls; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))


def run_in_process(make_devices: MakeDevices, num_devices: int, drive: Drive) -> None:
    """Runs both apps in this process; what `make_devices` and `drive` raise reaches the caller as it is.

    Args:
        make_devices: Builds the devices, before anything runs.
        num_devices: Devices, numbered from 0.
        drive: The run.
    """
    devices = make_devices()
    grid = InProcessGrid(client_app(lambda: devices), num_devices)
    server_app(drive, num_devices)(grid, Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), {}))


def run_in_simulation(make_devices: MakeDevices, num_devices: int, drive: Drive, *, num_cpus: int = 1) -> None:
    """Runs the devices' app in worker processes of Ray, and `drive` in the caller's thread, where its exceptions and Ctrl-C belong.

    Args:
        make_devices: Builds the devices, once in each worker.
        num_devices: Devices, numbered from 0.
        drive: The run.
        num_cpus: Worker processes, >= 1. Flower gives a device's order to any of them: with more than one, a worker whose devices share
            a replica may not have seen what its device has, and loses it for the round.

    Raises:
        ConfigError: If Ray is not installed, or if `num_cpus` is no number of processes.
        LinkError: If the engine fails.
    """
    if num_cpus < 1:
        raise ConfigError(f"num_cpus: found {num_cpus}, expected >= 1")
    if find_spec("ray") is None:
        raise ConfigError('the simulation engine needs Ray, which is not installed: pip install "cooperllm[simulation]"')
    from flwr.simulation import run_simulation  # noqa: PLC0415 -- optional; deprecated, yet Flower's only way in from Python

    links: SimpleQueue[Link | None] = SimpleQueue()
    finished = Event()

    def hand_over(link: Link) -> None:
        links.put(link)
        finished.wait()

    def check() -> None:
        if engine.done():
            raise LinkError(f"Flower's simulation failed: {engine.exception()}") from engine.exception()

    init_args = {"num_cpus": num_cpus, "include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    backend: dict[str, Any] = {"init_args": init_args, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    apps = server_app(hand_over, num_devices, check=check), client_app(make_devices)
    with _quiet(), ThreadPoolExecutor(1, "flower") as pool:
        engine = pool.submit(run_simulation, *apps, num_devices, backend_config=backend)
        engine.add_done_callback(lambda _: links.put(None))
        try:
            if (link := links.get()) is not None:
                drive(link)
        finally:
            finished.set()  # leaving the block waits for Flower to stop its workers
    if link is None or engine.exception() is not None:
        check()


def _answer(key: str, make_devices: MakeDevices, message: Message, context: Context) -> Message:
    def answered() -> bytes:
        if key not in _built:  # a node is there when it can answer: the first round does not wait for a model to load
            _built[key] = make_devices()
        asks_who = message.metadata.message_type == IDENTIFY
        return encode(context.node_config["partition-id"]) if asks_who else _built[key].answer(unwrap(message))

    return _walled(answered, message, logging.DEBUG)


def _walled(answered: Callable[[], bytes], message: Message, level: int) -> Message:
    try:
        data = answered()
    except Exception as error:  # noqa: BLE001 -- the wall: whatever a device raises is a value for the other side, as Flower has it
        _log.log(level, "a message could not be answered", exc_info=True)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)
    return Message(wrap(data), reply_to=message)


def _read(data: bytes, device_id: int) -> DeviceReport:
    report = decode(data, DeviceReport)
    if report.device_id != device_id:
        raise DecodeError(f"a report of device {report.device_id}")
    return report


@contextmanager
def _engine(doing: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise LinkError(f"Flower failed while {doing}: {error}") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Keeps Flower and Ray from phoning home, from talking while nothing fails, and from leaving their settings behind."""
    # For good: Flower's last event leaves from a thread of its own, and its environment variable was read at import.
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    telemetry.state["source"] = "unavailable"  # otherwise it makes a file in the home directory
    logger, environment = logging.getLogger("flwr"), dict(os.environ)  # Flower prepends all of sys.path to PYTHONPATH
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Workers see the accelerators that this process sees, so that the numbers agree.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            gc.collect()  # Ray leaves a file and a child process to it, with a warning each
            logger.setLevel(level)
            os.environ.clear()
            os.environ.update(environment)
