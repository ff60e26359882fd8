"""The feedback guide: the cloud sends maps from a device's output error to the outputs of its adapted modules.

    e    = E (softmax(scores) - onehot(y)) / B                              (1)  output error in K contrasts of the classes
    φ_t  = [ 1, Vᵀ x_t, Vᵀ mean_s x_s ]                                     (2)  features of token t at the module's input x
    δ_t  = (1/T) Σ_k e_k M_kᵀ φ_t                                           (3)  predicted gradient of the loss at the module's output y
    M_k  = argmin Σ_t | T ∂(E_k·scores)/∂y_t - M_kᵀ φ_t |² + ridge |M_k|²    (4)  the cloud's fit, on public inputs; labels play no part
    ê    = Σ_t δ_tᵀ ∂y_t/∂w                                                 (5)  gradient of the module's own parameters w, exact but for δ
    ĝ_b  = γ_b ê_b,   γ_b = Σ_i <g_i, ê_ib> / Σ_i |ê_ib|²                    (6)  slopes measured along an estimate say how much is true

A module is the parent of adapted layers, an attention say. A forward pass gives its input, what happens inside it (attention probabilities)
and the output error; only the way from the error back to the module's output needs back-propagation through everything above, and that way
is a property of the model, not of the data: it can be learnt on any text the model reads. A device runs one forward pass for (1) and a
second in which each module's part (5) is taken while that module is at hand, so that memory holds one module at a time. The head's own
gradient needs no map and is exact. (6) takes two more forward passes per block b: feedback gives directions, zeroth-order gives
coefficients. A bad map has γ near 0 and is ignored; one that has come to point the wrong way has γ below 0 and is turned round.

Where it comes from: feedback alignment puts fixed random matrices in the place of M and lets the network adapt to them; here M is fitted
to the network. Synthetic gradients learn (3) on the private data while they train; here public inputs suffice, and labels are never used.

Dimension key: N tokens of a batch (padding left out), B examples, K contrasts, C classes, H and D size of a module's input and output,
c components, F = 1 + 2c features.

References:
    Lillicrap et al., 2016, Random synaptic feedback weights support error backpropagation. Nøkland, 2016, arXiv:1609.01596.
    Jaderberg et al., 2017, Decoupled neural interfaces using synthetic gradients, arXiv:1608.05343, Eq. (2).
    Maheswaranathan et al., 2018, Guided evolutionary strategies, arXiv:1806.10230.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cooperllm.algorithm.guidance import dot

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths tried, as shares of the mean diagonal of the features' second moments."""

REFRESHES_PER_WHOLE = 8
"""A device that has never taken part receives the whole maps and every difference since: this bounds how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What of a batch's shape matters: which example each token belongs to.

    Attributes:
        owner: Example of each token, in ascending order, shape [N].
        lengths: Tokens of each example, shape [B], all >= 1.
    """

    owner: Int64[np.ndarray, "_N"]
    lengths: Int64[np.ndarray, "_B"]


def tokens(mask: np.ndarray) -> Tokens:
    """Reads a padding mask.

    Args:
        mask: 1 for tokens and 0 for padding, shape [B, T]; every example has a token.

    Returns:
        Owners and lengths, in the order in which `x[mask]` lists tokens.

    Example:
        >>> tokens(np.array([[1, 1], [1, 0]])).owner
        array([0, 0, 1])
    """
    return Tokens(owner=np.nonzero(mask)[0].astype(np.int64), lengths=mask.sum(1).astype(np.int64))


