"""Rooms without a language model: a cloud whose model is softmax regression, and a device whose loss is a bowl."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.rounding import NO_ROUNDING
from cooperllm.cloud import Cloud, GuideMaker, MapFitter
from cooperllm.config import ArmConfig, ArmName, FederationConfig, RunConfig

MEASURED = ArmConfig(name=ArmName.MEASURED)
CLASSES, FEATURES = 3, 2
SIZE = CLASSES * FEATURES


@dataclass
class Public:
    features: np.ndarray
    labels: np.ndarray
    starts: None = None

    def __len__(self):
        return len(self.labels)

    def num_targets(self, indices):
        return len(indices)


class NoLayers:
    """Softmax regression has no layers, adapted or not."""

    below, width, has_head = (), FEATURES, False

    def blocks(self, most):
        return ()

    def watched(self, visit):
        return nullcontext()


class SoftmaxRegression:
    num_classes = CLASSES
    adapted = NoLayers()

    def batch(self, examples, indices):
        chosen = list(indices)
        return SimpleNamespace(features=torch.from_numpy(examples.features[chosen]), labels=torch.from_numpy(examples.labels[chosen]))

    def scores(self, theta, batch):
        return batch.features @ theta.reshape(CLASSES, FEATURES).T

    def loss(self, theta, batch, labels=None):
        return torch.nn.functional.cross_entropy(self.scores(theta, batch), batch.labels if labels is None else labels)

    def checkpointed(self):
        return nullcontext()


def public_of(labels):
    features = np.stack([noise.gaussian(6, row, FEATURES) for row in range(len(labels))])
    return Public(features, np.array(labels, np.int64))


def maker_of(labels, *, batch_size=64, pool_size=1):
    return GuideMaker(SoftmaxRegression(), public_of(labels), batch_size, pool_size)


def cloud_of(labels, config=None, rounds=0, federation=None, model=None):
    """A cloud after some rounds of its own steps."""
    run = RunConfig(arm=config or MEASURED, federation=federation or FederationConfig())
    maker = maker_of(labels, pool_size=run.arm.pool_size)
    fitter = MapFitter(model or SoftmaxRegression(), public_of(labels), num_examples=8, num_components=1, rank=1, bits=8, most_blocks=1)
    replica = replay.start(noise.gaussian(8, 0, SIZE), run.optimizer)
    for _ in range(rounds):
        replica = replay.step(replica, noise.gaussian(9, replica.model_version, SIZE), 0.1, run.optimizer)
    return Cloud(run, replica, maker, fitter, CLASSES)


class Bowl:
    """A device whose loss is |θ|²/2, and that has no maps."""

    num_examples, map_shape = 4, (0, 1)

    def rounding(self):
        return NO_ROUNDING

    def evaluate(self, chosen):
        return lambda points: np.square(points.astype(np.float64)).sum(axis=1).astype(np.float32) / 2, 1

    def differentiate(self, chosen):
        return lambda theta, directions: (0.5, directions @ theta), 4

    def estimate(self, theta, chosen, maps):
        return theta, 0.5
