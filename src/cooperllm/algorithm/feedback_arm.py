"""The feedback arm: devices estimate their own gradients with the cloud's maps, and measure how much of each block is true.

    ĝ    = mean_i ê_i, each block b times its gain γ_b                      (1)  `algorithm.feedback`, eq. (6)
    d    = ĝ + what slopes along columns and random probes say beyond ĝ      (2)  `algorithm.measured`, eq. (3)-(4), with λ = 0

With maps that are worth nothing every γ falls to 0, the head's exact gradient and the measured arm remain. Of q two-point queries the
estimate takes one (two forward passes) and each block one; the rest goes to columns and random directions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cooperllm.algorithm import feedback
from cooperllm.algorithm.arms import Coordinates, Measured, Public
from cooperllm.algorithm.compression import pack_vector
from cooperllm.algorithm.measured import MeasuredArm, corrected
from cooperllm.config import ArmConfig
from cooperllm.messages import Feedback, Plan


class FeedbackArm(MeasuredArm):
    """Maps from the cloud, estimates from the devices, slopes to keep them honest."""

    has_maps = True

    def free_queries(self, config: ArmConfig) -> int:
        """Leaves what the estimate and its blocks do not take."""
        return max(0, config.queries - 1 - config.feedback_blocks)

    def feedback(self, config: ArmConfig, maps_version: int, blocks: Sequence[tuple[int, int]]) -> Feedback:
        """Asks for an estimate, measured block by block."""
        return Feedback(maps_version=maps_version, blocks=tuple(blocks), bits=config.estimate_bits, slope_scale=config.column_scale)

    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Applies eq. (1)-(2)."""
        assert plan.feedback is not None, "a round of this arm asks for estimates"
        assert measured.estimate is not None, "the quorum was checked, and every usable report has an estimate"
        gains = feedback.gains(measured.agreement, measured.energy)
        prior = feedback.rectified(measured.estimate, plan.feedback.blocks, gains)
        direction, observed = corrected(replace(config, public_weight=0.0), plan, public, measured, prior)
        energy = float(measured.energy.sum())
        gain = float(measured.energy @ gains) / energy if energy > 0 else 0.0
        dense = pack_vector(direction, config.estimate_bits)
        return Coordinates(columns=np.zeros(0, np.float32), dense=dense, observed={**observed, "gain": gain})
