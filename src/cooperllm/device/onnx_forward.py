"""Forward passes with ONNX Runtime from a device package: the runtime of a device that has never imported PyTorch.

A batch goes through in small passes of whole examples, each padded to its own longest: memory is that of one layer of one such pass, the
result is the same. θ is an input of every graph; the weights stay as they are in the file.

The feedback pass runs `observe` once, which ends with the losses, their gradient from the last layer on, and what the layers below were
given and gave, and `pull_back` once, which holds the vector-Jacobian products of these layers, `packaging.graphs`. Between the two, deltas
come from the maps in NumPy. What lives from the first to the second beyond a layer's activations is what the layers were given, what they
gave and their deltas, about 12 bytes for each of B · T · H values and each layer, and the masks.

Dimension key: P points, B examples, T tokens, H hidden size, n trainable parameters.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from cooperllm.algorithm import feedback, noise
from cooperllm.algorithm.maps import DecodedMaps
from cooperllm.algorithm.rounding import Rounding, rounding_of
from cooperllm.algorithm.zeroth_order import Differentiate, Evaluate
from cooperllm.completion import Encoded, targets
from cooperllm.device.manifest import LOSSES, OBSERVE, PREFIX, PULL_BACK, SLOPES, Golden
from cooperllm.device.package import Package, read_package
from cooperllm.device.runtime import DIRECTIONS_PER_PASS, GRAPH_SHARE, score_shift
from cooperllm.device.settings import Settings
from cooperllm.errors import ConfigError, PackageError

ROUNDING_DIRECTIONS = 8
"""Directions along which rounding is measured: 80 forward passes over the golden texts, once for a package and a machine."""


class OnnxForward:
    """One device's package and shard.

    Attributes:
        shard: Positions of the device's examples among all private examples of this process.
    """

    def __init__(
        self, package: Package, examples: Encoded, shard: Sequence[int], activation_mib: float | None, adjustment: float = 0.0
    ) -> None:
        """Takes one device's part of the examples; `adjustment` is τ of `algorithm.label_adjustment`."""
        if not len(shard):
            raise ConfigError("shard: found no examples, expected at least one; give the device data, or leave it out")
        self._package = package
        self._examples = examples
        self.shard = list(shard)
        self._limit_mib = activation_mib
        self._shift = score_shift(examples, self.shard, package.manifest.num_classes, adjustment)

    @property
    def num_examples(self) -> int:
        """Private examples at hand."""
        return len(self.shard)

    def rounding(self) -> Rounding:
        """How this machine rounds the losses of this package, from its golden texts: the same whenever a device joins."""
        if self._package.rounding is None:
            self._package.rounding = _rounding(self._package)
        return self._package.rounding

    def evaluate(self, chosen: Sequence[int]) -> tuple[Evaluate, int]:
        """Returns a batch's loss as a function of points, with the number of points that fit the memory budget, one without."""
        indices = [self.shard[position] for position in chosen]

        def losses(points: Float32[np.ndarray, "P n"]) -> Float32[np.ndarray, "P"]:
            self._check(points)
            found = [
                self._package.run(LOSSES, batch | {"shift": self._shift, "theta": np.ascontiguousarray(points)})["losses"]
                for batch in self._passes(indices, len(points))
            ]
            return np.concatenate(found, axis=1).mean(axis=1, dtype=np.float64).astype(np.float32)

        return losses, self._points_per_pass(indices, 1)

    def differentiate(self, chosen: Sequence[int]) -> tuple[Differentiate, int]:
        """Returns a batch's loss and its derivatives as a function of θ and directions: values once, tangents beside them."""
        if SLOPES not in self._package.manifest.graphs:
            raise ConfigError(
                f"slope_method: found forward-mode and a package without it ({self._package.path}), expected two-sided, or a package with "
                f"{SLOPES}.onnx: `cooperllm package --slopes forward-mode` writes one"
            )
        indices = [self.shard[position] for position in chosen]

        def found(theta: Float32[np.ndarray, "n"], directions: Float32[np.ndarray, "P n"]) -> tuple[float, Float32[np.ndarray, "P"]]:
            self._check(np.stack([theta, *directions]))
            given = {"shift": self._shift, "theta": np.ascontiguousarray(theta), "directions": np.ascontiguousarray(directions)}
            loss, total = 0.0, np.zeros(len(directions))
            for batch in self._passes(indices, 1 + len(directions)):
                seen = self._package.run(SLOPES, batch | given)
                loss += float(seen["losses"].sum(dtype=np.float64))
                total += seen["slopes"].sum(axis=1, dtype=np.float64)
            num_targets = self._examples.num_targets(indices)
            return loss / num_targets, (total / num_targets).astype(np.float32)

        return found, max(1, self._points_per_pass(indices, 1 + DIRECTIONS_PER_PASS) - 1)

    def _points_per_pass(self, indices: Sequence[int], default: int) -> int:
        """The number of points of the longest example that fit the memory budget."""
        if self._limit_mib is None:
            return default
        longest = max(len(self._examples.token_ids[index]) for index in indices)
        return max(1, int(self._limit_mib / self._package.manifest.widths.activation_mib(1, longest)))

    def prepare(self) -> None:
        """Runs the frozen prefix on every example, so that it need not be loaded beside anything else."""
        if PREFIX in self._package.manifest.graphs:
            for index in self.shard:
                self._states(self._examples.token_ids[index])
            self._package.release()

    @property
    def map_shape(self) -> tuple[int, int]:
        """(layers that feedback maps are for, their width D)."""
        return len(self._package.manifest.layers), self._package.manifest.widths.hidden

    def estimate(
        self, theta: Float32[np.ndarray, "n"], chosen: Sequence[int], maps: DecodedMaps | None
    ) -> tuple[Float32[np.ndarray, "n"], float]:
        """Runs forward once, the last layer backward, and the adapted layers below once more and backward, from the last one down."""
        manifest, point = self._package.manifest, np.ascontiguousarray(theta)
        self._check(point[None])
        if OBSERVE not in manifest.graphs:
            raise ConfigError(
                f"{self._package.path}: found a package without a feedback pass, expected one; choose another arm than feedback"
            )
        indices = [self.shard[position] for position in chosen]
        total, loss = np.zeros_like(point), 0.0
        for batch in self._passes(indices, GRAPH_SHARE):
            seen = self._package.run(OBSERVE, batch | {"shift": self._shift, "theta": point})
            loss += float(seen.pop("losses").sum(dtype=np.float64))
            total[manifest.exact_start :] += seen.pop("exact")
            if manifest.layers:
                total[: manifest.exact_start] += self._pulled_back(point, batch["mask"], seen, maps)
        num_targets = self._examples.num_targets(indices)
        return total / np.float32(num_targets), loss / num_targets

    def _pulled_back(
        self, point: Float32[np.ndarray, "n"], mask: Int64[np.ndarray, "B T"], seen: dict[str, np.ndarray], maps: DecodedMaps | None
    ) -> Float32[np.ndarray, "m"]:
        """The parts of the layers below the last one; without maps the gradient at its input is carried down through them."""
        at_input, at_output, layers = seen.pop("at_input"), seen.pop("at_output"), self._package.manifest.layers
        if maps is None:
            nothing = np.zeros_like(at_input)
            deltas = [*(nothing for _ in layers[1:]), at_input]
        else:
            deltas = _predicted(maps, mask, at_output, [seen[f"seen_{layer.seen}"] for layer in layers])
        given = {"theta": point, "carried": np.array(maps is None, np.float32), **seen}
        return self._package.run(PULL_BACK, given | {f"delta_{number}": delta for number, delta in enumerate(deltas)})["gradient"]

    def _passes(self, indices: Sequence[int], num_points: int) -> Iterator[dict[str, np.ndarray]]:
        """Cuts a batch into passes, in order, each padded to its own longest example."""
        lengths = [len(self._examples.token_ids[index]) for index in indices]
        begin = 0
        while begin < len(indices):
            end = begin + 1
            while end < len(indices) and self._fits(end + 1 - begin, max(lengths[begin : end + 1]), num_points):
                end += 1
            yield self._batch(indices[begin:end])
            begin = end

    def _fits(self, num_examples: int, longest: int, num_points: int) -> bool:
        if self._limit_mib is None:
            return num_examples * longest * num_points <= self._package.settings.rows_per_pass
        return num_points * self._package.manifest.widths.activation_mib(num_examples, longest) <= self._limit_mib

    def _batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        examples, manifest = self._examples, self._package.manifest
        rows = [examples.token_ids[index] for index in indices]
        mask = _padded([np.ones_like(row) for row in rows], 0)
        given = _padded(rows, manifest.pad_id)
        if PREFIX in manifest.graphs:
            given = _padded([self._states(row) for row in rows], 0)
        labels = examples.labels[list(indices)]
        if examples.starts is not None:
            labels = np.stack(targets(rows, examples.starts[list(indices)].tolist(), range(0, mask.size, mask.shape[1])), axis=1)
        return {"given": given, "mask": mask, "labels": labels}

    def _states(self, token_ids: Int64[np.ndarray, "T"]) -> Float32[np.ndarray, "T H"]:
        known = self._package.states.get(token_ids)
        if known is None:
            known = self._package.run(PREFIX, {"token_ids": token_ids[None], "mask": np.ones_like(token_ids)[None]})["states"][0]
            self._package.states.put(token_ids, known)
        return known

    def _check(self, points: Float32[np.ndarray, "P n"]) -> None:
        expected = self._package.manifest.num_parameters
        if points.shape[1] != expected:
            raise ConfigError(
                f"theta: found {points.shape[1]} parameters, the package {self._package.path} has {expected}; "
                "write a package with the settings of the run"
            )


