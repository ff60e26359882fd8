"""The scalar arm: the cloud supplies directions, the devices supply nothing but slopes along them.

    c_k  = mean_i g_i(u_k)                                                  (1)  slopes of all devices i along common columns
    z_gj = V r_gj / √K,   r_gj Rademacher                                   (2)  random probes inside the basis V of the guide
    s_gj = g_g(z_gj) - <ĝ_0, z_gj> - Σ_k c_k <u_k, z_gj>                    (3)  what a probe saw beyond prior and columns
    d    = ĝ_0 + Σ_k ( (1-λ) c_k + λ p_k ) u_k                               (4)  step direction: measured and predicted slopes,
         + w K Σ_gj (1/P) s_gj (z_gj - U Uᵀ z_gj),  w = P/(P+K)              and what P random probes add
    ρ    = Σ_k c_k p_k / Σ_k p_k²,   p_k = <u_k, g_B>                        (5)  how far public gradients foretell private slopes

A single public direction traps a run under shift: it stops where public and private gradients are at right angles. The directions here are
wider. Columns: the server's momentum, which costs no byte since every replica holds it, and the public gradient. Basis: gradients of single
public examples under labels drawn at random (`cloud.guide`), so it is where gradients of such texts lie, whatever the labels say and
whichever class is missing. Inside it P probes see P of K dimensions instead of P of n: K E[z zᵀ] is the projector onto V, and the best
multiple of the estimate is P/(P+K). Without a basis probes are isotropic, z ~ N(0, I), with the effective rank r of the landscape in the
place of K in w, and 1 in the place of the factor K in (4).

Random probes may start before the guide has arrived, because (3) removes what they saw inside the span afterwards. λ is the paper's
constant weight on the cloud's own gradient. A cloud that lacks a class sends no directions at all (`cloud.state`): they would be worse than
none. The prior ĝ_0 is 0 here; the feedback arm has a better one.

Dimension key: k columns, K rows of the basis, P random probes in all groups together, n trainable parameters.

References:
    Sun et al., 2026, CooperLLM, arXiv:2601.12917 (rectified gradient).
    Maheswaranathan et al., 2018, Guided evolutionary strategies, arXiv:1806.10230, Eq. (3).
    Cheng et al., 2019, Improving black-box adversarial attacks with a transfer-based prior (P-RGF), arXiv:1906.06919.
"""

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.compression import pack_vector
from cooperllm.algorithm.guidance import dot, inside, random_directions
from cooperllm.config import ArmConfig
from cooperllm.messages import Grouping, Plan, Probes


class MeasuredArm(Arm):
    """Common columns measured on every device, random probes beside them."""

    has_gradient = True
    has_momentum = True
    has_basis = True

    def probes(self, config: ArmConfig, num_columns: int, num_basis: int) -> Probes:
        """Splits the query budget: one query per column, the rest for random directions."""
        return Probes(
            measures_columns=True,
            num_random=max(0, self.free_queries(config) - num_columns),
            grouping=Grouping.DEVICE,
            column_scale=config.column_scale,
            random_scale=config.column_scale if num_basis else config.random_scale,
            blend=0.0 if num_basis else None,
            distribution=config.distribution,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Applies eq. (4) without a prior."""
        nothing = np.zeros(public.span.shape[1], np.float32)
        direction, observed = corrected(config, plan, public, measured, nothing)
        return Coordinates(columns=np.zeros(0, np.float32), dense=pack_vector(direction, config.step_bits, plan.seed), observed=observed)


def corrected(
    config: ArmConfig, plan: Plan, public: Public, measured: Measured, prior: Float32[np.ndarray, "n"]
) -> tuple[Float32[np.ndarray, "n"], dict[str, float]]:
    """Corrects a prior estimate by what slopes say beyond it, eq. (3)-(5).

    Args:
        config: Weight λ.
        plan: Names the round's random directions.
        public: Span, basis and prediction of the cloud.
        measured: What the devices measured.
        prior: ĝ_0, what is known of the gradient before any slope, shape [n].

    Returns:
        (d [n], figures worth recording).

    Example:
        See tests/unit/test_arms.py, which writes the equation out.
    """
    assert plan.probes is not None, "a round of this arm measures slopes"
    span, predicted = public.span, public.predicted
    slopes = measured.column_slopes - inside(span, prior)
    num_probes = sum(len(group.slopes) for group in measured.random_slopes)
    num_examples = sum(group.num_examples for group in measured.random_slopes)
    num_rows = len(public.basis)
    shrunk = shrinkage(num_probes, num_rows or config.effective_rank)
    total, outside = prior.copy(), 0.0
    for group in measured.random_slopes:
        share = shrunk * (num_rows or 1) * group.num_examples / num_examples / len(group.slopes)
        directions = random_directions(plan.seed, group.group, plan.probes, public.basis, len(prior))
        for slope, direction in zip(group.slopes, directions, strict=True):
            seen = inside(span, direction)
            rest = float(slope) - dot(prior, direction) - float(slopes @ seen)
            outside += rest**2 / num_probes
            total += np.float32(share * rest) * (direction - seen @ span)
    total += ((1 - np.float32(config.public_weight)) * slopes + np.float32(config.public_weight) * predicted) @ span
    energy = float(slopes.astype(np.float64) @ slopes)
    observed = {
        "rho": regression_slope(predicted, slopes),
        "weight": config.public_weight if len(slopes) else 0.0,
        "shrinkage": shrunk,
        "slope_variance": float(measured.column_variance.mean()) if len(slopes) else 0.0,
    }
    if num_probes and energy + outside > 0:
        observed["span_energy"] = energy / (energy + (num_rows or 1) * outside)
    return total, observed


def shrinkage(num_probes: int, dimension: float) -> float:
    """Gives the weight w of the random part, eq. (4).

    Args:
        num_probes: P >= 0.
        dimension: Rows K of the basis, or effective rank r without one, >= 0.

    Returns:
        P/(P+K), in [0, 1]; 0 without probes.

    Example:
        >>> shrinkage(20, 180)
        0.1
    """
    return num_probes / (num_probes + dimension) if num_probes else 0.0


def regression_slope(predicted: Float32[np.ndarray, "k"], measured: Float32[np.ndarray, "k"]) -> float:
    """Tells how far predictions of the cloud hold on the devices, eq. (5).

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
