"""Forward passes with PyTorch: the reference runtime.

No graph is built, no gradient is kept, and θ enters as views of a perturbed copy of the small trained vector, never of the base weights.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.algorithm.zeroth_order import Evaluate


@runtime_checkable
class ForwardModel(Protocol):
    """What the runtime needs of a model; `cooperllm.models.Model` is one."""

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def loss(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns the mean loss of a batch at θ, a scalar."""
        ...

    def activation_mib(self, batch: Any) -> float:
        """Estimates the memory of one point's forward pass."""
        ...


class TorchForward:
    """One device's model and shard.

    Attributes:
        shard: Positions of the device's examples among all private examples of this process.
    """

    def __init__(self, model: ForwardModel, examples: Any, shard: Sequence[int], memory_mib: float | None) -> None:
        self._model = model
        self._examples = examples
        self.shard = list(shard)
        self._memory_mib = memory_mib

    @property
    def num_examples(self) -> int:
        """Private examples at hand."""
        return len(self.shard)

    def evaluate(self, chosen: Sequence[int]) -> tuple[Evaluate, int]:
        """Pads a batch once and returns its loss as a function of points, with the number of points that fit the memory budget."""
        batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])
        points_per_pass = 1
        if self._memory_mib is not None:
            points_per_pass = max(1, int(self._memory_mib / self._model.activation_mib(batch)))

        def loss(theta: torch.Tensor) -> torch.Tensor:
            return self._model.loss(theta, batch)

        def losses(points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
            with torch.inference_mode():
                theta = torch.from_numpy(points)
                if len(points) == 1:
                    return loss(theta[0]).float().reshape(1).numpy()
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for a batch of adapters
                    return torch.func.vmap(loss)(theta).float().numpy()

        return losses, points_per_pass

    def train(self, theta: Float32[np.ndarray, "n"], batches: Sequence[Sequence[int]], learning_rate: float) -> Float32[np.ndarray, "n"]:
        """Takes plain gradient steps by back-propagation: the bound, not something a small device does."""
        point = torch.from_numpy(theta.copy())
        for chosen in batches:
            point.requires_grad_()
            batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])
            (gradient,) = torch.autograd.grad(self._model.loss(point, batch), point)
            point = point.detach() - learning_rate * gradient
        return point.numpy()
