"""Room 2, the edge: fans a plan out, folds reports in."""

from cooperllm.edge.fold import Edge, devices_of, group_of

__all__ = ["Edge", "devices_of", "group_of"]
