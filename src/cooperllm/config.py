"""A run's settings: frozen values, checked once, at construction, before anything runs."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from cooperllm.errors import ConfigError

SUPPORTED_BITS = (4, 8, 32)
"""Bits per entry that vectors can be packed with; 32 is exact."""


class ArmName(Enum):
    """The methods that share this frame."""

    FEEDBACK = "feedback"
    MEASURED = "measured"
    PAPER = "paper"
    MEZO_FL = "mezo-fl"
    DECOMFL = "decomfl"
    FEDKSEED = "fedkseed"
    FWDLLM = "fwdllm"
    WARM_START = "warm-start"
    CLOUD_ONLY = "cloud-only"
    FEDAVG_BP = "fedavg-bp"
    FEDAVG_BP_CHECKPOINTED = "fedavg-bp-checkpointed"


class OptimizerKind(Enum):
    """The server's optimiser."""

    MOMENTUM = "momentum"
    ADAM = "adam"


class AdapterKind(Enum):
    """What is trained."""

    LORA = "lora"
    IA3 = "ia3"
    FULL = "full"


class Objective(Enum):
    """How a model gives one score per class."""

    HEAD = "head"
    LABEL_WORDS = "label-words"


class Partition(Enum):
    """How private examples are spread over devices."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    COLUMN = "column"


class Rectification(Enum):
    """How the paper's arm mixes the cloud's gradient into the estimate."""

    NONE = "none"
    OPTIMAL = "optimal"


class EngineName(Enum):
    """What carries messages between the tiers."""

    LOOPBACK = "loopback"
    GRID = "grid"
    SIMULATION = "simulation"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained, and what of it.

    Attributes:
        name: "minilm" (the packaged default), "tiny-llama" (random, for tests), a hub id, or a local directory.
        adapter: LoRA, IA3 or every parameter.
        objective: A classification head, or label words after a prompt.
        rank: LoRA rank, >= 1.
        lora_alpha: LoRA scale times rank, > 0.
        target_modules: Names of the adapted linear layers; empty lets PEFT choose for the architecture.
        last_layers: How many of the last layers are adapted, >= 1; None adapts all.
        max_tokens: Texts are cut at this many tokens, >= 2.
        prompt: For label words: the text with {text} (and {text2}) to be filled in.
        label_words: For label words: one word per class, in the order of the labels.
        caches_prefix: Whether the frozen layers below the first adapted one are computed once per example and kept.
    """

    name: str = "minilm"
    adapter: AdapterKind = AdapterKind.LORA
    objective: Objective = Objective.HEAD
    rank: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("query", "value")
    last_layers: int | None = 2
    max_tokens: int = 32
    prompt: str = "{text} It was"
    label_words: tuple[str, ...] = ()
    caches_prefix: bool = True

    def __post_init__(self) -> None:
        _check(bool(self.name), "model.name", self.name, "a name, hub id or directory")
        _check(self.rank >= 1, "model.rank", self.rank, ">= 1")
        _check(self.lora_alpha > 0, "model.lora_alpha", self.lora_alpha, "> 0")
        _check(self.last_layers is None or self.last_layers >= 1, "model.last_layers", self.last_layers, ">= 1, or none")
        _check(self.max_tokens >= 2, "model.max_tokens", self.max_tokens, ">= 2")
        if self.objective is Objective.LABEL_WORDS:
            _check("{text}" in self.prompt, "model.prompt", self.prompt, "a prompt that contains {text}")
            _check(len(self.label_words) >= 2, "model.label_words", self.label_words, "one word per class")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where labelled texts come from.

    Attributes:
        name: "generated", a file (.jsonl, .json, .csv, .parquet), a directory with train, validation and test files, or a data set on
            the hub.
        domains: For generated text: its domains; empty means all of the side's default ones.
        text_column: Column with the text.
        second_text_column: Column with the second text of a pair, or None.
        label_column: Column with the label: a number from 0, or a name.
        keep_labels: Labels kept in the training part, by name or number; empty keeps all.
        max_examples: At most this many training examples, chosen by the seed; None keeps all.
    """

    name: str = "generated"
    domains: tuple[str, ...] = ()
    text_column: str = "text"
    second_text_column: str | None = None
    label_column: str = "label"
    keep_labels: tuple[str, ...] = ()
    max_examples: int | None = None

    def __post_init__(self) -> None:
        _check(bool(self.name), "data source name", self.name, "'generated', a path or a data set")
        _check(self.max_examples is None or self.max_examples >= 1, "max_examples", self.max_examples, ">= 1, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Public text for the cloud, private text for the devices.

    Attributes:
        public: The cloud's source.
        private: The devices' source; its validation and test parts judge the model.
        num_test: Test examples used at each evaluation, >= 1; None uses all.
        num_validation: Validation examples used for tuning, >= 1; None uses all.
    """

    public: SourceConfig = field(default_factory=SourceConfig)
    private: SourceConfig = field(default_factory=SourceConfig)
    num_test: int | None = 800
    num_validation: int | None = 400

    def __post_init__(self) -> None:
        _check(self.num_test is None or self.num_test >= 1, "data.num_test", self.num_test, ">= 1, or none")
        _check(self.num_validation is None or self.num_validation >= 1, "data.num_validation", self.num_validation, ">= 1, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """Who takes part.

    Attributes:
        num_devices: Devices in all, >= 1.
        num_edges: Edges, >= 1; devices are dealt to them in turn.
        devices_per_round: Devices that take part in a round, in [1, num_devices].
        min_reports: Usable reports without which a round fails, in [1, devices_per_round].
        batch_size: Private examples per device and round, >= 1.
        partition: How examples are spread.
        dirichlet_alpha: Concentration of the Dirichlet partition, > 0; small is uneven.
        partition_column: Column whose values are the devices, for the column partition.
    """

    num_devices: int = 20
    num_edges: int = 4
    devices_per_round: int = 5
    min_reports: int = 1
    batch_size: int = 16
    partition: Partition = Partition.DIRICHLET
    dirichlet_alpha: float = 0.5
    partition_column: str | None = None

    def __post_init__(self) -> None:
        _check(self.num_devices >= 1, "federation.num_devices", self.num_devices, ">= 1")
        _check(1 <= self.num_edges <= self.num_devices, "federation.num_edges", self.num_edges, f"1 to {self.num_devices}")
        _check(
            1 <= self.devices_per_round <= self.num_devices,
            "federation.devices_per_round",
            self.devices_per_round,
            f"1 to {self.num_devices}, the number of devices",
        )
        _check(
            1 <= self.min_reports <= self.devices_per_round,
            "federation.min_reports",
            self.min_reports,
            f"1 to {self.devices_per_round}, the devices of a round",
        )
        _check(self.batch_size >= 1, "federation.batch_size", self.batch_size, ">= 1")
        _check(self.dirichlet_alpha > 0, "federation.dirichlet_alpha", self.dirichlet_alpha, "> 0")
        needs_column = self.partition is Partition.COLUMN and self.partition_column is None
        _check(not needs_column, "federation.partition_column", None, "a column name for the column partition")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The server's optimiser, which every replica replays.

    Attributes:
        kind: Momentum or Adam.
        momentum: Decay γ of the first moment, in [0, 1).
        square_decay: Decay ν of Adam's second moment, in [0, 1).
        epsilon: Adam's ε, > 0.
    """

    kind: OptimizerKind = OptimizerKind.MOMENTUM
    momentum: float = 0.9
    square_decay: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        _check(0 <= self.square_decay < 1, "optimizer.square_decay", self.square_decay, "in [0, 1)")
        _check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One method and its own dials.

    Attributes:
        name: The method.
        learning_rate: Step size η, > 0.
        queries: Two-point queries per device and round, >= 1, for every zeroth-order arm.
        column_scale: Half-step μ along a unit direction, > 0.
        random_scale: Half-step μ along a standard normal direction, > 0.
        guide_bits: Bits per entry of packed columns and maps: 4, 8 or 32.
        public_batch_size: Public examples per round, >= 1.
        basis_size: Measured arm: public examples whose gradients random probes are mixed from, 0 to 1000; 0 leaves them isotropic.
        effective_rank: Measured arm: rank r that shrinks P isotropic probes by P/(P+r), >= 0.
        public_weight: Measured arm: weight λ of the cloud's own gradient along the columns, in [0, 1]; 0 where public data lack a class.
        feedback_blocks: Feedback arm: blocks of layers whose estimate is measured, one query each, >= 1; fewer where the model has fewer.
        estimate_bits: Feedback arm: bits per entry of an estimate on the link: 4, 8 or 32.
        map_examples: Feedback arm: public texts that maps are fitted on, >= 8.
        map_components: Feedback arm: principal components of a layer's input that maps may depend on, >= 1.
        map_refresh: Feedback arm: rounds between two fits in the long run, >= 1.
        blend: Paper's arm: share α of the isotropic part, in (0, 1].
        blend_scale: Paper's arm: length β, > 0.
        pool_size: Paper's arm: public gradients kept, newest first, >= 1.
        rectification: Paper's arm: whether the cloud's gradient is mixed in with the weight λ* of the theory.
        seed_pool_size: FedKSeed: random directions K that a run has in all, 1 to 2³².
        candidates: FwdLLM: directions made for each query, of which one is used, >= 1; 1 selects nothing.
        variance_threshold: FwdLLM: relative variance of the mean slope along the last step below which a step is made, > 0.
        most_held_rounds: FwdLLM: rounds that a step waits at most, >= 0; 0 steps every round.
        warm_start_rounds: Warm start: rounds of back-propagation at the cloud before the first device is asked, >= 1.
        warm_start_learning_rate: Warm start: step size of those rounds, > 0.
        local_steps: FedAvg: local steps of back-propagation, >= 1.
        local_learning_rate: FedAvg: local step size, > 0.
    """

    name: ArmName = ArmName.MEASURED
    learning_rate: float = 0.03
    queries: int = 5
    column_scale: float = 0.03
    random_scale: float = 1e-3
    guide_bits: int = 4
    public_batch_size: int = 64
    basis_size: int = 64
    effective_rank: float = 500.0
    public_weight: float = 0.5
    feedback_blocks: int = 2
    estimate_bits: int = 8
    map_examples: int = 256
    map_components: int = 48
    map_refresh: int = 8
    blend: float = 0.5
    blend_scale: float = 1.0
    pool_size: int = 1
    rectification: Rectification = Rectification.NONE
    seed_pool_size: int = 4096
    candidates: int = 10
    variance_threshold: float = 0.5
    most_held_rounds: int = 3
    warm_start_rounds: int = 20
    warm_start_learning_rate: float = 0.03
    local_steps: int = 1
    local_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        rates = ("learning_rate", "warm_start_learning_rate", "local_learning_rate", "variance_threshold")
        for name in (*rates, "column_scale", "random_scale", "blend_scale"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"arm.{name}", value, "> 0")
        counts = ("queries", "public_batch_size", "pool_size", "local_steps", "feedback_blocks", "map_components", "map_refresh")
        for name in (*counts, "seed_pool_size", "candidates", "warm_start_rounds"):
            _check(getattr(self, name) >= 1, f"arm.{name}", getattr(self, name), ">= 1")
        for name in ("guide_bits", "estimate_bits"):
            _check(getattr(self, name) in SUPPORTED_BITS, f"arm.{name}", getattr(self, name), "4, 8 or 32")
        _check(self.map_examples >= 8, "arm.map_examples", self.map_examples, ">= 8")
        needs = 1 + self.feedback_blocks
        _check(
            self.name is not ArmName.FEEDBACK or self.queries >= needs,
            "arm.queries",
            self.queries,
            f">= {needs}: one for the estimate and one per block",
        )
        _check(self.seed_pool_size <= 1 << 32, "arm.seed_pool_size", self.seed_pool_size, "<= 2**32")
        _check(self.most_held_rounds >= 0, "arm.most_held_rounds", self.most_held_rounds, ">= 0")
        _check(self.effective_rank >= 0, "arm.effective_rank", self.effective_rank, ">= 0")
        _check(0 <= self.basis_size <= 1000, "arm.basis_size", self.basis_size, "0 to 1000")
        _check(0 <= self.public_weight <= 1, "arm.public_weight", self.public_weight, "in [0, 1]")
        _check(0 < self.blend <= 1, "arm.blend", self.blend, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run's numbers.

    Attributes:
        recipe: Name of the recipe it came from.
        model: Model and adapter.
        data: Public and private text.
        federation: Devices, edges and batches.
        optimizer: Server optimiser.
        arm: Method.
        num_rounds: Rounds, >= 1.
        seed: Names every random choice of the run, in [0, 2⁶³).
        evaluate_every: Rounds between evaluations, >= 1.
        validates: Whether the accuracy on the validation part is measured too, for choosing settings.
        checkpoint_every: Rounds between checkpoints, >= 1; the log between them is replayed on resume.
        engine: What carries messages.
        memory_mib: Memory that the points of one batched pass may take on a device, > 0; None evaluates one point at a time.
    """

    recipe: str = "demo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    arm: ArmConfig = field(default_factory=ArmConfig)
    num_rounds: int = 60
    seed: int = 0
    evaluate_every: int = 5
    validates: bool = False
    checkpoint_every: int = 20
    engine: EngineName = EngineName.GRID
    memory_mib: float | None = None

    def __post_init__(self) -> None:
        _check(self.num_rounds >= 1, "num_rounds", self.num_rounds, ">= 1")
        _check(0 <= self.seed < 1 << 63, "seed", self.seed, "in [0, 2**63)")
        _check(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, ">= 1")
        _check(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, ">= 1")
        _check(self.memory_mib is None or self.memory_mib > 0, "memory_mib", self.memory_mib, "> 0, or none")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Turns a configuration into plain values for JSON.

    Args:
        config: Any configuration.

    Returns:
        Nested dictionaries of strings, numbers and lists.

    Example:
        >>> to_plain(RunConfig())["arm"]["name"]
        'measured'
    """
    return msgspec.to_builtins(config)


def from_plain(values: object, *, where: str) -> RunConfig:
    """Reads a configuration back.

    Args:
        values: Output of `to_plain`, possibly edited by hand.
        where: File or place, for the error's sentence.

    Returns:
        The same configuration.

    Raises:
        ConfigError: If a value is missing its type or domain.

    Example:
        >>> from_plain(to_plain(RunConfig()), where="here") == RunConfig()
        True
    """
    try:
        config = msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    unknown = _unknown_keys(values, to_plain(config))
    if unknown:
        raise ConfigError(f"{where}: {', '.join(unknown)} found, which is no setting; compare the spelling with `cooperllm.config`")
    return config


def _unknown_keys(found: Any, known: Any, path: str = "") -> list[str]:
    if not isinstance(found, dict) or not isinstance(known, dict):
        return []
    pairs: dict[str, Any] = found
    return [
        name
        for key, value in pairs.items()
        for name in ([f"{path}{key}"] if key not in known else _unknown_keys(value, known[key], f"{path}{key}."))
    ]


def _check(holds: bool, where: str, found: object, expected: str) -> None:  # noqa: FBT001 -- the condition itself
    if not holds:
        raise ConfigError(f"{where}: found {found!r}, expected {expected}")
