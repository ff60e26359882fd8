"""What accelerate's launcher may ask for.

Run: pytest tests/unit/test_launch.py
"""

import pytest

from cooperllm.errors import ConfigError
from cooperllm.launch import check_launch, forget_place, is_launched


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"accelerate: found FSDP, expected .* several with the whole network on each"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "found DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "found Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "found a parallelism config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "found mixed precision fp16, expected no or bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "found the compiler INDUCTOR, expected none"),
    ],
)
def test_a_launch_that_asks_for_what_is_not_here_is_refused(environment, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_launch({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"} | environment)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plain_launch_is_not_refused(precision):
    """What `accelerate launch` sets, and `torchrun`, which sets none of it."""
    check_launch({"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"})
    check_launch({"LOCAL_RANK": "1"})


def test_processes_that_a_launched_one_starts_are_not_launched():
    environment = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no", "HOME": "/"}
    assert is_launched(environment)
    forget_place(environment)
    assert not is_launched(environment)
    assert environment == {"HOME": "/"}
