"""Spread, ratios and the choice of the baseline, on curves that fit on a page.

Run: python -m pytest tests/unit/test_results.py
"""

import pyarrow.parquet as pq
import pytest

from cooperllm.config import ArmName
from cooperllm.recipes import recipe
from cooperllm.results import SCHEMA, arms_figures, baseline_of, ratio, rows, spread, write_parquet
from cooperllm.study import Job, Tuning
from cooperllm.wall_clock import DeviceClock


def run(*accuracies, finished=True, queries=5, bound=False):
    """An entry of summary.json, evaluated every ten rounds; accuracies[0] is the start."""
    curve = [[10 * index, accuracy] for index, accuracy in enumerate(accuracies)]
    entry = {"learning_rate": 0.1, "rounds": curve[-1][0], "finished": finished, "best_accuracy": max(accuracies)}
    entry |= {"accuracy_by_round": curve, "modelled_seconds_by_round": [[at, 2.0 * at] for at, _ in curve]}
    entry |= {"queries_per_device_round": queries, "uses_back_propagation_on_devices": bound}
    return entry if finished else entry | {"outcome": "diverged"}


# Ends: means of the last four evaluations. mezo-fl: seed 0 (.5 .6 .7 .6) = .6, best .7 in round 30; seed 1 flat at its start.
ENTRIES = {
    "feedback": [run(0.5, 0.7, 0.8, 0.8, 0.9), run(0.4, 0.5, 0.6, 0.6, 0.7)],
    "mezo-fl": [run(0.5, 0.5, 0.6, 0.7, 0.6), run(0.4, 0.4, 0.4, 0.4, 0.4)],
    "decomfl": [run(0.5, 0.5, 0.5, 0.5, 0.5), run(0.4, 0.4, 0.4, 0.4, 0.4)],
    "cloud-only": [run(0.5, 0.6, 0.6, 0.6, 0.6, queries=0), run(0.4, 0.9, 0.9, 0.9, 0.9, queries=0)],
    "fedavg-bp": [run(0.5, 0.6, 0.7, 0.9, 0.9, queries=0, bound=True), run(0.4, 0.3, 0.3, 0.3, 0.3, queries=0, bound=True)],
}
TUNINGS = {name: Tuning((0.1, 0.2), 0.1) if name == "feedback" else Tuning((0.05, 0.1, 0.2), 0.1) for name in ENTRIES}


def test_spread_is_median_and_range_of_the_runs_that_ended():
    assert spread([0.5, 0.9, 0.6, None]) == {"median": 0.6, "min": 0.5, "max": 0.9, "by_seed": [0.5, 0.9, 0.6, None]}
    assert spread([0.5, 0.75])["median"] == 0.625
    assert spread([None])["median"] is None


def test_the_baseline_is_the_best_unguided_arm_that_measures_slopes_and_ended_with_every_seed():
    assert baseline_of(ENTRIES) == "mezo-fl"
    assert baseline_of(ENTRIES | {"mezo-fl": [run(0.5, 0.9), run(0.4, 0.9, finished=False)]}) == "decomfl"
    assert baseline_of({name: ENTRIES[name] for name in ("feedback", "cloud-only", "fedavg-bp")}) is None
    assert baseline_of({"paper": [run(0.5, 0.9)], "decomfl": [run(0.5, 0.6)]}) == "decomfl"


def test_rounds_and_ratios_are_seed_by_seed_and_in_the_baselines_own_rounds():
    figures = arms_figures(ENTRIES, TUNINGS)
    assert (figures["baseline"], figures["bound"]) == ("mezo-fl", "fedavg-bp")
    feedback, mezo, bound = (figures["arms"][name] for name in ("feedback", "mezo-fl", "fedavg-bp"))
    assert feedback["end_accuracy"]["by_seed"] == [pytest.approx(0.8, rel=1e-15), pytest.approx(0.6, rel=1e-15)]
    # End .6 of seed 0: mezo-fl in round 20, feedback in 10. Best .7: 30 and 10. Seed 1 never leaves the start, where both are in round 0.
    assert (mezo["rounds_to_baseline_end"], mezo["rounds_to_baseline_best"]) == ([20, 0], [30, 0])
    assert (feedback["rounds_to_baseline_end"], feedback["rounds_to_baseline_best"]) == ([10, 0], [10, 0])
    assert (feedback["ratio_to_baseline_end"], feedback["ratio_to_baseline_best"]) == ([2.0, None], [3.0, None])
    assert bound["ratio_to_baseline_best"] == [1.5, None]  # 30 / 20
    assert figures["arms"]["decomfl"]["rounds_to_baseline_best"] == [None, 0]
    assert (feedback["is_at_edge"], mezo["is_at_edge"]) == (True, False)
    assert feedback["modelled_seconds"]["median"] == 80.0


@pytest.mark.parametrize(("baseline", "arm", "expected"), [(30, 10, 3.0), (10, 20, 0.5), (None, 10, None), (30, None, None), (30, 0, None)])
def test_a_ratio_needs_two_rounds_after_the_start(baseline, arm, expected):
    assert ratio(baseline, arm) == expected


def test_a_diverged_seed_is_an_outcome_and_no_number():
    figures = arms_figures({"mezo-fl": [run(0.5, 0.6), run(0.5, 0.1, finished=False)]}, {"mezo-fl": Tuning((0.1,), 0.1)})
    arm = figures["arms"]["mezo-fl"]
    assert (arm["outcomes"], arm["end_accuracy"]["by_seed"]) == (["finished", "diverged"], [0.6, None])
    assert figures["baseline"] is None


def test_rows_are_evaluations_with_sums_since_the_start_and_survive_parquet(tmp_path):
    config = recipe("tiny").with_arm(ArmName.MEZO_FL)  # three devices a round
    before = {"accuracy_before": 0.5, "loss_before": 0.7}
    figures = {"forward_passes": 30, "bytes_up": 60, "bytes_down": 300}
    rounds = [
        {"round": 1, "accuracy": None, "validation_accuracy": None, "loss": None} | figures | before,
        {"round": 2, "accuracy": 0.6, "validation_accuracy": 0.55, "loss": 0.6} | figures,
    ]
    clock = DeviceClock(forward_passes_per_s=10, downlink_mbit_per_s=1e9, uplink_mbit_per_s=1e9, latency_s=0.5)
    listed = rows(Job(ArmName.MEZO_FL, 0.1, 7), config, rounds, clock, is_result=True, outcome="finished")
    assert [row["round"] for row in listed] == [0, 2]
    assert (listed[0]["accuracy"], listed[0]["validation_accuracy"], listed[0]["forward_passes"]) == (0.5, None, 0)
    assert [listed[1][name] for name in ("forward_passes", "bytes_up", "bytes_down")] == [60, 120, 600]
    assert listed[1]["modelled_seconds"] == 4.0  # twice 10 passes at 10 a second and two latencies of a half; the bytes vanish
    write_parquet(tmp_path / "results.parquet", listed)
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == listed
    assert pq.read_schema(tmp_path / "results.parquet").names == SCHEMA.names
