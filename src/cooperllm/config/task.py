"""What is trained on what, by whom: model, texts, devices."""

import math
from dataclasses import dataclass, field
from enum import Enum

from cooperllm.config.check import check

NO_TEXT = "none"
"""Name of the public source of a cloud that has no text."""

UNLABELLED = -1
"""Class of a public text without a label."""


class AdapterKind(Enum):
    """What is trained."""

    LORA = "lora"
    IA3 = "ia3"
    FULL = "full"


class WeightType(Enum):
    """What frozen weights are kept in, and layers compute in; θ, losses and steps are float32 always.

    Of quantised ones (bitsandbytes) these are linear layers within the model, and layers compute in float32, with INT8 from activations in
    eight bits, too.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    NF4 = "nf4"

    @property
    def is_quantised(self) -> bool:
        """Whether weights are codes."""
        return self in {WeightType.INT8, WeightType.NF4}


class Objective(Enum):
    """What a model's scores are for: one per class, or one per token of the vocabulary wherever a token of a completion is due."""

    HEAD = "head"
    LABEL_WORDS = "label-words"
    LABEL_TEXTS = "label-texts"
    NEXT_TOKEN = "next-token"


class Partition(Enum):
    """How private examples are spread over devices."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    COLUMN = "column"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained, and what of it.

    Attributes:
        name: "minilm" (the packaged default), "tiny-llama" (random, for tests), a hub id, or a local directory.
        adapter: LoRA, IA3 or every parameter.
        objective: A classification head, label words after a prompt, label texts that a text is compared with, or the next token of a
            completion (`cooperllm.completion`).
        rank: LoRA rank, >= 1.
        lora_alpha: LoRA scale times rank, > 0.
        target_modules: Names of the adapted linear layers; empty lets PEFT choose for the architecture.
        last_layers: How many of the last layers are adapted, >= 1; None adapts all.
        max_tokens: Texts are cut at this many tokens, >= 2.
        prompt: For label words and next tokens: the text with {text} (and {text2}) to be filled in.
        uses_chat_template: Whether, for next tokens, the tokeniser's own chat template stands in place of the prompt.
        packing: Whether, for next tokens, short examples share rows, each with positions of its own and attention to nothing else. With
            PyTorch, and models that `transformers` can tell examples apart for.
        calibrates: Whether, for label words, what the pretrained model says of no text at all is taken off its scores.
        label_words: One word, or for label texts one short text, per class, in the order of the labels.
        dtype: What the frozen weights are kept in; every weight that is trained is float32.
        checkpoints_activations: Whether the cloud's backward passes keep the inputs of layers alone and run them once more: the same bits.
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
    uses_chat_template: bool = False
    packing: bool = False
    calibrates: bool = False
    label_words: tuple[str, ...] = ()
    dtype: WeightType = WeightType.FLOAT32
    checkpoints_activations: bool = False
    caches_prefix: bool = True

    def __post_init__(self) -> None:
        check(bool(self.name), "model.name", self.name, "a name, hub id or directory")
        check(self.rank >= 1, "model.rank", self.rank, ">= 1")
        check(self.lora_alpha > 0, "model.lora_alpha", self.lora_alpha, "> 0")
        check(self.last_layers is None or self.last_layers >= 1, "model.last_layers", self.last_layers, ">= 1, or none")
        check(self.max_tokens >= 2, "model.max_tokens", self.max_tokens, ">= 2")
        is_whole = self.adapter is AdapterKind.FULL and self.dtype is not WeightType.FLOAT32
        check(not is_whole, "model.dtype", self.dtype.value, "float32 for the adapter full: every weight is trained")
        is_next_token, is_of_words = self.objective is Objective.NEXT_TOKEN, self.objective is Objective.LABEL_WORDS
        if is_of_words or is_next_token:
            check("{text}" in self.prompt, "model.prompt", self.prompt, "a prompt that contains {text}")
        expected = f"false for the objective {self.objective.value}: chat templates are for next-token"
        check(is_next_token or not self.uses_chat_template, "model.uses_chat_template", self.uses_chat_template, expected)
        expected = f"false for the objective {self.objective.value}: only examples for next-token share rows"
        check(is_next_token or not self.packing, "model.packing", self.packing, expected)
        is_mixed = self.packing and self.dtype is WeightType.INT8
        check(not is_mixed, "model.packing", self.packing, "false for weights in int8: what shares a pass decides how they round")
        expected = f"false for the objective {self.objective.value}: calibration is for label-words"
        check(is_of_words or not self.calibrates, "model.calibrates", self.calibrates, expected)
        if is_of_words:
            check(len(self.label_words) >= 2, "model.label_words", self.label_words, "one word per class")
        if self.objective is Objective.LABEL_TEXTS:
            one_each = len(self.label_words) >= 2 and all(text.strip() for text in self.label_words)
            check(one_each, "model.label_words", self.label_words, "one short text per class")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where labelled texts come from.

    Attributes:
        name: "generated", a file (.jsonl, .json, .csv, .parquet), a directory with train, validation and test files, a data set on
            the hub, or, for a cloud without public text, "none".
        domains: For generated text: its domains; empty means all of the side's default ones.
        text_column: Column with the text.
        second_text_column: Column with the second text of a pair, or None.
        label_column: Column with the label: a number from 0, or a name; None for public text without labels, and for next tokens.
        completion_column: For next tokens: column with what is to be said after the prompt; None to learn the texts themselves.
        label_noise: Share of training labels replaced by labels drawn evenly, in [0, 1], to study what bad labels do.
        keep_labels: Labels kept in the training part, by name or number; empty keeps all.
        max_examples: At most this many training examples, chosen by the seed; None keeps all.
        streams: For a data set on the hub: whether so many examples of each part are read from a shuffled stream, and nothing more of it
            is fetched; parts that are missing are carved from them.
    """

    name: str = "generated"
    domains: tuple[str, ...] = ()
    text_column: str = "text"
    second_text_column: str | None = None
    label_column: str | None = "label"
    completion_column: str | None = None
    label_noise: float = 0.0
    keep_labels: tuple[str, ...] = ()
    max_examples: int | None = None
    streams: bool = False

    def __post_init__(self) -> None:
        check(bool(self.name), "data source name", self.name, "'generated', a path or a data set")
        check(0 <= self.label_noise <= 1, "label_noise", self.label_noise, "in [0, 1]")
        needs_labels = self.label_column is None and bool(self.keep_labels or self.label_noise)
        check(not needs_labels, "label_column", None, "a column name where labels are chosen or replaced")
        check(self.max_examples is None or self.max_examples >= 1, "max_examples", self.max_examples, ">= 1, or none")
        check(
            not self.streams or self.max_examples is not None, "max_examples", None, "a number where a data set is streamed: it has no end"
        )


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
        check(self.private.name != NO_TEXT, "data.private", NO_TEXT, "'generated', a path or a data set: devices need examples")
        check(self.num_test is None or self.num_test >= 1, "data.num_test", self.num_test, ">= 1, or none")
        check(self.num_validation is None or self.num_validation >= 1, "data.num_validation", self.num_validation, ">= 1, or none")


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
        staleness: Rounds that devices may be behind, 0 or 1. With 1 they work on the next round while answers travel and are folded: a
            step is made from gradients at the θ before the last step.
        over_selection: Devices that are asked for each one that is waited for, >= 1: of six that are asked an edge waits for five with 1.2,
            and whoever has not answered then is late. Only where devices are processes of their own: who is in time is a matter of speed.
        adapts_bits: Whether an edge asks devices on slow links for estimates of fewer bits, `edge.schedule`. Only where they are processes
            of their own: a run's bits then depend on how fast they were; its log says what every step was all the same.
        label_adjustment: Strength τ with which a device's loss allows for its own label shares, >= 0; 0 is plain cross entropy. For every
            arm alike.
    """

    num_devices: int = 20
    num_edges: int = 4
    devices_per_round: int = 5
    min_reports: int = 1
    batch_size: int = 16
    partition: Partition = Partition.DIRICHLET
    dirichlet_alpha: float = 0.5
    partition_column: str | None = None
    staleness: int = 0
    over_selection: float = 1.0
    adapts_bits: bool = False
    label_adjustment: float = 1.0

    @property
    def devices_asked(self) -> int:
        """Devices that are sent a round."""
        return math.ceil(self.devices_per_round * self.over_selection)

    def __post_init__(self) -> None:
        check(self.staleness in {0, 1}, "federation.staleness", self.staleness, "0 or 1")
        check(0 <= self.label_adjustment < math.inf, "federation.label_adjustment", self.label_adjustment, ">= 0")
        check(self.num_devices >= 1, "federation.num_devices", self.num_devices, ">= 1")
        check(1 <= self.num_edges <= self.num_devices, "federation.num_edges", self.num_edges, f"1 to {self.num_devices}")
        check(
            1 <= self.devices_per_round <= self.num_devices,
            "federation.devices_per_round",
            self.devices_per_round,
            f"1 to {self.num_devices}, the number of devices",
        )
        check(
            1 <= self.min_reports <= self.devices_per_round,
            "federation.min_reports",
            self.min_reports,
            f"1 to {self.devices_per_round}, the devices of a round",
        )
        most = self.num_devices / self.devices_per_round
        check(1 <= self.over_selection <= most, "federation.over_selection", self.over_selection, f"1 to {most:g}, all devices")
        check(self.batch_size >= 1, "federation.batch_size", self.batch_size, ">= 1")
        check(self.dirichlet_alpha > 0, "federation.dirichlet_alpha", self.dirichlet_alpha, "> 0")
        needs_column = self.partition is Partition.COLUMN and self.partition_column is None
        check(not needs_column, "federation.partition_column", None, "a column name for the column partition")
