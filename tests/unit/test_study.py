"""Which runs a comparison needs: the same search for every arm, and nothing but validation decides.

Run: python -m pytest tests/unit/test_study.py
"""

from dataclasses import replace

import pytest

from cooperllm.config import ArmName, RunConfig
from cooperllm.errors import ConfigError
from cooperllm.recipes import recipe
from cooperllm.study import Job, Study, best_rate, mean_of_last, widened
from cooperllm.wall_clock import DeviceClock, clock_from, round_seconds
from cooperllm.workers import admits

MEZO, DECOM = ArmName.MEZO_FL, ArmName.DECOMFL


def config(arm=MEZO, rate=1.0, rounds=100):
    whole = recipe("tiny").with_arm(arm)
    return replace(whole, arm=replace(whole.arm, learning_rate=rate), num_rounds=rounds)


def study(*configs, seeds=(3, 4), **changes):
    return Study(configs=configs or (config(),), seeds=seeds, **changes)


def carried_out(plan, score):
    """Runs every job that is due until none is; returns the scores in the order of the runs."""
    scores = {}
    while due := plan.due(scores, ()):
        scores[due[0]] = score(due[0])
    return scores


def test_without_tuning_every_arm_runs_every_seed_at_its_own_rate_seed_by_seed():
    jobs = study(config(MEZO, 0.5), config(DECOM, 2.0)).jobs({})
    assert jobs == [Job(MEZO, 0.5, 3), Job(DECOM, 2.0, 3), Job(MEZO, 0.5, 4), Job(DECOM, 2.0, 4)]


@pytest.mark.parametrize(
    ("score", "rates", "best", "is_at_edge"),
    [
        (lambda rate: -abs(rate - 1.0), (0.5, 1.0, 2.0), 1.0, False),
        (lambda rate: -abs(rate - 4.0), (0.5, 1.0, 2.0, 4.0, 8.0), 4.0, False),  # 2 is an edge, 4 is one, 8 is worse
        (lambda rate: -abs(rate - 0.25), (0.125, 0.25, 0.5, 1.0, 2.0), 0.25, False),
        (lambda rate: rate, (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), 32.0, True),  # seven rates and no more
        # 1 and 2 diverge, smaller ones are equal: .5 is an edge, then the one nearest to 1
        (lambda rate: None if rate >= 1.0 else 0.6, (0.25, 0.5, 1.0, 2.0), 0.5, False),
        (lambda rate: None, (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0), 0.03125, True),  # all diverge: smaller ones are tried
    ],
)
def test_the_grid_widens_while_its_edge_is_best(score, rates, best, is_at_edge):
    plan = study(tune=True)
    tuning = plan.tuning(MEZO, carried_out(plan, lambda job: score(job.learning_rate)))
    assert (tuning.rates, tuning.best, tuning.is_at_edge) == (rates, best, is_at_edge)


def test_of_equal_rates_the_one_nearest_to_the_recipes_wins():
    assert best_rate({0.25: 0.7, 0.5: 0.7, 1.0: 0.6}, 1.0) == 0.5
    assert best_rate({0.5: 0.7, 1.0: 0.6, 2.0: 0.7}, 1.0) == 0.5  # as near: the smaller step
    assert widened((1.0, 2.0, 4.0), 2.0) is None


def test_the_first_seed_tunes_and_its_best_run_is_not_run_again():
    plan = study(tune=True)
    assert [(job.learning_rate, job.seed) for job in carried_out(plan, lambda job: -abs(job.learning_rate - 1))] == [
        (0.5, 3), (1.0, 3), (2.0, 3), (1.0, 4),
    ]  # fmt: skip
    assert all(plan.config(job).validates and plan.config(job).num_rounds == 100 for job in plan.jobs({}))


def test_short_runs_only_tune():
    plan = study(config(MEZO, rounds=100), config(DECOM, rounds=10), seeds=(3,), tune=True, tune_rounds=10)
    scores = carried_out(plan, lambda job: -abs(job.learning_rate - 1))
    mezo, decom = ([job for job in scores if job.arm is arm] for arm in (MEZO, DECOM))
    assert [(job.is_short, plan.config(job).num_rounds) for job in mezo] == [(True, 10)] * 3 + [(False, 100)]
    assert [(job.is_short, plan.config(job).num_rounds) for job in decom] == [(False, 10)] * 3  # no shorter than the arm's own
    assert len({plan.directory(job) for job in scores}) == len(scores)


