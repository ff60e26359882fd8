"""The frame that every method shares: what the cloud computes, what devices measure, how the numbers become a step.

An arm is three choices. Everything else (batches, cohorts, codec, optimiser, replay, counting) is the same code for all of them, so a
comparison compares methods and nothing else.

    guide    which columns the cloud computes by back-propagation on public data
    probes   what a device measures, within the same number of two-point queries
    combine  (predicted, measured) -> coordinates of the step

Dimension key: k columns of the span, P random probes per group, n trainable parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cooperllm.config import ArmConfig
from cooperllm.messages import LocalTraining, Plan, Probes, RandomSlopes, RandomTerm


class GuideSource(Enum):
    """What the cloud computes for a round."""

    NOTHING = "nothing"
    GRADIENT = "gradient"
    CLASSES = "classes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What all devices of a round measured together.

    Attributes:
        num_devices: Reports behind the numbers; 0 when no device was asked.
        column_slopes: Mean slope along each column, shape [k].
        column_variance: Variance of one device's slope around it, shape [k].
        random_slopes: Slopes per group of devices that share random directions.
        estimate: Mean of the devices' estimates in full, shape [n], or None.
    """

    num_devices: int
    column_slopes: Float32[np.ndarray, "k"]
    column_variance: np.ndarray
    random_slopes: tuple[RandomSlopes, ...]
    estimate: Float32[np.ndarray, "n"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """A step before it is applied.

    Attributes:
        columns: One coefficient per column, shape [k].
        random_terms: Coefficients along random directions.
        dense: A direction in full, shape [n], or None.
        observed: Figures worth recording: rho, weight (λ of the cloud's gradient), shrinkage, span_energy, slope_variance.
    """

    columns: Float32[np.ndarray, "k"]
    random_terms: tuple[RandomTerm, ...] = ()
    dense: Float32[np.ndarray, "n"] | None = None
    observed: Mapping[str, float] = field(default_factory=dict[str, float])


@runtime_checkable
class Arm(Protocol):
    """One method, as three choices."""

    guide: GuideSource
    has_momentum: bool

    def probes(self, config: ArmConfig, num_columns: int) -> Probes | None:
        """Says what a device measures when the span has `num_columns` columns."""
        ...

    def local_training(self, config: ArmConfig) -> LocalTraining | None:
        """Says what a device trains by itself, for the bound only."""
        ...

    def combine(
        self,
        config: ArmConfig,
        plan: Plan,
        span: Float32[np.ndarray, "k n"],
        predicted: Float32[np.ndarray, "k"],
        measured: Measured,
    ) -> Coordinates:
        """Turns the cloud's prediction and the devices' measurements into coordinates of the step."""
        ...
