"""The five computations of a device, as modules that can be traced.

    prefix     token ids, mask -> states entering the first adapted layer                (1)  once per example
    losses     states or token ids, mask, labels, shift, θ [P, n] -> losses [P, R]       (2)  slopes
    observe    the same with θ [n] -> losses [R], gradients of their sum at the last layer's input and output, Σ ∂losses/∂w from that
               layer on, what the layers below were given and gave                                            (3)  first feedback pass
    pull_back  θ [n], δ at the outputs of the layers below, what they were given -> Σ_t δ_tᵀ ∂y_t/∂w, layer by layer from the last one
               down; δ_k is what is given for a layer, plus c times Σ_t δ_tᵀ ∂y_t/∂x of the layer above        (4)  second feedback pass
    slopes     as (2) with θ [n], directions [P, n] -> losses [R], their derivatives [P, R]                 (5)  slopes in forward mode

With c = 1 and (3)'s gradient for the topmost of these layers, (4) is back-propagation; with c = 0 every δ is somebody's prediction.
Vector-Jacobian products are those of one layer each, written down as ordinary operations by tracing them: a device needs no autograd. What
a layer is given is whatever the network hands it, so that masks, rotations and the like are computed once, in (3).

Labels are classes [B], or for next tokens [R, 2]: tokens, and the places of the states that predict them, row · T + column. Losses are one
for each of them.

Dimension key: P points, B examples, T tokens, H hidden size, C classes or tokens of the vocabulary, R targets (B, or tokens), n trained
parameters.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cooperllm.adapted_layers import AdaptedLayer, Call, output_of, states_of, with_states
from cooperllm.config import Objective
from cooperllm.models import Model
from cooperllm.packaging.points import points_beside
from cooperllm.packaging.tangents import Dual, WithTangents


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
        asked = () if self._model.config.objective is not Objective.NEXT_TOKEN else (torch.zeros(1, dtype=torch.int64),)
        with prefix.stack[prefix.first].register_forward_pre_hook(entered, with_kwargs=True):
            self.network(token_ids, mask, *asked)
        return states[0]


class Losses(nn.Module):
    """Every target's loss at every point, eq. (2)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model

    def forward(self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor) -> Tensor:
        """Returns losses [P, R]; `given` is what the prefix makes, or token ids."""
        model, num_points = self._model, theta.shape[0]
        rows, masks, places = _repeated(given, theta), _repeated(mask, theta), _places(labels)
        if places is not None:  # point by point, each point's behind those of the points before it
            places = (places + mask.shape[0] * mask.shape[1] * torch.arange(num_points)[:, None]).flatten()
        with points_beside(self.network, model.layout, theta):
            scores = _scores(model, rows, masks, places)
        return _losses(scores.reshape(num_points, -1, model.num_classes) + shift, labels)


