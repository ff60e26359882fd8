"""Which runs a comparison consists of: arms, learning rates, seeds. Pure: what is next follows from what is known.

Every arm is treated alike. With tuning, its learning rate comes from a geometric grid around its own, run with the first seed and judged on
validation accuracy alone; while the best rate lies at an edge the grid widens beyond it. Then every seed runs with the best rate.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cooperllm.config import ArmName, RunConfig
from cooperllm.errors import ConfigError
from cooperllm.wall_clock import DEFAULT_CLOCK, DeviceClock

FACTOR = 2.0
WIDEST = 7
"""Learning rates tried at most; a best one at the edge of so wide a grid is reported as such."""
LAST = 4
"""Evaluations whose mean counts as the end of a run: single ones are noisy."""


class Job(NamedTuple):
    """One run of a comparison.

    Attributes:
        arm: Method.
        learning_rate: Step size η.
        seed: Names every random choice of the run.
        is_short: Whether it has the rounds of tuning rather than those of the arm.
    """

    arm: ArmName
    learning_rate: float
    seed: int
    is_short: bool = False

    def __str__(self) -> str:
        return f"{self.arm.value}, rate {self.learning_rate:g}, seed {self.seed}{', short' * self.is_short}"


class Tuning(NamedTuple):
    """How far the search for an arm's learning rate has come.

    Attributes:
        rates: Learning rates tried or to be tried, ascending.
        best: The rate that was chosen, or None while runs are missing.
    """

    rates: tuple[float, ...]
    best: float | None

    @property
    def is_at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest of several."""
        return len(self.rates) > 1 and self.best in (self.rates[0], self.rates[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that decides a comparison; `comparison.json` is this.

    Attributes:
        configs: One configuration per arm.
        seeds: Seeds of every arm, at least one; the first one tunes.
        tune: Whether learning rates are searched for.
        tune_rounds: Rounds of the runs that tune, >= 1; None gives them the rounds of the arm, and the best one counts as a result.
        processes: Runs at the same time, >= 1; with more than one each has a process and a single thread.
        memory_limit_mib: Memory that all processes may use at their peaks, > 0; None sets no limit.
        clock: Device and link of the modelled wall clock.
    """

    configs: tuple[RunConfig, ...]
    seeds: tuple[int, ...]
    tune: bool = False
    tune_rounds: int | None = None
    processes: int = 1
    memory_limit_mib: float | None = None
    clock: DeviceClock = DEFAULT_CLOCK

    def __post_init__(self) -> None:
        names = [config.arm.name.value for config in self.configs]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"compare: found the arms {', '.join(names) or 'none'}, expected at least one and each one once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: found {', '.join(map(str, self.seeds)) or 'none'}, expected at least one and each one once")
        if self.tune_rounds is not None and (self.tune_rounds < 1 or not self.tune):
            raise ConfigError(f"tune_rounds: found {self.tune_rounds}, expected >= 1, together with tuning (--tune)")
        if self.processes < 1:
            raise ConfigError(f"processes: found {self.processes}, expected >= 1")
        if self.memory_limit_mib is not None and not self.memory_limit_mib > 0:
            raise ConfigError(f"memory_limit_mib: found {self.memory_limit_mib}, expected > 0, or none")

    @property
    def is_plain(self) -> bool:
        """Whether every arm is one run: its own learning rate, one seed."""
        return not self.tune and len(self.seeds) == 1

    def directory(self, job: Job) -> str:
        """Names a job's run directory."""
        if self.is_plain:
            return job.arm.value
        return f"{job.arm.value}-{job.learning_rate:g}-seed{job.seed}{'-short' * job.is_short}"

    def config(self, job: Job) -> RunConfig:
        """Gives a job's settings."""
        config = self.of_arm(job.arm)
        return replace(
            config,
            arm=replace(config.arm, learning_rate=job.learning_rate),
            seed=job.seed,
            num_rounds=self.tune_rounds if job.is_short and self.tune_rounds else config.num_rounds,
            validates=config.validates or self.tune,
        )

    def of_arm(self, arm: ArmName) -> RunConfig:
        """Gives an arm's settings."""
        return next(config for config in self.configs if config.arm.name is arm)

    def tuning(self, arm: ArmName, scores: Mapping[Job, float | None]) -> Tuning:
        """Follows the search for an arm's learning rate.

        Args:
            arm: Method.
            scores: Mean of the last validation accuracies of each run that has ended; None where it diverged.

        Returns:
            Where the search stands.
        """
        rate = self.of_arm(arm).arm.learning_rate
        if not self.tune:
            return Tuning((rate,), rate)
        rates: tuple[float, ...] | None = (rate / FACTOR, rate, rate * FACTOR)
        while True:
            jobs = self.tuning_jobs(arm, rates)
            if any(job not in scores for job in jobs):
                return Tuning(rates, None)
            best = best_rate({job.learning_rate: scores[job] for job in jobs}, rate)
            wider = widened(rates, best)
            if wider is None:
                return Tuning(rates, best)
            rates = wider

    def tuning_jobs(self, arm: ArmName, rates: Sequence[float]) -> list[Job]:
        """Lists the runs that judge learning rates."""
        is_short = self.tune_rounds is not None and self.tune_rounds < self.of_arm(arm).num_rounds
        return [Job(arm, rate, self.seeds[0], is_short) for rate in rates]

    def jobs(self, scores: Mapping[Job, float | None]) -> list[Job]:
        """Lists every run that is known to be needed, those of one seed together, as they can share model and data.

        Args:
            scores: See `tuning`.

        Returns:
            Jobs in the order to run them.
        """
        known: dict[Job, None] = {}
        for config in self.configs:
            rates, best = self.tuning(config.arm.name, scores)
            known |= dict.fromkeys(self.tuning_jobs(config.arm.name, rates) if self.tune else ())
            known |= dict.fromkeys(Job(config.arm.name, best, seed) for seed in self.seeds if best is not None)
        return sorted(known, key=lambda job: self.seeds.index(job.seed))

    def due(self, scores: Mapping[Job, float | None], taken: Collection[Job]) -> list[Job]:
        """Lists runs that have not ended and that nobody has taken."""
        return [job for job in self.jobs(scores) if job not in scores and job not in taken]

    def least_jobs(self, scores: Mapping[Job, float | None]) -> int:
        """Counts the runs that there will be at least: a grid may still widen."""
        open_arms = [config for config in self.configs if self.tuning(config.arm.name, scores).best is None]
        shared = sum(not self.tuning_jobs(config.arm.name, (1.0,))[0].is_short for config in open_arms)
        return len(self.jobs(scores)) + len(open_arms) * len(self.seeds) - shared


def best_rate(scores: Mapping[float, float | None], rate: float) -> float:
    """Chooses a learning rate.

    Args:
        scores: Validation score by rate; None where the run diverged.
        rate: The arm's own rate; of equal scores the one nearest to it wins, then the smaller one.

    Returns:
        The best rate; the smallest one when all diverged.

    Example:
        >>> best_rate({0.01: 0.7, 0.02: 0.7, 0.04: None}, 0.02)
        0.02
    """
    finite = {tried: score for tried, score in scores.items() if score is not None}
    if not finite:
        return min(scores)
    return max(finite, key=lambda tried: (finite[tried], -abs(math.log(tried / rate)), -tried))


def widened(rates: tuple[float, ...], best: float) -> tuple[float, ...] | None:
    """Adds a learning rate beyond an edge that was best.

    Args:
        rates: Rates tried, ascending.
        best: The best of them.

    Returns:
        The wider grid, or None when the best rate lies inside or the grid is as wide as it gets.

    Example:
        >>> widened((1.0, 2.0, 4.0), 4.0)
        (1.0, 2.0, 4.0, 8.0)
    """
    if len(rates) >= WIDEST or best not in (rates[0], rates[-1]):
        return None
    return (*rates, best * FACTOR) if best == rates[-1] else (best / FACTOR, *rates)


def mean_of_last(curve: Sequence[Sequence[float]]) -> float | None:
    """Means the last evaluations of a run.

    Args:
        curve: Pairs of round and score, in order; the state before the first round does not count.

    Returns:
        The mean of the last `LAST`, or of as many as there are; None without any.

    Example:
        >>> mean_of_last([[0, 0.1], [5, 0.5], [10, 0.7]])
        0.6
    """
    ends = [score for number, score in curve if number > 0][-LAST:]
    return math.fsum(ends) / len(ends) if ends else None
