"""Forward passes with PyTorch: the reference runtime.

No graph is built, no gradient is kept, and θ enters as views of a perturbed copy of the small trained vector, never of the base weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.algorithm import feedback
from cooperllm.algorithm.label_adjustment import label_adjustment
from cooperllm.algorithm.maps import ModuleMaps, unpack_maps
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

    def __init__(self, model: ForwardModel, examples: Any, shard: Sequence[int], memory_mib: float | None, adjustment: float = 0.0) -> None:
        """Takes one device's part of the examples; `adjustment` is τ of `algorithm.label_adjustment`."""
        self._model = model
        self._examples = examples
        self.shard = list(shard)
        self._memory_mib = memory_mib
        self._shift = torch.from_numpy(label_adjustment(examples.labels[self.shard], model.num_classes, adjustment))

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
            return self._loss(theta, batch)

        def losses(points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
            with torch.inference_mode():
                theta = torch.from_numpy(points)
                if len(points) == 1:
                    return loss(theta[0]).float().reshape(1).numpy()
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for a batch of adapters
                    return torch.func.vmap(loss)(theta).float().numpy()

        return losses, points_per_pass

    def estimate(
        self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: Sequence[Maps]
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Runs forward once for the output error, and once more to take each module's part while that module is at hand."""
        model, adapted = self._model, self._model.adapted
        batch = model.batch(self._examples, [self.shard[position] for position in chosen])
        point, pooled = torch.from_numpy(theta.copy()), list[torch.Tensor]()
        with torch.inference_mode(), adapted.head_watched(pooled.append):
            scores = self._scores(point, batch)
            loss = float(torch.nn.functional.cross_entropy(scores, batch.labels))
        error = feedback.output_error(scores.softmax(1).numpy(), batch.labels.numpy())
        result = np.zeros_like(theta)
        if maps:
            parts = torch.from_numpy(result)
            delta = _deltas(unpack_maps(maps, adapted.sizes, model.num_classes), batch, error @ maps[0].contrasts.T)
            with torch.no_grad(), adapted.pulled_back(point.requires_grad_(), delta, parts.add_):
                model.scores(point, batch)
        for given in pooled:
            result[slice(*adapted.head.weight)] = (error.T @ given.float().numpy()).reshape(-1)
            result[slice(*adapted.head.bias)] = error.sum(0)
        return result, loss

    def train(
        self,
        theta: Float32[np.ndarray, "n"],
        batches: Sequence[Sequence[int]],
        learning_rate: float,
        *,
        checkpoints_activations: bool = False,
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Takes plain gradient steps by back-propagation: the bound, not something a small device does."""
        point, losses = torch.from_numpy(theta.copy()), list[float]()
        for chosen in batches:
            point.requires_grad_()
            batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])
            with self._model.checkpointed() if checkpoints_activations else nullcontext():
                loss = self._loss(point, batch)
            losses.append(float(loss.detach()))
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() - learning_rate * gradient
        return point.numpy(), losses[0]

    def _scores(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        return self._model.scores(theta, batch).float() + self._shift

    def _loss(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self._scores(theta, batch), batch.labels)


def _deltas(decoded: Sequence[ModuleMaps], batch: Any, along: np.ndarray) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Predicts the loss's gradient at the output of a module, `algorithm.feedback`, eq. (2)-(3); padding has none."""
    is_token, tokens = batch.mask > 0, feedback.tokens(batch.mask.numpy())

    def delta(number: int, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        guide, found = decoded[number], torch.zeros_like(output)
        described = feedback.features(given[is_token].float().numpy(), tokens, guide.basis)
        found[is_token] = torch.from_numpy(feedback.deltas(described, tokens, guide.maps, along)).to(output.dtype)
        return found

    return delta
