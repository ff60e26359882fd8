"""Back-propagation on public data, and what it is turned into.

    g_B = ∇ mean_i ℓ(x_i, y_i)                                              (1)  the public gradient
    c_b = ∇ mean_{i: y_i in b} ℓ(x_i, y_i)                                  (2)  one column per bucket b of classes

When the budget has room for every class, a bucket is a class; otherwise classes are dealt to buckets anew each round. A class without a
public example in the batch lends its label to all of them: which way its score rises does not depend on having seen it.

Dimension key: B public examples, C classes, k columns, n trainable parameters.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64

from cooperllm.algorithm import noise
from cooperllm.algorithm.arms import GuideSource


@runtime_checkable
class DifferentiableModel(Protocol):
    """What the cloud needs of a model; `cooperllm.models.Model` is one."""

    num_classes: int

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def scores(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns class scores [B, C], differentiable in θ."""
        ...


class GuideMaker:
    """Makes a round's columns from public examples.

    Attributes:
        pool_size: Public gradients kept for the paper's arm, newest first.
    """

    def __init__(self, model: DifferentiableModel, public: Any, batch_size: int, pool_size: int) -> None:
        self._model = model
        self._public = public
        self._batch_size = batch_size
        self.pool_size = pool_size
        self._pool: deque[np.ndarray] = deque(maxlen=pool_size)

    @property
    def has_every_class(self) -> bool:
        """Whether the public data hold an example of each class."""
        return len(np.unique(self._public.labels)) == self._model.num_classes

    def columns(
        self, source: GuideSource, theta: Float32[np.ndarray, "n"], seed: int, num_columns: int
    ) -> tuple[Float32[np.ndarray, "k n"], Float32[np.ndarray, "n"], float]:
        """Computes the columns of a guide.

        Args:
            source: A gradient (with the pool behind it), or columns by class.
            theta: Current θ, not modified.
            seed: The round's seed.
            num_columns: Room for columns by class, >= 1.

        Returns:
            (columns [k, n] of any length, public gradient g_B [n], public loss).
        """
        point = torch.from_numpy(theta.copy()).requires_grad_()
        chosen = noise.permutation(seed, PUBLIC_BATCH, len(self._public))[: self._batch_size]
        if source is GuideSource.GRADIENT:
            gradient, loss = self._gradient(point, chosen, None)
            self._pool.appendleft(gradient)
            return np.stack(self._pool), gradient, loss
        labels = self._public.labels[chosen]
        columns: list[np.ndarray] = []
        mean, mean_loss = np.zeros_like(theta), 0.0
        for bucket in _buckets(self._model.num_classes, num_columns, seed):
            belongs = np.isin(labels, bucket)
            if belongs.any():
                share = np.float32(belongs.mean())
                column, loss = self._gradient(point, chosen[belongs], None)
                mean, mean_loss = mean + share * column, mean_loss + float(share) * loss
            else:
                column, _ = self._gradient(point, chosen, bucket)
            columns.append(column)
        return np.stack(columns), mean, mean_loss

    def _gradient(
        self, point: torch.Tensor, chosen: Int64[np.ndarray, "_B"], lent: list[int] | None
    ) -> tuple[Float32[np.ndarray, "_n"], float]:
        """Gradient and loss over public examples, with their own labels or with each of the lent ones."""
        batch = self._model.batch(self._public, chosen.tolist())
        log_likelihoods = torch.log_softmax(self._model.scores(point, batch).float(), dim=1)
        own = log_likelihoods.gather(1, batch.labels[:, None])
        loss = -(own if lent is None else log_likelihoods[:, lent]).mean()
        (gradient,) = torch.autograd.grad(loss, point)
        return gradient.numpy(), float(loss.detach())

    def state(self) -> tuple[Float32[np.ndarray, "n"], ...]:
        """Returns the pool, newest first, for a checkpoint."""
        return tuple(self._pool)

    def restore(self, pool: Sequence[Float32[np.ndarray, "n"]]) -> None:
        """Takes a pool back from a checkpoint."""
        self._pool = deque(pool, maxlen=self.pool_size)


PUBLIC_BATCH = 1 << 61
"""Noise index that chooses the public batch of a round."""

BUCKETS = PUBLIC_BATCH + 1
"""Noise index that deals classes to buckets."""


def _buckets(num_classes: int, room: int, seed: int) -> list[list[int]]:
    if num_classes <= room:
        return [[label] for label in range(num_classes)]
    dealt = noise.permutation(seed, BUCKETS, num_classes).tolist()
    return [dealt[start::room] for start in range(room)]
