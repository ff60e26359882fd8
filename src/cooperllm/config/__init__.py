"""A run's settings: frozen values, checked once, at construction, before anything runs."""

from cooperllm.config.arm import (
    MOST_MAP_COMPONENTS,
    SUPPORTED_BITS,
    ArmConfig,
    ArmName,
    Rectification,
    passes_of_estimates,
    queries_of_estimates,
)
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
    "MOST_MAP_COMPONENTS",
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
    "passes_of_estimates",
    "queries_of_estimates",
    "to_plain",
]
