"""Forward passes with PyTorch: the reference runtime.

No graph is built, no gradient is kept, and θ enters as views of a perturbed copy of the small trained vector, never of the base weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.algorithm import feedback
from cooperllm.algorithm.maps import DecodedMaps
from cooperllm.algorithm.noise import Noise
from cooperllm.algorithm.rounding import NO_ROUNDING, Rounding
from cooperllm.algorithm.zeroth_order import Differentiate, Evaluate, EvaluateAlong
from cooperllm.answers import Judge
from cooperllm.config import AdapterKind, ModelConfig
from cooperllm.device.runtime import DIRECTIONS_PER_PASS, GRAPH_SHARE, score_shift
from cooperllm.streamed_noise import perturbed


@runtime_checkable
class ForwardModel(Protocol):
    """What the runtime needs of a model; `cooperllm.models.Model` is one."""

    num_classes: int
    config: ModelConfig
    adapted: Any

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def scores(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns scores [R, C]."""
        ...

    def loss(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns the mean loss."""
        ...

    def answers(self, theta: Float32[np.ndarray, "n"], examples: Any, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Generates answers: (what was wanted, what was said)."""
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

    def __init__(
        self,
        model: ForwardModel,
        examples: Any,
        shard: Sequence[int],
        activation_mib: float | None,
        adjustment: float = 0.0,
        judge: Judge | None = None,
        rounding: Callable[[], Rounding] = lambda: NO_ROUNDING,
    ) -> None:
        """Takes one device's part of the examples.

        Args:
            model: Shared by the devices of a process.
            examples: All private examples of the process.
            shard: The device's positions among them.
            activation_mib: Memory that the points of a batched pass may take; None for one point at a time.
            adjustment: τ of `algorithm.label_adjustment`.
            judge: Of generated answers, in the place of the loss.
            rounding: Says how losses are rounded.
        """
        self._model = model
        self._examples = examples
        self.shard = list(shard)
        self._limit_mib, self._judge, self.rounding = activation_mib, judge, rounding
        self._shift = torch.from_numpy(score_shift(examples, self.shard, model.num_classes, adjustment))

    @property
    def num_examples(self) -> int:
        """Private examples at hand."""
        return len(self.shard)

    def evaluate(self, chosen: Sequence[int]) -> tuple[Evaluate, int]:
        """Pads a batch once and returns its loss as a function of points, with the number of points that fit the memory budget."""
        if self._judge is not None:
            return partial(self._misses, self._judge, [self.shard[position] for position in chosen]), 1
        batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])

        def loss(theta: torch.Tensor) -> torch.Tensor:
            return self._loss(theta, batch)

        def losses(points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
            with torch.inference_mode():
                theta = torch.from_numpy(points)
                if len(points) == 1:
                    return loss(theta[0]).float().reshape(1).numpy()
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for a batch of adapters
                    return torch.func.vmap(loss)(theta).float().numpy()

        return losses, self._points_per_pass(batch, 1)

    @property
    def streams_noise(self) -> bool:
        """Where every weight is trained, so that a point would be a second copy of the model."""
        return self._model.config.adapter is AdapterKind.FULL and self._judge is None

    def evaluate_along(self, chosen: Sequence[int]) -> EvaluateAlong:
        """Pads a batch once and returns its loss at θ + s z, noise being added to weights while they are used."""
        batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])

        def loss(theta: Float32[np.ndarray, "n"], direction: Noise, scale: float) -> float:
            point = torch.from_numpy(theta)
            with torch.inference_mode(), perturbed(point, direction, scale):
                return float(self._loss(point, batch))

        return loss

    def _misses(self, judge: Judge, indices: Sequence[int], points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
        """One less the mean score of the answers at each point."""
        answers = [self._model.answers(point, self._examples, indices) for point in points]
        return np.array([1 - np.mean([judge(*answer) for answer in found]) for found in answers], np.float32)

    def differentiate(self, chosen: Sequence[int]) -> tuple[Differentiate, int]:
        """Returns a batch's loss and its derivatives by PyTorch's own forward mode: the loss once, the directions side by side."""
        batch = self._model.batch(self._examples, [self.shard[position] for position in chosen])

        def found(theta: Float32[np.ndarray, "n"], directions: Float32[np.ndarray, "P n"]) -> tuple[float, Float32[np.ndarray, "P"]]:
            point = torch.from_numpy(theta.copy())

            def loss(theta: torch.Tensor) -> torch.Tensor:
                return self._loss(theta, batch)

            def along(direction: torch.Tensor) -> Any:
                return torch.func.jvp(loss, (point,), (direction,))

            side_by_side: Any = torch.func.vmap(along, out_dims=(None, 0))  # pyright: ignore[reportArgumentType] -- None is a dimension, too
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no derivative in forward mode
                value, slopes = side_by_side(torch.from_numpy(directions))
            return float(value), slopes.float().numpy()

        return found, max(1, self._points_per_pass(batch, 1 + DIRECTIONS_PER_PASS) - 1)

    def _points_per_pass(self, batch: Any, default: int) -> int:
        """The number of points that fit the memory budget."""
        return default if self._limit_mib is None else max(1, int(self._limit_mib / self._model.activation_mib(batch)))

    @property
    def map_shape(self) -> tuple[int, int]:
        """(layers that feedback maps are for, their width D)."""
        return len(self._model.adapted.below), self._model.adapted.width

    def estimate(
        self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: DecodedMaps | None
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Differentiates the last layer and what lies above it in a forward pass, then each adapted layer below, one at a time."""
        point, total, losses = torch.from_numpy(theta.copy()).requires_grad_(), torch.zeros(len(theta)), list[float]()
        indices = [self.shard[position] for position in chosen]
        most, num_targets = self._examples_per_graph(indices), self._examples.num_targets(indices)
        for begin in range(0, len(indices), most):
            batch = self._model.batch(self._examples, indices[begin : begin + most])
            losses.append(self._estimate(point, batch, maps, len(batch.labels) / num_targets, total))
        return total.numpy(), sum(losses)

    def _examples_per_graph(self, indices: Sequence[int]) -> int:
        """All of a batch, or as many as fit the memory budget while a layer is differentiated."""
        if self._limit_mib is None:
            return len(indices)
        of_one = self._model.activation_mib(self._model.batch(self._examples, indices)) / len(indices)
        return max(1, min(len(indices), int(self._limit_mib / (GRAPH_SHARE * of_one))))

    def _estimate(self, point: torch.Tensor, batch: Any, maps: DecodedMaps | None, share: float, total: torch.Tensor) -> float:
        """Adds a part of a batch to an estimate, and returns its part of the mean loss."""
        adapted, top = self._model.adapted, list[torch.Tensor]()
        with adapted.opened_at_top(top) as calls:
            loss = share * self._loss(point, batch)
        exact, at_input, at_output = torch.autograd.grad(loss, [point, *top], materialize_grads=True)
        total += exact
        mapped, delta, output = None if maps is None else _Mapped(maps, batch, at_output), at_input, top[0].detach()
        for number in reversed(range(len(adapted.below))):
            layer, call = adapted.below[number], calls.pop()
            part, passed = adapted.pulled_back(point, layer, call, delta if mapped is None else mapped.delta(number, output))
            total[layer.start : layer.stop] += part
            delta, output = passed, adapted.given(call)
        return float(loss.detach())

    @property
    def backward_passes(self) -> int:
        """Forward passes that a backward pass counts as: one through frozen weights, two where all of them are trained."""
        return 2 if self._model.config.adapter is AdapterKind.FULL else 1

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

    def _loss(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        if len(self._shift) == 1:  # next tokens, whose scores may be more than there is room for
            return self._model.loss(theta, batch)
        return torch.nn.functional.cross_entropy(self._model.scores(theta, batch).float() + self._shift, batch.labels)


class _Mapped:
    """What maps predict for a batch, `algorithm.feedback`, eq. (5)-(6)."""

    def __init__(self, maps: DecodedMaps, batch: Any, at_top: torch.Tensor) -> None:
        self._maps, self._is_token = maps, batch.mask > 0
        self._tokens = feedback.tokens(batch.mask.numpy())
        self._top = at_top[self._is_token].float().numpy()

    def delta(self, number: int, output: torch.Tensor) -> torch.Tensor:
        """The loss's gradient at the output of a layer."""
        layer, found = self._maps.layers[number], torch.zeros_like(output)
        described = feedback.features(output[self._is_token].float().numpy(), self._tokens, layer.basis)
        predicted = feedback.deltas(self._top, described, self._tokens, self._maps.directions, layer.maps)
        found[self._is_token] = torch.from_numpy(predicted).to(output.dtype)
        return found
