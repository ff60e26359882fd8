"""Forward passes with PyTorch: the reference runtime.

No graph is built, no gradient is kept, and θ enters as views of a perturbed copy of the small trained vector, never of the base weights.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.algorithm import feedback
from cooperllm.algorithm.maps import unpack_maps
from cooperllm.algorithm.zeroth_order import Evaluate
from cooperllm.messages import Maps


@runtime_checkable
class ForwardModel(Protocol):
    """What the runtime needs of a model; `cooperllm.models.Model` is one."""

    num_classes: int
    adapted: Any

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def scores(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns class scores [B, C]."""
        ...

    def loss(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns the mean loss of a batch at θ, a scalar."""
        ...

    def checkpointed(self) -> AbstractContextManager[None]:
        """Within it, layers keep their inputs alone for a backward pass."""
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

    def estimate(self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: Maps | None) -> Float32[np.ndarray, "n"]:
        """Runs forward once for the output error, and once more to add up each layer's part while its input is at hand."""
        model, adapted = self._model, self._model.adapted
        batch = model.batch(self._examples, [self.shard[position] for position in chosen])
        mask = batch.mask.numpy()
        tokens, point, result = feedback.tokens(mask), torch.from_numpy(theta), np.zeros_like(theta)
        decoded = (
            []
            if maps is None
            else unpack_maps(maps, [(layer.input_size, layer.output_size) for layer in adapted.layers], model.num_classes)
        )

        def visit(number: int, given: torch.Tensor, _output: torch.Tensor) -> None:
            if maps is None:
                return
            layer, guide = adapted.layers[number], decoded[number]
            activation = given.float().numpy()[mask > 0]
            described = feedback.features(activation, tokens, guide.basis)
            delta = feedback.deltas(described, tokens, guide.maps, along)
            first = theta[slice(*layer.first)].reshape(layer.rank, layer.input_size)
            second = theta[slice(*layer.second)].reshape(layer.output_size, layer.rank)
            parts = feedback.low_rank_gradient(delta, activation, first, second, layer.scale)
            for where, part in zip((layer.first, layer.second), parts, strict=True):
                result[slice(*where)] += part.reshape(-1)

        def visit_head(given: torch.Tensor) -> None:
            result[slice(*adapted.head.weight)] = (error.T @ given.float().numpy()).reshape(-1)
            result[slice(*adapted.head.bias)] = error.sum(0)

        with torch.inference_mode():
            error = feedback.output_error(model.scores(point, batch).float().softmax(1).numpy(), batch.labels.numpy())
            along = error if maps is None else error @ maps.contrasts.T
            with adapted.watched(visit, visit_head):
                model.scores(point, batch)
        return result

    def train(
        self,
        theta: Float32[np.ndarray, "n"],
        batches: Sequence[Sequence[int]],
        learning_rate: float,
        *,
        checkpoints_activations: bool = False,
    ) -> Float32[np.ndarray, "n"]:
        """Takes plain gradient steps by back-propagation: the bound, not something a small device does."""
        point = torch.from_numpy(theta.copy())
        for chosen in batches:
            point.requires_grad_()
            batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])
            with self._model.checkpointed() if checkpoints_activations else nullcontext():
                loss = self._model.loss(point, batch)
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() - learning_rate * gradient
        return point.numpy()
