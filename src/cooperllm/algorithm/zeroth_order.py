"""Slopes of a loss from forward passes alone.

    g(z) = [ f(θ + μ z) - f(θ - μ z) ] / 2μ                (1)  two-point slope along z
    ĝ    = (1/P) Σ_p g(z_p) z_p,    z_p ~ N(0, I)          (2)  E[ĝ] = ∇f + O(μ²)
    g(z) = ⟨∇f(θ), z⟩                                      (3)  forward mode: what (1) tends to for small μ

(3) costs 1 + P forward passes for P directions where (1) costs 2 P: values and their derivatives along all directions go through the
network together. No difference of two losses is taken, so that there is no μ and rounding of the losses is not magnified by 1/μ.

Dimension key: P directions, n trainable parameters.

References:
    Spall, 1992, Multivariate stochastic approximation using a simultaneous perturbation gradient approximation.
    Malladi et al., 2023, Fine-tuning language models with just forward passes (MeZO), arXiv:2305.17333, Definition 1.
    Baydin et al., 2022, Gradients without backpropagation, arXiv:2202.08587.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.noise import Noise

Evaluate = Callable[[Float32[np.ndarray, "P n"]], Float32[np.ndarray, "P"]]
"""Losses of one fixed batch at P points: all that two-point slopes ask of a runtime."""

EvaluateAlong = Callable[[Float32[np.ndarray, "n"], Noise, float], float]
"""The loss of one fixed batch at θ + s z, z by its name: for models of which nobody wants to hold two."""

Differentiate = Callable[[Float32[np.ndarray, "n"], Float32[np.ndarray, "P n"]], tuple[float, Float32[np.ndarray, "P"]]]
"""The loss of one fixed batch at θ and its derivatives along P directions, from one forward pass that carries all of them."""


def slopes(
    evaluate: Evaluate,
    theta: Float32[np.ndarray, "n"],
    directions: Iterable[Float32[np.ndarray, "n"]],
    scale: float,
    *,
    points_per_pass: int = 2,
) -> Float32[np.ndarray, "P"]:
    """Measures the slope of the loss along each direction, eq. (1).

    The two points of a direction are evaluated side by side; with `points_per_pass` of 4 or more several directions share one
    batched pass, with 1 every point has a pass of its own. Perturbed copies are made for each pass, so θ is never moved and nothing
    has to be restored (perturb-and-restore drifts: 12 % of RMS after 1,000 steps in bfloat16).

    Args:
        evaluate: Losses at given points on one batch; called without autograd.
        theta: Point of evaluation θ, shape [n]; not modified.
        directions: Directions z_p, each of shape [n]; consumed one pass at a time.
        scale: Half-step μ > 0, in units of θ per unit of z.
        points_per_pass: How many points are held in memory at once, >= 1.

    Returns:
        Slopes g(z_p), shape [P], in units of loss per unit of z. Exact for a quadratic loss up to rounding; the error is O(μ²)
        otherwise. A non-finite loss gives a non-finite slope.

    Example:
        >>> f = lambda points: points @ np.array([3.0, -1.0], np.float32)
        >>> slopes(f, np.zeros(2, np.float32), [np.array([1.0, 0.0], np.float32)], 0.5)
        array([3.], dtype=float32)
    """
    losses: list[float] = []
    for group in _batched(directions, max(1, points_per_pass // 2)):
        points = np.stack([theta + sign * np.float32(scale) * z for z in group for sign in (np.float32(1), np.float32(-1))])
        passes = [points] if points_per_pass > 1 else [point[None] for point in points]
        losses += [loss for rows in passes for loss in evaluate(rows).tolist()]
    return _quotients(losses, scale)


def slopes_along_noise(
    evaluate: EvaluateAlong, theta: Float32[np.ndarray, "n"], directions: Iterable[Noise], scale: float
) -> tuple[Float32[np.ndarray, "P"], list[float]]:
    """Measures the slope along directions that are never made as a whole, eq. (1).

    Args:
        evaluate: The loss at θ + s z on one batch; called without autograd.
        theta: Point of evaluation θ, shape [n]; not modified.
        directions: Names of the directions z_p.
        scale: Half-step μ > 0, in units of θ per unit of z.

    Returns:
        (slopes g(z_p), shape [P], as of `slopes`; the losses that they come from, two each).

    Example:
        >>> f = lambda theta, z, s: float((theta + s * z.values(2)) @ np.array([3.0, -1.0], np.float32))
        >>> found, losses = slopes_along_noise(f, np.zeros(2, np.float32), [Noise(7, 3)], 0.5)
        >>> found, len(losses)
        (array([2.1881285], dtype=float32), 2)
    """
    losses = [evaluate(theta, z, sign * scale) for z in directions for sign in (1, -1)]
    return _quotients(losses, scale), losses


def derivatives(
    differentiate: Differentiate,
    theta: Float32[np.ndarray, "n"],
    directions: Iterable[Float32[np.ndarray, "n"]],
    *,
    directions_per_pass: int,
) -> Float32[np.ndarray, "P"]:
    """Computes the slope of the loss along each direction in forward mode, eq. (3).

    Args:
        differentiate: Derivatives on one batch.
        theta: Point of evaluation θ, shape [n]; not modified.
        directions: Directions z_p, each of shape [n]; consumed one pass at a time.
        directions_per_pass: How many directions share a pass, >= 1; each pass costs one forward pass more than it has directions.

    Returns:
        Slopes g(z_p), shape [P], in units of loss per unit of z, exact up to rounding. A non-finite loss gives a non-finite slope.

    Example:
        >>> gradient = np.array([3.0, -1.0], np.float32)
        >>> f = lambda theta, z: (float(theta @ gradient), z @ gradient)
        >>> derivatives(f, np.zeros(2, np.float32), np.eye(2, dtype=np.float32), directions_per_pass=4)
        array([ 3., -1.], dtype=float32)
    """
    found = [differentiate(theta, np.stack(group))[1] for group in _batched(directions, directions_per_pass)]
    return np.concatenate([np.zeros(0, np.float32), *found])


def estimate(measured: Float32[np.ndarray, "P"], directions: Iterable[Float32[np.ndarray, "n"]]) -> Float32[np.ndarray, "n"]:
    """Turns slopes along random directions into a gradient estimate, eq. (2).

    Args:
        measured: Slopes g(z_p), shape [P], P >= 1.
        directions: The same directions in the same order, each of shape [n].

    Returns:
        ĝ, shape [n]; unbiased for the gradient of the smoothed loss when the directions are standard normal.

    Example:
        >>> estimate(np.array([3.0], np.float32), [np.array([1.0, 0.0], np.float32)])
        array([3., 0.], dtype=float32)
    """
    return weighted_sum(measured / np.float32(len(measured)), directions)


def weighted_sum(coefficients: Float32[np.ndarray, "P"], directions: Iterable[Float32[np.ndarray, "n"]]) -> Float32[np.ndarray, "n"]:
    """Adds up directions, one alive at a time, in a fixed order: the same bits on every machine.

    Matrix products would be faster but their order of summation belongs to the machine's BLAS.

    Args:
        coefficients: One number per direction, shape [P], P >= 1.
        directions: Directions, each of shape [n].

    Returns:
        Σ_p coefficient_p · z_p, shape [n].

    Example:
        >>> weighted_sum(np.array([2.0, 1.0], np.float32), np.eye(2, dtype=np.float32))
        array([2., 1.], dtype=float32)
    """
    pairs = zip(coefficients, directions, strict=True)
    coefficient, first = next(pairs)
    total = coefficient * first
    for coefficient, direction in pairs:
        total += coefficient * direction
    return total


def _quotients(losses: Sequence[float], scale: float) -> Float32[np.ndarray, "P"]:
    """Eq. (1) of losses that come in pairs, + before -."""
    pairs = np.array(losses, np.float64).reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf: the slope says so
        return ((pairs[:, 0] - pairs[:, 1]) / (2 * scale)).astype(np.float32)


def _batched(items: Iterable[Float32[np.ndarray, "n"]], size: int) -> Iterator[list[Float32[np.ndarray, "n"]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
