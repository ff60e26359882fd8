"""A run's settings: frozen values, checked once, at construction, before anything runs."""

from cooperllm.config.arm import SUPPORTED_BITS, ArmConfig, ArmName, Rectification
from cooperllm.config.run import EngineName, OptimizerConfig, OptimizerKind, RunConfig, RuntimeName, Variant, from_plain, to_plain
from cooperllm.config.task import (
    NO_TEXT,
    UNLABELLED,
    AdapterKind,
    DataConfig,
    FederationConfig,
    ModelConfig,
    Objective,
    Partition,
    SourceConfig,
)

__all__ = [
    "NO_TEXT",
    "SUPPORTED_BITS",
    "UNLABELLED",
    "AdapterKind",
    "ArmConfig",
    "ArmName",
    "DataConfig",
    "EngineName",
    "FederationConfig",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "OptimizerKind",
    "Partition",
    "Rectification",
    "RunConfig",
    "RuntimeName",
    "SourceConfig",
    "Variant",
    "from_plain",
    "to_plain",
]
