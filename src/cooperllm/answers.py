"""How good an answer is beside the one that was wanted: scores that have no derivative, which slopes of two points can do without.

    exact match = 1 where the answer is the completion, white space at both ends aside, else 0
    F1          = F-measure of their words (ROUGE-1)
    ROUGE-L     = F-measure of the longest common subsequence of their words

References:
    Lin, 2004, ROUGE: a package for automatic evaluation of summaries. Computed by the package rouge-score.
    Malladi et al., 2023, Fine-tuning language models with just forward passes, arXiv:2305.17333: objectives without a derivative.
"""

from collections.abc import Callable

from cooperllm.config import DeviceScore
from cooperllm.errors import ConfigError

Judge = Callable[[str, str], float]
"""(what was wanted, what was said) -> [0, 1]."""


def exact_match(wanted: str, said: str) -> float:
    """Tells whether an answer is the completion.

    Args:
        wanted: The completion.
        said: The answer.

    Returns:
        1 or 0.

    Example:
        >>> exact_match("Rain.", " Rain. "), exact_match("Rain.", "rain")
        (1.0, 0.0)
    """
    return float(said.strip() == wanted.strip())


def rouge(kind: str) -> Judge:
    """Makes a judge of common words.

    Args:
        kind: "rouge1" or "rougeL".

    Returns:
        The judge.

    Raises:
        ConfigError: If the package for it is missing.

    Example:
        >>> rouge("rouge1")("clouds bring rain", "rain bring clouds"), round(rouge("rougeL")("clouds bring rain", "rain bring clouds"), 3)
        (1.0, 0.333)
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 -- of the extra `evaluate`
    except ModuleNotFoundError as error:
        raise ConfigError("answers: found no package rouge-score, which compares them; pip install 'cooperllm[evaluate]'") from error
    scorer = RougeScorer([kind])
    return lambda wanted, said: float(scorer.score(wanted, said)[kind].fmeasure)


def judge_of(score: DeviceScore) -> Judge | None:
    """Finds who judges what devices measure slopes of.

    Args:
        score: A setting.

    Returns:
        The judge; None for the loss, which needs none.

    Raises:
        ConfigError: If the package for it is missing.

    Example:
        >>> judge_of(DeviceScore.LOSS) is None
        True
    """
    return {DeviceScore.LOSS: lambda: None, DeviceScore.EXACT_MATCH: lambda: exact_match, DeviceScore.F1: lambda: rouge("rouge1")}[score]()
