"""From traced modules to ONNX graphs whose sizes P, B and T stay open."""

import logging
import warnings
from collections.abc import Generator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.batches import Batch
from cooperllm.device.manifest import LOSSES, OBSERVE, PREFIX, PULL_BACK, SLOPES
from cooperllm.errors import ConfigError
from cooperllm.models import Model
from cooperllm.packaging.graphs import Forward, Losses, Observe, PlainLinear, PointLosses, Prefix, PullBack, Slopes
from cooperllm.packaging.tangents import MissingRuleError

OPSET = 20
"""Version of the operators; onnxruntime knows it from 1.18 on."""

BACKWARD: dict[Any, Any] = {operator: rule for operator, rule in core_aten_decompositions().items() if "backward" in operator.name()}
"""Derivatives of activations and norms in terms of ordinary operations: the exporter knows few of them itself."""


def graphs_of(model: Model, theta: Tensor, batch: Batch, *, has_forward_mode: bool = False) -> tuple[dict[str, onnx.ModelProto], list[int]]:
    """Traces everything that a device computes.

    Args:
        model: A model.
        theta: Any θ, shape [n].
        batch: Any examples.
        has_forward_mode: Whether to write slopes in forward mode, too: a third of the time that all takes.

    Returns:
        (graphs by name; for each layer that needs maps the place of its output among the tensors that `observe` hands out).

    Raises:
        ConfigError: If the model cannot be traced, lacks the forward mode asked for, or trains something that a package does not know.
    """
    batch = _with_open_sizes(batch, {model.num_classes, model.layout.size, model.adapted.width})
    dynamic, either = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    rows, examples, point = {0: dynamic, 1: dynamic}, {0: dynamic}, torch.stack([theta, theta])
    given = batch.token_ids if batch.states is None else batch.states
    is_next_token = batch.places is not None
    shift, watched = torch.zeros(1 if is_next_token else model.num_classes), Forward(model)
    labels = torch.stack([batch.labels, batch.places], 1) if batch.places is not None else batch.labels
    graphs: dict[str, onnx.ModelProto] = {}
    with _tracing(model):
        if model.prefix is not None:
            graphs[PREFIX] = _onnx(Prefix(model), (batch.token_ids, batch.mask), (rows, rows), ["token_ids", "mask"], ["states"])
        graphs[LOSSES] = _onnx(
            Losses(model),
            (given, batch.mask, labels, shift, point),
            (rows, rows, examples, None, {0: dynamic}),
            ["given", "mask", "labels", "shift", "theta"],
            ["losses"],
        )
        if has_forward_mode:
            graphs[SLOPES] = _slopes(model, (given, batch.mask, labels, shift, theta), (rows, rows, examples, None, None))
        if not model.adapted.is_complete:
            return graphs, []
        push = torch.zeros(*batch.mask.shape, model.adapted.width)
        first = (given, batch.mask, labels, shift, theta)
        pushed = (*first, theta[model.adapted.exact_start :], push, push.clone())  # one tensor twice would be one input to a trace
        traced = _exported(watched, pushed, (rows, rows, examples, None, None, None, rows, rows))
        observe = Observe(traced.module(), model.adapted.exact_start, model.adapted.width)
        seen = watched(*pushed)[1:]
        names = [f"seen_{place}" for place in range(len(seen))]
        graphs[OBSERVE] = _onnx(
            _functional(observe, first),
            first,
            (rows, rows, examples, None, None),
            ["given", "mask", "labels", "shift", "theta"],
            ["losses", "at_input", "at_output", "exact", *names],
        )
        if not model.adapted.below:
            return graphs, []
        deltas = [push.clone() for _ in model.adapted.below]
        arguments = (theta, torch.ones(()), *deltas, *seen)
        graphs[PULL_BACK] = _onnx(
            _functional(PullBack(model, watched), arguments),
            arguments,
            [None, None, *(dict.fromkeys(range(tensor.dim()), either) for tensor in arguments[2:])],
            ["theta", "carried", *(f"delta_{number}" for number in range(len(deltas))), *names],
            ["gradient"],
        )
    return graphs, watched.outputs