def features(activation: Float32[np.ndarray, "N H"], batch: Tokens, basis: Float32[np.ndarray, "H c"]) -> Float32[np.ndarray, "N F"]:
    """Describes each token by itself and by its sentence, eq. (2).

    Args:
        activation: A module's input x, shape [N, H].
        batch: Which token belongs to which example.
        basis: Principal components V, shape [H, c].

    Returns:
        φ, shape [N, 1 + 2c].

    Example:
        >>> x = np.array([[2.0], [4.0]], np.float32)
        >>> features(x, tokens(np.ones((1, 2), int)), np.ones((1, 1), np.float32))
        array([[1., 2., 3.],
               [1., 4., 3.]], dtype=float32)
    """
    projected = activation @ basis
    starts = np.concatenate([[0], np.cumsum(batch.lengths)[:-1]])
    pooled = np.add.reduceat(projected, starts, axis=0) / batch.lengths[:, None].astype(np.float32)
    return np.concatenate([np.ones((len(projected), 1), np.float32), projected, pooled[batch.owner]], axis=1)


def deltas(
    described: Float32[np.ndarray, "N F"], batch: Tokens, maps: Float32[np.ndarray, "K F D"], error: Float32[np.ndarray, "B K"]
) -> Float32[np.ndarray, "N D"]:
    """Predicts the gradient of the loss at a module's output, eq. (3).

    Args:
        described: Features φ, shape [N, F].
        batch: Which token belongs to which example.
        maps: M, shape [K, F, D].
        error: Output error e in contrasts, shape [B, K].

    Returns:
        δ, shape [N, D].

    Example:
        >>> batch = tokens(np.ones((1, 2), int))
        >>> deltas(np.ones((2, 1), np.float32), batch, np.ones((1, 1, 1), np.float32), np.array([[3.0]], np.float32))
        array([[1.5],
               [1.5]], dtype=float32)
    """
    share = (error / batch.lengths[:, None].astype(np.float32))[batch.owner]
    total = np.zeros((len(described), maps.shape[2]), np.float32)
    for contrast, one_map in enumerate(maps):
        total += share[:, contrast, None] * (described @ one_map)
    return total


def output_error(probabilities: Float32[np.ndarray, "B C"], labels: Int64[np.ndarray, "B"]) -> Float32[np.ndarray, "B C"]:
    """Gives the gradient of the mean cross entropy at the scores, eq. (1) before contrasts are taken.

    Args:
        probabilities: Softmax of the scores, shape [B, C].
        labels: Class of each example, shape [B].

    Returns:
        (softmax - onehot) / B, shape [B, C]; each row sums to 0.

    Example:
        >>> output_error(np.array([[0.75, 0.25]], np.float32), np.array([0]))
        array([[-0.25,  0.25]], dtype=float32)
    """
    error = probabilities.copy()
    error[np.arange(len(labels)), labels] -= 1
    return error / np.float32(len(labels))


def contrasts(scores: Float32[np.ndarray, "B C"], most: int) -> Float32[np.ndarray, "K C"]:
    """Chooses the contrasts E of eq. (1): orthonormal, each summing to 0, those first along which public scores vary most.

    With K = C - 1 nothing is lost, since an output error sums to 0 over the classes; with fewer the error's part along the quietest
    contrasts is.

    Args:
        scores: Class scores of public examples, shape [B, C].
        most: K at most, >= 1.

    Returns:
        E, shape [K, C].

    Example:
        >>> np.abs(contrasts(np.array([[1.0, -1.0], [0.0, 0.0]], np.float32), 4)).round(3)
        array([[0.707, 0.707]], dtype=float32)
    """
    num_classes = scores.shape[1]
    centred = scores.astype(np.float64) - scores.mean(axis=1, keepdims=True, dtype=np.float64)
    constant = np.full((num_classes, num_classes), 1 / num_classes)
    # The constant direction is pushed to the end of the order: no contrast may have a part of it.
    moments = (
        centred.T @ centred / len(scores) + np.eye(num_classes) * 1e-12 - 2 * (1 + np.abs(centred).max() ** 2) * num_classes * constant
    )
    vectors = np.linalg.eigh(moments)[1][:, ::-1]
    return vectors[:, : min(num_classes - 1, most)].T.astype(np.float32)


