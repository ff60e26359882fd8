"""How a device spends memory: what its passes hold, where states live, whether weights are packed. Results stay the same."""

from dataclasses import dataclass

DEFAULT_ROWS = 128
"""Tokens times points of one pass: more are no faster on the default model and take 30 MiB more, docs/devices.md. One point with more
examples is faster than two with fewer: each point multiplies with factors of its own, in small products."""

DEFAULT_QUOTA_MIB = 256.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Memory against time, on one device.

    Attributes:
        rows_per_pass: Tokens times points of one pass, >= 1; a pass holds at least one example at one point.
        keeps_graphs: Whether all graphs stay loaded, or only those that are at work.
        states_directory: Where states of the frozen prefix are kept on disk; None keeps them in memory.
        states_quota_mib: The most that they take on disk, >= 0.
        packs_weights: Whether the runtime lays out its own copies of weights for speed, instead of multiplying with mapped files.
        has_arena: Whether the runtime keeps freed memory for its next pass.
    """

    rows_per_pass: int = DEFAULT_ROWS
    keeps_graphs: bool = True
    states_directory: str | None = None
    states_quota_mib: float = DEFAULT_QUOTA_MIB
    packs_weights: bool = False
    has_arena: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """Describes the settings, for people."""
        return (
            f"{self.rows_per_pass} rows a pass" if self.rows_per_pass > 1 else "one text a pass",
            "states in memory" if self.states_directory is None else "states on disk",
            "all graphs loaded" if self.keeps_graphs else "one phase's graphs",
            "weights packed" if self.packs_weights else "weights mapped",
            "arena" if self.has_arena else "no arena",
        )


def ladder(states_directory: str, states_quota_mib: float) -> tuple[Settings, ...]:
    """Lists settings from the most frugal to the most generous.

    Args:
        states_directory: Where states go that are not to be in memory.
        states_quota_mib: The most that they take there, >= 0.

    Returns:
        Settings; each step up takes more memory and may take less time.

    Example:
        >>> [one.rows_per_pass for one in ladder("states", 256.0)]
        [1, 128, 128, 128, 512]
    """
    on_disk = Settings(rows_per_pass=1, keeps_graphs=False, states_directory=states_directory, states_quota_mib=states_quota_mib)
    return (
        on_disk,
        Settings(keeps_graphs=False, states_directory=states_directory, states_quota_mib=states_quota_mib),
        Settings(),
        Settings(packs_weights=True),
        Settings(rows_per_pass=512, packs_weights=True, has_arena=True),
    )
