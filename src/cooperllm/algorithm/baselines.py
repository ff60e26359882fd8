"""What we compare with, in the same frame: same data, model, budget, optimiser and learning-rate search.

    MeZO-FL     d = mean over devices i of (1/P) Σ_j g_i(z_ij) z_ij         (1)  every device has directions of its own
    DeComFL     d = (1/P) Σ_j [ mean_i g_i(z_j) ] z_j                        (2)  all devices share the directions
    cloud-only  d = g_B                                                     (3)  back-propagation on public data, no device
    FedAvg-BP   d = mean over devices i of (θ - θ_i) / (S η_local)           (4)  S steps of back-propagation on devices: the bound
    FedKSeed    d = mean over devices i of (1/P) Σ_j g_i(z_k) z_k,  k = k_ij (5)  members k of K directions that the run has in all
    warm start  (3) with a step size of its own in the first rounds, then (1)

The zeroth-order estimates are unbiased as they stand, (1) and (2) by E[zzᵀ] = I, and (5) over pools: for the one pool of a run
E[d] = (1/K) Σ_k z_k z_kᵀ ∇f, the gradient's shadow on K of n dimensions, n/K times as long there. FedKSeed's devices take many local
steps and report one sum for each seed; here they measure all slopes at one θ, as DeComFL does with one local step, and the cloud draws
their seeds again instead of being told. Its weighted choice of seeds (FedKSeed-Pro) is left out. Warm start hands over θ alone: the
momentum of back-propagation would be further steps of it under another name, so zeroth order begins from moments of zero.

FedAvg-BP with checkpoints is (4) bit for bit: what a device without room for activations would do. A layer keeps its input alone and
runs forward once more for its backward pass, three forward passes a step in the place of two.

References:
    Malladi et al., 2023, MeZO, arXiv:2305.17333. Li et al., 2024, DeComFL, arXiv:2405.15861, Algorithm 1-2 with one local step.
    Qin et al., 2024, Federated full-parameter tuning at a communication cost under 18 kilobytes (FedKSeed), arXiv:2312.06353, Algorithm 1.
    Chen et al., 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
    McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data, Algorithm 1.
"""

from dataclasses import dataclass, replace

import numpy as np

from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.compression import EXACT, pack_vector
from cooperllm.algorithm.feedback_arm import FeedbackArm
from cooperllm.algorithm.fwdllm import FwdLlm
from cooperllm.algorithm.guidance import choose
from cooperllm.algorithm.measured import MeasuredArm
from cooperllm.algorithm.paper import PaperArm
from cooperllm.config import ArmConfig, ArmName
from cooperllm.messages import Grouping, LocalTraining, Plan, Probes, RandomTerm, StepKind


@dataclass(frozen=True)
class PlainZerothOrder(Arm):
    """Random directions without a guide: eq. (1) or (2), by who shares them."""

    grouping: Grouping

    def probes(self, config: ArmConfig, num_columns: int, num_basis: int) -> Probes:
        """Spends every query on random directions."""
        return Probes(
            measures_columns=False,
            num_random=config.queries,
            grouping=self.grouping,
            column_scale=config.column_scale,
            random_scale=config.random_scale,
            distribution=config.distribution,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Weighs every group's estimate by its examples."""
        total = sum(group.num_examples for group in measured.random_slopes)
        terms = tuple(
            RandomTerm(group=group.group, coefficients=group.slopes * np.float32(group.num_examples / total / len(group.slopes)))
            for group in measured.random_slopes
        )
        return Coordinates(columns=np.zeros(0, np.float32), random_terms=terms)


class FedKSeed(PlainZerothOrder):
    """Random directions that come again: eq. (5)."""

    has_pool = True

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Names the members of the pool that each device has drawn."""
        assert plan.probes is not None, "a round of this arm measures slopes"
        found, probes, size = super().combine(config, plan, public, measured), plan.probes, public.span.shape[1]
        terms = (replace(term, chosen=choose(plan.seed, term.group, probes, [], size)) for term in found.random_terms)
        return replace(found, random_terms=tuple(terms))


class CloudOnly(Arm):
    """Public data only, eq. (3)."""

    has_gradient = True

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Steps along the decoded public gradient."""
        return Coordinates(columns=public.predicted)


class WarmStart(Arm):
    """Back-propagation on public data, then zeroth order from where it ended: eq. (3), then (1)."""

    has_gradient = True

    def at(self, config: ArmConfig, round_index: int) -> Arm:
        """Gives the method of the phase."""
        return CloudOnly() if round_index < config.warm_start_rounds else PlainZerothOrder(Grouping.DEVICE)

    def learning_rate(self, config: ArmConfig, round_index: int) -> float:
        """Gives the phase its own step size."""
        return config.warm_start_learning_rate if round_index < config.warm_start_rounds else config.learning_rate

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Steps as the phase does; the first step of zeroth order has no momentum behind it."""
        found = self.at(config, plan.round_index).combine(config, plan, public, measured)
        return replace(found, kind=StepKind.RESTART if plan.round_index == config.warm_start_rounds else StepKind.STEP)


@dataclass(frozen=True)
class FederatedAveraging(Arm):
    """Back-propagation on private data, eq. (4): what no small device can afford, and no forward-only method can exceed by much."""

    checkpoints_activations: bool = False

    def local_training(self, config: ArmConfig) -> LocalTraining:
        """Trains locally."""
        return LocalTraining(
            num_steps=config.local_steps,
            learning_rate=config.local_learning_rate,
            checkpoints_activations=self.checkpoints_activations,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Hands the mean of the devices' changes to the server's optimiser."""
        return Coordinates(
            columns=np.zeros(0, np.float32), dense=None if measured.estimate is None else pack_vector(measured.estimate, EXACT)
        )


def arm(name: ArmName) -> Arm:
    """Gives the method of a name.

    Args:
        name: Which method.

    Returns:
        Its three choices.

    Example:
        >>> arm(ArmName.CLOUD_ONLY).has_gradient
        True
    """
    arms: dict[ArmName, Arm] = {
        ArmName.FEEDBACK: FeedbackArm(),
        ArmName.MEASURED: MeasuredArm(),
        ArmName.PAPER: PaperArm(),
        ArmName.MEZO_FL: PlainZerothOrder(Grouping.DEVICE),
        ArmName.DECOMFL: PlainZerothOrder(Grouping.SHARED),
        ArmName.FEDKSEED: FedKSeed(Grouping.DEVICE),
        ArmName.FWDLLM: FwdLlm(),
        ArmName.WARM_START: WarmStart(),
        ArmName.CLOUD_ONLY: CloudOnly(),
        ArmName.FEDAVG_BP: FederatedAveraging(),
        ArmName.FEDAVG_BP_CHECKPOINTED: FederatedAveraging(checkpoints_activations=True),
    }
    return arms[name]
