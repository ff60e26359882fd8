"""Gradient checkpointing: a layer keeps its input and runs again for its backward pass; one layer's activations are alive at a time.

θ enters a network as views for the length of one call (`torch.func.functional_call`), and the second run comes after it, when the modules
hold their own weights again. Each layer therefore remembers the tensors it had the first time and runs with those: without that, the
gradient would be that of another point, and nothing would say so.

References:
    Chen et al., 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cooperllm.errors import ConfigError
from cooperllm.frozen_prefix import layer_stack
from cooperllm.wrapped_forward import forward_wrapped


class _Bare(nn.Module):
    """A layer without its hooks, which have done their work when it runs again."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer's own code."""
        return self._forward(*args, **kwargs)


@contextmanager
def checkpointed(network: nn.Module) -> Generator[None]:
    """Within it, forward passes of a network keep the inputs of its Transformer layers alone.

    Args:
        network: A network with a Hugging Face model as its `backbone`, in evaluation mode: nothing random may differ in the second run.

    Yields:
        Nothing; a backward pass may come after it.

    Raises:
        ConfigError: If the network does not keep its layers in one list.
    """
    found = layer_stack(network)
    if found is None:
        raise ConfigError(
            "activations: checkpoints need a model whose layers stand in one list; choose --arm fedavg-bp, or --set "
            "model.checkpoints_activations=false"
        )
    layers: Any = found[1]
    with ExitStack() as changes:
        for layer in layers:
            changes.enter_context(forward_wrapped(layer, partial(_remembering, layer)))
        yield


def _remembering(layer: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bare = _Bare(layer, own)
    tensors: dict[str, Tensor] = {f"layer.{name}": tensor for name, tensor in layer.named_parameters()}

    def run(*given: Any) -> Any:
        return functional_call(bare, tensors, given, kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
