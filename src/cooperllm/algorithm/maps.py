"""Packs feedback maps for the link, and unpacks what arrived with its sizes checked against the receiver's own model.

    values = [ V_1, M_1, ..., V_L, M_L ]                                    (1)  basis and maps of each adapted module

Dimension key: L adapted modules, K contrasts, C classes, H and D size of a module's input and output, c components, F = 1 + 2c features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.compression import pack_vector, unpack_vector
from cooperllm.errors import DecodeError
from cooperllm.messages import Maps


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleMaps:
    """What one adapted module needs.

    Attributes:
        basis: V, shape [H, c].
        maps: M, shape [K, F, D].
    """

    basis: Float32[np.ndarray, "_H _c"]
    maps: Float32[np.ndarray, "_K _F _D"]


def pack_maps(version: int, contrasts: Float32[np.ndarray, "K C"], modules: Sequence[ModuleMaps], bits: int) -> Maps:
    """Packs fitted maps, eq. (1).

    Args:
        version: Updates in the θ that they were fitted at.
        contrasts: E, shape [K, C].
        modules: Basis [H, c] and maps [K, F, D] of each module, at least one, all of the same c.
        bits: 4, 8 or 32 bits per value.

    Returns:
        The message.

    Example:
        >>> one = ModuleMaps(basis=np.ones((2, 1), np.float32), maps=np.ones((1, 3, 4), np.float32))
        >>> found = pack_maps(1, np.ones((1, 2), np.float32), [one, one], 8)
        >>> [module.maps.shape for module in unpack_maps(found, [(2, 4), (2, 4)], 2)]
        [(1, 3, 4), (1, 3, 4)]
    """
    values = np.concatenate([part.reshape(-1) for module in modules for part in (module.basis, module.maps)])
    return Maps(version=version, contrasts=contrasts, num_components=modules[0].basis.shape[1], values=pack_vector(values, bits))


def unpack_maps(found: Maps, sizes: Sequence[tuple[int, int]], num_classes: int) -> list[ModuleMaps]:
    """Decodes maps that arrived.

    Args:
        found: Maps, possibly damaged or hostile.
        sizes: (H, D) of each adapted module of the receiver's model.
        num_classes: C of the receiver's model.

    Returns:
        One entry per module.

    Raises:
        DecodeError: If they do not fit the model.

    Example:
        See `pack_maps`.
    """
    num_contrasts, width = found.contrasts.shape[0], found.num_components
    if found.contrasts.shape[1] != num_classes or not 1 <= num_contrasts < max(num_classes, 2) or not np.isfinite(found.contrasts).all():
        raise DecodeError(
            f"maps: contrasts of shape {found.contrasts.shape} found, at most {num_classes - 1} of {num_classes} classes expected"
        )
    narrowest = min((input_size for input_size, _ in sizes), default=0)
    if not 1 <= width <= narrowest:
        raise DecodeError(f"maps: {width} components found, 1 to {narrowest} expected for {len(sizes)} adapted modules")
    shapes = list(chain.from_iterable(((size, width), (num_contrasts, 1 + 2 * width, output)) for size, output in sizes))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
    values = unpack_vector(found.values, ends[-1])
    parts = [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
    return [ModuleMaps(basis=basis, maps=maps) for basis, maps in zip(parts[::2], parts[1::2], strict=True)]
