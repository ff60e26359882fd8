"""The layers that a feedback estimate needs to see: low-rank adapters, and the linear head.

A hook on each of them hands over its input while a forward pass goes by, so that a device keeps nothing but one layer's activation; with
gradients on, the cloud cuts the graph at their outputs and asks for exact Jacobians.

Dimension key: B examples, T tokens, H and D input and output size, r rank.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with (number of the layer, its input [B, T, H], its output [B, T, D]) in the order of the forward pass."""

HEAD = "classifier"


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankLayer:
    """One adapted layer y = W x + s B A x.

    Attributes:
        name: The layer inside the network.
        first: Range of A in θ.
        second: Range of B in θ.
        rank: r.
        input_size: H.
        output_size: D.
        scale: s.
    """

    name: str
    first: tuple[int, int]
    second: tuple[int, int]
    rank: int
    input_size: int
    output_size: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The linear layer that makes class scores.

    Attributes:
        weight: Range of its weight [C, H] in θ.
        bias: Range of its bias [C] in θ.
    """

    weight: tuple[int, int]
    bias: tuple[int, int]


class AdaptedLayers:
    """Low-rank layers of a network in the order of θ, and its head where it is trained.

    Attributes:
        layers: The layers.
        head: The head, or None.
        is_complete: Whether every trained parameter belongs to one of them.
    """

    def __init__(self, network: nn.Module, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._network = network
        paths = [name.removesuffix(".lora_A.default.weight") for name in ranges if name.endswith(".lora_A.default.weight")]
        self.layers = tuple(self._layer(path, ranges) for path in paths)
        weight, bias = ranges.get(f"{HEAD}.weight"), ranges.get(f"{HEAD}.bias")
        self.head = Head(weight=weight, bias=bias) if weight and bias else None
        self.is_complete = len(ranges) == 2 * len(self.layers) + 2 * (self.head is not None)

    def blocks(self, most: int) -> tuple[tuple[int, int], ...]:
        """Divides the low-rank part of θ into at most so many runs of neighbouring layers, each of about as many layers.

        Layers of one parent (query and value of the same attention) are not taken apart.
        """
        parents: dict[str, list[LowRankLayer]] = {}
        for layer in self.layers:
            parents.setdefault(layer.name.rpartition(".")[0], []).append(layer)
        groups = list(parents.values())
        count = min(most, len(groups))
        edges = [len(groups) * part // count for part in range(count + 1)] if count else []
        return tuple((groups[low][0].first[0], groups[high - 1][-1].second[1]) for low, high in pairwise(edges))

    @contextmanager
    def watched(self, visit: Visit, visit_head: Callable[[Tensor], None] | None = None) -> Generator[None]:
        """Within it, forward passes hand over the layers' inputs and outputs, and the head's input [B, H]."""
        handles = [
            self._network.get_submodule(layer.name).register_forward_hook(_hook(visit, number)) for number, layer in enumerate(self.layers)
        ]
        if visit_head is not None and self.head is not None:
            handles.append(self._network.get_submodule(HEAD).register_forward_hook(lambda _module, args, _output: visit_head(args[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer(self, path: str, ranges: Mapping[str, tuple[int, int]]) -> LowRankLayer:
        module: Any = self._network.get_submodule(path)
        return LowRankLayer(
            name=path,
            first=ranges[f"{path}.lora_A.default.weight"],
            second=ranges[f"{path}.lora_B.default.weight"],
            rank=int(module.r["default"]),
            input_size=int(module.in_features),
            output_size=int(module.out_features),
            scale=float(module.scaling["default"]),
        )


def _hook(visit: Visit, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        visit(number, args[0], output)

    return hook
