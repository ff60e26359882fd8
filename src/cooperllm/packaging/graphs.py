"""The four computations of a device, as modules that can be traced.

    prefix     token ids, mask -> states entering the first adapted layer                (1)  once per example
    losses     states or token ids, mask, labels, shift, θ [P, n] -> losses [P, B]       (2)  slopes
    observe    the same without labels, θ [n] -> scores, head's input, what the adapted modules were given    (3)  first feedback pass
    pull_back  θ [n], deltas at the modules' outputs, what they were given -> Σ_t δ_tᵀ ∂y_t/∂w                (4)  second feedback pass

(4) is the vector-Jacobian product of each adapted module alone, written down as ordinary operations by tracing it: a device needs no
autograd. What a module is given is whatever the network hands it, so that masks, rotations and the like are computed once, in (3).

Dimension key: P points, B examples, T tokens, H and D size of a module's input and output, C classes, n trainable parameters.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cooperllm.adapted_modules import AdaptedModule
from cooperllm.classifiers import LabelWords
from cooperllm.models import Model
from cooperllm.packaging.points import points_beside
from cooperllm.wrapped_forward import forward_wrapped


class PlainLinear(TorchFunctionMode):
    """Within it, a linear layer is a matrix product and a sum: the fused kernels read sizes into Python, which a trace must keep open."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes over linear layers alone."""
        return (_linear if func is torch.nn.functional.linear else func)(*args, **(kwargs or {}))


class Prefix(nn.Module):
    """The frozen layers, eq. (1)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns states [B, T, H]."""
        prefix, states = self._model.prefix, list[Tensor]()
        assert prefix is not None, "a model without frozen layers has no prefix to trace"

        def entered(_layer: nn.Module, args: Any, kwargs: Any) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        # The pass runs to its end, since a trace cannot be left in the middle; what leads nowhere is dropped from the graph.
        with prefix.stack[prefix.first].register_forward_pre_hook(entered, with_kwargs=True):
            self.network(token_ids, mask)
        return states[0]


