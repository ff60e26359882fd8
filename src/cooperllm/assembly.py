"""Builds the tiers of a run from its configuration: the one place where models, data and rooms meet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from cooperllm import accelerated, data, models
from cooperllm.accelerated import Accelerated
from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.baselines import arm
from cooperllm.algorithm.replay import Replica
from cooperllm.algorithm.rounding import NO_ROUNDING, Rounding, rounding_of
from cooperllm.answers import judge_of
from cooperllm.batches import Examples
from cooperllm.cloud import BackPropagation, Cloud, GuideMaker, MapFitter
from cooperllm.cloud.guide import Differentiate
from cooperllm.config import (
    UNLABELLED,
    AdapterKind,
    ArmName,
    Objective,
    OptimizerKind,
    RunConfig,
    RuntimeName,
    SlopeMethod,
    Variant,
    WeightType,
)
from cooperllm.data import Task, Texts
from cooperllm.device import Host, Runtime
from cooperllm.device.settings import GraphLibrary, Settings
from cooperllm.device.torch_forward import TorchForward
from cooperllm.edge import Edge, devices_of
from cooperllm.errors import ConfigError
from cooperllm.models import Model
from cooperllm.run_directory import RunDirectory

DATA, INITIAL = 1 << 32, 2 << 32
"""Children of the run's seed; rounds are its first 2³² children."""

ROUNDING_DIRECTIONS, ROUNDING_DISTANCE = 4, 0.02
"""Where rounded weights show what they do to losses: directions, and how far from θ_0, where LoRA has no slope along half of θ."""

VARIANTS = {
    RuntimeName.ONNX: Variant.FP32,
    RuntimeName.ONNX_INT8: Variant.INT8,
    RuntimeName.ONNX_INT8_WEIGHTS: Variant.INT8_WEIGHTS,
    RuntimeName.ONNX_INT4: Variant.INT4,
    RuntimeName.OPENVINO: Variant.FP32,
}
"""Packages of the runtimes that need one."""


