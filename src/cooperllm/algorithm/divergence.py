"""When a run has diverged, and where it goes on from: a rate that is too large costs rounds, not the run.

    diverged:  ( ℓ_t-2 + ℓ_t-1 + ℓ_t ) / 3  >  2 ln C                        (1)  ℓ: mean loss of a round's devices at θ_t
    then  θ <- θ_v,   m <- 0,   f <- f / 2,   v = argmin of the mean of (1)   (2)  η_t = f η, f = 1 at first

(1) says that the model costs more than twice what knowing nothing of C classes does, on three cohorts in a row, which is no cohort's bad
luck. Losses that are not finite, so that a round has too few reports, say it as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

WINDOW = 3
"""Rounds whose mean loss judges a run, eq. (1)."""

WORST = 2.0
"""Multiple of ln C above which a run has diverged, eq. (1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Good:
    """Where eq. (2) leads back to.

    Attributes:
        theta: θ_v, shape [n].
        loss: Mean loss of the rounds up to it; infinite for the start, which is good until something better is known.
    """

    theta: Float32[np.ndarray, "_n"]
    loss: float


def recent_loss(losses: Sequence[float]) -> float:
    """Means the last losses of a run, eq. (1).

    Args:
        losses: Mean loss of each round's devices since the start or since a step was last taken back, oldest first.

    Returns:
        Mean of the last WINDOW; infinite while there are fewer.

    Example:
        >>> recent_loss([9.0, 1.0, 2.0, 3.0])
        2.0
    """
    return math.fsum(losses[-WINDOW:]) / WINDOW if len(losses) >= WINDOW else math.inf


def has_diverged(losses: Sequence[float], num_classes: int) -> bool:
    """Says whether a run has diverged, eq. (1).

    Args:
        losses: As for `recent_loss`.
        num_classes: C >= 2.

    Returns:
        Whether it is time for eq. (2).

    Example:
        >>> has_diverged([0.7, 0.7, 0.7], 2), has_diverged([0.7, 2.0, 3.0], 2), has_diverged([5.0], 2)
        (False, True, False)
    """
    return len(losses) >= WINDOW and recent_loss(losses) > WORST * math.log(num_classes)