class Losses(nn.Module):
    """Every example's loss at every point, eq. (2)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model

    def forward(self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor) -> Tensor:
        """Returns losses [P, B]; `given` is what the prefix makes, or token ids."""
        model, num_points = self._model, theta.shape[0]
        rows, masks = _repeated(given, theta), _repeated(mask, theta)
        with points_beside(self.network, model.layout, theta):
            scores = _scores(model, rows, masks)
        logarithms = torch.log_softmax(scores.reshape(num_points, -1, model.num_classes) + shift, 2)
        return -(logarithms * (labels[:, None] == torch.arange(model.num_classes))).sum(2)


class Observe(nn.Module):
    """A forward pass that hands out what a feedback estimate needs, eq. (3).

    Attributes:
        calls: How each adapted module was called in the newest pass, with places in the list of tensors instead of tensors.
        features: Place of each module's input in that list.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model
        self.calls: list[Any] = []
        self.features: list[int] = []

    def forward(self, given: Tensor, mask: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
        """Returns scores [B, C], the head's input [B, H] where there is a head, and every tensor that an adapted module was given."""
        adapted, seen, pooled = self._model.adapted, list[Tensor](), list[Tensor]()
        self.calls, self.features = [None] * len(adapted.modules), [0] * len(adapted.modules)

        def called(number: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[number] = pytree.tree_map_only(Tensor, partial(_place, seen), (args, kwargs))

        def entered(number: int, _layer: nn.Module, args: Any) -> None:
            self.features[number] = _place(seen, args[0]).place

        with ExitStack() as hooks, adapted.head_watched(pooled.append):
            for number, module in enumerate(adapted.modules):
                parent, layer = self.network.get_submodule(module.name), self.network.get_submodule(module.layer)
                hooks.enter_context(parent.register_forward_pre_hook(partial(called, number), with_kwargs=True))
                hooks.enter_context(layer.register_forward_pre_hook(partial(entered, number)))
            views = self._model.layout.views(theta)
            scores = _scores(self._model, given, mask, partial(torch.func.functional_call, self.network, views))
        return (scores, *pooled, *seen)


class PullBack(nn.Module):
    """The vector-Jacobian product of each adapted module, eq. (4)."""

    def __init__(self, model: Model, observed: Observe) -> None:
        super().__init__()
        self.network, self._model, self._observed = model.network, model, observed

    def forward(self, theta: Tensor, *given: Tensor) -> Tensor:
        """Returns the modules' parts of the gradient, one behind the other; `given` is a delta [B, T, D] per module, then what (3) saw."""
        modules = self._model.adapted.modules
        deltas, seen = given[: len(modules)], given[len(modules) :]
        parts = [
            part
            for module, call, delta in zip(modules, self._observed.calls, deltas, strict=True)
            for part in self._parts(theta, module, pytree.tree_map_only(Place, partial(_taken, seen), call), delta)
        ]
        return torch.cat(parts)

    def _parts(self, theta: Tensor, module: AdaptedModule, call: tuple[Any, Any], delta: Tensor) -> list[Tensor]:
        parent, layout = self.network.get_submodule(module.name), self._model.layout
        spans = {
            name.removeprefix(f"{module.name}."): (start, stop, shape)
            for (name, (start, stop)), shape in zip(layout.ranges.items(), layout.shapes, strict=True)
            if module.start <= start < module.stop
        }

        def output(*tensors: Tensor) -> Tensor:
            result = torch.func.functional_call(parent, dict(zip(spans, tensors, strict=True)), *call)
            return result[0] if isinstance(result, tuple) else result

        pull: Callable[[Tensor], tuple[Tensor, ...]]
        pull = torch.func.vjp(output, *(theta[start:stop].reshape(shape) for start, stop, shape in spans.values()))[1]
        return [part.reshape(-1) for part in pull(delta)]


class Place:
    """Where a tensor stands in a list."""

    def __init__(self, place: int) -> None:
        self.place = place


def _place(seen: list[Tensor], tensor: Tensor) -> Place:
    """Finds a tensor in a list, or puts it there: layers share masks and rotations."""
    for place, other in enumerate(seen):
        if other is tensor:
            return Place(place)
    seen.append(tensor)
    return Place(len(seen) - 1)


def _taken(seen: Sequence[Tensor], place: Place) -> Tensor:
    return seen[place.place]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _repeated(rows: Tensor, theta: Tensor) -> Tensor:
    """The whole batch once for each point."""
    return rows[None].expand(theta.shape[0], *rows.shape).reshape(-1, *rows.shape[1:])


def _scores(model: Model, given: Tensor, mask: Tensor, call: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Class scores from states, or from token ids where nothing is frozen below the first adapted layer."""
    with nullcontext() if model.prefix is None else model.prefix.resumed(given):
        ids = given if model.prefix is None else mask  # of the right shape; what the embedding makes of it is passed over
        return (call((ids, mask)) if call is not None else model.network(ids, mask)).float()


@contextmanager
def only_label_words(network: nn.Module) -> Generator[None]:
    """Within it, a language model scores the words of the classes alone: the rest of the vocabulary would be the widest thing in memory.

    Args:
        network: Any network; one without label words, or with an adapter on its last layer, stays as it is.

    Yields:
        Nothing.
    """
    backbone: Any = network.get_submodule("backbone")
    head: Any = backbone.get_output_embeddings() if isinstance(network, LabelWords) else None
    if not isinstance(network, LabelWords) or type(head) is not nn.Linear:
        yield
        return
    word_ids = network.word_ids
    tensors: list[Tensor | None] = [head.weight, head.bias]
    rows = [tensor[word_ids].detach() for tensor in tensors if tensor is not None]

    def chosen(_own: Callable[..., Any], hidden: Tensor) -> Tensor:
        return _linear(hidden, *rows)

    network.word_ids = torch.arange(len(word_ids))
    try:
        with forward_wrapped(head, chosen):
            yield
    finally:
        network.word_ids = word_ids
