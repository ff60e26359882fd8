"""Recipes: functions that return a whole configuration, every arm with the optimiser and the learning rate that were found for it.

Estimates, and gradients of back-propagation, go to Adam, at one rate for every task of classes: with a head or without one, of two or of 77
(`docs/log.md`). Steps made of random directions go to momentum: Adam would divide noise by noise. With momentum a rate belongs to a task;
recipes with label texts have four times that with a head.

The arms `decomfl`, `fedkseed`, `fwdllm` and `warm-start` have that of `mezo-fl` until a search on validation has found theirs.

Take one, change fields with `dataclasses.replace`, and run it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cooperllm.config import (
    ArmConfig,
    ArmName,
    DataConfig,
    FederationConfig,
    ModelConfig,
    Objective,
    OptimizerKind,
    Partition,
    RunConfig,
    SourceConfig,
)
from cooperllm.errors import ConfigError

LABEL_TEXTS_FACTOR = 4.0
"""How much larger rates of momentum are without a head."""

ADAPTIVE = frozenset({ArmName.FEEDBACK, ArmName.MEASURED, ArmName.CLOUD_ONLY, ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED})
"""Arms that recipes give to Adam: those whose step is more than a sum of random directions."""

ADAPTIVE_RATE = 0.005
"""Adam's step size, the same for all of them and every task: `docs/log.md` has the searches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A task and the arms to compare on it.

    Attributes:
        config: The run with the default arm.
        arms: Settings of every arm, with the learning rates of the recipe.
        compared: Arms that `cooperllm compare` runs unless told otherwise.
        needs_data_directory: Whether the data sets are files of the user's.
    """

    config: RunConfig
    arms: Mapping[ArmName, ArmConfig]
    compared: tuple[ArmName, ...] = (ArmName.FEEDBACK, ArmName.MEASURED, ArmName.PAPER, ArmName.MEZO_FL, ArmName.CLOUD_ONLY)
    needs_data_directory: bool = False

    def with_arm(self, name: ArmName) -> RunConfig:
        """Returns the run with another arm and its optimiser."""
        kind = OptimizerKind.ADAM if name in ADAPTIVE else OptimizerKind.MOMENTUM
        return replace(self.config, arm=self.arms[name], optimizer=replace(self.config.optimizer, kind=kind))


def demo(_data_directory: str = "") -> Recipe:
    """Reviews written by the embedded generator: the cloud has cameras, phones and kitchens, the devices films, books, hotels and more."""
    arms = _arms(paper=0.1, unguided=2e-3, warm_start=0.03)
    # The same words praise a camera and damn a hotel here: the cloud's own gradient gets no say beside what the devices measure.
    arms[ArmName.MEASURED] = replace(arms[ArmName.MEASURED], public_weight=0.0)
    config = RunConfig(
        recipe="demo", federation=FederationConfig(dirichlet_alpha=5.0), num_rounds=25, evaluate_every=5, arm=arms[ArmName.FEEDBACK]
    )
    return Recipe(config=config, arms=arms)


def sentiment_shift(data_directory: str = "data") -> Recipe:
    """Product reviews at the cloud (customer_reviews), film sentences on the devices (sst2): a shift of domain."""
    arms = _arms(paper=0.4, unguided=1e-3, warm_start=0.08)
    # Probes mixed from a basis take in the noise of unlike devices (two classes, Dirichlet 0.5); isotropic ones, lightly weighed, hardly.
    arms[ArmName.MEASURED] = replace(arms[ArmName.MEASURED], basis_size=0, effective_rank=4000.0)
    data = DataConfig(public=SourceConfig(name=f"{data_directory}/customer_reviews"), private=SourceConfig(name=f"{data_directory}/sst2"))
    config = RunConfig(recipe="sentiment-shift", data=data, num_rounds=60, arm=arms[ArmName.FEEDBACK])
    return Recipe(config=config, arms=arms, needs_data_directory=True)


def missing_topics(data_directory: str = "data") -> Recipe:
    """News topics (ag_news) of which the cloud has seen two of four: missing classes."""
    arms = _arms(paper=0.1, unguided=1e-3, warm_start=0.01)
    source = SourceConfig(name=f"{data_directory}/ag_news")
    public = replace(source, keep_labels=("0", "1"), max_examples=400)
    config = RunConfig(recipe="missing-topics", data=DataConfig(public=public, private=source), num_rounds=60, arm=arms[ArmName.FEEDBACK])
    return Recipe(config=config, arms=arms, needs_data_directory=True)


def sentiment_shift_label_texts(data_directory: str = "data") -> Recipe:
    """The task of sentiment-shift without a head: film sentences are compared with "a bad film" and "a great film"; adapters do it all."""
    return _with_label_texts(sentiment_shift(data_directory), ("a bad film", "a great film"))


def missing_topics_label_texts(data_directory: str = "data") -> Recipe:
    """The task of missing-topics without a head: news are compared with "news about sports" and the like; adapters do it all."""
    texts = ("news about world politics", "news about sports", "news about business", "news about science and technology")
    return _with_label_texts(missing_topics(data_directory), texts)


def tiny(_data_directory: str = "") -> Recipe:
    """A two-layer Llama of random weights with label words: it learns little, in seconds, and is for trying things out."""
    arms = _arms(paper=0.03, unguided=1e-3, warm_start=0.03)
    arms[ArmName.WARM_START] = replace(arms[ArmName.WARM_START], warm_start_rounds=2)
    model = ModelConfig(
        name="tiny-llama",
        objective=Objective.LABEL_WORDS,
        label_words=("bad", "good"),
        prompt="{text} It was",
        target_modules=("q_proj", "v_proj"),
        max_tokens=64,
    )
    source = SourceConfig(max_examples=200)
    data = DataConfig(public=source, private=source, num_test=40, num_validation=40)
    federation = FederationConfig(num_devices=6, num_edges=2, devices_per_round=3, batch_size=4)
    config = RunConfig(
        recipe="tiny", model=model, data=data, federation=federation, num_rounds=4, evaluate_every=2, checkpoint_every=2,
        arm=arms[ArmName.FEEDBACK],
    )  # fmt: skip
    return Recipe(config=config, arms=arms)


def instructions(data_directory: str = "data") -> Recipe:
    """A causal language model on instructions and their responses (stories260K on instruct_1100): next tokens, all layers adapted."""
    arms = _arms(paper=0.1, unguided=5e-4, warm_start=0.03)
    # A model this small forgets its stories altogether: a search found a rate four times that of the other tasks (docs/log.md).
    for name in (ArmName.FEEDBACK, ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED):
        arms[name] = replace(arms[name], learning_rate=0.02)
    model = ModelConfig(
        name=f"{data_directory}/stories260K",
        objective=Objective.NEXT_TOKEN,
        prompt="{text}\n\n",
        target_modules=("q_proj", "v_proj"),
        last_layers=None,
        max_tokens=128,
    )
    source = SourceConfig(name=f"{data_directory}/instruct_1100", label_column=None, completion_column="response")
    data = DataConfig(public=replace(source, max_examples=100), private=source)
    config = RunConfig(
        recipe="instructions", model=model, data=data, federation=FederationConfig(partition=Partition.IID, batch_size=8),
        num_rounds=60, arm=arms[ArmName.FEEDBACK],
    )  # fmt: skip
    return Recipe(config=config, arms=arms, needs_data_directory=True)


RECIPES: Mapping[str, Callable[[str], Recipe]] = {
    "demo": demo,
    "sentiment-shift": sentiment_shift,
    "missing-topics": missing_topics,
    "sentiment-shift-label-texts": sentiment_shift_label_texts,
    "missing-topics-label-texts": missing_topics_label_texts,
    "instructions": instructions,
    "tiny": tiny,
}


def recipe(name: str, data_directory: str = "data") -> Recipe:
    """Finds a recipe by name.

    Args:
        name: One of `RECIPES`.
        data_directory: Directory with the data sets, for the recipes that need it.

    Returns:
        The recipe.

    Raises:
        ConfigError: If there is none of that name.

    Example:
        >>> recipe("demo").config.recipe
        'demo'
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: found {name!r}, expected one of {', '.join(RECIPES)}; `cooperllm recipes` describes them")
    return RECIPES[name](data_directory)


