"""Applies a round's update: the same bits at the cloud, at an edge, on a device, and years later from the log.

    d     = Σ_k a_k u_k + Σ_(g,j) b_gj z_gj  ( + dense )                    (1)  direction from coordinates
    m    <- γ m + d,   θ <- θ - η m                                         (2)  momentum; SGD is γ = 0 without an m
    m    <- γ m + (1-γ) d,   s <- ν s + (1-ν) d²,
    θ    <- θ - η  m / (1-γ^t)  /  ( √(s / (1-ν^t)) + ε )                    (3)  Adam
    θ    <- dense,   m, s <- 0                                             (4)  a way back, see `algorithm.divergence`
    θ̂     = θ after (2) or (3) with d = the mean of past directions         (5)  where θ will be when this round's answers arrive

SGD along random directions alone needs no memory beside θ: it can be made piece by piece where θ lies.

Eq. (5) is for rounds that overlap: their devices work one step behind, and everybody can guess that step from the moments they hold.

A `Replica` is what continues from round to round. Everything is elementwise float32 arithmetic in a fixed order, which IEEE 754 defines
to the last bit, and the digest of the state is compared after every step.

Dimension key: k columns, n trainable parameters.

References:
    Sutskever et al., 2013, On the importance of initialization and momentum in deep learning, Eq. (1)-(2).
    Kingma and Ba, 2015, Adam, arXiv:1412.6980, Algorithm 1. Reddi et al., 2021, arXiv:2003.00295: at a server, over what devices send.
    Chen, Yang and Cheng, 2018, Efficient and robust parallel DNN training through model parallelism, arXiv:1809.02839, weight prediction.
    Zelikman et al., 2023, Just one byte (per gradient), arXiv:2306.10015: a run as seeds and scalars.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm import compression
from cooperllm.algorithm.guidance import digest, orthonormalise, probe_noise
from cooperllm.algorithm.noise import BLOCK
from cooperllm.algorithm.zeroth_order import weighted_sum
from cooperllm.config import OptimizerConfig, OptimizerKind
from cooperllm.errors import DecodeError, ReplayMismatchError
from cooperllm.messages import Guide, Snapshot, StepKind, Update

NUM_MOMENTS = {OptimizerKind.SGD: 0, OptimizerKind.MOMENTUM: 1, OptimizerKind.ADAM: 2}
"""Vectors beside θ that an optimiser keeps."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Parameters and optimiser state after a number of updates; every tier holds the same one.

    Attributes:
        model_version: Updates applied.
        theta: θ, shape [n].
        moments: () for SGD, (m,) for momentum, (m, s) for Adam, each of shape [n].
    """

    model_version: int
    theta: Float32[np.ndarray, "n"]
    moments: tuple[Float32[np.ndarray, "n"], ...]

    @cached_property
    def state_hash(self) -> bytes:
        """Digest of everything that continues, taken once: with every weight trained it takes as long as a forward pass."""
        return digest(self.theta, *self.moments)

    def snapshot(self) -> Snapshot:
        """Returns the state as a message."""
        return Snapshot(model_version=self.model_version, theta=self.theta, moments=self.moments)


def start(theta: Float32[np.ndarray, "n"], optimizer: OptimizerConfig) -> Replica:
    """Makes the replica that every run begins with.

    Args:
        theta: Initial parameters, shape [n].
        optimizer: Decides which moments are kept.

    Returns:
        Version 0, with zero moments.

    Example:
        >>> start(np.zeros(3, np.float32), OptimizerConfig()).model_version
        0
    """
    return Replica(model_version=0, theta=theta, moments=tuple(np.zeros_like(theta) for _ in range(NUM_MOMENTS[optimizer.kind])))


def restore(snapshot: Snapshot, size: int, num_moments: int) -> Replica:
    """Makes a replica from a snapshot that arrived.

    Args:
        snapshot: Whole state.
        size: n of the receiver's model.
        num_moments: Vectors that the receiver's optimiser keeps beside θ.

    Returns:
        The replica.

    Raises:
        DecodeError: If there are more or fewer vectors, or they do not have the model's length.

    Example:
        >>> restore(start(np.zeros(3, np.float32), OptimizerConfig()).snapshot(), 3, 1).theta.shape
        (3,)
    """
    lengths = {len(vector) for vector in (snapshot.theta, *snapshot.moments)}
    if lengths != {size} or len(snapshot.moments) != num_moments:
        raise DecodeError(
            f"snapshot: {1 + len(snapshot.moments)} vectors of lengths {sorted(lengths)} found, {1 + num_moments} of {size} expected"
        )
    return Replica(model_version=snapshot.model_version, theta=snapshot.theta, moments=snapshot.moments)


def catch_up(
    replica: Replica,
    updates: Sequence[Update],
    snapshot: Snapshot | None,
    version: int,
    optimizer: OptimizerConfig,
    *,
    in_place: bool = False,
) -> Replica:
    """Brings a replica to a version from what its sender says it has missed.

    Args:
        replica: State of any version.
        updates: A tail of updates, oldest first; what the replica has already is passed over.
        snapshot: Whole state instead, or None.
        version: Where to get to.
        optimizer: The run's optimiser.
        in_place: As for `apply`.

    Returns:
        The state at that version, or the nearest before it that these lead to.

    Raises:
        DecodeError: If something is malformed.
        ReplayMismatchError: If an update does not give the state that its sender has.

    Example:
        >>> replica = start(np.zeros(3, np.float32), OptimizerConfig())
        >>> catch_up(replica, (), None, 5, OptimizerConfig()).model_version
        0
    """
    if snapshot is not None and replica.model_version < version:
        replica = restore(snapshot, len(replica.theta), len(replica.moments))
    for update in updates:
        if update.model_version == replica.model_version < version:
            replica = apply(replica, update, optimizer, in_place=in_place)
    return replica


def span(replica: Replica, guide: Guide | None) -> Float32[np.ndarray, "k n"]:
    """Rebuilds the span of a round from the guide's bytes and the momentum that every replica holds.

    Args:
        replica: State at the version the guide was made for.
        guide: Packed guide, or None.

    Returns:
        Orthonormal rows, shape [k, n]; k = 0 without a guide.

    Raises:
        DecodeError: If the guide is malformed.

    Example:
        >>> span(start(np.zeros(3, np.float32), OptimizerConfig()), None).shape
        (0, 3)
    """
    size = len(replica.theta)
    if guide is None:
        return np.zeros((0, size), np.float32)
    if guide.has_momentum and not replica.moments:
        raise DecodeError("guide: a momentum column announced, an optimiser without momentum found")
    momentum = [replica.moments[0]] if guide.has_momentum else []
    rows = compression.Rows(guide.payload, size)
    if guide.num_columns > len(rows):
        raise DecodeError(f"guide: {guide.num_columns} columns announced, {len(rows)} found")
    return orthonormalise([*momentum, *rows[: guide.num_columns]], size)


def probe_basis(guide: Guide | None, size: int) -> Sequence[np.ndarray]:
    """Gives the directions that random probes are mixed from, decoded when they are asked for.

    Args:
        guide: Packed guide, or None.
        size: n.

    Returns:
        K rows of shape [n], at right angles and of equal length up to the codec's error and scale.

    Raises:
        DecodeError: If the guide is malformed.

    Example:
        >>> len(probe_basis(None, 3))
        0
    """
    return [] if guide is None else compression.Rows(guide.payload, size)[guide.num_columns :]


def direction(replica: Replica, update: Update, columns: Float32[np.ndarray, "k n"]) -> Float32[np.ndarray, "n"]:
    """Turns an update's coordinates into a vector, eq. (1).

    Args:
        replica: State before the update.
        update: Coordinates.
        columns: The span they refer to, shape [k, n].

    Returns:
        d, shape [n].

    Raises:
        DecodeError: If the coordinates do not fit the span or the model.

    Example:
        >>> import cooperllm.messages as messages
        >>> replica = start(np.zeros(2, np.float32), OptimizerConfig())
        >>> update = messages.Update(
        ...     round_index=0, model_version=0, seed=1, learning_rate=1.0, guide=None,
        ...     column_coefficients=np.array([2.0], np.float32), random_terms=(), dense=None, loss=None,
        ...     theta_hash=bytes(16))
        >>> direction(replica, update, np.eye(1, 2, dtype=np.float32))
        array([2., 0.], dtype=float32)
    """
    size = len(replica.theta)
    _check_columns(update, len(columns))
    total = np.zeros(size, np.float32)
    if len(columns):
        total += weighted_sum(update.column_coefficients, columns)
    for start, parts in _random_parts(update, size):
        for part in parts:
            total[start : start + len(part)] += part
    if update.dense is not None:
        total += compression.unpack_vector(update.dense, size)
    return total


def step(replica: Replica, along: Float32[np.ndarray, "n"], learning_rate: float, optimizer: OptimizerConfig) -> Replica:
    """Takes one step of the server's optimiser, eq. (2) or (3).

    Args:
        replica: State before; not modified.
        along: Direction d, shape [n].
        learning_rate: η >= 0.
        optimizer: Kind and decay rates.

    Returns:
        State after, one version later.

    Example:
        >>> step(start(np.zeros(1, np.float32), OptimizerConfig()), np.ones(1, np.float32), 0.5, OptimizerConfig()).theta
        array([-0.5], dtype=float32)
    """
    rate, decay = np.float32(learning_rate), np.float32(optimizer.momentum)
    version = replica.model_version + 1
    if optimizer.kind is OptimizerKind.SGD:
        return Replica(model_version=version, theta=replica.theta - rate * along, moments=())
    if optimizer.kind is OptimizerKind.MOMENTUM:
        (moment,) = replica.moments
        moment = decay * moment + along
        return Replica(model_version=version, theta=replica.theta - rate * moment, moments=(moment,))
    first, second = replica.moments
    square_decay = np.float32(optimizer.square_decay)
    first = decay * first + (np.float32(1) - decay) * along
    second = square_decay * second + (np.float32(1) - square_decay) * (along * along)
    mean = first / np.float32(1 - _power(optimizer.momentum, version))
    root = np.sqrt(second / np.float32(1 - _power(optimizer.square_decay, version)))
    theta = replica.theta - rate * (mean / (root + np.float32(optimizer.epsilon)))
    return Replica(model_version=version, theta=theta, moments=(first, second))


def lookahead(replica: Replica, learning_rate: float, optimizer: OptimizerConfig) -> Replica:
    """Guesses the step that is being made elsewhere, eq. (5): one along the mean of all directions so far.

    Args:
        replica: State before that step; not modified.
        learning_rate: η of that step, >= 0; 0 guesses that nothing moves.
        optimizer: Kind and decay rates.

    Returns:
        The same version with θ where it is probably going to be; the same bits for everybody.

    Example:
        >>> optimizer = OptimizerConfig()
        >>> moved = step(start(np.zeros(1, np.float32), optimizer), np.ones(1, np.float32), 0.5, optimizer)
        >>> lookahead(moved, 0.5, optimizer).theta  # momentum .9: m = 1, its mean .1, the next m = .9 + .1
        array([-1.], dtype=float32)
    """
    if learning_rate == 0 or replica.model_version == 0 or optimizer.kind is OptimizerKind.SGD:
        return replica  # without moments nobody knows where past steps went
    weight = np.float32(1 - optimizer.momentum)
    if optimizer.kind is OptimizerKind.MOMENTUM:
        mean = replica.moments[0] * weight
    else:
        mean = replica.moments[0] / np.float32(1 - _power(optimizer.momentum, replica.model_version))
    return replace(replica, theta=step(replica, mean, learning_rate, optimizer).theta)


def seal(replica: Replica, update: Update, optimizer: OptimizerConfig) -> tuple[Update, Replica]:
    """Applies an update for the first time and writes the digest of the result into it.

    Args:
        replica: The cloud's state before.
        update: Coordinates; its own `theta_hash` is ignored.
        optimizer: Kind and decay rates.

    Returns:
        The update with its digest, and the state after it.

    Example:
        >>> replica = start(np.zeros(2, np.float32), OptimizerConfig())
        >>> blank = Update(round_index=0, model_version=0, seed=1, learning_rate=1.0, guide=None, random_terms=(), dense=None, loss=None,
        ...                column_coefficients=np.zeros(0, np.float32), theta_hash=bytes(16))
        >>> sealed, after = seal(replica, blank, OptimizerConfig())
        >>> apply(replica, sealed, OptimizerConfig()).state_hash == after.state_hash
        True
    """
    after = _applied(replica, update, optimizer)
    return replace(update, theta_hash=after.state_hash), after


def apply(replica: Replica, update: Update, optimizer: OptimizerConfig, *, in_place: bool = False) -> Replica:
    """Replays an update and checks that the result is the cloud's, bit for bit.

    Args:
        replica: State before; with `in_place` its θ may be overwritten, also when this fails.
        update: A sealed update.
        optimizer: Kind and decay rates.
        in_place: Whether a step of SGD along random directions alone is made where θ lies.

    Returns:
        State after.

    Raises:
        ReplayMismatchError: If the update is for another version or its result has another digest.

    Example:
        See `seal`.
    """
    after = _applied(replica, update, optimizer, in_place=in_place)
    if after.state_hash != update.theta_hash:
        raise ReplayMismatchError(
            f"round {update.round_index}: this replica has {after.state_hash.hex()} after the update, the cloud has "
            f"{update.theta_hash.hex()}; start again from a snapshot and compare versions of Python, NumPy and cooperllm"
        )
    return after


def _applied(replica: Replica, update: Update, optimizer: OptimizerConfig, *, in_place: bool = False) -> Replica:
    if update.model_version != replica.model_version:
        raise ReplayMismatchError(
            f"round {update.round_index}: the update applies to version {update.model_version}, this replica is at {replica.model_version}"
        )
    if update.kind is StepKind.HOLD:
        return replace(replica, model_version=replica.model_version + 1)
    if update.kind is StepKind.ROLLBACK:
        return _rolled_back(replica, update)
    if optimizer.kind is OptimizerKind.SGD and update.guide is None and update.dense is None:
        return _stepped_in_blocks(replica if in_place else replace(replica, theta=replica.theta.copy()), update)
    along = direction(replica, update, span(replica, update.guide))
    if update.kind is StepKind.RESTART:
        replica = replace(replica, moments=tuple(np.zeros_like(moment) for moment in replica.moments))
    return step(replica, along, update.learning_rate, optimizer)


def _check_columns(update: Update, count: int) -> None:
    if len(update.column_coefficients) != count:
        raise DecodeError(f"update: {len(update.column_coefficients)} column coefficients found, the span has {count}")


def _stepped_in_blocks(replica: Replica, update: Update) -> Replica:
    """Makes a step of SGD piece by piece where θ lies: the bits of `step`, in memory that does not grow with θ."""
    _check_columns(update, 0)
    rate = np.float32(update.learning_rate)
    for start, parts in _random_parts(update, len(replica.theta)):
        block = sum(parts, start=np.zeros(min(BLOCK, len(replica.theta) - start), np.float32))
        replica.theta[start : start + len(block)] -= rate * block
    return replace(replica, model_version=replica.model_version + 1)


def _random_parts(update: Update, size: int) -> Iterator[tuple[int, Iterator[Float32[np.ndarray, "b"]]]]:
    """The terms b_gj z_gj of eq. (1), each summed over its directions j, for one block of positions after the other."""
    terms = [
        (term.coefficients, list(probe_noise(update.seed, term.group, len(term.coefficients), update.distribution, term.chosen)))
        for term in update.random_terms
        if len(term.coefficients)
    ]

    def parts(start: int, stop: int) -> Iterator[Float32[np.ndarray, "b"]]:
        return (weighted_sum(coefficients, (named.part(start, stop) for named in directions)) for coefficients, directions in terms)

    return ((start, parts(start, min(start + BLOCK, size))) for start in range(0, size, BLOCK))


def _rolled_back(replica: Replica, update: Update) -> Replica:
    """Takes θ from the update, eq. (4); what the moments remember led away from it."""
    if update.dense is None:
        raise DecodeError(f"update: a way back without parameters found, {len(replica.theta)} of them expected")
    theta = compression.unpack_vector(update.dense, len(replica.theta))
    return Replica(model_version=replica.model_version + 1, theta=theta, moments=tuple(np.zeros_like(moment) for moment in replica.moments))


def _power(base: float, exponent: int) -> float:
    """Multiplies in a fixed order: `**` calls the machine's own mathematics library, whose last bit may differ."""
    result = 1.0
    while exponent:
        result = result * base if exponent & 1 else result
        base, exponent = base * base, exponent >> 1
    return result
