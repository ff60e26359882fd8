"""The feedback arm: devices take local steps along their own gradients, one layer in memory at a time.

    ê_i  = (1/S) Σ_s ê_is,   θ_i,s+1 = θ_is - η_i ê_is,   θ_i0 = θ           (1)  S local steps, each on a batch of its own;
           ê_is = ê(θ_is), cut to the length of ê_i0                             no longer than the first
    ĝ    = mean_i ê_i, each block b times its gain γ_b                      (2)  `algorithm.feedback`, eq. (8), γ measured along ê(θ_i0)
    d    = ĝ + what slopes along columns and random probes say beyond ĝ      (3)  `algorithm.measured`, eq. (3)-(4), with λ = 0

Without maps, the default, ê is the gradient itself and no block is measured. With maps that are worth nothing every γ falls to 0, and the
exact gradient of the last layer and of a head remains. Of q two-point queries two local steps take three
(`config.passes_of_estimates`) and each block one; the rest goes to columns and random directions. Local steps are those of federated
averaging. Where the loss has become too sharp for them a walk runs up the walls of its valley and its last estimate, many times longer than
the first, would drown the others: hence the cut.

Where queries are left, the first column is the server's momentum. What maps get wrong in the same way every round adds up there, and its
measured slope is what stops it.

References:
    McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data, Algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cooperllm.algorithm import feedback
from cooperllm.algorithm.arms import Coordinates, Measured, Public
from cooperllm.algorithm.compression import pack_vector
from cooperllm.algorithm.measured import MeasuredArm, corrected
from cooperllm.config import ArmConfig, queries_of_estimates
from cooperllm.messages import Feedback, Plan


class FeedbackArm(MeasuredArm):
    """Gradients from the devices, or estimates with maps from the cloud and slopes to keep them honest."""

    has_maps = True
    prefers_momentum = True

    def free_queries(self, config: ArmConfig) -> int:
        """Leaves what the estimates and their blocks do not take."""
        return max(0, config.queries - queries_of_estimates(config.local_steps) - config.feedback_blocks)

    def feedback(self, config: ArmConfig, maps_version: int, blocks: Sequence[tuple[int, int]]) -> Feedback:
        """Asks for an estimate, measured block by block."""
        return Feedback(
            maps_version=maps_version,
            blocks=tuple(blocks),
            bits=config.estimate_bits,
            slope_scale=config.column_scale,
            num_steps=config.local_steps,
            step_size=config.local_learning_rate,
        )

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Applies eq. (2)-(3)."""
        assert plan.feedback is not None, "a round of this arm asks for estimates"
        assert measured.estimate is not None, "the quorum was checked, and every usable report has an estimate"
        gains = feedback.gains(measured.agreement, measured.energy)
        prior = feedback.rectified(measured.estimate, plan.feedback.blocks, gains)
        direction, observed = corrected(replace(config, public_weight=0.0), plan, public, measured, prior)
        if plan.feedback.blocks:
            energy = float(measured.energy.sum())
            observed["gain"] = float(measured.energy @ gains) / energy if energy > 0 else 0.0
        dense = pack_vector(direction, config.step_bits, plan.seed)
        return Coordinates(columns=np.zeros(0, np.float32), dense=dense, observed=observed)
