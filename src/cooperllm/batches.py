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
        positions: Where examples share rows: each token's place in its own example, 0 for padding, [B, T]; else None.
    """

    token_ids: Tensor
    mask: Tensor
    labels: Tensor
    states: Tensor | None
    places: Tensor | None = None
    positions: Tensor | None = None

    @property
    def given(self) -> tuple[Tensor, ...]:
        """What the network is called with."""
        return tuple(given for given in (self.token_ids, self.mask, self.places, self.positions) if given is not None)


def batch_of(examples: Encoded, indices: Sequence[int], rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Puts chosen examples into rows, each filled up to the longest.

    Args:
        examples: Where to choose from.
        indices: Which of them, at least one.
        rows: Positions in `indices`, row by row, each once. Rows of several are for next tokens.
        pad_id: Token that fills up rows.

    Returns:
        The batch, without states; targets are in the order of `indices`.

    Example:
        >>> import numpy as np
        >>> rows = [np.array([5, 6, 7, 8]), np.array([5, 8]), np.array([5, 9])]
        >>> texts = Encoded(token_ids=rows, labels=np.zeros(3, int), starts=np.ones(3, int))
        >>> found = batch_of(texts, [0, 1, 2], [[0], [1, 2]], 1)
        >>> found.token_ids.tolist(), found.positions.tolist(), found.places.tolist()
        ([[5, 6, 7, 8], [5, 8, 5, 9]], [[0, 1, 2, 3], [0, 1, 0, 1]], [0, 1, 2, 4, 6])
    """
    tokens = [torch.from_numpy(examples.token_ids[index]) for index in indices]
    token_ids, mask = stacked(tokens, rows, pad_id), stacked([torch.ones_like(row) for row in tokens], rows)
    if examples.starts is None:
        return Batch(token_ids=token_ids, mask=mask, labels=torch.from_numpy(examples.labels[list(indices)]), states=None)
    firsts = [0] * len(indices)
    for number, row in enumerate(rows):
        place = number * mask.shape[1]
        for position in row:
            firsts[position] = place
            place += len(tokens[position])
    chosen = [examples.token_ids[index] for index in indices]
    labels, places = targets(chosen, examples.starts[list(indices)].tolist(), firsts)
    return Batch(
        token_ids=token_ids,
        mask=mask,
        labels=torch.from_numpy(labels),
        states=None,
        places=torch.from_numpy(places),
        positions=stacked([torch.arange(len(row)) for row in tokens], rows) if len(rows) < len(indices) else None,
    )


def stacked(parts: Sequence[Tensor], rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Lays parts behind one another in rows.

    Args:
        parts: Of unlike lengths, each [T, ...].
        rows: Positions in `parts`, row by row.
        value: What fills up short rows.

    Returns:
        Shape [rows, T, ...].

    Example:
        >>> stacked([torch.ones(1), 2 * torch.ones(3), 3 * torch.ones(1)], [[1], [0, 2]]).tolist()
        [[2.0, 2.0, 2.0], [1.0, 3.0, 0.0]]
    """
    return pad_sequence([torch.cat([parts[position] for position in row]) for row in rows], batch_first=True, padding_value=value)
