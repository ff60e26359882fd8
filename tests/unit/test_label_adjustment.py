"""The adjusted loss: what a device's label shares explain is no longer in its gradient.

Run: pytest tests/unit/test_label_adjustment.py
"""

import numpy as np
import pytest
import torch

from cooperllm.algorithm.label_adjustment import label_adjustment

UNIT = 2.0**-24


def output_errors(shift):
    """Gradients at three scores of 0 of the adjusted loss, one row for each label, by back-propagation."""
    scores = torch.zeros(3, 3, requires_grad=True)
    torch.nn.functional.cross_entropy(scores + torch.from_numpy(shift), torch.arange(3), reduction="sum").backward()
    return scores.grad.numpy()


@pytest.mark.parametrize("labels", [[0], [0, 0, 0, 2], [1, 1, 2, 0, 0, 0, 0]])
def test_a_device_that_knows_only_its_label_shares_has_no_gradient(labels):
    """Scores that tell no class apart, labels drawn with the device's own (smoothed) shares: the mean output error is π - π."""
    shift = label_adjustment(np.array(labels), 3, 1.0)
    shares = (np.bincount(labels, minlength=3) + 1) / (len(labels) + 3)
    assert np.abs(shares @ output_errors(shift)).max() < 8 * UNIT
    assert np.abs(shares @ output_errors(np.zeros_like(shift))).max() > 0.05  # with plain cross entropy it is not


def test_without_strength_the_loss_is_cross_entropy():
    assert label_adjustment(np.array([0, 0, 1]), 4, 0.0).tolist() == [0, 0, 0, 0]


def test_a_class_that_a_device_never_saw_keeps_a_finite_score():
    assert np.isfinite(label_adjustment(np.zeros(10_000, np.int64), 77, 1.0)).all()


def test_strength_scales_the_adjustment():
    labels = np.array([0, 1, 1, 1])
    np.testing.assert_allclose(label_adjustment(labels, 2, 0.5), label_adjustment(labels, 2, 1.0) / 2, rtol=2 * UNIT)
