"""The devices that live in one process: they share the base model and, being bitwise equal, one replica."""

from collections.abc import Callable, Mapping, Sequence

from cooperllm.algorithm import replay
from cooperllm.algorithm.maps import DecodedMaps, joined, unpack_maps
from cooperllm.algorithm.replay import Replica
from cooperllm.config import OptimizerConfig, SlopeMethod
from cooperllm.device.probe import behind, catch_up, run_device
from cooperllm.device.runtime import Runtime, Trainer
from cooperllm.errors import CooperLLMError, ProtocolError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Maps, Order, Update


class Host:
    """Answers encoded orders for several devices.

    An order carries what its device has missed, and those bytes are counted; the work of replaying them is done once for all devices of
    the process, since an update leads them all to the same bits. A process that has just started reads what its devices already knew
    from `history`, which stands for the disk of a real device. Feedback maps are kept once, too, and decoded when they change.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime] | Mapping[int, Runtime],
        start: Callable[[], Replica],
        optimizer: OptimizerConfig,
        history: Callable[[], Sequence[Update]],
        slope_method: SlopeMethod = SlopeMethod.TWO_SIDED,
        *,
        keep: Callable[[Replica], object] = bool,
        latest: Replica | None = None,
        in_place: bool = False,
    ) -> None:
        """Takes the devices' state.

        Args:
            runtimes: Of each device, by its number.
            start: Makes version 0; once now, and again when a cloud that was killed begins anew.
            optimizer: The run's optimiser.
            history: Updates that the devices knew before this process began.
            slope_method: How slopes are measured.
            keep: Called with every new state: a device of its own writes it to disk.
            latest: What it had written before, or None.
            in_place: Whether a step may be made where θ lies, `algorithm.replay.apply`: `start` gives an array that is this process's own.
        """
        self._runtimes = dict(enumerate(runtimes)) if isinstance(runtimes, Sequence) else runtimes
        self._keep = keep
        self._start, self._replica = start, latest or start()
        self._optimizer, self._in_place = optimizer, in_place
        self._history = history
        self._slope_method = slope_method
        self._maps: tuple[Maps, ...] = ()
        self._decoded: DecodedMaps | None = None

    def answer(self, data: bytes) -> bytes:
        """Decodes an order, brings the replica to its version, works, and encodes the report."""
        order = decode(data, Order)
        if self._replica.model_version > order.plan.model_version:  # a cloud that was killed has begun an earlier round again
            self._replica = self._start()
        if order.device_id not in self._runtimes:
            raise ProtocolError(f"order: device {order.device_id} addressed, {sorted(self._runtimes)} found here")
        before, reached = self._replica.model_version, self._moved(order)
        if reached.model_version < order.plan.model_version:  # the edge thinks of a device that has lost its disk since
            return encode(behind(order, reached.model_version))
        reached = catch_up(reached, order, self._optimizer)
        if reached.model_version != before:
            self._replica = reached
            self._keep(reached)
        runtime = self._runtimes[order.device_id]
        if order.plan.maps:
            maps = joined(self._maps, order.plan.maps)
            if maps != self._maps:  # a refresh comes once for each device
                self._decoded = unpack_maps(maps, *runtime.map_shape)
                self._maps = maps
        trainer = runtime if isinstance(runtime, Trainer) else None  # one without PyTorch cannot back-propagate
        point = replay.lookahead(self._replica, order.plan.lookahead_rate, self._optimizer)
        return encode(run_device(order, point, runtime, trainer, self._decoded, self._slope_method))

    def _moved(self, order: Order) -> Replica:
        """Goes towards the order's version; one that is moved in place and comes to other bits than the cloud's is no state any more."""
        version, in_place = order.plan.model_version, self._in_place
        known = version - len(order.updates)
        is_known = order.snapshot is None and self._replica.model_version < known
        own = self._history()[self._replica.model_version : known] if is_known else ()
        try:
            found = replay.catch_up(self._replica, own, None, known, self._optimizer, in_place=in_place)
            found = replay.catch_up(found, order.updates, order.snapshot, version, self._optimizer, in_place=in_place)
        except CooperLLMError:
            if in_place:
                self._replica = self._start()
            raise
        if in_place:
            self._replica = found  # what was there before is no more
        return found
