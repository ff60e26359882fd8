"""Forward mode: derivatives along P directions, carried through a traced graph beside its values.

    y = W x,       ẏ_p = W ẋ_p                                              (1)  a frozen product: 1 + P factors in one product
    y = x ∘ w,     ẏ_p = ẋ_p ∘ w + x ∘ ẇ_p                                  (2)  a product of two of them, matrices alike
    y = φ(x),      ẏ_p = φ'(x) ∘ ẋ_p                                        (3)  anything entry by entry
    y = σ(x),      ẏ_p = y ∘ (ẋ_p - Σ y ∘ ẋ_p)                              (4)  softmax; of its logarithm ẋ_p - Σ σ(x) ∘ ẋ_p
    y = n ∘ w + b, ẏ_p = w / s ∘ (ẋ_p - mean ẋ_p - n ∘ mean(n ∘ ẋ_p))       (5)  layer norm, n = (x - mean x) / s

Values are computed once, whatever P is, and as the graph without tangents computes them; what does not depend on θ has no tangents.
`torch.func.vmap` over `torch.func.jvp` says the same in one line, but its rules read sizes into Python, which a graph keeps open.
An operation without a rule is refused by name; a graph needs rules only for what lies between θ and the loss.

Dimension key: P directions; a tangent of a value [...] is [P, ...].
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

EUCLIDEAN = 2


class MissingRuleError(Exception):
    """A graph has an operation that nothing here differentiates; `packaging.trace` says so to the user."""


@dataclass(frozen=True)
class Dual:
    """A value that depends on θ.

    Attributes:
        value: At θ.
        tangents: Its derivatives along the directions, one behind the other.
    """

    value: Tensor
    tangents: Tensor


class WithTangents(fx.Interpreter):
    """Runs a traced graph of which some inputs are `Dual`."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation as it is, or by its rule where it is given a `Dual`."""
        duals = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Dual)]
        if target is operator.getitem or not duals:
            return super().call_function(target, args, kwargs)
        if target is aten.sym_size.int:
            return target(args[0].value, *args[1:])
        rule = RULES.get(target)
        if rule is None or any(isinstance(value, Dual) for value in kwargs.values()):
            raise MissingRuleError(str(target))
        return rule(target, args, kwargs)


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _value(given: Any) -> Any:
    return given.value if isinstance(given, Dual) else given


def _values(given: Any) -> Any:
    return pytree.tree_map_only(Dual, _value, given)


def _aligned(dual: Dual, rank: int) -> Tensor:
    """Tangents that broadcast with values of a higher rank: the directions stay in front."""
    tangents, own = dual.tangents, dual.value.dim()
    return tangents if own == rank else tangents.reshape(tangents.shape[0], *[1] * (rank - own), *tangents.shape[1:])


def _from_behind(dim: int, rank: int) -> int:
    """A dimension counted from the last, which the directions in front do not move."""
    return dim - rank if dim >= 0 else dim


