"""The default arm: the cloud supplies a span, the devices supply the coefficients.

    c_k  = mean_i g_i(u_k)                                                  (1)  slopes of all devices i along common columns
    r_gj = g_g(z_gj) - Σ_k c_k <u_k, z_gj>                                  (2)  what a random probe saw outside the span
    d    = Σ_k ( (1-λ) c_k + λ p_k ) u_k                                     (3)  step direction: measured and predicted slopes,
         + w Σ_gj (1/P) r_gj (z_gj - U Uᵀ z_gj),  w = P/(P+r)                and what P random probes add
    ρ    = Σ_k c_k p_k / Σ_k p_k²,   p_k = <u_k, g_B>                        (4)  how far public gradients foretell private slopes

A single public direction traps a run under shift: it stops where public and private gradients are at right angles. Here public data
only say *where* to measure: gradients of each class (or of groups of classes, when there are more than the budget allows), complete over
labels, and the server's momentum, which costs no byte since every replica holds it. The random probes may start before the guide has
arrived, because (2) removes what they saw inside the span afterwards. λ is the paper's constant weight on the cloud's own gradient; a
cloud that lacks a class would unlearn it, so its λ is 0 and it only supplies directions (`cloud.state`).

Dimension key: k columns, P random probes in all groups together, n trainable parameters.

References:
    Sun et al., 2026, CooperLLM, arXiv:2601.12917 (rectified gradient).
    Maheswaranathan et al., 2018, Guided evolutionary strategies, arXiv:1806.10230.
    Cheng et al., 2019, Improving black-box adversarial attacks with a transfer-based prior (P-RGF), arXiv:1906.06919.
"""

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm import noise
from cooperllm.algorithm.arms import Coordinates, GuideSource, Measured
from cooperllm.algorithm.guidance import dot
from cooperllm.config import ArmConfig
from cooperllm.messages import Grouping, LocalTraining, Plan, Probes, RandomTerm, probe_indices


class MeasuredArm:
    """Common columns measured on every device, random probes beside them."""

    guide = GuideSource.CLASSES
    has_momentum = True

    def probes(self, config: ArmConfig, num_columns: int) -> Probes:
        """Splits the query budget: one query per column, the rest for random directions."""
        return Probes(
            measures_columns=True,
            num_random=max(0, config.queries - num_columns),
            grouping=Grouping.DEVICE,
            column_scale=config.column_scale,
            random_scale=config.random_scale,
        )

    def local_training(self, config: ArmConfig) -> LocalTraining | None:
        """Devices only run forward passes."""
        return None

    def combine(
        self,
        config: ArmConfig,
        plan: Plan,
        span: Float32[np.ndarray, "k n"],
        predicted: Float32[np.ndarray, "k"],
        measured: Measured,
    ) -> Coordinates:
        """Applies eq. (2)-(4)."""
        slopes = measured.column_slopes
        columns = (1 - config.public_weight) * slopes.astype(np.float64) + config.public_weight * predicted
        num_probes = sum(len(group.slopes) for group in measured.random_slopes)
        num_examples = sum(group.num_examples for group in measured.random_slopes)
        weight = shrinkage(num_probes, config.effective_rank)
        terms: list[RandomTerm] = []
        outside = 0.0
        for group in measured.random_slopes:
            share = group.num_examples / num_examples
            coefficients = np.zeros(len(group.slopes), np.float32)
            for position, index in enumerate(probe_indices(group.group, len(group.slopes))):
                inside = _inside(span, noise.gaussian(plan.seed, index, span.shape[1]))
                rest = float(group.slopes[position] - slopes.astype(np.float64) @ inside)
                outside += rest**2 / num_probes
                coefficients[position] = weight * share * rest / len(group.slopes)
                columns -= np.float64(coefficients[position]) * inside
            terms.append(RandomTerm(group=group.group, coefficients=coefficients))
        energy = float(slopes.astype(np.float64) @ slopes)
        observed = {
            "rho": regression_slope(predicted, slopes),
            "weight": config.public_weight,
            "shrinkage": weight,
            "slope_variance": float(measured.column_variance.mean()) if len(slopes) else 0.0,
        }
        if num_probes and energy + outside > 0:
            observed["span_energy"] = energy / (energy + outside)
        return Coordinates(columns=columns.astype(np.float32), random_terms=tuple(terms), observed=observed)


def shrinkage(num_probes: int, effective_rank: float) -> float:
    """Gives the weight w of the random part, eq. (3).

    P probes see P directions of an r-dimensional landscape; the best multiple of their estimate is P/(P+r), for a Hessian of
    effective rank r (of n when it is isotropic).

    Args:
        num_probes: P >= 0.
        effective_rank: r >= 0.

    Returns:
        In [0, 1]; 0 without probes.

    Example:
        >>> shrinkage(20, 180.0)
        0.1
    """
    return num_probes / (num_probes + effective_rank) if num_probes else 0.0


def regression_slope(predicted: Float32[np.ndarray, "k"], measured: Float32[np.ndarray, "k"]) -> float:
    """Tells how far predictions of the cloud hold on the devices, eq. (4).

    Args:
        predicted: <u_k, g_B> of the cloud's gradient, shape [k].
        measured: Slopes c_k of the devices, shape [k].

    Returns:
        ρ: 1 when private slopes are as predicted, 0 when they are unrelated, below 0 when public data mislead.

    Example:
        >>> regression_slope(np.array([2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
        0.5
    """
    norm = float(predicted.astype(np.float64) @ predicted)
    return float(predicted.astype(np.float64) @ measured) / norm if norm > 0 else 0.0


def _inside(span: Float32[np.ndarray, "k n"], direction: Float32[np.ndarray, "n"]) -> np.ndarray:
    return np.array([dot(column, direction) for column in span], np.float64)
