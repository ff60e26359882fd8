"""The report says what the numbers say, and nothing in a summary can change how it is built.

Run: python -m pytest tests/unit/test_report.py
"""

import copy
import io
import struct
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from cooperllm.config import ArmName
from cooperllm.report import arms_table, verdict, write_page, write_plots
from cooperllm.report.plots import CHARTS, STYLES, _draw_arm
from cooperllm.report.table import arm_rows, format_bytes, headings


def make_arm(*accuracies, cost=100, **changes):
    by_round = [[5 * index, accuracy] for index, accuracy in enumerate(accuracies)]
    last = by_round[-1][0]
    costs = [[index, cost * index] for index, _ in by_round]
    levels = {level: next((index for index, reached in by_round if reached >= float(level)), None) for level in ("0.6", "0.7", "0.8")}
    arm = {"rounds": last, "learning_rate": 0.03, "final_accuracy": accuracies[-1], "best_accuracy": max(accuracies)}
    arm |= {
        "accuracy_by_round": by_round,
        "forward_passes_by_round": costs,
        "bytes_by_round": costs,
        "modelled_seconds_by_round": costs,
        "rounds_to": levels,
    }
    arm |= {"forward_passes": cost * last, "bytes_up": 0, "bytes_down": cost * last, "wall_seconds": 1.0, "dropped_reports": {}}
    return arm | {"queries_per_device_round": 8, "uses_back_propagation_on_devices": False, "rho_by_round": []} | changes


def make_summary(recipe="demo", **arms):
    facts = {"recipe": recipe, "seed": 0, "model": "minilm", "num_parameters": 25346, "num_rounds": 20, "version": "0.1.0"}
    facts |= {"created": "2026-11-20T11:00:00+00:00", "machine": "a laptop", "config": {"data": {"num_test": 400}}}
    return facts | {"arms": {name.replace("_", "-"): arm for name, arm in arms.items()}}


MEASURED = make_arm(0.5, 0.72, 0.8, 0.82, 0.831)
MEZO = make_arm(0.5, 0.55, 0.6, 0.65, 0.711)
CLOUD = make_arm(0.5, 0.7, 0.75, 0.78, 0.789, cost=0)
BOUND = make_arm(0.5, 0.8, 0.85, 0.86, 0.861, uses_back_propagation_on_devices=True)
UNFINISHED = {"finished": False, "final_accuracy": 0.95, "accuracy_by_round": [[0, 0.5], [5, 0.95]]}
EVERY_ARM = make_summary(measured=MEASURED, paper=UNFINISHED, mezo_fl=MEZO, cloud_only=CLOUD, fedavg_bp=BOUND)


def page_of(summary, directory):
    return write_page(summary, directory, write_plots(summary, directory)).read_text()


def printed(summary):
    console = Console(width=80, file=io.StringIO())
    console.print(arms_table(summary))
    return console.file.getvalue()


def drawn(chart, name, arm):
    axes = Figure().add_subplot()
    _draw_arm(axes, chart, name, arm, arm["final_accuracy"])
    return list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())


def test_verdict_gives_margins_and_compares_rounds_with_the_unguided_arm():
    sentence = verdict(make_summary(measured=MEASURED, mezo_fl=MEZO, cloud_only=CLOUD))
    assert sentence == (  # mezo-fl is at its .711 in round 20; measured passes it in round 5 with .72
        "measured ends at 83.1 %, 4.2 points above cloud-only and 12.0 above mezo-fl; "
        "it reaches mezo-fl's final accuracy in 5 rounds, mezo-fl itself in 20 (4.0x fewer)."
    )


@pytest.mark.parametrize(
    ("measured", "mezo", "clause"),
    [
        ((0.5, 0.6), (0.5, 0.7), "10.0 points below mezo-fl; it never reaches mezo-fl's final accuracy."),
        ((0.5, 0.6, 0.7), (0.5, 0.7, 0.7), "accuracy in 10 rounds, mezo-fl itself in 5 (2.0x more)."),
        ((0.5, 0.6), (0.5, 0.4), "20.0 points above mezo-fl; mezo-fl ends no higher than the start."),
    ],
)
def test_verdict_does_not_flatter_the_lead(measured, mezo, clause):
    assert verdict(make_summary(measured=make_arm(*measured), mezo_fl=make_arm(*mezo))).endswith(clause)


def test_verdict_never_leads_with_an_arm_that_back_propagates_on_devices():
    assert verdict(make_summary(fedavg_bp=BOUND, decomfl=MEZO)).startswith("decomfl ends at 71.1 %, 15.0 points below fedavg-bp")


