"""Room 2, the edge: schedules a round, fans its plan out, folds reports in."""

from cooperllm.edge.fold import Edge, devices_of
from cooperllm.edge.schedule import Schedule

__all__ = ["Edge", "Schedule", "devices_of"]