def open_package(path: Path | str, settings: Settings | None = None, *, num_threads: int = 1) -> Package:
    """Reads a package, checks it, and runs it once on texts whose losses it knows.

    Args:
        path: A directory that `cooperllm package` has written.
        settings: How memory is spent; None for what suits a device of which nothing is known.
        num_threads: Threads of one operator, >= 1.

    Returns:
        The package, ready for `OnnxForward`.

    Raises:
        PackageError: If it is damaged, of another version, or does not give its golden losses on this machine.
    """
    package = read_package(path, settings, num_threads=num_threads)
    golden = package.manifest.golden
    examples = _golden_examples(package)
    if [row.tolist() for row in examples.token_ids] != [list(row) for row in golden.token_ids]:
        raise PackageError(f"{package.path}: this `tokenizers` reads the golden texts as other tokens; install another version")
    points = golden_points(package.theta, golden)
    device = OnnxForward(package, examples, range(len(examples)), None)
    device.prepare()
    losses = device.evaluate(range(len(examples)))[0](points)
    # Written so that a loss that is not a number is refused, too.
    if not np.all(np.abs(losses - np.array(golden.losses, np.float32)) <= golden.tolerance):
        raise PackageError(
            f"{package.path}: golden losses {losses.round(5).tolist()} found, {[round(loss, 5) for loss in golden.losses]} expected within "
            f"{golden.tolerance}; this machine computes something else: install another onnxruntime, or take the variant fp32"
        )
    package.open_states()  # only now: states from a disk would pass over the prefix, which is to be checked, too
    return package


