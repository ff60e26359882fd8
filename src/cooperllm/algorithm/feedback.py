"""Gradients with one layer in memory at a time, and the feedback guide: maps that predict what would be carried from layer to layer.

    δ_t  = ∂f/∂y_t                                                  (1)  gradient at a layer's output y, for token t
    ê    = Σ_t δ_tᵀ ∂y_t/∂w                                         (2)  gradient of the layer's own parameters w, exact but for δ
    δ'_t = Σ_s δ_sᵀ ∂y_s/∂x_t                                       (3)  at the layer's input x, which is the output of the layer below

A device runs one forward pass, during which the last layer and the readout are differentiated, and keeps what each adapted layer below was
given. Then each of these, from the last one down, runs once more and is differentiated alone, by (2) and (3): back-propagation, with the
memory of one layer and no autograd through the model. That is what happens without maps, the default.

With maps nothing is carried: the cloud has learnt on public text what arrives at each layer.

    e_k  = <q_k, Σ_t δᴸ_t>                                          (4)  a text's gradient at the last layer's output along K directions q
    φ_t  = [ 1, Vᵀ y_t, Vᵀ mean_s y_s ]                             (5)  features of token t
    δ_t  = δᴸ_t + (1/T) Σ_k e_k M_kᵀ φ_t                            (6)  predicted gradient of the loss at y
    M_k  = argmin Σ_t | T (∂c_k/∂y_t - a_t q_k) - M_kᵀ φ_t |² + ridge |M_k|²,   c_k = Σ_t a_t <q_k, h_t>     (7)  the cloud's fit
    ĝ_b  = γ_b ê_b,   γ_b = Σ_i <g_i, ê_ib> / Σ_i |ê_ib|²           (8)  slopes measured along an estimate say how much is true

Layers add to what they are given, so (6) without M is most of the truth in shallow models. What the layers between do is a property of the
model, not of the data, and can be learnt on any text it reads; labels play no part. Nor does the head: maps know directions of the last
hidden state h, not classes, and stay true while a head grows. a_t is the share of token t in what the readout takes from a text: 1/T for a
mean, 1 or 0 for a last token. (8) takes two more forward passes per block b: feedback gives directions, zeroth-order gives coefficients. A
bad map has γ near 0 and is ignored; one that has come to point the wrong way has γ below 0 and is turned round.

Where it comes from: feedback alignment puts fixed random matrices in the place of M and lets the network adapt to them; here M is fitted
to the network. Synthetic gradients learn (6) on the private data while they train; here public inputs suffice, and labels are never used.
Running a layer once more from its input is gradient checkpointing with a segment for each layer.

Dimension key: N tokens of a batch (padding left out), B examples, C classes, D hidden size, K directions, c components,
F = 1 + 2c features.

References:
    Lillicrap et al., 2016, Random synaptic feedback weights support error backpropagation. Nøkland, 2016, arXiv:1609.01596.
    Chen et al., 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
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

QUIET = 1e-3
"""Share of all gradients' energy below which a direction is not worth a map."""

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


def sums_of_texts(values: Float32[np.ndarray, "N w"], batch: Tokens) -> Float32[np.ndarray, "B w"]:
    """Adds up the tokens of each example.

    Args:
        values: One row per token, shape [N, w].
        batch: Which token belongs to which example.

    Returns:
        Sums, shape [B, w].

    Example:
        >>> sums_of_texts(np.ones((3, 1), np.float32), tokens(np.array([[1, 1], [1, 0]]))).tolist()
        [[2.0], [1.0]]
    """
    starts = np.concatenate([[0], np.cumsum(batch.lengths)[:-1]])
    return np.add.reduceat(values, starts, axis=0)


def features(activation: Float32[np.ndarray, "N D"], batch: Tokens, basis: Float32[np.ndarray, "D c"]) -> Float32[np.ndarray, "N F"]:
    """Describes each token by itself and by its sentence, eq. (5).

    Args:
        activation: A layer's output y, shape [N, D].
        batch: Which token belongs to which example.
        basis: Principal components V, shape [D, c].

    Returns:
        φ, shape [N, 1 + 2c].

    Example:
        >>> y = np.array([[2.0], [4.0]], np.float32)
        >>> features(y, tokens(np.ones((1, 2), int)), np.ones((1, 1), np.float32))
        array([[1., 2., 3.],
               [1., 4., 3.]], dtype=float32)
    """
    projected = activation @ basis
    pooled = sums_of_texts(projected, batch) / batch.lengths[:, None].astype(np.float32)
    return np.concatenate([np.ones((len(projected), 1), np.float32), projected, pooled[batch.owner]], axis=1)


