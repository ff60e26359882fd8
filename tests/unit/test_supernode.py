"""What Flower's official SuperNode is told to start, and what it starts: checked with Flower's own code where that is what counts.

Run: pytest tests/unit/test_supernode.py
"""

import io
import json
import shlex
import zipfile
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.clientapp import ClientApp
from flwr.common.config import parse_config_args
from flwr.supercore.fab import Fab
from flwr.supercore.object_ref import load_app
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode, _validate_public_keys_ed25519
from flwr.supernode.start_client_internal import _verify_fab

from cooperllm.config import FederationConfig, RunConfig
from cooperllm.deployment.enrolment import Places, admit_supernodes, enroll
from cooperllm.deployment.process_file import running
from cooperllm.deployment.settings import EdgeSettings, Job, read_settings
from cooperllm.deployment.supernode_app import answer
from cooperllm.errors import ConfigError
from cooperllm.link.fleet_node import read_private_key
from cooperllm.link.supernode import APP, pointer, sign, signed_pointer

PLACES = Places(cloud="127.0.0.1:9100", edges=("127.0.0.1:9101",))


def enrolled_in(path):
    federation = FederationConfig(num_devices=2, num_edges=1, devices_per_round=2)
    enroll(path, Job(config=RunConfig(federation=federation), num_parameters=7), PLACES)
    return path


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    path = enrolled_in(tmp_path_factory.mktemp("deployment") / "all")
    admit_supernodes(path)
    return path


def test_what_is_pulled_has_a_name_in_it_and_no_code():
    with zipfile.ZipFile(io.BytesIO(pointer())) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
    assert isinstance(load_app(APP, ValueError), ClientApp), "the name is that of something installed"


def test_a_supernode_takes_what_was_signed_for_it_and_nothing_else(enrolled):
    shown = signed_pointer(enrolled / "edge-0" / "supernode.json")
    trusted = yaml.safe_load((enrolled / "device-0" / "supernode.yaml").read_text())
    _validate_public_keys_ed25519(trusted)
    assert shown.verifications["valid_license"], "without a word here a SuperNode looks no further"
    assert _verify_fab(shown, trusted)
    assert not _verify_fab(Fab("", shown.content + b"\n", shown.verifications), trusted), "other bytes"
    assert not _verify_fab(Fab("", shown.content, json.loads(sign(0)[0])), trusted), "another's signature"


def test_the_line_is_one_that_a_supernode_reads_and_its_key_is_the_devices(tmp_path, monkeypatch):
    path = enrolled_in(tmp_path / "it's here")
    lines = admit_supernodes(path)
    assert len(lines) == 2
    cd, place, and_then, *words = shlex.split(lines[1])
    found = _parse_args_run_supernode().parse_args(words[words.index("flower-supernode") + 1 :])
    assert (cd, place, and_then) == ("cd", str(path / "device-1"), "&&")
    assert found.superlink == PLACES.edges[0]
    monkeypatch.chdir(place)
    assert Path(found.root_certificates).read_bytes() == (path / "authority" / "authority.pem").read_bytes()
    assert yaml.safe_load(found.trusted_entities.read_text())
    assert Path(parse_config_args([found.node_config])["settings"]).read_bytes() == (path / "device-1" / "device.toml").read_bytes()
    key = Path(found.auth_supernode_private_key)
    assert load_ssh_private_key(key.read_bytes(), None).public_key() == read_private_key(key.with_name("node.key")).public_key()
    assert key.stat().st_mode & 0o077 == 0


def test_what_is_no_deployment_in_tls_or_was_done_before_is_left_as_it_is(enrolled, tmp_path):
    with pytest.raises(ConfigError, match="found 0 edges and 0 devices, expected what `cooperllm enroll` has written"):
        admit_supernodes(tmp_path)
    plain = enrolled_in(tmp_path / "plain")
    places = 'cloud = "127.0.0.1:1"\nlisten = "127.0.0.1:2"\n'
    (plain / "edge-0" / "edge.toml").write_text(
        f'number = 0\njob = "job.json"\nkey = "node.key"\ndevices = "devices"\n{places}insecure = true\n'
    )
    with pytest.raises(ConfigError, match="found insecure = true, expected TLS"):
        admit_supernodes(plain)
    assert not list(plain.rglob("supernode.*"))
    trusted = (enrolled / "device-0" / "supernode.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"edge.toml: found supernode, expected none"):
        admit_supernodes(enrolled)
    assert (enrolled / "device-0" / "supernode.yaml").read_bytes() == trusted, "a new key would lock out those that have the old one"


def test_an_edge_takes_supernodes_or_asks_for_certificates(enrolled):
    file = enrolled / "edge-0" / "edge.toml"
    assert read_settings(file, EdgeSettings).node_authority is None
    both = file.with_name("both.toml")
    both.write_text(file.read_text() + 'node_authority = "authority.pem"\n')
    with pytest.raises(ConfigError, match="found supernode beside node_authority, expected one of both"):
        read_settings(both, EdgeSettings)
    plain = [line for line in file.read_text().splitlines() if not line.startswith(("certificate", "authority", "node_certificate"))]
    both.write_text("\n".join([*plain, "insecure = true"]))
    with pytest.raises(ConfigError, match="found supernode beside insecure, expected one of both"):
        read_settings(both, EdgeSettings)


@pytest.mark.parametrize("content", [None, "nothing", "[]", '{"valid_license": 1}'])
def test_a_signature_that_is_none_is_refused_in_a_sentence(tmp_path, content):
    file = tmp_path / "supernode.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"supernode.json: found .*`cooperllm admit-supernodes` writes one"):
        signed_pointer(file)


def test_a_device_that_runs_already_is_not_run_a_second_time_by_its_supernode(enrolled):
    """Two processes with one state would ruin it."""
    file = enrolled / "device-0" / "device.toml"
    with running(file), pytest.raises(ConfigError, match="found a process that runs with these settings"):
        answer({"settings": str(file)}, b"")


def test_an_app_without_settings_or_with_a_memory_limit_answers_with_a_sentence(enrolled):
    with pytest.raises(ConfigError, match=r"--node-config: found \{\}, expected settings="):
        answer({}, b"")
    file = enrolled / "device-0" / "device.toml"
    limited = file.with_name("limited.toml")
    limited.write_text(file.read_text() + "memory_mib = 160\n")
    with pytest.raises(ConfigError, match="found memory_mib, expected none"):
        answer({"settings": str(limited)}, b"")
