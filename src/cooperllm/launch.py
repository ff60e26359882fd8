"""What accelerate's launcher says in the environment of a process, and what of it cannot be had here."""

from collections.abc import Mapping, MutableMapping

from cooperllm.errors import ConfigError

PLACE = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""What says that a process was launched, and as which."""

DIVIDES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What would divide the network among processes: process 0 evaluates, and may simulate devices, with the whole of it."""


def is_launched(environment: Mapping[str, str]) -> bool:
    """Tells whether accelerate's launcher, or PyTorch's, started this process.

    Args:
        environment: Of the process.

    Returns:
        Whether one of them did.

    Example:
        >>> is_launched({"ACCELERATE_MIXED_PRECISION": "no"}), is_launched({"HOME": "/"})
        (True, False)
    """
    return "ACCELERATE_MIXED_PRECISION" in environment or "LOCAL_RANK" in environment


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuses what accelerate was configured for and cannot be had here.

    Args:
        environment: Of the process.

    Raises:
        ConfigError: If it asks for a network in pieces, a precision that needs scaled losses, or compilation.
    """
    for name, words in DIVIDES.items():
        if environment.get(name, "").lower() in {"1", "true"}:
            raise ConfigError(
                f"accelerate: found {words}, expected the CPU, one GPU or several with the whole network on each; where it is too large "
                "for that choose --set model.dtype=nf4, or --set model.checkpoints_activations=true"
            )
    precision, compiler = environment.get("ACCELERATE_MIXED_PRECISION", "no"), environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if precision not in {"no", "bf16"}:
        raise ConfigError(f"accelerate: found mixed precision {precision}, expected no or bf16: with others losses would have to be scaled")
    if compiler.lower() != "no":
        raise ConfigError(f"accelerate: found the compiler {compiler}, expected none: θ enters a network as compilers do not expect it")


def forget_place(environment: MutableMapping[str, str]) -> None:
    """Takes out which process this is: it is not so for the processes that it starts.

    Args:
        environment: Of the process.
    """
    for name in PLACE:
        environment.pop(name, None)
