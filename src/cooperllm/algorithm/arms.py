"""The frame that every method shares: what the cloud computes, what devices measure, how the numbers become a step.

An arm is three choices. Everything else (batches, cohorts, codec, optimiser, replay, counting) is the same code for all of them, so a
comparison compares methods and nothing else.

    guide    which columns the cloud computes by back-propagation on public data
    probes   what a device measures, within the same number of two-point queries
    combine  (predicted, measured) -> coordinates of the step

Dimension key: k columns of the span, P random probes per group, n trainable parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from cooperllm.config import ArmConfig
from cooperllm.messages import Feedback, LocalTraining, Plan, Probes, RandomSlopes, RandomTerm, StepKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What all devices of a round measured together.

    Attributes:
        num_devices: Reports behind the numbers; 0 when no device was asked.
        column_slopes: Mean slope along each column, shape [k].
        column_variance: Variance of one device's slope around it, shape [k].
        random_slopes: Slopes per group of devices that share random directions.
        estimate: Mean of the devices' estimates in full, shape [n], or None.
        agreement: Mean of <g_i, ê_ib> over devices, shape [b].
        energy: Mean of |ê_ib|² over devices, shape [b].
        held: Terms of the rounds since the last step that were held back, oldest round first.
    """

    num_devices: int
    column_slopes: Float32[np.ndarray, "k"]
    column_variance: np.ndarray
    random_slopes: tuple[RandomSlopes, ...]
    estimate: Float32[np.ndarray, "n"] | None
    agreement: Float32[np.ndarray, "b"]
    energy: Float32[np.ndarray, "b"]
    held: tuple[tuple[RandomTerm, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Public:
    """What the cloud's back-propagation says.

    Attributes:
        span: Orthonormal columns U, shape [k, n].
        basis: K rows V that random probes are mixed from, each of shape [n].
        predicted: p_k = <u_k, g_B> of the public gradient, shape [k].
    """

    span: Float32[np.ndarray, "k n"]
    basis: Sequence[np.ndarray]
    predicted: Float32[np.ndarray, "k"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """A step before it is applied.

    Attributes:
        columns: One coefficient per column, shape [k]; none where the span is not used.
        random_terms: Coefficients along random directions.
        dense: A direction in full, packed, or None.
        observed: Figures worth recording: rho, weight (λ of the cloud's gradient), shrinkage, span_energy, slope_variance, gain,
            relative_variance.
        kind: Whether the round moves θ.
    """

    columns: Float32[np.ndarray, "k"]
    random_terms: tuple[RandomTerm, ...] = ()
    dense: bytes | None = None
    observed: Mapping[str, float] = field(default_factory=dict[str, float])
    kind: StepKind = StepKind.STEP


class Arm(ABC):
    """One method, as three choices.

    Attributes:
        has_gradient: Whether the cloud back-propagates; its gradient (or a pool of them) gives columns.
        has_momentum: Whether the server's momentum is the first column, where the queries allow it; the only one without a gradient.
        has_basis: Whether random probes are mixed from gradients of public examples.
        has_maps: Whether the cloud fits feedback maps.
        has_pool: Whether random directions are members of a pool that is fixed for the run.
        prefers_momentum: Whether the momentum comes before the cloud's gradient where the queries allow one of them.
    """

    has_gradient = False
    has_momentum = False
    has_basis = False
    has_maps = False
    has_pool = False
    prefers_momentum = False

    def at(self, config: ArmConfig, round_index: int) -> "Arm":
        """Gives the method of one round: always this one, but for arms with phases."""
        return self

    def learning_rate(self, config: ArmConfig, round_index: int) -> float:
        """Gives the step size η of one round."""
        return config.learning_rate

    def free_queries(self, config: ArmConfig) -> int:
        """Says how many two-point queries of a device are left for columns and random directions."""
        return config.queries

    def probes(self, config: ArmConfig, num_columns: int, num_basis: int) -> Probes | None:
        """Says which slopes a device measures, given the columns of the span and the rows of the basis; none unless an arm says so."""
        return None

    def local_training(self, config: ArmConfig) -> LocalTraining | None:
        """Says what a device trains by itself: nothing, but for the bound."""
        return None

    def feedback(self, config: ArmConfig, maps_version: int, blocks: Sequence[tuple[int, int]]) -> Feedback | None:
        """Says whether a device estimates its gradient, with which maps, and in which blocks of θ the estimate is measured."""
        return None

    @abstractmethod
    def combine(self, config: ArmConfig, plan: Plan, public: Public, measured: Measured) -> Coordinates:
        """Turns the cloud's prediction and the devices' measurements into coordinates of the step."""
