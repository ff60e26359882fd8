"""A small fixed job that watches the one figure the project exists for: rounds to accuracy, against plain zeroth-order.

Run: pytest tests/system/test_convergence.py
"""

from dataclasses import replace

import cooperllm
from cooperllm.config import ArmName, DataConfig, EngineName, FederationConfig, SourceConfig
from cooperllm.summary import rounds_to

ROUNDS = {ArmName.FEEDBACK: 12, ArmName.MEZO_FL: 60}
LAYERS = {ArmName.FEEDBACK: 2, ArmName.MEZO_FL: 1}
"""A layer that needs maps for the one, and what suits the other better: with two layers MeZO-FL gets no further than .595."""
SEEN = 56 / 6
"""The ratio when this test was written: MeZO-FL is at its best accuracy of 60 rounds after 56, feedback is there after 6."""


def curve(directory, arm):
    recipe = cooperllm.recipe("demo").with_arm(arm)
    config = replace(
        recipe,
        model=replace(recipe.model, last_layers=LAYERS[arm], max_tokens=24),
        data=DataConfig(public=SourceConfig(max_examples=128), private=SourceConfig(max_examples=400), num_test=200, num_validation=1),
        federation=FederationConfig(num_devices=8, num_edges=2, devices_per_round=4, batch_size=8),
        arm=replace(recipe.arm, map_examples=128),
        num_rounds=ROUNDS[arm],
        evaluate_every=1 if arm is ArmName.FEEDBACK else 4,
        engine=EngineName.LOOPBACK,
    )
    return cooperllm.run(config, directory / arm.value).summary["arms"][arm.value]["accuracy_by_round"]


def test_feedback_needs_no_more_rounds_against_plain_zeroth_order_than_it_did(tmp_path):
    plain, guided = (curve(tmp_path, arm) for arm in (ArmName.MEZO_FL, ArmName.FEEDBACK))
    best = max(accuracy for _, accuracy in plain)
    assert best > 0.58  # MeZO-FL learns: .475 at the start, .62 when this was written
    ratio = rounds_to(plain, best) / rounds_to(guided, best)
    assert ratio >= 0.8 * SEEN, f"MeZO-FL {plain}, feedback {guided}"
