"""Examples of a shard side by side, as a network is called with them.

Dimension key: B examples, T tokens, H hidden size, R targets (B, or tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cooperllm.completion import Encoded, targets


@dataclass(kw_only=True, slots=True)
class Examples(Encoded):
    """Tokenised texts, and the frozen prefix's output as far as it has been asked for.

    Attributes:
        states: Hidden states entering the first adapted layer, by example, each [T, H].
    """

    states: dict[int, Float[Tensor, "_T H"]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded examples.

    Attributes:
        token_ids: Shape [B, T].
        mask: 1 for tokens, 0 for padding, shape [B, T].
        labels: Targets: classes [B], or tokens [R].
        states: Hidden states entering the first adapted layer, [B, T, H], or None.
        places: For next tokens: where the states stand that predict the targets, row · T + column, [R].
    """

    token_ids: Tensor
    mask: Tensor
    labels: Tensor
    states: Tensor | None
    places: Tensor | None = None

    @property
    def given(self) -> tuple[Tensor, ...]:
        """What the network is called with."""
        return (self.token_ids, self.mask) if self.places is None else (self.token_ids, self.mask, self.places)


def padded(examples: Encoded, indices: Sequence[int], pad_id: int) -> Batch:
    """Puts chosen examples below one another, each filled up to the longest.

    Args:
        examples: Where to choose from.
        indices: Which of them, at least one.
        pad_id: Token that fills up rows.

    Returns:
        The batch, without states.

    Example:
        >>> import numpy as np
        >>> texts = Encoded(token_ids=[np.array([5, 6, 7]), np.array([5, 8])], labels=np.array([0, 1]))
        >>> padded(texts, [0, 1], 9).token_ids.tolist()
        [[5, 6, 7], [5, 8, 9]]
    """
    rows = [torch.from_numpy(examples.token_ids[index]) for index in indices]
    token_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    if examples.starts is None:
        return Batch(token_ids=token_ids, mask=mask, labels=torch.from_numpy(examples.labels[list(indices)]), states=None)
    chosen = [examples.token_ids[index] for index in indices]
    tokens, places = targets(chosen, examples.starts[list(indices)].tolist(), token_ids.shape[1])
    return Batch(token_ids=token_ids, mask=mask, labels=torch.from_numpy(tokens), states=None, places=torch.from_numpy(places))
