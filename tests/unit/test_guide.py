"""What the cloud makes of public data: its gradient, a basis that has no opinion, and a plan that says which is which.

The model is softmax regression, small enough for every gradient to be known: (softmax(W x) - onehot(y)) xᵀ.

Run: pytest tests/unit/test_guide.py
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sample_messages
import torch
from stand_ins import CLASSES, FEATURES, MEASURED, SIZE, NoLayers, Public, SoftmaxRegression, cloud_of, maker_of, public_of

from cooperllm.algorithm import compression, noise
from cooperllm.algorithm.guidance import digest, orthonormalise
from cooperllm.cloud import GuideMaker
from cooperllm.config import ArmConfig, ArmName
from cooperllm.errors import DivergenceError

UNIT = 2.0**-24


def exact(theta, features, labels):
    """Mean gradient in double precision."""
    scores = features.astype(np.float64) @ theta.reshape(CLASSES, FEATURES).T.astype(np.float64)
    error = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(CLASSES)[labels]
    return (error.T @ features / len(labels)).reshape(-1)


def outside(vector, rows):
    wide = rows.astype(np.float64)
    return np.linalg.norm(vector - wide.T @ (wide @ vector)) / np.linalg.norm(vector)


EVERY_CLASS, ONE_CLASS = [0, 1, 2] * 14, [0] * 42
THETA = noise.gaussian(8, 0, SIZE)


def test_the_public_gradient_is_that_of_softmax_regression():
    public = public_of(EVERY_CLASS)
    found, loss = maker_of(EVERY_CLASS).gradient(THETA, 3)
    # Products, sums and an exponential of a batch of 42 in float32, each relative to a gradient of single examples of below 4.33 · 2.
    assert np.abs(found - exact(THETA, public.features, public.labels)).max() < 50 * UNIT * 4.33 * 2
    probabilities = torch.softmax(
        SoftmaxRegression().scores(torch.from_numpy(THETA), SimpleNamespace(features=torch.from_numpy(public.features))), 1
    ).numpy()
    assert loss == pytest.approx(-np.log(probabilities[np.arange(42), public.labels]).mean(), rel=1e-5)


def test_a_batch_of_public_examples_is_chosen_by_the_seed():
    maker = maker_of(EVERY_CLASS, batch_size=4)
    assert np.array_equal(maker.gradient(THETA, 3)[0], maker.gradient(THETA, 3)[0])
    assert not np.array_equal(maker.gradient(THETA, 3)[0], maker.gradient(THETA, 4)[0])


@pytest.mark.parametrize("labels", [EVERY_CLASS, ONE_CLASS], ids=["every class", "one class"])
def test_a_basis_is_orthonormal_and_no_larger_than_the_space_of_gradients(labels):
    """Output errors sum to 0 over 3 classes: 2 dimensions, times 2 features."""
    basis = maker_of(labels).basis(THETA, 3, 40).astype(np.float64)
    assert len(basis) == (CLASSES - 1) * FEATURES
    # Gradients are float32, of which the smallest kept eigenvalue may be a share of 1e-6; here it is far larger.
    assert np.abs(basis @ basis.T - np.eye(len(basis))).max() < 100 * UNIT


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_basis_holds_the_gradient_of_every_class_even_of_those_that_public_data_lack(label):
    """With the public labels themselves, all of class 0, it would hold no gradient of class 2."""
    basis = maker_of(ONE_CLASS).basis(THETA, 3, 40)
    unseen = noise.gaussian(77, 0, FEATURES)[None]
    assert outside(exact(THETA, unseen, [label]), basis) < 100 * UNIT


def test_gradients_with_the_public_labels_would_not_span_the_missing_classes():
    """The same texts under their own labels leave out most of such a gradient: the test above is no truism. At θ = 0 all
    output errors of class 0 are one vector, at a right angle to no other class's: cos² = 1/4."""
    theta, public = np.zeros(SIZE, np.float32), public_of(ONE_CLASS)
    own = np.stack([exact(theta, public.features[i : i + 1], [0]) for i in range(40)])
    rows = np.linalg.svd(own, full_matrices=False)[2][:FEATURES]
    unseen = exact(theta, noise.gaussian(77, 0, FEATURES)[None], [2])
    assert outside(unseen, rows) == pytest.approx(np.sqrt(3 / 4), rel=1e-6)


