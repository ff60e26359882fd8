"""Packs feedback maps for the link, and unpacks what arrived with its sizes checked against the receiver's own model.

    M_l = Σ_s A_lsᵀ B_ls,   A [r, K F],  B [r, D]                           (1)  whole maps, s = 0, and what later fits changed in them
    B_ls = first r eigenvectors of  Σ_k Δ_kᵀ (Σ φ φᵀ) Δ_k,   A = (Δ Bᵀ)ᵀ    (2)  the part of a fit Δ that moves predictions most

The whole maps bring contrasts and bases, differences are to what receivers have decoded and share both, so that errors of the codec never
add up. What one message says of a module is of rank r: a fit is noisy in most of its directions, and few of them matter. Sums run in a
fixed order and element by element: the same bits everywhere.

Dimension key: L adapted modules, K contrasts, C classes, H and D size of a module's input and output, c components, F = 1 + 2c features,
r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float32, Float64

from cooperllm.algorithm.compression import LARGEST, pack_vector, unpack_vector
from cooperllm.errors import DecodeError, ProtocolError
from cooperllm.messages import Maps, Packed

FACTOR_BITS = 8
"""Four bits per factor were seen to cost more than half the rank does: docs/log.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleMaps:
    """What one adapted module needs.

    Attributes:
        basis: V, shape [H, c].
        maps: M, shape [K, F, D].
    """

    basis: Float32[np.ndarray, "_H _c"]
    maps: Float32[np.ndarray, "_K _F _D"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What a fit says of one module.

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


def pack_basis(bases: Sequence[Float32[np.ndarray, "_H c"]], bits: int) -> Packed:
    """Packs the bases of all modules, before anything is fitted on what comes out again.

    Args:
        bases: V of each module.
        bits: 4, 8 or 32 bits per value.

    Returns:
        One packed vector.

    Example:
        >>> packed = pack_basis([np.ones((2, 1), np.float32)], 8)
        >>> unpack_basis(packed, [2], 1)[0].shape
        (2, 1)
    """
    return pack_vector(np.concatenate([basis.reshape(-1) for basis in bases]), bits)


def unpack_basis(packed: Packed, sizes: Sequence[int], width: int) -> list[Float32[np.ndarray, "_H c"]]:
    """Decodes bases.

    Args:
        packed: Output of `pack_basis`, possibly damaged or hostile.
        sizes: H of each module.
        width: Components c.

    Returns:
        V of each module.

    Raises:
        DecodeError: If there are more or fewer values.

    Example:
        See `pack_basis`.
    """
    return _split(packed, [(size, width) for size in sizes])


def pack_factors(fits: Sequence[Fitted], rank: int, bits: int = FACTOR_BITS) -> Packed:
    """Packs what a fit says of all modules, eq. (2).

    Args:
        fits: One per module.
        rank: r >= 1.
        bits: 4, 8 or 32 bits per value.

    Returns:
        One packed vector.

    Example:
        >>> len(pack_factors([Fitted(maps=np.ones((1, 3, 4), np.float32), xx=np.eye(3))], 1).payload)
        25
    """
    return pack_vector(np.concatenate([part.reshape(-1) for fitted in fits for part in factors(fitted, rank)]), bits)


def unpack_maps(held: Sequence[Maps], sizes: Sequence[tuple[int, int]], num_classes: int) -> list[ModuleMaps]:
    """Decodes maps that arrived, eq. (1).

    Args:
        held: Whole maps and the differences since, possibly damaged or hostile; not empty.
        sizes: (H, D) of each adapted module of the receiver's model.
        num_classes: C of the receiver's model.

    Returns:
        One entry per module.

    Raises:
        DecodeError: If they do not fit the model.

    Example:
        >>> bases, fits = [np.ones((2, 1), np.float32)], [Fitted(maps=np.ones((1, 3, 4), np.float32), xx=np.eye(3))]
        >>> whole = Maps(version=1, base_version=-1, contrasts=np.ones((1, 2), np.float32), num_components=1, basis=pack_basis(bases, 8),
        ...              rank=1, factors=pack_factors(fits, 1))
        >>> [module.maps.shape for module in unpack_maps([whole], [(2, 4)], 2)]
        [(1, 3, 4)]
    """
    whole = held[0]
    num_contrasts, width = whole.contrasts.shape[0], whole.num_components
    if whole.contrasts.shape[1] != num_classes or not 1 <= num_contrasts < max(num_classes, 2) or not np.isfinite(whole.contrasts).all():
        raise DecodeError(
            f"maps: contrasts of shape {whole.contrasts.shape} found, at most {num_classes - 1} of {num_classes} classes expected"
        )
    narrowest = min((input_size for input_size, _ in sizes), default=0)
    if not 1 <= width <= narrowest:
        raise DecodeError(f"maps: {width} components found, 1 to {narrowest} expected for {len(sizes)} adapted modules")
    if whole.basis is None:
        raise DecodeError(f"maps: version {whole.version} without a basis found, whole maps expected; ask for them again")
    bases = unpack_basis(whole.basis, [size for size, _ in sizes], width)
    shapes = [(num_contrasts, 1 + 2 * width, output) for _, output in sizes]
    totals = [np.zeros(shape, np.float32) for shape in shapes]
    with np.errstate(over="ignore", invalid="ignore"):
        for maps in held:
            _add(totals, maps)
    if any(not np.abs(total).max() <= LARGEST for total in totals):
        raise DecodeError(f"maps: version {held[-1].version} with an entry above {LARGEST:g} found")
    return [ModuleMaps(basis=basis, maps=total) for basis, total in zip(bases, totals, strict=True)]


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


def _add(totals: Sequence[Float32[np.ndarray, "_K _F _D"]], maps: Maps) -> None:
    """Adds one message's part to the maps of every module, component by component."""
    largest = min(total.shape[2] for total in totals)
    if not 1 <= maps.rank <= largest:
        raise DecodeError(f"maps: rank {maps.rank} found, 1 to {largest} expected")
    shapes = [((maps.rank, total.shape[0] * total.shape[1]), (maps.rank, total.shape[2])) for total in totals]
    parts = _split(maps.factors, list(chain.from_iterable(shapes)))
    for total, left, right in zip(totals, parts[::2], parts[1::2], strict=True):
        for along, component in zip(left, right, strict=True):
            total += (along[:, None] * component).reshape(total.shape)


def _split(packed: Packed, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
    values = unpack_vector(packed, ends[-1])
    return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
