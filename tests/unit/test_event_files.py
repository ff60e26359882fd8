"""Figures of runs for TensorBoard, read back with its own reader.

Run: pytest tests/unit/test_event_files.py
"""

import json
import sys

import pytest
from typer.testing import CliRunner

from cooperllm.cli import app
from cooperllm.config import RunConfig
from cooperllm.errors import ConfigError
from cooperllm.report.event_files import write_event_files
from cooperllm.run_directory import RunDirectory

ROWS = [
    {"round": 1, "arm": "feedback", "seconds": 2.0, "accuracy": None, "private_loss": 0.75, "answered": [0, 4], "dropped": {}},
    {"round": 2, "arm": "feedback", "seconds": 3.0, "accuracy": 0.5, "private_loss": 0.5, "answered": [1], "dropped": {"late": 2}},
]


@pytest.fixture
def runs(tmp_path):
    """Two runs below one directory, as a comparison has them."""
    for name in ("first", "second"):
        files = RunDirectory.create(tmp_path / "runs" / name, RunConfig())
        for row in ROWS:
            files.append_round(row)
    return tmp_path / "runs"


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}, found


def test_every_number_of_every_round_is_a_scalar_at_that_round(runs, tmp_path):
    done = CliRunner().invoke(app, ["export-metrics", str(runs), "--tensorboard", str(tmp_path / "events")])
    assert done.exit_code == 0, done.output
    assert f"tensorboard --logdir {tmp_path / 'events'}" in done.output.replace("\n", "")
    for name in ("first", "second"):
        scalars, _ = read(tmp_path / "events" / name)
        assert scalars == {
            "seconds": [(1, 2.0), (2, 3.0)],
            "accuracy": [(2, 0.5)],
            "private_loss": [(1, 0.75), (2, 0.5)],
            "answered": [(1, 2.0), (2, 1.0)],
            "dropped/late": [(2, 2.0)],
        }


def test_a_run_by_itself_is_written_with_its_rounds_apart_by_their_seconds(runs, tmp_path):
    assert write_event_files(runs / "first", tmp_path / "events") == [tmp_path / "events"]
    _, found = read(tmp_path / "events")
    times = [event.wall_time for event in found.Scalars("seconds")]
    assert times[1] - times[0] == pytest.approx(3.0, abs=1e-3)


def test_where_there_is_no_run_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"found no run, expected rounds.jsonl there or below"):
        write_event_files(tmp_path, tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_without_tensorboard_a_sentence_says_which_extra_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install "cooperllm\[tensorboard\]"'):
        write_event_files(runs, tmp_path / "events")


def test_settings_are_a_text_beside_the_scalars(runs, tmp_path):
    write_event_files(runs / "first", tmp_path / "events")
    _, found = read(tmp_path / "events")
    (tag,) = [name for name in found.Tags()["tensors"] if "settings" in name]
    text = found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`\n"))["seed"] == RunConfig().seed
