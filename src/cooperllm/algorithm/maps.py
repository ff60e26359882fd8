"""Packs feedback maps for the link, and unpacks what arrived with its sizes checked against the receiver's own model.

    M_l = Σ_s A_lsᵀ B_ls,   A [r, K F],  B [r, D]                           (1)  whole maps, s = 0, and what later fits changed in them
    B_ls = first r eigenvectors of  Σ_k Δ_kᵀ (Σ φ φᵀ) Δ_k,   A = (Δ Bᵀ)ᵀ    (2)  the part of a fit Δ that moves predictions most

The whole maps bring directions and bases, differences are to what receivers have decoded and share both, so that errors of the codec never
add up. What one message says of a layer is of rank r: a fit is noisy in most of its directions, and few of them matter. Sums run in a
fixed order and element by element: the same bits everywhere.

Dimension key: L mapped layers, K directions, D hidden size, c components, F = 1 + 2c features, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from cooperllm.algorithm.compression import LARGEST, pack_vector, unpack_vector
from cooperllm.config import MOST_MAP_COMPONENTS
from cooperllm.errors import DecodeError, ProtocolError
from cooperllm.messages import Maps

MOST_DIRECTIONS = 16
"""A receiver's bound: with it and that on components decoded maps take at most 4112 D values a layer, whatever a message says."""

FACTOR_BITS = 8
"""Four bits per factor were seen to cost more than half the rank does: docs/log.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMaps:
    """What one layer needs.

    Attributes:
        basis: V, shape [D, c].
        maps: M, shape [K, F, D].
    """

    basis: Float32[np.ndarray, "_D _c"]
    maps: Float32[np.ndarray, "_K _F _D"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedMaps:
    """Maps as everybody uses them.

    Attributes:
        version: Updates in the θ that they were last fitted at.
        directions: q, shape [K, D].
        layers: One entry per mapped layer.
    """

    version: int
    directions: Float32[np.ndarray, "_K _D"]
    layers: tuple[LayerMaps, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What a fit says of one layer.

    Attributes:
        maps: M or what is to be added to it, shape [K, F, D].
        xx: Σ φ φᵀ over the texts it was fitted on, shape [F, F].
    """

    maps: Float32[np.ndarray, "_K _F _D"]
    xx: Float64[np.ndarray, "_F _F"]


def factors(fitted: Fitted, rank: int) -> tuple[Float32[np.ndarray, "r _KF"], Float32[np.ndarray, "r _D"]]:
    """Cuts a fit to the outputs that its predictions move most, eq. (2).

    Args:
        fitted: Maps and the features' moments.
        rank: r >= 1.

    Returns:
        (A [r, K F], B [r, D]), r at most D.

    Example:
        >>> one = Fitted(maps=np.array([[[3.0, 0.0]]], np.float32), xx=np.ones((1, 1)))
        >>> [np.abs(part).tolist() for part in factors(one, 1)]
        [[[3.0]], [[1.0, 0.0]]]
    """
    wide = fitted.maps.astype(np.float64)
    moved = sum(one.T @ fitted.xx @ one for one in wide)
    right = np.linalg.eigh(moved)[1][:, ::-1][:, :rank].T
    return (right @ wide.reshape(-1, wide.shape[2]).T).astype(np.float32), right.astype(np.float32)


def pack_rows(rows: Sequence[Float32[np.ndarray, "_rows _columns"]], bits: int) -> bytes:
    """Packs directions, or the bases of all layers, before anything is fitted on what comes out again.

    Args:
        rows: Matrices of any shapes, at least one.
        bits: 1, 2, 4, 8 or 32 bits per value.

    Returns:
        One packed vector.

    Example:
        >>> [part.shape for part in unpack_rows(pack_rows([np.ones((2, 1), np.float32)], 8), [(2, 1)])]
        [(2, 1)]
    """
    return pack_vector(np.concatenate([matrix.reshape(-1) for matrix in rows]), bits)


def unpack_rows(packed: bytes, shapes: Sequence[tuple[int, int]]) -> list[Float32[np.ndarray, "_rows _columns"]]:
    """Decodes matrices.

    Args:
        packed: Output of `pack_rows` or `pack_factors`, possibly damaged or hostile.
        shapes: What is expected.

    Returns:
        The matrices.

    Raises:
        DecodeError: If there are more or fewer values.

    Example:
        See `pack_rows`.
    """
    ends = np.cumsum([rows * columns for rows, columns in shapes]).tolist()
    values = unpack_vector(packed, ends[-1])
    return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]


def pack_factors(fits: Sequence[Fitted], rank: int, bits: int = FACTOR_BITS) -> bytes:
    """Packs what a fit says of all layers, eq. (2).

    Args:
        fits: One per layer.
        rank: r >= 1.
        bits: 1, 2, 4, 8 or 32 bits per value.

    Returns:
        One packed vector.

    Example:
        >>> len(pack_factors([Fitted(maps=np.ones((1, 3, 4), np.float32), xx=np.eye(3))], 1))
        37
    """
    return pack_rows([part for fitted in fits for part in factors(fitted, rank)], bits)


