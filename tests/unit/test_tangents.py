"""Forward mode through a traced graph: each operation's derivatives are PyTorch's own.

Run: pytest tests/unit/test_tangents.py
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cooperllm.algorithm import noise
from cooperllm.packaging.tangents import Dual, MissingRuleError, WithTangents

ROWS, COLUMNS, DIRECTIONS = 5, 6, 3


def drawn(index, *shape):
    size = torch.Size(shape).numel()
    return torch.from_numpy(noise.gaussian(23, index, size)).reshape(shape)


W, SQUARE, ROW, MASK = drawn(1, COLUMNS, 4), drawn(2, ROWS, ROWS), drawn(3, COLUMNS), drawn(4, ROWS, COLUMNS) > 0

OPERATIONS = {
    "gelu": lambda x: functional.gelu(x),
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": lambda x: functional.silu(x),
    "relu": lambda x: functional.relu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh, erf, exp": lambda x: torch.exp(torch.erf(torch.tanh(x))),
    "log of a root": lambda x: torch.log(torch.sqrt(x * x + 1)),
    "reciprocals": lambda x: torch.reciprocal(x * x + 1) + torch.rsqrt(x * x + 2),
    "powers": lambda x: x**3 + x**2,
    "at least": lambda x: x.clamp_min(0.25),
    "frozen product": lambda x: x @ W,
    "frozen factor in front": lambda x: SQUARE @ x,
    "product of two": lambda x: x @ x.T,
    "batched products": lambda x: torch.bmm(x.reshape(5, 2, 3), x.reshape(5, 3, 2)) + torch.bmm(x.reshape(5, 2, 3), drawn(5, 5, 3, 2)),
    "sum with a row": lambda x: ROW + x.sum(0) + x,
    "difference from a row": lambda x: ROW - x - x[0],
    "a row becomes rows": lambda x: x[0] + drawn(6, 2, ROWS, COLUMNS),
    "products that broadcast": lambda x: x[0] * drawn(6, 2, ROWS, COLUMNS) * x * 0.5,
    "quotients": lambda x: x / (x[:, :1] ** 2 + 1) + ROW / (x * x + 1) + x / 3,
    "softmax": lambda x: torch.softmax(x, 0) + torch.softmax(x, -1),
    "logarithm of softmax": lambda x: torch.log_softmax(x, -1),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None, None], 2 * x[None, None], x[None, None] + 1, SQUARE > -9),
    "layer norm": lambda x: functional.layer_norm(x, (COLUMNS,), ROW, 2 * ROW),
    "layer norm alone": lambda x: functional.layer_norm(x, (COLUMNS,)),
    "mean square norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * ROW,
    "unit rows": lambda x: functional.normalize(x, dim=-1),
    "one of two": lambda x: torch.where(MASK, x, x * x) + torch.where(MASK, ROW, x),
    "parts": lambda x: torch.cat([*x.split([2, 4], -1), *x.split(3, 1), torch.ones(ROWS, 1)], -1),
    "slices": lambda x: x[1:4, 2:] * x[0, 0] + x[2, :4],
    "chosen rows": lambda x: x[torch.tensor([3, 1])] + x[torch.arange(2), torch.tensor([1, 0])][:, None],
    "turned": lambda x: x.reshape(ROWS, 2, 3).permute(1, 0, 2).transpose(-1, 0).reshape(3, -1),
    "stretched": lambda x: -x[:, None, :].expand(ROWS, 2, COLUMNS).contiguous() + x.unsqueeze(-2).squeeze(-2)[0],
    "folded": lambda x: x.sum((0, 1), keepdim=True) + x.mean(-1, keepdim=True) + x.unbind(0)[1],
}


def both(function, x):
    """(values and derivatives by the rules, the same by PyTorch)."""
    directions = drawn(9, DIRECTIONS, *x.shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # as `packaging.trace` traces
        graph = make_fx(function)(x)
        expected = [torch.func.jvp(function, (x,), (direction,)) for direction in directions]
    found = WithTangents(graph).run(Dual(x, directions))
    return SimpleNamespace(
        value=found.value, tangents=found.tangents, expected=expected[0][0], slopes=torch.stack([one[1] for one in expected])
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents_are_pytorchs_derivatives_and_values_stay(name):
    found = both(OPERATIONS[name], drawn(0, ROWS, COLUMNS))
    assert torch.equal(found.value, found.expected) or (found.value - found.expected).abs().max() < 1e-5  # a stacked product has more rows
    # Float32 through a handful of operations on numbers near 1.
    torch.testing.assert_close(found.tangents, found.slopes, rtol=1e-4, atol=1e-5)


def test_values_are_computed_once_for_all_directions():
    """A frozen product is one product of 1 + P factors; what does not depend on θ is not touched."""
    graph = make_fx(lambda x: functional.gelu(torch.tanh(W.T @ W) @ (x @ W).T))(drawn(0, ROWS, COLUMNS))
    again = make_fx(lambda x, z: WithTangents(graph).run(Dual(x, z)).tangents)(drawn(0, ROWS, COLUMNS), drawn(9, DIRECTIONS, ROWS, COLUMNS))
    count = Counter(str(node.target) for node in again.graph.nodes)
    assert count["aten.tanh.default"] == 1
    assert count["aten.mm.default"] == 3  # W'W, the stack of x and its tangents with W, and the value of the product in front


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: torch.cumsum(x, 0), "aten.cumsum.default"),
        (lambda x: torch.add(x, x, alpha=2), "aten.add.Tensor with alpha"),
        (lambda x: torch.linalg.vector_norm(x, 1), "Euclidean"),
        (lambda x: functional.layer_norm(x, (COLUMNS,), x[0]), "trained weights"),
        (lambda x: torch.pow(2.0, x), "aten.pow.Scalar"),
    ],
)
def test_an_operation_without_a_rule_is_named_and_never_passed_over(function, sentence):
    x = drawn(0, ROWS, COLUMNS)
    with pytest.raises(MissingRuleError, match=sentence):
        WithTangents(make_fx(function)(x)).run(Dual(x, x[None]))
