"""What operators look at: a page that keeps itself up to date, and metrics for Prometheus. Read-only, on this machine alone.

    GET /             the page; loads nothing, works without internet
    GET /status.json  the same as data
    GET /metrics      the same for Prometheus

Everything is read from the run's directory when somebody asks, by a process of its own: whatever happens to it, the run does not notice.
"""

import datetime
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from cooperllm.errors import LinkError, RunDirectoryError
from cooperllm.status import Status, read_status

REFRESH_S = 2
PLOT_WIDTH, PLOT_HEIGHT = 640, 160
PAGE = Environment(
    loader=PackageLoader("cooperllm", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).get_template("monitor.html.jinja")


def serve_monitor(run: Path, host: str, port: int, tell: Callable[[str], object]) -> None:
    """Serves the page until interrupted.

    Args:
        run: A run directory.
        host: Of this machine.
        port: Where to listen; 0 lets the system choose.
        tell: Called with the page's address, once it is there.

    Raises:
        RunDirectoryError: If there is no run.
        LinkError: If the port is taken.
    """
    read_status(run, _now())
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise LinkError(f"{host}:{port}: cannot listen there ({error}); choose another port, or stop what has it") from error
    with listening:
        tell(f"http://{host}:{listening.getsockname()[1]}/")
        uvicorn.Server(uvicorn.Config(monitor_app(run), log_config=None, access_log=False)).run(sockets=[listening])


def monitor_app(run: Path) -> Starlette:
    """Makes the page's application.

    Args:
        run: A run directory.

    Returns:
        The application, which changes nothing.
    """

    def page(_request: Request) -> Response:
        return _answered(run, lambda status: HTMLResponse(PAGE.render(status=status, points=plot_points(status), refresh_s=REFRESH_S)))

    def data(_request: Request) -> Response:
        return _answered(run, lambda status: Response(msgspec.json.encode(status), media_type="application/json"))

    def metrics(_request: Request) -> Response:
        return _answered(run, lambda status: Response(exposed(status), media_type=CONTENT_TYPE_PLAIN_0_0_4))

    return Starlette(routes=[Route("/", page), Route("/status.json", data), Route("/metrics", metrics)])


def exposed(status: Status) -> bytes:
    """Writes a status for Prometheus.

    Args:
        status: Of the run.

    Returns:
        Its text format.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(status))
    return generate_latest(registry)


def plot_points(status: Status) -> str:
    """Places the accuracies for the page's line.

    Args:
        status: Of the run.

    Returns:
        Points of an SVG polyline, from 0 to 100 % over all rounds that the run is to have; nothing before the first evaluation.
    """
    return " ".join(
        f"{number / status.num_rounds * PLOT_WIDTH:.1f},{(1 - accuracy) * PLOT_HEIGHT:.1f}" for number, accuracy in status.accuracies
    )


class _Figures(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge("round", "Rounds closed.", len(status.rounds))
        yield _gauge("rounds_planned", "Rounds that the run is to have.", status.num_rounds)
        yield _gauge("busy", "Whether a process is working on the run.", status.is_busy)
        if status.rounds:
            yield _gauge("round_seconds", "Seconds that the last round took.", status.rounds[-1]["seconds"])
            yield _gauge("devices_answered", "Devices that answered in the last round.", len(status.rounds[-1]["answered"]))
            if status.rounds[-1]["private_loss"] is not None:
                yield _gauge("private_loss", "Mean loss of the last round's devices.", status.rounds[-1]["private_loss"])
        if status.accuracies:
            yield _gauge("accuracy", "Accuracy on held-out texts, when it was last judged.", status.accuracies[-1][1])
        sent = CounterMetricFamily("cooperllm_bytes", "Bytes of our messages.", labels=["link"])
        for link in ("down", "up", "between"):
            sent.add_metric([link], status.total(f"bytes_{link}"))
        yield sent
        unused = CounterMetricFamily("cooperllm_reports_dropped", "Reports that were not used.", labels=["outcome"])
        for outcome, count in status.dropped.items():
            unused.add_metric([outcome], count)
        yield unused
        seen = GaugeMetricFamily("cooperllm_node_last_round", "Round of a node's last answer.", labels=["node"])
        took = GaugeMetricFamily("cooperllm_node_seconds", "Seconds of a node's last answer, by part.", labels=["node", "part"])
        for node in status.nodes:
            seen.add_metric([node.name], node.last_round)
            for part, seconds in (("order", node.received_s), ("work", node.worked_s), ("answer", node.returned_s)):
                took.add_metric([node.name, part], seconds)
        yield from (seen, took)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"cooperllm_{name}", words, value)


def _answered(run: Path, answer: Callable[[Status], Response]) -> Response:
    try:
        return answer(read_status(run, _now()))
    except RunDirectoryError as error:
        return PlainTextResponse(f"{error}\n", 503)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
