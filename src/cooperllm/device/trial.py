"""One measurement of a device package in a process of its own: `python -m cooperllm.device.trial` reads a `Task` and writes `Phase`s.

The process imports what a device imports and nothing else, opens the package, and does what a round asks for, on texts of the greatest
length. What it has used at most in each phase is what a device with these settings uses.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from cooperllm.algorithm import noise, zeroth_order
from cooperllm.completion import Encoded
from cooperllm.device.graphs import loader
from cooperllm.device.manifest import OBSERVE, PREFIX
from cooperllm.device.onnx_forward import OnnxForward, open_package
from cooperllm.device.package import Package
from cooperllm.device.settings import Settings
from cooperllm.device.states import StatesOnDisk
from cooperllm.errors import CooperLLMError
from cooperllm.process_memory import Footprint, footprint, reset_peak

SEED, SCALE = 20_261, 1e-2
REPEATS = 3
MATRIX = 768
"""Side of the matrices that measure what the processor can do: larger ones are no faster."""

SLOPES, ESTIMATE = "two-point query", "estimate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be measured.

    Attributes:
        package: Directory of the package.
        settings: How memory is spent.
        batch_size: Texts of a batch, >= 1.
        num_threads: Threads, >= 1.
        imports: Modules that the device loads besides: the link, where it takes part in a run.
    """

    package: str
    settings: Settings
    batch_size: int
    num_threads: int
    imports: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """What a device held while it did something.

    Attributes:
        name: What it did.
        footprint: At the end; the peak is that of the phase.
        cpu_s: Processor seconds of one time, the least of several; 0 where it was done once.
    """

    name: str
    footprint: Footprint
    cpu_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a trial has seen.

    Attributes:
        phases: In order.
        resets_peaks: Whether the peak of a phase is its own; else it is that of all phases up to it.
        is_on_disk: Whether all states of the prefix have found room on disk.
        gflops: Measured rate of NumPy's float32 matrix product, 10⁹ operations a second.
        num_tokens: Of the batch.
        multiplications: With frozen matrices, for each token and point.
        failure: Why the package cannot be used, or "".
    """

    phases: tuple[Phase, ...] = ()
    resets_peaks: bool = True
    is_on_disk: bool = False
    gflops: float = 0.0
    num_tokens: int = 0
    multiplications: int = 0
    failure: str = ""

    @property
    def peak_mib(self) -> float:
        """The most that the process held, imports and opening included."""
        return max(phase.footprint.peak_mib for phase in self.phases)

    @property
    def query_gflops(self) -> float:
        """Rate of a two-point query, counting products with frozen matrices alone, 10⁹ operations a second."""
        seconds, operations = self.cpu_s(SLOPES), 2 * 2 * self.multiplications * self.num_tokens
        return operations / seconds / 1e9 if seconds > 0 else 0.0

    def cpu_s(self, name: str) -> float:
        """Processor seconds of a phase, 0 where there was none."""
        return sum(phase.cpu_s for phase in self.phases if phase.name == name)


def measure(task: Task) -> Findings:
    """Does what a round asks of a device, phase by phase, in this process.

    Args:
        task: What is to be measured.

    Returns:
        What was seen.

    Raises:
        PackageError: If the package cannot be used.
    """
    loader(task.settings.library)  # which imports the library
    for module in task.imports:
        importlib.import_module(module)
    phases = [Phase(name="imports", footprint=footprint(), cpu_s=0.0)]
    resets_peaks = reset_peak()

    def phase(name: str, work: Callable[[], object], repeats: int) -> None:
        seconds: list[float] = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        phases.append(Phase(name=name, footprint=footprint(), cpu_s=min(seconds) if repeats > 1 else 0.0))
        reset_peak()

    opened: list[Package] = []
    phase("package opened", lambda: opened.append(open_package(task.package, task.settings, num_threads=task.num_threads)), 1)
    package = opened[0]
    examples = longest_texts(package, task.batch_size)
    device = OnnxForward(package, examples, range(task.batch_size), None)
    chosen = range(task.batch_size)
    if PREFIX in package.manifest.graphs:
        phase("frozen prefix", device.prepare, 1)
    directions = [noise.gaussian(SEED, 0, len(package.theta))]
    phase(SLOPES, lambda: zeroth_order.slopes(device.evaluate(chosen)[0], package.theta, directions, SCALE, points_per_pass=1), REPEATS)
    if OBSERVE in package.manifest.graphs:
        phase(ESTIMATE, lambda: device.estimate(package.theta, chosen, None), REPEATS)
    states = package.states
    return Findings(
        phases=tuple(phases),
        resets_peaks=resets_peaks,
        is_on_disk=isinstance(states, StatesOnDisk) and not states.num_refused,
        gflops=matrix_gflops(),
        num_tokens=sum(map(len, examples.token_ids)),
        multiplications=package.manifest.multiplications,
    )


def longest_texts(package: Package, count: int) -> Encoded:
    """Makes texts of as many tokens as the package takes, no two alike.

    Args:
        package: Tells how tokens are made.
        count: Texts, >= 1.

    Returns:
        Examples.
    """
    texts = [f"{number} " + "and so it goes on " * package.manifest.max_tokens for number in range(count)]
    return package.encode(texts, None, [number % package.manifest.num_classes for number in range(count)], texts)


def matrix_gflops() -> float:
    """Measures how fast NumPy multiplies float32 matrices here, the best of several; another library may be faster.

    Returns:
        10⁹ floating-point operations a second of processor time.
    """
    matrix, seconds = noise.gaussian(SEED, 1, MATRIX * MATRIX).reshape(MATRIX, MATRIX), list[float]()
    for _ in range(REPEATS + 1):
        start = time.process_time()
        np.matmul(matrix, matrix)
        seconds.append(time.process_time() - start)
    return 2 * MATRIX**3 / max(min(seconds), 1e-9) / 1e9


def main() -> None:
    """Reads a task from standard input and writes the findings to standard output."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    try:
        findings = measure(task)
    except CooperLLMError as error:
        findings = Findings(failure=str(error))
    sys.stdout.buffer.write(msgspec.json.encode(findings))


if __name__ == "__main__":
    main()
