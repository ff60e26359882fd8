"""A trained model on held-out texts: loss and accuracy, and for completions what it says when asked, beside what was to be said.

    perplexity = exp(mean loss of a token)

Exact match and ROUGE-L are means over texts, `answers`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cooperllm.answers import exact_match, rouge
from cooperllm.config import Objective
from cooperllm.session import judged, trained


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a model is worth on test texts it was never trained on.

    Attributes:
        loss: Mean loss of a text, or of a token to be said.
        accuracy: Share of texts, or of tokens, whose likeliest class or token is right.
        num_texts: Texts that loss and accuracy are of.
        exact_match: Share of answers that are right to the letter; None for classes.
        rouge_l: Mean F-measure; None for classes.
        num_answers: Texts that were answered.
    """

    loss: float
    accuracy: float
    num_texts: int
    exact_match: float | None = None
    rouge_l: float | None = None
    num_answers: int = 0

    @property
    def perplexity(self) -> float:
        """Of a token to be said, exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # of a diverged model, still a number


def evaluate(
    run: Path, *, max_texts: int = 100, max_new_tokens: int = 128, observe: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Evaluates a run's model at the end of its log.

    Args:
        run: Directory of a run, finished or not.
        max_texts: Completions are generated for the first so many test texts, >= 1.
        max_new_tokens: Tokens of an answer at most.
        observe: Called with (answers so far, answers in all).

    Returns:
        The figures.

    Raises:
        RunDirectoryError: If there is no such run.
        ConfigError: If completions are to be compared and the package for it is missing.
    """
    assembly, theta = trained(run)
    model, texts, examples = assembly.material.model, assembly.material.task.test, assembly.material.test
    accuracy, loss = judged(model, examples, theta)
    if model.config.objective is not Objective.NEXT_TOKEN or texts.completions is None:
        return Evaluation(loss=loss, accuracy=accuracy, num_texts=len(examples))
    longest, count, exact = rouge("rougeL"), min(max_texts, len(texts)), 0.0
    shares = list[float]()
    for number in range(count):
        words, said = texts.completions[number], list[str]()
        other = "" if texts.second_texts is None else texts.second_texts[number]
        model.say(theta, texts.texts[number], other, said.append, max_new_tokens=max_new_tokens)
        exact += exact_match(words, "".join(said))
        shares.append(longest(words, "".join(said)))
        if observe is not None:
            observe(number + 1, count)
    return Evaluation(
        loss=loss,
        accuracy=accuracy,
        num_texts=len(examples),
        exact_match=exact / count,
        rouge_l=math.fsum(shares) / count,
        num_answers=count,
    )
