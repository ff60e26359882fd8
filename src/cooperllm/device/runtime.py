"""The seam between a device's work and whatever computes its forward passes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.label_adjustment import label_adjustment
from cooperllm.algorithm.maps import DecodedMaps
from cooperllm.algorithm.rounding import Rounding
from cooperllm.algorithm.zeroth_order import Differentiate, Evaluate, EvaluateAlong
from cooperllm.completion import Encoded

GRAPH_SHARE = 2
"""A layer that is differentiated keeps about so many times what it needs to run: an estimate's pass counts as so many points."""

DIRECTIONS_PER_PASS = 4
"""Directions of one forward-mode pass where no memory budget says otherwise: 1.25 forward passes each, docs/devices.md."""


def score_shift(examples: Encoded, shard: Sequence[int], num_classes: int, strength: float) -> Float32[np.ndarray, "_C"]:
    """Gives what a device adds to its scores before the loss: its label shares, or for next tokens, which have none, nothing.

    Args:
        examples: All private examples of the process.
        shard: Those of the device.
        num_classes: C.
        strength: τ of `algorithm.label_adjustment`.

    Returns:
        Shape [C], or [1] for next tokens.
    """
    return np.zeros(1, np.float32) if examples.starts is not None else label_adjustment(examples.labels[list(shard)], num_classes, strength)


@runtime_checkable
class Runtime(Protocol):
    """A model and one device's private examples; PyTorch today, an inference runtime without it next."""

    @property
    def num_examples(self) -> int:
        """Private examples at hand."""
        ...

    @property
    def map_shape(self) -> tuple[int, int]:
        """(layers that feedback maps are for, their width D)."""
        ...

    def rounding(self) -> Rounding:
        """How losses are rounded; the same for every batch, at most measured once."""
        ...

    def evaluate(self, chosen: Sequence[int]) -> tuple[Evaluate, int]:
        """Prepares one batch.

        Args:
            chosen: Which private examples, positions in [0, num_examples).

        Returns:
            (losses of the batch as a function of points θ [P, n], points that one pass may hold).
        """
        ...

    def differentiate(self, chosen: Sequence[int]) -> tuple[Differentiate, int]:
        """Prepares one batch for slopes in forward mode.

        Args:
            chosen: Which private examples, positions in [0, num_examples).

        Returns:
            (loss of the batch and its derivatives as a function of θ [n] and directions [P, n], directions that one pass may hold).

        Raises:
            ConfigError: If the runtime has no forward mode for this model.
        """
        ...

    def estimate(
        self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: DecodedMaps | None
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Estimates the gradient of a batch's loss with two forward passes, `algorithm.feedback`.

        Args:
            theta: θ, not modified.
            chosen: Positions of private examples.
            maps: The cloud's maps, of this `map_shape`; without them layers below the last one get its gradient.

        Returns:
            (ê [n]; the batch's mean loss).
        """
        ...


@runtime_checkable
class Streaming(Protocol):
    """A runtime that can make noise where a weight is used: for θ of which a device has no room for a copy."""

    @property
    def streams_noise(self) -> bool:
        """Whether slopes along isotropic random directions are to be measured in this way."""
        ...

    def evaluate_along(self, chosen: Sequence[int]) -> EvaluateAlong:
        """Prepares one batch.

        Args:
            chosen: Which private examples, positions in [0, num_examples).

        Returns:
            The batch's loss as a function of θ, the name of a direction z, and s: at θ + s z.
        """
        ...


@runtime_checkable
class Trainer(Protocol):
    """Back-propagation on a device: only the bound needs it."""

    @property
    def backward_passes(self) -> int:
        """Forward passes that a backward pass counts as: one through frozen weights, two where all of them are trained."""
        ...

    def train(
        self,
        theta: Float32[np.ndarray, "n"],
        batches: Sequence[Sequence[int]],
        learning_rate: float,
        *,
        checkpoints_activations: bool = False,
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Takes one plain gradient step per batch.

        Args:
            theta: Start θ, not modified.
            batches: Positions of private examples, one sequence per step.
            learning_rate: Step size, > 0.
            checkpoints_activations: Whether layers run once more instead of keeping their activations.

        Returns:
            (θ after the last step [n], mean loss of the first batch before the first step).
        """
        ...