def test_a_basis_does_not_depend_on_public_labels():
    assert np.array_equal(maker_of(EVERY_CLASS).basis(THETA, 3, 9), maker_of(ONE_CLASS).basis(THETA, 3, 9))


def test_a_basis_has_at_most_one_row_per_example():
    maker = maker_of(EVERY_CLASS)
    assert [len(maker.basis(THETA, 3, count)) for count in (1, 2, 4, 42, 1000)] == [1, 2, 4, 4, 4]


def test_a_basis_is_chosen_by_the_seed_and_moves_nothing():
    maker, theta = maker_of(EVERY_CLASS), THETA.copy()
    assert np.array_equal(maker.basis(theta, 3, 2), maker.basis(theta, 3, 2))
    assert not np.array_equal(maker.basis(theta, 3, 2), maker.basis(theta, 4, 2))
    assert np.array_equal(theta, THETA)
    assert maker.pool() == ()


def test_a_basis_at_a_point_without_gradients_is_empty():
    public = Public(np.zeros((5, FEATURES), np.float32), np.zeros(5, np.int64))
    assert GuideMaker(SoftmaxRegression(), public, 4, 1).basis(THETA, 3, 5).shape == (0, SIZE)


def test_the_pool_keeps_the_newest_gradients_first():
    maker = maker_of(EVERY_CLASS, batch_size=4, pool_size=2)
    made = [maker.gradient(THETA, seed)[0] for seed in range(3)]
    assert np.array_equal(maker.pool(), [made[2], made[1]])
    other = maker_of(EVERY_CLASS, batch_size=4, pool_size=2)
    other.restore(maker.pool())
    other.gradient(THETA, 7)
    maker.gradient(THETA, 7)
    assert np.array_equal(other.pool(), maker.pool())


def test_a_round_that_is_planned_once_more_has_one_gradient_in_the_pool():
    maker = maker_of([0, 1, 2, 0], pool_size=3)
    theta = noise.gaussian(3, 0, SIZE)
    first, _ = maker.gradient(theta, 1)
    again, _ = maker.gradient(theta, 1)
    later, _ = maker.gradient(theta, 2)
    assert np.array_equal(first, again)
    assert [vector.tobytes() for vector in maker.pool()] == [later.tobytes(), first.tobytes()]


def test_a_missing_class_is_noticed():
    assert maker_of(EVERY_CLASS).has_every_class
    assert not maker_of(ONE_CLASS).has_every_class


# The plan made of it


def test_a_plan_names_the_bits_of_its_decoded_directions():
    prepared = cloud_of(EVERY_CLASS, rounds=2).plan()
    plan, public = prepared.plan, prepared.public
    column, *rows = compression.unpack(plan.guide.payload, SIZE)
    assert plan.guide.num_columns == 1
    assert plan.num_columns == len(public.span) == 2, "momentum and the public gradient"
    assert np.array_equal(list(public.basis), rows)
    assert plan.guide_hash == digest(public.span, *rows)
    assert outside(column.astype(np.float64), public.span) < 100 * UNIT


def test_predictions_are_the_public_gradient_along_the_decoded_columns():
    cloud = cloud_of(EVERY_CLASS, rounds=2)
    prepared = cloud.plan()
    public = public_of(EVERY_CLASS)
    expected = prepared.public.span @ exact(cloud.replica.theta, public.features, public.labels)
    assert np.abs(prepared.public.predicted - expected).max() < 60 * UNIT * 4.33 * 2