def test_a_run_that_failed_keeps_its_arm_from_choosing_and_no_other():
    plan = study(config(MEZO), config(DECOM), seeds=(3,), tune=True)
    failed = Job(MEZO, 2.0, 3)
    scores = {}
    while due := plan.due(scores, [failed]):
        scores[due[0]] = -abs(due[0].learning_rate - 1)
    assert plan.tuning(MEZO, scores).best is None
    assert plan.tuning(DECOM, scores).best == 1.0


def test_the_number_of_runs_is_never_overstated():
    plan = study(config(MEZO), config(DECOM), seeds=(1, 2, 3), tune=True)
    scores = carried_out(plan, lambda job: -abs(job.learning_rate - 2))
    counts = [plan.least_jobs(dict(list(scores.items())[:number])) for number in range(len(scores) + 1)]
    assert counts[0] == 2 * (3 + 2)  # three rates, and two more seeds at the best
    assert counts == sorted(counts)
    assert counts[-1] == len(scores) == 2 * (4 + 2)  # the grid has widened by one


def test_the_end_of_a_run_is_the_mean_of_its_last_four_evaluations_after_the_start():
    assert mean_of_last([[0, 0.0], [5, 0.9], [10, 0.5], [15, 0.6], [20, 0.7], [25, 0.8]]) == pytest.approx(0.65, abs=1e-15)  # rounding
    assert mean_of_last([[0, 0.9], [5, 0.5]]) == 0.5
    assert mean_of_last([[0, 0.9]]) is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: study(config(), config()), "mezo-fl, mezo-fl, expected at least one and each one once"),
        (lambda: study(seeds=()), "seeds: found none"),
        (lambda: study(seeds=(1, 1)), "seeds: found 1, 1"),
        (lambda: study(tune_rounds=5), "together with tuning"),
        (lambda: study(processes=0), "processes: found 0, expected >= 1"),
        (lambda: study(memory_limit_mib=0), "memory_limit_mib: found 0"),
        (lambda: clock_from("speed=5"), "clock: found 'speed', expected one of forward_passes_per_s"),
        (lambda: clock_from("latency_s=slow"), "clock: found 'latency_s=slow', expected NAME=VALUE"),
        (lambda: clock_from("uplink_mbit_per_s=0"), "clock.uplink_mbit_per_s: found 0.0, expected > 0"),
    ],
)
def test_a_mistake_is_a_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_the_modelled_round_adds_passes_both_links_and_a_round_trip():
    clock = DeviceClock(forward_passes_per_s=4, downlink_mbit_per_s=16, uplink_mbit_per_s=2, latency_s=0.25)
    # 10 / 4 + 8 x 1e6 / 16e6 + 8 x 5e5 / 2e6 + 2 x 0.25 = 2.5 + 0.5 + 2 + 0.5
    assert round_seconds(clock, forward_passes=10, bytes_down=1e6, bytes_up=5e5) == pytest.approx(5.5, rel=1e-15)
    assert round_seconds(clock, forward_passes=0, bytes_down=0, bytes_up=0) == 0
    assert round_seconds(clock, forward_passes=0, bytes_down=1e-9, bytes_up=0) > 0.5


def test_a_process_counts_with_what_it_may_come_to_use():
    assert admits([100.0, 900.0], 1000.0, 0.0, 3000.0)
    assert not admits([100.0, 900.0], 1000.0, 1.0, 3000.0)  # 1 + 3 x 1000
    assert not admits([1500.0, 900.0], 1000.0, 0.0, 3000.0)  # one has grown beyond the estimate


def test_a_plain_comparison_keeps_a_directory_per_arm():
    assert study(seeds=(3,)).directory(Job(MEZO, 1.0, 3)) == "mezo-fl"
    assert study().directory(Job(MEZO, 0.00375, 4)) == "mezo-fl-0.00375-seed4"
    assert isinstance(study().config(Job(MEZO, 0.5, 4)), RunConfig)
