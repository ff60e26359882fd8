"""Weighted means with counts: the same function at the edge and at the cloud.

    mean = Σ_i w_i x_i / Σ_i w_i                                           (1)
    var  = ( Σ_i w_i x_i² / Σ_i w_i - mean² ) / (1 - 1/D)                   (2)  spread between D senders
    w_i  = n_i s² / (s² + ν_i²),   s² = Σ_i n_i (x̄_i² - ν_i²) / Σ_i n_i       (3)  examples that slopes with rounding ν_i are worth

Senders are added in the order given, in double precision; whoever folds sorts them first, so that the order of arrival cannot change a bit.

References:
    McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data, Algorithm 1.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from cooperllm.messages import RandomSlopes


def weighted_mean(values: Sequence[Float32[np.ndarray, "k"]], weights: Sequence[int]) -> Float32[np.ndarray, "k"]:
    """Averages vectors over senders, eq. (1).

    Args:
        values: One [k] vector per sender, at least one, all finite.
        weights: Number of examples per sender, all > 0.

    Returns:
        Weighted mean, shape [k].

    Example:
        >>> weighted_mean([np.array([1.0], np.float32), np.array([4.0], np.float32)], [2, 1])
        array([2.], dtype=float32)
    """
    total = np.zeros(values[0].shape, np.float64)
    for value, weight in zip(values, weights, strict=True):
        total += np.float64(weight) * value
    return (total / sum(weights)).astype(np.float32)


def weighted_number(values: Sequence[float], weights: Sequence[int]) -> float:
    """Averages single numbers over senders, eq. (1).

    Args:
        values: One number per sender, all finite.
        weights: Number of examples per sender.

    Returns:
        Weighted mean; 0 without any weight.

    Example:
        >>> weighted_number([1.0, 4.0], [2, 1])
        2.0
    """
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / max(sum(weights), 1)


def worth(num_examples: Sequence[int], deviations: Sequence[float], slopes: Sequence[Float32[np.ndarray, "k"]]) -> list[int]:
    """Says how many examples the slopes of each sender are worth beside those of the others, eq. (3).

    Args:
        num_examples: Examples n_i of each sender, all > 0.
        deviations: Standard deviation ν_i that each sender's slopes owe to its rounding, >= 0.
        slopes: Slopes of each sender, shape [k], all finite.

    Returns:
        Weights w_i, at least 1 each; n_i itself where nobody rounds.

    Example:
        >>> steep = np.array([2.0], np.float32)
        >>> worth([16, 16], [0.0, 1.0], [steep, steep])
        [16, 12]
    """
    if not any(deviations):
        return list(num_examples)
    squares = [float((values.astype(np.float64) ** 2).mean()) if len(values) else 0.0 for values in slopes]
    signal = max(0.0, weighted_number([square - nu**2 for square, nu in zip(squares, deviations, strict=True)], num_examples))
    shares = [signal / (signal + noise) if noise else 1.0 for noise in (nu**2 for nu in deviations)]
    return [max(1, round(share * number)) for share, number in zip(shares, num_examples, strict=True)]


def variance_between(
    mean: Float32[np.ndarray, "k"], mean_of_squares: Float32[np.ndarray, "k"], num_senders: int
) -> Float64[np.ndarray, "k"]:
    """Estimates how much single senders' values differ, eq. (2).

    Args:
        mean: Weighted mean per coordinate, shape [k].
        mean_of_squares: Weighted mean of squares per coordinate, shape [k].
        num_senders: D >= 1; with one sender nothing is known and the mean square itself is returned.

    Returns:
        Variance of one sender's value, >= 0, shape [k].

    Example:
        >>> variance_between(np.array([2.0], np.float32), np.array([5.0], np.float32), 2)
        array([2.])
    """
    squares = mean_of_squares.astype(np.float64)
    if num_senders < 2:
        return squares
    return np.maximum(squares - mean.astype(np.float64) ** 2, 0) * (num_senders / (num_senders - 1))


def merged(entries: Sequence[RandomSlopes]) -> tuple[RandomSlopes, ...]:
    """Averages what senders of one group measured along the same random directions, eq. (1).

    Args:
        entries: Slopes of devices, or of edges that share a group, in any order of groups.

    Returns:
        One entry per group, in the order of group numbers.

    Example:
        >>> one = RandomSlopes(group=7, num_examples=1, slopes=np.ones(1, np.float32))
        >>> [entry.num_examples for entry in merged([one, one])]
        [2]
    """
    groups: dict[int, list[RandomSlopes]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return tuple(
        RandomSlopes(
            group=group,
            num_examples=sum(entry.num_examples for entry in members),
            slopes=weighted_mean([entry.slopes for entry in members], [entry.num_examples for entry in members]),
        )
        for group, members in sorted(groups.items())
    )