def test_every_round_has_a_fresh_basis_and_probes_mixed_from_it():
    plans = [cloud_of(EVERY_CLASS, rounds=rounds).plan() for rounds in (0, 1)]
    assert [len(prepared.public.basis) for prepared in plans] == [4, 4]
    assert [prepared.plan.probes.blend for prepared in plans] == [0.0, 0.0]
    assert plans[0].plan.guide_hash != plans[1].plan.guide_hash


@pytest.mark.parametrize(
    ("changes", "num_columns", "has_momentum", "num_rows"),
    [
        ({"queries": 1}, 1, False, 0),
        ({"queries": 2}, 1, True, 0),
        ({"queries": 3}, 1, True, 4),
        ({"basis_size": 0}, 1, True, 0),
        ({"basis_size": 2}, 1, True, 2),
        ({"name": ArmName.PAPER}, 1, False, 0),
        ({"name": ArmName.CLOUD_ONLY}, 1, False, 0),
        ({"name": ArmName.FEEDBACK, "queries": 6}, 0, True, 0),
        ({"name": ArmName.FEEDBACK, "queries": 7}, 1, True, 0),
        ({"name": ArmName.FEEDBACK, "queries": 8}, 1, True, 4),
    ],
    ids=str,
)
def test_a_guide_holds_no_more_than_the_queries_can_measure(changes, num_columns, has_momentum, num_rows):
    prepared = cloud_of(EVERY_CLASS, replace(MEASURED, **changes), rounds=3).plan()  # 3: no maps are due
    guide = prepared.plan.guide
    assert (guide.num_columns, guide.has_momentum, len(prepared.public.basis)) == (num_columns, has_momentum, num_rows)


def test_the_default_arm_asks_the_cloud_for_nothing():
    """Its five queries are its estimates, whatever labels the cloud has."""
    for labels in (EVERY_CLASS, ONE_CLASS):
        prepared = cloud_of(labels, ArmConfig(name=ArmName.FEEDBACK), rounds=3).plan()
        plan = prepared.plan
        assert (plan.guide, plan.num_columns, plan.probes.num_random, plan.maps, prepared.public_loss) == (None, 0, 0, (), None)


def test_a_query_that_estimates_leave_needs_nothing_of_the_clouds_labels():
    """It measures the momentum, which devices hold themselves, also where the cloud lacks a class and sends no directions."""
    for labels in (EVERY_CLASS, ONE_CLASS):
        prepared = cloud_of(labels, ArmConfig(name=ArmName.FEEDBACK, queries=6), rounds=3).plan()
        assert (prepared.plan.guide.has_momentum, prepared.plan.num_columns, prepared.plan.probes.num_random) == (True, 1, 0)
        assert prepared.public_loss is None


class OneBlock(NoLayers):
    """As if all of θ lay below a last layer."""

    def blocks(self, most):
        return ((0, SIZE),)[:most]


class Layered(SoftmaxRegression):
    adapted = OneBlock()


def test_a_block_that_is_asked_for_takes_a_query_with_maps_and_without():
    """Five of six queries are estimates."""
    plan = cloud_of(EVERY_CLASS, ArmConfig(name=ArmName.FEEDBACK, queries=6, feedback_blocks=1), model=Layered()).plan().plan
    assert (plan.guide, plan.num_columns, plan.probes.num_random) == (None, 0, 0)
    assert (plan.feedback.maps_version, plan.feedback.blocks, plan.maps) == (-1, ((0, SIZE),), ())


@pytest.mark.parametrize("name", [ArmName.MEZO_FL, ArmName.DECOMFL, ArmName.FEDKSEED, ArmName.FEDAVG_BP])
def test_an_arm_without_a_cloud_gets_no_guide(name):
    prepared = cloud_of(EVERY_CLASS, ArmConfig(name=name)).plan()
    assert prepared.plan.guide is prepared.public_loss is None
    assert (prepared.plan.guide_version, prepared.plan.num_columns, len(prepared.public.basis)) == (-1, 0, 0)
    assert prepared.plan.guide_hash == digest(np.zeros((0, SIZE), np.float32))


