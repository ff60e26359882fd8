"""Directions that public data suggest.

    U   = orthonormalise([ m, c_1, ..., c_k ])                                  (1)  the span: momentum and decoded columns
    v   = β · ( √(α/n) u + √((1-α)/k) V r ),   u ~ N(0, I_n), r Rademacher      (2)  the paper's guided perturbation

Everything here is elementwise or summed in a fixed order: each replica builds the same span, bit for bit, from the same bytes.

Dimension key: k columns, n trainable parameters.

References:
    Sun et al., 2026, CooperLLM, arXiv:2601.12917, Eq. (8) in the authors' code.
    Maheswaranathan et al., 2018, Guided evolutionary strategies, arXiv:1806.10230, Eq. (3).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from cooperllm.algorithm import noise
from cooperllm.algorithm.noise import Noise, probe_index, probe_indices
from cooperllm.config import Distribution
from cooperllm.messages import Chosen, Probes

POOL_DRAWS = 1 << 59
"""Noise indices from here on draw members of a pool, one index for each group."""

DEPENDENT = 1e-4
"""A column of which less than this share of its length is new adds no direction, only rounding errors."""


def orthonormalise(columns: Iterable[Float32[np.ndarray, "n"]], size: int) -> Float32[np.ndarray, "k n"]:
    """Builds the span from columns, eq. (1), by Gram-Schmidt applied twice.

    Earlier columns keep their direction. Zero, non-finite and dependent columns are left out, so that the rank may be smaller than
    the number of columns given.

    Args:
        columns: Vectors, each of shape [n]; not modified.
        size: n, needed when there are no columns.

    Returns:
        Rows of unit length at right angles to each other, shape [k, n].

    Example:
        >>> orthonormalise([np.array([3.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32)], 2)
        array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    rows: list[np.ndarray] = []
    for column in columns:
        length = math.sqrt(dot(column, column))
        if not 0 < length < math.inf:
            continue
        rest = column / np.float32(length)
        for row in rows + rows:
            rest = rest - np.float32(dot(row, rest)) * row
        new = math.sqrt(dot(rest, rest))
        if new > DEPENDENT:
            rows.append(rest / np.float32(new))
    return np.stack(rows) if rows else np.zeros((0, size), np.float32)


def random_directions(
    seed: int, group: int, probes: Probes, guided: Sequence[np.ndarray], size: int
) -> Iterator[Float32[np.ndarray, "_n"]]:
    """Yields the random directions of one group: what its devices probe, and what the cloud rebuilds.

    Args:
        seed: The round's seed.
        group: Whose directions.
        probes: How many, and whether they are isotropic, blended or mixed from a basis.
        guided: Rows that guided directions are made of, each of shape [n].
        size: n.

    Returns:
        Directions, each of shape [n].

    Example:
        >>> from cooperllm.messages import Grouping
        >>> probes = Probes(measures_columns=False, num_random=2, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0, blend=0.0)
        >>> [float(direction @ direction) for direction in random_directions(7, 0, probes, [np.ones(4, np.float32)], 4)]
        [1.0, 1.0]
    """
    if probes.blend is None:
        return (named.values(size) for named in isotropic(seed, group, probes, guided, size))
    if probes.blend == 0:
        return iter(mixtures(seed, group, probes.num_random, guided))
    span = np.stack(list(guided)) if len(guided) else np.zeros((0, size), np.float32)
    return guided_perturbations(span, seed, probe_indices(group, probes.num_random), group, probes.blend, probes.blend_scale)


def isotropic(seed: int, group: int, probes: Probes, columns: Sequence[np.ndarray], size: int) -> Iterator[Noise]:
    """Yields the names of one group's isotropic random directions.

    Args:
        seed: The round's seed.
        group: Whose directions.
        probes: How many, from where, and of which entries.
        columns: What candidates are chosen by, each of shape [n].
        size: n.

    Returns:
        Names in order.

    Example:
        >>> from cooperllm.messages import Grouping
        >>> probes = Probes(measures_columns=False, num_random=2, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0)
        >>> [named.index for named in isotropic(7, 0, probes, [], 4)]
        [0, 1]
    """
    return probe_noise(seed, group, probes.num_random, probes.distribution, choose(seed, group, probes, columns, size))


def choose(seed: int, group: int, probes: Probes, columns: Sequence[np.ndarray], size: int) -> Chosen | None:
    """Says which isotropic directions a group probes: members of a pool, or for each query the best of its candidates.

    The best candidate z has the largest |<z, u>| of all, u the first column: the largest cosine, but for the length of z, which differs
    by 1/√(2n) between candidates and would spoil `fwdllm`, eq. (2). Candidates are made and dropped one at a time.

    Args:
        seed: The round's seed.
        group: Whose directions.
        probes: The pool, or how many candidates.
        columns: Columns of the span, each of shape [n]; without any there is nothing to choose by.
        size: n.

    Returns:
        The choice, or None for the group's first directions.

    Example:
        >>> from cooperllm.messages import Grouping
        >>> probes = Probes(
        ...     measures_columns=False, num_random=2, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0, num_candidates=3)
        >>> choose(7, 0, probes, [np.ones(4, np.float32)], 4).positions
        (2, 5)
    """
    if probes.pool_seed is not None:
        drawn = noise.bits(seed, POOL_DRAWS | group, probes.num_random, stream=noise.Stream.CHOICE) % np.uint64(probes.pool_size)
        return Chosen(seed=probes.pool_seed, group=0, positions=tuple(drawn.tolist()))
    if probes.num_candidates == 1 or not len(columns):
        return None
    along = columns[0]

    def overlap(position: int) -> float:
        return abs(dot(along, Noise(seed, probe_index(group, position), probes.distribution).values(size)))

    starts = range(0, probes.num_random * probes.num_candidates, probes.num_candidates)
    best = tuple(max(range(start, start + probes.num_candidates), key=overlap) for start in starts)
    return Chosen(seed=seed, group=group, positions=best)


def probe_noise(seed: int, group: int, count: int, distribution: Distribution, chosen: Chosen | None = None) -> Iterator[Noise]:
    """Yields the names of random directions.

    Args:
        seed: The round's seed.
        group: Whose directions.
        count: How many, >= 0.
        distribution: Of their entries.
        chosen: Which ones; None means the group's first ones.

    Yields:
        Names in order.

    Example:
        >>> chosen = Chosen(seed=9, group=0, positions=(5,))
        >>> [(named.seed, named.index) for named in probe_noise(7, 0, 1, Distribution.NORMAL, chosen)]
        [(9, 5)]
    """
    if chosen is None:
        return (Noise(seed, index, distribution) for index in probe_indices(group, count))
    return (Noise(chosen.seed, probe_index(chosen.group, position), distribution) for position in chosen.positions)


def mixtures(seed: int, group: int, count: int, basis: Sequence[np.ndarray]) -> list[Float32[np.ndarray, "_n"]]:
    """Mixes random directions from a basis, z = V r / √K with Rademacher r: one row of the basis is decoded at a time.

    Args:
        seed: The round's seed.
        group: Whose directions.
        count: How many.
        basis: K rows of any length, each of shape [n]; they count as unit vectors.

    Returns:
        Directions, each of shape [n] and, with an orthogonal basis, of length 1.

    Example:
        >>> mixtures(7, 0, 1, [])
        []
    """
    num_rows = len(basis)
    if not num_rows:
        return []
    drawn = [signs(seed, group, position, num_rows) for position in range(count)]
    mixed = [np.zeros_like(basis[0]) for _ in range(count)]
    for position, row in enumerate(basis):
        length = math.sqrt(dot(row, row) * num_rows)
        unit = row / np.float32(length) if length > 0 else row
        for direction, sign in zip(mixed, drawn, strict=True):
            direction += sign[position] * unit
    return mixed


def guided_perturbations(
    span: Float32[np.ndarray, "k n"],
    seed: int,
    indices: Iterable[int],
    sign_index: int,
    blend: float,
    blend_scale: float,
) -> Iterator[Float32[np.ndarray, "n"]]:
    """Yields the paper's perturbations, eq. (2), one at a time.

    Args:
        span: The cloud's unit-norm columns V, shape [k, n]; with no columns the isotropic part stands alone.
        seed: The round's seed.
        indices: One noise index for the isotropic part u of each perturbation.
        sign_index: Noise index of the signs r; perturbation j takes signs j·k ... j·k + k-1.
        blend: α in (0, 1]; 1 is isotropic.
        blend_scale: β > 0.

    Yields:
        Perturbations v, each of shape [n].

    Example:
        >>> [v.shape for v in guided_perturbations(np.eye(1, 4, dtype=np.float32), 7, [0, 1], 0, 0.5, 1.0)]
        [(4,), (4,)]
    """
    num_columns, size = span.shape
    isotropic, guided = blend_weights(num_columns, size, blend, blend_scale)
    for position, index in enumerate(indices):
        perturbation = np.float32(isotropic) * noise.gaussian(seed, index, size)
        for sign, row in zip(signs(seed, sign_index, position, num_columns), span, strict=True):
            perturbation += np.float32(guided) * sign * row
        yield perturbation


def signs(seed: int, sign_index: int, position: int, num_columns: int) -> Float32[np.ndarray, "k"]:
    """Gives the Rademacher signs r of one guided perturbation, eq. (2).

    Args:
        seed: The round's seed.
        sign_index: Noise index of the family of signs.
        position: Which perturbation, from 0.
        num_columns: k.

    Returns:
        Signs, shape [k].

    Example:
        >>> signs(7, 0, 0, 2).shape
        (2,)
    """
    return noise.rademacher(seed, sign_index, (position + 1) * num_columns)[position * num_columns :]


def blend_weights(num_columns: int, size: int, blend: float, blend_scale: float) -> tuple[float, float]:
    """Gives the factors of the isotropic and the guided part in eq. (2).

    Args:
        num_columns: k; without columns nothing is guided.
        size: n >= 1.
        blend: α in (0, 1].
        blend_scale: β > 0.

    Returns:
        (β √(α/n), β √((1-α)/k)).

    Example:
        >>> blend_weights(1, 2, 0.5, 1.0)
        (0.5, 0.7071067811865476)
    """
    guided = math.sqrt((1 - blend) / num_columns) if num_columns else 0.0
    return blend_scale * math.sqrt(blend / size), blend_scale * guided


def dot(left: Float32[np.ndarray, "n"], right: Float32[np.ndarray, "n"]) -> float:
    """Multiplies two vectors: exact products, summed by halving, the same bits on every machine.

    Args:
        left: Shape [n].
        right: Shape [n].

    Returns:
        Σ left · right in double precision.

    Example:
        >>> dot(np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32))
        11.0
    """
    return _sum_by_halving(left.astype(np.float64) * right)


def inside(span: Float32[np.ndarray, "k n"], direction: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "k"]:
    """Gives the coordinates of a vector along orthonormal columns.

    Args:
        span: U, shape [k, n].
        direction: Shape [n].

    Returns:
        Uᵀ direction, shape [k].

    Example:
        >>> inside(np.eye(1, 2, dtype=np.float32), np.array([3.0, 4.0], np.float32))
        array([3.], dtype=float32)
    """
    return np.array([dot(column, direction) for column in span], np.float32)


def digest(*arrays: np.ndarray) -> bytes:
    """Names the exact bits of arrays: replicas compare this instead of their contents.

    Args:
        *arrays: Arrays; shape and bits count.

    Returns:
        16 bytes (BLAKE2b).

    Example:
        >>> digest(np.zeros(2, np.float32)) == digest(-np.zeros(2, np.float32))
        False
    """
    return digest_of(arrays)


def digest_of(arrays: Iterable[np.ndarray]) -> bytes:
    """Names the exact bits of arrays that need not be in memory at once; see `digest`.

    Args:
        arrays: Arrays, read once.

    Returns:
        16 bytes.

    Example:
        >>> digest_of(iter([np.ones(1)])) == digest(np.ones(1))
        True
    """
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        state.update(f"{little.dtype.str}{little.shape}".encode())
        state.update(little.data)
    return state.digest()


def _sum_by_halving(values: Float64[np.ndarray, "n"]) -> float:
    while len(values) > 1:
        half = (len(values) + 1) // 2
        upper = values[half:]
        values = values[:half].copy()
        values[: len(upper)] += upper
    return float(values[0]) if len(values) else 0.0
