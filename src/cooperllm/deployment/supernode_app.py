"""The app that Flower's official SuperNode starts for every message: a device that opens its model and texts, answers once, and ends.

    flower-supernode ... --node-config 'settings="/home/device/device.toml"'

What it keeps from one message to the next is what a device keeps on its disk. A SuperNode knows this module by name alone
(`link/supernode.py`): what runs is what is installed.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from cooperllm.deployment.device_process import opened
from cooperllm.deployment.process_file import running
from cooperllm.deployment.settings import DeviceSettings, read_job, read_settings
from cooperllm.errors import ConfigError
from cooperllm.link.envelope import stamp
from cooperllm.link.flower import message_app


def answer(node_config: Mapping[str, object], order: bytes) -> bytes:
    """Answers one order.

    Args:
        node_config: Of the SuperNode: `settings`, the name of the device's TOML file.
        order: As encoded.

    Returns:
        The report, and before it how long this took, from the start of the process; how long the order lay there is not known.

    Raises:
        ConfigError: If the settings are missing, do not fit the run, or ask for what takes longer than a message should.
    """
    begun = time.monotonic() - time.process_time()  # with what it took to get here: this process was started for the order
    named = node_config.get("settings")
    if not isinstance(named, str):
        raise ConfigError(f"""--node-config: found {dict(node_config)}, expected settings="/home/device/device.toml" """.rstrip())
    file = Path(named)
    settings = read_settings(file, DeviceSettings)
    if settings.memory_mib is not None:
        raise ConfigError(
            f"{file}: found memory_mib, expected none: a SuperNode would measure anew for every message; use `cooperllm device`"
        )
    with running(file):
        report = opened(settings, read_job(settings.job)).answer(order)
    return stamp(report, 0.0, 0.0, time.monotonic() - begun)


app = message_app(answer)