def _slopes(model: Model, first: tuple[Tensor, ...], dynamic_shapes: Sequence[Any]) -> onnx.ModelProto:
    """Differentiates the losses before anything of them is rounded: integer products have no derivative."""
    taken = {*first[1].shape, model.num_classes, model.layout.size, model.adapted.width}
    directions = next(size for size in count(2) if taken.isdisjoint({size, 1 + size}))  # with the values they are 1 + P factors
    arguments = (*first, first[-1].repeat(directions, 1))
    try:
        return _onnx(
            Slopes(_functional(PointLosses(model), first)),
            arguments,
            (*dynamic_shapes, {0: torch.export.Dim.DYNAMIC}),
            ["given", "mask", "labels", "shift", "theta", "directions"],
            ["losses", "slopes"],
        )
    except MissingRuleError as missing:
        raise ConfigError(
            f"slope_method: found forward-mode, expected two-sided for {model.config.name!r} in a device package: "
            f"`packaging.tangents` has no rule for {missing}; choose --slopes two-sided, or --runtime torch"
        ) from missing


def _with_open_sizes(batch: Batch, taken: Set[int]) -> Batch:
    """Repeats examples and pads until no size is 1, which a trace takes for fixed, or equals another, which it takes for the same."""
    found, length = batch.mask.shape
    num_examples = next(size for size in count(max(found, 2)) if size not in taken)
    longer = next(size for size in count(max(length, 2)) if size not in taken and size != num_examples) - length
    order, pad = torch.arange(num_examples) % found, nn.functional.pad
    opened = Batch(
        token_ids=pad(batch.token_ids[order], (0, longer)),
        mask=pad(batch.mask[order], (0, longer)),
        labels=batch.labels[order] if batch.places is None else batch.labels,
        states=None if batch.states is None else pad(batch.states[order], (0, 0, 0, longer)),
    )
    if batch.places is None:
        return opened
    places = batch.places // length * (length + longer) + batch.places % length
    sizes = taken | {num_examples, length + longer, num_examples * (length + longer)}
    num_targets = next(size for size in count(max(len(places), 2)) if size not in sizes)
    again = torch.arange(num_targets) % len(places)
    return replace(opened, labels=batch.labels[again], places=places[again])


@contextmanager
def _tracing(model: Model) -> Generator[None]:
    """Within it, a network runs operations that have open sizes in a trace; what cannot be traced is the model's, and is said so."""
    config: Any = model.network.get_submodule("backbone").config
    threshold, uses_cache = logging.root.manager.disable, getattr(config, "use_cache", None)
    logging.disable(logging.WARNING)  # of sizes that are always 1, and of packages that nothing here needs
    config.use_cache = False  # a cache that a module has filled in one trace would lengthen its next
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            yield
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        raise ConfigError(
            f"model.name: {model.config.name!r} could not be written as an ONNX graph ({str(error).strip().splitlines()[0]}); "
            "its devices need --runtime torch"
        ) from error
    finally:
        logging.disable(threshold)
        config.use_cache = uses_cache


def _onnx(
    module: nn.Module, arguments: tuple[Tensor, ...], dynamic_shapes: Sequence[Any], inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    program = torch.onnx.export(
        _exported(module, arguments, dynamic_shapes),
        dynamo=True,
        opset_version=OPSET,
        input_names=inputs,
        output_names=outputs,
        verbose=False,
        optimize=True,
    )
    assert program is not None, "the exporter returns a program unless it is told to write a file"
    return program.model_proto


def _exported(module: nn.Module, arguments: tuple[Tensor, ...], dynamic_shapes: Sequence[Any]) -> Any:
    with PlainLinear():
        return torch.export.export(module, arguments, dynamic_shapes=tuple(dynamic_shapes), strict=False)


def _functional(module: nn.Module, arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    """Writes a derivative down as forward operations, sizes still open."""
    with PlainLinear():
        graph = make_fx(module, decomposition_table=BACKWARD, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    for node in [node for node in graph.graph.nodes if node.target is torch.ops.aten.size.default]:
        for user in list(node.users):  # a list of numbers would be read into Python by the next trace; single sizes are not
            with graph.graph.inserting_before(user):
                user.replace_all_uses_with(graph.graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], user.args[1])))
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
