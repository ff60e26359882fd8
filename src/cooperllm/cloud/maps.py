"""Fits the feedback maps on public text: exact Jacobians by back-propagation, running sums, one small linear system per module.

No label is used. Three quarters of the texts are fitted on, one quarter chooses the ridge strength, and the last fit is on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from cooperllm.algorithm import feedback, noise
from cooperllm.algorithm.feedback import Moments
from cooperllm.algorithm.maps import Fitted, ModuleMaps, pack_basis, pack_factors, unpack_basis, unpack_maps
from cooperllm.messages import Maps, Packed

MAP_TEXTS = (1 << 61) + 3
"""Noise index that chooses the public texts of a fit."""

MOST_CONTRASTS = 8
FIT_BATCH = 16
DESCRIBED_BATCHES = 4
HELD_OUT_EVERY = 4


@runtime_checkable
class WatchedModules(Protocol):
    """Adapted modules that hand over their inputs and outputs; `cooperllm.adapted_modules.AdaptedModules` is one."""

    @property
    def head(self) -> object:
        """A head that is trained from zero, or None."""
        ...

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(H, D) of each module."""
        ...

    def blocks(self, most: int) -> tuple[tuple[int, int], ...]:
        """Divides the adapted part of θ."""
        ...

    def watched(self, visit: Callable[[int, torch.Tensor, torch.Tensor], None]) -> AbstractContextManager[None]:
        """Within it, forward passes call `visit`."""
        ...


