"""What a device does with a package, small enough for an emulator; run by `check.py` on two machines, without PyTorch.

    python device_program.py PACKAGE GIVEN RESULT

GIVEN holds texts.json and, where layers are mapped, maps.bin; RESULT is a JSON file: digests of everything that must be the same bits
everywhere, and numbers of the runtime, which must be nearly the same.
"""

import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from cooperllm.algorithm import compression, noise, replay, zeroth_order
from cooperllm.algorithm.guidance import digest, orthonormalise
from cooperllm.algorithm.maps import DecodedMaps, unpack_maps
from cooperllm.algorithm.replay import Replica
from cooperllm.config import OptimizerConfig, OptimizerKind
from cooperllm.device.onnx_forward import OnnxForward, golden_points, open_package
from cooperllm.device.package import Package
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Guide, Maps, RandomTerm, Update

SEED = 11
NUM_DIRECTIONS = 20
SCALE = 0.01
NUM_UPDATES = 20
ADAM = OptimizerConfig(kind=OptimizerKind.ADAM)


def point(theta: np.ndarray) -> np.ndarray:
    """Gives a θ where every gradient is alive: many parameters start at zero, and hide others."""
    return theta + np.float32(0.02) * noise.gaussian(SEED, NUM_DIRECTIONS, len(theta))


def noise_digests(size: int) -> Iterator[tuple[str, bytes]]:
    """Yields a digest of each kind of noise."""
    yield "bits", digest(noise.bits(SEED, 0, size, stream=noise.Stream.DIRECTION))
    yield "gaussian", digest(*(noise.gaussian(SEED, index, size) for index in range(NUM_DIRECTIONS)))
    yield "rademacher", digest(noise.rademacher(SEED, 1, size))
    yield "permutation", digest(noise.permutation(SEED, 3, size))


def blank_update(replica: Replica) -> Update:
    """A round with every part that an update can have: a guide with momentum, two groups' random terms, a rounded sum of estimates."""
    size, version = len(replica.theta), replica.model_version
    columns = np.stack([noise.gaussian(SEED + 1, 8 * version + number, size) for number in range(3)])
    guide = Guide(payload=compression.pack(columns, 8 if version % 2 else 4), num_columns=3, has_momentum=True)
    return Update(
        round_index=version,
        model_version=version,
        seed=noise.derive(SEED, version),
        learning_rate=0.002,
        guide=guide,
        column_coefficients=noise.gaussian(SEED + 2, version, len(replay.span(replica, guide))),
        random_terms=tuple(RandomTerm(group=group, coefficients=noise.gaussian(SEED + 3, 2 * version + group, 4)) for group in range(2)),
        dense=compression.pack_unbiased(noise.gaussian(SEED + 4, version, size), 8, SEED, version),
        loss=None,
        theta_hash=bytes(16),
    )


def replay_digests(theta: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Seals updates as a cloud does and replays their bytes as a device does, with Adam."""
    packets = [compression.pack_unbiased(noise.gaussian(SEED, 2, len(theta)), bits, SEED, bits) for bits in (1, 2, 4, 8)]
    yield "decoded", digest(np.stack([compression.unpack_vector(packet, len(theta)) for packet in packets]))
    cloud = device = replay.start(theta, ADAM)
    sent: list[np.ndarray] = []
    for _ in range(NUM_UPDATES):
        update, cloud = replay.seal(cloud, blank_update(cloud), ADAM)
        message = encode(update)
        device = replay.apply(device, decode(message, Update), ADAM)
        sent.append(np.frombuffer(message, np.uint8))
    yield "messages", digest(*sent)
    yield "span", digest(orthonormalise([noise.gaussian(SEED, index, len(theta)) for index in range(NUM_DIRECTIONS)], len(theta)))
    yield "state", device.state_hash


def maps_digests(maps: DecodedMaps | None) -> Iterator[tuple[str, bytes]]:
    """Yields a digest of decoded maps, where there are any."""
    if maps is not None:
        yield "maps", digest(maps.directions, *(part for layer in maps.layers for part in (layer.basis, layer.maps)))


def measurements(package: Package, given: Path, maps: DecodedMaps | None) -> dict[str, Any]:
    """Runs the graphs: golden losses, then slopes and an estimate at `point`."""
    golden = package.manifest.golden
    known = package.encode(golden.texts, None, golden.labels)
    losses = OnnxForward(package, known, range(len(known)), None).evaluate(range(len(known)))[0](golden_points(package.theta, golden))
    texts = json.loads((given / "texts.json").read_text(encoding="utf8"))
    examples = package.encode(texts["texts"], texts["second_texts"], texts["labels"])
    chosen, theta = range(len(examples)), point(package.theta)
    device = OnnxForward(package, examples, chosen, None)
    directions = [noise.gaussian(SEED, index, len(theta)) for index in range(NUM_DIRECTIONS)]
    evaluate, points_per_pass = device.evaluate(chosen)
    slopes = zeroth_order.slopes(evaluate, theta, directions, SCALE, points_per_pass=points_per_pass)
    estimate, loss = device.estimate(theta, chosen, maps)
    return {
        "expected": list(golden.losses),
        "golden": losses.tolist(),
        "token_ids": [row.tolist() for row in examples.token_ids],
        "loss": loss,
        "slopes": slopes.tolist(),
        "estimate": estimate.tolist(),
    }


def main() -> None:
    """Does everything once and writes the result."""
    path, given, result = map(Path, sys.argv[1:])
    package = open_package(path)
    maps, manifest = None, package.manifest
    if (given / "maps.bin").is_file():
        fitted = decode((given / "maps.bin").read_bytes(), Maps)
        maps = unpack_maps([fitted], len(manifest.layers), manifest.widths.hidden)
    found = measurements(package, given, maps)
    digests = [*noise_digests(len(package.theta)), *replay_digests(package.theta), *maps_digests(maps)]
    found |= {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libraries": {module.__name__: module.__version__ for module in (np, onnxruntime)},
        "digests": {name: one.hex() for name, one in digests},
        "cpu_seconds": time.process_time(),
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    assert "torch" not in sys.modules, "a device has loaded PyTorch"
