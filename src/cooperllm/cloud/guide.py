"""Back-propagation on public data, and what it is turned into.

    g_B = ∇ mean_i ℓ(x_i, y_i)                                              (1)  the public gradient
    V   = orthonormal basis of { ∇ ℓ(x_i, ỹ_i) },   ỹ_i drawn evenly        (2)  where gradients of single examples lie

The labels in (2) are drawn, not read: (1) is the cloud's opinion of its own texts, (2) has none. It says in which directions scores of
such texts can be moved at all, and a class that public data lack has its share of it.

Dimension key: B public examples, C classes, K rows of the basis, n trainable parameters.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64

from cooperllm.algorithm import noise
from cooperllm.config import UNLABELLED

PUBLIC_BATCH = 1 << 61
"""Noise index that chooses the public batch of a round."""

BASIS_EXAMPLES = PUBLIC_BATCH + 1
"""Noise index that chooses the examples of a basis."""

BASIS_LABELS = PUBLIC_BATCH + 2
"""Noise index that draws their labels."""

DEPENDENT = 1e-6
"""Directions with less than this share of the largest eigenvalue are left out of a basis."""


@runtime_checkable
class DifferentiableModel(Protocol):
    """What the cloud needs of a model; `cooperllm.models.Model` is one."""

    num_classes: int

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def loss(self, theta: torch.Tensor, batch: Any, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mean loss with the batch's own labels or others, differentiable in θ."""
        ...

    def checkpointed(self) -> AbstractContextManager[None]:
        """Within it, layers keep their inputs alone for a backward pass."""
        ...


Chosen = tuple[Int64[np.ndarray, "_B"], Int64[np.ndarray, "_R"] | None]
"""Examples of a batch, and labels in the place of their own."""

Differentiate = Callable[[Float32[np.ndarray, "n"], Sequence[Chosen]], list[tuple[Float32[np.ndarray, "n"], float]]]
"""Gradient [n] and loss of each of some batches at θ, eq. (1)."""


class BackPropagation:
    """Differentiates in this process: a `Differentiate`."""

    def __init__(
        self,
        model: DifferentiableModel,
        public: Any,
        *,
        checkpoints_activations: bool = False,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Takes the public examples.

        Args:
            model: The network.
            public: Its examples.
            checkpoints_activations: Whether layers keep their inputs alone, and run once more.
            precision: Within what it gives, forward passes are made.
        """
        self._model, self._public = model, public
        self._checkpoints_activations, self._precision = checkpoints_activations, precision

    def __call__(self, theta: Float32[np.ndarray, "n"], batches: Sequence[Chosen]) -> list[tuple[Float32[np.ndarray, "n"], float]]:
        """Computes each batch's gradient and loss.

        Args:
            theta: Current θ, not modified.
            batches: Examples, with labels of theirs or without.

        Returns:
            (gradient [n], mean loss) of each.
        """
        return [self._differentiated(theta, *chosen) for chosen in batches]

    def _differentiated(
        self, theta: Float32[np.ndarray, "n"], chosen: Int64[np.ndarray, "_B"], labels: Int64[np.ndarray, "_R"] | None
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        point = torch.from_numpy(theta.copy()).requires_grad_()
        with self._precision():
            batch = self._model.batch(self._public, chosen.tolist())
            with self._model.checkpointed() if self._checkpoints_activations else nullcontext():
                loss = self._model.loss(point, batch, None if labels is None else torch.from_numpy(labels))
        (gradient,) = torch.autograd.grad(loss, point)
        return gradient.numpy(), float(loss.detach())


class GuideMaker:
    """Makes a round's directions from public examples.

    Attributes:
        pool_size: Public gradients kept for the paper's arm, newest first.
    """

    def __init__(
        self, model: DifferentiableModel, public: Any, batch_size: int, pool_size: int, differentiate: Differentiate | None = None
    ) -> None:
        """Takes the public examples.

        Args:
            model: The network.
            public: Its examples.
            batch_size: B of eq. (1).
            pool_size: Public gradients kept.
            differentiate: What back-propagates; by default this process, with this model.
        """
        self._num_classes, self._public, self._batch_size = model.num_classes, public, batch_size
        self._differentiate = differentiate or BackPropagation(model, public)
        self.pool_size = pool_size
        self._pool: deque[np.ndarray] = deque(maxlen=pool_size)
        self._latest_seed: int | None = None

    @cached_property
    def has_every_class(self) -> bool:
        """Whether the public data hold an example of each class."""
        is_next_token = self._public.starts is not None  # there, every token that occurs is due somewhere
        return is_next_token or len(set(self._public.labels.tolist()) - {UNLABELLED}) == self._num_classes

    def gradient(self, theta: Float32[np.ndarray, "n"], seed: int) -> tuple[Float32[np.ndarray, "n"], float]:
        """Computes the public gradient, eq. (1), and puts it at the head of the pool.

        Args:
            theta: Current θ, not modified.
            seed: The round's seed.

        Returns:
            (g_B [n], public loss).
        """
        chosen = noise.permutation(seed, PUBLIC_BATCH, len(self._public))[: self._batch_size]
        ((gradient, loss),) = self._differentiate(theta, [(chosen, None)])
        if seed == self._latest_seed:  # a round that is planned once more
            self._pool.popleft()
        self._pool.appendleft(gradient)
        self._latest_seed = seed
        return gradient, loss

    def basis(self, theta: Float32[np.ndarray, "n"], seed: int, num_examples: int) -> Float32[np.ndarray, "K n"]:
        """Finds where gradients of this task lie at all, eq. (2): the directions that random probes are mixed from.

        Args:
            theta: Current θ, not modified.
            seed: The round's seed.
            num_examples: Public examples used.

        Returns:
            Orthonormal rows, shape [K, n], K <= num_examples.
        """
        chosen = noise.permutation(seed, BASIS_EXAMPLES, len(self._public))[:num_examples]
        counts = [self._public.num_targets([index]) for index in chosen.tolist()]
        drawn = noise.bits(seed, BASIS_LABELS, sum(counts), stream=noise.Stream.CHOICE) % np.uint64(self._num_classes)
        labels = np.split(drawn.astype(np.int64), np.cumsum(counts)[:-1])
        gradients = self._differentiate(theta, [(chosen[i : i + 1], own) for i, own in enumerate(labels)])
        rows = np.stack([gradient / max(float(np.linalg.norm(gradient)), 1e-30) for gradient, _ in gradients]).astype(np.float64)
        values, vectors = np.linalg.eigh(rows @ rows.T)
        is_new = values > DEPENDENT * values.max(initial=0)
        return ((vectors[:, is_new] / np.sqrt(values[is_new])).T @ rows)[::-1].astype(np.float32)

    def pool(self) -> tuple[Float32[np.ndarray, "n"], ...]:
        """Returns the pool, newest first."""
        return tuple(self._pool)

    def restore(self, pool: Sequence[Float32[np.ndarray, "n"]]) -> None:
        """Takes a pool back from a checkpoint."""
        self._pool = deque(pool, maxlen=self.pool_size)