@runtime_checkable
class WatchedModel(Protocol):
    """What the fit needs of a model; `cooperllm.models.Model` is one."""

    @property
    def adapted(self) -> WatchedModules:
        """Its adapted modules."""
        ...

    def batch(self, examples: Any, indices: Sequence[int]) -> Any:
        """Pads chosen examples."""
        ...

    def scores(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """Returns class scores [B, C]."""
        ...


class MapFitter:
    """Fits maps for every adapted module.

    Attributes:
        blocks: Ranges of θ whose estimates are measured apart.
        has_texts: Whether there is anything to fit on.
        first_version: Updates before which every Jacobian is zero: one, where a head starts at zero.
    """

    def __init__(
        self, model: WatchedModel, public: Any, *, num_examples: int, num_components: int, rank: int, bits: int, most_blocks: int
    ) -> None:
        self._model = model
        self._public = public
        self._num_examples = num_examples
        self._num_components = num_components
        self._rank = min([rank, *(size for _, size in model.adapted.sizes)])
        self._bits = bits
        self.blocks = model.adapted.blocks(most_blocks)
        self.has_texts = len(public) > 0
        self.first_version = 0 if model.adapted.head is None else 1

    def fit(self, theta: np.ndarray, seed: int, version: int, held: Sequence[Maps] = ()) -> Maps | None:
        """Fits the maps at θ, or what has changed in them.

        Args:
            theta: Current θ, shape [n], not modified.
            seed: Chooses the public texts.
            version: Updates in θ.
            held: Maps in use, as everybody decodes them, for a difference to them; nothing for whole maps.

        Returns:
            Packed maps; None where the model's scores are not finite, so that there is nothing to learn.
        """
        point = torch.from_numpy(theta.copy())
        chosen = noise.permutation(seed, MAP_TEXTS, len(self._public))[: self._num_examples].tolist()
        starts = range(0, len(chosen), FIT_BATCH)
        batches = [self._model.batch(self._public, chosen[start : start + FIT_BATCH]) for start in starts]
        found = self._describe(point, batches)
        if found is None:
            return None
        contrasts, decoded, basis = self._frame(*found, held)
        bases = [module.basis for module in decoded]
        kept, held_out = (
            [
                Moments.zero(1 + 2 * basis.shape[1], len(contrasts), output_size)
                for basis, (_, output_size) in zip(bases, self._model.adapted.sizes, strict=True)
            ]
            for _ in range(2)
        )
        for position, batch in enumerate(batches):
            sums = held_out if position % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else kept
            for module, (described, targets) in enumerate(self._examples(point, batch, contrasts, bases)):
                sums[module].add(described, targets)
        judges = held_out if len(batches) >= HELD_OUT_EVERY else kept
        fits = [
            Fitted(maps=feedback.fit(one.beyond(module.maps), other.beyond(module.maps))[0], xx=one.plus(other).xx)
            for one, other, module in zip(kept, judges, decoded, strict=True)
        ]
        return Maps(
            version=version,
            base_version=held[-1].version if held else -1,
            contrasts=contrasts[:0] if held else contrasts,
            num_components=0 if held else bases[0].shape[1],
            basis=basis,
            rank=self._rank,
            factors=pack_factors(fits, self._rank),
        )

    def _frame(
        self, contrasts: np.ndarray, bases: Sequence[np.ndarray], held: Sequence[Maps]
    ) -> tuple[np.ndarray, list[ModuleMaps], Packed | None]:
        """What a fit starts from, as receivers decode it: the maps in use, or a new basis and maps of zero."""
        sizes = self._model.adapted.sizes
        if held:
            return held[0].contrasts, unpack_maps(held, sizes, contrasts.shape[1]), None
        packed, width = pack_basis(bases, self._bits), bases[0].shape[1]
        decoded = unpack_basis(packed, [size for size, _ in sizes], width)
        shapes = [(len(contrasts), 1 + 2 * width, size) for _, size in sizes]
        modules = [ModuleMaps(basis=basis, maps=np.zeros(shape, np.float32)) for basis, shape in zip(decoded, shapes, strict=True)]
        return contrasts, modules, packed

    def _examples(
        self, point: torch.Tensor, batch: Any, contrasts: np.ndarray, bases: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Features and targets of each module's tokens: T times the Jacobian of each contrast."""
        is_token = batch.mask.numpy() > 0
        tokens = feedback.tokens(batch.mask.numpy())
        lengths = tokens.lengths[tokens.owner][:, None].astype(np.float32)
        inputs, jacobians = self._jacobians(point, batch, contrasts)
        for module, basis in enumerate(bases):
            described = feedback.features(inputs[module][is_token], tokens, basis)
            yield described, [lengths * of_contrast[module][is_token] for of_contrast in jacobians]

    def _describe(self, point: torch.Tensor, batches: Sequence[Any]) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """Contrasts from public scores, and a basis for each module's input, from the first batches; None where one is not finite."""
        scores: list[np.ndarray] = []
        inputs: list[list[np.ndarray]] = [[] for _ in self._model.adapted.sizes]
        for batch in batches[:DESCRIBED_BATCHES]:
            is_token = batch.mask > 0

            def visit(module: int, given: torch.Tensor, _output: torch.Tensor, is_token: torch.Tensor = is_token) -> None:
                inputs[module].append(given[is_token].float().numpy())

            with torch.no_grad(), self._model.adapted.watched(visit):
                scores.append(self._model.scores(point, batch).float().numpy())
        stacked = [np.concatenate(parts) for parts in inputs]
        if not all(np.isfinite(values).all() for values in (*scores, *stacked)):
            return None
        count = min(self._num_components, *(min(part.shape) for part in stacked))
        return feedback.contrasts(np.concatenate(scores), MOST_CONTRASTS), [feedback.principal_components(part, count) for part in stacked]

    def _jacobians(self, point: torch.Tensor, batch: Any, contrasts: np.ndarray) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Inputs of each module, and the derivative of each contrast at each module's output."""
        inputs: dict[int, torch.Tensor] = {}
        outputs: dict[int, torch.Tensor] = {}

        def visit(module: int, given: torch.Tensor, output: torch.Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            inputs[module], outputs[module] = given, output

        with torch.enable_grad(), self._model.adapted.watched(visit):
            scores = self._model.scores(point, batch).float()
            along = scores @ torch.from_numpy(contrasts).T
            ordered = [outputs[module] for module in sorted(outputs)]
            gradients = [
                torch.autograd.grad(along[:, contrast].sum(), ordered, retain_graph=contrast + 1 < len(contrasts))
                for contrast in range(len(contrasts))
            ]
        found = [inputs[module].float().numpy() for module in sorted(inputs)]
        return found, [[part.float().numpy() for part in parts] for parts in gradients]