def test_an_unfinished_arm_is_marked_and_never_compared(tmp_path):
    assert verdict(EVERY_ARM).endswith("; paper has not finished.")
    assert "above paper" not in verdict(EVERY_ARM)
    assert verdict(make_summary(paper=UNFINISHED)) == "No arm has finished yet."
    assert [cells[0] for cells, is_best in arm_rows(EVERY_ARM) if is_best] == ["fedavg-bp*"]  # though paper stands at 95 %
    assert "paper\nunfinished" in page_of(EVERY_ARM, tmp_path)
    assert "unfinished" in printed(EVERY_ARM)


def test_table_keeps_every_name_and_heading_whole_in_80_columns():
    words = [word for heading in headings(EVERY_ARM) for word in heading.split()]
    assert all(word in printed(EVERY_ARM) for word in [*words, "measured", "mezo-fl", "cloud-only", "fedavg-bp*", "* back-propagates"])


def test_table_shows_the_three_highest_levels_reached():
    arm = make_arm(0.5, rounds_to={"0.5": 0, "0.6": 5, "0.7": 10, "0.8": 15, "0.9": None})
    assert headings(make_summary(measured=arm))[4:7] == ("to\n60 %", "to\n70 %", "to\n80 %")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_950, "100 kB"), (999_500, "1.0 MB"), (None, "–")]
)
def test_bytes_have_at_most_three_digits_before_the_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_page_loads_and_runs_nothing_and_describes_every_plot(tmp_path):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page_of(EVERY_ARM, tmp_path))
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == len(CHARTS)
    assert all("measured ends at 83.1 %" in image["alt"] for image in images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}


def test_hostile_names_are_shown_as_text_everywhere(tmp_path):
    arms = {"<img src=x>": MEASURED | {"dropped_reports": {"<b>": 1}}, "[red]$x_": MEZO, "_$": MEZO}
    summary = make_summary("<script>alert('$\\broken$')</script>", **arms) | {"config": {"<i>": {"name": ["<b>"]}}, "arms": arms}
    page = page_of(summary, tmp_path)
    assert "&lt;script&gt;" in page
    assert not any(tag in page for tag in ("<script", "<img src=x>", "<b>", "<i>"))
    assert "[red]$x_" in printed(summary)


def test_plots_are_150_dpi_and_survive_arms_without_points(tmp_path):
    for summary in (EVERY_ARM, make_summary(cloud_only=CLOUD), make_summary(paper={"finished": False})):
        for path in write_plots(summary, tmp_path):
            assert struct.unpack(">II", path.read_bytes()[16:24]) == (930, 630)  # 6.2 by 4.2 inches


def test_a_cost_of_nothing_is_a_level_and_never_a_point_on_a_logarithmic_axis():
    by_rounds, by_passes, by_bytes, by_time = CHARTS
    assert drawn(by_rounds, "cloud-only", CLOUD)[1] == [0.5, 0.7, 0.75, 0.78, 0.789]
    assert (
        drawn(by_passes, "cloud-only", CLOUD)[1]
        == drawn(by_bytes, "cloud-only", CLOUD)[1]
        == drawn(by_time, "cloud-only", CLOUD)[1]
        == [0.789, 0.789]
    )
    assert drawn(by_passes, "measured", MEASURED)[0] == [0, 500, 1000, 1500, 2000]  # 100 a round, every 5 rounds
    assert drawn(by_bytes, "measured", MEASURED)[0] == [500, 1000, 1500, 2000]


@pytest.mark.parametrize(("arms", "lead"), [("feedback measured paper", "feedback"), ("paper measured", "measured"), ("paper", "paper")])
def test_the_verdict_is_about_our_own_arm(arms, lead):
    summary = {"arms": {name: {"final_accuracy": 0.5, "rounds": 1, "forward_passes": 1} for name in arms.split()}}
    assert verdict(summary).startswith(f"{lead} ends at")


def test_no_two_arms_share_a_line():
    assert set(STYLES) == {name.value for name in ArmName}
    assert len({(style.color, style.dashes) for style in STYLES.values()}) == len(STYLES)


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_page(EVERY_ARM, tmp_path, [])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_reporting_does_not_change_the_summary(tmp_path):
    summary = copy.deepcopy(EVERY_ARM)
    page_of(summary, tmp_path), printed(summary), verdict(summary)
    assert summary == EVERY_ARM