def unpack_maps(held: Sequence[Maps], num_layers: int, width: int) -> DecodedMaps:
    """Decodes maps that arrived, eq. (1).

    Args:
        held: Whole maps and the differences since, possibly damaged or hostile; not empty.
        num_layers: L of the receiver's model.
        width: D of the receiver's model.

    Returns:
        The maps.

    Raises:
        DecodeError: If they do not fit the model.

    Example:
        >>> rows, fits = [np.ones((4, 1), np.float32)], [Fitted(maps=np.ones((1, 3, 4), np.float32), xx=np.eye(3))]
        >>> whole = Maps(version=1, base_version=-1, num_directions=1, directions=pack_rows([np.eye(1, 4, dtype=np.float32)], 8),
        ...              num_components=1, basis=pack_rows(rows, 8), rank=1, factors=pack_factors(fits, 1))
        >>> [layer.maps.shape for layer in unpack_maps([whole], 1, 4).layers]
        [(1, 3, 4)]
    """
    whole = held[0]
    if whole.directions is None or whole.basis is None:
        raise DecodeError(f"maps: version {whole.version} without a basis found, whole maps expected; ask for them again")
    num_directions, num_components = whole.num_directions, whole.num_components
    if num_layers < 1:
        raise DecodeError(f"maps: version {whole.version} found, none expected: no adapted layer lies below the last one")
    for name, found, most in (("directions", num_directions, MOST_DIRECTIONS), ("components", num_components, MOST_MAP_COMPONENTS)):
        if not 1 <= found <= min(width, most):
            raise DecodeError(f"maps: {found} {name} found, 1 to {min(width, most)} expected")
    (directions,) = unpack_rows(whole.directions, [(num_directions, width)])
    bases = unpack_rows(whole.basis, [(width, num_components)] * num_layers)
    shape = (num_directions, 1 + 2 * num_components, width)
    parts = [_factors(maps, num_layers, shape) for maps in held]
    with np.errstate(over="ignore", invalid="ignore"):
        totals = [_added_up(of_layer, shape) for of_layer in zip(*parts, strict=True)]
    if any(not np.abs(total).max() <= LARGEST for total in totals):
        raise DecodeError(f"maps: version {held[-1].version} with an entry above {LARGEST:g} found")
    layers = tuple(LayerMaps(basis=basis, maps=total) for basis, total in zip(bases, totals, strict=True))
    return DecodedMaps(version=held[-1].version, directions=directions, layers=layers)


def joined(held: Sequence[Maps], arrived: Sequence[Maps]) -> tuple[Maps, ...]:
    """Puts maps that arrived behind those that a receiver has.

    Args:
        held: Whole maps and differences, or nothing.
        arrived: Whole maps or differences, in the order in which they were made.

    Returns:
        Whole maps and differences up to the last that arrived. What is held beyond the base of a difference comes again.

    Raises:
        ProtocolError: If a difference is to maps that the receiver does not have.

    Example:
        >>> joined((), [])
        ()
    """
    found = tuple(held)
    for maps in arrived:
        known = [one.version for one in found]
        if maps.base_version == -1:
            found = (maps,)
        elif maps.base_version in known and maps.base_version < maps.version:
            found = (*found[: known.index(maps.base_version) + 1], maps)
        else:
            raise ProtocolError(
                f"maps: version {maps.version} as a difference to version {maps.base_version} found, one to any of {known} or whole maps "
                "expected; ask for the whole maps and all differences since"
            )
    return found


def missing(held: Sequence[Maps], version: int) -> tuple[Maps, ...]:
    """Says what a receiver of some version lacks.

    Args:
        held: Whole maps and the differences since.
        version: The receiver's last, or any other number where it has none.

    Returns:
        The differences after that version; everything where it is none of these.

    Example:
        >>> missing((), 3)
        ()
    """
    known = [one.version for one in held]
    return tuple(held[known.index(version) + 1 :] if version in known else held)


def _factors(maps: Maps, num_layers: int, shape: tuple[int, int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """One message's A and B for each layer, read before anything of the size of maps is allocated."""
    num_directions, num_features, width = shape
    if not 1 <= maps.rank <= width:
        raise DecodeError(f"maps: rank {maps.rank} found, 1 to {width} expected")
    matrices = unpack_rows(maps.factors, [(maps.rank, num_directions * num_features), (maps.rank, width)] * num_layers)
    return list(zip(matrices[::2], matrices[1::2], strict=True))


def _added_up(factors: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int, int]) -> Float32[np.ndarray, "_K _F _D"]:
    """One layer's maps from the factors of all messages, component by component, eq. (1)."""
    total = np.zeros(shape, np.float32)
    for left, right in factors:
        for along, component in zip(left, right, strict=True):
            total += (along[:, None] * component).reshape(shape)
    return total
