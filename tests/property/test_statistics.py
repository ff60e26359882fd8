"""What holds on average: every tolerance is five standard errors of the drawn sample, and every draw has a fixed seed.

Run: pytest tests/property/test_statistics.py
"""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cooperllm.algorithm import noise
from cooperllm.algorithm.guidance import guided_perturbations, orthonormalise
from cooperllm.algorithm.noise import probe_indices
from cooperllm.algorithm.zeroth_order import estimate, slopes

SEEDS = st.integers(0, (1 << 64) - 1)
UNIT = 2.0**-24


def quadratic(seed, size):
    """A loss with a dense, indefinite Hessian, and its gradient at a point; double precision inside, so that rounding is the codec's."""
    matrix = np.stack([noise.gaussian(seed, row, size) for row in range(size)]).astype(np.float64)
    hessian, linear, theta = (matrix + matrix.T) / 2, noise.gaussian(seed, size, size), noise.gaussian(seed, size + 1, size)

    def evaluate(points):
        wide = points.astype(np.float64)
        return (0.5 * ((wide @ hessian) * wide).sum(axis=1) + wide @ linear).astype(np.float32)

    return evaluate, theta, hessian @ theta + linear


@settings(max_examples=12)
@given(seed=SEEDS)
def test_estimate_is_unbiased_on_a_quadratic(seed):
    size, count, scale = 6, 3000, 0.5
    evaluate, theta, gradient = quadratic(seed, size)
    directions = [noise.gaussian(seed, index, size) for index in probe_indices(1 << 20, count)]
    found = estimate(slopes(evaluate, theta, directions, scale, points_per_pass=2 * count), directions)
    # One estimate (z·∇f) z has variance |∇f|² + ∇f_i² in coordinate i. Rounding of losses below 1000 adds at most 1000 UNIT / μ a slope,
    # on average at random: its mean over the probes is smaller than that.
    error = np.sqrt((gradient @ gradient + gradient**2) / count)
    assert (np.abs(found - gradient) < 5 * error + 1000 * UNIT / scale).all()


@settings(max_examples=12)
@given(seed=SEEDS)
def test_a_slope_of_a_quadratic_is_the_directional_derivative(seed):
    size, scale = 6, 0.5
    evaluate, theta, gradient = quadratic(seed, size)
    directions = [noise.gaussian(seed, index, size) for index in probe_indices(1, 20)]
    exact = np.stack(directions).astype(np.float64) @ gradient
    losses = evaluate(np.concatenate([theta + np.float32(scale) * np.stack(directions), theta - np.float32(scale) * np.stack(directions)]))
    # Two losses rounded by UNIT each, and points rounded by UNIT of their largest entry against gradients of below 6 · 20 · size.
    largest = np.abs(losses).max() + 10 * 6 * 20 * size
    assert np.abs(slopes(evaluate, theta, directions, scale) - exact).max() < 2 * largest * UNIT / scale


@settings(max_examples=10)
@given(seed=SEEDS, num_columns=st.integers(1, 3), blend=st.floats(0.05, 1.0), blend_scale=st.floats(0.25, 4.0))
def test_guided_perturbations_have_the_papers_second_moment(seed, num_columns, blend, blend_scale):
    """E[v vᵀ] = β² ( α/n I + (1-α)/k V Vᵀ )."""
    size, count = 5, 1500
    span = orthonormalise([noise.gaussian(seed, index, size) for index in range(num_columns)], size)
    drawn = np.stack(list(guided_perturbations(span, seed, probe_indices(7, count), 7, blend, blend_scale))).astype(np.float64)
    wide = span.astype(np.float64)
    expected = blend_scale**2 * (blend / size * np.eye(size) + (1 - blend) / num_columns * wide.T @ wide)
    # Sums of independent Gaussians and signs have a kurtosis of at most 3, so E[v_i² v_j²] <= 3 Σ_ii Σ_jj.
    error = np.sqrt(3 * np.outer(np.diag(expected), np.diag(expected)) / count)
    assert (np.abs(drawn.T @ drawn / count - expected) < 5 * error).all()
    assert (np.abs(drawn.mean(axis=0)) < 5 * np.sqrt(np.diag(expected) / count)).all()


@settings(max_examples=25)
@given(seed=SEEDS, index=SEEDS)
def test_any_key_gives_standard_normal_directions(seed, index):
    size = 20_000
    drawn = noise.gaussian(seed, index, size).astype(np.float64)
    # Var x = 1, Var x² = 2, Var (x_i x_(i+1)) = 1.
    assert abs(drawn.mean()) < 5 / math.sqrt(size)
    assert abs((drawn**2).mean() - 1) < 5 * math.sqrt(2 / size)
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 5 / math.sqrt(size - 1)


@settings(max_examples=25)
@given(seed=SEEDS, index=st.integers(0, (1 << 64) - 2))
def test_neighbouring_keys_are_unrelated(seed, index):
    size = 10_000
    one, other = noise.gaussian(seed, index, size).astype(np.float64), noise.gaussian(seed, index + 1, size)
    assert abs((one * other).mean()) < 5 / math.sqrt(size)
    assert abs((one * noise.rademacher(seed, index, size)).mean()) < 5 / math.sqrt(size)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_a_permutation_puts_every_item_everywhere_equally_often(seed):
    size, draws = 4, 1500
    orders = np.stack([noise.permutation(seed, index, size) for index in range(draws)])
    counts = np.stack([(orders == item).sum(axis=0) for item in range(size)])
    # Binomial with p = 1/4: standard deviation √(draws · 3/16).
    assert np.abs(counts - draws / size).max() < 5 * math.sqrt(draws * 3 / 16)