def principal_components(activation: Float32[np.ndarray, "N H"], count: int) -> Float32[np.ndarray, "H c"]:
    """Finds the basis V of eq. (2), scaled so that features are of the order of 1.

    Args:
        activation: A module's public inputs, shape [N, H].
        count: Components wanted; at most min(N, H) exist.

    Returns:
        V, shape [H, c].

    Example:
        >>> np.abs(principal_components(np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32), 1))[:, 0].round(3)
        array([1.414, 0.   ], dtype=float32)
    """
    centred = activation.astype(np.float64) - activation.mean(axis=0, dtype=np.float64)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    return (vectors[:, : min(count, *activation.shape)] / max(float(centred.std()), 1e-12)).astype(np.float32)


@dataclass(kw_only=True)
class Moments:
    """Running sums from which a module's maps follow, eq. (4): a cloud never needs to keep an activation.

    Attributes:
        xx: Σ φ φᵀ, shape [F, F].
        xy: Σ φ targetᵀ for each contrast, shape [K, F, D].
        yy: Σ |target|².
    """

    xx: Float64[np.ndarray, "F F"]
    xy: Float64[np.ndarray, "K F D"]
    yy: float = field(default=0.0)

    @classmethod
    def zero(cls, num_features: int, num_contrasts: int, size: int) -> "Moments":
        """Starts the sums."""
        return cls(xx=np.zeros((num_features, num_features)), xy=np.zeros((num_contrasts, num_features, size)))

    def add(self, described: Float32[np.ndarray, "N F"], targets: Sequence[Float32[np.ndarray, "N D"]]) -> None:
        """Adds a batch: features, and T times the exact Jacobian of each contrast at the module's output."""
        self.xx += described.T @ described
        for contrast, target in enumerate(targets):
            self.xy[contrast] += described.T @ target
            self.yy += float(np.square(target, dtype=np.float64).sum())

    def plus(self, other: "Moments") -> "Moments":
        """Adds sums of other batches."""
        return Moments(xx=self.xx + other.xx, xy=self.xy + other.xy, yy=self.yy + other.yy)

    def beyond(self, maps: Float32[np.ndarray, "K F D"]) -> "Moments":
        """Gives the sums of what maps leave unexplained: a fit to them is what has to be added."""
        held = maps.astype(np.float64)
        return Moments(xx=self.xx, xy=self.xy - self.xx @ held, yy=self.unexplained(held) * self.yy)

    def solve(self, ridge: float) -> Float64[np.ndarray, "K F D"]:
        """Solves eq. (4) for one ridge strength, a share of the mean diagonal of Σ φ φᵀ."""
        damped = self.xx + ridge * max(float(self.xx.diagonal().mean()), 1e-30) * np.eye(len(self.xx))
        return np.linalg.solve(damped[None], self.xy)

    def unexplained(self, maps: Float64[np.ndarray, "K F D"]) -> float:
        """Gives the share of the targets' squares that maps leave, on the data of these sums; 0 is perfect, 1 is no better than nothing."""
        explained = sum(float((2 * xy * one - one * (self.xx @ one)).sum()) for xy, one in zip(self.xy, maps, strict=True))
        return (self.yy - explained) / self.yy if self.yy > 0 else 1.0


def fit(kept: Moments, held_out: Moments) -> tuple[Float32[np.ndarray, "K F D"], float, float]:
    """Fits a module's maps, eq. (4), with the ridge strength that predicts held-out public examples best.

    Args:
        kept: Sums over examples to fit on.
        held_out: Sums over other examples.

    Returns:
        (maps M fitted on both [K, F, D], ridge strength, unexplained share on the held-out examples).

    Example:
        >>> sums = Moments.zero(1, 1, 1)
        >>> sums.add(np.ones((2, 1), np.float32), [np.full((2, 1), 3.0, np.float32)])
        >>> maps, ridge, unexplained = fit(sums, sums)
        >>> maps.round(2).tolist(), ridge
        ([[[3.0]]], 0.0001)
    """
    judged = [(held_out.unexplained(kept.solve(ridge)), ridge) for ridge in RIDGES]
    unexplained, ridge = min(judged)
    return kept.plus(held_out).solve(ridge).astype(np.float32), ridge, unexplained


