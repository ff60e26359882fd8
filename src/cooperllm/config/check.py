"""How a setting outside its domain is refused."""

from cooperllm.errors import ConfigError


def check(holds: bool, where: str, found: object, expected: str) -> None:  # noqa: FBT001 -- the condition itself
    """Refuses a setting whose condition does not hold.

    Args:
        holds: The condition.
        where: Name of the setting.
        found: Its value.
        expected: Its domain, in words.

    Raises:
        ConfigError: If the condition is false.

    Example:
        >>> check(1 > 0, "num_rounds", 1, ">= 1")
    """
    if not holds:
        raise ConfigError(f"{where}: found {found!r}, expected {expected}")
