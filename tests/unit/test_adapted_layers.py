"""Adapted layers: which they are, what they hand over, what is exact at the top, and back-propagation that never leaves one of them.

Run: pytest tests/unit/test_adapted_layers.py
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cooperllm.adapted_layers import AdaptedLayers, states_of, with_states

SIZE, DEPTH, LAYER = 4, 4, 32
"""Hidden size, number of layers, trained values of one of them."""

EXACT = 2 * LAYER
"""Two mapped layers come first in θ."""

TOLERANCE = {"atol": 100 * 4 * 2.0**-24, "rtol": 0}
"""The same float32 operations in another order: some tens of roundings of numbers below 4."""


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """An adapted matrix with PEFT's names; only these two are trained."""

    def __init__(self, seed):
        super().__init__()
        self.base = drawn(seed, SIZE, SIZE)
        self.lora_A = nn.Parameter(drawn(seed + 1, 2, SIZE))
        self.lora_B = nn.Parameter(drawn(seed + 2, SIZE, 2))

    def forward(self, x):
        return x @ self.base + x @ self.lora_A.T @ self.lora_B.T


class Layer(nn.Module):
    """Two adapted matrices that meet in a product, something frozen behind them, and what it was given; some layers return more."""

    def __init__(self, seed, *, returns_tuple):
        super().__init__()
        self.query, self.value = LowRank(seed), LowRank(seed + 3)
        self.returns_tuple = returns_tuple

    def forward(self, x, *, scale):
        weights = (scale * self.query(x) @ x.transpose(1, 2)).softmax(-1)
        output = x + 0.3 * torch.tanh(weights @ self.value(x))
        return (output, weights) if self.returns_tuple else output


class Backbone(nn.Module):
    """The first of four layers is frozen, as is the norm above the last."""

    def __init__(self, *, returns_tuple=False):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=DEPTH, hidden_size=SIZE)
        self.layers = nn.ModuleList([Layer(10 * number, returns_tuple=returns_tuple) for number in range(DEPTH)])
        self.layers[0].requires_grad_(requires_grad=False)
        self.norm = nn.LayerNorm(SIZE).requires_grad_(requires_grad=False)

    def forward(self, x):
        for layer in self.layers:
            result = layer(x, scale=0.5)
            x = result[0] if isinstance(result, tuple) else result
        return self.norm(x)


class Network(nn.Module):
    def __init__(self, **changes):
        super().__init__()
        self.backbone, self.classifier = Backbone(**changes), nn.Linear(SIZE, 3)
        self.load_state_dict({"classifier.weight": drawn(50, 3, SIZE), "classifier.bias": drawn(51, 3)}, strict=False)

    def forward(self, ids, mask):
        return self.classifier(self.backbone(torch.nn.functional.one_hot(ids, SIZE).float()).mean(1))


IDS, MASK, LABELS = torch.tensor([[0, 1, 2], [3, 3, 1]]), torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 2])


def ranges_of(network):
    sizes = [(name, tensor.numel()) for name, tensor in network.named_parameters() if tensor.requires_grad]
    starts = [sum(size for _, size in sizes[:index]) for index in range(len(sizes))]
    return {name: (start, start + size) for start, (name, size) in zip(starts, sizes, strict=True)}


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def network(request):
    return Network(returns_tuple=request.param)


def adapted_of(network):
    return AdaptedLayers(network, ranges_of(network))


def flat(network):
    return torch.cat([tensor.detach().reshape(-1) for tensor in network.parameters() if tensor.requires_grad]).requires_grad_()


def run(network, theta):
    with torch.enable_grad():
        parts = {name: theta[slice(*where)].view_as(network.get_parameter(name)) for name, where in ranges_of(network).items()}
    return torch.func.functional_call(network, parts, (IDS, MASK))


def loss_of(network, theta):
    return torch.nn.functional.cross_entropy(run(network, theta), LABELS)


def back_propagated(network):
    """The true gradient in θ, and at the outputs of both mapped layers and of the last one."""
    theta, outputs = flat(network), {}
    with adapted_of(network).watched(lambda number, output: outputs.update({number: output})):
        loss = loss_of(network, theta)
    gradient, *deltas = torch.autograd.grad(loss, [theta, *(outputs[number] for number in range(3))])
    return gradient, deltas


def changes_in(network):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in network.modules()]


def counted(network):
    """Notes which modules a forward pass has entered."""
    entered = []
    for name in ("backbone.layers.1", "backbone.layers.2", "backbone.layers.3", "backbone.norm", "classifier"):
        network.get_submodule(name).register_forward_pre_hook(lambda _module, _args, name=name: entered.append(name))
    return entered


# Which they are.


