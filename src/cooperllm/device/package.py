"""A device package: read, checked down to the last byte, and its texts tokenised, without PyTorch.

Nothing of a package runs before its digests are those of its manifest, and none of its numbers count before its golden losses come out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from jaxtyping import Float32, Int64
from onnxruntime import InferenceSession, SessionOptions  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue] -- compiled
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors  # pyright: ignore[reportAttributeAccessIssue] -- compiled
from tokenizers import Tokenizer

from cooperllm.config import Objective, Variant
from cooperllm.device.manifest import MANIFEST, PACKAGE_VERSION, THETA, TOKENIZER, Manifest
from cooperllm.errors import ConfigError, PackageError

LARGEST_MANIFEST_BYTES = 1 << 20
ERRORS: tuple[type[Exception], ...] = (
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NoSuchFile,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
)
"""What ONNX Runtime raises; they have no common base of their own."""


@dataclass(kw_only=True, slots=True)
class DeviceExamples:
    """Tokenised private texts.

    Attributes:
        token_ids: One row of integers per text.
        labels: Class of each text, shape [N].
        states: What the prefix makes of an example, by example, each [T, H]; filled as it is needed.
    """

    token_ids: list[Int64[np.ndarray, "_T"]]
    labels: Int64[np.ndarray, "N"]
    states: dict[int, Float32[np.ndarray, "_T _H"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


class Package:
    """The files of one device package; read with `open_package`, which also checks them.

    Attributes:
        path: The directory.
        manifest: What it says of itself.
        theta: θ_0 of the package's seed.
    """

    def __init__(self, path: Path, manifest: Manifest, num_threads: int) -> None:
        self.path = path
        self.manifest = manifest
        self.theta = np.fromfile(path / THETA, "<f4").astype(np.float32, copy=False)
        self._num_threads = num_threads
        self._sessions: dict[str, InferenceSession] = {}
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
        try:
            if graph not in self._sessions:
                self._sessions[graph] = InferenceSession(self.path / f"{graph}.onnx", self._options())
            session = self._sessions[graph]
            outputs = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
        except ERRORS as error:
            raise PackageError(
                f"{self.path / graph}.onnx does not run in onnxruntime {onnxruntime.__version__} ({str(error).strip().splitlines()[0]}); "
                "install another onnxruntime, or write the package anew with `cooperllm package`"
            ) from error
        return {one.name: np.asarray(output) for one, output in zip(session.get_outputs(), outputs, strict=True)}

    def encode(self, texts: Sequence[str], second_texts: Sequence[str] | None, labels: Sequence[int]) -> DeviceExamples:
        """Tokenises texts, cut at the package's number of tokens.

        Args:
            texts: Texts, or first texts of pairs.
            second_texts: Second texts of pairs, or None.
            labels: Class of each text.

        Returns:
            Examples.

        Raises:
            ConfigError: If there is not one label in [0, C) for each text.
        """
        classes = np.array(labels, np.int64)
        if len(classes) != len(texts) or (len(classes) and not 0 <= classes.min() <= classes.max() < self.manifest.num_classes):
            raise ConfigError(
                f"labels: found {len(classes)} of {sorted(set(classes.tolist()))[:9]}, expected {len(texts)} in 0 to "
                f"{self.manifest.num_classes - 1}; compare the data with the classes of the package, {list(self.manifest.label_names)}"
            )
        if self.manifest.objective is Objective.LABEL_WORDS:
            rows = [self._prompt_ids(text, other) for text, other in zip(texts, second_texts or texts, strict=True)]
        else:
            self._tokenizer.enable_truncation(self.manifest.max_tokens)
            pairs: Any = list(texts) if second_texts is None else list(zip(texts, second_texts, strict=True))
            rows = [one.ids for one in self._tokenizer.encode_batch(pairs)]
            self._tokenizer.no_truncation()
        return DeviceExamples(token_ids=[np.array(row, np.int64) for row in rows], labels=classes)

    def _prompt_ids(self, text: str, other: str) -> list[int]:
        """Cuts the text, never the prompt around it."""
        prompt = self.manifest.prompt
        room = max(1, self.manifest.max_tokens - len(self._tokenizer.encode(prompt.format(text="", text2="")).ids))
        parts = [self._tokenizer.encode(part, add_special_tokens=False).ids[:room] for part in (text, other)]
        cut = [self._tokenizer.decode(part, skip_special_tokens=False) for part in parts]
        return self._tokenizer.encode(prompt.format(text=cut[0], text2=cut[1])).ids

    def _options(self) -> Any:
        options: Any = SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.enable_cpu_mem_arena = False  # an arena keeps the largest pass for ever
        options.enable_mem_pattern = False  # the same, for one shape each
        options.log_severity_level = 3
        # Packed copies of weights would be private memory; as they are in the file, they are clean pages that the system may drop. Products
        # with weights of 4 bits take twice as long without, and their copies are small.
        options.add_session_config_entry("session.disable_prepacking", str(int(self.manifest.variant is not Variant.INT4)))
        return options


def read_package(path: Path | str, *, num_threads: int = 1) -> Package:
    """Reads a package and compares every file with the manifest; `onnx_forward.open_package` also runs it.

    Args:
        path: A directory that `cooperllm package` has written.
        num_threads: Threads of one operator, >= 1.

    Returns:
        The package.

    Raises:
        PackageError: If a file is missing, is not what the manifest says, or belongs to another version.
    """
    directory = Path(path)
    manifest = _manifest(directory)
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
    return Package(directory, manifest, num_threads)


def _tokenizer(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise PackageError(f"{file} is no tokeniser that this machine reads ({error}); install another version of `tokenizers`") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _manifest(directory: Path) -> Manifest:
    file = directory / MANIFEST
    if not file.is_file():
        raise PackageError(f"{file} does not exist: {directory} is not a device package; `cooperllm package` writes one")
    if file.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise PackageError(f"{file}: {file.stat().st_size} bytes found, at most {LARGEST_MANIFEST_BYTES} expected; write the package anew")
    try:
        plain = msgspec.json.decode(file.read_bytes())
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if version != PACKAGE_VERSION:
            raise PackageError(f"{file}: format version {version!r} found, {PACKAGE_VERSION} expected; write the package with this release")
        manifest = msgspec.convert(plain, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a value outside its domain is a DecodeError, too
        raise PackageError(f"{file} is damaged ({error}); copy the package again, or write it anew") from error
    complaint = manifest.complaint()
    if complaint is not None:
        raise PackageError(f"{file}: {complaint}; write the package anew")
    return manifest
