"""The link over Flower: what must be the same as on the loopback, and what a bad device may and may not do.

Run: pytest tests/system/test_flower.py
"""

import resource
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import sample_messages

from cooperllm.errors import ConfigError, LinkError
from cooperllm.link import flower
from cooperllm.link.base import Exchange, Link
from cooperllm.link.codec import decode, encode
from cooperllm.link.flower import GridLink, InProcessGrid, client_app, run_in_process, run_in_simulation
from cooperllm.link.loopback import Loopback
from cooperllm.messages import Grouping, Guide, Order, Probes

NUM_DEVICES = 3
BROKEN, GARBLED, IMPOSTOR = 11, 12, 13
"""Rounds in which device 1 misbehaves."""


class EchoDevices:
    """Answers with numbers that depend on the order and on the device; device 1 misbehaves in some rounds."""

    def __init__(self) -> None:
        self.num_answers = 0

    def answer(self, data: bytes) -> bytes:
        order = decode(data, Order)
        self.num_answers += 1
        device_id, round_index = order.device_id, order.plan.round_index
        if device_id == 1 and round_index == BROKEN:
            raise MemoryError("not enough for a batch of 16")
        if device_id == 1 and round_index == GARBLED:
            return b"\xc1 no message"
        report = sample_messages.device_report(
            2 if device_id == 1 and round_index == IMPOSTOR else device_id,
            order.plan,
            num_examples=self.num_answers,
            column_slopes=np.arange(device_id + 1, dtype=np.float32),
            random_slopes=np.full(2, device_id / 3, np.float32),
        )
        return encode(report)


def orders(num_devices: int = NUM_DEVICES, round_index: int = 0, guide_bytes: int = 1000) -> list[Order]:
    plan = sample_messages.plan(
        round_index=round_index,
        cohort=tuple(range(num_devices)),
        guide=Guide(payload=bytes(guide_bytes), num_columns=1, has_momentum=False),
        num_columns=2,
        probes=Probes(measures_columns=True, num_random=2, grouping=Grouping.SHARED, column_scale=0.01, random_scale=0.01),
    )
    return [Order(device_id=device_id, group=0, plan=plan, updates=(), snapshot=None) for device_id in range(num_devices)]


def grid_link(num_devices: int = NUM_DEVICES) -> GridLink:
    return GridLink(InProcessGrid(client_app(EchoDevices), num_devices), num_devices)


def facts(exchange: Exchange) -> tuple[list[bytes], int, int, tuple[int, ...]]:
    """Everything but the order of arrival."""
    in_order = sorted(exchange.reports, key=lambda report: report.device_id)
    return [encode(report) for report in in_order], exchange.bytes_down, exchange.bytes_up, tuple(exchange.lost)


def two_rounds(link: Link) -> list[Exchange]:
    return [link.exchange(orders(round_index=0)), link.exchange(orders(round_index=1)[:2])]


class Unbuildable:
    def __init__(self) -> None:
        raise ConfigError("model.name: found 'gpt-9', expected a model that exists")


def interrupt(_link: Link) -> None:
    raise KeyboardInterrupt


def fail(_link: Link) -> None:
    raise ZeroDivisionError("in the middle of a round")


def test_in_process_grid_gives_what_the_loopback_gives():
    found: list[Exchange] = []
    run_in_process(EchoDevices, NUM_DEVICES, lambda link: found.extend(two_rounds(link)))
    assert [facts(exchange) for exchange in found] == [facts(exchange) for exchange in two_rounds(Loopback(EchoDevices()))]


@pytest.mark.parametrize(
    ("round_index", "reason"),
    [(BROKEN, "MemoryError: not enough for a batch of 16"), (GARBLED, "DeviceReport: "), (IMPOSTOR, "a report of device 2")],
)
def test_a_bad_answer_loses_its_device_and_no_other(round_index: int, reason: str, caplog: pytest.LogCaptureFixture):
    link = grid_link()
    exchange = link.exchange(orders(round_index=round_index))
    assert sorted(report.device_id for report in exchange.reports) == [0, 2]
    assert exchange.lost == (1,)
    assert reason in link.lost_reasons[1]
    assert reason in caplog.text


def test_a_lost_device_is_asked_again_and_comes_back():
    link = grid_link()
    link.exchange(orders(round_index=BROKEN))
    assert not link.exchange(orders(round_index=BROKEN + 90)).lost
    assert not link.lost_reasons


