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

from cooperllm.comparison import compare, export, resume
from cooperllm.config import ArmName, RunConfig
from cooperllm.recipes import recipe
from cooperllm.session import Run, run

__all__ = ["ArmName", "Run", "RunConfig", "compare", "export", "recipe", "resume", "run"]
