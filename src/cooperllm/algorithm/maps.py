"""Packs feedback maps for the link, and unpacks what arrived with its sizes checked against the receiver's own model.

    values = [ V_1 ... V_m, M_1 ... M_L ]                                   (1)  bases of the different inputs, maps of the layers

Layers that read the same input (query and value of one attention) share a basis.

Dimension key: L adapted layers, K contrasts, C classes, H and D input and output size of a layer, c components, F = 1 + 2c features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.compression import pack_vector, unpack_vector
from cooperllm.errors import DecodeError
from cooperllm.messages import Maps


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMaps:
    """What one adapted layer needs.

    Attributes:
        basis: V, shape [H, c].
        maps: M, shape [K, F, D].
    """

    basis: Float32[np.ndarray, "_H _c"]
    maps: Float32[np.ndarray, "_K _F _D"]


def pack_maps(
    version: int,
    contrasts: Float32[np.ndarray, "K C"],
    basis_of_layer: Sequence[int],
    bases: Sequence[Float32[np.ndarray, "_H c"]],
    maps: Sequence[Float32[np.ndarray, "K F _D"]],
    bits: int,
) -> Maps:
    """Packs fitted maps, eq. (1).

    Args:
        version: Updates in the θ that they were fitted at.
        contrasts: E, shape [K, C].
        basis_of_layer: Position in `bases` for each layer.
        bases: Different bases, each [H, c].
        maps: One array [K, F, D] per layer.
        bits: 4, 8 or 32 bits per value.

    Returns:
        The message.

    Example:
        >>> basis, one_map = np.ones((2, 1), np.float32), np.ones((1, 3, 4), np.float32)
        >>> found = pack_maps(1, np.ones((1, 2), np.float32), [0, 0], [basis], [one_map, one_map], 8)
        >>> [layer.maps.shape for layer in unpack_maps(found, [(2, 4), (2, 4)], 2)]
        [(1, 3, 4), (1, 3, 4)]
    """
    values = np.concatenate([part.reshape(-1) for part in (*bases, *maps)])
    return Maps(
        version=version,
        contrasts=contrasts,
        basis_of_layer=tuple(basis_of_layer),
        num_components=bases[0].shape[1],
        values=pack_vector(values, bits),
    )


def unpack_maps(found: Maps, sizes: Sequence[tuple[int, int]], num_classes: int) -> list[LayerMaps]:
    """Decodes maps that arrived.

    Args:
        found: Maps, possibly damaged or hostile.
        sizes: (H, D) of each adapted layer of the receiver's model.
        num_classes: C of the receiver's model.

    Returns:
        One entry per layer.

    Raises:
        DecodeError: If they do not fit the model.

    Example:
        See `pack_maps`.
    """
    num_contrasts, width, owners = found.contrasts.shape[0], found.num_components, found.basis_of_layer
    if found.contrasts.shape[1] != num_classes or not 1 <= num_contrasts < max(num_classes, 2) or not np.isfinite(found.contrasts).all():
        raise DecodeError(
            f"maps: contrasts of shape {found.contrasts.shape} found, at most {num_classes - 1} of {num_classes} classes expected"
        )
    if len(owners) != len(sizes) or not sizes or sorted(set(owners)) != list(range(len(set(owners)))):
        raise DecodeError(f"maps: bases {owners} found for {len(sizes)} adapted layers")
    inputs: dict[int, int] = {}
    for owner, (input_size, _) in zip(owners, sizes, strict=True):
        if inputs.setdefault(owner, input_size) != input_size:
            raise DecodeError(f"maps: layers of input sizes {inputs[owner]} and {input_size} share a basis")
    if not 1 <= width <= min(inputs.values()):
        raise DecodeError(f"maps: {width} components found, at most {min(inputs.values())} expected")
    shapes = [(inputs[owner], width) for owner in range(len(inputs))] + [(num_contrasts, 1 + 2 * width, size) for _, size in sizes]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
    values = unpack_vector(found.values, ends[-1])
    parts = [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
    return [LayerMaps(basis=parts[owner], maps=one_map) for owner, one_map in zip(owners, parts[len(inputs) :], strict=True)]
