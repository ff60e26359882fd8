"""A whole run, and its plain form for files."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from cooperllm.config.arm import ArmConfig, ArmName
from cooperllm.config.check import check
from cooperllm.config.task import DataConfig, FederationConfig, ModelConfig, Objective, WeightType
from cooperllm.errors import ConfigError


class OptimizerKind(Enum):
    """The server's optimiser; SGD keeps nothing beside θ, for models whose every weight is trained."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    ADAM = "adam"


class EngineName(Enum):
    """What carries messages between the tiers; FLEET: they are processes, which have commands of their own."""

    LOOPBACK = "loopback"
    GRID = "grid"
    SIMULATION = "simulation"
    FLEET = "fleet"


STALE_ARMS = frozenset({
    ArmName.FEEDBACK, ArmName.MEZO_FL, ArmName.DECOMFL, ArmName.FEDKSEED, ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED
})  # fmt: skip
"""Arms whose steps can be made from answers about an earlier θ: none is named along that θ's momentum or public gradients."""


class DeviceScore(Enum):
    """What devices measure slopes of: the loss, or, generating answers, one less a score of them that has no derivative."""

    LOSS = "loss"
    EXACT_MATCH = "exact-match"
    F1 = "f1"


SLOPE_ARMS = frozenset({
    ArmName.MEASURED, ArmName.PAPER, ArmName.MEZO_FL, ArmName.DECOMFL, ArmName.FEDKSEED, ArmName.FWDLLM, ArmName.WARM_START
})  # fmt: skip
"""Arms whose devices measure slopes along directions, of whatever gives a number."""


class Variant(Enum):
    """How a device package keeps the frozen weights."""

    FP32 = "fp32"
    INT8 = "int8"
    INT8_WEIGHTS = "int8-weights"
    INT4 = "int4"


class RuntimeName(Enum):
    """What computes a device's forward passes: PyTorch, or ONNX Runtime or OpenVINO from a device package."""

    TORCH = "torch"
    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"
    ONNX_INT8_WEIGHTS = "onnx-int8-weights"
    ONNX_INT4 = "onnx-int4"
    OPENVINO = "openvino"


