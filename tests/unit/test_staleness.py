"""Rounds that overlap: a plan from an earlier θ says so and what to guess, and nothing is made of a θ that was given up.

Run: pytest tests/unit/test_staleness.py
"""

from dataclasses import replace

import numpy as np
import pytest
import sample_messages
from test_guide import EVERY_CLASS, SIZE, answered, cloud_of

from cooperllm import session
from cooperllm.algorithm import compression, noise, replay
from cooperllm.config import ArmConfig, ArmName, EngineName, FederationConfig, RunConfig
from cooperllm.edge import Edge
from cooperllm.errors import ConfigError
from cooperllm.messages import Outcome, StepKind

MEZO = ArmConfig(name=ArmName.MEZO_FL)


def test_a_round_that_begins_early_names_its_own_number_and_the_theta_it_starts_from():
    cloud = cloud_of(EVERY_CLASS, MEZO, rounds=2)
    now, early = cloud.plan().plan, cloud.plan(3).plan
    assert (now.round_index, now.model_version, now.lookahead_rate) == (2, 2, 0.0)
    assert (early.round_index, early.model_version, early.lookahead_rate) == (3, 2, MEZO.learning_rate)
    assert early.seed == cloud_of(EVERY_CLASS, MEZO, rounds=3).plan().plan.seed, "which devices and texts depends on the round alone"


def test_answers_about_a_theta_that_was_given_up_move_nothing_and_are_counted():
    cloud = cloud_of(EVERY_CLASS, MEZO, rounds=2)
    early = cloud.plan(3)
    back = compression.pack_vector(noise.gaussian(8, 0, SIZE), compression.EXACT)
    blank = sample_messages.update(2, learning_rate=MEZO.learning_rate / 2, dense=back, kind=StepKind.ROLLBACK)
    cloud.replay(replay.seal(cloud.replica, blank, cloud.config.optimizer)[0])
    theta = cloud.replica.theta
    closed = cloud.close(early, [answered(early)])
    assert closed.update.kind is StepKind.HOLD
    assert closed.update.loss is None
    assert closed.dropped == {Outcome.STALE: 5}
    assert np.array_equal(closed.replica.theta, theta)
    assert closed.replica.model_version == 4
    assert cloud.plan().plan.model_version == 4


def test_answers_a_step_behind_are_stepped_from_where_theta_is():
    cloud = cloud_of(EVERY_CLASS, MEZO, rounds=2)
    first, second = cloud.plan(), cloud.plan(3)
    closed = [cloud.close(prepared, [answered(prepared)]) for prepared in (first, second)]
    assert [one.update.model_version for one in closed] == [2, 3]
    assert [one.update.round_index for one in closed] == [2, 3]
    assert [one.update.seed for one in closed] == [first.plan.seed, second.plan.seed]


@pytest.mark.parametrize("arm", [ArmName.MEASURED, ArmName.FWDLLM, ArmName.PAPER, ArmName.WARM_START, ArmName.CLOUD_ONLY])
def test_arms_whose_steps_are_named_by_theta_are_refused(arm):
    with pytest.raises(ConfigError, match=rf"federation.staleness: found 1, expected 0 for the arm {arm.value}"):
        RunConfig(arm=ArmConfig(name=arm), federation=FederationConfig(staleness=1))


@pytest.mark.parametrize(("setting", "found"), [("over_selection", 1.5), ("adapts_bits", True)])
def test_what_depends_on_speed_is_refused_where_all_is_one_process(tmp_path, setting, found):
    config = RunConfig(federation=FederationConfig(**{setting: found}), engine=EngineName.LOOPBACK)
    with pytest.raises(ConfigError, match=rf"federation.{setting}: found {found}"):
        session.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_devices_are_asked_than_are_waited_for_but_not_more_than_there_are():
    federation = FederationConfig(num_devices=20, devices_per_round=5, over_selection=1.3)
    assert len(cloud_of(EVERY_CLASS, MEZO, federation=federation).plan().plan.cohort) == 7
    with pytest.raises(ConfigError, match=r"federation.over_selection: found 4.5, expected 1 to 4, all devices"):
        replace(federation, over_selection=4.5)


def test_late_devices_are_counted_by_themselves():
    found = Edge(0, [0, 1, 2], SIZE).fold(sample_messages.plan(cohort=(0, 1, 2)), [], lost=1, late=2)
    assert found.dropped == {Outcome.LOST: 1, Outcome.LATE: 2}
