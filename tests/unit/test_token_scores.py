"""Scores in blocks of tokens against PyTorch's own cross entropy of all of them.

Run: pytest tests/unit/test_token_scores.py
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cooperllm import token_scores
from cooperllm.algorithm import noise
from cooperllm.classifiers import NextTokens, _is_for_each
from cooperllm.pretrained import tiny_llama
from cooperllm.token_scores import TokenScores

R, H, V = 5, 3, 23
FINISHES = {"as they are": lambda scores: scores, "bounded": lambda scores: 3 * torch.tanh(scores / 3), "two bytes": torch.Tensor.bfloat16}


def numbers(index, *shape):
    return torch.from_numpy(noise.gaussian(3, index, torch.Size(shape).numel())).view(shape)


@pytest.fixture(params=[1, 4, V, 2 * V])
def width(request, monkeypatch):
    monkeypatch.setattr(token_scores, "block_width", lambda _: request.param)


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_losses_and_gradients_are_those_of_all_scores_at_once(finish, has_bias):
    given = [numbers(0, R, H).requires_grad_(), numbers(1, V, H).requires_grad_(), *([numbers(2, V).requires_grad_()] if has_bias else [])]
    labels = torch.tensor([0, V - 1, 7, 7, 3])
    bias = given[2] if has_bias else None
    found = TokenScores(states=given[0], weight=given[1], bias=bias, finish=finish).losses(labels)
    expected = cross_entropy(finish(nn.functional.linear(given[0], given[1], bias)).float(), labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for part, whole in zip(torch.autograd.grad(found.mean(), given), torch.autograd.grad(expected.mean(), given), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6 if finish is not torch.Tensor.bfloat16 else 5e-3)


def test_a_gradient_makes_blocks_again_in_the_precision_that_they_were_made_in():
    """The states are bfloat16 by then, and the weights are not: outside of that precision there is no product of them."""
    states, weight, labels = (
        numbers(0, R, H).bfloat16().requires_grad_(),
        numbers(1, V, H).requires_grad_(),
        torch.tensor([0, V - 1, 7, 7, 3]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = TokenScores(states=states, weight=weight, bias=None, finish=lambda scores: scores).losses(labels).mean()
        expected = cross_entropy(nn.functional.linear(states, weight).float(), labels)
    for part, whole in zip(*(torch.autograd.grad(loss, (states, weight)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(part, whole, rtol=0.02, atol=5e-3)


@pytest.mark.usefixtures("width")
def test_the_likeliest_token_is_the_first_of_the_highest_in_whatever_block():
    weight = numbers(1, V, H)
    weight[[2, 21]] = 9 * numbers(0, R, H)[0]  # the highest twice, in two blocks
    found = TokenScores(states=numbers(0, R, H), weight=weight, bias=None, finish=lambda scores: scores).likeliest()
    assert found.tolist() == (numbers(0, R, H) @ weight.T).argmax(1).tolist()
    assert found[0] == 2


def test_a_score_far_above_the_others_overflows_nowhere():
    scores = TokenScores(states=torch.full((1, 1), 1e4), weight=torch.tensor([[1.0], [-1.0]]), bias=None, finish=lambda scores: scores)
    assert scores.losses(torch.tensor([0])).item() == 0
    assert scores.losses(torch.tensor([1])).item() == 2e4


@pytest.mark.parametrize(
    ("finish", "is_for_each"),
    [
        (lambda scores: scores / 8, True),
        (lambda scores: scores + torch.arange(50), False),  # something for each token of the vocabulary
        (lambda scores: scores.index_fill(1, torch.tensor([40]), 0.0), False),  # a token is named
        (lambda scores: scores - scores.mean(1, keepdim=True), False),
    ],
)
def test_scores_whose_fate_depends_on_their_token_are_found_out(finish, is_for_each):
    assert _is_for_each(finish, 50) is is_for_each


def test_a_model_that_names_tokens_behind_its_output_layer_is_asked_for_whole_rows():
    class Chooser(nn.Module):
        """Never says token 5."""

        def __init__(self):
            super().__init__()
            self.inner = tiny_llama(causal=True)[0].eval()
            self.config, self.get_output_embeddings = self.inner.config, self.inner.get_output_embeddings

        def forward(self, **given):
            found = self.inner(**given)
            found.logits = found.logits.index_fill(-1, torch.tensor([5]), -1e9)
            return found

    network, ids = NextTokens(Chooser()), torch.arange(12).view(2, 6)
    given = (ids, torch.ones_like(ids), torch.tensor([1, 2, 9]))
    for _ in range(2):
        torch.testing.assert_close(network(*given, in_blocks=True), network(*given))
    assert isinstance(NextTokens(tiny_llama(causal=True)[0])(*given, in_blocks=True), TokenScores)
