"""Room 3, the cloud: plans a round, and turns what came back into a sealed update.

The pool of public gradients, the feedback maps and the θ that a diverged run goes back to are derived state: they are kept in checkpoints,
so that a resumed run makes the same guides. Losses, step sizes and rounds that were held back are found in the log. Maps of a round that
is replayed from the log are fitted again only if they are still in use at its end.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm import compression, divergence, feedback, noise, replay
from cooperllm.algorithm.aggregation import merged, variance_between, weighted_mean, weighted_number
from cooperllm.algorithm.arms import Arm, Coordinates, Measured, Public
from cooperllm.algorithm.baselines import arm
from cooperllm.algorithm.divergence import Good
from cooperllm.algorithm.guidance import digest_of, inside
from cooperllm.algorithm.maps import joined, missing
from cooperllm.algorithm.replay import Replica
from cooperllm.cloud.guide import GuideMaker
from cooperllm.cloud.judge import misfit
from cooperllm.cloud.maps import MapFitter
from cooperllm.config import Distribution, RunConfig
from cooperllm.errors import DivergenceError, QuorumError
from cooperllm.messages import EdgeReport, Feedback, Guide, Maps, Outcome, Plan, Probes, StepKind, Update

COHORT = 1 << 60
"""Noise index that chooses the devices of a round."""

POOL = 3 << 32
"""Child of the run's seed that names a pool of directions; rounds are its first 2³² children, `assembly` has two more."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A plan and what the cloud keeps to itself until the reports are in.

    Attributes:
        plan: What the edges get.
        public: The decoded directions (the cloud uses the same bits as everybody) and what its own gradient says of them.
        public_loss: Mean loss of the public batch, or None without a guide.
    """

    plan: Plan
    public: Public
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

    def __init__(self, config: RunConfig, replica: Replica, guide_maker: GuideMaker, map_fitter: MapFitter, num_classes: int) -> None:
        self.config = config
        self.replica = replica
        self._num_classes = num_classes
        self._arm = arm(config.arm.name)
        self._guide_maker = guide_maker
        self._map_fitter = map_fitter
        self._maps: tuple[Maps, ...] = ()
        self._unfitted: tuple[tuple[int, np.ndarray], ...] = ()
        self._sent_maps = -1
        self._held: tuple[Update, ...] = ()
        self._losses: tuple[float, ...] = ()
        self._factor = 1.0
        self._is_back, self._back_version = False, 0
        self._good = Good(theta=replica.theta, loss=math.inf)
        self._arm_config = replace(config.arm, feedback_blocks=len(map_fitter.blocks))

    def plan(self, round_index: int | None = None) -> Prepared:
        """Back-propagates on public data and says what the devices are to measure.

        Args:
            round_index: Which round; None for the one that the next update closes. A later one starts from a θ that lacks steps between.

        Returns:
            The plan, with what the cloud keeps to itself.

        Raises:
            DivergenceError: If the public gradient is not finite.
        """
        config, round_index = self.config, self.replica.model_version if round_index is None else round_index
        seed = noise.derive(config.seed, round_index)
        method = self._arm.at(self._arm_config, round_index)
        guide, gradient, public_loss = self._make_guide(method, seed)
        span, basis = replay.span(self.replica, guide), list(replay.probe_basis(guide, len(self.replica.theta)))
        predicted = inside(span, gradient)
        probes = self._pooled(method.probes(self._arm_config, len(span), len(basis)))
        asked, new_maps = self._feedback()
        local_training = method.local_training(self._arm_config)
        asks_devices = not (probes is None and local_training is None and asked is None)
        order = noise.permutation(seed, COHORT, config.federation.num_devices)
        cohort = sorted(order[: config.federation.devices_asked].tolist()) if asks_devices else []
        plan = Plan(
            round_index=round_index,
            model_version=self.replica.model_version,
            guide_version=-1 if guide is None else round_index,
            theta_hash=self.replica.state_hash,
            seed=seed,
            cohort=tuple(cohort),
            batch_size=config.federation.batch_size,
            guide=guide,
            guide_hash=digest_of(chain([span], basis)),
            num_columns=len(span),
            probes=probes,
            local_training=local_training,
            feedback=asked,
            maps=new_maps,
            lookahead_rate=self._factor * self._own_rate(round_index) if round_index > self.replica.model_version else 0.0,
            signal_to_noise=config.arm.signal_to_noise,
        )
        return Prepared(plan=plan, public=Public(span=span, basis=basis, predicted=predicted), public_loss=public_loss)

    def replay(self, update: Update) -> None:
        """Repeats a logged round without devices: same θ, and the same pool of public gradients behind the next guide.

        Args:
            update: Sealed update of the next version.

        Raises:
            ReplayMismatchError: If the result is not what the log says.
        """
        if self._arm.has_gradient and self._guide_maker.pool_size > 1:
            self._guide_maker.gradient(self.replica.theta, update.seed)
        self._note_refresh()
        self._note(update)
        self.replica = replay.apply(self.replica, update, self.config.optimizer)

    def restore(
        self, replica: Replica, pool: Sequence[Float32[np.ndarray, "n"]], maps: tuple[Maps, ...], good: Good, updates: Sequence[Update]
    ) -> None:
        """Continues from a checkpoint; the updates that it contains say what has been held back and taken back so far."""
        for update in updates:
            self._note(update)
        self.replica = replica
        self._guide_maker.restore(pool)
        self._maps = maps
        self._good = good

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
        reports, dropped = self._judged(plan, reports)
        num_reports = sum(report.num_devices for report in reports)
        if plan.model_version < self._back_version:
            nothing = Coordinates(columns=np.zeros(0, np.float32), kind=StepKind.HOLD)
            return self._closed(plan, nothing, self._factor, (), dropped + Counter({Outcome.STALE: num_reports}))
        has_quorum = not plan.cohort or num_reports >= self.config.federation.min_reports
        if self._has_diverged(reports, dropped, has_quorum=has_quorum):
            theta = compression.pack_vector(self._good.theta, compression.EXACT)
            back = Coordinates(columns=np.zeros(0, np.float32), dense=theta, kind=StepKind.ROLLBACK)
            return self._closed(plan, back, self._factor / 2, reports, dropped)
        if not has_quorum:
            sentence = ", ".join(f"{count} {outcome.value}" for outcome, count in dropped.items()) or "none dropped"
            required = self.config.federation.min_reports
            raise QuorumError(round_index=plan.round_index, received=num_reports, required=required, dropped=sentence)
        measured = _measured(sorted(reports, key=lambda report: report.edge_id), len(prepared.public.span), len(self.replica.theta))
        measured = replace(measured, held=tuple(update.random_terms for update in self._held))
        found = self._arm.combine(self._arm_config, plan, prepared.public, measured)
        return self._closed(plan, found, self._factor, reports, dropped)

    def _judged(self, plan: Plan, reports: Sequence[EdgeReport]) -> tuple[list[EdgeReport], Counter[Outcome]]:
        """Takes out what does not answer the plan, and counts what was not used, here and at the edges."""
        dropped, fitting = Counter[Outcome](), list[EdgeReport]()
        for report in reports:
            reason = misfit(report, plan, len(self.replica.theta))
            if reason is None:
                fitting.append(report)
                dropped.update(report.dropped)
            else:
                _log.warning("round %d: the report of edge %d is not used: %s", plan.round_index, report.edge_id, reason)
                dropped[Outcome.MISMATCH] += 1
        return fitting, dropped

    def pool(self) -> tuple[Float32[np.ndarray, "n"], ...]:
        """Returns the pooled public gradients, for a checkpoint."""
        return self._guide_maker.pool()

    def maps(self) -> tuple[Maps, ...]:
        """Returns the feedback maps in use, whole ones and the differences since, for a checkpoint."""
        return self._maps

    def good(self) -> Good:
        """Returns where a diverged run would go back to, for a checkpoint."""
        return self._good

    def _closed(
        self, plan: Plan, found: Coordinates, factor: float, reports: Sequence[EdgeReport], dropped: Mapping[Outcome, int]
    ) -> Closed:
        """Seals what a round has come to, a step or a way back, and moves to the state after it."""
        num_reports = sum(report.num_devices for report in reports)
        update = Update(
            round_index=plan.round_index,
            model_version=self.replica.model_version,
            seed=plan.seed,
            learning_rate=factor * self._own_rate(plan.round_index),
            guide=plan.guide if len(found.columns) else None,
            column_coefficients=found.columns,
            random_terms=found.random_terms,
            dense=found.dense,
            loss=_mean_loss(reports) if num_reports else None,
            theta_hash=bytes(16),
            kind=found.kind,
            distribution=Distribution.NORMAL if plan.probes is None else plan.probes.distribution,
        )
        sealed, after = replay.seal(self.replica, update, self.config.optimizer)
        self._note(sealed)
        self.replica = after
        return Closed(update=sealed, replica=after, observed=dict(found.observed), num_reports=num_reports, dropped=dict(dropped))

    def _has_diverged(self, reports: Sequence[EdgeReport], dropped: Mapping[Outcome, int], *, has_quorum: bool) -> bool:
        """Says whether to go back, `algorithm.divergence`, eq. (1): from a θ that has moved, for reasons that a shorter step may mend."""
        if has_quorum:
            asked_any = any(report.num_devices for report in reports)
            is_lost = asked_any and divergence.has_diverged((*self._losses, _mean_loss(reports)), self._num_classes)
        else:
            is_lost = dropped.get(Outcome.NON_FINITE_LOSS, 0) > 0
        return is_lost and self.config.optimizer.rolls_back and not np.array_equal(self.replica.theta, self._good.theta)

    def _own_rate(self, round_index: int) -> float:
        """The arm's step size η before anything was taken back."""
        return self._arm.learning_rate(self.config.arm, round_index)

    def _feedback(self) -> tuple[Feedback | None, tuple[Maps, ...]]:
        """What to ask of the devices' feedback, and the maps where the edges do not have them yet."""
        if not self._arm.has_maps:
            return None, ()
        self._note_refresh()
        for version, theta in self._unfitted:
            found = self._map_fitter.fit(theta, noise.derive(self.config.seed, version), version, self._maps)
            self._maps = joined(self._maps, [] if found is None else [found])
        self._unfitted = ()
        version = self._maps[-1].version if self._maps else -1
        asked = self._arm.feedback(self._arm_config, version, self._map_fitter.blocks)
        new_maps = missing(self._maps, self._sent_maps)
        self._sent_maps = version
        return asked, new_maps

    def _note_refresh(self) -> None:
        """Keeps θ where maps are due, and after a way back, since those in use may belong to where it led away from: whole ones then.

        Whole maps replace all that was fitted before, so that a replayed log fits no more than the differences since. A round that is
        planned once more, for want of a quorum, has its maps already.
        """
        version = self.replica.model_version
        fitter, every = self._map_fitter, self.config.arm.map_refresh
        is_due = self._is_back or feedback.is_refresh(version, every, fitter.first_version)
        is_fitted = bool(self._maps) and self._maps[-1].version == version
        if not (self._arm.has_maps and fitter.has_texts and is_due) or is_fitted:
            return
        if self._is_back or feedback.is_whole(version, every):
            self._maps, self._unfitted = (), ()
        self._unfitted = (*self._unfitted, (version, self.replica.theta))

    def _note(self, update: Update) -> None:
        """Follows the log, when a round is closed as when it is replayed: rounds without a step, step sizes, losses and the best θ."""
        self._held = (*self._held, update) if update.kind is StepKind.HOLD else ()
        self._factor = update.learning_rate / self._own_rate(update.round_index)
        self._is_back = update.kind is StepKind.ROLLBACK
        if self._is_back:
            self._losses, self._back_version = (), update.model_version + 1
        elif update.loss is not None:
            self._losses = (*self._losses, update.loss)[-divergence.WINDOW :]
            recent = divergence.recent_loss(self._losses)
            if recent < self._good.loss:
                self._good = Good(theta=self.replica.theta, loss=recent)

    def _pooled(self, probes: Probes | None) -> Probes | None:
        """Says which pool an arm with one draws from: the same in every round."""
        if probes is None or not self._arm.has_pool:
            return probes
        return replace(probes, pool_seed=noise.derive(self.config.seed, POOL), pool_size=self.config.arm.seed_pool_size)

    def _make_guide(self, method: Arm, seed: int) -> tuple[Guide | None, Float32[np.ndarray, "n"], float | None]:
        config, theta, free = self._arm_config, self.replica.theta, method.free_queries(self._arm_config)
        # Gradients of data without a class push its score down, and hold nothing of what tells it from others: seen to be worse than none.
        is_partial = method.has_basis and not self._guide_maker.has_every_class
        momentum_first = method.prefers_momentum and free > 0
        if not method.has_gradient or free <= momentum_first or is_partial:
            only = Guide(payload=compression.pack(theta[None][:0], config.guide_bits), num_columns=0, has_momentum=True)
            has_only = momentum_first or (method.has_momentum and not method.has_gradient)
            return only if has_only else None, np.zeros_like(theta), None
        gradient, loss = self._guide_maker.gradient(theta, seed)
        if not np.isfinite(gradient).all():
            round_index = self.replica.model_version
            raise DivergenceError(
                f"round {round_index}: the public gradient is not finite, the run has diverged; repeat it with a learning rate below "
                f"{self._arm.learning_rate(config, round_index):g}"
            )
        columns = np.stack(self._guide_maker.pool())
        has_momentum = momentum_first or (method.has_momentum and free > len(columns))
        mixes = method.has_basis and free > len(columns) + has_momentum and config.basis_size > 0
        basis = self._guide_maker.basis(theta, seed, config.basis_size) if mixes else columns[:0]
        payload = compression.pack(np.concatenate([columns, basis]), config.guide_bits, seed)
        return Guide(payload=payload, num_columns=len(columns), has_momentum=has_momentum), gradient, loss


