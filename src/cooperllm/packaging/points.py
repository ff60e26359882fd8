"""Several points θ_1 ... θ_P in one pass: the points stand side by side in the batch, and each trained layer takes its own part for each.

    y[p, b] = W_p x[p, b] + c_p                                             (1)  a trained linear layer: LoRA's factors, a head
    y[p, b] = l_p ∘ (W x[p, b])                                             (2)  IA3

Everything frozen sees one batch of P · B rows and runs the network's own code. `torch.func.vmap` says the same in one word, but its rules
read sizes into Python, so that a trace through it is good for one P, B and T alone.

Dimension key: P points, B examples, n trainable parameters.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cooperllm.errors import ConfigError
from cooperllm.layout import Layout
from cooperllm.wrapped_forward import forward_wrapped

IA3 = ".ia3_l."


@contextmanager
def points_beside(network: nn.Module, layout: Layout, theta: Float[Tensor, "P n"]) -> Generator[None]:
    """Within it, a network takes batches of P · B rows, the rows of one point together, and is at point p for the p-th of them.

    Args:
        network: A network with the parameters of the layout.
        layout: Where each trained tensor lies in θ.
        theta: Points.

    Yields:
        Nothing.

    Raises:
        ConfigError: If something else is trained than linear layers and IA3's scales.
    """
    parts = {
        name: theta[:, start:stop].reshape(-1, *shape)
        for (name, (start, stop)), shape in zip(layout.ranges.items(), layout.shapes, strict=True)
    }
    with ExitStack() as changes:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in parts):
            module, forward = _at_points(network, path, parts)
            changes.enter_context(forward_wrapped(module, forward))
        yield


def _at_points(network: nn.Module, path: str, parts: Mapping[str, Tensor]) -> tuple[nn.Module, Callable[..., Any]]:
    module = network.get_submodule(path)
    if isinstance(module, nn.Linear):
        return module, partial(_linear, parts[f"{path}.weight"], parts.get(f"{path}.bias"))
    owner, mark, _ = f"{path}.".partition(IA3)
    if mark:
        layer: Any = network.get_submodule(owner)
        scale = next(part for name, part in parts.items() if name.startswith(f"{path}."))
        return layer, partial(_scaled, layer, scale)
    raise ConfigError(
        f"model.adapter: found trained parameters in {path} ({type(module).__name__}), a device package knows LoRA and IA3 on linear "
        "layers and a linear head; choose --adapter lora or ia3, or --runtime torch"
    )


def _linear(weight: Tensor, bias: Tensor | None, _own: Callable[..., Any], x: Tensor) -> Tensor:
    """Eq. (1) for x [P·B, ..., in]."""
    num_points, size_out, size_in = weight.shape
    result = x.reshape(num_points, -1, size_in) @ weight.transpose(1, 2)
    if bias is not None:
        result = result + bias[:, None]
    return result.reshape(*x.shape[:-1], size_out)


def _scaled(layer: Any, scale: Tensor, _own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Eq. (2) for x [P·B, ..., in]."""
    result = layer.base_layer(x, *args, **kwargs)
    num_points = scale.shape[0]
    rows = result.reshape(num_points, -1, result.shape[-1]) * scale.reshape(num_points, 1, -1)
    return rows.reshape(result.shape)
