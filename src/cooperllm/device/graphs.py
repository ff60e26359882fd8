"""The seam between a device package and the library that computes its graphs: ONNX Runtime, or OpenVINO from the same files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from cooperllm.device.settings import GraphLibrary, Settings
from cooperllm.errors import ConfigError


@runtime_checkable
class Graph(Protocol):
    """One graph of a package, loaded."""

    def run(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Computes its outputs.

        Args:
            given: Its inputs by name; what it does not take is left out.

        Returns:
            Its outputs by name.

        Raises:
            PackageError: If it does not run here.
        """
        ...


Load = Callable[[Path, Settings, int, Mapping[str, np.ndarray]], Graph]
"""Loads a graph from its file for so many threads, with the weights that graphs share; raises PackageError where the library cannot."""


def loader(library: GraphLibrary) -> Load:
    """Finds what loads graphs; a device imports the one library that it uses.

    Args:
        library: Which.

    Returns:
        Its loader.

    Raises:
        ConfigError: If the library is not installed.
    """
    try:
        if library is GraphLibrary.OPENVINO:
            from cooperllm.device.openvino_graph import OpenvinoGraph  # noqa: PLC0415 -- a library of an extra

            return OpenvinoGraph
        from cooperllm.device.onnxruntime_graph import OnnxRuntimeGraph  # noqa: PLC0415 -- not needed beside another
    except ImportError as error:
        raise ConfigError(
            f"runtime: found no module {error.name!r}, expected {library.value}; pip install 'cooperllm[{library.extra}]'"
        ) from error
    return OnnxRuntimeGraph
