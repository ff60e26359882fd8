"""Recipes: what they are called, and what one that is made from another leaves as it was.

Run: pytest tests/unit/test_recipes.py
"""

from dataclasses import replace

import pytest

from cooperllm.config import ArmName, Objective, OptimizerKind
from cooperllm.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_bears_the_name_of_its_recipe(name):
    made = recipe(name, "elsewhere")
    assert {made.with_arm(arm).recipe for arm in made.arms} == {name}


@pytest.mark.parametrize(("task", "num_classes"), [("sentiment-shift", 2), ("missing-topics", 4)])
def test_a_recipe_with_label_texts_differs_from_its_task_in_how_scores_are_made_and_in_rates_of_momentum_alone(task, num_classes):
    headed, compared = recipe(task, "elsewhere"), recipe(f"{task}-label-texts", "elsewhere")
    model = replace(headed.config.model, objective=Objective.LABEL_TEXTS, label_words=compared.config.model.label_words)
    for name in headed.arms:
        with_head, without = headed.with_arm(name), compared.with_arm(name)
        rates = ("learning_rate", "warm_start_learning_rate")
        factor = 1 if with_head.optimizer.kind is OptimizerKind.ADAM else 4
        scaled = {rate: factor * getattr(with_head.arm, rate) for rate in rates}
        assert {rate: getattr(without.arm, rate) for rate in rates} == scaled
        arm = replace(with_head.arm, **scaled)
        assert without == replace(with_head, recipe=f"{task}-label-texts", model=model, arm=arm)
    assert len(set(model.label_words)) == num_classes


@pytest.mark.parametrize("name", RECIPES)
def test_adam_has_one_rate_and_goes_to_the_arms_that_do_not_step_along_random_directions_alone(name):
    made = recipe(name, "elsewhere")
    adaptive = {arm for arm in made.arms if made.with_arm(arm).optimizer.kind is OptimizerKind.ADAM}
    assert adaptive == {ArmName.FEEDBACK, ArmName.MEASURED, ArmName.CLOUD_ONLY, ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED}
    rates = {0.005, 0.02} if name == "instructions" else {0.005}  # next tokens of a model that forgets what it knew
    assert {made.arms[arm].learning_rate for arm in adaptive} == rates
    assert made.config == made.with_arm(ArmName.FEEDBACK)