class SlopeMethod(Enum):
    """How a device measures slopes: differences of two losses, or derivatives in forward mode, `algorithm.zeroth_order`.

    NOISE_AWARE takes differences where some half-step outgrows the device's rounding, `algorithm.rounding`, and forward mode elsewhere.
    """

    TWO_SIDED = "two-sided"
    FORWARD_MODE = "forward-mode"
    NOISE_AWARE = "noise-aware"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The server's optimiser, which every replica replays.

    Attributes:
        kind: SGD, momentum or Adam.
        momentum: Decay γ of the first moment, in [0, 1).
        square_decay: Decay ν of Adam's second moment, in [0, 1).
        epsilon: Adam's ε, > 0.
        rolls_back: Whether a run that has diverged goes back to its best θ and continues with half the step size.
    """

    kind: OptimizerKind = OptimizerKind.MOMENTUM
    momentum: float = 0.9
    square_decay: float = 0.99
    epsilon: float = 1e-8
    rolls_back: bool = True

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        check(0 <= self.square_decay < 1, "optimizer.square_decay", self.square_decay, "in [0, 1)")
        check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "> 0")


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
        runtime: What computes the devices' forward passes.
        activation_mib: Memory that the points of one batched pass may take on a device, > 0; None evaluates one point at a time, or in
            forward mode one point with four directions.
        slope_method: How devices measure slopes; arms that ask their devices for none are the same with either.
        device_score: What they measure slopes of.
    """

    recipe: str = "demo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(kind=OptimizerKind.ADAM))
    arm: ArmConfig = field(default_factory=ArmConfig)
    num_rounds: int = 60
    seed: int = 0
    evaluate_every: int = 5
    validates: bool = False
    checkpoint_every: int = 20
    engine: EngineName = EngineName.GRID
    runtime: RuntimeName = RuntimeName.TORCH
    activation_mib: float | None = None
    slope_method: SlopeMethod = SlopeMethod.TWO_SIDED
    device_score: DeviceScore = DeviceScore.LOSS

    def __post_init__(self) -> None:
        check(self.num_rounds >= 1, "num_rounds", self.num_rounds, ">= 1")
        check(0 <= self.seed < 1 << 63, "seed", self.seed, "in [0, 2**63)")
        check(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, ">= 1")
        check(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, ">= 1")
        learns_alone = self.arm.name in {ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED}
        needs_torch = learns_alone and self.runtime is not RuntimeName.TORCH
        check(not needs_torch, "runtime", self.runtime.value, f"torch for the arm {self.arm.name.value}: its devices back-propagate")
        expected = f"false for the runtime {self.runtime.value}: in packages every example has a row of its own"
        check(not self.model.packing or self.runtime is RuntimeName.TORCH, "model.packing", self.model.packing, expected)
        is_bound = self.arm.name not in STALE_ARMS or self.arm.pool_size > 1
        expected = (
            f"0 for the arm {self.arm.name.value} with a pool of {self.arm.pool_size}: its steps are named by the θ that they start from"
        )
        check(not (self.federation.staleness and is_bound), "federation.staleness", self.federation.staleness, expected)
        follows = self.optimizer.kind is OptimizerKind.SGD and self.arm.name in {ArmName.MEASURED, ArmName.FWDLLM}
        expected = f"momentum or adam for the arm {self.arm.name.value}: it looks along the server's momentum"
        check(not follows, "optimizer.kind", self.optimizer.kind.value, expected)
        self._check_weights()
        self._check_objective()
        check(self.activation_mib is None or self.activation_mib > 0, "activation_mib", self.activation_mib, "> 0, or none")

    def _check_weights(self) -> None:
        """Refuses what does not go with the type of the frozen weights."""
        dtype = self.model.dtype
        rounds_weights = dtype is not WeightType.FLOAT32 and self.runtime is not RuntimeName.TORCH
        expected = f"torch for weights in {dtype.value}: packages have variants of their own, such as onnx-int8"
        check(not rounds_weights, "runtime", self.runtime.value, expected)
        # bitsandbytes has neither derivatives in forward mode (nf4 loses them without a word) nor batches of points.
        has_slopes = not dtype.is_quantised or self.slope_method is SlopeMethod.TWO_SIDED
        check(has_slopes, "slope_method", self.slope_method.value, f"two-sided for weights in {dtype.value}: they have no forward mode")
        has_points = not dtype.is_quantised or self.activation_mib is None
        check(has_points, "activation_mib", self.activation_mib, f"none for weights in {dtype.value}: points are evaluated one at a time")

    def _check_objective(self) -> None:
        """Refuses data and arms that do not go with what is learned."""
        is_next_token, private = self.model.objective is Objective.NEXT_TOKEN, self.data.private
        needs_label = private.label_column is None and not is_next_token
        check(
            not needs_label, "data.private.label_column", None, "a column name: devices need labels, unless model.objective is next-token"
        )
        for side, source in (("public", self.data.public), ("private", private)):
            expected = f"none for the objective {self.model.objective.value}: completions are for next-token"
            check(is_next_token or source.completion_column is None, f"data.{side}.completion_column", source.completion_column, expected)
        if self.device_score is not DeviceScore.LOSS:
            found = self.device_score.value
            says = is_next_token and private.completion_column is not None
            check(says, "device_score", found, "loss, or the objective next-token with a completion column: answers are compared with it")
            measures = self.arm.name in SLOPE_ARMS
            check(
                measures, "device_score", found, f"loss for the arm {self.arm.name.value}: a score of answers has slopes, and no gradient"
            )
            on_torch = self.runtime is RuntimeName.TORCH and self.slope_method is SlopeMethod.TWO_SIDED
            check(on_torch, "device_score", found, "loss, or --runtime torch and two-sided slopes: packages do not generate")
        asks_maps = is_next_token and self.arm.name is ArmName.FEEDBACK and self.arm.map_examples > 0
        check(not asks_maps, "arm.map_examples", self.arm.map_examples, "0 for the objective next-token: maps are fitted for class scores")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Turns a configuration into plain values for JSON.

    Args:
        config: Any configuration.

    Returns:
        Nested dictionaries of strings, numbers and lists.

    Example:
        >>> to_plain(RunConfig())["arm"]["name"]
        'feedback'
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