def test_adapted_layers_below_the_last_one_need_maps_and_what_follows_them_in_theta_is_exact(network):
    adapted = adapted_of(network)
    assert [(layer.name, layer.start, layer.stop) for layer in adapted.below] == [
        ("backbone.layers.1", 0, LAYER),
        ("backbone.layers.2", LAYER, 2 * LAYER),
    ]
    assert (adapted.top, adapted.exact_start, adapted.width) == ("backbone.layers.3", EXACT, SIZE)
    assert (adapted.has_head, adapted.is_complete) == (True, True)


def test_with_the_last_layer_alone_nothing_needs_maps_and_everything_is_exact(network):
    network.backbone.layers[:-1].requires_grad_(requires_grad=False)
    adapted = adapted_of(network)
    assert (adapted.below, adapted.exact_start, adapted.blocks(2), adapted.is_complete) == ((), 0, (), True)


def test_a_last_layer_that_is_not_adapted_is_still_the_top(network):
    network.backbone.layers[-1].requires_grad_(requires_grad=False)
    network.classifier.requires_grad_(requires_grad=False)
    adapted = adapted_of(network)
    assert (len(adapted.below), adapted.top, adapted.exact_start) == (2, "backbone.layers.3", 2 * LAYER)
    assert (adapted.has_head, adapted.is_complete) == (False, True)


def embedding(network):
    network.backbone.embedding = nn.Embedding(2, SIZE)


def adapter_outside_the_list(network):
    network.backbone.pooler = LowRank(60)


def final_norm(network):
    network.backbone.norm.requires_grad_()


def head_before_the_layers(network):
    backbone = network.backbone
    del network.backbone
    network.backbone = backbone


def layers_in_two_lists(network):
    layers = network.backbone.layers
    network.backbone.layers, network.backbone.more = layers[:2], layers[2:]


def frozen_layer_in_between(network):
    network.backbone.layers[2].requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    "change", [embedding, adapter_outside_the_list, final_norm, head_before_the_layers, layers_in_two_lists, frozen_layer_in_between]
)
def test_what_is_trained_outside_the_layers_and_a_head_makes_estimates_incomplete(network, change):
    """As does a network without one list of layers, a head that comes before them in θ, and a layer that nothing is carried through."""
    assert adapted_of(network).is_complete
    change(network)
    assert not adapted_of(network).is_complete


@pytest.mark.parametrize(
    ("most", "expected"), [(0, ()), (1, ((0, EXACT),)), (2, ((0, LAYER), (LAYER, EXACT))), (9, ((0, LAYER), (LAYER, EXACT)))]
)
def test_blocks_are_runs_of_whole_layers_that_need_maps(network, most, expected):
    assert adapted_of(network).blocks(most) == expected


def test_layers_are_watched_in_the_order_of_the_pass_and_the_last_one_comes_last(network):
    seen, first = [], []
    with adapted_of(network).watched(lambda number, output: seen.append((number, output))):
        run(network, flat(network))
    network.backbone.norm.register_forward_pre_hook(lambda _module, args: first.append(args[0]))
    run(network, flat(network))
    assert [number for number, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[2][1], first[0])


# From the last layer on.


def opened(network, theta):
    """The loss of a pass that is opened at the top, the last layer's input and output, and what the layers below were given."""
    ends = []
    with adapted_of(network).opened_at_top(ends) as calls:
        loss = loss_of(network, theta)
    return loss, ends, calls


def test_from_the_last_layer_on_the_gradient_is_that_of_back_propagation(network):
    expected, deltas = back_propagated(network)
    theta = flat(network)
    loss, ends, _ = opened(network, theta)
    found, at_input, at_output = torch.autograd.grad(loss, [theta, *ends])
    torch.testing.assert_close(found[EXACT:], expected[EXACT:], **TOLERANCE)
    torch.testing.assert_close(at_input, deltas[-2], **TOLERANCE)  # what the last layer is given is what the one below it gave
    torch.testing.assert_close(at_output, deltas[-1], **TOLERANCE)
    assert min(expected[EXACT : EXACT + LAYER].abs().max(), expected[EXACT + LAYER :].abs().max(), at_input.abs().max()) > 1e-2
    assert not found[:EXACT].any()


def test_nothing_below_the_last_layer_is_in_the_graph(network):
    records = []
    for layer in network.backbone.layers:
        layer.register_forward_hook(lambda _module, args, result: records.append((args[0].requires_grad, torch.is_grad_enabled())))
    loss, ends, calls = opened(network, flat(network))
    assert records == [(False, False), (False, False), (False, False), (True, True)]
    assert ends[0].grad_fn is None
    assert not any(args[0].requires_grad for args, _ in calls)
    assert loss.requires_grad
    assert torch.is_grad_enabled()


