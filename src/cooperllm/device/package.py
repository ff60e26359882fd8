"""A device package: read, checked down to the last byte, and its texts tokenised, without PyTorch.

Nothing of a package runs before its digests are those of its manifest, and none of its numbers count before its golden losses come out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from cooperllm.algorithm.rounding import Rounding
from cooperllm.completion import Encoded, sequences
from cooperllm.config import Objective, Variant
from cooperllm.device.graphs import Graph, loader
from cooperllm.device.manifest import MANIFEST, OBSERVE, PACKAGE_VERSION, PULL_BACK, THETA, TOKENIZER, WEIGHTS, Manifest, WeightEntry
from cooperllm.device.settings import Settings
from cooperllm.device.states import States, StatesInMemory, StatesOnDisk
from cooperllm.errors import ConfigError, PackageError

LARGEST_MANIFEST_BYTES = 1 << 20
FEEDBACK_GRAPHS = (OBSERVE, PULL_BACK)
"""They take turns within one estimate."""


class Package:
    """The files of one device package; read with `open_package`, which also checks them.

    Attributes:
        path: The directory.
        manifest: What it says of itself.
        theta: θ_0 of the package's seed.
        settings: How memory is spent.
        states: What the prefix has made of texts.
        rounding: How this machine rounds its losses; None until somebody has measured.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str, settings: Settings, num_threads: int) -> None:
        self.path = path
        self.manifest = manifest
        self.theta = np.fromfile(path / THETA, "<f4").astype(np.float32, copy=False)
        self.settings = settings
        self.states: States = StatesInMemory()
        self.rounding: Rounding | None = None
        self._digest = digest
        self._num_threads = num_threads
        self._load = loader(settings.library)
        self._graphs: dict[str, Graph] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._tokenizer = _tokenizer(path / TOKENIZER)

    def run(self, graph: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a graph.

        Args:
            graph: Its name.
            given: Its inputs by name; what it does not take is left out.

        Returns:
            Its outputs by name.

        Raises:
            PackageError: If the graph cannot be loaded or run here.
        """
        return (self._graphs.get(graph) or self._loaded(graph)).run(given)

    def open_states(self) -> None:
        """Begins to keep states where the settings say; those known so far are forgotten."""
        self.states = StatesInMemory()
        if self.settings.states_directory is not None:
            directory, quota_bytes = Path(self.settings.states_directory, self._digest), int(self.settings.states_quota_mib * 2**20)
            self.states = StatesOnDisk(directory, self.manifest.widths.hidden, quota_bytes)

    def release(self, *others: str) -> None:
        """Unloads graphs, which are loaded again when they run.

        Args:
            others: Graphs that stay.
        """
        self._graphs = {name: graph for name, graph in self._graphs.items() if name in others}
        if not self._graphs:
            self._weights = {}  # unmapped with the last graph that has some

    def encode(
        self,
        texts: Sequence[str],
        second_texts: Sequence[str] | None,
        labels: Sequence[int],
        completions: Sequence[str] | None = None,
    ) -> Encoded:
        """Tokenises texts, cut at the package's number of tokens.

        Args:
            texts: Texts, or first texts of pairs.
            second_texts: Second texts of pairs, or None.
            labels: Class of each text; for next tokens they do not matter.
            completions: For next tokens: what is to be said; None to learn the texts themselves.

        Returns:
            Examples.

        Raises:
            ConfigError: If there is not one label in [0, C) for each text.
        """
        if self.manifest.frame is not None:
            read, write = self._tokens, partial(self._tokenizer.decode, skip_special_tokens=False)
            return sequences(self.manifest.frame, read, write, texts, second_texts, completions, self.manifest.max_tokens)
        classes = np.array(labels, np.int64)
        if len(classes) != len(texts) or (len(classes) and not 0 <= classes.min() <= classes.max() < self.manifest.num_classes):
            raise ConfigError(
                f"labels: found {len(classes)} of {sorted(set(classes.tolist()))[:9]}, expected {len(texts)} in 0 to "
                f"{self.manifest.num_classes - 1}; compare the data with the classes of the package, {list(self.manifest.label_names)}"
            )
        if self.manifest.objective is Objective.LABEL_WORDS:
            found = [self._prompt_ids(text, other) for text, other in zip(texts, second_texts or texts, strict=True)]
            rows, num_cut = [ids for ids, _ in found], sum(is_cut for _, is_cut in found)
        else:
            self._tokenizer.enable_truncation(self.manifest.max_tokens)
            pairs: Any = list(texts) if second_texts is None else list(zip(texts, second_texts, strict=True))
            encoded = self._tokenizer.encode_batch(pairs)
            rows, num_cut = [one.ids for one in encoded], sum(bool(one.overflowing) for one in encoded)
            self._tokenizer.no_truncation()
        return Encoded(token_ids=[np.array(row, np.int64) for row in rows], labels=classes, num_cut=num_cut)

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt_ids(self, text: str, other: str) -> tuple[list[int], bool]:
        """Cuts the text, never the prompt around it; tells whether it did."""
        prompt = self.manifest.prompt
        room = max(1, self.manifest.max_tokens - len(self._tokenizer.encode(prompt.format(text="", text2="")).ids))
        whole = [self._tokenizer.encode(part, add_special_tokens=False).ids for part in (text, other)]
        cut = [self._tokenizer.decode(part[:room], skip_special_tokens=False) for part in whole]
        return self._tokenizer.encode(prompt.format(text=cut[0], text2=cut[1])).ids, any(len(part) > room for part in whole)

    def _loaded(self, name: str) -> Graph:
        if not self.settings.keeps_graphs:
            self.release(*(FEEDBACK_GRAPHS if name in FEEDBACK_GRAPHS else ()))
        # A runtime that packs its own copies is done with a mapping when it has made them, if the mapping is its own.
        if not (self._weights or self.settings.packs_weights):
            self._weights = _mapped(self.path / WEIGHTS, self.manifest.weights)
        self._graphs[name] = graph = self._load(self.path / f"{name}.onnx", self.settings, self._num_threads, self._weights)
        return graph


def read_package(path: Path | str, settings: Settings | None = None, *, num_threads: int = 1) -> Package:
    """Reads a package and compares every file with the manifest; `onnx_forward.open_package` also runs it.

    Args:
        path: A directory that `cooperllm package` has written.
        settings: How memory is spent; None for what suits a device of which nothing is known.
        num_threads: Threads of one operator, >= 1.

    Returns:
        The package.

    Raises:
        PackageError: If a file is missing, is not what the manifest says, or belongs to another version.
    """
    directory = Path(path)
    manifest, own_digest = _manifest(directory)
    for name, entry in manifest.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry.size:
            size = "no file" if found is None else f"{found} bytes"
            raise PackageError(f"{file}: {size} found, {entry.size} bytes expected; copy the package again, or write it anew")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry.sha256:
            raise PackageError(f"{file}: SHA-256 {digest[:12]}... found, {entry.sha256[:12]}... expected; copy the package again")
    # Products with weights of 4 bits take twice as long without copies, which are small.
    usual = Settings(packs_weights=manifest.variant is Variant.INT4)
    return Package(directory, manifest, own_digest, settings or usual, num_threads)


def _mapped(file: Path, entries: Mapping[str, WeightEntry]) -> dict[str, np.ndarray]:
    """Views of one mapping of the file of weights."""
    if not entries:
        return {}
    mapping = np.memmap(file, np.uint8, "r")
    return {name: mapping[entry.offset : entry.stop].view(entry.kind.value).reshape(entry.shape) for name, entry in entries.items()}


def _tokenizer(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise PackageError(f"{file} is no tokeniser that this machine reads ({error}); install another version of `tokenizers`") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest and its digest, which names the package: every other file's digest is in it."""
    file = directory / MANIFEST
    if not file.is_file():
        raise PackageError(f"{file} does not exist: {directory} is not a device package; `cooperllm package` writes one")
    if file.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise PackageError(f"{file}: {file.stat().st_size} bytes found, at most {LARGEST_MANIFEST_BYTES} expected; write the package anew")
    content = file.read_bytes()
    try:
        plain = msgspec.json.decode(content)
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if version != PACKAGE_VERSION:
            raise PackageError(f"{file}: format version {version!r} found, {PACKAGE_VERSION} expected; write the package with this release")
        manifest = msgspec.convert(plain, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a value outside its domain is a DecodeError, too
        raise PackageError(f"{file} is damaged ({error}); copy the package again, or write it anew") from error
    complaint = manifest.complaint()
    if complaint is not None:
        raise PackageError(f"{file}: {complaint}; write the package anew")
    return manifest, hashlib.sha256(content).hexdigest()
