"""Fine-tune language models across devices that can only afford forward passes.

A cloud back-propagates on public data and says where to look; devices measure slopes of their private loss with forward passes; edges fan
out and fold. `cooperllm.round` is one round from top to bottom.

Example:
    A run and its adapter::

        import cooperllm

        recipe = cooperllm.recipe("demo")
        run = cooperllm.run(recipe.config, "runs/first")
        print(run.summary["arms"]["measured"]["final_accuracy"])
        run.export("adapter")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cooperllm.comparison import compare, export, resume
    from cooperllm.config import ArmName, RunConfig
    from cooperllm.recipes import recipe
    from cooperllm.session import Run, run

__all__ = ["ArmName", "Run", "RunConfig", "compare", "export", "recipe", "resume", "run"]

_HOMES = {
    "ArmName": "config", "Run": "session", "RunConfig": "config", "compare": "comparison", "export": "comparison", "recipe": "recipes",
    "resume": "comparison", "run": "session",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: a device imports this package and must not load PyTorch by it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
