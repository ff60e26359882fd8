"""Graphs of a device package in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, OrtValue, SessionOptions  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue] -- compiled
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors  # pyright: ignore[reportAttributeAccessIssue] -- compiled

from cooperllm.device.settings import Settings
from cooperllm.errors import PackageError

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


class OnnxRuntimeGraph:
    """One graph; weights are mapped from the package's file and multiplied as they are there, unless the settings say otherwise.

    Weights that are handed in are used where they lie: a file that every graph maps for itself counts once for each in a process's memory.
    """

    def __init__(self, file: Path, settings: Settings, num_threads: int, weights: Mapping[str, np.ndarray]) -> None:
        self._file = file
        options = _options(settings, num_threads)
        self._weights = {name: OrtValue.ortvalue_from_numpy(weight) for name, weight in weights.items()}  # as long as the session
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        try:
            self._session = InferenceSession(file, options)
        except ERRORS as error:
            raise self._failed(error) from error

    def run(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Computes its outputs, see `graphs.Graph`."""
        try:
            outputs = self._session.run(None, {one.name: given[one.name] for one in self._session.get_inputs()})
        except ERRORS as error:
            raise self._failed(error) from error
        return {one.name: np.asarray(output) for one, output in zip(self._session.get_outputs(), outputs, strict=True)}

    def _failed(self, error: Exception) -> PackageError:
        return PackageError(
            f"{self._file} does not run in onnxruntime {onnxruntime.__version__} ({str(error).strip().splitlines()[0]}); "
            "install another onnxruntime, or write the package anew with `cooperllm package`"
        )


def _options(settings: Settings, num_threads: int) -> Any:
    options: Any = SessionOptions()
    options.intra_op_num_threads = num_threads
    options.enable_cpu_mem_arena = settings.has_arena  # an arena keeps the largest pass for ever
    options.enable_mem_pattern = settings.has_arena  # the same, for one shape each
    options.log_severity_level = 4  # an error is raised, too
    if not settings.packs_weights:  # packed copies are private memory; as they are in the file, they are clean pages
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options
