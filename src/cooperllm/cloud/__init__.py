"""Room 3, the cloud: back-propagates on public data, owns the parameters."""

from cooperllm.cloud.guide import BackPropagation, GuideMaker
from cooperllm.cloud.maps import MapFitter
from cooperllm.cloud.state import Closed, Cloud, Prepared

__all__ = ["BackPropagation", "Closed", "Cloud", "GuideMaker", "MapFitter", "Prepared"]
