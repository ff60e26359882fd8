"""Forward passes at θ + μ z without a copy of θ: noise is added to a weight while it is used.

    y = x (W + μ Z)ᵀ                                                        (1)  a linear layer, some rows of W and Z at a time
    e_t = E[t] + μ Z[t]                                                     (2)  rows of an embedding, those of the tokens at hand

Within `perturbed` every operation of PyTorch that takes a part of θ is given that part with its noise in the place of it; what lies in θ
is only read. The largest temporary is a few rows of a linear layer's weights, or the whole of a parameter that is used in another way:
norms, biases, position embeddings, and whatever an architecture does that is neither (1) nor (2).

References:
    Malladi et al., 2023, MeZO, arXiv:2305.17333, Algorithm 1: the same points, by moving θ there and back, which leaves rounding behind.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cooperllm.algorithm.noise import Noise

CHUNK = 1 << 19
"""Weights of a linear layer that are perturbed at a time: they and their noise stay in a processor's cache."""

QUESTIONS = frozenset({
    "__get__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "ndimension",
    "numel", "size", "storage_offset", "stride", "untyped_storage",
})  # fmt: skip
"""Operations that may ask about a weight without reading it."""

VIEWS = frozenset({
    "__get__", "__getitem__", "chunk", "contiguous", "detach", "expand", "flatten", "float", "narrow", "permute", "reshape", "select",
    "split", "squeeze", "swapaxes", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
})  # fmt: skip
"""Operations that may look at a weight where it lies; the noise is added where the view is used."""


def perturbed(theta: Tensor, noise: Noise, scale: float) -> AbstractContextManager[Any]:
    """Within it, PyTorch computes with θ + μ z wherever it is given views of θ.

    Args:
        theta: θ, float32, shape [n]; only read.
        noise: Names z.
        scale: μ, of either sign.

    Returns:
        The context.

    Example:
        >>> theta = torch.zeros(6)
        >>> with perturbed(theta, Noise(7, 3), 2.0):
        ...     found = functional.linear(torch.eye(3), theta.view(2, 3))
        >>> bool((found.T.flatten() == 2 * torch.from_numpy(Noise(7, 3).values(6))).all()), bool((theta == 0).all())
        (True, True)
    """
    return _Perturbed(theta, noise, scale)


class _Perturbed(TorchFunctionMode):
    """Gives operations perturbed values for what they take of θ."""

    def __init__(self, theta: Tensor, noise: Noise, scale: float) -> None:
        super().__init__()
        self._place, self._noise, self._scale = theta.data_ptr(), noise, scale
        self._storage = theta.untyped_storage().data_ptr()
        self._room = torch.empty(CHUNK)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if not self._is_ours((args, tuple(given.values()))):
            return func(*args, **given)
        if func is functional.linear:
            return self._linear(*args, **given)
        if func is functional.embedding and not self._is_ours(args[0]):
            return self._embedding(*args, **given)
        name = getattr(func, "__name__", "")
        if name in QUESTIONS or name in VIEWS:
            found = func(*args, **given)
            if (name in QUESTIONS and not isinstance(found, Tensor)) or (name in VIEWS and self._is_ours(found, everything=True)):
                return found
            if name == "__getitem__" and _chooses_rows(*args):
                return self._rows(*args)
        return func(*self._moved(args), **{key: self._moved(value) for key, value in given.items()})

    def _linear(self, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Eq. (1)."""
        value, bias = self._moved(value), self._moved(bias)
        if weight.dim() != 2:
            return functional.linear(value, self._moved(weight), bias)
        found, rows = value.new_empty(*value.shape[:-1], weight.shape[0]), max(1, CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows]
            moved = self._moved(part, out=self._room[: part.numel()].view(part.shape) if part.numel() <= CHUNK else None)
            found[..., start : start + rows] = functional.linear(value, moved)
        return found if bias is None else found.add_(bias)

    def _embedding(
        self, token_ids: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *options: Any, **named: Any
    ) -> Tensor:
        """Eq. (2); other options than a largest norm are for gradients."""
        if max_norm is None:
            return self._rows(weight, token_ids)
        return functional.embedding(token_ids, self._moved(weight), padding_idx, max_norm, *options, **named)

    def _rows(self, weight: Tensor, chosen: Any) -> Tensor:
        """Rows of a matrix, each once however often it is chosen."""
        numbers, places = torch.as_tensor(chosen).unique(return_inverse=True)
        return torch.stack([self._moved(weight[number]) for number in numbers.tolist()])[places]

    def _is_ours(self, found: Any, *, everything: bool = False) -> bool:
        """Whether some tensor of an argument, or every one of a result, is a view of θ."""
        if isinstance(found, (tuple, list)):
            tellings = (self._is_ours(each, everything=everything) for each in found)
            return all(tellings) if everything else any(tellings)
        return isinstance(found, Tensor) and found.layout is torch.strided and found.untyped_storage().data_ptr() == self._storage

    def _moved(self, found: Any, out: Tensor | None = None) -> Any:
        """The perturbed values of views of θ, and everything else as it is."""
        if isinstance(found, (tuple, list)):
            return type(found)(map(self._moved, found))
        if not self._is_ours(found) or found.numel() == 0:
            return found
        start = (found.data_ptr() - self._place) // found.element_size()
        length = 1 + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
        part = torch.from_numpy(self._noise.part(start, start + length)).as_strided(found.shape, found.stride())
        return torch.add(found, part, alpha=self._scale, out=out)


def _chooses_rows(weight: Any, chosen: Any) -> bool:
    """Whether an index names rows, in any order."""
    return isinstance(weight, Tensor) and (isinstance(chosen, list) or (isinstance(chosen, Tensor) and chosen.dtype is torch.int64))
