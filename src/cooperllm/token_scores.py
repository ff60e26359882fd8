"""Scores of a whole vocabulary that are never there at once: made, used and forgotten a block of tokens at a time.

    s_rv = g(h_r · w_v + b_v)                                               (1)  one g for all: the identity, a bound as Gemma's, a scale
    ℓ_r  = log Σ_k exp( log Σ_{v in block k} exp s_rv ) - s_r,y_r           (2)
    ∂ℓ_r = Σ_v ( exp(s_rv - log Σ_u exp s_ru) - [v = y_r] ) ∂s_rv           (3)

What is kept of a block is two numbers for each target; for a gradient each block is made once more. Blocks are of the vocabulary and not of
the targets: each weight is read once, and noise streamed into it is made once.

References:
    Wijmans et al., 2024, Cut your losses in large-vocabulary language models, arXiv:2411.09009: the same sums, on a GPU.

Dimension key: R targets, H hidden size, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WHOLE_MIB = 16
"""Scores of so much are made at once: small vocabularies keep the bits that they have always had."""

BLOCK_MIB = 2
"""Of a block of larger ones; with it a block and its exponentials stay in a processor's cache."""


def are_large(num_targets: int, num_tokens: int) -> bool:
    """Tells whether scores are to be made in blocks.

    Args:
        num_targets: R >= 1.
        num_tokens: V >= 1.

    Returns:
        Whether R · V float32 numbers are more than `WHOLE_MIB`.

    Example:
        >>> are_large(128, 32768), are_large(128, 32769)
        (False, True)
    """
    return 4 * num_targets * num_tokens > WHOLE_MIB * 2**20


def block_width(num_targets: int) -> int:
    """Gives the tokens of a block.

    Args:
        num_targets: R >= 1.

    Returns:
        As many as `BLOCK_MIB` have room for, at least one.

    Example:
        >>> block_width(128)
        4096
    """
    return max(1, BLOCK_MIB * 2**20 // (4 * num_targets))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What scores are made of, eq. (1).

    Attributes:
        states: Last hidden states where a token is due, shape [R, H].
        weight: Of the output layer, shape [V, H].
        bias: Of the output layer, shape [V], or None.
        finish: g, of scores [R, v] of any tokens.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    finish: Callable[[Tensor], Tensor]

    def losses(self, labels: Tensor) -> Tensor:
        """Computes cross entropies, eq. (2).

        Args:
            labels: Wanted tokens, shape [R].

        Returns:
            Shape [R], float32; differentiable in whatever the states and weights depend on.

        Example:
            >>> scores = TokenScores(states=torch.ones(1, 2), weight=torch.zeros(4, 2), bias=None, finish=lambda scores: scores)
            >>> bool(torch.isclose(scores.losses(torch.tensor([3])), torch.tensor(4.0).log()))
            True
        """
        if torch.is_grad_enabled():
            return _Losses.apply(self, labels, self.states, self.weight, self.bias)
        return self.sums(labels)[1]

    def sums(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Adds up exponentials, eq. (2).

        Args:
            labels: Wanted tokens, shape [R].

        Returns:
            (log-sums over all tokens [R]; losses [R]).

        Example:
            >>> scores = TokenScores(states=torch.ones(1, 2), weight=torch.zeros(4, 2), bias=None, finish=lambda scores: scores)
            >>> [float(part.exp().round()) for part in scores.sums(torch.tensor([3]))]
            [4.0, 4.0]
        """
        wanted = torch.zeros(len(labels), device=self.states.device)
        total = torch.full_like(wanted, -torch.inf)
        for first, weight, bias in self.blocks():
            scores = self.of(self.states, weight, bias)
            places, is_here = _places(labels, first, weight)
            own = torch.where(is_here, scores.gather(1, places[:, None])[:, 0], 0.0)
            # At once: small results left lying between blocks would keep a heap from using their room again.
            total, wanted = torch.logaddexp(total, scores.logsumexp(1)), wanted + own
        return total, total - wanted

    def likeliest(self) -> Tensor:
        """Finds the token with the highest score, the first of several.

        Returns:
            Tokens, shape [R].

        Example:
            >>> scores = TokenScores(states=torch.ones(1, 1), weight=torch.tensor([[1.0], [3.0], [3.0]]), bias=None, finish=torch.tanh)
            >>> scores.likeliest()
            tensor([1])
        """
        tokens = torch.zeros(len(self.states), dtype=torch.int64, device=self.states.device)
        best = torch.full_like(tokens, -torch.inf, dtype=torch.float32)
        for first, weight, bias in self.blocks():
            found = self.of(self.states, weight, bias).max(1)
            is_higher = found.values > best
            best, tokens = torch.where(is_higher, found.values, best), torch.where(is_higher, first + found.indices, tokens)
        return tokens

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Divides the output layer.

        Yields:
            (first token; weights of it and those behind it [v, H]; biases [v]) for each block.

        Example:
            >>> scores = TokenScores(states=torch.ones(1 << 18, 1), weight=torch.zeros(3, 1), bias=None, finish=torch.tanh)
            >>> [(first, len(weight)) for first, weight, _ in scores.blocks()]
            [(0, 2), (2, 1)]
        """
        width = block_width(len(self.states))
        weights = self.weight.split(width)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(width)
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            yield number * width, weight, bias

    def of(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Makes a block of scores, eq. (1).

        Args:
            states: Shape [R, H].
            weight: Shape [v, H].
            bias: Shape [v], or None.

        Returns:
            Shape [R, v], float32.

        Example:
            >>> scores = TokenScores(states=torch.ones(1, 1), weight=torch.ones(3, 1), bias=None, finish=lambda scores: 2 * scores)
            >>> scores.of(scores.states, scores.weight[:2], None)
            tensor([[2., 2.]])
        """
        return self.finish(functional.linear(states, weight, bias)).float()


class _Losses(torch.autograd.Function):
    """Losses whose backward pass makes each block of scores again, and forgets it again, eq. (3)."""

    @staticmethod
    def forward(ctx: Any, scores: TokenScores, labels: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total, losses = scores.sums(labels)
        ctx.scores = replace(scores, states=states.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach())
        ctx.save_for_backward(labels, total)
        kind = states.device.type
        ctx.precision = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return losses

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        scores, (labels, total), needs = ctx.scores, ctx.saved_tensors, ctx.needs_input_grad[2:]
        whole = (scores.states, scores.weight, scores.bias)
        found = [torch.zeros_like(part) if needed else None for part, needed in zip(whole, needs, strict=True)]
        for first, weight, bias in scores.blocks():
            parts = [
                part if part is None else part.detach().requires_grad_(needed)
                for part, needed in zip((scores.states, weight, bias), needs, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(**ctx.precision):  # as it was in the forward pass
                block = scores.of(*parts)
            places, is_here = _places(labels, first, weight)
            errors = (block.detach() - total[:, None]).exp_()
            errors.scatter_add_(1, places[:, None], -is_here[:, None].float()).mul_(given[0][:, None])
            gradients = iter(torch.autograd.grad(block, [part for part in parts if part is not None and part.requires_grad], errors))
            here = slice(first, first + len(weight))
            for sums, rows in zip(found, (slice(None), here, here), strict=True):
                if sums is not None:
                    sums[rows] += next(gradients)
        return None, None, *found


def _places(labels: Tensor, first: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(column of each wanted token in a block, any for others [R]; whether it is in the block [R])."""
    places = labels - first
    return places.clamp(0, len(weight) - 1), (places >= 0) & (places < len(weight))
