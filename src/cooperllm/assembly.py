"""Builds the tiers of a run from its configuration: the one place where models, data and rooms meet."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cooperllm import data, models
from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.baselines import arm
from cooperllm.algorithm.replay import Replica
from cooperllm.cloud import Cloud, GuideMaker, MapFitter
from cooperllm.config import UNLABELLED, ArmName, RunConfig
from cooperllm.data import Task, Texts
from cooperllm.device import Host
from cooperllm.device.torch_forward import TorchForward
from cooperllm.edge import Edge
from cooperllm.errors import ConfigError
from cooperllm.models import Examples, Model
from cooperllm.run_directory import RunDirectory

DATA, INITIAL = 1 << 32, 2 << 32
"""Children of the run's seed; rounds are its first 2³² children."""


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
        _ = self.shards, self.model  # loading is the check; not in an assertion, which -O would leave out
        if any(arm(name).has_maps for name in arms) and not self.model.adapted.is_complete:
            raise ConfigError(
                f"arm.name: feedback estimates gradients of adapters and a linear head, found adapter "
                f"'{self._config.model.adapter.value}'; choose --adapter lora or ia3, or the arm measured"
            )
        if any(arm(name).has_maps for name in arms) and self.model.adapted.head is None and not len(self.task.public):
            raise ConfigError(
                "arm.name: feedback has nothing to estimate from, found neither public text for maps nor a trained head; give the cloud "
                "any text (labels are not needed), or choose the arm measured"
            )
        needy = [name.value for name in arms if arm(name).has_gradient and not arm(name).has_basis]
        if needy and set(self.task.public.labels) <= {UNLABELLED}:
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

    def _encoded(self, texts: Texts) -> Examples:
        return self.model.encode(texts.texts, texts.second_texts, texts.labels)


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
        theta = self.material.model.initial_parameters(noise.derive(self.config.seed, INITIAL))
        return replay.start(theta, self.config.optimizer)

    def cloud(self) -> Cloud:
        """Builds the cloud at version 0."""
        settings = self.config.arm
        maker = GuideMaker(self.material.model, self.material.public, settings.public_batch_size, settings.pool_size)
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

    def edges(self) -> list[Edge]:
        """Builds the edges; devices are dealt to them in turn."""
        federation, size = self.config.federation, self.material.model.layout.size
        return [Edge(edge, range(edge, federation.num_devices, federation.num_edges), size) for edge in range(federation.num_edges)]

    def devices(self) -> Host:
        """Builds every device of the run in this process."""
        material = self.material
        adjustment = self.config.federation.label_adjustment
        runtimes = [
            TorchForward(material.model, material.private, shard.tolist(), self.config.memory_mib, adjustment) for shard in material.shards
        ]
        return Host(runtimes, self.start, self.config.optimizer, self.directory.updates)


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


def make_devices(path: Path) -> Host:
    """Builds the devices of a run in a process of its own."""
    return assemble(RunDirectory(path)).devices()