def deltas(
    top: Float32[np.ndarray, "N D"],
    described: Float32[np.ndarray, "N F"],
    batch: Tokens,
    directions: Float32[np.ndarray, "K D"],
    maps: Float32[np.ndarray, "K F D"],
) -> Float32[np.ndarray, "N D"]:
    """Predicts the gradient of the loss at a layer's output, eq. (4) and (6).

    Args:
        top: δᴸ, the gradient at the last layer's output, shape [N, D]; not modified.
        described: Features φ of the layer's own output, shape [N, F].
        batch: Which token belongs to which example.
        directions: q, shape [K, D].
        maps: M, shape [K, F, D].

    Returns:
        δ, shape [N, D].

    Example:
        >>> batch, one = tokens(np.ones((1, 2), int)), np.ones((1, 1), np.float32)
        >>> deltas(np.array([[1.0], [2.0]], np.float32), np.ones((2, 1), np.float32), batch, one, one[None])
        array([[2.5],
               [3.5]], dtype=float32)
    """
    along = sums_of_texts(top, batch) @ directions.T
    share = (along / batch.lengths[:, None].astype(np.float32))[batch.owner]
    total = top.copy()
    for direction, one_map in enumerate(maps):
        total += share[:, direction, None] * (described @ one_map)
    return total


def gradient_moments(jacobian: Float32[np.ndarray, "B C D"], probabilities: Float32[np.ndarray, "B C"]) -> Float64[np.ndarray, "D D"]:
    """Says where gradients at the last layer will lie, whatever the labels: Σ_x E_y g gᵀ with y drawn as the model itself would.

    With g = Jᵀ (softmax - onehot_y) this is Σ_x Jᵀ (diag p - p pᵀ) J.

    Args:
        jacobian: J, derivative of each score along a text's hidden states, summed over its tokens, shape [B, C, D].
        probabilities: p, shape [B, C].

    Returns:
        Second moments, shape [D, D].

    Example:
        >>> gradient_moments(np.array([[[1.0], [-1.0]]], np.float32), np.array([[0.5, 0.5]], np.float32))
        array([[1.]])
    """
    weights = probabilities.astype(np.float64)
    weights /= weights.sum(axis=1, keepdims=True)
    wide = jacobian.astype(np.float64)
    # Around the mean, so that what all classes share is gone before anything is squared.
    centred = wide - np.einsum("bc,bcd->bd", weights, wide)[:, None]
    scaled = (np.sqrt(weights)[:, :, None] * centred).reshape(-1, wide.shape[2])
    return scaled.T @ scaled


def main_directions(moments: Float64[np.ndarray, "D D"], most: int) -> Float32[np.ndarray, "K D"]:
    """Chooses the directions q of eq. (4): orthonormal, those first along which gradients are long; quiet ones are left out.

    Args:
        moments: Second moments of gradients, shape [D, D].
        most: K at most, >= 1.

    Returns:
        q, shape [K, D]; none where every gradient is zero.

    Example:
        >>> np.abs(main_directions(np.diag([1.0, 4.0, 0.0]), 3))
        array([[0., 1., 0.],
               [1., 0., 0.]], dtype=float32)
    """
    energies, vectors = np.linalg.eigh(moments)
    is_loud = energies[::-1] > QUIET * max(float(energies.sum()), 1e-30)
    return vectors[:, ::-1].T[is_loud][:most].astype(np.float32)


def token_shares(jacobian: Float32[np.ndarray, "C N D"], batch: Tokens) -> Float32[np.ndarray, "N"]:
    """Says how much of what the readout takes from a text each token gives, a of eq. (7).

    Args:
        jacobian: Derivative of each score at each token's last hidden state, shape [C, N, D].
        batch: Which token belongs to which example.

    Returns:
        a, shape [N]; the shares of an example's tokens add up to 1.

    Example:
        >>> token_shares(np.array([[[3.0], [1.0]]], np.float32), tokens(np.ones((1, 2), int)))
        array([0.75, 0.25], dtype=float32)
    """
    sums = np.stack([sums_of_texts(one, batch) for one in jacobian]).astype(np.float64)
    energy = np.square(sums).sum(axis=(0, 2))
    along = (jacobian.astype(np.float64) * sums[:, batch.owner]).sum(axis=(0, 2))
    even = 1 / batch.lengths[batch.owner]
    return np.where(energy[batch.owner] > 0, along / np.maximum(energy, 1e-300)[batch.owner], even).astype(np.float32)