class Material:
    """The model and the tokenised texts of a run, loaded when first asked for and kept.

    Arms that are compared share it: they see the same bytes, and the frozen prefix of an example is computed once for all of them.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def fits(self, config: RunConfig) -> bool:
        """Tells whether another run has the same model, data, devices and seed."""
        mine = self._config
        return (mine.model, mine.data, mine.federation, mine.seed) == (config.model, config.data, config.federation, config.seed)

    def check(self, arms: Iterable[ArmName]) -> None:
        """Loads everything that a mistake of the user's could be in, before anything is written.

        Args:
            arms: Methods that are going to run.

        Raises:
            ConfigError: See `data.load`, `data.partition` and `models.load`; also if an arm cannot train this kind of adapter, or needs
                public labels that are not there.
        """
        judge_of(self._config.device_score)
        _ = self.shards, self.model  # loading is the check; not in an assertion, which -O would leave out
        if any(arm(name).has_maps for name in arms) and not self.model.adapted.is_complete:
            raise ConfigError(
                f"arm.name: feedback estimates gradients of adapters in layers that stand in one list, and of a linear head, found adapter "
                f"'{self._config.model.adapter.value}' of {self._config.model.name!r}; choose --adapter lora or ia3, or the arm measured"
            )
        needy = [name.value for name in arms if arm(name).has_gradient and not arm(name).has_basis]
        has_targets = self.model.config.objective is Objective.NEXT_TOKEN and len(self.task.public)
        if needy and not has_targets and set(self.task.public.labels) <= {UNLABELLED}:
            raise ConfigError(
                f"arm.name: {needy[0]} back-propagates on labelled public text, found none in {self._config.data.public.name!r}; "
                "give the public source labels, or choose an arm that needs none: feedback, measured, mezo-fl"
            )

    @cached_property
    def task(self) -> Task:
        """Texts and labels."""
        return data.load(self._config.data, self._config.federation, noise.derive(self._config.seed, DATA))

    @cached_property
    def shards(self) -> list[Int64[np.ndarray, "_size"]]:
        """Private examples of each device."""
        return data.partition(self.task.private, self._config.federation, noise.derive(self._config.seed, DATA))

    @cached_property
    def model(self) -> Model:
        """The network."""
        return models.load(self._config.model, len(self.task.label_names))

    @cached_property
    def public(self) -> Examples:
        """The cloud's examples."""
        return self._encoded(self.task.public)

    @cached_property
    def private(self) -> Examples:
        """The devices' examples."""
        return self._encoded(self.task.private)

    @cached_property
    def validation(self) -> Examples:
        """Examples for choosing settings."""
        return self._encoded(self.task.validation)

    @cached_property
    def test(self) -> Examples:
        """Examples that judge the run."""
        return self._encoded(self.task.test)

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences a user should read: what is unusual about the texts, and how many completions did not find room."""
        num_cut, most = self.test.num_cut, self._config.model.max_tokens
        cut = f"{num_cut} of {len(self.test)} test texts were cut at {most} tokens, prompt and completion together (model.max_tokens)"
        return (*self.task.notices, *([cut] if num_cut else []))

    def _encoded(self, texts: Texts) -> Examples:
        return self.model.encode(texts.texts, texts.second_texts, texts.labels, texts.completions)


@dataclass(frozen=True)
class Assembly:
    """The rooms of one run.

    Attributes:
        config: The run's settings.
        directory: The run on disk, whose log stands for the disks of its devices.
        material: Model and texts.
    """

    config: RunConfig
    directory: RunDirectory
    material: Material

    @cached_property
    def start(self) -> Replica:
        """The state that every tier begins with."""
        return replay.start(initial_theta(self.config, self.material.model), self.config.optimizer)

    def cloud(self) -> Cloud:
        """Builds the cloud at version 0."""
        settings = self.config.arm
        maker = GuideMaker(
            self.material.model,
            self.material.public,
            settings.public_batch_size,
            settings.pool_size,
            self._differentiate(),
        )
        fitter = MapFitter(
            self.material.model,
            self.material.public,
            num_examples=settings.map_examples,
            num_components=settings.map_components,
            rank=settings.map_rank,
            bits=settings.guide_bits,
            most_blocks=settings.feedback_blocks,
        )
        return Cloud(self.config, self.start, maker, fitter, self.material.model.num_classes)

    def _differentiate(self) -> Differentiate:
        """What back-propagates on public text: this process, or all that accelerate launched."""
        model, public, launched = self.material.model, self.material.public, accelerated.processes()
        if launched is not None:
            return Accelerated(launched, model, public)
        return BackPropagation(model, public, checkpoints_activations=self.config.model.checkpoints_activations)

    def edges(self) -> list[Edge]:
        """Builds the edges; devices are dealt to them in turn."""
        federation, size = self.config.federation, self.material.model.layout.size
        count = federation.num_edges
        return [Edge(edge, devices_of(edge, count, federation.num_devices), size) for edge in range(count)]

    def torch_device(self, number: int) -> TorchForward:
        """Builds one device on PyTorch."""
        material, federation = self.material, self.config.federation
        shard, judge = material.shards[number].tolist(), judge_of(self.config.device_score)
        limit_mib = self.config.activation_mib
        return TorchForward(material.model, material.private, shard, limit_mib, federation.label_adjustment, judge, self._rounding)

    def devices(self) -> Host:
        """Builds every device of the run in this process."""
        material = self.material
        if self.config.runtime is RuntimeName.TORCH:
            runtimes: Sequence[Runtime] = [self.torch_device(number) for number in range(len(material.shards))]
        else:
            adjustment = self.config.federation.label_adjustment
            runtimes = _runtimes_of_package(self.package_path, self.config.runtime, material, self.config.activation_mib, adjustment)
        # With SGD and every weight trained the devices' θ is one array that moves; it is theirs, since the cloud has one of its own.
        in_place = self.config.model.adapter is AdapterKind.FULL and self.config.optimizer.kind is OptimizerKind.SGD

        def start() -> Replica:
            return replay.start(initial_theta(self.config, material.model), self.config.optimizer) if in_place else self.start

        history, slope_method = self.directory.updates, self.config.slope_method
        return Host(runtimes, start, self.config.optimizer, history, slope_method, in_place=in_place)

    def _rounding(self) -> Rounding:
        """How losses are rounded: measured once where weights are, at a point that has moved a little."""
        return NO_ROUNDING if self.config.model.dtype is WeightType.FLOAT32 else self._measured_rounding

    @cached_property
    def _measured_rounding(self) -> Rounding:
        count, directions = min(self.config.federation.batch_size, len(self.material.private)), ROUNDING_DIRECTIONS
        device = TorchForward(self.material.model, self.material.private, range(count), self.config.activation_mib)
        first, *others = (
            noise.gaussian(self.config.seed, index, len(self.start.theta), stream=noise.Stream.CHOICE) for index in range(1 + directions)
        )
        point = self.start.theta + np.float32(ROUNDING_DISTANCE) * first
        return rounding_of(device.evaluate(range(count))[0], point, others, count)

    @property
    def package_path(self) -> Path:
        """Where the device package of the run is, if its devices need one."""
        return self.directory.path / "package"

    def package(self) -> None:
        """Writes the device package of the run where its devices need one and it is not there yet.

        Raises:
            ConfigError: If the model cannot be written as a package.
        """
        variant = VARIANTS.get(self.config.runtime)
        if variant is not None and not self.package_path.exists():
            write_device_package(self.config, self.material, self.package_path, variant)


def assemble(directory: RunDirectory, material: Material | None = None) -> Assembly:
    """Builds a run from nothing but its directory.

    Args:
        directory: A run directory.
        material: Model and texts of another run, used again where they are the same.

    Returns:
        The assembly.

    Raises:
        RunDirectoryError: If the configuration is missing or damaged.
    """
    config = directory.config()
    return Assembly(config, directory, material if material is not None and material.fits(config) else Material(config))


def write_device_package(config: RunConfig, material: Material, target: Path, variant: Variant) -> int:
    """Writes the package with which a device takes part in a run.

    Args:
        config: The run's settings; its seed decides θ_0, and a package for forward mode has a graph more.
        material: Model and texts of it.
        target: A missing or empty directory.
        variant: How the frozen weights are kept.

    Returns:
        Bytes of the package.

    Raises:
        ConfigError: If the directory is taken, or the model cannot be written.
    """
    from cooperllm.packaging import package_bytes, write_package  # noqa: PLC0415 -- takes seconds to import, and few runs need it

    theta, names = initial_theta(config, material.model), material.task.label_names
    manifest = write_package(
        material.model,
        theta,
        target,
        label_names=names,
        variant=variant,
        seed=config.seed,
        has_forward_mode=config.slope_method is not SlopeMethod.TWO_SIDED,
    )
    return package_bytes(manifest)


def initial_theta(config: RunConfig, model: Model) -> Float32[np.ndarray, "n"]:
    """Draws the θ that a run starts from.

    Args:
        config: Settings; the seed counts.
        model: The run's model.

    Returns:
        θ_0, shape [n].
    """
    return model.initial_parameters(noise.derive(config.seed, INITIAL))


def _runtimes_of_package(
    path: Path, runtime: RuntimeName, material: Material, activation_mib: float | None, adjustment: float
) -> list[Runtime]:
    """Devices that share a package; they read the private texts with its tokeniser, as a device elsewhere would."""
    from cooperllm.device.onnx_forward import OnnxForward, open_package  # noqa: PLC0415 -- a run on PyTorch does not load a second runtime

    library = GraphLibrary.OPENVINO if runtime is RuntimeName.OPENVINO else GraphLibrary.ONNX_RUNTIME
    package, private = open_package(path, Settings(library=library)), material.task.private
    examples = package.encode(private.texts, private.second_texts, private.labels, private.completions)
    return [OnnxForward(package, examples, shard.tolist(), activation_mib, adjustment) for shard in material.shards]


def make_devices(path: Path) -> Host:
    """Builds the devices of a run in a process of its own."""
    return assemble(RunDirectory(path)).devices()
