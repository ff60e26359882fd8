"""The frozen layers below the first adapted one: run once per example, passed over ever after.

They see neither θ nor a perturbation, so their output for an example never changes. Works on any Hugging Face network whose layers stand in
one list: a hook on the first adapted layer takes the hidden states out (and leaves the forward pass by an exception) or puts known ones in,
while the layers before it hand their input on. The network's own code for masks and positions stays in charge.

Dimension key: B examples, T tokens, H hidden size.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class _PrefixReached(Exception):  # noqa: N818 -- a jump out of the forward pass, not an error
    """Raised at the first adapted layer when only what lies before it is wanted."""


class _Skippable(nn.Module):
    """A frozen layer that can be passed over when the hidden states after it are known."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_skipped = False
        self.returns_tuple = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer, or hands its input on."""
        if self.is_skipped:
            return (hidden_states,) if self.returns_tuple else hidden_states
        result = self.layer(hidden_states, *args, **kwargs)
        self.returns_tuple = isinstance(result, tuple)
        return result

    def __getattr__(self, name: str) -> Any:
        """Some architectures read attributes of their layers, for example the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class FrozenPrefix:
    """The layers below the first adapted one.

    Attributes:
        stack: The network's list of layers.
        first: Position of the first adapted layer.
    """

    def __init__(self, stack: nn.ModuleList, first: int) -> None:
        self.stack: Any = stack
        self.first = first
        self.restore()
        self._given: Tensor | None = None
        self._reached: Tensor | None = None
        self._is_computing = False
        stack[first].register_forward_pre_hook(self._enter, with_kwargs=True)

    @classmethod
    def find(cls, network: nn.Module, trained: Sequence[str]) -> "FrozenPrefix | None":
        """Finds the stack of layers and the first that is trained; None when nothing below it is frozen."""
        found = layer_stack(network)
        if found is None:
            return None
        path, stack = found
        outside = [name for name in trained if not name.startswith((f"{path}.", "classifier."))]
        inside = [int(name.removeprefix(f"{path}.").split(".")[0]) for name in trained if name.startswith(f"{path}.")]
        first = min(inside, default=0)
        return None if outside or first == 0 else cls(stack, first)

    def restore(self) -> None:
        """Wraps the frozen layers."""
        for index in range(self.first):
            if not isinstance(self.stack[index], _Skippable):
                self.stack[index] = _Skippable(self.stack[index])

    def unwrap(self) -> None:
        """Puts the original layers back, for saving."""
        for index in range(self.first):
            self.stack[index] = self.stack[index].layer

    def compute(self, network: nn.Module, *given: Tensor) -> Float[Tensor, "B T H"]:
        """Runs the network, called with `given`, up to the first adapted layer."""
        self._is_computing = True
        try:
            network(*given)
        except _PrefixReached:
            assert self._reached is not None, "the first adapted layer was reached without hidden states"
            return self._reached
        finally:
            self._is_computing, self._reached = False, None
        raise AssertionError("the network ended without passing its first adapted layer")

    @contextmanager
    def resumed(self, states: Tensor) -> Generator[None]:
        """Within it, a forward pass starts from known hidden states."""
        self._set_skipped(skipped=True)
        self._given = states
        try:
            yield
        finally:
            self._given = None
            self._set_skipped(skipped=False)

    def _set_skipped(self, *, skipped: bool) -> None:
        for index in range(self.first):
            self.stack[index].is_skipped = skipped

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._is_computing:
            self._reached = args[0] if args else kwargs["hidden_states"]
            raise _PrefixReached
        if self._given is None:
            return args, kwargs
        if args:
            return (self._given, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._given}


@contextmanager
def original_layers(prefix: FrozenPrefix | None) -> Generator[None]:
    """Within it, a network looks as it was loaded: for saving."""
    if prefix is None:
        yield
        return
    prefix.unwrap()
    try:
        yield
    finally:
        prefix.restore()


def layer_stack(network: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Finds the list that a network's Transformer layers stand in.

    Args:
        network: A network with a Hugging Face model as its `backbone`.

    Returns:
        (path of the list, the list), or None where layers are kept in another way.
    """
    backbone: Any = network.get_submodule("backbone")
    depth = int(backbone.config.num_hidden_layers)
    return next(((name, part) for name, part in network.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth), None)