def test_a_device_that_never_answers_is_lost_at_the_deadline_and_delays_no_other():
    class MuteGrid(InProcessGrid):
        def pull_messages(self, message_ids):
            return [m for m in super().pull_messages(message_ids) if "probe" not in m.metadata.message_type or m.metadata.src_node_id != 3]

    link = GridLink(MuteGrid(client_app(EchoDevices), NUM_DEVICES), NUM_DEVICES, device_timeout_s=0.1)
    exchange = link.exchange(orders())
    assert (sorted(report.device_id for report in exchange.reports), exchange.lost) == ([0, 2], (1,))
    assert link.lost_reasons == {1: "no answer in time"}


def test_devices_that_never_show_up_are_an_error_with_a_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flower, "START_TIMEOUT_S", 0.1)
    link = GridLink(InProcessGrid(client_app(EchoDevices), 2), NUM_DEVICES)
    with pytest.raises(LinkError, match="2 of 3 devices showed up"):
        link.exchange(orders())


def test_devices_that_cannot_be_built_are_an_error_at_once():
    link = GridLink(InProcessGrid(client_app(Unbuildable), NUM_DEVICES), NUM_DEVICES)
    with pytest.raises(LinkError, match="gpt-9"):
        link.exchange(orders())


def test_an_exception_of_the_grid_becomes_a_link_error_with_its_cause():
    class DeadGrid(InProcessGrid):
        def push_messages(self, messages):
            raise ConnectionResetError("peer is gone")

    with pytest.raises(LinkError, match="peer is gone") as caught:
        GridLink(DeadGrid(client_app(EchoDevices), 1), 1).exchange(orders(1))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_two_thousand_devices_with_a_large_guide_keep_neither_orders_nor_reports():
    num_devices, guide_bytes = 2000, 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exchanges: list[int] = []
    run_in_process(EchoDevices, num_devices, lambda link: exchanges.append(len(link.exchange(orders(num_devices, 0, guide_bytes)).reports)))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert exchanges == [num_devices]
    assert grown_mib < 150, "2000 orders of 1 MiB are not all in memory at once"


def test_a_process_builds_its_devices_once_and_keeps_them():
    class Counted(EchoDevices):
        built = 0

        def __init__(self) -> None:
            super().__init__()
            Counted.built += 1

    link = GridLink(InProcessGrid(client_app(Counted), NUM_DEVICES), NUM_DEVICES)
    for round_index in range(3):
        link.exchange(orders(round_index=round_index))
    assert Counted.built == 1


@pytest.mark.parametrize("run", [run_in_process, partial(run_in_simulation, num_cpus=1)])
@pytest.mark.parametrize(("drive", "kind"), [(fail, ZeroDivisionError), (interrupt, KeyboardInterrupt)])
def test_what_the_run_raises_reaches_the_caller(run: Callable[..., None], drive: Callable[[Link], None], kind: type[BaseException]):
    with pytest.raises(kind):
        run(EchoDevices, NUM_DEVICES, drive)


def test_wrong_setting_in_process_reaches_the_caller_as_it_is():
    with pytest.raises(ConfigError, match="gpt-9"):
        run_in_process(Unbuildable, NUM_DEVICES, fail)


def test_simulation_gives_what_the_loopback_gives_and_loses_only_bad_devices():
    found: list[Exchange] = []

    def drive(link: Link) -> None:
        found.extend([*two_rounds(link), link.exchange(orders(round_index=BROKEN))])

    run_in_simulation(EchoDevices, NUM_DEVICES, drive, num_cpus=1)
    *same, broken = found
    expected = two_rounds(Loopback(EchoDevices()))
    # Ray's order of arrival is its own, and EchoDevices puts its count of answers into a report: compare without it.
    assert [facts(exchange)[1:] for exchange in same] == [facts(exchange)[1:] for exchange in expected]
    for exchange, reference in zip(same, expected, strict=True):
        slopes = {report.device_id: report.column_slopes.tolist() for report in exchange.reports}
        assert slopes == {report.device_id: report.column_slopes.tolist() for report in reference.reports}
        counts = sorted(report.num_examples for report in exchange.reports)
        assert counts == [report.num_examples for report in reference.reports], "one process, one set of devices"
    assert (len(broken.reports), broken.lost) == (2, (1,))


def test_an_engine_that_dies_ends_the_wait_and_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch):
    import ray

    def cannot_start(**settings: object) -> None:
        raise OSError("no room in /dev/shm")

    monkeypatch.setattr(ray, "init", cannot_start)
    with pytest.raises(LinkError, match="Flower's simulation failed") as caught:
        run_in_simulation(EchoDevices, NUM_DEVICES, two_rounds)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "cooperllm\[simulation\]"'):
        run_in_simulation(EchoDevices, NUM_DEVICES, fail)