def _alike(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """Linear in its first input, entry by entry."""
    return Dual(op(args[0].value, *args[1:], **kwargs), op(args[0].tangents, *args[1:], **kwargs))


def _along(*places: int, beyond: int = 0, default: int | None = None) -> Rule:
    """Linear in its first input, or in a list of such, along the dimensions that stand at `places` of its arguments."""

    def rule(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, given = args[0], [*args, *[default] * (max(places) + 1 - len(args))]
        rank = _value(first[0] if isinstance(first, Sequence) else first).dim() + beyond
        for place in places:
            given[place] = pytree.tree_map_only(int, lambda dim: _from_behind(dim, rank), given[place])
        found = op(*_values(args), **kwargs)
        tangents = op(_tangents(first), *given[1:], **kwargs)
        return [Dual(*pair) for pair in zip(found, tangents, strict=True)] if isinstance(found, Sequence) else Dual(found, tangents)

    return rule


def _tangents(given: Any) -> Any:
    """Tangents of an input, or of a list of inputs, some of which may have none."""
    if isinstance(given, Dual):
        return given.tangents
    directions = next(one for one in given if isinstance(one, Dual)).tangents.shape[0]
    return [one.tangents if isinstance(one, Dual) else torch.zeros_like(one).expand(directions, *one.shape) for one in given]


def _view(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    dual, size = args
    return Dual(op(dual.value, size), dual.tangents.reshape(dual.tangents.shape[0], *size))


def _expand(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    dual, size = args
    return Dual(op(dual.value, size), _aligned(dual, len(size)).expand(dual.tangents.shape[0], *size))


def _permute(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    dual, order = args
    return Dual(op(dual.value, order), dual.tangents.permute(0, *(dim % len(order) + 1 for dim in order)))


def _index(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    dual, places = args
    return Dual(op(dual.value, places), op(dual.tangents, [None, *places]))


def _matrix_product(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    """Eq. (1)-(2)."""
    x, w = args
    if isinstance(x, Dual) and not isinstance(w, Dual) and w.dim() == 2:
        found = torch.cat([x.value[None], x.tangents]) @ w
        return Dual(found[0], found[1:])
    parts = [x.tangents @ _value(w)] if isinstance(x, Dual) else []
    parts += [_value(x) @ w.tangents] if isinstance(w, Dual) else []
    return Dual(op(_value(x), _value(w)), reduce(torch.add, parts))


def _product(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    """Eq. (2)."""
    x, w = args
    found = op(_value(x), _value(w))
    parts = [_aligned(one, found.dim()) * _value(other) for one, other in ((x, w), (w, x)) if isinstance(one, Dual)]
    return Dual(found, reduce(torch.add, parts))


def _sum(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """A sum, or a difference."""
    if kwargs:
        raise MissingRuleError(f"{op} with {', '.join(kwargs)}")
    x, y = args
    found = op(_value(x), _value(y))
    if isinstance(x, Dual) and isinstance(y, Dual):
        return Dual(found, op(_aligned(x, found.dim()), _aligned(y, found.dim())))
    tangents = _aligned(x if isinstance(x, Dual) else y, found.dim())
    if not isinstance(x, Dual) and op is aten.sub.Tensor:
        tangents = -tangents
    return Dual(found, tangents if tangents.shape[1:] == found.shape else tangents.expand(tangents.shape[0], *found.shape))


def _quotient(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    """Eq. (2) for x ∘ 1/w."""
    x, w = args
    found = op(_value(x), _value(w))
    parts = [_aligned(x, found.dim()) / _value(w)] if isinstance(x, Dual) else []
    parts += [-_aligned(w, found.dim()) * (found / w.value)] if isinstance(w, Dual) else []
    return Dual(found, reduce(torch.add, parts))


def _choice(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Dual:
    """One of two values, as a condition says that does not depend on θ."""
    condition, *pair = args
    found = op(condition, *_values(pair))
    zero = torch.zeros((), dtype=found.dtype)
    return Dual(found, op(condition, *(_aligned(one, found.dim()) if isinstance(one, Dual) else zero for one in pair)))


def _entry_by_entry(derivative: Callable[..., Tensor]) -> Rule:
    """Eq. (3) with φ'(x, y), y = φ(x), and whatever else φ is given."""

    def rule(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
        dual, *others = args
        if not isinstance(dual, Dual) or any(isinstance(other, Dual) for other in others):
            raise MissingRuleError(f"{op} of several tensors")
        found = op(dual.value, *others, **kwargs)
        return Dual(found, dual.tangents * derivative(dual.value, found, *others, **kwargs))

    return rule


def _slope_of_gelu(x: Tensor, _y: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    bent = torch.tanh(scale * (x + cubic * x * x * x))
    return 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * scale * (1 + 3 * cubic * x * x)


def _slope_of_power(x: Tensor, _y: Tensor, power: float) -> Tensor:
    return power * x ** (power - 1)


def _slope_above(x: Tensor, _y: Tensor, least: float) -> Tensor:
    return (x >= least).to(x.dtype)


def _slope_of_silu(x: Tensor, y: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share + y * (1 - share)


def _softmax(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """Eq. (4)."""
    dual, dim = args[:2]
    found, dim = op(dual.value, *args[1:], **kwargs), _from_behind(dim, dual.value.dim())
    if op is aten._log_softmax.default:
        return Dual(found, dual.tangents - (found.exp() * dual.tangents).sum(dim, keepdim=True))
    weighted = found * dual.tangents
    return Dual(found, weighted - found * weighted.sum(dim, keepdim=True))


def _layer_norm(op: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[Any]:
    """Eq. (5); frozen weights, over the last dimension."""
    dual, shape, weight, bias, epsilon = args
    if any(isinstance(one, Dual) for one in (weight, bias)) or len(shape) != 1:
        raise MissingRuleError(f"{op} with trained weights, or over more than one dimension")
    found, centred = op(*_values(args))[0], dual.value - dual.value.mean(-1, keepdim=True)
    inverse = ((centred * centred).mean(-1, keepdim=True) + epsilon).rsqrt()
    normal, tangents = centred * inverse, dual.tangents
    tangents = tangents - tangents.mean(-1, keepdim=True) - normal * (normal * tangents).mean(-1, keepdim=True)
    return [Dual(found, tangents * (inverse if weight is None else inverse * weight)), None, None]


def _length(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """Euclidean lengths along dimensions that are kept, as labels' texts have them."""
    if len(args) != 4 or args[1] != EUCLIDEAN or not args[3] or kwargs:
        raise MissingRuleError(f"{op} other than a Euclidean length along dimensions that are kept")
    dual, _, dims, _ = args
    found = op(*_values(args))
    return Dual(found, (dual.value / found * dual.tangents).sum([_from_behind(dim, dual.value.dim()) for dim in dims], keepdim=True))


SLOPES: Mapping[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.silu.default: _slope_of_silu,
    aten.relu.default: lambda x, _y: (x > 0).to(x.dtype),
    aten.tanh.default: lambda _x, y: 1 - y * y,
    aten.sigmoid.default: lambda _x, y: y * (1 - y),
    aten.erf.default: lambda x, _y: torch.exp(-x * x) * (2 / math.sqrt(math.pi)),
    aten.exp.default: lambda _x, y: y,
    aten.log.default: lambda x, _y: 1 / x,
    aten.sqrt.default: lambda _x, y: 0.5 / y,
    aten.rsqrt.default: lambda x, y: -0.5 * y / x,
    aten.reciprocal.default: lambda _x, y: -y * y,
}
"""φ'(x, y) for eq. (3), y = φ(x)."""

RULES: Mapping[Any, Rule] = {
    **{op: _entry_by_entry(derivative) for op, derivative in SLOPES.items()},
    aten.gelu.default: _entry_by_entry(_slope_of_gelu),
    aten.clamp_min.default: _entry_by_entry(_slope_above),
    aten.pow.Tensor_Scalar: _entry_by_entry(_slope_of_power),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _matrix_product),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default), _softmax),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default, aten.alias.default, aten.neg.default, aten.mul.Scalar), _alike),
    **dict.fromkeys((aten.select.int, aten.sum.dim_IntList, aten.mean.dim, aten.squeeze.dim, aten.squeeze.dims), _along(1)),
    **dict.fromkeys((aten.slice.Tensor, aten.cat.default, aten.unbind.int), _along(1, default=0)),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.Tensor), _along(2, default=0)),
    aten.transpose.int: _along(1, 2),
    aten.unsqueeze.default: _along(1, beyond=1),
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    aten.where.self: _choice,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.index.Tensor: _index,
    aten.native_layer_norm.default: _layer_norm,
    aten.linalg_vector_norm.default: _length,
}
"""How each operation that `make_fx` leaves of a network passes tangents on."""
