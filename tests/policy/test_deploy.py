"""What `deploy/` shows can be run: its commands are ours, its files those that `cooperllm enroll` writes, and its notes are true.

Run: pytest tests/policy/test_deploy.py
"""

import configparser
import re
from pathlib import Path

import pytest
import yaml

from cooperllm.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
COMMANDS = {command.name for command in app.registered_commands}
UNITS = sorted(DEPLOY.glob("*.service"))


@pytest.mark.parametrize("file", sorted(DEPLOY.iterdir()), ids=lambda file: file.name)
def test_every_command_is_one_of_ours_with_a_file_that_enroll_writes(file):
    found = re.findall(r"cooperllm (\w+) (\S+\.toml)", file.read_text())
    assert found
    for command, settings in found:
        assert command in COMMANDS
        assert settings.endswith(f"/{command}.toml")


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_a_unit_may_write_where_its_settings_are_and_nowhere_else(file):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(file)
    settings = Path(unit["Service"]["ExecStart"].split()[-1])
    assert unit["Service"]["ReadWritePaths"] == str(settings.parent)
    assert unit["Service"]["ProtectSystem"] == "strict"
    assert unit["Service"]["User"] == "cooperllm"


def test_the_containers_are_those_that_the_comment_enrolls():
    text = (DEPLOY / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    devices, edges, hosts = (re.search(rf"--{name} (\S+)", text)[1] for name in ("devices", "edges", "hosts"))
    assert set(hosts.split(",")) == {name for name in services if not name.startswith("device")}
    assert int(edges) == sum(name.startswith("edge") for name in services)
    numbers = [service["environment"]["NUMBER"] for name, service in services.items() if name.startswith("device")]
    assert numbers == [str(number) for number in range(int(devices))]
    assert all(service["image"] and service["volumes"] for service in services.values())
