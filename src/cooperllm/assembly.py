"""Builds the tiers of a run from its configuration: the one place where models, data and rooms meet."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cooperllm import data, models
from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.replay import Replica
from cooperllm.cloud import Cloud, GuideMaker
from cooperllm.config import RunConfig
from cooperllm.data import Task, Texts
from cooperllm.device import Host
from cooperllm.device.torch_forward import TorchForward
from cooperllm.edge import Edge
from cooperllm.models import Examples, Model
from cooperllm.run_directory import RunDirectory

DATA, INITIAL = 1 << 32, 2 << 32
"""Children of the run's seed; rounds are its first 2³² children."""


@dataclass(frozen=True)
class Assembly:
    """Everything a run is made of, built when first asked for and kept.

    Attributes:
        config: The run's settings.
        directory: The run on disk, whose log stands for the disks of its devices.
    """

    config: RunConfig
    directory: RunDirectory

    @cached_property
    def task(self) -> Task:
        """Texts and labels."""
        return data.load(self.config.data, self.config.federation, noise.derive(self.config.seed, DATA))

    @cached_property
    def shards(self) -> list[Int64[np.ndarray, "size"]]:
        """Private examples of each device."""
        return data.partition(self.task.private, self.config.federation, noise.derive(self.config.seed, DATA))

    @cached_property
    def model(self) -> Model:
        """The network."""
        return models.load(self.config.model, len(self.task.label_names))

    @cached_property
    def start(self) -> Replica:
        """The state that every tier begins with."""
        theta = self.model.initial_parameters(noise.derive(self.config.seed, INITIAL))
        return replay.start(theta, self.config.optimizer)

    @cached_property
    def test(self) -> Examples:
        """Examples that judge the run."""
        return self.encode(self.task.test)

    @cached_property
    def validation(self) -> Examples:
        """Examples for choosing settings."""
        return self.encode(self.task.validation)

    def encode(self, texts: Texts) -> Examples:
        """Tokenises texts for the run's model."""
        return self.model.encode(texts.texts, texts.second_texts, texts.labels)

    def cloud(self) -> Cloud:
        """Builds the cloud at version 0."""
        arm = self.config.arm
        maker = GuideMaker(self.model, self.encode(self.task.public), arm.public_batch_size, arm.pool_size)
        return Cloud(self.config, self.start, maker)

    def edges(self) -> list[Edge]:
        """Builds the edges; devices are dealt to them in turn."""
        federation = self.config.federation
        return [Edge(edge, range(edge, federation.num_devices, federation.num_edges)) for edge in range(federation.num_edges)]

    def devices(self) -> Host:
        """Builds every device of the run in this process."""
        examples = self.encode(self.task.private)
        runtimes = [TorchForward(self.model, examples, shard.tolist(), self.config.memory_mib) for shard in self.shards]
        return Host(runtimes, self.start, self.config.optimizer, self.directory.updates)


def make_devices(path: Path) -> Host:
    """Builds the devices of a run from nothing but its directory, as a process of its own does."""
    directory = RunDirectory(path)
    return Assembly(directory.config(), directory).devices()
