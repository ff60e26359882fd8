"""What a device package says of itself: `manifest.json`, every number of it bounded.

A package is a directory:

    manifest.json    sizes, settings, digests of all other files, golden losses
    *.onnx           graphs; θ is an input of them
    weights.bin      frozen weights of all graphs, page by page, to be mapped
    theta_0.bin      θ_0 of the package's seed, little-endian float32 [n]
    tokenizer.json   the tokeniser, as the library `tokenizers` reads it

Dimension key: n trainable parameters, C classes, P points.
"""

import math
from dataclasses import dataclass
from enum import Enum
from string import Formatter
from typing import Annotated

import numpy as np
from msgspec import Meta

from cooperllm.completion import Frame
from cooperllm.config import Objective, Variant
from cooperllm.widths import Widths

PACKAGE_VERSION = 5
"""Raised whenever the meaning of a file in a package changes."""

MANIFEST, WEIGHTS, THETA, TOKENIZER = "manifest.json", "weights.bin", "theta_0.bin", "tokenizer.json"
LOSSES, SLOPES, PREFIX, OBSERVE, PULL_BACK = "losses", "slopes", "prefix", "observe", "pull_back"
"""Names of the graphs; `losses` is always there, `prefix` where layers below the first adapted one are frozen, `slopes` where
forward mode was asked for."""

