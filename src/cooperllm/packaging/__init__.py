"""Device packages, cloud side: a model traced into ONNX graphs with θ as an input, its weights in one file, and a manifest."""

from cooperllm.packaging.write import package_bytes, write_package

__all__ = ["package_bytes", "write_package"]
