"""Comparisons that are tuned, spread over seeds and processes, killed, and resumed, on a two-layer Llama of random weights."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

import cooperllm
from cooperllm import cli
from cooperllm.config import ArmName, EngineName
from cooperllm.errors import CooperLLMError, RunDirectoryError

ARMS = (ArmName.MEZO_FL, ArmName.CLOUD_ONLY)


def configs(*arms, rounds=6):
    return [replace(cooperllm.recipe("tiny").with_arm(arm), engine=EngineName.LOOPBACK, num_rounds=rounds) for arm in arms or ARMS]


def diverging(rate=1e30):
    (config,) = configs(ArmName.CLOUD_ONLY)
    return replace(config, arm=replace(config.arm, learning_rate=rate))


def test_an_arm_gives_the_same_bits_alone_and_after_another_one(tmp_path):
    alone = cooperllm.run(configs(ArmName.MEZO_FL, rounds=2)[0], tmp_path / "alone")
    both = cooperllm.compare(configs(ArmName.CLOUD_ONLY, ArmName.MEZO_FL, rounds=2), tmp_path / "both")  # they share model and data
    assert (both.path / "mezo-fl" / "replay.log").read_bytes() == (alone.path / "replay.log").read_bytes()


def test_a_killed_comparison_resumes_to_the_results_of_an_uninterrupted_one(tmp_path):
    whole = cooperllm.compare(configs(rounds=2), tmp_path / "whole", seeds=(0, 1), tune=True)
    words = ["compare", "tiny", "--arms", "mezo-fl,cloud-only", "--engine", "loopback", "--rounds", "2", "--out", "killed"]
    words += ["--seeds", "0,1", "--tune", "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from cooperllm import cli; cli.main()", *words], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/summary.json")):
        assert process.poll() is None, "the comparison ended before it could be killed"
        assert time.monotonic() < deadline, "the first run took more than two minutes"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/summary.json")}
    news = []
    again = cooperllm.resume(tmp_path / "killed", tell=news.append)
    assert (again.path / "results.json").read_bytes() == (whole.path / "results.json").read_bytes()
    assert pq.read_table(again.path / "results.parquet").equals(pq.read_table(whole.path / "results.parquet"))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished run was run again"
    assert news[-1].num_ended == news[-1].num_known > len(finished)


def test_several_seeds_leave_the_first_ones_entry_with_all_of_them_beside_it(tmp_path):
    both = cooperllm.compare(configs(rounds=2), tmp_path / "both", seeds=(3, 4))
    for name, arm in json.loads((both.path / "summary.json").read_text())["arms"].items():
        assert [entry["seed"] for entry in arm["seeds"]] == [3, 4]
        assert {key: value for key, value in arm.items() if key != "seeds"} == arm["seeds"][0]
        assert (both.path / f"{name}-{arm['learning_rate']:g}-seed4" / "adapter").is_dir()
    results = json.loads((both.path / "results.json").read_text())
    assert {(row["arm"], row["seed"], row["round"]) for row in results["rows"]} == {
        (arm.value, seed, number) for arm in ARMS for seed in (3, 4) for number in (0, 2)
    }
    both.export(tmp_path / "adapter", "cloud-only")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_divergence_is_a_result_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    both = cooperllm.compare([diverging(), *configs(ArmName.MEZO_FL, rounds=2)], tmp_path / "both")
    assert both.summary["arms"]["cloud-only"]["outcome"] == "diverged"
    assert both.summary["arms"]["mezo-fl"]["finished"]
    assert any("cloud-only" in notice and "diverged" in notice for notice in both.summary["notices"])
    begun = []
    cooperllm.resume(both.path, begun.append)
    assert begun == []
    monkeypatch.setattr(sys, "argv", ["cooperllm", "resume", str(both.path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "cloud-only" in (text := capsys.readouterr().out)
    assert "diverged" in text


def test_a_comparison_without_any_result_says_why(tmp_path):
    with pytest.raises(CooperLLMError, match=r"no run came to its end; cloud-only, rate 1e\+30, seed 0: .*diverged"):
        cooperllm.compare([diverging()], tmp_path / "one")
    assert json.loads((tmp_path / "one" / "results.json").read_text())["arms"]["cloud-only"]["outcomes"] == ["diverged"]


def test_a_damaged_run_is_told_and_spoils_no_other(tmp_path):
    both = cooperllm.compare(configs(rounds=2), tmp_path / "both")
    for name in ("summary.json", "config.json"):
        (both.path / "mezo-fl" / name).unlink()
    again = cooperllm.resume(both.path)
    assert again.summary["arms"]["mezo-fl"]["outcome"] == "failed"
    assert any("config.json does not exist" in notice for notice in again.summary["notices"])
    assert again.summary["arms"]["cloud-only"] == both.summary["arms"]["cloud-only"]


def test_a_damaged_plan_is_refused(tmp_path):
    both = cooperllm.compare(configs(ArmName.MEZO_FL, rounds=1), tmp_path / "one")
    (both.path / "comparison.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"comparison.json is damaged"):
        cooperllm.resume(both.path)


def test_processes_that_memory_has_no_room_for_wait_and_the_first_one_runs(tmp_path):
    news = []
    cooperllm.compare(configs(rounds=2), tmp_path / "both", processes=2, memory_limit_mib=1, tell=news.append)
    assert any("no room for process 2" in item.sentence for item in news)
    assert news[-1].num_ended == 2
