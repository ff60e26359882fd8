"""How wide a model is, as far as memory is concerned; a runtime without the model's own library needs to know it too."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

Width = Annotated[int, Meta(ge=0, le=1 << 24)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Sizes of one layer's activations.

    Attributes:
        hidden: Of a hidden state.
        feed_forward: Of the widest inner state.
        heads: Attention heads.
        scores: Of what is computed for each token in the end: the vocabulary's size for next tokens, 0 for classes.
    """

    hidden: Width
    feed_forward: Width
    heads: Width
    scores: Width = 0

    def activation_mib(self, num_examples: int, num_tokens: int) -> float:
        """Estimates the memory that one point of a pass takes: the widest layer's activations, or scores and their logarithms.

        Args:
            num_examples: B >= 1.
            num_tokens: T >= 1, padding included.

        Returns:
            MiB of float32 values.

        Example:
            >>> Widths(hidden=384, feed_forward=1536, heads=12).activation_mib(1, 32)
            0.75
        """
        tokens = num_examples * num_tokens
        attention = tokens * num_tokens * self.heads
        of_layer = tokens * (6 * self.hidden + 2 * self.feed_forward) + 2 * attention
        return 4 * max(of_layer, 2 * tokens * self.scores) / 2**20
