"""A timeline lays a node's parts end to end, and shows what was noted and nothing else.

Run: pytest tests/unit/test_timeline.py
"""

import io
import itertools
import struct

import pytest
from rich.console import Console
from test_report import MEASURED, make_summary

from cooperllm.errors import DecodeError
from cooperllm.link.envelope import LONGEST_S, stamp, unstamp
from cooperllm.report import times_table, write_page, write_timeline
from cooperllm.report.timeline import EXPECTED, bars, lanes_of, spans


def spent(node, **changes):
    return {"node": node, "begun_s": 0.0, "received_s": 0.1, "waited_s": 0.0, "worked_s": 1.0, "returned_s": 0.2} | changes


def rounds():
    """Two rounds; the second is asked before the first is closed, and its device has it in hand meanwhile."""
    first = [{"own": spent(0, worked_s=1.5), "devices": [spent(2), spent(10, received_s=0.25)], "scheduled": []}]
    expected = {"bits": 4, "expected": spent(2, worked_s=1.1)}
    second = [{"own": spent(0, begun_s=0.05), "devices": [spent(2, waited_s=0.4)], "scheduled": [expected]}]
    return [
        {"round": 1, "begun_at": 100.0, "asked_at": 100.5, "answered_at": 102.5, "closed_at": 102.6, "edges": first},
        {"round": 2, "begun_at": 100.5, "asked_at": 100.6, "answered_at": 104.0, "closed_at": 104.1, "edges": second},
    ]


def test_the_parts_of_a_message_follow_each_other_from_the_moment_it_left():
    device = [span for span in spans(rounds()) if span.lane == "device 2" and span.number == 2]
    device = [span for span in device if span.kind != EXPECTED]
    assert [span.kind for span in device] == ["order travels", "in hand", "at work", "answer travels"]
    # asked at .6, the edge had it .05 + .1 later, and sent it on at once
    assert device[0].begun_s == pytest.approx(0.75)
    assert [later.begun_s - earlier.ended_s for earlier, later in itertools.pairwise(device)] == pytest.approx([0, 0, 0])
    assert device[-1].ended_s == pytest.approx(0.75 + 0.1 + 0.4 + 1.0 + 0.2)


def test_what_was_expected_begins_where_the_order_left():
    (span,) = (span for span in spans(rounds()) if span.kind == EXPECTED)
    assert (span.lane, span.number) == ("device 2", 2)
    assert (span.begun_s, span.ended_s) == pytest.approx((0.75, 0.75 + 0.1 + 1.1 + 0.2))


def test_lanes_are_in_the_order_of_tiers_and_numbers():
    assert lanes_of(rounds()) == ["cloud", "edge 0", "device 2", "device 10"]


def test_the_table_has_medians_over_the_rounds_in_which_a_node_answered():
    console = Console(width=80, file=io.StringIO())
    console.print(times_table(rounds()))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["device", "2", "0.100", "0.200", "1.000", "0.200", "2"] in lines
    assert ["device", "10", "0.250", "0.000", "1.000", "0.200", "1"] in lines
    assert "1.50 s from one step to the next" in console.file.getvalue()


def test_the_picture_is_a_png_and_stands_in_its_directory(tmp_path):
    file = write_timeline(rounds(), tmp_path)
    assert file == tmp_path / "timeline.png"
    assert file.read_bytes().startswith(b"\x89PNG")


def test_bars_stay_within_the_drawing_and_those_of_two_rounds_beside_each_other():
    drawn = bars(rounds(), 700, 20)
    assert all(bar.x >= 0 and bar.x + bar.width <= 700.5 and bar.y >= 0 and bar.y + bar.height <= 80 for bar in drawn)
    halves = {"round 1": set(), "round 2": set()}
    for bar in drawn:
        halves[bar.words.split(", ")[1].split(":")[0]].add(bar.y % 20 >= 10)
    assert halves == {"round 1": {True}, "round 2": {False}}


def test_the_page_says_of_every_bar_what_it_is(tmp_path):
    summary = make_summary(feedback=MEASURED)
    page = write_page(summary, tmp_path, [], rounds()).read_text()
    assert "<title>device 2, round 2: in hand 0.400 s, from 0.850 s</title>" in page
    assert "Who was at work when" not in write_page(summary, tmp_path, []).read_text()


@pytest.mark.parametrize(
    "data",
    [b"", bytes(11), struct.pack("<3f", -1, 0, 0), struct.pack("<3f", 0, float("nan"), 0), struct.pack("<3f", 0, 0, 2 * LONGEST_S)],
    ids=["nothing", "a byte short", "negative", "no number", "longer than anybody lives"],
)
def test_an_answer_without_times_is_refused(data):
    with pytest.raises(DecodeError):
        unstamp(data)


def test_a_stamp_is_taken_off_again():
    assert unstamp(stamp(b"", 0, 0, 0)) == (b"", (0, 0, 0))
    assert unstamp(stamp(b"abc", 0.5, 0.25, 2)) == (b"abc", (0.5, 0.25, 2))