def test_fwdllms_guide_is_the_momentum_alone_and_costs_a_header():
    cloud = cloud_of(EVERY_CLASS, ArmConfig(name=ArmName.FWDLLM), rounds=2)
    prepared = cloud.plan()
    (column,) = prepared.public.span
    momentum = cloud.replica.moments[0]
    assert np.array_equal(column, orthonormalise([momentum], SIZE)[0])
    assert len(prepared.plan.guide.payload) == compression.packed_bytes(0, SIZE, 4)
    assert prepared.public_loss is None
    assert len(cloud_of(EVERY_CLASS, ArmConfig(name=ArmName.FWDLLM)).plan().public.span) == 0, "there is no last step yet"


def test_a_pool_of_directions_is_one_for_all_rounds_of_a_run_and_another_for_another_run():
    config = ArmConfig(name=ArmName.FEDKSEED, seed_pool_size=64)
    first, third = (cloud_of(EVERY_CLASS, config, rounds=rounds) for rounds in (0, 2))
    assert first.plan().plan.probes == third.plan().plan.probes
    assert first.plan().plan.probes.pool_size == 64
    first.config = replace(first.config, seed=1)
    assert first.plan().plan.probes.pool_seed != third.plan().plan.probes.pool_seed


def test_a_warm_start_asks_no_device_until_it_hands_over_and_sends_no_guide_after():
    config = ArmConfig(name=ArmName.WARM_START, warm_start_rounds=2)
    plans = [cloud_of(EVERY_CLASS, config, rounds=rounds).plan().plan for rounds in range(4)]
    assert [len(plan.cohort) for plan in plans] == [0, 0, 5, 5]
    assert [plan.guide is None for plan in plans] == [False, False, True, True]
    assert [plan.probes is None for plan in plans] == [True, True, False, False]


def answered(prepared):
    """Devices of which every one saw the slope 1 everywhere."""
    ones = np.ones(prepared.plan.num_columns, np.float32)
    return sample_messages.edge_report(prepared.plan, num_devices=5, num_examples=80, column_slopes=ones, column_squares=ones)


def test_a_cloud_that_lacks_a_class_sends_no_directions_and_has_no_vote():
    """They push the missing class's score down, round after round."""
    whole, partial = (cloud_of(labels, replace(MEASURED, public_weight=0.5), rounds=2).plan().plan for labels in (EVERY_CLASS, ONE_CLASS))
    assert whole.guide is not None
    assert whole.guide.num_columns == 1
    assert partial.guide is None
    assert partial.probes.blend is None
    assert partial.probes.num_random == whole.num_columns + whole.probes.num_random


@pytest.mark.parametrize("name", [ArmName.PAPER, ArmName.CLOUD_ONLY])
def test_arms_that_know_nothing_of_classes_keep_their_gradient(name):
    assert cloud_of(ONE_CLASS, ArmConfig(name=name)).plan().plan.guide.num_columns == 1


def test_a_step_in_full_travels_without_the_guide():
    """The guide of the default arm serves the round only: a log that kept it would be many times as long."""
    cloud = cloud_of(EVERY_CLASS, rounds=2)
    prepared = cloud.plan()
    update = cloud.close(prepared, [answered(prepared)]).update
    assert update.guide is None
    assert len(compression.unpack_vector(update.dense, SIZE)) == SIZE
    assert len(update.column_coefficients) == 0


def test_a_gradient_that_is_not_finite_ends_the_run_with_a_sentence():
    cloud = cloud_of(EVERY_CLASS)
    cloud.replica = replace(cloud.replica, theta=np.full(SIZE, np.nan, np.float32))
    with pytest.raises(DivergenceError, match="the public gradient is not finite"):
        cloud.plan()
