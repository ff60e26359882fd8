"""From traced modules to ONNX graphs whose sizes P, B and T stay open."""

import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.device.manifest import LOSSES, OBSERVE, PREFIX, PULL_BACK
from cooperllm.errors import ConfigError
from cooperllm.models import Batch, Model
from cooperllm.packaging.graphs import Losses, Observe, PlainLinear, Prefix, PullBack, only_label_words

OPSET = 20
"""Version of the operators; onnxruntime knows it from 1.18 on."""


def graphs_of(model: Model, theta: Tensor, batch: Batch) -> tuple[dict[str, onnx.ModelProto], list[int]]:
    """Traces everything that a device computes.

    Args:
        model: A model.
        theta: Any θ, shape [n].
        batch: Any examples, at least two of at least two tokens: sizes of 1 would be taken for fixed.

    Returns:
        (graphs by name; for each adapted module the place of its input among the tensors that `observe` hands out).

    Raises:
        ConfigError: If the model cannot be traced, or something is trained that a package does not know.
    """
    dynamic, either = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    rows, point = {0: dynamic, 1: dynamic}, torch.stack([theta, theta])
    given = batch.token_ids if batch.states is None else batch.states
    shift, observe = torch.zeros(model.num_classes), Observe(model)
    graphs: dict[str, onnx.ModelProto] = {}
    with _tracing(model):
        if model.prefix is not None:
            graphs[PREFIX] = _onnx(Prefix(model), (batch.token_ids, batch.mask), (rows, rows), ["token_ids", "mask"], ["states"])
        graphs[LOSSES] = _onnx(
            Losses(model),
            (given, batch.mask, batch.labels, shift, point),
            (rows, rows, {0: dynamic}, None, {0: dynamic}),
            ["given", "mask", "labels", "shift", "theta"],
            ["losses"],
        )
        if not model.adapted.is_complete:
            return graphs, []
        outputs = observe(given, batch.mask, theta)
        seen = outputs[1 + (model.adapted.head is not None) :]
        names = [f"seen_{place}" for place in range(len(seen))]
        first = ["scores", *(["pooled"] if model.adapted.head is not None else []), *names]
        graphs[OBSERVE] = _onnx(observe, (given, batch.mask, theta), (rows, rows, None), ["given", "mask", "theta"], first)
        deltas = [torch.zeros(*batch.mask.shape, size) for _, size in model.adapted.sizes]
        arguments = (theta, *deltas, *seen)
        graphs[PULL_BACK] = _onnx(
            _functional(PullBack(model, observe), arguments),
            arguments,
            [None, *(dict.fromkeys(range(tensor.dim()), either) for tensor in arguments[1:])],
            ["theta", *(f"delta_{number}" for number in range(len(deltas))), *names],
            ["gradient"],
        )
    return graphs, observe.features


@contextmanager
def _tracing(model: Model) -> Generator[None]:
    """Within it, a network runs operations that have open sizes in a trace; what cannot be traced is the model's, and is said so."""
    config: Any = model.network.get_submodule("backbone").config
    threshold, uses_cache = logging.root.manager.disable, getattr(config, "use_cache", None)
    logging.disable(logging.WARNING)  # of sizes that are always 1, and of packages that nothing here needs
    config.use_cache = False  # a cache that a module has filled in one trace would lengthen its next
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), only_label_words(model.network), warnings.catch_warnings():
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
    with PlainLinear():
        traced = torch.export.export(module, arguments, dynamic_shapes=tuple(dynamic_shapes), strict=False)
    program = torch.onnx.export(
        traced, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, verbose=False, optimize=True
    )
    assert program is not None, "the exporter returns a program unless it is told to write a file"
    return program.model_proto


def _functional(module: PullBack, arguments: tuple[Tensor, ...]) -> nn.Module:
    """Writes a backward pass down as forward operations, sizes still open."""
    with PlainLinear():
        graph = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    for node in [node for node in graph.graph.nodes if node.target is torch.ops.aten.size.default]:
        for user in list(node.users):  # a list of numbers would be read into Python by the next trace; single sizes are not
            with graph.graph.inserting_before(user):
                user.replace_all_uses_with(graph.graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], user.args[1])))
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
