"""What rounding does to two-point slopes, and the half-step that outgrows it.

    D(μ) = L(θ + μ z) - L(θ - μ z) = 2 s_z μ + b_z μ³ + √2 σ ε              (1)  what a runtime that rounds makes of (1) in `zeroth_order`
    σ²   = Σ_z |D_z - its fit by (1)|² / (2 Z (M - 2))                      (2)  variance of one loss, from Z directions and M half-steps
    s²   = (1/Z) Σ_z s_z²                                                   (3)  slopes along standard normal directions
    ν(μ) = σ / (√2 μ)                                                       (4)  standard deviation that a slope owes to rounding
    μ_q  = q σ / (√2 s)                                                     (5)  half-step at which a slope is q times its rounding

The curvature's share b μ³ is fitted, so that it is not taken for rounding. Both σ and s are those of a mean over texts: they shrink alike
with more of them, and μ_q stays.

Dimension key: n trainable parameters, Z directions, M half-steps.

References:
    Gill, Murray and Wright, 1981, Practical optimization, section 8.6: the interval of a finite difference from the function's noise.
    Moré and Wild, 2011, Estimating computational noise, SIAM Journal on Scientific Computing 33(3).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.zeroth_order import Evaluate

HALF_STEPS = (0.004, 0.007, 0.01, 0.014, 0.02)
"""Where D is looked at: far enough apart for activations to reach other codes, short enough for a cubic."""

MOST_GROWTH = 30.0
"""A half-step grows to so many times the plan's at most: beyond, curvature does more harm than rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How a runtime rounds the mean loss of a batch.

    Attributes:
        loss_deviation: σ, standard deviation of one loss, in units of loss.
        slope: s, root mean square of slopes along standard normal directions.
        num_texts: Texts of that batch, >= 1.
    """

    loss_deviation: float
    slope: float
    num_texts: int


NO_ROUNDING = Rounding(loss_deviation=0.0, slope=1.0, num_texts=1)
"""Of a runtime whose float32 losses differ from exact ones by less than any half-step cares for."""


def rounding_of(
    evaluate: Evaluate, theta: Float32[np.ndarray, "n"], directions: Iterable[Float32[np.ndarray, "n"]], num_texts: int
) -> Rounding:
    """Measures rounding on one batch, eq. (2)-(3): 2 M forward passes for each direction.

    Args:
        evaluate: Losses of the batch at given points.
        theta: Point of evaluation θ, shape [n]; not modified.
        directions: Standard normal directions, at least one, each of shape [n].
        num_texts: Texts of the batch, >= 1.

    Returns:
        σ and s. Where a loss is not finite, so are they.

    Example:
        >>> steep = np.array([3.0, 4.0], np.float32)
        >>> found = rounding_of(lambda points: np.round(points @ steep, 2), np.zeros(2, np.float32), [steep / 5], 1)
        >>> round(found.slope), 0.001 < found.loss_deviation < 0.01
        (5, True)
    """
    half_steps = np.array(HALF_STEPS)
    terms = np.stack([2 * half_steps, half_steps**3], axis=1)
    signed = np.concatenate([half_steps, -half_steps]).astype(np.float32)
    squares, slopes = list[float](), list[float]()
    for direction in directions:
        losses = np.concatenate([evaluate((theta + step * direction)[None]) for step in signed]).astype(np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf
            differences = losses[: len(half_steps)] - losses[len(half_steps) :]
        fitted = np.linalg.lstsq(terms, differences)[0] if np.isfinite(differences).all() else np.full(2, np.nan)
        squares.append(float(((differences - terms @ fitted) ** 2).sum()) / (2 * (len(half_steps) - 2)))
        slopes.append(float(fitted[0]) ** 2)
    return Rounding(loss_deviation=math.sqrt(sum(squares) / len(squares)), slope=math.sqrt(sum(slopes) / len(slopes)), num_texts=num_texts)


def least_half_step(rounding: Rounding, signal_to_noise: float) -> float:
    """Says from which half-step on a slope is so many times its rounding, eq. (5).

    Args:
        rounding: Of the runtime.
        signal_to_noise: q >= 0.

    Returns:
        μ_q >= 0; infinite where there is no slope, or no finite loss, to measure.

    Example:
        >>> round(least_half_step(Rounding(loss_deviation=1e-3, slope=0.5, num_texts=4), 7.0), 4)
        0.0099
    """
    wanted = signal_to_noise * rounding.loss_deviation
    if wanted == 0:
        return 0.0
    return wanted / (math.sqrt(2) * rounding.slope) if rounding.slope > 0 and math.isfinite(wanted) else math.inf


def half_step(rounding: Rounding, asked: float, signal_to_noise: float) -> float:
    """Chooses the half-step of a slope: the plan's, or a longer one where rounding would drown it, eq. (5).

    Args:
        rounding: Of the runtime.
        asked: The plan's μ > 0.
        signal_to_noise: q >= 0 that the plan asks for; 0 leaves μ as it is.

    Returns:
        μ, from `asked` to `MOST_GROWTH` times that.

    Example:
        >>> half_step(Rounding(loss_deviation=1e-3, slope=0.5, num_texts=4), 0.03, 7.0)
        0.03
    """
    return min(max(asked, least_half_step(rounding, signal_to_noise)), MOST_GROWTH * asked)


def slope_deviation(rounding: Rounding, used: float, num_texts: int) -> float:
    """Says how far rounding moves a slope, eq. (4).

    Args:
        rounding: Of the runtime.
        used: Half-step μ > 0.
        num_texts: Texts of the batch, >= 1.

    Returns:
        ν, standard deviation in units of slope.

    Example:
        >>> round(slope_deviation(Rounding(loss_deviation=1e-3, slope=0.5, num_texts=4), 0.01, 16), 3)
        0.035
    """
    return rounding.loss_deviation * math.sqrt(rounding.num_texts / num_texts) / (math.sqrt(2) * used)
