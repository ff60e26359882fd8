"""Room 3, the cloud: plans a round, and turns what came back into a sealed update.

The pool of public gradients is derived state: it is kept in checkpoints, so that a resumed run makes the same guides.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm import compression, noise, replay
from cooperllm.algorithm.aggregation import variance_between, weighted_mean
from cooperllm.algorithm.arms import GuideSource, Measured
from cooperllm.algorithm.baselines import arm
from cooperllm.algorithm.guidance import digest, dot
from cooperllm.algorithm.replay import Replica
from cooperllm.cloud.guide import GuideMaker
from cooperllm.config import RunConfig
from cooperllm.errors import DivergenceError, QuorumError
from cooperllm.messages import EdgeReport, Guide, GuideKind, Outcome, Plan, RandomSlopes, Update

COHORT = 1 << 60
"""Noise index that chooses the devices of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A plan and what the cloud keeps to itself until the reports are in.

    Attributes:
        plan: What the edges get.
        span: The decoded columns, shape [k, n]: the cloud uses the same bits as everybody.
        predicted: <u_k, g_B> of the cloud's own gradient, shape [k].
        public_loss: Mean loss of the public batch, or None without a guide.
    """

    plan: Plan
    span: Float32[np.ndarray, "k n"]
    predicted: Float32[np.ndarray, "k"]
    public_loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Closed:
    """A finished round.

    Attributes:
        update: Sealed update, ready for the log.
        replica: State after it.
        observed: Figures worth recording.
        num_reports: Usable device reports.
        dropped: Reports not used, by outcome.
    """

    update: Update
    replica: Replica
    observed: dict[str, float]
    num_reports: int
    dropped: dict[Outcome, int]


class Cloud:
    """Owner of θ and of the public data.

    Attributes:
        config: The run's settings.
        replica: Current state.
    """

    def __init__(self, config: RunConfig, replica: Replica, guide_maker: GuideMaker) -> None:
        self.config = config
        self.replica = replica
        self._arm = arm(config.arm.name)
        self._guide_maker = guide_maker
        # A gradient of data without a class pushes that class's score down: it must not vote on the step.
        self._arm_config = config.arm if guide_maker.has_every_class else replace(config.arm, public_weight=0.0)

    def plan(self) -> Prepared:
        """Back-propagates on public data and says what the devices are to measure.

        Returns:
            The plan, with what the cloud keeps to itself.

        Raises:
            DivergenceError: If the public gradient is not finite.
        """
        config, round_index = self.config, self.replica.model_version
        seed = noise.derive(config.seed, round_index)
        guide, gradient, public_loss = self._make_guide(seed)
        span = replay.span(self.replica, guide)
        probes = self._arm.probes(config.arm, len(span))
        local_training = self._arm.local_training(config.arm)
        asks_devices = probes is not None or local_training is not None
        order = noise.permutation(seed, COHORT, config.federation.num_devices)
        cohort = sorted(order[: config.federation.devices_per_round].tolist()) if asks_devices else []
        plan = Plan(
            round_index=round_index,
            model_version=self.replica.model_version,
            guide_version=-1 if guide is None else round_index,
            theta_hash=self.replica.state_hash,
            seed=seed,
            cohort=tuple(cohort),
            batch_size=config.federation.batch_size,
            guide=guide,
            guide_hash=digest(span),
            num_columns=len(span),
            probes=probes,
            local_training=local_training,
        )
        predicted = np.array([dot(column, gradient) for column in span], np.float32)
        return Prepared(plan=plan, span=span, predicted=predicted, public_loss=public_loss)

    def replay(self, update: Update) -> None:
        """Repeats a logged round without devices: same θ, and the same pool of public gradients behind the next guide.

        Args:
            update: Sealed update of the next version.

        Raises:
            ReplayMismatchError: If the result is not what the log says.
        """
        if self._arm.guide is GuideSource.GRADIENT and self._guide_maker.pool_size > 1:
            self._make_guide(update.seed)
        self.replica = replay.apply(self.replica, update, self.config.optimizer)

    def restore(self, replica: Replica, pool: Sequence[Float32[np.ndarray, "n"]]) -> None:
        """Continues from a checkpoint."""
        self.replica = replica
        self._guide_maker.restore(pool)

    def close(self, prepared: Prepared, reports: Sequence[EdgeReport]) -> Closed:
        """Combines the edges' reports with the cloud's own gradient, steps, and seals the update.

        Args:
            prepared: The round.
            reports: One per edge, in any order.

        Returns:
            The finished round; the cloud's own state has moved to it.

        Raises:
            QuorumError: If fewer devices than the configuration asks for gave usable reports.
        """
        plan = prepared.plan
        dropped: Counter[Outcome] = Counter()
        for report in reports:
            dropped.update(report.dropped)
        num_reports = sum(report.num_devices for report in reports)
        if plan.cohort and num_reports < self.config.federation.min_reports:
            sentence = ", ".join(f"{count} {outcome.value}" for outcome, count in dropped.items()) or "none dropped"
            required = self.config.federation.min_reports
            raise QuorumError(round_index=plan.round_index, received=num_reports, required=required, dropped=sentence)
        measured = _measured(sorted(reports, key=lambda report: report.edge_id), len(prepared.span))
        found = self._arm.combine(self._arm_config, plan, prepared.span, prepared.predicted, measured)
        update = Update(
            round_index=plan.round_index,
            model_version=plan.model_version,
            seed=plan.seed,
            learning_rate=self.config.arm.learning_rate,
            guide=plan.guide,
            column_coefficients=found.columns,
            random_terms=found.random_terms,
            dense=found.dense,
            theta_hash=bytes(16),
        )
        sealed, self.replica = replay.seal(self.replica, update, self.config.optimizer)
        observed = dict(found.observed)
        return Closed(update=sealed, replica=self.replica, observed=observed, num_reports=num_reports, dropped=dict(dropped))

    def pool(self) -> tuple[Float32[np.ndarray, "n"], ...]:
        """Returns the pooled public gradients, for a checkpoint."""
        return self._guide_maker.state()

    def _make_guide(self, seed: int) -> tuple[Guide | None, Float32[np.ndarray, "n"], float | None]:
        config, theta = self.config.arm, self.replica.theta
        if self._arm.guide is GuideSource.NOTHING:
            return None, np.zeros_like(theta), None
        has_momentum = self._arm.has_momentum and config.queries > 1
        room = max(1, config.queries - config.residual_queries - has_momentum)
        columns, gradient, loss = self._guide_maker.columns(self._arm.guide, theta, seed, room)
        if not np.isfinite(columns).all():
            raise DivergenceError(
                f"round {self.replica.model_version}: the public gradient is not finite, the run has diverged; repeat it with a "
                f"learning rate below {config.learning_rate:g}"
            )
        payload = compression.pack(columns, config.guide_bits)
        guide = Guide(kind=GuideKind.DIRECTIONS, payload=payload, has_momentum=has_momentum)
        return guide, gradient, loss


def _measured(reports: Sequence[EdgeReport], num_columns: int) -> Measured:
    """Folds the edges' folds: the same weighted mean, one level up."""
    usable = [report for report in reports if report.num_devices]
    weights = [report.num_examples for report in usable]
    has_columns = bool(usable) and len(usable[0].column_slopes) == num_columns
    mean = weighted_mean([r.column_slopes for r in usable], weights) if has_columns else np.zeros(num_columns, np.float32)
    squares = weighted_mean([r.column_squares for r in usable], weights) if has_columns else mean
    num_devices = sum(report.num_devices for report in usable)
    estimates = [report.estimate for report in usable if report.estimate is not None]
    return Measured(
        num_devices=num_devices,
        column_slopes=mean,
        column_variance=variance_between(mean, squares, num_devices),
        random_slopes=_merged([entry for report in usable for entry in report.random_slopes]),
        estimate=weighted_mean(estimates, weights) if estimates else None,
    )


def _merged(entries: Sequence[RandomSlopes]) -> tuple[RandomSlopes, ...]:
    """Groups that span several edges become one."""
    groups: dict[int, list[RandomSlopes]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return tuple(
        RandomSlopes(
            group=group,
            num_examples=sum(entry.num_examples for entry in members),
            slopes=weighted_mean([entry.slopes for entry in members], [entry.num_examples for entry in members]),
        )
        for group, members in sorted(groups.items())
    )
