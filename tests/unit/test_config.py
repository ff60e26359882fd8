"""Settings: every value outside its domain is a sentence with the field, what was found and what was expected.

Run: pytest tests/unit/test_config.py
"""

import json
import math
from dataclasses import replace

import pytest

from cooperllm.config import (
    MOST_CANDIDATES,
    MOST_LOCAL_STEPS,
    MOST_QUERIES,
    ArmConfig,
    ArmName,
    DataConfig,
    FederationConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    Partition,
    RunConfig,
    RuntimeName,
    SlopeMethod,
    SourceConfig,
    WeightType,
    from_plain,
    to_plain,
)
from cooperllm.errors import ConfigError, CooperLLMError

POSITIVE_COUNTS = (
    *("queries", "public_batch_size", "pool_size", "local_steps", "map_components", "map_rank", "map_refresh"),
    *("seed_pool_size", "candidates", "warm_start_rounds"),
)
RATES = ("learning_rate", "warm_start_learning_rate", "local_learning_rate", "variance_threshold")

OUTSIDE = [
    (ModelConfig, {"name": ""}, "model.name", "''"),
    (ModelConfig, {"rank": 0}, "model.rank", "0"),
    (ModelConfig, {"lora_alpha": 0}, "model.lora_alpha", "0"),
    (ModelConfig, {"last_layers": 0}, "model.last_layers", "0"),
    (ModelConfig, {"max_tokens": 1}, "model.max_tokens", "1"),
    (ModelConfig, {"objective": Objective.LABEL_WORDS, "prompt": "It was", "label_words": ("a", "b")}, "model.prompt", "'It was'"),
    (ModelConfig, {"objective": Objective.LABEL_WORDS, "label_words": ("good",)}, "model.label_words", "('good',)"),
    (ModelConfig, {"objective": Objective.LABEL_TEXTS, "label_words": ("a good film",)}, "model.label_words", "('a good film',)"),
    (ModelConfig, {"objective": Objective.LABEL_TEXTS, "label_words": ("a good film", " ")}, "model.label_words", "('a good film', ' ')"),
    (ModelConfig, {"packing": True}, "model.packing", "True"),
    (ModelConfig, {"objective": Objective.NEXT_TOKEN, "packing": True, "dtype": WeightType.INT8}, "model.packing", "True"),
    (SourceConfig, {"name": ""}, "data source name", "''"),
    (SourceConfig, {"max_examples": 0}, "max_examples", "0"),
    (SourceConfig, {"label_noise": 1.1}, "label_noise", "1.1"),
    (SourceConfig, {"label_noise": 0.5, "label_column": None}, "label_column", "None"),
    (DataConfig, {"num_test": 0}, "data.num_test", "0"),
    (DataConfig, {"num_validation": 0}, "data.num_validation", "0"),
    (FederationConfig, {"num_devices": 0}, "federation.num_devices", "0"),
    (FederationConfig, {"num_edges": 0}, "federation.num_edges", "0"),
    (FederationConfig, {"num_devices": 5, "num_edges": 6}, "federation.num_edges", "6"),
    (FederationConfig, {"devices_per_round": 0}, "federation.devices_per_round", "0"),
    (FederationConfig, {"num_devices": 20, "devices_per_round": 21}, "federation.devices_per_round", "21"),
    (FederationConfig, {"min_reports": 0}, "federation.min_reports", "0"),
    (FederationConfig, {"devices_per_round": 5, "min_reports": 6}, "federation.min_reports", "6"),
    (FederationConfig, {"batch_size": 0}, "federation.batch_size", "0"),
    (FederationConfig, {"dirichlet_alpha": 0.0}, "federation.dirichlet_alpha", "0.0"),
    (FederationConfig, {"dirichlet_alpha": math.nan}, "federation.dirichlet_alpha", "nan"),
    (FederationConfig, {"partition": Partition.COLUMN}, "federation.partition_column", "None"),
    (FederationConfig, {"label_adjustment": -0.1}, "federation.label_adjustment", "-0.1"),
    (FederationConfig, {"label_adjustment": math.nan}, "federation.label_adjustment", "nan"),
    (OptimizerConfig, {"momentum": 1.0}, "optimizer.momentum", "1.0"),
    (OptimizerConfig, {"momentum": -0.1}, "optimizer.momentum", "-0.1"),
    (OptimizerConfig, {"square_decay": 1.0}, "optimizer.square_decay", "1.0"),
    (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon", "0.0"),
    *[
        (ArmConfig, {name: value}, f"arm.{name}", repr(value))
        for name in (*RATES, "column_scale", "random_scale", "blend_scale")
        for value in (0.0, -1.0, math.nan, math.inf)
    ],
    *[(ArmConfig, {name: 0}, f"arm.{name}", "0") for name in POSITIVE_COUNTS],
    (ArmConfig, {"seed_pool_size": (1 << 32) + 1}, "arm.seed_pool_size", str((1 << 32) + 1)),
    (ArmConfig, {"most_held_rounds": -1}, "arm.most_held_rounds", "-1"),
    (ArmConfig, {"guide_bits": 16}, "arm.guide_bits", "16"),
    (ArmConfig, {"estimate_bits": 16}, "arm.estimate_bits", "16"),
    (ArmConfig, {"step_bits": 3}, "arm.step_bits", "3"),
    (ArmConfig, {"basis_size": -1}, "arm.basis_size", "-1"),
    (ArmConfig, {"queries": MOST_QUERIES + 1}, "arm.queries", str(MOST_QUERIES + 1)),
    (ArmConfig, {"queries": 5, "candidates": MOST_CANDIDATES // 5 + 1}, "arm.candidates", str(MOST_CANDIDATES // 5 + 1)),
    (ArmConfig, {"queries": MOST_QUERIES, "local_steps": MOST_LOCAL_STEPS + 1}, "arm.local_steps", str(MOST_LOCAL_STEPS + 1)),
    (ArmConfig, {"basis_size": 1001}, "arm.basis_size", "1001"),
    (ArmConfig, {"effective_rank": -1.0}, "arm.effective_rank", "-1.0"),
    (ArmConfig, {"effective_rank": math.nan}, "arm.effective_rank", "nan"),
    (ArmConfig, {"map_examples": 7}, "arm.map_examples", "7"),
    (ArmConfig, {"map_components": 129}, "arm.map_components", "129"),
    (ArmConfig, {"feedback_blocks": -1}, "arm.feedback_blocks", "-1"),
    (ArmConfig, {"map_examples": -8}, "arm.map_examples", "-8"),
    (ArmConfig, {"name": ArmName.FEEDBACK, "queries": 5, "feedback_blocks": 2, "local_steps": 3}, "arm.queries", "5"),
    (ArmConfig, {"name": ArmName.FEEDBACK, "queries": 1, "feedback_blocks": 0, "local_steps": 1}, "arm.queries", "1"),
    (ArmConfig, {"public_weight": 1.5}, "arm.public_weight", "1.5"),
    (ArmConfig, {"public_weight": -0.5}, "arm.public_weight", "-0.5"),
    (ArmConfig, {"blend": 0.0}, "arm.blend", "0.0"),
    (ArmConfig, {"blend": 1.1}, "arm.blend", "1.1"),
    (RunConfig, {"num_rounds": 0}, "num_rounds", "0"),
    (RunConfig, {"seed": -1}, "seed", "-1"),
    (RunConfig, {"seed": 1 << 63}, "seed", str(1 << 63)),
    (RunConfig, {"evaluate_every": 0}, "evaluate_every", "0"),
    (RunConfig, {"checkpoint_every": 0}, "checkpoint_every", "0"),
    (RunConfig, {"activation_mib": 0.0}, "activation_mib", "0.0"),
    (RunConfig, {"activation_mib": math.nan}, "activation_mib", "nan"),
    (RunConfig, {"model": ModelConfig(dtype=WeightType.INT8), "activation_mib": 9.0}, "activation_mib", "9.0"),
    (RunConfig, {"model": ModelConfig(dtype=WeightType.NF4), "slope_method": SlopeMethod.FORWARD_MODE}, "slope_method", "'forward-mode'"),
    (RunConfig, {"model": ModelConfig(dtype=WeightType.NF4), "runtime": RuntimeName.ONNX}, "runtime", "'onnx'"),
]

AT_THE_EDGE = [
    (ModelConfig, {"rank": 1, "last_layers": None, "max_tokens": 2, "lora_alpha": 1}),
    (SourceConfig, {"max_examples": 1}),
    (DataConfig, {"num_test": None, "num_validation": 1}),
    (FederationConfig, {"num_devices": 1, "num_edges": 1, "devices_per_round": 1, "min_reports": 1, "batch_size": 1}),
    (FederationConfig, {"label_adjustment": 0.0}),
    (FederationConfig, {"partition": Partition.COLUMN, "partition_column": "user"}),
    (OptimizerConfig, {"momentum": 0.0, "square_decay": 0.0}),
    (
        ArmConfig,
        {"name": ArmName.MEZO_FL, "queries": 1, "basis_size": 0, "public_weight": 1.0, "blend": 1.0, "effective_rank": 0.0},
    ),
    (
        ArmConfig,
        {"basis_size": 1000, "map_examples": 8, "map_components": 1, "map_rank": 1, "map_refresh": 1, "guide_bits": 4, "estimate_bits": 4},
    ),
    (ArmConfig, {"map_components": 128}),
    (ArmConfig, {"name": ArmName.FEEDBACK, "queries": 4, "feedback_blocks": 2, "local_steps": 1}),
    (ArmConfig, {"name": ArmName.FEEDBACK, "queries": 5, "feedback_blocks": 0, "local_steps": 3}),
    (ArmConfig, {"map_examples": 8}),
    (ArmConfig, {"name": ArmName.MEASURED, "queries": 2, "feedback_blocks": 2}),
    (ArmConfig, {"seed_pool_size": 1 << 32, "candidates": 1, "most_held_rounds": 0, "warm_start_rounds": 1}),
    (ArmConfig, {"public_weight": 0.0, "pool_size": 1, "local_steps": 1}),
    (RunConfig, {"seed": (1 << 63) - 1, "num_rounds": 1, "evaluate_every": 1, "checkpoint_every": 1, "activation_mib": None}),
]


def name_of(value):
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("kind", "values", "field", "found"), OUTSIDE, ids=name_of)
def test_a_value_outside_its_domain_is_a_sentence(kind, values, field, found):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    sentence = str(caught.value)
    assert sentence.startswith(f"{field}: found {found}, expected ")
    assert len(sentence.split(", expected ", 1)[1]) > 0


@pytest.mark.parametrize(("kind", "values"), AT_THE_EDGE, ids=name_of)
def test_a_value_at_the_edge_of_its_domain_is_accepted(kind, values):
    config = kind(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_every_setting_has_a_default_inside_its_domain():
    assert RunConfig().arm.name is ArmName.FEEDBACK


def test_a_setting_is_checked_again_when_it_is_replaced():
    with pytest.raises(ConfigError, match="num_rounds"):
        replace(RunConfig(), num_rounds=0)


def test_settings_cannot_be_changed_behind_a_run():
    with pytest.raises(AttributeError):
        RunConfig().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_error_is_a_value_error_and_one_of_ours():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CooperLLMError)


def test_settings_survive_json():
    config = RunConfig(
        recipe="mine",
        model=ModelConfig(objective=Objective.LABEL_WORDS, label_words=("bad", "good"), last_layers=None),
        data=DataConfig(public=SourceConfig(domains=("hotels",), keep_labels=("0",)), num_test=None),
        federation=FederationConfig(partition=Partition.COLUMN, partition_column="user"),
        optimizer=OptimizerConfig(kind=OptimizerKind.ADAM, momentum=1 / 3),
        arm=ArmConfig(name=ArmName.PAPER, learning_rate=1e-7, guide_bits=32),
        seed=(1 << 63) - 1,
        activation_mib=0.1,
    )
    assert from_plain(json.loads(json.dumps(to_plain(config))), where="here") == config


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"num_rounds": "many"}, ["int", "$.num_rounds"]),
        ({"num_rounds": 0}, ["num_rounds: found 0, expected >= 1"]),
        ({"arm": {"queries": 0}}, ["arm.queries: found 0, expected >= 1", "$.arm"]),
        ({"arm": {"name": "best"}}, ["'best'", "$.arm.name"]),
        ({"arm": {"learning_rate": None}}, ["float", "$.arm.learning_rate"]),
        ({"federation": {"partition": "column"}}, ["federation.partition_column: found None"]),
        ({"model": 3}, ["object", "$.model"]),
        ([], ["object"]),
        (None, ["object"]),
    ],
)
def test_settings_read_back_wrong_name_the_file_and_the_field(values, parts):
    with pytest.raises(ConfigError) as caught:
        from_plain(values, where="/runs/a/config.json")
    sentence = str(caught.value)
    assert sentence.startswith("/runs/a/config.json: ")
    assert [part for part in parts if part not in sentence] == []


def test_missing_settings_take_their_defaults():
    assert from_plain({"seed": 3}, where="here") == RunConfig(seed=3)
