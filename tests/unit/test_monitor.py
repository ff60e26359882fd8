"""The page and the metrics say what the run's files say, to whoever is on this machine, and change nothing.

Run: pytest tests/unit/test_monitor.py
"""

import asyncio
import json
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_timeline import rounds as times
from typer.testing import CliRunner

from cooperllm.cli import app
from cooperllm.config import RunConfig
from cooperllm.errors import ConfigError, LinkError, RunDirectoryError
from cooperllm.monitor import monitor_app, serve_monitor
from cooperllm.run_directory import RunDirectory

ROW = {"accuracy": None, "seconds": 0.5, "private_loss": 0.6, "answered": [2, 10], "dropped": {"lost": 1}}
BYTES = {"bytes_down": 10, "bytes_up": 20, "bytes_between": 30}


@pytest.fixture
def run(tmp_path):
    files = RunDirectory.create(tmp_path / "run", RunConfig(num_rounds=4))
    files.append_round(ROW | BYTES | {"round": 1, "accuracy": 0.75})
    files.append_round(ROW | BYTES | {"round": 2, "dropped": {"lost": 1, "not waited for": 2}})
    for row in times():
        files.append_times(row)
    return files.path


def asked(run, path):
    transport = httpx.ASGITransport(monitor_app(run))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_metrics_are_what_a_prometheus_reads(run):
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(asked(run, "/metrics").text)
        for sample in family.samples
    }
    assert found["cooperllm_round",] == 2
    assert found["cooperllm_rounds_planned",] == 4
    assert found["cooperllm_accuracy",] == 0.75
    assert found["cooperllm_bytes_total", "up"] == 40
    assert found["cooperllm_reports_dropped_total", "lost"] == 2
    assert found["cooperllm_reports_dropped_total", "not waited for"] == 2
    assert found["cooperllm_node_last_round", "device 10"] == 1
    assert found["cooperllm_node_seconds", "device 2", "work"] == 1.0


def test_the_page_shows_the_run_and_loads_nothing(run):
    page = asked(run, "/").text
    assert "Round 2 of 4; no process is working on it" in page
    assert "Accuracy 75.0 % after round 1" in page
    assert "2 lost, 2 not waited for" in page
    assert "<td>device 10</td><td>1</td><td>0.250</td>" in page
    assert 'points="160.0,40.0"' in page, "a quarter of the rounds, three quarters of the height"
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_same_as_data(run):
    found = json.loads(asked(run, "/status.json").text)
    assert [node["name"] for node in found["nodes"]] == ["edge 0", "device 2", "device 10"]
    assert found["num_rounds"] == 4


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    files = RunDirectory.create(tmp_path / "run", RunConfig(num_rounds=4))
    assert "Round 0 of 4" in asked(files.path, "/").text
    assert "cooperllm_round 0.0" in asked(files.path, "/metrics").text


def test_whatever_a_run_is_called_is_shown_as_text(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"recipe": "<b>bold</b>"}))
    assert "&lt;b&gt;bold&lt;/b&gt;" in asked(run, "/").text
    assert "<b>bold" not in asked(run, "/").text


def test_only_reading_is_possible_and_reading_changes_nothing(run):
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    for path in ("/", "/metrics", "/status.json", "/docs", "/config.json", "/../config.json"):
        asked(run, path)
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    assert asked(run, "/config.json").status_code == 404


def test_a_damaged_run_is_said_so_and_the_page_stays(run):
    (run / "rounds.jsonl").write_text("no round\n")
    answer = asked(run, "/")
    assert answer.status_code == 503
    assert "is damaged" in answer.text


def test_mistakes_stop_before_anything_is_served(run, tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        serve_monitor(tmp_path, "127.0.0.1", 0, print)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LinkError, match="choose another port"):
        serve_monitor(run, "127.0.0.1", taken.getsockname()[1], print)
    refused = CliRunner().invoke(app, ["monitor", str(run), "--listen", "0.0.0.0:9190"])
    assert isinstance(refused.exception, ConfigError)
    assert "expected 127.0.0.1" in str(refused.exception)
