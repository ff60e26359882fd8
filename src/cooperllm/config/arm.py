"""A method and its own dials."""

import math
from dataclasses import dataclass
from enum import Enum

from cooperllm.config.check import check

SUPPORTED_BITS = (1, 2, 4, 8, 32)
"""Bits per entry that vectors can be packed with; 32 is exact."""

MOST_QUERIES, MOST_CANDIDATES, MOST_LOCAL_STEPS = 1 << 12, 1 << 16, 1 << 10
"""Random directions that a device may be asked to measure in a round, directions made to choose them from, and steps by itself: a device
refuses what would keep it at work for days."""

MOST_MAP_COMPONENTS = 128
"""Principal components of a layer's output that maps may depend on, at most."""


class ArmName(Enum):
    """The methods that share this frame."""

    FEEDBACK = "feedback"
    MEASURED = "measured"
    PAPER = "paper"
    MEZO_FL = "mezo-fl"
    DECOMFL = "decomfl"
    FEDKSEED = "fedkseed"
    FWDLLM = "fwdllm"
    WARM_START = "warm-start"
    CLOUD_ONLY = "cloud-only"
    FEDAVG_BP = "fedavg-bp"
    FEDAVG_BP_CHECKPOINTED = "fedavg-bp-checkpointed"


class Distribution(Enum):
    """Of the entries of isotropic random directions: both have mean 0 and variance 1, so that estimates have the same scale."""

    NORMAL = "normal"
    RADEMACHER = "rademacher"