def _mean_loss(reports: Sequence[EdgeReport]) -> float:
    """Mean private loss at the round's θ."""
    return weighted_number([report.loss for report in reports], [report.num_examples for report in reports])


def _measured(reports: Sequence[EdgeReport], num_columns: int, size: int) -> Measured:
    """Folds the edges' folds: the same weighted mean, one level up."""
    usable = [report for report in reports if report.num_devices]
    weights = [report.num_examples for report in usable]
    has_columns = bool(usable) and len(usable[0].column_slopes) == num_columns
    mean = weighted_mean([r.column_slopes for r in usable], weights) if has_columns else np.zeros(num_columns, np.float32)
    squares = weighted_mean([r.column_squares for r in usable], weights) if has_columns else mean
    num_devices = sum(report.num_devices for report in usable)
    estimates = [compression.unpack_vector(report.estimate, size) for report in usable if report.estimate is not None]
    nothing = np.zeros(0, np.float32)
    return Measured(
        num_devices=num_devices,
        column_slopes=mean,
        column_variance=variance_between(mean, squares, num_devices),
        random_slopes=merged([entry for report in usable for entry in report.random_slopes]),
        estimate=weighted_mean(estimates, weights) if estimates else None,
        agreement=weighted_mean([r.agreement for r in usable], weights) if usable else nothing,
        energy=weighted_mean([r.energy for r in usable], weights) if usable else nothing,
    )
