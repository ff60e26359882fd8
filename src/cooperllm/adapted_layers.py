"""The Transformer layers that a feedback estimate differentiates, one at a time, from the last one down.

    last layer and above      ∂f/∂w, ∂f/∂h and ∂f/∂x: h its output, x its input; back-propagation that stops at that input          (1)
    each adapted layer below  Σ_t δ_tᵀ ∂y_t/∂w and Σ_t δ_tᵀ ∂y_t/∂x, y the layer's output, x its input                         (2)

With δ = ∂f/∂x of the layer above, (2) is back-propagation itself; a guide may give another δ. A graph lives as long as its own layer is at
hand and no longer: what stays between the forward pass and a layer's turn is what the layer was given.

Dimension key: B examples, T tokens, H hidden size, n trainable parameters.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cooperllm.frozen_prefix import layer_stack

Visit = Callable[[int, Tensor], None]
"""Called with (number of a layer, its output [B, T, H]) in the order of the forward pass."""

HEAD = "classifier."


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is given: the states that enter it [B, T, H] first or by name, masks, rotations and the like."""

STATES = "hidden_states"


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
        self._network, self._ranges = network, ranges
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
        numbers = [number for number, (_, span) in enumerate(layers) if span]
        is_run = numbers == list(range(depth - 1 - len(numbers), depth - 1))
        in_order = is_run and all(ranges[name][0] >= self.exact_start for name in others)
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
    def opened_at_top(self, ends: list[Tensor]) -> Generator[list[Call]]:
        """Within it, a forward pass records a graph from the last layer's input on.

        Args:
            ends: The pass adds the last layer's input and then its output, both differentiable.

        Yields:
            What each layer below the last one is given, filled by the pass.
        """
        calls = list[Call]()

        def given(_layer: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))

        def enter(_layer: nn.Module, args: Any, kwargs: Any) -> Call:
            torch.set_grad_enabled(True)  # until the context below, which turned it off, puts back what was before
            ends.append(states_of((args, kwargs)).detach().requires_grad_())
            return with_states((args, kwargs), ends[-1])

        def leave(_layer: nn.Module, _args: Any, result: Any) -> None:
            ends.append(output_of(result))

        layer = self._network.get_submodule(self.top)
        with torch.no_grad(), ExitStack() as hooks:
            for below in self.below:
                module = self._network.get_submodule(below.name)
                hooks.enter_context(module.register_forward_pre_hook(given, with_kwargs=True))
            hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(leave))
            yield calls

    def pulled_back(self, theta: Tensor, layer: AdaptedLayer, call: Call, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a layer once more and differentiates it, eq. (2).

        Args:
            theta: θ, shape [n].
            layer: One of those below.
            call: What it was given.
            delta: The loss's gradient at its output, shape [B, T, H].

        Returns:
            (its part of the gradient [stop - start]; the loss's gradient at its input [B, T, H]).
        """
        module = self._network.get_submodule(layer.name)
        point = theta[layer.start : layer.stop].detach().requires_grad_()
        states = states_of(call).detach().requires_grad_()
        args, kwargs = with_states(call, states)
        with torch.enable_grad():
            output = output_of(torch.func.functional_call(module, self.tensors(layer, point), args, kwargs))
        part, passed = torch.autograd.grad(output, [point, states], delta)
        return part, passed

    def given(self, call: Call) -> Tensor:
        """The states that a layer was given, shape [B, T, H]."""
        return states_of(call)

    def tensors(self, layer: AdaptedLayer, part: Tensor) -> dict[str, Tensor]:
        """Names a layer's part of θ as the layer itself does.

        Args:
            layer: One of those below.
            part: Its part of θ, shape [stop - start].

        Returns:
            Views by name.
        """
        module = self._network.get_submodule(layer.name)
        inside = {
            name.removeprefix(f"{layer.name}."): (start - layer.start, stop - layer.start)
            for name, (start, stop) in self._ranges.items()
            if name.startswith(f"{layer.name}.")
        }
        return {name: part[start:stop].view(module.get_parameter(name).shape) for name, (start, stop) in inside.items()}


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


def states_of(call: Call) -> Tensor:
    """Finds the states that enter a layer.

    Args:
        call: What the layer is given.

    Returns:
        States, shape [B, T, H].

    Example:
        >>> states_of(((), {"hidden_states": torch.ones(1)}))
        tensor([1.])
    """
    args, kwargs = call
    return args[0] if args else kwargs[STATES]


def with_states(call: Call, states: Tensor) -> Call:
    """Gives a layer other states.

    Args:
        call: What the layer is given; not modified.
        states: What is to enter it.

    Returns:
        The same with these states.

    Example:
        >>> with_states((("states", "mask"), {}), torch.ones(1))
        ((tensor([1.]), 'mask'), {})
    """
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {STATES: states})