class PointLosses(nn.Module):
    """Every target's loss at one point, which (5) differentiates."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model

    def forward(self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor) -> Tensor:
        """Returns losses [R]."""
        at_point = partial(torch.func.functional_call, self.network, self._model.layout.views(theta))
        return _losses(_scores(self._model, given, mask, _places(labels), at_point) + shift, labels)


class Slopes(nn.Module):
    """Every target's loss at one point and its derivatives along directions, eq. (5): `losses` is a traced `PointLosses`."""

    def __init__(self, losses: fx.GraphModule) -> None:
        super().__init__()
        self._losses = losses

    def forward(
        self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns losses [R] and derivatives [P, R]."""
        found = WithTangents(self._losses).run(given, mask, labels, shift, Dual(theta, directions))
        return found.value, found.tangents


class Forward(nn.Module):
    """A forward pass that hands out what a feedback estimate needs, as a function of all that lies above the last layer's input.

    Attributes:
        calls: How each layer below the last one was called in the newest pass, with places in the list of tensors instead of tensors.
        outputs: Place of each such layer's output in that list.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self._model = model.network, model
        self.calls: list[Any] = []
        self.outputs: list[int] = []

    def forward(
        self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor, exact: Tensor, push_in: Tensor, push_out: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns losses [R] and every tensor that a layer below was given or gave.

        `exact` stands for θ from the last layer on; `push_in` and `push_out` [B, T, H] are added to the last layer's input and output.
        """
        adapted, seen = self._model.adapted, list[Tensor]()
        self.calls, self.outputs = [None] * len(adapted.below), [0] * len(adapted.below)

        def called(number: int, _layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[number] = pytree.tree_map_only(Tensor, partial(_place, seen), (args, kwargs))

        def left(number: int, output: Tensor) -> None:
            if number < len(adapted.below):
                self.outputs[number] = _place(seen, output).place

        def entered(_layer: nn.Module, args: Any, kwargs: Any) -> Call:
            return with_states((args, kwargs), states_of((args, kwargs)) + push_in)

        def pushed(_layer: nn.Module, _args: Any, result: Any) -> Any:
            return (result[0] + push_out, *result[1:]) if isinstance(result, tuple) else result + push_out

        with ExitStack() as hooks:
            for number, layer in enumerate(adapted.below):
                hook = partial(called, number)
                hooks.enter_context(self.network.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True))
            hooks.enter_context(adapted.watched(left))
            top = self.network.get_submodule(adapted.top)
            hooks.enter_context(top.register_forward_pre_hook(entered, with_kwargs=True))
            hooks.enter_context(top.register_forward_hook(pushed))
            layout, start = self._model.layout, adapted.exact_start
            # Layers below must not look as if they depended on `exact`, or its derivative would run through all of them.
            fixed, moving = layout.views(theta), layout.views(torch.cat([theta[:start], exact]))
            views = {name: (moving if first >= start else fixed)[name] for name, (first, _) in layout.ranges.items()}
            scores = _scores(self._model, given, mask, _places(labels), partial(torch.func.functional_call, self.network, views))
        return (_losses(scores + shift, labels), *seen)


class Observe(nn.Module):
    """The first feedback pass, eq. (3): `forward` is a traced `Forward`, which is differentiated from the last layer on."""

    def __init__(self, forward: nn.Module, exact_start: int, width: int) -> None:
        super().__init__()
        self._forward, self._exact_start, self._width = forward, exact_start, width

    def forward(self, given: Tensor, mask: Tensor, labels: Tensor, shift: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
        """Returns losses [R]; gradients of their sum at the last layer's input and output, and in θ from it on; and what is seen."""

        def total(exact: Tensor, push_in: Tensor, push_out: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            found = self._forward(given, mask, labels, shift, theta, exact, push_in, push_out)
            return found[0].sum(), found

        nothing = torch.zeros(*mask.shape, self._width)
        differentiated: Any = torch.func.vjp(total, theta[self._exact_start :], nothing, nothing, has_aux=True)
        _, pull, found = differentiated
        exact, at_input, at_output = pull(torch.ones(()))
        return (found[0], at_input, at_output, exact, *found[1:])


class PullBack(nn.Module):
    """The vector-Jacobian product of each adapted layer below the last one, eq. (4)."""

    def __init__(self, model: Model, observed: Forward) -> None:
        super().__init__()
        self.network, self._model, self._observed = model.network, model, observed

    def forward(self, theta: Tensor, carried: Tensor, *given: Tensor) -> Tensor:
        """Returns the layers' parts of the gradient, one behind the other; `given` is a δ [B, T, H] per layer, then what (3) saw."""
        layers = self._model.adapted.below
        deltas, seen = given[: len(layers)], given[len(layers) :]
        parts, passed = list[Tensor](), None
        for layer, call, delta in reversed(list(zip(layers, self._observed.calls, deltas, strict=True))):
            whole = delta if passed is None else delta + carried * passed
            part, passed = self._pulled(theta, layer, pytree.tree_map_only(Place, partial(_taken, seen), call), whole)
            parts.append(part)
        return torch.cat(parts[::-1])

    def _pulled(self, theta: Tensor, layer: AdaptedLayer, call: Call, delta: Tensor) -> tuple[Tensor, Tensor]:
        module, adapted = self.network.get_submodule(layer.name), self._model.adapted

        def output(part: Tensor, states: Tensor) -> Tensor:
            args, kwargs = with_states(call, states)
            return output_of(torch.func.functional_call(module, adapted.tensors(layer, part), args, kwargs))

        # Waits for the layer above: a runtime that orders by need alone would run all layers first, and hold what each one made.
        states = states_of(call) + 0 * delta[:1, :1, :1]
        differentiated: Any = torch.func.vjp(output, theta[layer.start : layer.stop], states)
        return differentiated[1](delta)


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


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each target, scores [..., R, C]: a sum over classes, since picking one would read labels as places."""
    wanted = labels if _places(labels) is None else labels[:, 0]
    return -(torch.log_softmax(scores, -1) * (wanted[:, None] == torch.arange(scores.shape[-1]))).sum(-1)


def _places(labels: Tensor) -> Tensor | None:
    """Where the states stand that predict tokens; classes have no such places."""
    return None if labels.dim() == 1 else labels[:, 1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _repeated(rows: Tensor, theta: Tensor) -> Tensor:
    """The whole batch once for each point."""
    return rows[None].expand(theta.shape[0], *rows.shape).reshape(-1, *rows.shape[1:])


def _scores(model: Model, given: Tensor, mask: Tensor, places: Tensor | None, call: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Scores from states, or from token ids where nothing is frozen below the first adapted layer."""
    with nullcontext() if model.prefix is None else model.prefix.resumed(given):
        ids = given if model.prefix is None else mask  # of the right shape; what the embedding makes of it is passed over
        asked = (ids, mask) if places is None else (ids, mask, places)
        return (call(asked) if call is not None else model.network(*asked)).float()
