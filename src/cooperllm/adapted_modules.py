"""The modules that a feedback estimate differentiates: each parent of adapted layers (an attention), and the linear head.

What happens inside such a module is known from its own forward pass (attention probabilities, keys, rotations), so no map needs to learn
it: a map says how the loss reaches the module's output, and the rest is a vector-Jacobian product of that module alone. Autograd computes
it for any architecture and any adapter; the graph lives as long as the module's own forward pass and no longer.

Dimension key: B examples, T tokens, H and D size of a module's input and output, n trainable parameters.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cooperllm.wrapped_forward import forward_wrapped

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with (number of the module, its input [B, T, H], its output [B, T, D]) in the order of the forward pass."""

HEAD = "classifier"
ADAPTERS = (".lora_", ".ia3_")
"""What PEFT calls the parameters that it puts below an adapted layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedModule:
    """The parent of adapted layers.

    Attributes:
        name: The module inside the network.
        layer: One of its adapted layers, whose input counts as the module's.
        start: First position of its trained parameters in θ.
        stop: Position after the last.
    """

    name: str
    layer: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The linear layer that makes class scores.

    Attributes:
        weight: Range of its weight [C, H] in θ.
        bias: Range of its bias [C] in θ.
    """

    weight: tuple[int, int]
    bias: tuple[int, int]


class AdaptedModules:
    """Parents of adapted layers in the order of θ, and the head where it is trained.

    Attributes:
        modules: The parents.
        head: The head, or None.
        is_complete: Whether every trained parameter belongs to one of them.
    """

    def __init__(self, network: nn.Module, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._network = network
        self.modules = _parents(ranges)
        weight, bias = ranges.get(f"{HEAD}.weight"), ranges.get(f"{HEAD}.bias")
        self.head = Head(weight=weight, bias=bias) if weight and bias else None
        seen = sum(module.stop - module.start for module in self.modules)
        seen += sum(stop - start for start, stop in (self.head.weight, self.head.bias)) if self.head else 0
        self.is_complete = bool(self.modules) and seen == max((stop for _, stop in ranges.values()), default=0)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, D) of each module."""
        return self._seen_sizes

    @cached_property
    def _seen_sizes(self) -> tuple[tuple[int, int], ...]:
        """Seen in a forward pass over two tokens."""
        found: dict[int, tuple[int, int]] = {}
        with torch.no_grad(), self.watched(lambda number, given, output: found.update({number: (given.shape[-1], output.shape[-1])})):
            self._network(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
        return tuple(found[number] for number in range(len(self.modules)))

    def blocks(self, most: int) -> tuple[tuple[int, int], ...]:
        """Divides the adapters' part of θ into at most so many runs of neighbouring modules, each of about as many modules."""
        count = min(most, len(self.modules))
        edges = [len(self.modules) * part // count for part in range(count + 1)] if count else []
        return tuple((self.modules[low].start, self.modules[high - 1].stop) for low, high in pairwise(edges))

    @contextmanager
    def watched(self, visit: Visit) -> Generator[None]:
        """Within it, forward passes hand over the modules' inputs and outputs."""
        with ExitStack() as hooks:
            for number, module in enumerate(self.modules):
                given = hooks.enter_context(self._input_of(module))
                hook = _handing_over(visit, number, given)
                hooks.enter_context(self._network.get_submodule(module.name).register_forward_hook(hook))
            yield

    @contextmanager
    def pulled_back(self, theta: Tensor, delta: Callable[[int, Tensor, Tensor], Tensor], take: Callable[[Tensor], None]) -> Generator[None]:
        """Within it, a forward pass without gradients opens a graph inside each module alone and closes it at the module's output.

        Args:
            theta: The leaf, with gradients on, that the pass is run at, shape [n].
            delta: Gives the loss's gradient [B, T, D] at the output of a module from (its number, its input, its output).
            take: Gets that module's part of the gradient, shape [n], 0 outside of it.
        """

        def pull(number: int, given: list[Tensor], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                result = forward(*args, **kwargs)
                output = _first(result)
                (part,) = torch.autograd.grad(output, theta, delta(number, given.pop(), output.detach()))
            take(part)
            return tuple(map(_detached, result)) if isinstance(result, tuple) else result.detach()

        with ExitStack() as changes:
            for number, module in enumerate(self.modules):
                given = changes.enter_context(self._input_of(module))
                changes.enter_context(forward_wrapped(self._network.get_submodule(module.name), partial(pull, number, given)))
            yield

    @contextmanager
    def head_watched(self, visit: Callable[[Tensor], None]) -> Generator[None]:
        """Within it, forward passes hand over the head's input [B, H]; nothing happens without a head."""
        if self.head is None:
            yield
            return
        with self._network.get_submodule(HEAD).register_forward_hook(lambda _module, args, _output: visit(args[0])):
            yield

    @contextmanager
    def _input_of(self, module: AdaptedModule) -> Generator[list[Tensor]]:
        """A list whose last entry is the module's newest input."""
        given: list[Tensor] = []
        layer = self._network.get_submodule(module.layer)
        with layer.register_forward_pre_hook(lambda _layer, args: given.append(args[0].detach())):
            yield given


def _parents(ranges: Mapping[str, tuple[int, int]]) -> tuple[AdaptedModule, ...]:
    """Outermost parents of adapted layers: one inside another is part of it."""
    layers = {name: name[: name.index(mark)] for name in ranges for mark in ADAPTERS if mark in name}
    every = {layer.rpartition(".")[0] for layer in layers.values()}
    outermost = [parent for parent in every if not any(parent.startswith(f"{other}.") for other in every)]
    found: list[AdaptedModule] = []
    for parent in outermost:
        names = [name for name in layers if name.startswith(f"{parent}.")]
        start, stop = min(ranges[name][0] for name in names), max(ranges[name][1] for name in names)
        found.append(AdaptedModule(name=parent, layer=layers[names[0]], start=start, stop=stop))
    return tuple(sorted(found, key=lambda module: module.start))


def _handing_over(visit: Visit, number: int, given: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, result: Any) -> None:
        visit(number, given.pop(), _first(result))

    return hook


def _first(result: Any) -> Tensor:
    """A module's output; attentions return their probabilities behind it."""
    return result[0] if isinstance(result, tuple) else result


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
