"""The paper's arm, kept exactly, with its scale corrected.

    v    = β ( √(α/n) u + √((1-α)/k) V r )                                  (1)  guided perturbation (guidance.py, eq. 2)
    g_Z  = (1/Λ) mean_j g(v_j) v_j,   Λ = β² ( α/n + (1-α)/k )               (2)  estimate
    g_R  = λ g_B + (1-λ) g_Z                                                (3)  rectified gradient
    λ*   = dσ² / ( dσ² + |b|² + τ² )                                        (4)  its best weight

The published code leaves out 1/Λ. Then E[g(v) v] = β²(α/n I + (1-α)/k VVᵀ) ∇f, and with α = 1, the unguided baseline, the estimate is
β²/n times the gradient: at a common learning rate that baseline never moves. Λ is the largest eigenvalue, so that the estimate is unbiased
along the guide for α < 1 and everywhere for α = 1.

The quantities of (4) are plugged in from what devices measured: b = g_B - ∇f through the slope along the guide, dσ² from the spread that
(2) implies; τ² is part of the measured |b|².

Dimension key: k pooled public gradients, P guided probes in all, n trainable parameters.

References:
    Sun et al., 2026, CooperLLM, arXiv:2601.12917; Maheswaranathan et al., 2018, arXiv:1806.10230, Eq. (3)-(5).
"""

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.guidance import blend_weights, signs
from cooperllm.algorithm.measured import regression_slope
from cooperllm.config import ArmConfig, Rectification
from cooperllm.messages import Grouping, Plan, Probes, RandomTerm


class PaperArm(Arm):
    """Guided perturbations around the newest public gradients."""

    has_gradient = True

    def probes(self, config: ArmConfig, num_columns: int, num_basis: int) -> Probes:
        """Spends every query on guided perturbations of the device's own."""
        return Probes(
            measures_columns=False,
            num_random=config.queries,
            grouping=Grouping.DEVICE,
            column_scale=config.column_scale,
            random_scale=config.column_scale / config.blend_scale,
            blend=config.blend,
            blend_scale=config.blend_scale,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Applies eq. (2)-(4)."""
        predicted = public.predicted
        num_columns, size = public.span.shape
        isotropic, guided = blend_weights(num_columns, size, config.blend, config.blend_scale)
        scale = isotropic**2 + guided**2
        num_examples = sum(group.num_examples for group in measured.random_slopes)
        columns = np.zeros(num_columns)
        squares = 0.0
        terms: list[RandomTerm] = []
        for group in measured.random_slopes:
            weights = group.num_examples / num_examples * group.slopes.astype(np.float64) / len(group.slopes)
            squares += float(weights @ group.slopes)
            for position, weight in enumerate(weights):
                columns += weight * guided / scale * signs(plan.seed, group.group, position, num_columns)
            terms.append(RandomTerm(group=group.group, coefficients=(weights * isotropic / scale).astype(np.float32)))
        num_probes = sum(len(group.slopes) for group in measured.random_slopes)
        along = columns * scale / guided**2 if guided else np.zeros(num_columns)
        observed = {"rho": regression_slope(predicted, along.astype(np.float32)), "weight": 0.0}
        if config.rectification is Rectification.OPTIMAL and num_columns:
            weight = _plugged_in_weight(predicted, along, squares, isotropic, guided, config.blend_scale, num_probes)
            columns = weight * predicted + (1 - weight) * columns
            terms = [RandomTerm(group=term.group, coefficients=term.coefficients * np.float32(1 - weight)) for term in terms]
            observed["weight"] = weight
        return Coordinates(columns=columns.astype(np.float32), random_terms=tuple(terms), observed=observed)


def optimal_weight(variance: float, bias_squared: float, public_variance: float) -> float:
    """Gives the weight λ* of the cloud's gradient that minimises the error of eq. (3), eq. (4).

    Args:
        variance: Total variance dσ² of the zeroth-order estimate, >= 0.
        bias_squared: |b|², squared distance of the public from the private gradient, >= 0.
        public_variance: τ², variance of the cloud's gradient, >= 0.

    Returns:
        λ* in [0, 1]: 1 when the cloud's gradient has no error, 0 when the estimate has none.

    Example:
        >>> optimal_weight(3.0, 1.0, 0.0)
        0.75
    """
    total = variance + bias_squared + public_variance
    return variance / total if total > 0 else 0.0


def _plugged_in_weight(
    predicted: Float32[np.ndarray, "k"],
    along: np.ndarray,
    mean_square: float,
    isotropic: float,
    guided: float,
    blend_scale: float,
    num_probes: int,
) -> float:
    """λ* from measurements: |∇f|² from E[g(v)²] = isotropic² |∇f|² + guided² |Vᵀ∇f|²."""
    inside = float(along @ along)
    norm_squared = max(inside, (mean_square - guided**2 * inside) / isotropic**2)
    scale = isotropic**2 + guided**2
    # The estimate's own mean is ∇f along the guide and isotropic²/Λ of it elsewhere.
    mean_squared = inside + (isotropic**2 / scale) ** 2 * (norm_squared - inside)
    variance = max(0.0, mean_square * blend_scale**2 / scale**2 - mean_squared) / num_probes
    bias_squared = max(0.0, float(predicted @ predicted) - 2 * float(predicted @ along) + norm_squared)
    return optimal_weight(variance, bias_squared, 0.0)