def gains(agreement: Float32[np.ndarray, "b"], energy: Float32[np.ndarray, "b"]) -> Float32[np.ndarray, "b"]:
    """Says how much of each block's estimate is true, eq. (6).

    A gain below 0 is kept: what was measured is a slope, so that a step along γ ê leads down on these examples whatever the sign.

    Args:
        agreement: Mean over devices of <g_i, ê_ib>, measured as slopes, shape [b].
        energy: Mean over devices of |ê_ib|², shape [b].

    Returns:
        γ, shape [b]; 0 where there is no estimate.

    Example:
        >>> gains(np.array([1.0, -1.0, 0.0], np.float32), np.array([2.0, 1.0, 0.0], np.float32))
        array([ 0.5, -1. ,  0. ], dtype=float32)
    """
    return np.where(energy > 0, agreement / np.where(energy > 0, energy, 1), 0).astype(np.float32)


def shortened(vector: Float32[np.ndarray, "n"], length: float) -> Float32[np.ndarray, "n"]:
    """Cuts a vector to a length, eq. (1) of `algorithm.feedback_arm`.

    Args:
        vector: Any direction, shape [n]; not modified.
        length: The most its norm may be, >= 0.

    Returns:
        The vector itself where it is no longer than that, else a multiple of it; never finite where the vector is not.

    Example:
        >>> shortened(np.array([3.0, 4.0], np.float32), 2.5)
        array([1.5, 2. ], dtype=float32)
    """
    found = math.sqrt(dot(vector, vector))
    with np.errstate(invalid="ignore"):  # inf · 0: the estimate says so
        return vector if found <= length else np.float32(length / found) * vector


def rectified(
    estimate: Float32[np.ndarray, "n"], blocks: Sequence[tuple[int, int]], factors: Float32[np.ndarray, "b"]
) -> Float32[np.ndarray, "n"]:
    """Scales each block of an estimate by its gain, eq. (6); what lies in no block is exact and stays.

    Args:
        estimate: ê, shape [n]; not modified.
        blocks: Half-open ranges of positions in θ.
        factors: γ, one per block.

    Returns:
        ĝ, shape [n].

    Example:
        >>> rectified(np.ones(3, np.float32), [(0, 2)], np.array([0.5], np.float32))
        array([0.5, 0.5, 1. ], dtype=float32)
    """
    result = estimate.copy()
    for (start, stop), factor in zip(blocks, factors, strict=True):
        result[start:stop] *= factor
    return result


def is_refresh(model_version: int, every: int, first: int = 1) -> bool:
    """Says whether maps are fitted anew at a version: at 1, 2, 4, ... while the model changes fast, then every so many updates.

    Args:
        model_version: Updates in θ.
        every: Updates between refreshes in the long run, >= 1.
        first: The first version at which there is anything to fit: 0, or 1 with a head that starts at zero and makes every delta zero.

    Returns:
        Whether it is time.

    Example:
        >>> [version for version in range(25) if is_refresh(version, 8)]
        [1, 2, 4, 8, 16, 24]
    """
    is_power_of_two = model_version & (model_version - 1) == 0
    return model_version >= first and (model_version % every == 0 or (model_version < every and is_power_of_two))


def is_whole(model_version: int, every: int) -> bool:
    """Says whether a refresh sends whole maps: while the model changes fast and few devices hold any, then every so many refreshes.

    Args:
        model_version: Updates in θ, a version at which maps are refreshed.
        every: Updates between refreshes in the long run, >= 1.

    Returns:
        Whether contrasts and bases are chosen anew; otherwise a difference to the maps in use is sent.

    Example:
        >>> [version for version in range(0, 97, 8) if is_whole(version, 8)]
        [0, 8, 64]
    """
    return model_version <= every or model_version % (REFRESHES_PER_WHOLE * every) == 0
