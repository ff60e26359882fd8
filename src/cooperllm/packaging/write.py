"""Writes a device package, and opens it as a device would before anybody else does."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from jaxtyping import Float32

from cooperllm.config import Objective, Variant, WeightType
from cooperllm.device.manifest import (
    LOSSES,
    MANIFEST,
    PACKAGE_VERSION,
    THETA,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Golden,
    LayerEntry,
    Manifest,
)
from cooperllm.device.onnx_forward import golden_points, open_package
from cooperllm.errors import ConfigError, PackageError
from cooperllm.models import Model
from cooperllm.packaging.quantise import quantise
from cooperllm.packaging.trace import graphs_of
from cooperllm.packaging.weights import fold_gathers, multiplications, write_graphs

GOLDEN_TEXTS = ("A stirring film.", "It fell apart quickly, and nobody in the room was sorry.", "Fine")
GOLDEN_COMPLETIONS = ("Good.", "It is bad, all of it.", "So.")
GOLDEN_SEED = 20_260
GOLDEN_SCALES = (0.0, 0.02)
TOLERANCES = {Variant.FP32: 1e-4, Variant.INT8: 0.05, Variant.INT8_WEIGHTS: 0.05, Variant.INT4: 0.5}
"""Of golden losses. Float32 differs between machines in the last bits; integer kernels round in their own ways, and fewer bits are another
model: of 260 000 parameters .014 off with int8 weights and .21 with 4 bits, MiniLM .001 and .012."""


def write_package(
    model: Model,
    theta: Float32[np.ndarray, "n"],
    directory: Path | str,
    *,
    label_names: Sequence[str],
    variant: Variant,
    seed: int,
    has_forward_mode: bool = False,
) -> Manifest:
    """Writes what a device needs to run a model without PyTorch.

    Args:
        model: The model.
        theta: θ_0, shape [n].
        directory: A missing or empty directory; it appears when all is written and has been run once.
        label_names: Names of the classes; for next tokens they do not matter.
        variant: How the frozen weights are kept.
        seed: The run's seed that θ_0 belongs to.
        has_forward_mode: Whether devices can measure slopes in forward mode; a model without it is refused then.

    Returns:
        The manifest.

    Raises:
        ConfigError: If the directory is taken, or the model cannot be written.
        PackageError: If the package does not give PyTorch's losses on this machine.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: found something there, expected a missing or empty directory; choose another or remove it")
    if model.config.dtype is not WeightType.FLOAT32:
        raise ConfigError(
            f"model.dtype: found {model.config.dtype.value}, expected float32 for a package: its variants round weights themselves; choose "
            "--set model.dtype=float32 and --variant int8"
        )
    if model.config.packing:
        raise ConfigError("model.packing: found true, expected false for a package, in which every example has a row of its own")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was interrupted
    part.mkdir(parents=True)
    try:
        manifest = _written(model, theta, part, label_names, variant, seed, has_forward_mode)
        open_package(part)
    except PackageError as error:
        raise PackageError(f"the package does not do what the model does: {error}") from error
    finally:
        if not (part / MANIFEST).is_file():
            shutil.rmtree(part)
    part.replace(target)
    return manifest


def _written(
    model: Model,
    theta: Float32[np.ndarray, "n"],
    part: Path,
    label_names: Sequence[str],
    variant: Variant,
    seed: int,
    has_forward_mode: bool,  # noqa: FBT001 -- handed on
) -> Manifest:
    (part / TOKENIZER).write_text(model.tokenizer_json(), encoding="utf8")
    theta.astype("<f4").tofile(part / THETA)
    is_next_token = model.config.objective is Objective.NEXT_TOKEN
    labels = [] if is_next_token else [number % model.num_classes for number in range(len(GOLDEN_TEXTS))]
    completions = GOLDEN_COMPLETIONS if is_next_token else ()
    examples = model.encode(GOLDEN_TEXTS, None, labels, completions or None)
    batch = model.batch(examples, range(len(examples)))
    graphs, seen = graphs_of(model, torch.from_numpy(theta.copy()), batch, has_forward_mode=has_forward_mode)
    multiplied = multiplications(graphs[LOSSES])
    for graph in graphs.values():
        fold_gathers(graph)
        quantise(graph, variant)
    weights = write_graphs(graphs, part, WEIGHTS)
    golden = Golden(
        texts=GOLDEN_TEXTS,
        token_ids=tuple(tuple(row.tolist()) for row in examples.token_ids),
        labels=tuple(labels),
        completions=completions,
        seed=GOLDEN_SEED,
        scales=GOLDEN_SCALES,
        losses=(0.0,) * len(GOLDEN_SCALES),
        tolerance=TOLERANCES[variant],
    )
    losses: list[float] = []
    for point in golden_points(theta, golden):
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model.scores(torch.from_numpy(point), batch), batch.labels)))
    manifest = Manifest(
        format_version=PACKAGE_VERSION,
        variant=variant,
        model=model.config.name,
        seed=seed,
        label_names=() if is_next_token else tuple(label_names),
        num_parameters=model.layout.size,
        num_classes=model.num_classes,
        objective=model.config.objective,
        max_tokens=model.config.max_tokens,
        prompt=model.config.prompt,
        frame=model.frame if is_next_token else None,
        pad_id=model.pad_id,
        widths=model.widths,
        multiplications=multiplied,
        layers=tuple(
            LayerEntry(start=layer.start, stop=layer.stop, seen=place) for layer, place in zip(model.adapted.below, seen, strict=False)
        ),
        graphs=tuple(graphs),
        files={file.name: _entry(file) for file in sorted(part.iterdir())},
        weights=weights,
        golden=replace(golden, losses=tuple(losses)),
    )
    (part / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


def _entry(file: Path) -> FileEntry:
    with file.open("rb") as stream:
        return FileEntry(size=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def package_bytes(manifest: Manifest) -> int:
    """Adds up the files of a package.

    Args:
        manifest: Of the package.

    Returns:
        Bytes, without the manifest itself.
    """
    return sum(entry.size for entry in manifest.files.values())
