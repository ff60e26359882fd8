"""Room 1, the device: forward passes on private data, nothing else."""

from cooperllm.device.host import Host
from cooperllm.device.probe import catch_up, choose_batch, run_device
from cooperllm.device.runtime import Runtime, Trainer

__all__ = ["Host", "Runtime", "Trainer", "catch_up", "choose_batch", "run_device"]
