"""What we compare with, in the same frame: same data, model, budget, optimiser and learning-rate search.

    MeZO-FL     d = mean over devices i of (1/P) Σ_j g_i(z_ij) z_ij         (1)  every device has directions of its own
    DeComFL     d = (1/P) Σ_j [ mean_i g_i(z_j) ] z_j                        (2)  all devices share the directions
    cloud-only  d = g_B                                                     (3)  back-propagation on public data, no device
    FedAvg-BP   d = mean over devices i of (θ - θ_i) / (S η_local)           (4)  S steps of back-propagation on devices: the bound

All zeroth-order estimates are unbiased as they stand, (1) and (2) by E[zzᵀ] = I.

References:
    Malladi et al., 2023, MeZO, arXiv:2305.17333. Li et al., 2024, DeComFL, arXiv:2405.15861, Algorithm 1-2 with one local step.
    McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data, Algorithm 1.
"""

from dataclasses import dataclass

import numpy as np

from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.compression import EXACT, pack_vector
from cooperllm.algorithm.feedback_arm import FeedbackArm
from cooperllm.algorithm.measured import MeasuredArm
from cooperllm.algorithm.paper import PaperArm
from cooperllm.config import ArmConfig, ArmName
from cooperllm.messages import Grouping, LocalTraining, Plan, Probes, RandomTerm


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
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Weighs every group's estimate by its examples."""
        total = sum(group.num_examples for group in measured.random_slopes)
        terms = tuple(
            RandomTerm(group=group.group, coefficients=group.slopes * np.float32(group.num_examples / total / len(group.slopes)))
            for group in measured.random_slopes
        )
        return Coordinates(columns=np.zeros(0, np.float32), random_terms=terms)


class CloudOnly(Arm):
    """Public data only, eq. (3)."""

    has_gradient = True

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Steps along the decoded public gradient."""
        return Coordinates(columns=public.predicted)


class FederatedAveraging(Arm):
    """Back-propagation on private data, eq. (4): what no small device can afford, and no forward-only method can exceed by much."""

    def local_training(self, config: ArmConfig) -> LocalTraining:
        """Trains locally."""
        return LocalTraining(num_steps=config.local_steps, learning_rate=config.local_learning_rate)

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
        ArmName.CLOUD_ONLY: CloudOnly(),
        ArmName.FEDAVG_BP: FederatedAveraging(),
    }
    return arms[name]
