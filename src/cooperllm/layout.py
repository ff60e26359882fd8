"""Where each trained tensor lies in θ.

Dimension key: n trainable parameters.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where each trained tensor lies in θ.

    Attributes:
        names: Parameter names inside the module.
        shapes: Their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """n, the length of θ."""
        return sum(self.sizes)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Half-open range of each tensor in θ."""
        return dict(zip(self.names, pairwise(accumulate(self.sizes, initial=0)), strict=True))

    def views(self, theta: Float[Tensor, "n"]) -> dict[str, Tensor]:
        """Returns θ as named tensors that share its memory."""
        parts = torch.split(theta, list(self.sizes))
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
