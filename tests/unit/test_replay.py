"""Replicas: an update leads everybody to the same bits, or is an error.

Run: pytest tests/unit/test_replay.py
"""

from dataclasses import replace

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm import compression, noise, replay
from cooperllm.algorithm.guidance import orthonormalise
from cooperllm.algorithm.noise import BLOCK, probe_index
from cooperllm.algorithm.replay import Replica
from cooperllm.config import Distribution, OptimizerConfig, OptimizerKind
from cooperllm.errors import DecodeError, ReplayMismatchError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Chosen, Guide, RandomTerm, Snapshot, StepKind, Update

SIZE = 300
UNIT = 2.0**-24

MOMENTUM = OptimizerConfig()
ADAM = OptimizerConfig(kind=OptimizerKind.ADAM, momentum=0.9, square_decay=0.99, epsilon=1e-8)
SGD = OptimizerConfig(kind=OptimizerKind.SGD)
OPTIMIZERS = pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])


def initial(optimizer=MOMENTUM):
    return replay.start(noise.gaussian(1, 0, SIZE), optimizer)


def blank(replica, **changes):
    return sample_messages.update(replica.model_version, **{"seed": 9} | changes)


def guided(replica, bits=8):
    """An update as a round makes it: a packed guide with momentum, coefficients of its span, and two groups' random terms."""
    columns = np.stack([noise.gaussian(replica.model_version + 2, index, SIZE) for index in range(3)])
    guide = Guide(payload=compression.pack(columns, bits), num_columns=3, has_momentum=True)
    size = len(replay.span(replica, guide))
    terms = (RandomTerm(group=0, coefficients=np.array([0.5, -2], np.float32)), RandomTerm(group=7, coefficients=np.ones(1, np.float32)))
    coefficients = noise.gaussian(99, replica.model_version, size)
    return blank(replica, seed=replica.model_version, guide=guide, column_coefficients=coefficients, random_terms=terms)


def travelled(update):
    return decode(encode(update), Update)


def test_a_run_starts_at_version_zero_with_zero_moments():
    for optimizer, count in ((SGD, 0), (MOMENTUM, 1), (ADAM, 2)):
        replica = initial(optimizer)
        assert replica.model_version == 0
        assert [moment.any() for moment in replica.moments] == [False] * count


@OPTIMIZERS
def test_a_sealed_update_leads_a_second_replica_to_the_same_bits(optimizer):
    update, after = replay.seal(initial(optimizer), guided(initial(optimizer)), optimizer)
    found = replay.apply(initial(optimizer), travelled(update), optimizer)
    assert found.state_hash == after.state_hash == update.theta_hash
    assert found.theta.tobytes() == after.theta.tobytes()
    assert found.model_version == 1


@OPTIMIZERS
def test_fifty_updates_replayed_from_their_bytes_give_identical_bytes(optimizer):
    cloud, device = initial(optimizer), initial(optimizer)
    for _ in range(50):
        update, cloud = replay.seal(cloud, guided(cloud), optimizer)
        device = replay.apply(device, travelled(update), optimizer)
    assert device.model_version == 50
    for found, expected in zip((device.theta, *device.moments), (cloud.theta, *cloud.moments), strict=True):
        assert found.tobytes() == expected.tobytes()


