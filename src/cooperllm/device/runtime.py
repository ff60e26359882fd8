"""The seam between a device's work and whatever computes its forward passes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.zeroth_order import Evaluate
from cooperllm.messages import Maps


@runtime_checkable
class Runtime(Protocol):
    """A model and one device's private examples; PyTorch today, an inference runtime without it next."""

    @property
    def num_examples(self) -> int:
        """Private examples at hand."""
        ...

    def evaluate(self, chosen: Sequence[int]) -> tuple[Evaluate, int]:
        """Prepares one batch.

        Args:
            chosen: Which private examples, positions in [0, num_examples).

        Returns:
            (losses of the batch as a function of points θ [P, n], points that one pass may hold).
        """
        ...

    def estimate(
        self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: Sequence[Maps]
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Estimates the gradient of a batch's loss with two forward passes, `algorithm.feedback`.

        Args:
            theta: θ, not modified.
            chosen: Positions of private examples.
            maps: The cloud's maps, whole ones and the differences since, or nothing for the head's exact gradient alone.

        Returns:
            (ê [n], 0 where neither maps nor the head say anything; the batch's mean loss).

        Raises:
            DecodeError: If the maps do not fit the model.
        """
        ...


@runtime_checkable
class Trainer(Protocol):
    """Back-propagation on a device: only the bound needs it."""

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