def principal_components(activation: Float32[np.ndarray, "N D"], count: int) -> Float32[np.ndarray, "D c"]:
    """Finds the basis V of eq. (5), scaled so that features are of the order of 1.

    Args:
        activation: A layer's outputs on public text, shape [N, D].
        count: Components wanted; at most min(N, D) exist.

    Returns:
        V, shape [D, c].

    Example:
        >>> np.abs(principal_components(np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32), 1))[:, 0].round(3)
        array([1.414, 0.   ], dtype=float32)
    """
    centred = activation.astype(np.float64) - activation.mean(axis=0, dtype=np.float64)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    return (vectors[:, : min(count, *activation.shape)] / max(float(centred.std()), 1e-12)).astype(np.float32)


@dataclass(kw_only=True)
class Moments:
    """Running sums from which a layer's maps follow, eq. (7): a cloud never needs to keep an activation.

    Attributes:
        xx: Σ φ φᵀ, shape [F, F].
        xy: Σ φ targetᵀ for each direction, shape [K, F, D].
        yy: Σ |target|².
    """

    xx: Float64[np.ndarray, "F F"]
    xy: Float64[np.ndarray, "K F D"]
    yy: float = field(default=0.0)

    @classmethod
    def zero(cls, num_features: int, num_directions: int, size: int) -> "Moments":
        """Starts the sums."""
        return cls(xx=np.zeros((num_features, num_features)), xy=np.zeros((num_directions, num_features, size)))

    def add(self, described: Float32[np.ndarray, "N F"], targets: Sequence[Float32[np.ndarray, "N D"]]) -> None:
        """Adds a batch: features, and for each direction what eq. (7) wants predicted."""
        self.xx += described.T @ described
        for direction, target in enumerate(targets):
            self.xy[direction] += described.T @ target
            self.yy += float(np.square(target, dtype=np.float64).sum())

    def plus(self, other: "Moments") -> "Moments":
        """Adds sums of other batches."""
        return Moments(xx=self.xx + other.xx, xy=self.xy + other.xy, yy=self.yy + other.yy)

    def beyond(self, maps: Float32[np.ndarray, "K F D"]) -> "Moments":
        """Gives the sums of what maps leave unexplained: a fit to them is what has to be added."""
        held = maps.astype(np.float64)
        return Moments(xx=self.xx, xy=self.xy - self.xx @ held, yy=self.unexplained(held) * self.yy)

    def solve(self, ridge: float) -> Float64[np.ndarray, "K F D"]:
        """Solves eq. (7) for one ridge strength, a share of the mean diagonal of Σ φ φᵀ."""
        damped = self.xx + ridge * max(float(self.xx.diagonal().mean()), 1e-30) * np.eye(len(self.xx))
        return np.linalg.solve(damped[None], self.xy)

    def unexplained(self, maps: Float64[np.ndarray, "K F D"]) -> float:
        """Gives the share of the targets' squares that maps leave, on the data of these sums; 0 is perfect, 1 is no better than nothing."""
        explained = sum(float((2 * xy * one - one * (self.xx @ one)).sum()) for xy, one in zip(self.xy, maps, strict=True))
        return (self.yy - explained) / self.yy if self.yy > 0 else 1.0


def fit(kept: Moments, held_out: Moments) -> tuple[Float32[np.ndarray, "K F D"], float, float]:
    """Fits a layer's maps, eq. (7), with the ridge strength that predicts held-out public examples best.

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
    """Says how much of each block's estimate is true, eq. (8).

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
    """Scales each block of an estimate by its gain, eq. (8); what lies in no block is exact and stays.

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
        Whether directions and bases are chosen anew; otherwise a difference to the maps in use is sent.

    Example:
        >>> [version for version in range(0, 97, 8) if is_whole(version, 8)]
        [0, 8, 64]
    """
    return model_version <= every or model_version % (REFRESHES_PER_WHOLE * every) == 0
