"""Streamed noise: operations see θ + μ z, θ itself is only read, and no copy of it is made.

Run: pytest tests/unit/test_streamed_noise.py
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from cooperllm import streamed_noise
from cooperllm.algorithm.noise import Noise
from cooperllm.config import Distribution
from cooperllm.streamed_noise import perturbed

ROWS, COLUMNS, SCALE = 7, 6, 0.25
SIZE = ROWS * COLUMNS + ROWS
THETA = torch.linspace(-1, 1, SIZE)
DIRECTION = Noise(3, 5, Distribution.NORMAL)
VALUE = torch.linspace(-2, 3, 4 * COLUMNS).view(2, 2, COLUMNS)
TOKENS = torch.tensor([[3, 0, 3], [6, 1, 1]])


def parts(theta):
    """A matrix and a vector that share θ's memory, the vector first."""
    return theta[ROWS:].view(ROWS, COLUMNS), theta[:ROWS]


def attended(weight, bias):
    """PyTorch's own attention of one head, which takes its weights by themselves."""
    value, identity = VALUE[..., :2], torch.eye(2)
    return functional.multi_head_attention_forward(
        value, value, value, 2, 1, weight.flatten()[:12].view(6, 2), bias[:6], None, None, False, 0.0, identity, None, training=False
    )[0]  # fmt: skip


USES = {
    "linear": lambda weight, bias: functional.linear(VALUE, weight, bias),
    "linear without a bias": lambda weight, bias: functional.linear(VALUE, weight),
    "linear, transposed": lambda weight, bias: functional.linear(VALUE[..., :1].expand(2, 2, ROWS), weight.T),
    "linear, one row": lambda weight, bias: functional.linear(VALUE, weight[2]),
    "linear of itself": lambda weight, bias: functional.linear(weight, weight, bias),
    "embedding": lambda weight, bias: functional.embedding(TOKENS, weight),
    "embedding with padding": lambda weight, bias: functional.embedding(TOKENS, weight, 1),
    "rows by numbers": lambda weight, bias: weight[[5, 0, 5]],
    "rows by a tensor": lambda weight, bias: weight[TOKENS],
    "rows by a mask": lambda weight, bias: weight[bias > -0.87],
    "an element": lambda weight, bias: weight[2, 3] + 1,
    "matmul": lambda weight, bias: VALUE @ weight.T,
    "operators": lambda weight, bias: 1 - weight * 2 + bias[:, None] / 3,
    "addmm": lambda weight, bias: torch.addmm(bias, VALUE.view(-1, COLUMNS), weight.mT),
    "views": lambda weight, bias: torch.sin(weight.view(-1)[3:20].reshape(17, 1).expand(17, 2).transpose(0, 1)),
    "a reshape that copies": lambda weight, bias: weight.T.reshape(-1) * 1,
    "pieces": lambda weight, bias: torch.cat([piece * 2 for piece in weight.chunk(3)] + [bias[:COLUMNS, None].T]),
    "a layer norm": lambda weight, bias: functional.layer_norm(VALUE, (COLUMNS,), weight[0], weight[1]),
    "a convolution": lambda weight, bias: functional.conv1d(VALUE.transpose(1, 2), weight[:, :, None], bias),
    "another type": lambda weight, bias: weight.double().sum(),
    "numbers": lambda weight, bias: torch.tensor(bias.tolist()),
    "an argument by name": lambda weight, bias: torch.add(VALUE[0, 0], other=weight[4], alpha=2),
    "attention": attended,
}


@pytest.mark.parametrize("rows_at_a_time", [1, 3, ROWS])
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_weight_sees_the_moved_weight(use, distribution, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(streamed_noise, "CHUNK", rows_at_a_time * COLUMNS)
    theta, direction = THETA.clone(), Noise(3, 5, distribution)
    with torch.inference_mode(), perturbed(theta, direction, SCALE):
        found = USES[use](*parts(theta))
    with torch.inference_mode():
        expected = USES[use](*parts(theta + SCALE * torch.from_numpy(direction.values(SIZE))))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert not torch.equal(found, USES[use](*parts(theta))), "the noise matters"
    assert torch.equal(theta, THETA), "θ is only read"


def test_what_is_no_part_of_theta_stays_as_it_is():
    theta, other = THETA.clone(), THETA.clone()
    with perturbed(theta, DIRECTION, SCALE):
        assert torch.equal(functional.linear(VALUE, *parts(other)), functional.linear(VALUE, *parts(THETA)))


def test_questions_about_a_weight_are_answered_without_noise_being_made(monkeypatch):
    theta = THETA.clone()
    weight, bias = parts(theta)
    monkeypatch.setattr(Noise, "part", None)
    with perturbed(theta, DIRECTION, SCALE):
        assert (weight.shape, weight.size(1), weight.dtype, len(bias), weight.is_contiguous()) == ((7, 6), 6, torch.float32, 7, True)
        assert weight.T.shape == (COLUMNS, ROWS)


def test_the_opposite_point_is_as_far_on_the_other_side():
    theta, weight = torch.zeros(SIZE), nn.Parameter(torch.zeros(0), requires_grad=False)
    weight.data = theta[ROWS:].view(ROWS, COLUMNS)
    found = []
    for scale in (SCALE, -SCALE):
        with torch.inference_mode(), perturbed(theta, DIRECTION, scale):
            found.append(functional.linear(VALUE, weight))
    assert torch.equal(found[0], -found[1])


def test_a_linear_layer_never_has_more_than_some_rows_moved_at_a_time(monkeypatch):
    monkeypatch.setattr(streamed_noise, "CHUNK", 2 * COLUMNS)
    asked, own = [], Noise.part
    monkeypatch.setattr(Noise, "part", lambda noise, start, stop: (asked.append(stop - start), own(noise, start, stop))[1])
    theta = THETA.clone()
    with perturbed(theta, DIRECTION, SCALE):
        functional.linear(VALUE, parts(theta)[0])
        functional.embedding(TOKENS, parts(theta)[0])
    assert asked == [2 * COLUMNS] * 3 + [COLUMNS] + [COLUMNS] * 4, "four tokens are different ones"
