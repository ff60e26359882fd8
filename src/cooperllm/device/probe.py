"""What a device does in a round: catch up, probe, report. It never moves θ and sends a few numbers.

order --> replica at the plan's version --> batch --> slopes along columns and random directions --> report
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm import feedback, guidance, noise, replay, rounding, zeroth_order
from cooperllm.algorithm.compression import EXACT, pack_unbiased
from cooperllm.algorithm.guidance import isotropic, random_directions
from cooperllm.algorithm.maps import DecodedMaps
from cooperllm.algorithm.noise import Noise
from cooperllm.algorithm.replay import Replica
from cooperllm.algorithm.zeroth_order import Differentiate, Evaluate
from cooperllm.config import OptimizerConfig, SlopeMethod, passes_of_estimates
from cooperllm.device.runtime import Runtime, Streaming, Trainer
from cooperllm.errors import ProtocolError, ReplayMismatchError
from cooperllm.messages import (
    FORMAT_VERSION,
    LARGEST_LOSS,
    DeviceReport,
    Feedback,
    LocalTraining,
    Order,
    Outcome,
    Plan,
    Probes,
)

BATCH_STREAM = 1 << 62
"""Noise indices from here on choose batches, so that no random direction shares a key with them."""


def run_device(
    order: Order,
    replica: Replica,
    runtime: Runtime,
    trainer: Trainer | None,
    maps: DecodedMaps | None,
    slope_method: SlopeMethod = SlopeMethod.TWO_SIDED,
) -> DeviceReport:
    """Answers a plan with measurements on private data.

    Args:
        order: Plan and addressee.
        replica: State at the plan's version; not modified.
        runtime: Forward passes over the private examples.
        trainer: Back-propagation, or None on a device that has none.
        maps: Feedback maps that the device holds, or None.
        slope_method: How slopes are measured.

    Returns:
        The report; a non-finite loss is an outcome, not an exception.

    Raises:
        ProtocolError: If the plan is of another format, version or guide than this replica, or asks for what the device cannot do.
    """
    plan = order.plan
    columns, basis = _checked_guide(plan, replica)
    if plan.probes is None and plan.feedback is None and plan.local_training is None:
        raise ProtocolError(f"round {plan.round_index}: the plan asks device {order.device_id} for nothing")
    if plan.local_training is not None and trainer is None:
        raise ProtocolError(f"round {plan.round_index}: the plan asks for back-propagation, device {order.device_id} only runs forward")
    nothing = np.zeros(0, np.float32)
    column_slopes, random_slopes, agreement, energy, estimate = nothing, nothing, nothing, nothing, None
    column_deviation = random_deviation = 0.0
    chosen = choose_batch(plan, order.device_id, runtime.num_examples, 0)
    num_examples, bits, meter = len(chosen), EXACT, _Meter(plan, runtime, chosen, replica.theta, slope_method)
    forward_passes, losses = 0, meter.losses
    if plan.probes is not None:
        column_slopes, random_slopes = _probe(order, plan.probes, columns, basis, replica, meter)
        column_deviation = meter.deviation(column_slopes, plan.probes.column_scale)
        random_deviation = meter.deviation(random_slopes, plan.probes.random_scale)
    if plan.feedback is not None:
        estimate, first, num_examples, loss = _estimate(order, plan.feedback, replica, runtime, _known_maps(plan, plan.feedback, maps))
        agreement, energy = _rectify(first, plan.feedback, meter)
        forward_passes += passes_of_estimates(plan.feedback.num_steps)
        bits, losses = plan.feedback.bits, [loss]
    if plan.local_training is not None and trainer is not None:
        estimate, num_examples, loss = _train(order, plan.local_training, replica, runtime, trainer)
        forward_passes += (1 + trainer.backward_passes + plan.local_training.checkpoints_activations) * plan.local_training.num_steps
        losses = [loss]
    mean_loss = sum(losses) / len(losses) if losses else 0.0
    numbers = (column_slopes, random_slopes, agreement, energy, nothing if estimate is None else estimate)
    is_finite = all(np.isfinite(values).all() for values in numbers) and abs(mean_loss) <= LARGEST_LOSS
    return DeviceReport(
        device_id=order.device_id,
        round_index=plan.round_index,
        model_version=plan.model_version,
        guide_version=plan.guide_version,
        num_examples=num_examples,
        outcome=Outcome.OK if is_finite else Outcome.NON_FINITE_LOSS,
        loss=mean_loss if is_finite else 0.0,
        column_slopes=column_slopes,
        random_slopes=random_slopes,
        column_deviation=column_deviation,
        random_deviation=random_deviation,
        estimate=pack_unbiased(estimate, bits, plan.seed, order.device_id) if is_finite and estimate is not None else None,
        agreement=agreement,
        energy=energy,
        forward_passes=forward_passes + meter.forward_passes,
    )


def behind(order: Order, model_version: int) -> DeviceReport:
    """Says that this device cannot reach the plan's version from what the order carries.

    Args:
        order: The order.
        model_version: What the device has.

    Returns:
        A report without numbers; the edge sends what leads from that version to its own.
    """
    nothing = np.zeros(0, np.float32)
    return DeviceReport(
        device_id=order.device_id,
        round_index=order.plan.round_index,
        model_version=model_version,
        guide_version=order.plan.guide_version,
        num_examples=0,
        outcome=Outcome.BEHIND,
        loss=0.0,
        column_slopes=nothing,
        random_slopes=nothing,
        column_deviation=0.0,
        random_deviation=0.0,
        estimate=None,
        agreement=nothing,
        energy=nothing,
        forward_passes=0,
    )


def catch_up(replica: Replica, order: Order, optimizer: OptimizerConfig) -> Replica:
    """Brings a replica to the plan's version from what the order carries.

    Args:
        replica: State of any earlier version, or of the same one.
        order: Plan with a tail of updates or a snapshot.
        optimizer: The run's optimiser.

    Returns:
        State at the plan's version, with the plan's digest.

    Raises:
        ReplayMismatchError: If the result is not the cloud's state.
    """
    plan = order.plan
    replica = replay.catch_up(replica, order.updates, order.snapshot, plan.model_version, optimizer)
    if replica.model_version != plan.model_version or replica.state_hash != plan.theta_hash:
        raise ReplayMismatchError(
            f"round {plan.round_index}: device {order.device_id} has version {replica.model_version} ({replica.state_hash.hex()}), "
            f"the plan starts from {plan.model_version} ({plan.theta_hash.hex()})"
        )
    return replica


def choose_batch(plan: Plan, device_id: int, num_examples: int, step: int) -> list[int]:
    """Draws a batch without replacement.

    Args:
        plan: Names the seed and the batch size.
        device_id: Whose batch.
        num_examples: Size of the device's shard, >= 1.
        step: Position among the batches of the round, from 0.

    Returns:
        Positions in the shard: all of it when it is smaller than the batch.
    """
    index = BATCH_STREAM | (device_id << 16) | step
    return noise.permutation(plan.seed, index, num_examples)[: plan.batch_size].tolist()


def _checked_guide(plan: Plan, replica: Replica) -> tuple[Float32[np.ndarray, "k n"], Sequence[np.ndarray]]:
    if plan.format_version != FORMAT_VERSION:
        raise ProtocolError(f"round {plan.round_index}: format {plan.format_version} found, this device knows {FORMAT_VERSION}")
    if plan.model_version != replica.model_version:
        raise ProtocolError(f"round {plan.round_index}: θ of version {plan.model_version} expected, {replica.model_version} found")
    columns, basis = replay.span(replica, plan.guide), replay.probe_basis(plan.guide, len(replica.theta))
    if guidance.digest_of(chain([columns], basis)) != plan.guide_hash:
        raise ReplayMismatchError(f"round {plan.round_index}: the decoded guide differs from the cloud's")
    return columns, basis


def _known_maps(plan: Plan, asked: Feedback, maps: DecodedMaps | None) -> DecodedMaps | None:
    """The maps that the plan means; none before the first fit."""
    if asked.maps_version == -1:
        return None
    if maps is None or maps.version != asked.maps_version:
        found = "none" if maps is None else f"version {maps.version}"
        raise ProtocolError(f"round {plan.round_index}: feedback maps of version {asked.maps_version} expected, {found} found")
    return maps


class _Meter:
    """Slopes on one batch, by the method that was ordered or by the one that rounding leaves.

    Attributes:
        losses: Every loss that was taken.
        forward_passes: Those that were run: one for each point, and in forward mode one for each direction and each pass's own point.
    """

    def __init__(self, plan: Plan, runtime: Runtime, chosen: list[int], theta: Float32[np.ndarray, "n"], method: SlopeMethod) -> None:
        self.losses: list[float] = []
        self.forward_passes = 0
        self._signal_to_noise = plan.signal_to_noise
        self._runtime, self._chosen, self._theta, self._method = runtime, chosen, theta, method

    def slopes(self, *asked: tuple[Iterable[Float32[np.ndarray, "n"]], int, float]) -> list[Float32[np.ndarray, "_P"]]:
        """Measures slopes along several sets of directions, each with their number and the μ of two-point slopes."""
        if not self._differentiates([scale for _, number, scale in asked if number]):
            evaluate, most = self._runtime.evaluate(self._chosen)
            noted = partial(self._evaluated, evaluate)
            return [
                zeroth_order.slopes(noted, self._theta, directions, self._half_step(scale) if number else scale, points_per_pass=most)
                for directions, number, scale in asked
            ]
        differentiate, most = self._runtime.differentiate(self._chosen)
        noted, everything = partial(self._differentiated, differentiate), chain.from_iterable(directions for directions, _, _ in asked)
        found = zeroth_order.derivatives(noted, self._theta, everything, directions_per_pass=most)
        return np.split(found, np.cumsum([number for _, number, _ in asked])[:-1])

    @property
    def streams_noise(self) -> bool:
        """Whether noise is added to weights while they are used; forward mode has no use for that."""
        return isinstance(self._runtime, Streaming) and self._runtime.streams_noise and self._method is not SlopeMethod.FORWARD_MODE

    def slopes_along_noise(self, directions: Iterable[Noise], scale: float) -> Float32[np.ndarray, "P"]:
        """Measures slopes along directions that are never made as a whole."""
        assert isinstance(self._runtime, Streaming), "a runtime that streams noise"
        evaluate = self._runtime.evaluate_along(self._chosen)
        found, losses = zeroth_order.slopes_along_noise(evaluate, self._theta, directions, self._half_step(scale))
        self.losses.extend(losses)
        self.forward_passes += len(losses)
        return found

    def deviation(self, slopes: Float32[np.ndarray, "k"], scale: float) -> float:
        """Standard deviation that slopes of a plan's μ owe to rounding, as far as the plan cares for it."""
        if not len(slopes) or self._signal_to_noise == 0 or self._differentiates([scale]):
            return 0.0
        found = rounding.slope_deviation(self._runtime.rounding(), self._half_step(scale), len(self._chosen))
        return min(found, LARGEST_LOSS) if math.isfinite(found) else LARGEST_LOSS

    def _half_step(self, scale: float) -> float:
        quotient = self._signal_to_noise
        return scale if quotient == 0 else rounding.half_step(self._runtime.rounding(), scale, quotient)

    def _differentiates(self, scales: Sequence[float]) -> bool:
        """Whether slopes come from forward mode: by order, or where no half-step that is allowed is long enough."""
        if self._method is not SlopeMethod.NOISE_AWARE or self._signal_to_noise == 0:
            return self._method is SlopeMethod.FORWARD_MODE
        least = rounding.least_half_step(self._runtime.rounding(), self._signal_to_noise)
        return any(self._half_step(scale) < least for scale in scales)

    def _evaluated(self, evaluate: Evaluate, points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
        found = evaluate(points)
        self.losses.extend(found.tolist())
        self.forward_passes += len(points)
        return found

    def _differentiated(
        self, differentiate: Differentiate, theta: Float32[np.ndarray, "n"], directions: Float32[np.ndarray, "P n"]
    ) -> tuple[float, Float32[np.ndarray, "P"]]:
        loss, found = differentiate(theta, directions)
        self.losses.append(loss)
        self.forward_passes += 1 + len(directions)
        return loss, found


def _estimate(
    order: Order, asked: Feedback, replica: Replica, runtime: Runtime, maps: DecodedMaps | None
) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n"], int, float]:
    """Walks along estimates, `algorithm.feedback_arm`, eq. (1): their mean, the first one, the examples behind it, the loss at θ."""
    batches = _batches(order, runtime, asked.num_steps)
    first, loss = runtime.estimate(replica.theta, batches[0], maps)
    longest = math.sqrt(guidance.dot(first, first))
    point, estimates = replica.theta, [first]
    for batch in batches[1:]:
        point = point - np.float32(asked.step_size) * estimates[-1]
        estimates.append(feedback.shortened(runtime.estimate(point, batch, maps)[0], longest))
    mean = sum(estimates[1:], start=first) / np.float32(len(estimates))
    return mean, first, sum(map(len, batches)), loss


def _rectify(
    estimate: Float32[np.ndarray, "n"], asked: Feedback, meter: _Meter
) -> tuple[Float32[np.ndarray, "b"], Float32[np.ndarray, "b"]]:
    """Measures <g, ê_b> along each block of an estimate, `algorithm.feedback`, eq. (7)."""
    if any(stop > len(estimate) for _, stop in asked.blocks):
        raise ProtocolError(f"feedback: blocks {asked.blocks} found, ranges of {len(estimate)} parameters expected")
    lengths = np.array([np.sqrt(guidance.dot(estimate[a:b], estimate[a:b])) for a, b in asked.blocks], np.float32)

    def directions() -> Iterator[Float32[np.ndarray, "n"]]:
        for (start, stop), length in zip(asked.blocks, lengths, strict=True):
            direction = np.zeros_like(estimate)
            direction[start:stop] = estimate[start:stop] / (length or np.float32(1))
            yield direction

    (slopes,) = meter.slopes((directions(), len(lengths), asked.slope_scale))
    return slopes * lengths, lengths * lengths


def _probe(
    order: Order,
    probes: Probes,
    columns: Float32[np.ndarray, "k n"],
    basis: Sequence[np.ndarray],
    replica: Replica,
    meter: _Meter,
) -> tuple[Float32[np.ndarray, "columns"], Float32[np.ndarray, "random"]]:
    measured, guided = columns if probes.measures_columns else columns[:0], basis if len(basis) else list(columns)
    if meter.streams_noise and probes.blend is None:
        (of_columns,) = meter.slopes((measured, len(measured), probes.column_scale))
        named = isotropic(order.plan.seed, order.group, probes, guided, len(replica.theta))
        return of_columns, meter.slopes_along_noise(named, probes.random_scale)
    random = random_directions(order.plan.seed, order.group, probes, guided, len(replica.theta))
    found = meter.slopes((measured, len(measured), probes.column_scale), (random, probes.num_random, probes.random_scale))
    return found[0], found[1]


def _train(
    order: Order, task: LocalTraining, replica: Replica, runtime: Runtime, trainer: Trainer
) -> tuple[Float32[np.ndarray, "n"], int, float]:
    batches = _batches(order, runtime, task.num_steps)
    after, loss = trainer.train(replica.theta, batches, task.learning_rate, checkpoints_activations=task.checkpoints_activations)
    return (replica.theta - after) / np.float32(task.learning_rate * task.num_steps), sum(map(len, batches)), loss


def _batches(order: Order, runtime: Runtime, num_steps: int) -> list[list[int]]:
    """One batch for each local step."""
    return [choose_batch(order.plan, order.device_id, runtime.num_examples, step) for step in range(num_steps)]
