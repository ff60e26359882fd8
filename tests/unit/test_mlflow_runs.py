"""Figures and settings of runs in MLflow, read back with its own client.

Run: pytest tests/unit/test_mlflow_runs.py
"""

import os
import shutil
import sys
from dataclasses import replace

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from cooperllm.cli import app
from cooperllm.config import RunConfig
from cooperllm.errors import ConfigError
from cooperllm.report.mlflow_runs import log_to_mlflow, tracking_uri
from cooperllm.run_directory import RunDirectory

ROWS = [
    {"round": 1, "arm": "feedback", "seconds": 2.0, "accuracy": None, "private_loss": 0.75, "answered": [0, 4], "dropped": {}},
    {"round": 2, "arm": "feedback", "seconds": 3.0, "accuracy": 0.5, "private_loss": 0.5, "answered": [1], "dropped": {"late": 2}},
]


def begun(path, rows, **changes):
    files = RunDirectory.create(path, replace(RunConfig(), **changes))
    for row in rows:
        files.append_round(row)
    return files


def logged(directory, experiment):
    """Runs by their names, each with its metrics round by round."""
    client = MlflowClient(tracking_uri=tracking_uri(str(directory)))
    found = {}
    for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id]):
        history = {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert run.info.run_name not in found
        found[run.info.run_name] = run, history
    return found


def test_every_number_of_every_round_is_a_metric_at_that_round_and_every_setting_a_parameter(tmp_path):
    for seed in (0, 1):
        begun(tmp_path / "runs" / str(seed), ROWS, seed=seed, num_rounds=2, recipe="demo")
    done = CliRunner().invoke(app, ["export-metrics", str(tmp_path / "runs"), "--mlflow", str(tmp_path / "tracked")])
    assert done.exit_code == 0, done.output
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'tracked'}/mlflow.db" in done.output.replace("\n", "")
    found = logged(tmp_path / "tracked", "demo")
    assert set(found) == {"runs/0", "runs/1"}
    for name, (run, history) in found.items():
        assert history == {
            "seconds": [(1, 2.0), (2, 3.0)],
            "accuracy": [(2, 0.5)],
            "private_loss": [(1, 0.75), (2, 0.5)],
            "answered": [(1, 2.0), (2, 1.0)],
            "dropped/late": [(2, 2.0)],
        }
        assert run.data.params["seed"] == name[-1]
        assert run.data.params["federation.num_devices"] == str(RunConfig().federation.num_devices)
        assert run.info.status == "FINISHED"
        assert run.info.end_time - run.info.start_time == pytest.approx(5000, abs=2)


def test_a_run_that_goes_on_is_logged_on_and_nothing_of_it_twice(tmp_path):
    files = begun(tmp_path / "run", ROWS[:1], num_rounds=2)
    for _ in range(2):
        assert log_to_mlflow(tmp_path / "run", str(tmp_path / "tracked")) == 1
    ((run, history),) = logged(tmp_path / "tracked", RunConfig().recipe or "cooperllm").values()
    assert (history["seconds"], run.info.status) == ([(1, 2.0)], "RUNNING")
    files.append_round(ROWS[1])
    log_to_mlflow(tmp_path / "run", str(tmp_path / "tracked"))
    ((run, history),) = logged(tmp_path / "tracked", RunConfig().recipe or "cooperllm").values()
    assert (history["seconds"], run.info.status) == ([(1, 2.0), (2, 3.0)], "FINISHED")


def test_a_run_begun_anew_in_the_same_directory_is_another_run(tmp_path):
    for began_at in (1000, 2000):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        begun(tmp_path / "run", ROWS, num_rounds=2)
        os.utime(tmp_path / "run" / "config.json", (began_at, began_at))
        log_to_mlflow(tmp_path / "run", str(tmp_path / "tracked"))
    client = MlflowClient(tracking_uri=tracking_uri(str(tmp_path / "tracked")))
    found = client.search_runs([client.get_experiment_by_name(RunConfig().recipe or "cooperllm").experiment_id])
    assert sorted(run.info.start_time for run in found) == [1_000_000, 2_000_000]


def test_more_figures_than_mlflow_takes_at_a_time_all_arrive(tmp_path):
    rows = [{"round": number, "seconds": 1.0, **{f"figure_{place}": float(place) for place in range(30)}} for number in range(1, 71)]
    begun(tmp_path / "run", rows, num_rounds=70)
    log_to_mlflow(tmp_path / "run", str(tmp_path / "tracked"))
    ((_, history),) = logged(tmp_path / "tracked", RunConfig().recipe or "cooperllm").values()
    assert sum(map(len, history.values())) == 70 * 31


def test_without_mlflow_a_sentence_says_which_extra_to_install(tmp_path, monkeypatch):
    begun(tmp_path / "run", ROWS)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r'pip install "cooperllm\[mlflow\]"'):
        log_to_mlflow(tmp_path / "run", str(tmp_path / "tracked"))


def test_where_there_is_no_run_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"found no run, expected rounds.jsonl there or below"):
        log_to_mlflow(tmp_path, str(tmp_path / "tracked"))
    assert not (tmp_path / "tracked").exists()


def test_an_export_to_nowhere_is_refused_in_a_sentence(tmp_path):
    done = CliRunner().invoke(app, ["export-metrics", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "expected --tensorboard, --mlflow or both" in str(done.exception)
