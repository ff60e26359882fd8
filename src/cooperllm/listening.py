"""A trained model, tried out: what it says after a prompt, or which class it finds in a text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from cooperllm.config import Objective
from cooperllm.errors import ConfigError
from cooperllm.models import Model
from cooperllm.session import trained


class Listener:
    """A run's model at the end of its log.

    Attributes:
        model: The network.
        theta: θ, shape [n].
        label_names: Names of the classes; empty for next tokens.
    """

    def __init__(self, model: Model, theta: Float32[np.ndarray, "n"], label_names: tuple[str, ...]) -> None:
        self.model, self.theta, self.label_names = model, theta, label_names

    @classmethod
    def of(cls, run: Path) -> "Listener":
        """Takes the model of a run, finished or not.

        Args:
            run: Its directory.

        Returns:
            The listener.

        Raises:
            RunDirectoryError: If there is no such run.
        """
        assembly, theta = trained(run)
        return cls(assembly.material.model, theta, assembly.material.task.label_names)

    def answer(self, text: str, tell: Callable[[str], None], *, text2: str = "", max_new_tokens: int = 128) -> None:
        """Answers a text: with what the model says after it, or with the classes it finds in it, likeliest first.

        Args:
            text: The text.
            tell: Called with words as they come.
            text2: The second text of a pair.
            max_new_tokens: For next tokens: tokens at most.

        Raises:
            ConfigError: If there is no text.
        """
        if not text.strip():
            raise ConfigError("text: found nothing, expected something to answer")
        if self.model.config.objective is Objective.NEXT_TOKEN:
            self.model.say(self.theta, text, text2, tell, max_new_tokens=max_new_tokens)
            return
        examples = self.model.encode([text], [text2] if text2 else None, [0])
        with torch.inference_mode():
            scores = self.model.scores(torch.from_numpy(self.theta.copy()), self.model.batch(examples, [0]))
        shares = scores[0].softmax(0).tolist()
        ordered = sorted(zip(shares, self.label_names, strict=True), reverse=True)
        tell(", ".join(f"{name} {share:.1%}" for share, name in ordered[:5]))
