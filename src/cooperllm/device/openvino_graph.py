"""Graphs of a device package in OpenVINO, from the same files. It packs weights and keeps its memory, whatever the settings say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operations

from cooperllm.device.settings import Settings
from cooperllm.errors import PackageError


class OpenvinoGraph:
    """One graph, on the processor, in the precision it was written in: by default OpenVINO computes in 16 bits where it can."""

    def __init__(self, file: Path, _settings: Settings, num_threads: int, _weights: Mapping[str, np.ndarray]) -> None:
        self._file = file
        options = {"INFERENCE_NUM_THREADS": num_threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        exact = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
        try:
            core: Any = openvino.Core()
            model = core.read_model(file)
            _part_square_weights(model)
            # Asked before it is compiled: then a tensor may go by the names of others, too.
            self._inputs = [port.get_any_name() for port in model.inputs]
            self._outputs = [port.get_any_name() for port in model.outputs]
            self._request = core.compile_model(model, "CPU", options | exact).create_infer_request()
        except RuntimeError as error:  # of every kind
            raise self._failed(error) from error

    def run(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Computes its outputs, see `graphs.Graph`."""
        try:
            found = self._request.infer([given[name] for name in self._inputs], share_inputs=True)
        except RuntimeError as error:
            raise self._failed(error) from error
        return dict(zip(self._outputs, found.to_tuple(), strict=True))

    def _failed(self, error: Exception) -> PackageError:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return PackageError(
            f"{self._file} does not run in openvino {openvino.__version__} ({lines[-1].strip()}); install another openvino, use "
            "onnxruntime, or write the package anew with `cooperllm package`"
        )


def _part_square_weights(model: Any) -> None:
    """Gives every product with a square weight a copy of its own.

    Without that x W and y Wᵀ in one graph are both computed with what was packed for the first (seen in 2026.4, from 8 x 8 on).
    """
    for constant in [found for found in model.get_ops() if found.get_type_name() == "Constant"]:
        shape, users = constant.get_output_shape(0), list(constant.output(0).get_target_inputs())
        if len(shape) == 2 and shape[0] == shape[1]:
            for user in users[1:]:
                user.replace_source_output(operations.constant(constant.data.copy()).output(0))
