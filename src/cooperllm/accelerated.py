"""The cloud's back-propagation through Hugging Face accelerate: on a GPU, in mixed precision, in several processes.

    accelerate launch --num_processes 4 -m cooperllm run ...

    g = Σ_p (R_p / R) ∇ ℓ_p                                                 (1)  of a batch in parts, each with R_p of its R targets

Process 0 does all that a run does. The others hold the model and the public texts as tokens, and wait for θ and the places of texts. A
batch is divided among all of them; of several batches each is one process's. What travels is θ and its gradients, which are small with
adapters: by gloo, through the host's memory, whatever the device. Sums are made by process 0 in the order of processes, so that they are
the same each time; they differ in rounding from those of one process, and everybody uses what the cloud sends.

Dimension key: K batches, n trainable parameters.
"""

import datetime
import os
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from jaxtyping import Float32

from cooperllm import models, pretrained
from cooperllm.batches import Examples
from cooperllm.cloud import BackPropagation
from cooperllm.cloud.guide import Chosen
from cooperllm.config import ModelConfig
from cooperllm.errors import ConfigError, LinkError
from cooperllm.launch import check_launch, forget_place, is_launched
from cooperllm.models import Model

WAIT = datetime.timedelta(days=365)
"""Rounds last as long as devices take, and processes without work wait as long."""


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    """The model and the public examples, for a process that has neither.

    Attributes:
        model: What to load.
        num_classes: C.
        tokens: All rows behind one another, int64.
        lengths: Tokens of each row, int64.
        labels: Class of each, int64.
        starts: First target of each, int64, for next tokens.
    """

    model: ModelConfig
    num_classes: int
    tokens: bytes
    lengths: bytes
    labels: bytes
    starts: bytes | None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, or a part of one.

    Attributes:
        row: Which batch.
        chosen: Positions of its examples.
        labels: Labels in the place of their own.
        share: R_p / R.
    """

    row: int
    chosen: tuple[int, ...]
    labels: tuple[int, ...] | None
    share: float


class Work(msgspec.Struct, frozen=True, kw_only=True, tag="work"):
    """What is to be differentiated at a θ that follows.

    Attributes:
        num_rows: K.
        parts: Of each process.
    """

    num_rows: int
    parts: tuple[tuple[Part, ...], ...]


class Processes:
    """The processes that were launched together, as one of them sees them.

    Attributes:
        index: Which one this is.
        count: Of all.
        device: Where this one back-propagates.
        is_served: Whether the others answer, see `together`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.is_served = False
        self._known, self._is_in_step = b"", False

    def back_propagation(self, model: Model, public: Examples, *, is_shared: bool) -> BackPropagation:
        """Places a model where this process back-propagates, in the precision that accelerate was configured for.

        Args:
            model: The network.
            public: The cloud's examples; what a frozen prefix makes of them is kept apart, since precision may be another.
            is_shared: Whether others compute with the model: it stays where it is then, and on another device is a second one.

        Returns:
            What differentiates there.
        """
        if self.device.type != "cpu":
            model = models.load(model.config, model.num_classes) if is_shared else model
            model.network.to(self.device)
        public, frugal = replace(public, states={}), model.config.checkpoints_activations
        return BackPropagation(model, public, checkpoints_activations=frugal, precision=lambda: self._accelerator.autocast())

    def prepare(self, setup: Setup) -> None:
        """Lets the other processes load a model, unless they have it."""
        data = msgspec.msgpack.encode(setup)
        if self.count > 1 and data != self._known:
            with self._step():
                self._send(data)
            self._known = data

    def differentiate(self, own: BackPropagation, theta: Float32[np.ndarray, "n"], work: Work) -> Float32[np.ndarray, "K n_and_loss"]:
        """Carries out work together with the other processes.

        Args:
            own: Of this process.
            theta: Current θ, not modified.
            work: For everybody.

        Returns:
            A gradient and a loss in each row.

        Raises:
            LinkError: If a process is gone.
        """
        if self.count == 1:
            return _carried_out(own, theta, work, 0)
        found = np.zeros((work.num_rows, len(theta) + 1), np.float32)
        with self._step():
            self._send(msgspec.msgpack.encode(work))
            self._share(torch.from_numpy(theta.copy()))
        try:
            found = _carried_out(own, theta, work, 0)
        finally:
            with self._step():
                everything = self._gather(found)  # also where this process fails: the others are about to answer
        return sum(everything[1:], everything[0])

    def serve(self) -> None:
        """Answers process 0 until it ends; for every other one.

        Raises:
            LinkError: If process 0 is gone without a word.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; process 0 decides
        pretrained.hush()
        own, size = None, 0
        while data := self._received():
            message = msgspec.msgpack.decode(data, type=Setup | Work)
            if isinstance(message, Setup):
                model = models.load(message.model, message.num_classes)
                own, size = self.back_propagation(model, _examples(message), is_shared=False), model.layout.size
                continue
            assert own is not None, "work came before a model"
            theta = torch.empty(size)
            self._share(theta)
            self._gather(_carried_out(own, theta.numpy(), message, self.index))
        self._accelerator.end_training()

    def end(self) -> None:
        """Sends the others home. Where process 0 broke off in the middle of a step, they see that it is gone."""
        if not self._is_in_step:
            self._send(b"")
            self._accelerator.end_training()

    def _send(self, data: bytes) -> None:
        self._share(torch.tensor([len(data)]))
        if data:
            self._share(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _received(self) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        self._share(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            self._share(data)
        return data.numpy().tobytes()

    def _share(self, tensor: torch.Tensor) -> None:
        """Fills a tensor with that of process 0."""
        with self._heard():
            torch.distributed.broadcast(tensor, 0)

    def _gather(self, found: np.ndarray) -> list[np.ndarray]:
        """Hands what every process has found to process 0, in their order."""
        own = torch.from_numpy(found)
        everything = None if self.index else [torch.empty_like(own) for _ in range(self.count)]
        with self._heard():
            torch.distributed.gather(own, everything, 0)
        return [] if everything is None else [part.numpy() for part in everything]

    @contextmanager
    def _step(self) -> Generator[None]:
        """What has to be done as a whole: after half of it the others do not know what comes next."""
        self._is_in_step = True
        yield
        self._is_in_step = False

    @contextmanager
    def _heard(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo raises
            others = "process 0" if self.index else f"one of processes 1 to {self.count - 1}"
            raise LinkError(
                f"accelerate: {others} is gone ({str(error).splitlines()[0]}); its own words say why, and the run goes on with "
                "`cooperllm resume` where it stopped"
            ) from error


@dataclass(frozen=True)
class Accelerated:
    """Differentiates in every process that was launched, eq. (1): a `Differentiate`.

    Attributes:
        processes: Of this launch; this one is process 0.
        model: The run's model.
        public: The cloud's examples.
    """

    processes: Processes
    model: Model
    public: Examples

    def __call__(self, theta: Float32[np.ndarray, "n"], batches: Sequence[Chosen]) -> list[tuple[Float32[np.ndarray, "n"], float]]:
        """Computes each batch's gradient and loss.

        Args:
            theta: Current θ, not modified.
            batches: Examples, with labels of theirs or without.

        Returns:
            (gradient [n], mean loss) of each.

        Raises:
            ConfigError: If there are processes that do not answer.
            LinkError: If a process is gone.
        """
        if self.processes.count > 1 and not self.processes.is_served:
            raise ConfigError(
                f"accelerate launch: found {self.processes.count} processes, expected one: several need `with accelerated.together():` "
                "around all that a program does, as the command line has it (accelerate launch -m cooperllm ...)"
            )
        found = self.processes.differentiate(self._own, theta, Work(num_rows=len(batches), parts=self._dealt(batches)))
        return [(row[:-1], float(row[-1])) for row in found]

    @cached_property
    def _own(self) -> BackPropagation:
        public = self.public
        setup = Setup(
            model=self.model.config,
            num_classes=self.model.num_classes,
            tokens=np.concatenate([*public.token_ids, np.zeros(0, np.int64)]).tobytes(),
            lengths=np.array([len(row) for row in public.token_ids], np.int64).tobytes(),
            labels=public.labels.tobytes(),
            starts=None if public.starts is None else public.starts.tobytes(),
        )
        self.processes.prepare(setup)
        return self.processes.back_propagation(self.model, public, is_shared=True)

    def _dealt(self, batches: Sequence[Chosen]) -> tuple[tuple[Part, ...], ...]:
        """Divides one batch among processes; deals several out."""
        count = self.processes.count
        if len(batches) > 1 or batches[0][1] is not None:
            whole = [
                Part(row=row, chosen=tuple(chosen.tolist()), labels=None if labels is None else tuple(labels.tolist()), share=1.0)
                for row, (chosen, labels) in enumerate(batches)
            ]
            return tuple(tuple(whole[index::count]) for index in range(count))
        chosen = batches[0][0]
        num_targets, cuts = self.public.num_targets(chosen.tolist()), np.array_split(chosen, count)
        shares = [self.public.num_targets(cut.tolist()) / num_targets for cut in cuts]
        return tuple(
            (Part(row=0, chosen=tuple(cut.tolist()), labels=None, share=share),) if len(cut) else ()
            for cut, share in zip(cuts, shares, strict=True)
        )


@cache
def processes() -> Processes | None:
    """Joins the processes that this one was launched with, once.

    Returns:
        Them; None where accelerate did not launch this process.

    Raises:
        ConfigError: If accelerate's configuration asks for what cannot be had.
    """
    if not is_launched(os.environ):
        return None
    check_launch(os.environ)
    several: list[KwargsHandler] = (
        [InitProcessGroupKwargs(backend="gloo", timeout=WAIT)] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    )
    accelerator = Accelerator(kwargs_handlers=several)
    forget_place(os.environ)
    return Processes(accelerator)


@contextmanager
def together() -> Generator[None]:
    """Within it, process 0 works, and the others of its launch answer; they end when it does, and see nothing of what is within.

    Yields:
        Nothing, in process 0.

    Raises:
        SystemExit: In every other process, at its end.
        ConfigError: If accelerate's configuration asks for what cannot be had.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        found = processes()
    except ConfigError:
        if is_first:
            raise
        raise SystemExit(1) from None  # once is enough
    if found is None or found.count == 1:
        yield
        return
    if found.index:
        found.serve()
        raise SystemExit(0)
    found.is_served = True
    try:
        yield
    finally:
        found.end()


def _carried_out(own: BackPropagation, theta: np.ndarray, work: Work, index: int) -> Float32[np.ndarray, "K n_and_loss"]:
    """The share of one process."""
    found = np.zeros((work.num_rows, len(theta) + 1), np.float32)
    for part in work.parts[index]:
        labels = None if part.labels is None else np.array(part.labels, np.int64)
        ((gradient, loss),) = own(theta, [(np.array(part.chosen, np.int64), labels)])
        found[part.row] = np.float32(part.share) * np.append(gradient, np.float32(loss))
    return found


def _examples(setup: Setup) -> Examples:
    lengths = np.frombuffer(setup.lengths, np.int64)
    rows = np.split(np.frombuffer(setup.tokens, np.int64).copy(), np.cumsum(lengths)[:-1]) if len(lengths) else []
    starts = None if setup.starts is None else np.frombuffer(setup.starts, np.int64).copy()
    return Examples(token_ids=rows, labels=np.frombuffer(setup.labels, np.int64).copy(), starts=starts)
