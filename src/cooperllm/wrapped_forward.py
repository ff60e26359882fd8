"""A module's forward function, replaced for a while."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def forward_wrapped(module: nn.Module, around: Callable[..., Any]) -> Generator[None]:
    """Within it, calls of a module go through `around`, which gets the module's own forward function first.

    Args:
        module: The module; it is as it was afterwards.
        around: Called with the own forward function and whatever the module is called with.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> relu = nn.ReLU()
        >>> with forward_wrapped(relu, lambda own, x: -own(x)):
        ...     relu(3 * torch.ones(1))
        tensor([-3.])
    """
    own, was_replaced = module.forward, "forward" in module.__dict__
    module.forward = partial(around, own)
    try:
        yield
    finally:
        if was_replaced:
            module.forward = own
        else:
            del module.forward