def _with_label_texts(task: Recipe, texts: tuple[str, ...]) -> Recipe:
    """The same task and arms; each class is described by a text, of which validation has chosen the wording at θ_0."""
    model = replace(task.config.model, objective=Objective.LABEL_TEXTS, label_words=texts)
    arms = {name: arm if name in ADAPTIVE else _scaled(arm, LABEL_TEXTS_FACTOR) for name, arm in task.arms.items()}
    config = replace(task.config, recipe=f"{task.config.recipe}-label-texts", model=model, arm=arms[task.config.arm.name])
    return replace(task, config=config, arms=arms)


def _scaled(arm: ArmConfig, factor: float) -> ArmConfig:
    return replace(arm, learning_rate=factor * arm.learning_rate, warm_start_learning_rate=factor * arm.warm_start_learning_rate)


def _arms(*, paper: float, unguided: float, warm_start: float) -> dict[ArmName, ArmConfig]:
    """Gives every arm its rate; those that step along random directions share one, and so do those that Adam scales."""
    rates = {
        ArmName.PAPER: paper,
        ArmName.MEZO_FL: unguided,
        ArmName.DECOMFL: unguided,
        ArmName.FEDKSEED: unguided,
        ArmName.FWDLLM: unguided,
        ArmName.WARM_START: unguided,
    } | dict.fromkeys(ADAPTIVE, ADAPTIVE_RATE)
    return {name: ArmConfig(name=name, learning_rate=rates[name], warm_start_learning_rate=warm_start) for name in ArmName}