def test_above_a_frozen_last_layer_the_gradient_at_its_ends_is_known_all_the_same(network):
    network.backbone.layers[-1].requires_grad_(requires_grad=False)
    network.classifier.requires_grad_(requires_grad=False)
    _, deltas = back_propagated(network)
    loss, ends, _ = opened(network, flat(network))
    for found, expected in zip(torch.autograd.grad(loss, ends), deltas[-2:], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


# Below the last layer.


def test_a_pass_notes_what_each_layer_below_is_given_in_the_order_of_the_pass(network):
    adapted, outputs = adapted_of(network), []
    _, ends, calls = opened(network, flat(network))
    with torch.no_grad(), adapted.watched(lambda _number, output: outputs.append(output)):
        run(network, flat(network))
    assert len(calls) == 2
    assert torch.equal(adapted.given(calls[1]), outputs[0])
    assert torch.equal(ends[0], outputs[1])
    assert [kwargs for _, kwargs in calls] == [{"scale": 0.5}] * 2


def test_what_is_pulled_back_through_a_layer_is_back_propagations_part_of_it(network):
    """With the true gradient at its output: the true gradient of its parameters, and at its input."""
    expected, deltas = back_propagated(network)
    adapted, theta = adapted_of(network), flat(network)
    calls = opened(network, theta)[2]
    for number, layer in enumerate(adapted.below):
        part, passed = adapted.pulled_back(theta, layer, calls[number], deltas[number])
        torch.testing.assert_close(part, expected[layer.start : layer.stop], **TOLERANCE)
        assert part.abs().max() > 1e-2
        if number:
            torch.testing.assert_close(passed, deltas[number - 1], **TOLERANCE)


def test_carried_from_layer_to_layer_it_is_the_whole_of_back_propagation(network):
    expected, _ = back_propagated(network)
    adapted, theta = adapted_of(network), flat(network)
    loss, ends, calls = opened(network, theta)
    found, delta = torch.autograd.grad(loss, [theta, ends[0]])
    for layer, call in zip(reversed(adapted.below), reversed(calls), strict=True):
        found[layer.start : layer.stop], delta = adapted.pulled_back(theta, layer, call, delta)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_layer_runs_alone_when_it_is_pulled_back_and_leaves_no_graph(network):
    adapted, theta = adapted_of(network), flat(network)
    calls, entered = opened(network, theta)[2], counted(network)
    part, passed = adapted.pulled_back(theta, adapted.below[1], calls[1], torch.ones(2, 3, SIZE))
    assert entered == [adapted.below[1].name]
    assert not part.requires_grad
    assert not passed.requires_grad
    assert not adapted.given(calls[1]).requires_grad


def test_states_given_by_name_are_found_like_those_given_first():
    states, other = torch.zeros(1), torch.ones(1)
    for call in (((states, 3), {"mask": 4}), ((), {"hidden_states": states, "mask": 4})):
        assert states_of(call) is states
        assert states_of(with_states(call, other)) is other
        assert states_of(call) is states
    assert with_states(((states, 3), {"mask": 4}), other)[0][1:] == (3,)
    assert with_states(((), {"hidden_states": states, "mask": 4}), other)[1]["mask"] == 4


@pytest.mark.parametrize("way", ["watched", "opened_at_top", "pulled_back"])
@pytest.mark.parametrize("is_recording", [True, False])
def test_an_error_on_the_way_leaves_the_network_as_it_was(network, way, is_recording):
    adapted, theta, call = adapted_of(network), flat(network), ((torch.ones(2, 3, SIZE),), {"scale": "no number"})
    before = changes_in(network)
    work = {
        "watched": lambda: watched_run(adapted, network, theta),
        "opened_at_top": lambda: opened_and_failed(adapted, network, theta),
        "pulled_back": lambda: adapted.pulled_back(theta, adapted.below[1], call, torch.ones(2, 3, SIZE)),
    }[way]
    with torch.set_grad_enabled(is_recording):
        with pytest.raises((ArithmeticError, TypeError)):
            work()
        assert torch.is_grad_enabled() is is_recording
    assert changes_in(network) == before


def watched_run(adapted, network, theta):
    def fail(*_args):
        raise ArithmeticError

    with adapted.watched(fail):
        run(network, theta)


def opened_and_failed(adapted, network, theta):
    with adapted.opened_at_top([]):
        run(network, theta)
        raise ArithmeticError


@pytest.mark.parametrize("is_recording", [True, False])
def test_two_passes_leave_the_network_as_it_was(network, is_recording):
    adapted, theta, before = adapted_of(network), 2 * flat(network).detach(), changes_in(network)
    own = [tensor.detach().clone() for tensor in network.parameters()]
    theta.requires_grad_()
    with torch.set_grad_enabled(is_recording):
        with adapted.opened_at_top([]) as calls:
            run(network, theta)
        for layer, call in zip(adapted.below, calls, strict=True):
            adapted.pulled_back(theta, layer, call, torch.ones(2, 3, SIZE))
        assert torch.is_grad_enabled() is is_recording
    assert changes_in(network) == before
    assert all(torch.equal(*pair) for pair in zip(own, network.parameters(), strict=True))
