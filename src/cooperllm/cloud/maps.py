"""Fits the feedback maps on public text: exact Jacobians by back-propagation, running sums, one small linear system per layer.

No label is used. Three quarters of the texts are fitted on, one quarter chooses the ridge strength, and the last fit is on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cooperllm.algorithm import feedback, noise
from cooperllm.algorithm.feedback import Moments, Tokens
from cooperllm.algorithm.maps import DecodedMaps, Fitted, LayerMaps, pack_factors, pack_rows, unpack_maps, unpack_rows
from cooperllm.messages import Maps

MAP_TEXTS = (1 << 61) + 3
"""Noise index that chooses the public texts of a fit."""

DIRECTIONS, DIRECTION_BITS = 8, 8
FIT_BATCH = 16
DESCRIBED_BATCHES = 4
HELD_OUT_EVERY = 4


@runtime_checkable
class WatchedLayers(Protocol):
    """Adapted layers that hand over their outputs; `cooperllm.adapted_layers.AdaptedLayers` is one."""

    @property
    def below(self) -> Sequence[object]:
        """Adapted layers below the last one."""
        ...

    @property
    def width(self) -> int:
        """Hidden size D."""
        ...

    @property
    def has_head(self) -> bool:
        """Whether a head is trained from zero."""
        ...

    def blocks(self, most: int) -> tuple[tuple[int, int], ...]:
        """Divides their part of θ."""
        ...

    def watched(self, visit: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
        """Within it, forward passes call `visit` for each of them, and then for the last layer."""
        ...


@runtime_checkable
class WatchedModel(Protocol):
    """What the fit needs of a model; `cooperllm.models.Model` is one."""

    @property
    def adapted(self) -> WatchedLayers:
        """Its adapted layers."""
        ...

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def scores(self, theta: Tensor, batch: Any) -> Tensor:
        """Returns class scores [B, C]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A batch of public texts after a forward pass that can be differentiated.

    Attributes:
        tokens: Which token belongs to which example.
        is_token: What is no padding, shape [B, T].
        outputs: Of the mapped layers and of the last one, each [B, T, D].
        probabilities: Softmax of the scores, shape [B, C].
        jacobian: Derivative of each score at each token's last hidden state, shape [C, N, D].
    """

    tokens: Tokens
    is_token: Tensor
    outputs: tuple[Tensor, ...]
    probabilities: np.ndarray
    jacobian: np.ndarray

    def values(self, layer: int) -> np.ndarray:
        """The output of one layer at every token, shape [N, D]."""
        return self.outputs[layer].detach()[self.is_token].float().numpy()


class MapFitter:
    """Fits maps for every adapted layer below the last one.

    Attributes:
        blocks: Ranges of θ whose estimates are measured apart.
        has_texts: Whether there is anything to fit, and any text to fit it on.
        first_version: Updates before which every gradient is zero: one, where a head starts at zero.
    """

    def __init__(
        self, model: WatchedModel, public: Any, *, num_examples: int, num_components: int, rank: int, bits: int, most_blocks: int
    ) -> None:
        self._model = model
        self._public = public
        self._num_examples = num_examples
        self._num_components = num_components
        self._width = model.adapted.width
        self._num_layers = len(model.adapted.below)
        self._rank = min(rank, self._width)
        self._bits = bits
        self.blocks = model.adapted.blocks(most_blocks)
        self.has_texts = num_examples > 0 and len(public) > 0 and self._num_layers > 0
        self.first_version = 1 if model.adapted.has_head else 0

    def fit(self, theta: np.ndarray, seed: int, version: int, held: Sequence[Maps] = ()) -> Maps | None:
        """Fits the maps at θ, or what has changed in them.

        Args:
            theta: Current θ, shape [n], not modified.
            seed: Chooses the public texts.
            version: Updates in θ.
            held: Maps in use, as everybody decodes them, for a difference to them; nothing for whole maps.

        Returns:
            Packed maps; None where scores are not finite or move with no layer's output, so that there is nothing to learn.
        """
        point = torch.from_numpy(theta.copy())
        chosen = noise.permutation(seed, MAP_TEXTS, len(self._public))[: self._num_examples].tolist()
        starts = range(0, len(chosen), FIT_BATCH)
        batches = [self._model.batch(self._public, chosen[start : start + FIT_BATCH]) for start in starts]
        described: list[_Seen] = []
        if held:
            frame, directions, basis = unpack_maps(held, self._num_layers, self._width), None, None
        else:
            described = [self._seen(point, batch) for batch in batches[:DESCRIBED_BATCHES]]
            found = self._frame(described)
            if found is None:
                return None
            frame, directions, basis = found
        num_directions, num_features, _ = frame.layers[0].maps.shape
        kept, held_out = ([Moments.zero(num_features, num_directions, self._width) for _ in frame.layers] for _ in range(2))
        for position, batch in enumerate(batches):
            sums = held_out if position % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else kept
            seen = described[position] if position < len(described) else self._seen(point, batch)
            for layer, (features, targets) in enumerate(_examples(seen, frame)):
                sums[layer].add(features, targets)
        if not all(np.isfinite(part).all() for one in (*kept, *held_out) for part in (one.xx, one.xy)):
            return None
        judges = held_out if len(batches) >= HELD_OUT_EVERY else kept
        fits = [
            Fitted(maps=feedback.fit(one.beyond(layer.maps), other.beyond(layer.maps))[0], xx=one.plus(other).xx)
            for one, other, layer in zip(kept, judges, frame.layers, strict=True)
        ]
        return Maps(
            version=version,
            base_version=held[-1].version if held else -1,
            num_directions=0 if held else num_directions,
            directions=directions,
            num_components=0 if held else num_features // 2,
            basis=basis,
            rank=self._rank,
            factors=pack_factors(fits, self._rank),
        )

    def _frame(self, described: Sequence[_Seen]) -> tuple[DecodedMaps, bytes, bytes] | None:
        """Directions and bases from the first batches, as receivers decode them, with maps of zero; None where nothing can be learnt."""
        values = [np.concatenate([seen.values(layer) for seen in described]) for layer in range(self._num_layers)]
        moments = sum(feedback.gradient_moments(_by_text(seen), seen.probabilities) for seen in described)
        if not (np.isfinite(moments).all() and all(np.isfinite(part).all() for part in values)):
            return None
        chosen = feedback.main_directions(np.asarray(moments), DIRECTIONS)
        if not len(chosen):
            return None
        count = min(self._num_components, *(min(part.shape) for part in values))
        directions = pack_rows([chosen], DIRECTION_BITS)
        basis = pack_rows([feedback.principal_components(part, count) for part in values], self._bits)
        (decoded,) = unpack_rows(directions, [chosen.shape])
        nothing = np.zeros((len(chosen), 1 + 2 * count, self._width), np.float32)
        layers = tuple(LayerMaps(basis=one, maps=nothing) for one in unpack_rows(basis, [(self._width, count)] * self._num_layers))
        return DecodedMaps(version=-1, directions=decoded, layers=layers), directions, basis

    def _seen(self, point: Tensor, batch: Any) -> _Seen:
        outputs: dict[int, Tensor] = {}

        def visit(layer: int, output: Tensor) -> None:
            outputs[layer] = output if output.requires_grad else output.requires_grad_()

        with torch.enable_grad(), self._model.adapted.watched(visit):
            scores = self._model.scores(point, batch).float()
        ordered, is_token = tuple(outputs[layer] for layer in sorted(outputs)), batch.mask > 0
        columns = range(scores.shape[1])
        found = [torch.autograd.grad(scores[:, column].sum(), ordered[-1], retain_graph=True)[0] for column in columns]
        return _Seen(
            tokens=feedback.tokens(batch.mask.numpy()),
            is_token=is_token,
            outputs=ordered,
            probabilities=scores.detach().softmax(1).numpy(),
            jacobian=np.stack([part[is_token].float().numpy() for part in found]),
        )


def _by_text(seen: _Seen) -> np.ndarray:
    """The Jacobian summed over each text's tokens, shape [B, C, D]."""
    return np.stack([feedback.sums_of_texts(part, seen.tokens) for part in seen.jacobian], axis=1)


def _examples(seen: _Seen, frame: DecodedMaps) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Features and targets of each mapped layer's tokens, `algorithm.feedback`, eq. (7)."""
    tokens, top = seen.tokens, seen.outputs[-1]
    shares = feedback.token_shares(seen.jacobian, tokens)[:, None]
    lengths = tokens.lengths[tokens.owner][:, None].astype(np.float32)
    targets: list[list[np.ndarray]] = [[] for _ in frame.layers]
    for direction in frame.directions:
        along = torch.zeros_like(top)
        along[seen.is_token] = torch.from_numpy(shares * direction).to(top.dtype)
        gradients = torch.autograd.grad(top, seen.outputs[:-1], along, retain_graph=True)
        for of_layer, gradient in zip(targets, gradients, strict=True):
            of_layer.append(lengths * (gradient[seen.is_token].float().numpy() - shares * direction))
    for layer, (maps, found) in enumerate(zip(frame.layers, targets, strict=True)):
        yield feedback.features(seen.values(layer), tokens, maps.basis), found
