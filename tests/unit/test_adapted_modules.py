"""Adapted modules: which they are, what they hand over, and back-propagation that never leaves one of them.

Run: pytest tests/unit/test_adapted_modules.py
"""

import pytest
import torch
from torch import nn

from cooperllm.adapted_modules import AdaptedModules

SIZE = 4


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """An adapted layer with PEFT's names; only these two are trained."""

    def __init__(self, seed):
        super().__init__()
        self.base = drawn(seed, SIZE, SIZE)
        self.lora_A = nn.Parameter(drawn(seed + 1, 2, SIZE))
        self.lora_B = nn.Parameter(drawn(seed + 2, SIZE, 2))

    def forward(self, x):
        return x @ self.base + x @ self.lora_A.T @ self.lora_B.T


class Attention(nn.Module):
    """Two adapted layers that meet in a product; returns a second thing behind its output, as attentions do."""

    def __init__(self, seed):
        super().__init__()
        self.query, self.value = LowRank(seed), LowRank(seed + 3)

    def forward(self, x, *, scale):
        weights = (scale * self.query(x) @ x.transpose(1, 2)).softmax(-1)
        return weights @ self.value(x), weights


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = Attention(0), Attention(10), nn.Linear(SIZE, 3)

    def forward(self, ids, mask):
        x = torch.nn.functional.one_hot(ids, SIZE).float()
        x = x + self.first(x, scale=0.5)[0]
        return self.classifier((x + self.second(x, scale=0.5)[0]).mean(1))


IDS, MASK = torch.tensor([[0, 1, 2], [3, 3, 1]]), torch.ones(2, 3, dtype=torch.int64)


def ranges_of(network):
    sizes = [(name, tensor.numel()) for name, tensor in network.named_parameters()]
    starts = [sum(size for _, size in sizes[:index]) for index in range(len(sizes))]
    return {name: (start, start + size) for start, (name, size) in zip(starts, sizes, strict=True)}


@pytest.fixture
def network():
    return Network()


def run(network, theta):
    with torch.enable_grad():
        parts = {name: theta[slice(*where)].view_as(network.get_parameter(name)) for name, where in ranges_of(network).items()}
    return torch.func.functional_call(network, parts, (IDS, MASK))


def flat(network):
    return torch.cat([tensor.detach().reshape(-1) for tensor in network.parameters()])


def test_modules_are_the_parents_of_adapted_layers_in_the_order_of_theta(network):
    adapted = AdaptedModules(network, ranges_of(network))
    assert [(module.name, module.start, module.stop) for module in adapted.modules] == [("first", 0, 32), ("second", 32, 64)]
    assert adapted.sizes == ((SIZE, SIZE), (SIZE, SIZE))
    assert adapted.is_complete


def test_a_parent_inside_another_is_part_of_it(network):
    network.first.inner = nn.Module()
    network.first.inner.layer = LowRank(20)
    modules = AdaptedModules(network, ranges_of(network)).modules
    assert [(module.name, module.start, module.stop) for module in modules] == [("first", 0, 48), ("second", 48, 80)]


def test_what_is_pulled_back_through_a_module_is_back_propagation_from_its_output(network):
    """With the true gradient at each output, the parts add up to the true gradient of every adapter."""
    adapted, theta = AdaptedModules(network, ranges_of(network)), flat(network).requires_grad_()
    outputs = {}
    with adapted.watched(lambda number, _given, output: outputs.update({number: output})):
        loss = torch.nn.functional.cross_entropy(run(network, theta), torch.tensor([0, 2]))
    *deltas, expected = torch.autograd.grad(loss, [outputs[0], outputs[1], theta])
    found = torch.zeros_like(theta)
    with torch.no_grad(), adapted.pulled_back(theta, lambda number, _given, _output: deltas[number], found.add_):
        run(network, theta)
    # The same float32 operations in another order: some tens of roundings of numbers below 4.
    torch.testing.assert_close(found[:64], expected[:64], atol=100 * 4 * 2.0**-24, rtol=0)
    assert expected[:64].abs().max() > 1e-2
    assert not found[64:].any()


def test_a_module_keeps_no_graph_behind_its_output(network):
    adapted, theta, seen = AdaptedModules(network, ranges_of(network)), flat(network).requires_grad_(), []
    network.classifier.register_forward_hook(lambda _module, args, output: seen.append((args[0].requires_grad, output.requires_grad)))
    with torch.no_grad(), adapted.pulled_back(theta, lambda _number, _given, output: torch.ones_like(output), lambda part: None):
        scores = run(network, theta)
    assert seen == [(False, False)]
    assert torch.equal(scores, run(network, theta).detach())


@pytest.mark.parametrize("way", ["watched", "pulled_back"])
def test_an_error_on_the_way_leaves_the_network_as_it_was(network, way):
    adapted, theta = AdaptedModules(network, ranges_of(network)), flat(network).requires_grad_()

    def fail(*_args):
        raise ArithmeticError

    around = adapted.watched(fail) if way == "watched" else adapted.pulled_back(theta, fail, fail)
    with pytest.raises(ArithmeticError), torch.no_grad(), around:
        run(network, theta)
    assert torch.is_grad_enabled()
    for module in network.modules():
        assert (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)) == (0, 0, False)