def test_a_replica_from_a_snapshot_continues_with_the_same_bits():
    cloud = initial()
    for _ in range(3):
        _, cloud = replay.seal(cloud, guided(cloud), MOMENTUM)
    late = replay.restore(decode(encode(cloud.snapshot()), Snapshot), SIZE, 1)
    update, cloud = replay.seal(cloud, guided(cloud), MOMENTUM)
    assert replay.apply(late, travelled(update), MOMENTUM).state_hash == cloud.state_hash


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.1000001},
        {"seed": 1},
        {"random_terms": ()},
        {"theta_hash": bytes(15) + b"\1"},
        {"dense": compression.pack_vector(np.full(SIZE, 1e-3, np.float32), 8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_update_is_a_mismatch(change):
    update, _ = replay.seal(initial(), guided(initial()), MOMENTUM)
    with pytest.raises(ReplayMismatchError, match=r"round 0: this replica has .* start again from a snapshot"):
        replay.apply(initial(), replace(update, **change), MOMENTUM)


def test_one_changed_bit_of_a_coefficient_is_a_mismatch():
    update, _ = replay.seal(initial(), guided(initial()), MOMENTUM)
    changed = np.nextafter(update.column_coefficients, np.float32(np.inf))
    with pytest.raises(ReplayMismatchError):
        replay.apply(initial(), replace(update, column_coefficients=changed), MOMENTUM)


def test_a_differing_moment_is_a_mismatch_even_when_theta_agrees():
    """A step without momentum: θ is the same, what continues is not."""
    update, _ = replay.seal(initial(), blank(initial(), learning_rate=0.0), MOMENTUM)
    other = Replica(model_version=0, theta=initial().theta, moments=(np.full(SIZE, 1e-6, np.float32),))
    with pytest.raises(ReplayMismatchError):
        replay.apply(other, update, MOMENTUM)


@pytest.mark.parametrize("version", [0, 2])
def test_an_update_for_another_version_is_a_mismatch_that_names_both(version):
    _, after = replay.seal(initial(), guided(initial()), MOMENTUM)
    with pytest.raises(ReplayMismatchError, match=f"applies to version {version}, this replica is at 1"):
        replay.apply(after, blank(after, model_version=version), MOMENTUM)


@OPTIMIZERS
def test_a_step_does_not_modify_the_state_before_it(optimizer):
    _, before = replay.seal(initial(optimizer), guided(initial(optimizer)), optimizer)
    digest = before.state_hash
    replay.step(before, noise.gaussian(4, 0, SIZE), 0.5, optimizer)
    assert before.state_hash == digest


def test_momentum_is_sutskevers_up_to_rounding():
    replica, theta, moment = initial(), initial().theta.astype(np.float64), np.zeros(SIZE)
    steps = 30
    for index in range(steps):
        along = noise.gaussian(5, index, SIZE)
        replica = replay.step(replica, along, 0.05, MOMENTUM)
        moment = 0.9 * moment + along
        theta = theta - 0.05 * moment
    # Each step rounds θ once, and η m through 0.9, its product, a sum, 0.05 and its product; moments err geometrically, by 1/(1-γ).
    largest, largest_moment = np.abs(theta).max() + 1, np.abs(moment).max() * 2
    assert np.abs(replica.theta - theta).max() < steps * UNIT * (largest + 0.05 * 5 * 10 * largest_moment)


def test_adam_is_kingmas_up_to_rounding():
    replica, theta, first, second = initial(ADAM), initial().theta.astype(np.float64), np.zeros(SIZE), np.zeros(SIZE)
    steps = 30
    for index in range(steps):
        along = noise.gaussian(5, index, SIZE)
        replica = replay.step(replica, along, 0.05, ADAM)
        first = 0.9 * first + 0.1 * along.astype(np.float64)
        second = 0.99 * second + 0.01 * along.astype(np.float64) ** 2
        theta = theta - 0.05 * (first / (1 - 0.9 ** (index + 1))) / (np.sqrt(second / (1 - 0.99 ** (index + 1))) + 1e-8)
    # f32(0.9) and f32(0.99) are off by UNIT: shares of 10 and 100 UNIT of 1 - γ and 1 - ν. Ten further roundings are made in each step,
    # and a moment remembers 10 or 100 of them. By Cauchy and Schwarz |m̂|/√ŝ <= max_i √(a_i²/b_i), a and b the moments' weights, which
    # is below 10 in these steps. θ itself, of size below 4 + 30 · 0.05 · 10, is rounded once a step.
    assert np.abs(replica.theta - theta).max() < steps * UNIT * (4 + steps * 0.05 * 10 + 0.05 * 10 * (10 + 100 + 10 * 100))


def test_adams_first_step_has_the_length_of_the_learning_rate():
    along = np.array([1e-3, -5, 100], np.float32)
    after = replay.step(replay.start(np.zeros(3, np.float32), ADAM), along, 0.25, ADAM)
    # m̂ = d and √ŝ = |d| up to the rounding of 1 - γ and 1 - ν (10 and 100 UNIT), and ε = 1e-8 is a share of 1e-5 of the smallest.
    assert after.theta == pytest.approx([-0.25, 0.25, -0.25], rel=1e-5 + 200 * UNIT)


def test_powers_are_those_of_repeated_multiplication():
    for exponent in (0, 1, 2, 7, 50):
        exact = 1.0
        for _ in range(exponent):
            exact *= 0.99
        assert replay._power(0.99, exponent) == pytest.approx(exact, rel=2 * (exponent + 1) * 2**-53)


@OPTIMIZERS
def test_states_after_ten_rounds_match_their_golden_digest(optimizer):
    """Pinned: a log written today must be replayable by every later version of NumPy and of this code."""
    replica = initial(optimizer)
    for _ in range(10):
        _, replica = replay.seal(replica, guided(replica), optimizer)
    expected = {OptimizerKind.MOMENTUM: "708fe17f096df24a628c014f253ec890", OptimizerKind.ADAM: "ae1eda753c84d08b561c69f3ee8a03f8"}
    assert replica.state_hash.hex() == expected[optimizer.kind]


def test_span_is_momentum_first_then_the_decoded_columns():
    _, replica = replay.seal(initial(), guided(initial()), MOMENTUM)
    guide = guided(replica).guide
    decoded = compression.unpack(guide.payload, SIZE)
    assert np.array_equal(replay.span(replica, guide), orthonormalise([replica.moments[0], *decoded], SIZE))
    assert np.array_equal(replay.span(replica, replace(guide, has_momentum=False)), orthonormalise(decoded, SIZE))


def test_momentum_of_a_fresh_replica_adds_no_column():
    assert len(replay.span(initial(), guided(initial()).guide)) == 3


def test_rows_after_the_columns_are_the_basis_and_no_part_of_the_span():
    """The other way round a replica would measure slopes along the basis and mix probes from columns."""
    guide = guided(initial()).guide
    split = replace(guide, num_columns=1)
    column, *rest = compression.unpack(guide.payload, SIZE)
    assert np.array_equal(replay.span(initial(), split), orthonormalise([column], SIZE))
    assert np.array_equal(list(replay.probe_basis(split, SIZE)), rest)
    assert len(replay.probe_basis(guide, SIZE)) == len(replay.probe_basis(None, SIZE)) == 0


@pytest.mark.parametrize("length", [SIZE - 1, SIZE + 1])
def test_a_basis_for_another_model_is_refused(length):
    guide = Guide(payload=compression.pack(np.ones((2, length), np.float32), 8), num_columns=0, has_momentum=False)
    with pytest.raises(DecodeError, match=f"length {length} found, the model has {SIZE}"):
        replay.probe_basis(guide, SIZE)


def test_more_columns_announced_than_packed_are_refused():
    guide = replace(guided(initial()).guide, num_columns=9, has_momentum=False)
    with pytest.raises(DecodeError, match="9 columns announced, 3 found"):
        replay.span(initial(), guide)


def test_random_terms_are_rebuilt_from_their_seeds():
    terms = (RandomTerm(group=3, coefficients=np.array([2, -1], np.float32)), RandomTerm(group=8, coefficients=np.array([4], np.float32)))
    found = replay.direction(initial(), blank(initial(), seed=77, random_terms=terms), np.zeros((0, SIZE), np.float32))
    one, two = noise.gaussian(77, probe_index(3, 0), SIZE), noise.gaussian(77, probe_index(3, 1), SIZE)
    expected = np.float32(2) * one + np.float32(-1) * two + np.float32(4) * noise.gaussian(77, probe_index(8, 0), SIZE)
    assert np.array_equal(found, expected)


def test_chosen_directions_are_those_of_the_seed_group_and_positions_that_a_term_names():
    """Not of the update's own seed: a held round's terms, and a pool's, come from elsewhere."""
    chosen = Chosen(seed=5, group=2, positions=(9, 9, 0))
    term = RandomTerm(group=3, coefficients=np.array([2, -1, 4], np.float32), chosen=chosen)
    found = replay.direction(initial(), blank(initial(), seed=77, random_terms=(term,)), np.zeros((0, SIZE), np.float32))
    again, other = (noise.gaussian(5, probe_index(2, position), SIZE) for position in (9, 0))
    assert np.array_equal(found, np.float32(2) * again + np.float32(-1) * again + np.float32(4) * other)


@OPTIMIZERS
def test_a_held_round_moves_nothing_but_the_version(optimizer):
    before = replay.step(initial(optimizer), noise.gaussian(4, 0, SIZE), 0.1, optimizer)
    update, after = replay.seal(before, replace(guided(before), kind=StepKind.HOLD), optimizer)
    assert after.model_version == before.model_version + 1
    assert after.state_hash == before.state_hash == update.theta_hash
    assert replay.apply(before, travelled(update), optimizer).model_version == after.model_version


@OPTIMIZERS
def test_a_restart_steps_as_if_nothing_had_moved_before(optimizer):
    before = replay.step(initial(optimizer), noise.gaussian(4, 0, SIZE), 0.1, optimizer)
    still = replace(before, moments=tuple(np.zeros_like(moment) for moment in before.moments))
    update, after = replay.seal(before, blank(before, random_terms=guided(before).random_terms, kind=StepKind.RESTART), optimizer)
    assert replay.seal(still, replace(update, kind=StepKind.STEP), optimizer)[1].state_hash == after.state_hash
    assert replay.seal(before, replace(update, kind=StepKind.STEP), optimizer)[1].state_hash != after.state_hash


def test_a_direction_is_the_sum_of_its_three_parts():
    span = np.eye(2, SIZE, dtype=np.float32)
    dense, term = np.full(SIZE, 0.5, np.float32), RandomTerm(group=0, coefficients=np.ones(1, np.float32))
    coefficients = np.array([2, 3], np.float32)
    packed = compression.pack_vector(dense, 32)  # a power of two: exact
    update = blank(initial(), column_coefficients=coefficients, random_terms=(term,), dense=packed)
    expected = coefficients @ span + noise.gaussian(9, 0, SIZE) + dense
    assert np.array_equal(replay.direction(initial(), update, span), expected)


def test_a_term_without_coefficients_adds_nothing():
    empty = RandomTerm(group=0, coefficients=np.zeros(0, np.float32))
    assert not replay.direction(initial(), blank(initial(), random_terms=(empty,)), np.zeros((0, SIZE), np.float32)).any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"column_coefficients": np.ones(2, np.float32)}, "2 column coefficients found, the span has 0"),
        ({"dense": compression.pack_vector(np.ones(SIZE - 1, np.float32), 8)}, f"length {SIZE - 1} found, the model has {SIZE} "),
        ({"dense": compression.pack(np.ones((2, SIZE), np.float32), 8)}, "2 columns found, 1 expected"),
        ({"dense": b"CG"}, "2 bytes found"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(DecodeError, match=sentence):
        replay.apply(initial(), blank(initial(), **changes), MOMENTUM)


@pytest.mark.parametrize(
    ("theta", "moments"),
    [(SIZE - 1, [SIZE]), (SIZE, [SIZE + 1]), (SIZE, []), (SIZE, [SIZE] * 2), (0, [0])],
)
def test_a_snapshot_of_another_shape_is_refused(theta, moments):
    vectors = tuple(np.zeros(length, np.float32) for length in moments)
    with pytest.raises(DecodeError, match="snapshot"):
        replay.restore(Snapshot(model_version=1, theta=np.zeros(theta, np.float32), moments=vectors), SIZE, 1)


@OPTIMIZERS
def test_a_guess_is_right_where_directions_stay_the_same(optimizer):
    """Where every direction is the mean of those before it the step that is guessed is the step that comes."""
    along, replica = noise.gaussian(4, 0, SIZE), initial(optimizer)
    for _ in range(60):
        replica = replay.step(replica, along, 0.01, optimizer)
    guess, next_one = replay.lookahead(replica, 0.01, optimizer), replay.step(replica, along, 0.01, optimizer)
    moved = np.abs(next_one.theta - replica.theta).max()
    assert np.abs(guess.theta - next_one.theta).max() < 0.01 * moved
    assert guess.model_version == replica.model_version
    assert all(np.array_equal(one, other) for one, other in zip(guess.moments, replica.moments, strict=True))


@OPTIMIZERS
def test_nothing_is_guessed_before_the_first_step_or_at_a_rate_of_zero(optimizer):
    replica = initial(optimizer)
    assert replay.lookahead(replica, 0.5, optimizer) is replica
    moved = replay.step(replica, noise.gaussian(4, 0, SIZE), 0.01, optimizer)
    assert replay.lookahead(moved, 0.0, optimizer) is moved


LONG = 2 * BLOCK + 7


def long_update(replica, distribution=Distribution.NORMAL, **changes):
    """Terms of two groups, one of them named by a pool, for a θ of more than two blocks."""
    terms = (
        RandomTerm(group=3, coefficients=np.array([0.5, -2], np.float32)),
        RandomTerm(group=4, coefficients=np.ones(1, np.float32), chosen=Chosen(seed=11, group=0, positions=(2,))),
    )
    return blank(replica, **{"random_terms": terms, "distribution": distribution, "learning_rate": 0.3} | changes)


@pytest.mark.parametrize("distribution", Distribution)
def test_a_step_made_where_theta_lies_has_the_bits_of_a_step_beside_it(distribution):
    beside = replay.start(noise.gaussian(1, 0, LONG), SGD)
    update, after = replay.seal(beside, travelled(long_update(beside, distribution)), SGD)
    assert np.array_equal(beside.theta, noise.gaussian(1, 0, LONG)), "the step beside it has moved nothing"
    whole = replay.direction(beside, update, np.zeros((0, LONG), np.float32))
    assert after.state_hash == replay.step(beside, whole, update.learning_rate, SGD).state_hash
    own = replay.start(noise.gaussian(1, 0, LONG), SGD)
    moved = replay.apply(own, update, SGD, in_place=True)
    assert moved.theta is own.theta
    assert moved.state_hash == after.state_hash


def test_sgd_steps_along_the_direction_and_nothing_else():
    replica = replay.start(noise.gaussian(1, 0, LONG), SGD)
    _, after = replay.seal(replica, long_update(replica), SGD)
    pool = noise.gaussian(11, probe_index(0, 2), LONG)
    own = 0.5 * noise.gaussian(9, probe_index(3, 0), LONG) - 2 * noise.gaussian(9, probe_index(3, 1), LONG)
    np.testing.assert_allclose(after.theta, replica.theta - 0.3 * (own + pool), rtol=0, atol=1e-5)
    assert after.moments == ()


def test_signs_and_normal_numbers_are_different_steps():
    replica = replay.start(noise.gaussian(1, 0, LONG), SGD)
    one, other = (replay.seal(replica, long_update(replica, distribution), SGD)[1] for distribution in Distribution)
    assert one.state_hash != other.state_hash


@pytest.mark.parametrize("kind", [StepKind.HOLD, StepKind.ROLLBACK])
def test_what_is_no_step_leaves_an_own_theta_where_it_is(kind):
    replica = replay.start(noise.gaussian(1, 0, LONG), SGD)
    before, back = replica.theta.copy(), compression.pack_vector(np.ones(LONG, np.float32), compression.EXACT)
    update, after = replay.seal(replica, long_update(replica, kind=kind, dense=back if kind is StepKind.ROLLBACK else None), SGD)
    assert replay.apply(replica, update, SGD, in_place=True).state_hash == after.state_hash
    assert np.array_equal(replica.theta, before)


def test_coefficients_of_columns_that_nobody_sent_are_refused_before_theta_moves():
    replica = replay.start(noise.gaussian(1, 0, LONG), SGD)
    before, update = replica.theta.copy(), long_update(replica, column_coefficients=np.ones(1, np.float32))
    with pytest.raises(DecodeError, match="column coefficients"):
        replay.apply(replica, update, SGD, in_place=True)
    assert np.array_equal(replica.theta, before)


def test_a_momentum_column_is_refused_where_nobody_has_momentum():
    replica = replay.start(np.ones(SIZE, np.float32), SGD)
    guide = Guide(payload=compression.pack(np.ones((1, SIZE), np.float32), 8), num_columns=1, has_momentum=True)
    with pytest.raises(DecodeError, match="without momentum"):
        replay.span(replica, guide)


def test_without_moments_nobody_guesses_the_next_step():
    replica = replace(replay.start(np.ones(SIZE, np.float32), SGD), model_version=3)
    assert replay.lookahead(replica, 0.5, SGD) is replica
