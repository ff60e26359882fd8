"""What a process says: one object a line whatever happens, and no secret in it.

Run: pytest tests/unit/test_process_log.py
"""

import json
import logging
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cooperllm.process_log import LEFT_OUT, JsonLines, TextLines


def record(message, *given, **fields):
    return logging.makeLogRecord({"name": "cooperllm.tiers", "levelname": "INFO", "msg": message, "args": given, **fields})


def said_by(program, *words):
    """What a fresh process leaves on standard error."""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    return done.stderr


BEGIN = "import logging, sys, threading, warnings; from cooperllm.process_log import *; begin_log(LogFormat(sys.argv[1]), 'edge');"


def test_a_message_of_many_lines_is_one_line_of_json():
    line = JsonLines("device").format(record("two\nlines of %s", "words", node=3))
    assert "\n" not in line
    found = json.loads(line)
    assert {name: found[name] for name in ("level", "process", "logger", "message", "node")} == {
        "level": "INFO",
        "process": "device",
        "logger": "cooperllm.tiers",
        "message": "two\nlines of words",
        "node": 3,
    }


def test_fields_that_json_has_no_word_for_are_written_as_python_shows_them():
    assert json.loads(JsonLines("edge").format(record("", where=b"bytes")))["where"] == "b'bytes'"


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines("edge")])
def test_a_private_key_that_an_error_quotes_is_left_out(formatter):
    kinds = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(*kinds).decode()
    secret = key.splitlines()[1]
    error = ValueError(f"cannot read {key[:150]}")  # cut off: its end line is missing
    said = formatter.format(record("found %s", key, exc_info=(type(error), error, None)))
    assert secret not in said
    assert said.count(LEFT_OUT) >= 2


def test_warnings_and_what_ends_a_process_or_a_thread_are_lines_of_json_too():
    program = BEGIN + (
        "warnings.warn('a warning');"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join();"
        "import cooperllm.link.fleet_server; logging.getLogger('flwr').error('of Flower'); logging.getLogger('flwr').warning('not told');"
        "raise OSError('the end')"
    )
    lines = [json.loads(line) for line in said_by(program, "json").splitlines()]
    assert [line["level"] for line in lines] == ["WARNING", "CRITICAL", "ERROR", "CRITICAL"]
    assert "a warning" in lines[0]["message"]
    assert "ZeroDivisionError" in lines[1]["traceback"]
    assert lines[2]["message"] == "of Flower"
    assert "OSError: the end" in lines[3]["traceback"]


def test_an_error_of_flowers_is_told_once_in_the_form_of_the_others():
    said = said_by(BEGIN + "import cooperllm.link.fleet_server; logging.getLogger('flwr').error('of Flower')", "text")
    assert said.count("of Flower") == 1
    assert said.endswith(" ERROR of Flower\n")


def test_the_sentence_that_refuses_a_command_is_json_where_that_was_asked_for(tmp_path):
    missing = str(tmp_path / "edge.toml")
    done = subprocess.run(
        [sys.executable, "-m", "cooperllm", "edge", missing, "--log-format", "json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"ConfigError: {missing}: cannot be read" in json.loads(line)["message"]
