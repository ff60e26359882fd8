"""What answers a plan: how many numbers of each kind, of which groups, and how large. Edges judge devices by it, the cloud edges."""

import numpy as np
from jaxtyping import Float32

from cooperllm.messages import Grouping, Plan

LARGEST_NUMBER = 1e15
"""Slopes, and what is made of them, above this are used by nobody: their squares, and sums of those, still are numbers."""


def lengths_of(plan: Plan) -> tuple[int, int, int]:
    """Counts what a plan asks for.

    Args:
        plan: The round.

    Returns:
        (slopes along columns, slopes along random directions, blocks of an estimate).

    Example:
        >>> from cooperllm.messages import Probes
        >>> probes = Probes(measures_columns=True, num_random=4, grouping=Grouping.EDGE, column_scale=1.0, random_scale=1.0)
        >>> plan = Plan(round_index=0, model_version=0, guide_version=0, theta_hash=bytes(16), seed=1, cohort=(7,), batch_size=1,
        ...             guide=None, guide_hash=bytes(16), num_columns=2, probes=probes)
        >>> lengths_of(plan), wants_estimate(plan), group_of(plan, edge_id=3, device_id=7)
        ((2, 4, 0), False, 3)
    """
    probes = plan.probes
    columns, random = (plan.num_columns if probes.measures_columns else 0, probes.num_random) if probes is not None else (0, 0)
    return columns, random, 0 if plan.feedback is None else len(plan.feedback.blocks)


def wants_estimate(plan: Plan) -> bool:
    """Tells whether answers have a vector of the model's length.

    Args:
        plan: The round.

    Returns:
        Whether an estimate or a change of θ is asked for.

    Example:
        See `lengths_of`.
    """
    return plan.feedback is not None or plan.local_training is not None


def group_of(plan: Plan, edge_id: int, device_id: int) -> int:
    """Says whose random directions a device probes.

    Args:
        plan: Names the grouping.
        edge_id: The device's edge.
        device_id: The device.

    Returns:
        Number of the group.

    Example:
        See `lengths_of`.
    """
    if plan.probes is None or plan.probes.grouping is Grouping.SHARED:
        return 0
    return edge_id if plan.probes.grouping is Grouping.EDGE else device_id


def are_usable(*vectors: Float32[np.ndarray, "_k"], largest: float = LARGEST_NUMBER) -> bool:
    """Tells whether numbers can be calculated with.

    Args:
        vectors: Any, of any lengths.
        largest: Bound of their sizes.

    Returns:
        Whether all are finite and within it.

    Example:
        >>> are_usable(np.ones(2, np.float32), np.zeros(0, np.float32)), are_usable(np.array([np.nan], np.float32))
        (True, False)
    """
    return all(bool((np.abs(values) <= largest).all()) for values in vectors)
