"""FwdLLM: of several random directions the one along the last step is probed, and a step waits until devices agree.

    z_j  = argmax over N candidates z of |<z, u>|,   u = m / |m|                (1)  m: the server's momentum, which every replica holds
    E[z zᵀ] = I + (κ - 1) u uᵀ,   κ = E max_(c≤N) x_c²,   x_c ~ N(0, 1)          (2)  what the choice does to the expectation
    d    = (I - (1 - 1/κ) u uᵀ) mean_a ĝ_a,   ĝ_a = (1/P) Σ_j g_a(z_j) z_j      (3)  so that E[d] = ∇f; a: reports since the last step
    r    = Σ_a (y_a - ȳ)² / (A (A-1) ȳ²),   y_a = <ĝ_a, u>                     (4)  relative variance of the mean along u, A reports
    step if r <= τ or as many rounds waited as may, else hold: θ and m stay, the next round asks other devices at the same θ

Directions at right angles to u are not touched by (1) and remain standard normal, whence (2); the paper uses the estimate as it is, κ
times too long along u (κ = 3.8 with N = 10). Before the first step m is 0: nothing is chosen by and no round waits.

Where this differs from the paper: candidates compete for each query, there the best tenth of all is kept; u is the momentum, there the
last aggregated gradient; only positive cosines are kept there, a two-point slope does not ask for the sign. The paper's variance is that
of whole estimates, or of one layer of them, and its threshold an absolute number for each task. In n dimensions the relative variance
of P probes is about n/P, known before anything is measured; along u it is O(1) and says whether devices agree that the last direction
still leads down. A rule that stops when r is small prefers large ȳ, so that (3) is exact for a fixed number of rounds and slightly too
long along u otherwise: true of any such rule.

A held round is an update like any other: its terms are in the log, and the step that ends the wait names them again. So a resumed run
finds them, and nobody keeps state beside the log. Candidates cost noise, not forward passes.

Dimension key: P queries of a report, A reports, N candidates, n trainable parameters.

References:
    Xu et al., 2024, FwdLLM: efficient federated finetuning of large language models with perturbed inferences, arXiv:2308.13894, Section 3.
"""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64

from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.guidance import choose, dot, probe_noise
from cooperllm.config import ArmConfig, Distribution
from cooperllm.messages import Chosen, Grouping, Plan, Probes, RandomSlopes, RandomTerm, StepKind

SPACING, LARGEST = 1e-2, 12.0
"""Grid of the integral of eq. (2); beyond LARGEST nothing is left of it, were there 2³² candidates."""


class FwdLlm(Arm):
    """Candidates chosen by the last step, and steps that wait."""

    has_momentum = True

    def probes(self, config: ArmConfig, num_columns: int, num_basis: int) -> Probes:
        """Spends every query on a chosen direction of the device's own."""
        return Probes(
            measures_columns=False,
            num_random=config.queries,
            grouping=Grouping.DEVICE,
            column_scale=config.column_scale,
            random_scale=config.random_scale,
            num_candidates=config.candidates,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Applies eq. (3) and (4)."""
        total = sum(group.num_examples for group in measured.random_slopes)
        rounds = (*measured.held, tuple(_term(plan, public, group, group.num_examples / total) for group in measured.random_slopes))
        nothing = np.zeros(0, np.float32)
        if not len(public.span):
            return Coordinates(columns=nothing, random_terms=rounds[-1])
        parts = np.array([_part_along(term, public.span[0]) for terms in rounds for term in terms]) / len(rounds)
        variance = relative_variance(parts)
        observed = {"relative_variance": variance} if math.isfinite(variance) else {}
        if variance > config.variance_threshold and len(measured.held) < config.most_held_rounds:
            return Coordinates(columns=nothing, random_terms=rounds[-1], observed=observed, kind=StepKind.HOLD)
        excess = (1 - 1 / largest_square(config.candidates)) * parts.sum()
        shares = (replace(term, coefficients=term.coefficients / np.float32(len(rounds))) for terms in rounds for term in terms)
        return Coordinates(columns=np.array([-excess], np.float32), random_terms=tuple(shares), observed=observed)


def largest_square(num_candidates: int) -> float:
    """Gives κ, eq. (2): the mean of the largest of N squared standard normal numbers, ∫ 2x (1 - erf(x/√2)^N) dx over x >= 0.

    Trapezoids, and Euler and Maclaurin's correction for the slope of 2 at x = 0: an error of order SPACING⁴.

    Args:
        num_candidates: N >= 1.

    Returns:
        κ >= 1; 1 for one candidate.

    Example:
        >>> [round(largest_square(count), 3) for count in (1, 2, 10)]
        [1.0, 1.637, 3.8]
    """
    points = (index * SPACING for index in range(round(LARGEST / SPACING)))
    return SPACING * math.fsum(2 * x * (1 - math.erf(x / math.sqrt(2)) ** num_candidates) for x in points) + SPACING**2 / 6


def relative_variance(parts: Float64[np.ndarray, "A"]) -> float:
    """Tells how uncertain a mean along u is, eq. (4), from the parts that add up to it; reports count as of equal weight.

    Args:
        parts: y_a / A of each report, shape [A].

    Returns:
        r >= 0; infinite for a single report, of whose spread nothing is known, and for a mean of 0.

    Example:
        >>> relative_variance(np.array([1.0, 3.0])), relative_variance(np.ones(1))
        (0.25, inf)
    """
    count, mean = len(parts), float(parts.sum())
    if count < 2 or mean == 0:
        return math.inf
    return count / (count - 1) * float(((parts - mean / count) ** 2).sum()) / mean**2


def _term(plan: Plan, public: Public, group: RandomSlopes, share: float) -> RandomTerm:
    """A device's part of the mean estimate; it names its seed, since a later round may be the one that steps."""
    assert plan.probes is not None, "a round of this arm measures slopes"
    count, size = len(group.slopes), public.span.shape[1]
    first = Chosen(seed=plan.seed, group=group.group, positions=tuple(range(count)))
    chosen = choose(plan.seed, group.group, plan.probes, list(public.span), size) or first
    return RandomTerm(group=group.group, coefficients=group.slopes * np.float32(share / count), chosen=chosen)


def _part_along(term: RandomTerm, column: Float32[np.ndarray, "n"]) -> float:
    assert term.chosen is not None, "terms of this arm name their directions"
    named = probe_noise(term.chosen.seed, term.group, len(term.coefficients), Distribution.NORMAL, term.chosen)
    return sum(float(slope) * dot(column, direction.values(len(column))) for slope, direction in zip(term.coefficients, named, strict=True))