class Rectification(Enum):
    """How the paper's arm mixes the cloud's gradient into the estimate."""

    NONE = "none"
    OPTIMAL = "optimal"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One method and its own dials.

    Attributes:
        name: The method.
        learning_rate: Step size η, > 0; what is right for Adam, the default, is not for momentum.
        distribution: Of the entries of isotropic random directions, normal or signs; signs are made in a thirtieth of the time.
        queries: Two-point queries per device and round, >= 1, for every zeroth-order arm.
        column_scale: Half-step μ along a unit direction, > 0.
        random_scale: Half-step μ along a standard normal direction, > 0.
        signal_to_noise: How many times its own rounding a two-point slope is to be, >= 0: devices with rounded weights or activations
            take longer half-steps for it; 0 leaves half-steps as they are.
        guide_bits: Bits per entry of packed columns and of the bases of maps: 1, 2, 4, 8 or 32.
        public_batch_size: Public examples per round, >= 1.
        basis_size: Measured arm: public examples whose gradients random probes are mixed from, 0 to 1000; 0 leaves them isotropic.
        effective_rank: Measured arm: rank r that shrinks P isotropic probes by P/(P+r), >= 0.
        public_weight: Measured arm: weight λ of the cloud's own gradient along the columns, in [0, 1]; 0 where public data lack a class.
        feedback_blocks: Feedback arm: blocks of layers below the last one whose estimate is measured, one query each, >= 0; fewer where
            the model has fewer. Without maps there is nothing to correct.
        estimate_bits: Feedback arm: bits per entry of what a device sends: 1, 2, 4, 8 or 32.
        step_bits: Measured and feedback arm: bits per entry of the step that everyone replays: 1, 2, 4, 8 or 32.
        map_examples: Feedback arm: public texts that maps are fitted on, >= 8; 0 fits none, and the
            gradient is carried down from layer to layer.
        map_components: Feedback arm: principal components of a layer's output that maps may depend on, 1 to 128.
        map_rank: Feedback arm: rank of what one refresh says of a layer, >= 1.
        map_refresh: Feedback arm: rounds between two fits in the long run, >= 1.
        blend: Paper's arm: share α of the isotropic part, in (0, 1].
        blend_scale: Paper's arm: length β, > 0.
        pool_size: Paper's arm: public gradients kept, newest first, >= 1.
        rectification: Paper's arm: whether the cloud's gradient is mixed in with the weight λ* of the theory.
        seed_pool_size: FedKSeed: random directions K that a run has in all, 1 to 2³².
        candidates: FwdLLM: directions made for each query, of which one is used, >= 1; 1 selects nothing.
        variance_threshold: FwdLLM: relative variance of the mean slope along the last step below which a step is made, > 0.
        most_held_rounds: FwdLLM: rounds that a step waits at most, >= 0; 0 steps every round.
        warm_start_rounds: Warm start: rounds of back-propagation at the cloud before the first device is asked, >= 1.
        warm_start_learning_rate: Warm start: step size of those rounds, > 0.
        local_steps: Feedback arm and FedAvg: steps that a device takes by itself in a round, each on a batch of its own, >= 1.
        local_learning_rate: Feedback arm and FedAvg: size of those steps, > 0.
    """

    name: ArmName = ArmName.FEEDBACK
    learning_rate: float = 0.005
    distribution: Distribution = Distribution.NORMAL
    queries: int = 5
    column_scale: float = 0.03
    random_scale: float = 1e-3
    signal_to_noise: float = 7.0
    guide_bits: int = 4
    public_batch_size: int = 64
    basis_size: int = 64
    effective_rank: float = 500.0
    public_weight: float = 0.5
    feedback_blocks: int = 0
    estimate_bits: int = 4
    step_bits: int = 4
    map_examples: int = 0
    map_components: int = 48
    map_rank: int = 16
    map_refresh: int = 8
    blend: float = 0.5
    blend_scale: float = 1.0
    pool_size: int = 1
    rectification: Rectification = Rectification.NONE
    seed_pool_size: int = 4096
    candidates: int = 10
    variance_threshold: float = 0.5
    most_held_rounds: int = 3
    warm_start_rounds: int = 20
    warm_start_learning_rate: float = 0.03
    local_steps: int = 3
    local_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        rates = ("learning_rate", "warm_start_learning_rate", "local_learning_rate", "variance_threshold")
        for name in (*rates, "column_scale", "random_scale", "blend_scale"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"arm.{name}", value, "> 0")
        counts = (
            "queries",
            "public_batch_size",
            "pool_size",
            "local_steps",
            "map_components",
            "map_rank",
            "map_refresh",
        )
        for name in (*counts, "seed_pool_size", "candidates", "warm_start_rounds"):
            check(getattr(self, name) >= 1, f"arm.{name}", getattr(self, name), ">= 1")
        for name in ("guide_bits", "estimate_bits", "step_bits"):
            check(getattr(self, name) in SUPPORTED_BITS, f"arm.{name}", getattr(self, name), f"one of {SUPPORTED_BITS}")
        check(self.queries <= MOST_QUERIES, "arm.queries", self.queries, f"<= {MOST_QUERIES}")
        most = MOST_CANDIDATES // self.queries
        check(self.candidates <= most, "arm.candidates", self.candidates, f"<= {most}: {MOST_CANDIDATES} for all queries together")
        check(self.local_steps <= MOST_LOCAL_STEPS, "arm.local_steps", self.local_steps, f"<= {MOST_LOCAL_STEPS}")
        check(self.feedback_blocks >= 0, "arm.feedback_blocks", self.feedback_blocks, ">= 0")
        check(self.map_components <= MOST_MAP_COMPONENTS, "arm.map_components", self.map_components, f"<= {MOST_MAP_COMPONENTS}")
        check(self.map_examples == 0 or self.map_examples >= 8, "arm.map_examples", self.map_examples, "0 or >= 8")
        needs = queries_of_estimates(self.local_steps) + self.feedback_blocks
        check(
            self.name is not ArmName.FEEDBACK or self.queries >= needs,
            "arm.queries",
            self.queries,
            f">= {needs}: three for every two estimates and one per block (arm.local_steps, arm.feedback_blocks)",
        )
        check(self.seed_pool_size <= 1 << 32, "arm.seed_pool_size", self.seed_pool_size, "<= 2**32")
        check(self.most_held_rounds >= 0, "arm.most_held_rounds", self.most_held_rounds, ">= 0")
        only_normal = self.name in {ArmName.PAPER, ArmName.FWDLLM}
        expected = f"normal for the arm {self.name.value}, whose scale is that of normal numbers"
        check(not only_normal or self.distribution is Distribution.NORMAL, "arm.distribution", self.distribution.value, expected)
        check(self.effective_rank >= 0, "arm.effective_rank", self.effective_rank, ">= 0")
        check(0 <= self.basis_size <= 1000, "arm.basis_size", self.basis_size, "0 to 1000")
        check(0 <= self.public_weight <= 1, "arm.public_weight", self.public_weight, "in [0, 1]")
        check(0 <= self.signal_to_noise < math.inf, "arm.signal_to_noise", self.signal_to_noise, ">= 0")
        check(0 < self.blend <= 1, "arm.blend", self.blend, "in (0, 1]")


def passes_of_estimates(num_steps: int) -> int:
    """Says how many forward passes feedback estimates count for: three each.

    One pass goes through to the loss, the layers below the last one run once more, and back-propagation inside layers, whose weights are
    frozen, costs about as much as a pass. With one, two and six adapted layers PyTorch took 1.9, 2.5 and 2.8 passes' time: docs/log.md.

    Args:
        num_steps: Estimates, >= 0.

    Returns:
        Forward passes of one batch.

    Example:
        >>> [passes_of_estimates(count) for count in (1, 2, 3)]
        [3, 6, 9]
    """
    return 3 * num_steps


def queries_of_estimates(num_steps: int) -> int:
    """Says how many two-point queries that is, rounded up.

    Args:
        num_steps: Estimates, >= 0.

    Returns:
        Queries.

    Example:
        >>> [queries_of_estimates(count) for count in (1, 2, 3)]
        [2, 3, 5]
    """
    return (passes_of_estimates(num_steps) + 1) // 2