Count = Annotated[int, Meta(ge=0, le=1 << 32)]
Positive = Annotated[int, Meta(ge=1, le=1 << 32)]
NumClasses = Annotated[int, Meta(ge=2, le=1 << 20)]
NumTokens = Annotated[int, Meta(ge=2, le=1 << 24)]
Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
FileName = Annotated[str, Meta(pattern=r"^[a-z0-9_]+\.[a-z]+$", max_length=64)]
WeightName = Annotated[str, Meta(pattern=r"^weight_[0-9]+$", max_length=32)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the package.

    Attributes:
        size: Bytes.
        sha256: Digest of its contents, hexadecimal.
    """

    size: Annotated[int, Meta(ge=0, le=1 << 44)]
    sha256: Sha256


class WeightKind(Enum):
    """What a shared weight is made of; the values are NumPy's names."""

    FLOAT32 = "float32"
    INT8 = "int8"
    UINT8 = "uint8"
    INT64 = "int64"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightEntry:
    """A weight that several graphs may have, in the file of weights.

    Attributes:
        offset: Its first byte.
        kind: Type of its entries.
        shape: Its shape.
    """

    offset: Annotated[int, Meta(ge=0, le=1 << 44)]
    kind: WeightKind
    shape: Annotated[tuple[Positive, ...], Meta(max_length=8)]

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.offset + math.prod(self.shape) * np.dtype(self.kind.value).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEntry:
    """An adapted layer below the last one.

    Attributes:
        start: First position of its parameters in θ.
        stop: Position after the last.
        seen: Place of its output among the tensors that the graph `observe` hands out.
    """

    start: Count
    stop: Count
    seen: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """Losses that a sound package gives: the point p is θ_0 + scale_p · z(seed, p), `algorithm.noise`.

    Attributes:
        texts: A batch.
        token_ids: The same, as the model's own tokeniser reads it.
        labels: Its classes; empty for next tokens.
        completions: For next tokens: what is said after each text.
        seed: Names the directions.
        scales: Lengths of the perturbations; the first is 0.
        losses: Mean loss of the batch at each point, computed by PyTorch in float32.
        tolerance: How far a device's losses may lie from these.
    """

    texts: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    token_ids: tuple[tuple[Count, ...], ...]
    labels: tuple[Count, ...]
    completions: tuple[str, ...]
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    scales: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=16)]
    losses: tuple[Number, ...]
    tolerance: Annotated[float, Meta(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that a device needs to know of a package.

    Attributes:
        format_version: Of the package; `PACKAGE_VERSION`.
        variant: How weights are kept.
        model: Name of the model, for people.
        seed: Whose θ_0 is in the package.
        label_names: Names of the classes; empty for next tokens.
        num_parameters: n.
        num_classes: C; for next tokens the size of the vocabulary.
        objective: How scores are made.
        max_tokens: Texts are cut at so many tokens.
        prompt: For label words: what a text is put into.
        frame: For next tokens: what stands around a text and its completion.
        pad_id: Token that fills up short rows.
        widths: Sizes of activations.
        multiplications: With frozen matrices, for each token and point that the graph `losses` is given.
        layers: Adapted layers below the last one, in the order of θ; together they are its beginning.
        graphs: Graphs of the package.
        files: Every file but the manifest.
        weights: What graphs share of the file of weights, by name.
        golden: Losses to compare with.
    """

    format_version: Count
    variant: Variant
    model: str
    seed: Count
    label_names: tuple[str, ...]
    num_parameters: Positive
    num_classes: NumClasses
    objective: Objective
    max_tokens: NumTokens
    prompt: str
    frame: Frame | None
    pad_id: Count
    widths: Widths
    multiplications: Count
    layers: tuple[LayerEntry, ...]
    graphs: tuple[str, ...]
    files: dict[FileName, FileEntry]
    weights: dict[WeightName, WeightEntry]
    golden: Golden

    @property
    def exact_start(self) -> int:
        """From this position of θ on `observe` gives exact gradients."""
        return self.layers[-1].stop if self.layers else 0

    def complaint(self) -> str | None:
        """Says which of its numbers contradict each other.

        Returns:
            A part of a sentence, or None where they agree.
        """
        n, golden = self.num_parameters, self.golden
        spans = [(layer.start, layer.stop) for layer in self.layers]
        wanted = {f"{name}.onnx" for name in self.graphs} | {WEIGHTS, THETA, TOKENIZER}
        if not {LOSSES} <= set(self.graphs) <= {LOSSES, SLOPES, PREFIX, OBSERVE, PULL_BACK}:
            others = f"'{SLOPES}', '{PREFIX}', '{OBSERVE}', '{PULL_BACK}'"
            return f"graphs {list(self.graphs)} found, '{LOSSES}' and some of {others} expected"
        if set(self.files) != wanted:
            return f"files {sorted(self.files)} found, {sorted(wanted)} expected"
        starts = [0, *(stop for _, stop in spans)]
        if any(start != expected or not start < stop <= n for (start, stop), expected in zip(spans, starts, strict=False)):
            return f"ranges {spans} found, neighbouring ranges from 0 on of {n} parameters expected"
        if bool(self.layers) != (PULL_BACK in self.graphs):
            return (
                f"{len(self.layers)} layers below the last one and graphs {list(self.graphs)} found, '{PULL_BACK}' for such layers expected"
            )
        if self.files[THETA].size != 4 * n:
            return f"{THETA} of {self.files[THETA].size} bytes found, {4 * n} expected"
        beyond = [name for name, entry in self.weights.items() if entry.stop > self.files[WEIGHTS].size]
        if beyond:
            return f"{beyond[0]} found that ends behind byte {self.files[WEIGHTS].size} of {WEIGHTS}, weights within the file expected"
        is_next_token = self.objective is Objective.NEXT_TOKEN
        if is_next_token is (self.frame is None):
            return (
                f"objective {self.objective.value} and {'no' if self.frame is None else 'a'} frame found, a frame for next-token expected"
            )
        num_names = 0 if is_next_token else self.num_classes
        if len(self.label_names) != num_names:
            return f"{len(self.label_names)} label names found, {num_names} expected"
        targets = golden.completions if is_next_token else golden.labels
        if not len(golden.texts) == len(golden.token_ids) == len(targets) or max(golden.labels, default=0) >= self.num_classes:
            return f"golden labels {golden.labels} found, one of {self.num_classes} classes for each of {len(golden.texts)} texts expected"
        prompts = [self.prompt] if self.frame is None else [self.prompt, self.frame.prompt]
        if not all(map(_only_fills_in, prompts)):
            return f"prompts {[prompt[:99] for prompt in prompts]} found, nothing but {{text}} and {{text2}} expected to be filled in"
        if len(golden.scales) != len(golden.losses):
            return f"{len(golden.losses)} golden losses found, {len(golden.scales)} expected"
        return None


def _only_fills_in(prompt: str) -> bool:
    """Tells whether a prompt puts texts in place and does nothing else: a width in it could ask for any amount of memory."""
    try:
        fields = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(prompt) if name is not None]
    except ValueError:
        return False
    return all(name in {"text", "text2"} and not form and conversion is None for name, form, conversion in fields)
