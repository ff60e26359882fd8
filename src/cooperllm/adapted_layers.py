"""The Transformer layers that a feedback estimate differentiates, one at a time, and what is exact above them.

    from the last layer on    ∂f/∂w and δ = ∂f/∂h, h the last layer's output: back-propagation that stops at that layer's input     (1)
    each adapted layer below  Σ_t δ_tᵀ ∂y_t/∂w, y the layer's output, δ predicted: back-propagation that stops at its input         (2)

What happens inside a layer (attention probabilities, keys, rotations, the feed-forward part) is known from its own forward pass, so no map
needs to learn it: a map says how the loss reaches the layer's output. Autograd computes the rest for any architecture and any adapter; a
graph lives as long as its layer's own forward pass and no longer.

Dimension key: B examples, T tokens, H hidden size, n trainable parameters.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cooperllm.frozen_prefix import layer_stack
from cooperllm.wrapped_forward import forward_wrapped

Visit = Callable[[int, Tensor], None]
"""Called with (number of a layer, its output [B, T, H]) in the order of the forward pass."""

HEAD = "classifier."


class _LowestDone(Exception):  # noqa: N818 -- a jump out of the forward pass, not an error
    """Raised when the layers below the last one have had their turn: the rest of the pass is of no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedLayer:
    """A layer below the last one with something trained in it.

    Attributes:
        name: The module inside the network.
        start: First position of its trained parameters in θ.
        stop: Position after the last.
    """

    name: str
    start: int
    stop: int


class AdaptedLayers:
    """The layers of a stack that are trained, in the order of θ.

    Attributes:
        below: Those below the last layer of the stack: they need maps.
        top: Name of the last layer, adapted or not; empty where a network does not keep its layers in one list.
        exact_start: From this position of θ on gradients are exact: the last layer's part, and that of a head.
        width: Hidden size H.
        has_head: Whether a head is trained.
        is_complete: Whether every trained parameter belongs to one of them or to the head, so that an estimate of a gradient exists.
    """

    def __init__(self, network: nn.Module, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._network = network
        backbone: Any = network.get_submodule("backbone")
        self.width = int(backbone.config.hidden_size)
        found = layer_stack(network)
        path, depth = (found[0], len(found[1])) if found else ("", 0)
        self.top = f"{path}.{depth - 1}" if found else ""
        layers = [(f"{path}.{number}", _span(ranges, f"{path}.{number}.")) for number in range(depth - 1)]
        self.below = tuple(AdaptedLayer(name=name, start=span[0], stop=span[1]) for name, span in layers if span)
        self.exact_start = self.below[-1].stop if self.below else 0
        self.has_head = _span(ranges, HEAD) is not None
        others = [name for name in ranges if name.startswith((f"{self.top}.", HEAD) if found else HEAD)]
        seen = sum(stop - start for start, stop in [*((one.start, one.stop) for one in self.below), *(ranges[name] for name in others)])
        in_order = all(ranges[name][0] >= self.exact_start for name in others)
        self.is_complete = bool(found) and in_order and seen == max((stop for _, stop in ranges.values()), default=0)

    def blocks(self, most: int) -> tuple[tuple[int, int], ...]:
        """Divides what needs maps into at most so many runs of neighbouring layers, each of about as many layers."""
        count = min(most, len(self.below))
        edges = [len(self.below) * part // count for part in range(count + 1)] if count else []
        return tuple((self.below[low].start, self.below[high - 1].stop) for low, high in pairwise(edges))

    @contextmanager
    def watched(self, visit: Visit) -> Generator[None]:
        """Within it, forward passes hand over the outputs of the layers below and, under the next number, of the last layer."""
        names = [*(layer.name for layer in self.below), self.top]
        with ExitStack() as hooks:
            for number, name in enumerate(names):
                hooks.enter_context(self._network.get_submodule(name).register_forward_hook(partial(_handed_over, visit, number)))
            yield

    @contextmanager
    def opened_at_top(self, take: Callable[[Tensor], None]) -> Generator[None]:
        """Within it, a forward pass records a graph from the last layer's input on, and hands over that layer's output."""

        def enter(_layer: nn.Module, _args: Any) -> None:
            torch.set_grad_enabled(True)  # until the context below, which turned it off, puts back what was before

        def leave(_layer: nn.Module, _args: Any, result: Any) -> None:
            output = output_of(result)
            take(output if output.requires_grad else output.requires_grad_())

        layer = self._network.get_submodule(self.top)
        entering = layer.register_forward_pre_hook(enter)
        with torch.no_grad(), entering, layer.register_forward_hook(leave):
            yield

    @contextmanager
    def pulled_back(self, theta: Tensor, delta: Callable[[int, Tensor], Tensor], take: Callable[[Tensor], None]) -> Generator[None]:
        """Within it, a forward pass opens a graph inside each layer below the last one and closes it at its output; it ends with these.

        Args:
            theta: The leaf, with gradients on, that the pass is run at, shape [n].
            delta: Gives the loss's gradient [B, T, H] at the output of a layer from (its number, its output).
            take: Gets that layer's part of the gradient, shape [n], 0 outside of it.
        """

        def pull(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                result = forward(*args, **kwargs)
                output = output_of(result)
                (part,) = torch.autograd.grad(output, theta, delta(number, output.detach()))
            take(part)
            if number + 1 == len(self.below):
                raise _LowestDone
            return tuple(map(_detached, result)) if isinstance(result, tuple) else result.detach()

        with suppress(_LowestDone), torch.no_grad(), ExitStack() as changes:
            for number, layer in enumerate(self.below):
                changes.enter_context(forward_wrapped(self._network.get_submodule(layer.name), partial(pull, number)))
            yield


def _span(ranges: Mapping[str, tuple[int, int]], prefix: str) -> tuple[int, int] | None:
    """From the first to after the last position of what begins with a prefix."""
    found = [where for name, where in ranges.items() if name.startswith(prefix)]
    return (min(start for start, _ in found), max(stop for _, stop in found)) if found else None


def _handed_over(visit: Visit, number: int, _layer: nn.Module, _args: Any, result: Any) -> None:
    visit(number, output_of(result))


def output_of(result: Any) -> Tensor:
    """Finds a layer's output in what it returns; some return other things behind it.

    Args:
        result: A tensor, or a tuple that begins with one.

    Returns:
        The tensor.

    Example:
        >>> output_of((torch.ones(1), None))
        tensor([1.])
    """
    return result[0] if isinstance(result, tuple) else result


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