def _rounding(package: Package) -> Rounding:
    golden, examples = package.manifest.golden, _golden_examples(package)
    device, chosen = OnnxForward(package, examples, range(len(examples)), None), range(len(examples))
    first = len(golden.scales)  # directions that no golden point lies along
    directions = [noise.gaussian(golden.seed, first + number, len(package.theta)) for number in range(ROUNDING_DIRECTIONS)]
    return rounding_of(device.evaluate(chosen)[0], golden_points(package.theta, golden)[-1], directions, len(examples))


def _golden_examples(package: Package) -> Encoded:
    golden = package.manifest.golden
    return package.encode(golden.texts, None, golden.labels, golden.completions or None)


def golden_points(theta: Float32[np.ndarray, "n"], golden: Golden) -> Float32[np.ndarray, "P n"]:
    """Makes the points whose losses a package knows: θ_0 + scale_p · z(seed, p).

    Args:
        theta: θ_0.
        golden: Seed and scales.

    Returns:
        Points, shape [P, n].
    """
    return np.stack([
        theta + np.float32(scale) * noise.gaussian(golden.seed, number, len(theta)) for number, scale in enumerate(golden.scales)
    ])


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Stacks rows of different lengths."""
    padded = np.full((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), value, rows[0].dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _predicted(
    maps: DecodedMaps, mask: Int64[np.ndarray, "B T"], at_top: Float32[np.ndarray, "B T D"], outputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What maps predict at the outputs of the layers below the last one, `algorithm.feedback`, eq. (5)-(6)."""
    is_token, tokens, deltas = mask > 0, feedback.tokens(mask), list[np.ndarray]()
    for layer, output in zip(maps.layers, outputs, strict=True):
        deltas.append(np.zeros_like(at_top))
        described = feedback.features(output[is_token], tokens, layer.basis)
        deltas[-1][is_token] = feedback.deltas(at_top[is_token], described, tokens, maps.directions, layer.maps)
    return deltas
